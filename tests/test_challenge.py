"""Challenge scans: what is read, what is drawn where, and that nothing wrong with a scan costs more than its own answer."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from challenge_cases import SHAPE_DHW, SPACING_WHD, Noted, answerer, command, grey, npz, scan, script, segmenter, side, truth_dhw
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.challenge import Answerer, predict_npz, read_prompts, read_scan
from seerseg.challenge.answers import MOST_INSTANCES, number_instances, paint
from seerseg.challenge.npz import as_stored, known_shape, parse_prompts, read_answer, read_npz
from seerseg.cli.challenge import challenge
from seerseg.errors import ImageError, ModelError, NothingToDoError, RequestError, UsageError
from seerseg.views import SEER_VIEWS, render


def segs(path: Path) -> np.ndarray:
    with np.load(path) as file:
        assert file.files == ["segs"]
        return file["segs"]


def test_every_scan_gets_a_file_of_its_name_with_its_classes(tmp_path: Path) -> None:
    for name in ("MR_a.npz", "MR_b.npz"):
        scan(tmp_path / "in" / name, prompts={"7": "right thing", "3": "left thing", "instance_label": 0})
    (tmp_path / "in" / "readme.txt").write_text("x")
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["MR_a.npz", "MR_b.npz"]
    assert report.exit_code == 0
    assert report.ignored == ("readme.txt",)
    drawn = segs(tmp_path / "out" / "MR_a.npz")
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn == 7, truth_dhw() == 1)
    assert np.array_equal(drawn == 3, truth_dhw() == 2)
    assert [(c.value, c.status, c.voxels) for c in report.answers[0].classes] == [
        (3, "ok", int((truth_dhw() == 2).sum())),
        (7, "ok", int((truth_dhw() == 1).sum())),
    ]


def test_left_and_right_of_an_npz(tmp_path: Path) -> None:
    """W runs to the patient's left, H to the back, D up; spacing goes (W, H, D). The views show the patient's right on the left."""
    volume = read_scan(scan(tmp_path / "MR_a.npz"))
    assert volume.source is not None
    assert volume.source.laterality == "assumed"
    assert volume.grid.spacing_zyx == SPACING_WHD[::-1]
    marked = np.zeros(SHAPE_DHW, np.uint8)
    marked[5, 1, 2] = 1  # high, to the front, to the patient's right
    where = np.argwhere(read_scan(scan(tmp_path / "MR_b.npz", imgs=marked)).array)[0]
    front_right_top = volume.grid.to_world(where) > volume.grid.corners_mm.mean(axis=0)
    assert front_right_top.tolist() == [True, True, True]
    assert np.array_equal(as_stored(volume.array, volume), grey())
    shown = render(read_scan(scan(tmp_path / "MR_c.npz", imgs=truth_dhw() * 200)), SEER_VIEWS)
    pixels = np.argwhere(shown.at(0, 2).pixels[..., 0] > 128)  # canonical z 2 is D 2: the block at low W alone
    assert pixels[:, 1].mean() < SEER_VIEWS.size_px / 2


@settings(max_examples=20)
@given(st.permutations(range(3)), st.integers(0, 7))
def test_answers_lie_as_the_scan_lies(order: list[int], seed: int) -> None:
    """Any shape: what is bright comes back voxel for voxel."""
    import tempfile

    shape = np.array([3 + seed, 4, 5 + 2 * seed])[order]
    rng = np.random.default_rng(seed)
    picture = (rng.random(shape) > 0.6).astype(np.uint8) * 200
    picture.flat[0] = 200
    bright = Noted({"everything bright": lambda volume, prompt: volume.array > 100})
    with tempfile.TemporaryDirectory() as folder:
        path = npz(Path(folder) / "in" / "US_x.npz", imgs=picture, spacing=(1.0, 2.0, 3.0), text_prompts={"1": "everything bright"})
        predict_npz(path, Path(folder) / "out", answerer(bright))
        assert np.array_equal(segs(Path(folder) / "out" / "US_x.npz"), picture > 100)


def test_one_encoding_for_all_classes(tmp_path: Path) -> None:
    double = segmenter(**{f"thing_{i}": np.zeros(SHAPE_DHW, bool) for i in range(20)})
    scan(tmp_path / "in" / "CT_a.npz", prompts={str(i): f"thing {i}" for i in range(1, 20)})
    predict_npz(tmp_path / "in", tmp_path / "out", answerer(double))
    assert [len(call.prompts) for call in double.calls] == [19]


def test_hounsfield_units_are_put_back(tmp_path: Path) -> None:
    levels = np.arange(240, dtype=np.uint8).reshape(6, 8, 5)
    path = scan(tmp_path / "CT_a.npz", imgs=levels)
    volume = read_scan(path)
    assert volume.modality == "CT"
    assert volume.source is not None
    assert any("window of 400 HU about 40" in note for note in volume.source.notes)
    assert np.abs(as_stored(volume.array, volume) - (levels.astype(float) * 400 / 255 - 160)).max() <= 0.5
    lung = read_scan(path, ct_window=(-160, 1500))
    assert lung.array.min() == -910
    plain = read_scan(path, ct_window=None)
    assert plain.modality is None
    assert np.array_equal(as_stored(plain.array, plain), levels)
    for name, modality in (("MRI_x.npz", "MR"), ("MR_x.npz", "MR"), ("PET_x.npz", "PET"), ("Microscopy_x.npz", None), ("x.npz", None)):
        assert read_scan(scan(tmp_path / name)).modality == modality


def test_overlapping_classes() -> None:
    big, small, twin = np.zeros((3, 4, 4, 4), bool)
    big[:, :, :3], small[1:3, 1:3, 1:4], twin[1:3, 1:3, 2:] = True, True, True
    array, notes = paint({4: small, 2: big, 9: twin}, (4, 4, 4))
    assert np.array_equal(array == 9, twin)  # fewest voxels
    assert np.array_equal(array == 4, small & ~twin)
    assert np.array_equal(array == 2, big & ~small & ~twin)
    assert "claimed more than once" in notes[0]
    first, second = np.zeros((2, 2, 2, 2), bool)
    first[0], second[0] = True, True
    assert set(np.unique(paint({5: first, 3: second}, (2, 2, 2))[0])) == {0, 3}
    array, notes = paint({300: first}, (2, 2, 2))
    assert (array.dtype, array.max()) == (np.uint16, 300)
    assert "8 bits" in notes[0]


def test_instances_are_numbered(tmp_path: Path) -> None:
    scan(tmp_path / "in" / "MR_a.npz", prompts={"1": "bright", "instance_label": 1})
    double = segmenter(bright=lambda volume, prompt: volume.array > 80)
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer(double))
    drawn = segs(tmp_path / "out" / "MR_a.npz")
    assert report.answers[0].instances
    assert set(np.unique(drawn)) == {0, 1, 2}
    assert len(np.unique(drawn[truth_dhw() == 1])) == len(np.unique(drawn[truth_dhw() == 2])) == 1
    diagonal = np.zeros((2, 2, 2), bool)
    diagonal[0, 0, 0] = diagonal[1, 1, 1] = True
    assert number_instances({1: diagonal}, (2, 2, 2))[0].max() == 2  # by faces
    many = np.zeros((1, 1, 1200), bool)
    many[..., ::3], many[..., 1] = True, True
    numbered, notes = number_instances({1: many}, many.shape)
    assert numbered.max() == MOST_INSTANCES
    assert numbered[0, 0, 0] == numbered[0, 0, 1] == 1  # the largest is kept
    assert "of 400 instances" in notes[0]


def test_prompts_are_read_in_every_form() -> None:
    read = parse_prompts({3: np.str_("spleen"), "1": ["liver", "the liver", "liver"], "instance_label": np.int64(1), "x": "no", "2": 7})
    assert read is not None
    assert read.texts == {1: ("liver", "the liver"), 3: ("spleen",)}
    assert list(read.texts) == [1, 3]
    assert read.instances
    for nothing in (None, {}, [], {"instance_label": 1}, {"0": "a", "-1": "b", "1.5": "c"}, "liver", {"1": " "}):
        assert parse_prompts(nothing) is None


def test_a_json_beside_the_scan_asks_where_the_file_does_not(tmp_path: Path) -> None:
    path = npz(tmp_path / "in" / "MR_a.npz", imgs=grey(), spacing=SPACING_WHD)
    with pytest.raises(RequestError, match=r"no MR_a.json beside it"):
        read_prompts(path)
    path.with_suffix(".json").write_text(json.dumps({"1": "right thing", "instance_label": 0}))
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer())
    assert report.ignored == ()
    assert np.array_equal(segs(tmp_path / "out" / "MR_a.npz"), truth_dhw() == 1)


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("was_run", "w"))


def hostile(path: Path, payload: bytes, *, member: str = "text_prompts") -> Path:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{member}.npy", head.getvalue() + payload)
    return path


HOSTILE = {
    "open": pickle.dumps(_RunsCode()),
    "os.system": b"cos\nsystem\n(S'touch was_run'\ntR.",
    "eval": b'cbuiltins\neval\n(S\'open("was_run", "w")\'\ntR.',
    "numpy.load": b"cnumpy\nload\n(S'was_run'\ntR.",
    "a huge array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I100000000000\ntS'b'\ntR.",
    "an array of objects from bytes": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'AAAAAAAA'\ntR.",
    "rubbish": b"\x80\x04not a pickle",
    "nesting": b"(" * 100000 + b".",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_never_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(npz(tmp_path / "in" / "CT_bad.npz", imgs=grey(), spacing=SPACING_WHD), HOSTILE[kind])
    scan(tmp_path / "in" / "CT_good.npz")
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer())
    bad, good = report.answers
    assert (bad.status, good.status) == ("failed", "done")
    assert "Do not trust this file" in bad.reason
    assert bad.fault == ""
    assert not (tmp_path / "was_run").exists()
    assert not segs(tmp_path / "out" / "CT_bad.npz").any()
    assert segs(tmp_path / "out" / "CT_bad.npz").shape == SHAPE_DHW
    assert report.exit_code == 3


def test_the_pickles_above_do_run_elsewhere(tmp_path: Path) -> None:
    """What the refusal is for."""
    path = hostile(npz(tmp_path / "CT_bad.npz", imgs=grey()), HOSTILE["open"])
    code = f"import numpy as np; np.load({str(path)!r}, allow_pickle=True)['text_prompts']"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "was_run").exists()


def broken(path: Path, kind: str) -> Path:
    """A scan that cannot be used, in one of many ways."""
    if kind == "no zip":
        path.write_bytes(b"nothing")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "cut short":
        scan(path, imgs=np.random.default_rng(0).integers(0, 255, (20, 30, 40)).astype(np.uint8))
        path.write_bytes(path.read_bytes()[:6000])
    elif kind == "flipped bytes":
        data = bytearray(scan(path).read_bytes())
        data[200:240] = bytes(40)
        path.write_bytes(data)
    elif kind == "a bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (10, 100, 100)})
            archive.writestr("imgs.npy", head.getvalue() + bytes(1000))
    else:
        more: dict[str, Any] = {
            "colour": {"imgs": np.zeros((*SHAPE_DHW, 3), np.uint8)},
            "no spacing": {"spacing": np.array([1.0, 0.0, 1.0])},
            "spacing in words": {"spacing": np.array(["a", "b", "c"])},
            "not a number": {"imgs": np.full(SHAPE_DHW, np.nan, np.float32)},
            "complex": {"imgs": np.zeros(SHAPE_DHW, np.complex64)},
            "no prompts": {"text_prompts": np.array(3)},
            "two prompts": {"text_prompts": np.array([{"1": "a"}, {"2": "b"}], dtype=object)},
        }[kind]
        scan(path, **more)
    return path


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("no zip", (1, 1, 1)),
        ("empty file", (1, 1, 1)),
        ("cut short", (20, 30, 40)),
        ("flipped bytes", None),
        ("a bomb", (10, 100, 100)),
        ("colour", SHAPE_DHW),
        ("no spacing", SHAPE_DHW),
        ("spacing in words", SHAPE_DHW),
        ("not a number", SHAPE_DHW),
        ("complex", SHAPE_DHW),
        ("no prompts", SHAPE_DHW),
        ("two prompts", SHAPE_DHW),
    ],
)
def test_a_scan_that_cannot_be_used_gets_an_empty_answer(kind: str, shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    broken(tmp_path / "in" / "CT_bad.npz", kind)
    scan(tmp_path / "in" / "MR_good.npz")
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer())
    bad = report.answers[0]
    assert bad.status == "failed"
    assert "CT_bad.npz" in bad.reason
    assert bad.reason.count("\n") == 0
    assert bad.fault == ""
    empty = read_answer(tmp_path / "out" / "CT_bad.npz")
    assert not empty.any()
    assert shape is None or empty.shape == shape
    assert np.array_equal(segs(tmp_path / "out" / "MR_good.npz"), truth_dhw())
    assert report.exit_code == 3
    assert predict_npz(tmp_path / "in", tmp_path / "out", answerer(never_fail=True)).exit_code == 0


def test_classes_fail_one_by_one(tmp_path: Path) -> None:
    scan(tmp_path / "in" / "CT_a.npz", prompts={"1": "right thing", "2": "unheard of", "3": "x" * 100000, "4": "left thing"})
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer())
    answer = report.answers[0]
    assert answer.status == "partial"
    assert [c.status for c in answer.classes] == ["ok", "fault", "failed", "ok"] or answer.classes[1].status in ("fault", "unsupported")
    assert "Class 2 ('unheard of')" in answer.reason
    assert "Class 3" in answer.reason
    assert set(np.unique(segs(tmp_path / "out" / "CT_a.npz"))) == {0, 1, 4}
    assert report.exit_code == 3


def test_what_a_segmenter_raises_is_the_scans_reason(tmp_path: Path) -> None:
    def explode(volume: Any, prompt: Any) -> Any:
        raise RuntimeError("the network fell over")

    def starve(volume: Any, prompt: Any) -> Any:
        raise MemoryError

    scan(tmp_path / "in" / "CT_a.npz", prompts={"1": "bomb"})
    scan(tmp_path / "in" / "CT_b.npz", prompts={"1": "hog"})
    report = predict_npz(tmp_path / "in", tmp_path / "out", answerer(segmenter(bomb=explode, hog=starve)))
    assert "the network fell over" in report.answers[0].reason
    assert "Traceback" in report.answers[0].fault
    assert "not enough memory" in report.answers[1].reason
    assert segs(tmp_path / "out" / "CT_a.npz").shape == SHAPE_DHW


def test_a_killed_process_has_answered(tmp_path: Path) -> None:
    scan(tmp_path / "in" / "CT_a.npz")
    code = (
        "import os, sys; from pathlib import Path; from challenge_cases import answerer; from seerseg.challenge import predict_npz\n"
        "die = lambda volume, prompt: os._exit(137)\n"
        "from seerseg.segmenters.scripted import ScriptedSegmenter\n"
        "double = ScriptedSegmenter({'right thing': die, 'left thing': die}, identity='x')\n"
        "predict_npz(Path(sys.argv[1]), Path(sys.argv[2]), answerer(double, never_fail=sys.argv[3] == '1'))\n"
    )
    for flag, left in (("0", []), ("1", ["CT_a.npz"])):
        words = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out"), flag]
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 137, done.stderr
        assert [p.name for p in (tmp_path / "out").glob("*.npz")] == left
    assert segs(tmp_path / "out" / "CT_a.npz").shape == SHAPE_DHW


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    from seerseg.prediction import Predictor

    scan(tmp_path / "in" / "CT_a.npz")

    def make() -> Predictor:
        return Predictor("nano:/nowhere", "verbatim", device="cpu")

    with pytest.raises(ModelError):
        predict_npz(tmp_path / "in", tmp_path / "out", Answerer(make))
    report = predict_npz(tmp_path / "in", tmp_path / "out", Answerer(make, never_fail=True))
    assert report.exit_code == 0
    assert report.answers[0].status == "failed"
    assert "/nowhere" in report.answers[0].reason
    assert not segs(tmp_path / "out" / "CT_a.npz").any()


def test_misuse_is_said(tmp_path: Path) -> None:
    scan(tmp_path / "in" / "CT_a.npz")
    with pytest.raises(UsageError, match="is the input folder"):
        predict_npz(tmp_path / "in", tmp_path / "in", answerer())
    with pytest.raises(UsageError, match="no folder"):
        predict_npz(tmp_path / "nowhere", tmp_path / "out", answerer())
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToDoError):
        predict_npz(tmp_path / "empty", tmp_path / "out", answerer())


def test_a_signal_leaves_the_rest(tmp_path: Path) -> None:
    for name in "abc":
        scan(tmp_path / "in" / f"CT_{name}.npz")
    seen: list[str] = []
    report = predict_npz(
        tmp_path / "in", tmp_path / "out", answerer(), progress=lambda a, n: seen.append(a.case), stopping=lambda: len(seen) == 1
    )
    assert report.not_started == ("CT_b.npz", "CT_c.npz")
    assert report.exit_code == 75


@settings(max_examples=80)
@given(st.binary(max_size=400), st.integers(0, 1500))
def test_no_damage_is_a_crash(noise: bytes, at: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = scan(Path(folder) / "CT_x.npz")
        data = bytearray(path.read_bytes())
        data[at : at + len(noise)] = noise
        path.write_bytes(data)
        shape = known_shape(path)
        assert shape is None or len(shape) == 3
        for read in (read_scan, read_prompts):
            with suppress(ImageError, RequestError):
                read(path)


def test_arrays_in_fortran_order_and_of_other_versions(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = npz(tmp_path / "a.npz", imgs=np.asfortranarray(array), empty=np.zeros((0, 3)), scalar=np.float64(2.5))
    read = read_npz(path, ("imgs", "empty", "scalar"))
    assert np.array_equal(read["imgs"], array)
    assert read["empty"].shape == (0, 3)
    assert read["scalar"] == 2.5
    with zipfile.ZipFile(path, "a") as archive:
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array, version=(2, 0))
        archive.writestr("second.npy", stream.getvalue())
        archive.writestr("other.npy", b"\x93NUMPY\x09\x00" + bytes(100))
    assert np.array_equal(read_npz(path, ("second",))["second"], array)
    with pytest.raises(ImageError, match="unknown version"):
        read_npz(path, ("other",))


def test_the_command(tmp_path: Path) -> None:
    path = scan(tmp_path / "in" / "CT_a.npz")
    (tmp_path / "in" / "CT_b.npz").write_bytes(b"no")
    volume = read_scan(path)
    labels = np.zeros(volume.grid.shape_zyx, np.uint8)
    for value, words in ((1, "right"), (2, "left")):
        from seerseg.prompts import Prompt

        labels[side(volume, Prompt(text=words))] = value
    drawn = script(tmp_path / "script", labels, volume.grid)
    words = ("predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "--segmenter", drawn, "--reasoner", "verbatim", "-device", "cpu")
    done = command(*words, "--log", tmp_path / "log.jsonl", "--json")
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert [s["status"] for s in told["scans"]] == ["done", "failed"]
    assert "CT_b.npz: an empty answer was written." in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["case"] for line in lines] == ["CT_a.npz", "CT_b.npz"]
    assert np.array_equal(segs(tmp_path / "out" / "CT_a.npz"), truth_dhw())
    for more, said in (
        (("--modality", "CT"), "does not belong"),
        (("--ct_window", "40", "-3"), "Hounsfield"),
        (("-f", "0"), "name it with -d"),
        (("--nver_fail",), "--never_fail"),
    ):
        wrong = CliRunner().invoke(challenge, [*map(str, words), *more])
        assert (wrong.exit_code, said in wrong.output) == (2, True), wrong.output


def test_an_answer_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    scan(tmp_path / "in" / "CT_a.npz")
    (tmp_path / "out").write_text("in the way")
    done = command("predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "--segmenter", "grow", "--never_fail", "-device", "cpu")
    assert done.returncode == 1
    assert "Choose a folder" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
