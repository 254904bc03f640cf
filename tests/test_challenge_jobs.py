"""Grand-Challenge jobs: what is found in /input, and that the answer lies exactly where the scan lies."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from challenge_cases import answerer, command, script, segmenter
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.challenge import JobOptions, answer_job
from seerseg.challenge.grand_challenge import find_prompts, prompts_in, read_interfaces
from seerseg.errors import RequestError, UsageError
from seerseg.volume import read_labels, read_volume

OUT = Path("images") / "lung-segmentation" / "output.mha"
OPTIONS = JobOptions("images/lung-segmentation")


def image(path: Path, *, shape_xyz: tuple[int, int, int] = (7, 6, 5), direction: np.ndarray | None = None, **told: Any) -> Path:
    """A .mha with two bright blocks: 90 at low x, 180 at high x (array order)."""
    array = np.zeros(shape_xyz[::-1], np.int16)
    array[1:3, 1:4, 0:2], array[2:4, 2:5, -2:] = 90, 180
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(told.get("spacing", (0.7, 0.8, 2.5)))
    made.SetOrigin(told.get("origin", (-10.1, 22.3, -300.7)))
    made.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(made, str(path), useCompression=True)
    return path


def job(folder: Path, text: Any = "right thing", *, word: str = "interface", **settings: Any) -> Path:
    """A job as the platform mounts it."""
    image(folder / "images" / "chest-ct" / "1f2e.mha", **settings)
    (folder / "request.json").write_text(json.dumps(text))
    sockets = [
        {"slug": "chest-ct", "kind": "Image", "super_kind": "Image", "relative_path": "images/chest-ct"},
        {"slug": "request", "kind": "String", "super_kind": "Value", "relative_path": "request.json"},
    ]
    listed = [{"file": None, "image": {"name": "x.mha"}, "value": None, word: sockets[0]}, {"file": None, "value": text, word: sockets[1]}]
    (folder / "inputs.json").write_text(json.dumps(listed))
    return folder


def same_place(one: Path, other: Path) -> bool:
    a, b = sitk.ReadImage(str(one)), sitk.ReadImage(str(other))
    told = [(i.GetSize(), i.GetSpacing(), i.GetOrigin(), i.GetDirection()) for i in (a, b)]
    return told[0] == told[1]


def test_one_job(tmp_path: Path) -> None:
    """LPS+: low x is the patient's right."""
    source = job(tmp_path / "in")
    answer = answer_job(source, tmp_path / "out", answerer(), OPTIONS)
    assert answer.status == "done"
    assert [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()] == [OUT]
    scan = source / "images" / "chest-ct" / "1f2e.mha"
    assert same_place(tmp_path / "out" / OUT, scan)
    drawn = sitk.ReadImage(str(tmp_path / "out" / OUT))
    assert drawn.GetPixelID() == sitk.sitkUInt8
    assert np.array_equal(sitk.GetArrayFromImage(drawn) == 1, sitk.GetArrayFromImage(sitk.ReadImage(str(scan))) == 90)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    turns = []
    for axis, angle in enumerate((x, y, z)):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        a, b = [k for k in range(3) if k != axis]
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


SIGNED = [
    np.eye(3)[list(order)] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]
ANGLE = st.floats(-0.5, 0.5)


@settings(max_examples=40)
@given(
    st.sampled_from(SIGNED),
    st.tuples(ANGLE, ANGLE, ANGLE),
    st.tuples(*[st.floats(0.1, 6.0)] * 3),
    st.tuples(*[st.floats(-400, 400)] * 3),
    st.booleans(),
)
def test_the_answer_lies_where_the_scan_lies(
    axes: np.ndarray, angles: tuple[float, ...], spacing: tuple[float, ...], origin: tuple[float, ...], oblique: bool
) -> None:
    direction = axes @ rotation(*angles) if oblique else axes
    bright = segmenter(bright=lambda volume, prompt: volume.array > 120)
    with tempfile.TemporaryDirectory() as folder:
        source = job(Path(folder) / "in", "bright", direction=direction, spacing=spacing, origin=origin)
        answer = answer_job(source, Path(folder) / "out", answerer(bright), OPTIONS)
        assert answer.status == "done", answer.reason
        scan, drawn = source / "images" / "chest-ct" / "1f2e.mha", Path(folder) / "out" / OUT
        assert same_place(scan, drawn)
        stored = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (scan, drawn)]
        assert np.array_equal(stored[0] > 120, stored[1] == 1)
        labels, grid = read_labels(drawn)
        volume = read_volume(scan)
        assert grid.close_to(volume.grid, 1e-9)
        assert np.array_equal(labels == 1, volume.array > 120)


def test_sides_come_from_the_header(tmp_path: Path) -> None:
    for turned, value in ((np.eye(3), 90), (np.diag([-1.0, -1.0, 1.0]), 180)):
        source = job(tmp_path / str(value), "right thing", direction=turned)
        answer_job(source, tmp_path / f"out{value}", answerer(), OPTIONS)
        drawn = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"out{value}" / OUT)))
        scan = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "images" / "chest-ct" / "1f2e.mha")))
        assert np.array_equal(drawn == 1, scan == value)


def test_scans_of_other_dimensions_and_formats(tmp_path: Path) -> None:
    source = job(tmp_path / "four")
    scan = source / "images" / "chest-ct" / "1f2e.mha"
    plain = sitk.ReadImage(str(scan))
    sitk.WriteImage(sitk.JoinSeries(plain), str(scan))
    assert answer_job(source, tmp_path / "out4", answerer(), OPTIONS).status == "done"
    assert same_place(scan, tmp_path / "out4" / OUT)
    source = job(tmp_path / "nifti")
    scan = source / "images" / "chest-ct" / "1f2e.mha"
    sitk.WriteImage(plain, str(scan.with_suffix(".nii.gz")))
    scan.unlink()
    assert answer_job(source, tmp_path / "outn", answerer(), OPTIONS).status == "done"
    drawn = sitk.ReadImage(str(tmp_path / "outn" / OUT))
    assert np.allclose(drawn.GetDirection(), plain.GetDirection(), atol=1e-6)
    assert np.allclose(drawn.GetOrigin(), plain.GetOrigin(), atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(drawn) == 1, sitk.GetArrayFromImage(plain) == 90)


def test_texts_of_a_job(tmp_path: Path) -> None:
    for value, texts in (
        ("liver", {1: "liver"}),
        (["liver", "spleen"], {1: "liver", 2: "spleen"}),
        ({"2": "liver", "5": "spleen"}, {2: "liver", 5: "spleen"}),
        ({"text": ["liver"]}, {1: "liver"}),
        ({"prompt": "liver", "id": 3}, {1: "liver"}),
    ):
        read = prompts_in(value)
        assert read is not None
        assert read.first == texts
    for nothing in (None, 3, [], [1], {}, {"a": "b"}, {"text": 3}, " "):
        assert prompts_in(nothing) is None
    source = job(tmp_path / "in", ["right thing", "left thing"], word="socket")
    answer = answer_job(source, tmp_path / "out", answerer(), OPTIONS)
    assert [(c.value, c.text, c.status) for c in answer.classes] == [(1, "right thing", "ok"), (2, "left thing", "ok")]
    fixed = JobOptions("images/x", {4: "left thing"})
    assert answer_job(source, tmp_path / "fixed", answerer(), fixed).classes[0].value == 4
    (source / "extra.json").write_text('"left thing"')
    (source / "inputs.json").unlink()  # then what lies there is read
    with pytest.raises(RequestError, match="--prompt_slug"):
        find_prompts(source, read_interfaces(source), None)
    chosen = JobOptions("images/x", prompt="extra")
    assert answer_job(source, tmp_path / "chosen", answerer(), chosen).classes[0].text == "left thing"


def broken(source: Path, kind: str) -> JobOptions:
    scan = source / "images" / "chest-ct" / "1f2e.mha"
    if kind == "cut short":
        scan.write_bytes(scan.read_bytes()[:-40])
    elif kind == "no image at all":
        scan.write_bytes(b"nothing")
    elif kind == "image gone":
        scan.unlink()
    elif kind == "two images":
        image(scan.with_name("other.mha"))
    elif kind == "inputs.json damaged":
        (source / "inputs.json").write_text("{")
    elif kind == "inputs.json of another kind":
        (source / "inputs.json").write_text('[{"a": 1}]')
    elif kind == "a path that leads out":
        (source / "inputs.json").write_text('[{"interface": {"slug": "x", "relative_path": "../../etc"}}]')
    elif kind == "no text":
        (source / "request.json").write_text("3")
        (source / "inputs.json").unlink()
    elif kind == "text damaged":
        (source / "request.json").write_bytes(b"\xff\xfe")
    elif kind == "unknown slug":
        return JobOptions("images/lung-segmentation", image="ct")
    return OPTIONS


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("cut short", True),
        ("no image at all", False),
        ("image gone", False),
        ("two images", True),
        ("inputs.json damaged", True),
        ("inputs.json of another kind", True),
        ("a path that leads out", True),
        ("no text", True),
        ("text damaged", True),
        ("unknown slug", True),
    ],
)
def test_a_broken_job_gets_an_empty_answer(kind: str, known: bool, tmp_path: Path) -> None:
    source = job(tmp_path / "in")
    whole = image(tmp_path / "whole.mha")
    options = broken(source, kind)
    answer = answer_job(source, tmp_path / "out", answerer(never_fail=True), options)
    assert answer.status == "failed"
    assert answer.reason.endswith(".")
    assert answer.fault == ""
    drawn = sitk.ReadImage(str(tmp_path / "out" / OUT))
    assert not sitk.GetArrayFromImage(drawn).any()
    assert drawn.GetSize() == ((7, 6, 5) if known else (1, 1, 1))
    if known:
        assert same_place(tmp_path / "out" / OUT, whole)


def test_the_output_stays_in_its_folder(tmp_path: Path) -> None:
    for path in ("/etc", "../x", "a/../../x", "."):
        with pytest.raises(UsageError, match="--output_path"):
            answer_job(job(tmp_path / "in"), tmp_path / "out", answerer(never_fail=True), JobOptions(path))


def test_the_command(tmp_path: Path) -> None:
    source = job(tmp_path / "in", "nothing said here")
    volume = read_volume(source / "images" / "chest-ct" / "1f2e.mha")
    drawn = script(tmp_path / "script", np.where(volume.array == 90, 1, np.where(volume.array == 180, 2, 0)).astype(np.uint8), volume.grid)
    words = (
        "predict",
        "--convention",
        "grand_challenge",
        "-i",
        source,
        "-o",
        tmp_path / "out",
        "--segmenter",
        drawn,
        "--reasoner",
        "verbatim",
    )
    more = (
        "-device",
        "cpu",
        "--output_path",
        "images/lung-segmentation",
        "--never_fail",
        "--prompt",
        "left thing",
        "--prompt",
        "7=right thing",
    )
    done = command(*words, *more)
    assert done.returncode == 0, done.stderr
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / OUT)))
    scan = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "images" / "chest-ct" / "1f2e.mha")))
    assert np.array_equal(array, np.where(scan == 180, 1, np.where(scan == 90, 7, 0)))
    assert "'left thing' -> left thing  ok" in done.stdout
