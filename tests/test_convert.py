"""What every converter gets from the base: resumed, verified, one bad case never ends the run, nobody's dataset is overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from convert_sources import LEFT, RIGHT, blob, nifti, scan

from seerseg.cli.convert import convert as command
from seerseg.dataset import Request, open_dataset, read_requests, write_requests
from seerseg.errors import DatasetError, FolderError, InterruptedRunError, UsageError
from seerseg_data.converters import ConversionReport, Outcome, convert, load_converter


def source(folder: Path, count: int = 3) -> Path:
    for number in range(30, 30 + count):
        nifti(scan(number), folder / f"volume-{number}.nii.gz", "LPS")
        nifti(blob(RIGHT) | blob(LEFT, value=3), folder / f"labels-{number}.nii.gz", "LPS")
    return folder


def run(folder: Path, root: Path, number: str = "7", workers: int = 1) -> ConversionReport:
    return convert(load_converter("ct_org"), folder, number, root, workers=workers)


def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    source(tmp_path / "in")

    def stop(done: int, total: int, outcome: Outcome) -> None:
        raise InterruptedRunError("told to stop")

    with pytest.raises(InterruptedRunError):
        convert(load_converter("ct_org"), tmp_path / "in", "7", tmp_path / "raw", progress=stop)
    assert len(list((tmp_path / "raw" / "Dataset007_CTORG" / "labelsTr").iterdir())) == 1
    report = run(tmp_path / "in", tmp_path / "raw")
    assert report.skipped == ("ctorg_030",)
    assert report.done == ("ctorg_031", "ctorg_032")
    assert json.loads((report.folder / "dataset.json").read_text())["numTraining"] == 3


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    source(tmp_path / "in", 12)
    code = "from seerseg.cli.convert import convert; convert()"
    arguments = ["ct_org", "-i", str(tmp_path / "in"), "-d", "7", "--raw_folder", str(tmp_path / "raw")]
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    labels = tmp_path / "raw" / "Dataset007_CTORG" / "labelsTr"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (labels.is_dir() and any(labels.iterdir())):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    report = run(tmp_path / "in", tmp_path / "raw")
    assert len(report.done) + len(report.skipped) == 12
    assert [p for p in report.folder.rglob("*") if p.name.startswith(".tmp-") and p.is_file()] == []
    for path in sorted(report.folder.glob("*Tr/*.nii.gz")):
        assert nib.load(path).get_fdata().size


def test_a_corrected_file_under_an_old_name_is_done_again(tmp_path: Path) -> None:
    source(tmp_path / "in")
    first = run(tmp_path / "in", tmp_path / "raw")
    label = tmp_path / "in" / "labels-31.nii.gz"
    stamp = label.stat()
    label.unlink()
    nifti(blob(LEFT, value=2), label, "LPS")
    os.utime(label, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = run(tmp_path / "in", tmp_path / "raw")
    assert again.done == ("ctorg_031",)
    assert set(np.unique(nib.load(first.folder / "labelsTr" / "ctorg_031.nii.gz").get_fdata())) == {0, 2}


def test_a_file_that_was_lost_is_made_again(tmp_path: Path) -> None:
    source(tmp_path / "in")
    report = run(tmp_path / "in", tmp_path / "raw")
    (report.folder / "imagesTr" / "ctorg_031_0000.nii.gz").unlink()
    assert run(tmp_path / "in", tmp_path / "raw").done == ("ctorg_031",)


def test_several_processes_make_the_same(tmp_path: Path) -> None:
    source(tmp_path / "in")
    one, two = run(tmp_path / "in", tmp_path / "a"), run(tmp_path / "in", tmp_path / "b", workers=2)
    assert one.done == two.done
    for path in sorted(p for p in one.folder.rglob("*.*") if p.is_file()):
        assert path.read_bytes() == (two.folder / path.relative_to(one.folder)).read_bytes()


def bad_case(folder: Path, kind: str) -> str:
    """Spoil scan 31; returns what the sentence must say."""
    image, label = folder / "volume-31.nii.gz", folder / "labels-31.nii.gz"
    if kind == "cut short":
        image.write_bytes(image.read_bytes()[:3000])
        return "cut short"
    if kind == "no nifti":
        image.write_bytes(b"<html>" * 100)
        return "not a NIfTI"
    if kind == "missing mask":
        label.unlink()
        return "does not exist"
    if kind == "undeclared value":
        label.unlink()
        nifti(blob(RIGHT, value=9), label, "LPS")
        return "holds the value 9"
    if kind == "other grid":
        label.unlink()
        nifti(blob(RIGHT)[:-2], label, "LPS")
        return "another grid"
    if kind == "far away":
        label.unlink()
        nifti(blob(RIGHT), label, "LPS", moved_mm=30.0)
        return "another grid"
    label.unlink()
    nifti(blob(RIGHT) * np.float32(0.5), label, "LPS")
    return "whole numbers"


@pytest.mark.parametrize("kind", ["cut short", "no nifti", "missing mask", "undeclared value", "other grid", "far away", "fractions"])
def test_one_bad_case_does_not_end_the_run(kind: str, tmp_path: Path) -> None:
    says = bad_case(source(tmp_path / "in"), kind)
    report = run(tmp_path / "in", tmp_path / "raw")
    assert report.done == ("ctorg_030", "ctorg_032")
    assert says in report.failed["ctorg_031"]
    assert "\n" not in report.failed["ctorg_031"]
    assert "31" in report.failed["ctorg_031"]
    assert sorted(open_dataset(report.folder).cases) == ["ctorg_030", "ctorg_032"]
    assert (tmp_path / "in" / "volume-31.nii.gz").exists()  # the source is never touched
    nifti(scan(31), tmp_path / "in" / "volume-31.nii.gz", "LPS")
    nifti(blob(RIGHT), tmp_path / "in" / "labels-31.nii.gz", "LPS")
    assert run(tmp_path / "in", tmp_path / "raw").done == ("ctorg_031",)


def test_a_source_that_went_bad_takes_its_old_case_away(tmp_path: Path) -> None:
    source(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "raw")
    (tmp_path / "in" / "volume-31.nii.gz").unlink()
    (tmp_path / "in" / "volume-31.nii.gz").write_bytes(b"x")
    report = run(tmp_path / "in", tmp_path / "raw")
    assert list(report.failed) == ["ctorg_031"]
    assert sorted(open_dataset(report.folder).cases) == ["ctorg_030", "ctorg_032"]


def test_numbers_and_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    source(tmp_path / "in")
    (tmp_path / "raw" / "Dataset007_Mine").mkdir(parents=True)
    with pytest.raises(FolderError, match="taken by Dataset007_Mine"):
        run(tmp_path / "in", tmp_path / "raw")
    mine = tmp_path / "raw" / "Dataset008_CTORG"
    (mine / "imagesTr").mkdir(parents=True)
    with pytest.raises(FolderError, match="not made by seerseg_convert"):
        run(tmp_path / "in", tmp_path / "raw", "8")
    run(tmp_path / "in", tmp_path / "raw", "Dataset009_Shared")
    nifti(scan(), tmp_path / "t" / "s0001" / "ct.nii.gz")
    nifti(blob(LEFT), tmp_path / "t" / "s0001" / "segmentations" / "spleen.nii.gz")
    with pytest.raises(FolderError, match="made by ct_org"):
        convert(load_converter("totalsegmentator"), tmp_path / "t", "Dataset009_Shared", tmp_path / "raw")
    with pytest.raises(UsageError, match="Dataset023_CTORG"):
        run(tmp_path / "in", tmp_path / "raw", "kidneys")


def test_the_same_case_twice_is_refused(tmp_path: Path) -> None:
    source(tmp_path / "in" / "a", 1)
    source(tmp_path / "in" / "b", 1)
    with pytest.raises(DatasetError, match="2 times"):
        run(tmp_path / "in", tmp_path / "raw")


def test_nothing_left_is_a_fault(tmp_path: Path) -> None:
    source(tmp_path / "in", 1)
    (tmp_path / "in" / "volume-30.nii.gz").write_bytes(b"x")
    with pytest.raises(DatasetError, match="No training case"):
        run(tmp_path / "in", tmp_path / "raw")


def test_requests_that_others_wrote_stay(tmp_path: Path) -> None:
    label = blob(RIGHT) | blob(LEFT)
    label[16:19, 7:11, 9:12] = 2
    nifti(scan(), tmp_path / "in" / "case_00000" / "imaging.nii.gz")
    nifti(label, tmp_path / "in" / "case_00000" / "segmentation.nii.gz")
    report = convert(load_converter("kits23"), tmp_path / "in", "7", tmp_path / "raw")
    path = report.folder / "requests.jsonl"
    own = Request(id="mine", case="case_00000", text="the kidneys", target=("kidneys",))
    write_requests(path, [*read_requests(path), own])
    convert(load_converter("kits23"), tmp_path / "in", "7", tmp_path / "raw")
    ids = [r.id for r in read_requests(path)]
    assert "mine" in ids
    assert len(ids) == report.requests + 1


def test_a_full_disk_ends_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: both end a write in the middle."""
    folder = source(tmp_path / "in", 2)
    big = nib.Nifti1Image(np.random.default_rng(0).integers(0, 99, (60, 60, 60, 1)).astype(np.int16), np.eye(4))
    nib.save(big, folder / "volume-31.nii.gz")  # four dimensions: is written anew, not linked
    nib.save(nib.Nifti1Image(np.ones((60, 60, 60), np.uint8), np.eye(4)), folder / "labels-31.nii.gz")
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "from seerseg.cli.convert import convert; convert()"
    )
    arguments = ["ct_org", "-i", str(folder), "-d", "7", "--raw_folder", str(tmp_path / "raw")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    made = tmp_path / "raw" / "Dataset007_CTORG"
    assert (made / "labelsTr" / "ctorg_030.nii.gz").exists()
    assert [p for p in made.rglob(".tmp-*") if p.is_file()] == []
    assert run(folder, tmp_path / "raw").done == ("ctorg_031",)


def test_the_command(tmp_path: Path) -> None:
    source(tmp_path / "in")
    arguments = ["ct_org", "-i", str(tmp_path / "in"), "-d", "7", "--raw_folder", str(tmp_path / "raw"), "-np", "1"]
    first = CliRunner().invoke(command, arguments)
    assert first.exit_code == 0, first.output
    assert "3 cases converted" in first.output
    bad_case(tmp_path / "in", "cut short")
    second = CliRunner().invoke(command, [*arguments, "--json"])
    assert second.exit_code == 3
    assert json.loads(second.stdout)["skipped"] == ["ctorg_030", "ctorg_032"]
    assert "1 of 3 cases failed" in second.stderr


def test_the_list_says_what_is_expected() -> None:
    listed = CliRunner().invoke(command, ["--list"])
    assert listed.exit_code == 0
    assert "kits23: KiTS23" in listed.output
    assert "case_00000/imaging.nii.gz" in listed.output
    assert "licence: CC BY-NC-SA" in listed.output
    machine = CliRunner().invoke(command, ["kits23", "--list", "--json"])
    assert list(json.loads(machine.stdout)) == ["kits23"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kits"], "Did you mean kits23"),
        (["kits23"], "needs -i"),
        (["kits23", "-i", "."], "needs -d"),
        (["kits23", "-i", "nowhere", "-d", "7", "--raw_folder", "."], "not a folder"),
    ],
)
def test_misuse_is_named(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert says in done.output


def test_the_converter_of_the_documentation_works(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[1] / "documentation" / "converters.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert code.count("\n") < 60
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    nifti(scan(), tmp_path / "in" / "patient_07" / "ct.nii.gz", "LPS")
    nifti(blob(LEFT), tmp_path / "in" / "patient_07" / "spleen.nii.gz", "LPS")
    report = convert(names["ExampleSpleens"](), tmp_path / "in", "7", tmp_path / "raw")
    assert report.done == ("patient_07",)
    assert open_dataset(report.folder).subjects == {"patient_07": ["patient_07"]}
