"""The integrity report: every fault is found, named in mm, given a remedy; none ends the report; sound data give none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import raw_datasets as rd

from seerseg.dataset import IntegrityReport, hu_fault, open_dataset, verify_dataset

IMAGE = "imagesTr/case_2_0000.nii.gz"
LABEL = "labelsTr/case_2.nii.gz"
PLAIN = np.diag([1.0, 1.0, 2.0, 1.0])


def report(folder: Path, workers: int = 1) -> IntegrityReport:
    return verify_dataset(open_dataset(folder, strict=False), workers)


def moved(**by: float) -> np.ndarray:
    affine = PLAIN.copy()
    for axis, mm in by.items():
        affine["xyz".index(axis), 3] += mm
    return affine


def flipped() -> tuple[np.ndarray, np.ndarray]:
    """The label stored from right to left: another array, the same place in the world."""
    affine = PLAIN.copy()
    affine[0, 0], affine[0, 3] = -1.0, rd.SHAPE_XYZ[0] - 1.0
    return rd.label()[::-1], affine


def request(target: object, case: str = "case_2") -> dict[str, object]:
    return {"id": "r", "case": case, "text": "please", "target": target}


def ask(folder: Path, line: dict[str, object]) -> None:
    (folder / "requests.jsonl").write_text(json.dumps(line) + "\n")


def with_nan(folder: Path) -> None:
    array = rd.scan(5).astype(np.float32)
    array[3, 3, 3] = np.nan
    rd.write(folder / IMAGE, array)


def second_channel(folder: Path) -> None:
    rd.describe(folder, ["MRI", "T2"], {"background": 0, "liver": 1, "spleen": 2}, 3)
    for name in ("case_1", "case_2", "case_3"):
        rd.write(folder / "imagesTr" / f"{name}_0001.nii.gz", rd.scan(hash(name) % 97), moved(z=14.0) if name == "case_2" else PLAIN)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turned_copy(folder: Path) -> None:
    rd.write(folder / IMAGE, rd.scan(0)[::-1, :, ::-1])


def unknown_value(folder: Path) -> None:
    array = rd.label()
    array[9, 9, 9] = 7
    rd.write(folder / LABEL, array)


def sides(folder: Path) -> None:
    for side in ("left", "right"):
        rd.write(folder / "imagesTr" / f"p7_{side}_0000.nii.gz", rd.scan(ord(side[0])))
        rd.write(folder / "labelsTr" / f"p7_{side}.nii.gz", rd.label())


def two_places(folder: Path) -> None:
    rd.write(folder / IMAGE, rd.scan(5))
    image = nib.load(folder / IMAGE)
    image.header.set_qform(np.diag([-1.0, 1.0, 2.0, 1.0]), 1)
    image.header.set_sform(PLAIN, 1)
    nib.save(nib.Nifti1Image(rd.scan(5), None, image.header), folder / IMAGE)


def without_orientation(folder: Path) -> None:
    rd.write(folder / IMAGE, rd.scan(8), codes=(0, 0))
    rd.write(folder / LABEL, rd.label(), codes=(0, 0))


def bad_splits(folder: Path) -> None:
    (folder / "splits.json").write_text(json.dumps({"schema": 1, "test": ["case_1"], "folds": [{"train": ["case_1"], "val": []}]}))


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "no label": (lambda f: (f / LABEL).unlink(), "error", "missing-label", "Case 'case_2' has no label"),
    "orphan": (lambda f: shutil.copy(f / LABEL, f / "labelsTr" / "ghost.nii.gz"), "warning", "orphan-label", "belongs to no image"),
    "stray": (lambda f: (f / "imagesTr" / "notes.txt").touch(), "warning", "ignored-file", "notes.txt is not named like"),
    "shape": (
        lambda f: rd.write(f / LABEL, rd.label((12, 14, 8))),
        "error",
        "shape",
        r"shapes \(z, y, x\) \(8, 14, 12\) and \(10, 14, 12\)",
    ),
    "shifted": (lambda f: rd.write(f / LABEL, rd.label(), moved(x=3.0, y=4.0)), "error", "position", "corners up to 5 mm apart"),
    "a little": (lambda f: rd.write(f / LABEL, rd.label(), moved(x=0.05)), "warning", "position", "corners up to 0.05 mm apart"),
    "finer": (
        lambda f: rd.write(f / LABEL, np.repeat(rd.label(), 2, 2), np.diag([1.0, 1, 1, 1])),
        "warning",
        "label-grid",
        "on another grid",
    ),
    "far away": (lambda f: rd.write(f / LABEL, rd.label(), moved(z=900.0)), "error", "position", "corners up to 900 mm apart"),
    "value": (unknown_value, "error", "undeclared-label", r"does not declare: 7 \(1 voxel\)"),
    "halves": (lambda f: rd.write(f / LABEL, rd.label() * np.float32(0.5)), "error", "unreadable-label", "labels are whole numbers"),
    "nothing": (lambda f: rd.write(f / LABEL, rd.label() * 0), "warning", "empty-label", "nothing but background"),
    "nan": (with_nan, "error", "not-finite", "1 voxels were not finite"),
    "constant": (lambda f: rd.write(f / IMAGE, rd.scan(1) * 0 + 7), "warning", "constant", "every voxel is 7"),
    "truncated": (lambda f: cut(f / IMAGE), "error", "unreadable", "cut short"),
    "truncated label": (lambda f: cut(f / LABEL), "error", "unreadable-label", "cut short"),
    "no image": (lambda f: (f / IMAGE).write_text("hello"), "error", "unreadable", "is not a NIfTI image"),
    "in time": (lambda f: rd.write(f / IMAGE, np.zeros((4, 4, 4, 3), np.int16)), "error", "unreadable", "3 volumes in one file"),
    "no side": (without_orientation, "warning", "laterality-assumed", "which side is left"),
    "two places": (two_places, "warning", "sform-qform", "sform and qform differ by up to"),
    "channels": (second_channel, "error", "channel-grid", "case_2_0001.nii.gz and .*case_2_0000.nii.gz .* corners up to 14 mm"),
    "request case": (lambda f: ask(f, request("liver", "case_22")), "error", "request-case", "Did you mean case_2"),
    "request label": (lambda f: ask(f, request(["liver", "splen"])), "error", "request-label", "'splen'.* Did you mean spleen"),
    "request line": (lambda f: ask(f, {"case": "case_1"}), "error", "bad-request", "requests.jsonl:1"),
    "copy": (
        lambda f: shutil.copy(f / "imagesTr/case_1_0000.nii.gz", f / IMAGE),
        "warning",
        "one-subject",
        "case_1, case_2 hold the same voxels",
    ),
    "turned copy": (turned_copy, "warning", "one-subject", "case_1, case_2 hold the same voxels"),
    "sides": (sides, "warning", "one-subject", "p7_left, p7_right look like one subject"),
    "subjects": (lambda f: (f / "subjects.json").write_text("[]"), "error", "bad-subjects", "must map each subject"),
    "splits": (bad_splits, "error", "splits", "of the same subject"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_only_that(tmp_path: Path, fault: str) -> None:
    spoil, severity, kind, sentence = FAULTS[fault]
    folder = rd.make(tmp_path / "Dataset001_Toy")
    spoil(folder)
    found = report(folder)
    assert {(p.severity, p.kind) for p in found.problems} == {(severity, kind)}
    (problem,) = [p for p in found.problems if p.kind == kind]
    assert re.search(sentence, problem.message), problem.message
    assert problem.remedy.endswith(".")
    assert "\n" not in problem.message + problem.remedy
    assert found.ok == (severity == "warning")


def test_sound_datasets_have_no_problem(tmp_path: Path) -> None:
    folder = rd.make(tmp_path / "plain", requests=[request("liver"), {**request(None), "id": "s"}])
    assert report(folder).problems == []


def test_a_label_mirrored_in_its_array_but_right_in_the_world_is_no_problem(tmp_path: Path) -> None:
    folder = rd.make(tmp_path)
    rd.write(folder / LABEL, *flipped())
    assert report(folder).problems == []
    rd.write(folder / LABEL, flipped()[0][:, ::-1], flipped()[1])  # and this one is truly mirrored, which no header can tell
    assert report(folder).problems == []


def test_all_at_once_and_in_parallel(tmp_path: Path) -> None:
    """Faults of every kind in one dataset: the report goes on to the end, and several processes find the same."""
    folder = rd.make(tmp_path / "Dataset001_Toy", [f"case_{i}" for i in range(1, 8)], channels=("CT",))
    cut(folder / "imagesTr" / "case_1_0000.nii.gz")
    (folder / "labelsTr" / "case_2.nii.gz").unlink()
    rd.write(folder / "labelsTr" / "case_3.nii.gz", rd.label(), moved(z=6.0))
    rd.write(folder / "imagesTr" / "case_4_0000.nii.gz", (rd.scan(4) % 200).astype(np.uint8))
    rd.write(folder / "imagesTr" / "case_5_0000.nii.gz", np.full(rd.SHAPE_XYZ, np.nan, np.float32))
    (folder / "imagesTr" / "case_6_0000.nii.gz").unlink()
    ask(folder, request("pancreas", "case_7"))
    one, two = report(folder, 1), report(folder, 2)
    assert one == two
    kinds = {(p.case, p.kind) for p in one.problems}
    assert kinds == {
        ("case_1", "unreadable"),
        ("case_2", "missing-label"),
        ("case_3", "position"),
        ("case_4", "hu-implausible"),
        ("case_5", "unreadable"),
        (None, "orphan-label") if (None, "orphan-label") in kinds else ("case_6", "orphan-label"),
        ("case_7", "request-label"),
    }
    assert not one.ok
    assert json.loads(json.dumps(one.to_json()))["ok"] is False
    text = one.explain()
    assert text.startswith("Dataset001_Toy: 6 cases checked, 5 errors, 2 warnings.")
    assert text.index("ERROR") < text.index("WARNING")
    assert all(p.remedy in text for p in one.problems)


def test_long_lists_are_cut_for_people_only(tmp_path: Path) -> None:
    folder = rd.make(tmp_path, [f"c{i:02d}" for i in range(30)])
    shutil.rmtree(folder / "labelsTr")
    found = report(folder)
    assert len(found.problems) == 30
    assert found.explain(limit=5).count("has no label") == 5
    assert "and 25 more" in found.explain(limit=5)


@pytest.mark.parametrize(
    ("low", "high", "p995", "reason"),
    [
        (-1024.0, 3071.0, 1200.0, None),
        (-3024.0, 1500.0, 900.0, None),
        (-120.0, 1600.0, 900.0, None),
        (0.0, 255.0, 250.0, "grey values"),
        (0.0, 4095.0, 2000.0, "neither air nor fat"),
        (-1.0, 1.0, 0.9, "neither air nor fat"),
        (-60.0, 20.0, 9.0, "span 80"),
        (-1000.0, 20000.0, 9000.0, "denser than bone"),
    ],
)
def test_hounsfield_plausibility(low: float, high: float, p995: float, reason: str | None) -> None:
    found = hu_fault({"min": low, "max": high, "99.5": p995})
    assert (found is None) if reason is None else (reason in (found or ""))


def test_real_scans_are_sound(development_data: Path, tmp_path: Path) -> None:
    torso = tmp_path / "Dataset002_Torso"
    for kind, name in (("imagesTr", "t_0000"), ("labelsTr", "t")):
        (torso / kind).mkdir(parents=True)
        source = "image" if kind == "imagesTr" else "label"
        shutil.copy(development_data / "ct_torso" / f"{source}.nii.gz", torso / kind / f"{name}.nii.gz")
    values = json.loads((development_data / "ct_torso" / "labels.json").read_text())["labels"]
    rd.describe(torso, ["CT"], {"background": 0, **{entry["name"]: int(value) for value, entry in values.items()}}, 1)
    assert report(torso).problems == []
