"""Preprocessing does each case once, survives killed processes and bad files, and resumes by content."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from seerseg.dataset import RawDataset, open_dataset
from seerseg.dataset.workers import Died, run_in_processes
from seerseg.errors import InterruptedRunError, NothingToDoError, OutputError, UsageError
from seerseg.store import Outcome, StoreLayout, case_path, open_case, preprocess, stored_cases, verify_case
from seerseg.volume import read_labels, read_volume

SHAPE = (9, 8, 7)


def write_image(path: Path, seed: int, *, labels: bool = False, shape: tuple[int, ...] = SHAPE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 3, shape).astype(np.uint8) if labels else generator.integers(-50, 900, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)


def make_raw(folder: Path, cases: int, *, shape: tuple[int, ...] = SHAPE) -> Path:
    for number in range(cases):
        write_image(folder / f"imagesTr/case{number}_0000.nii.gz", number, shape=shape)
        write_image(folder / f"labelsTr/case{number}.nii.gz", number, labels=True, shape=shape)
    facts = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> RawDataset:
    return open_dataset(make_raw(tmp_path / "Dataset001_Two", 4))


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.b2nd"))}


def test_cases_are_stored_measured_and_skipped_the_second_time(raw: RawDataset, tmp_path: Path) -> None:
    told: list[Outcome] = []
    report = preprocess(raw, tmp_path / "out", progress=told.append)
    assert report.done == ("case0", "case1", "case2", "case3") == tuple(o.case for o in told)
    assert report.ok
    assert stored_cases(tmp_path / "out") == list(report.done)
    for case, files in raw.cases.items():
        stored = open_case(tmp_path / "out", case)
        volume = read_volume(files.images[0])
        assert np.array_equal(stored.volume().array, volume.array)
        assert np.array_equal((stored.labels() or [None])[0], read_labels(str(files.label))[0])
        assert stored.modality() == "MR"
        assert report.records[case].shape_zyx == stored.grid.shape_zyx == (7, 8, 9)
        assert report.records[case].values is not None
        assert {value: r.voxels for value, r in report.records[case].values.items()} | {
            0: stored.label_counts()[0]
        } == stored.label_counts()
    before = stored_bytes(tmp_path / "out")
    again = preprocess(raw, tmp_path / "out")
    assert again.skipped == report.done
    assert not again.done
    assert {c: r.to_json() for c, r in again.records.items()} == {c: r.to_json() for c, r in report.records.items()}
    assert preprocess(raw, tmp_path / "out", clean=True).done == report.done
    assert stored_bytes(tmp_path / "out") == before  # the same content gives the same bytes


def test_processes_give_the_same_files_as_none(raw: RawDataset, tmp_path: Path) -> None:
    preprocess(raw, tmp_path / "one")
    report = preprocess(raw, tmp_path / "two", workers=2)
    assert report.done == ("case0", "case1", "case2", "case3")
    assert stored_bytes(tmp_path / "one") == stored_bytes(tmp_path / "two")
    assert preprocess(raw, tmp_path / "two", workers=2).skipped == report.done


@pytest.mark.parametrize("what", ["image", "label", "no label", "layout", "store image", "store label", "missing label file", "cut"])
def test_whatever_changed_is_done_again_and_nothing_else(raw: RawDataset, tmp_path: Path, what: str) -> None:
    out, layout = tmp_path / "out", StoreLayout()
    preprocess(raw, out)
    fresh = stored_bytes(out)
    image, label = raw.cases["case1"].images[0], raw.cases["case1"].label
    assert label is not None
    redone: tuple[str, ...] = ("case1",)
    if what == "image":
        status = image.stat()
        write_image(image, 77)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))  # a corrected scan that looks as old as the other
    elif what == "label":
        write_image(label, 78, labels=True)
    elif what == "no label":
        label.unlink()
        raw = open_dataset(raw.folder, strict=False)
    elif what == "layout":
        layout, redone = StoreLayout(axis=2), ("case0", "case1", "case2", "case3")
    elif what.startswith("store"):
        path = out / ("cases" if what == "store image" else "labels") / "case1.b2nd"
        data = bytearray(path.read_bytes())
        data[int(open_case(out, "case1").image.table[0]["offset"]) + 40 if what == "store image" else len(data) // 2] ^= 4
        path.write_bytes(data)
    elif what == "missing label file":
        (out / "labels/case1.b2nd").unlink()
    else:
        os.truncate(case_path(out, "case1"), 999)
    report = preprocess(raw, out, layout=layout)
    assert report.done == redone
    for case in report.records:
        verify_case(out, case)
    if what == "no label":
        assert not (out / "labels/case1.b2nd").exists()
        assert report.records["case1"].values is None
    elif what in ("image", "label", "layout"):
        assert stored_bytes(out) != fresh
    else:
        assert stored_bytes(out) == fresh


def test_bad_cases_are_reported_and_the_rest_is_done(raw: RawDataset, tmp_path: Path) -> None:
    raw.cases["case0"].images[0].write_bytes(gzip.compress(b"no image at all" * 40))
    data = raw.cases["case2"].images[0].read_bytes()
    raw.cases["case2"].images[0].write_bytes(data[: len(data) // 2])
    raw.cases["case3"].images[0].unlink()
    for workers in (1, 2):
        report = preprocess(raw, tmp_path / f"out{workers}", workers=workers)
        assert report.done == ("case1",)
        assert list(report.failed) == ["case0", "case2", "case3"]
        for case, message in report.failed.items():
            assert str(raw.cases[case].images[0]) in message
            assert "Traceback" not in message
            assert "bug" not in message
        assert list(report.records) == ["case1"]


def test_what_ends_a_run_says_so(raw: RawDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no case 'cas1'.*Did you mean"):
        preprocess(raw, tmp_path / "out", cases=["cas1"])
    with pytest.raises(NothingToDoError, match="imagesTr"):
        preprocess(raw, tmp_path / "out", cases=[])
    (tmp_path / "file").write_text("")
    for workers in (1, 2):
        with pytest.raises(OutputError, match="Choose a folder"):
            preprocess(raw, tmp_path / "file", workers=workers)
    assert preprocess(raw, tmp_path / "out", cases=["case2", "case1", "case2"]).done == ("case2", "case1")


def test_left_overs_of_a_killed_run_are_removed_when_old(raw: RawDataset, tmp_path: Path) -> None:
    old, young = tmp_path / "out/cases/.tmp-a-case0.b2nd", tmp_path / "out/labels/.tmp-b-case0.b2nd"
    for path in (old, young):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    preprocess(raw, tmp_path / "out")
    assert not old.exists()
    assert young.exists()
    assert stored_cases(tmp_path / "out") == ["case0", "case1", "case2", "case3"]


def workers_of_this_process() -> list[psutil.Process]:
    return [worker for server in psutil.Process().children() for worker in server.children()]


def test_a_case_whose_process_is_killed_is_named_and_the_rest_is_done(raw: RawDataset, tmp_path: Path) -> None:
    stuck = raw.cases["case1"].images[0]
    stuck.unlink()
    os.mkfifo(stuck)  # its reader waits for ever, as one that swaps would
    finished: list[str] = []
    over = threading.Event()

    def kill_the_stuck() -> None:
        while not over.wait(0.05):
            if len(finished) == 3:
                for worker in workers_of_this_process():
                    worker.kill()

    killer = threading.Thread(target=kill_the_stuck)
    killer.start()
    try:
        report = preprocess(raw, tmp_path / "out", workers=2, progress=lambda outcome: finished.append(outcome.case))
    finally:
        over.set()
        killer.join()
    assert sorted(report.done) == ["case0", "case2", "case3"]
    assert list(report.failed) == ["case1"]
    assert "killed by SIGKILL" in report.failed["case1"]
    assert "-np" in report.failed["case1"]


def test_a_process_killed_once_costs_nothing(raw: RawDataset, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(_: Outcome) -> None:
        if not killed:
            worker = workers_of_this_process()[0]
            worker.kill()
            killed.append(worker.pid)

    report = preprocess(raw, tmp_path / "out", workers=2, progress=kill_one)
    assert killed
    assert report.done == ("case0", "case1", "case2", "case3")


def test_stopping_the_run_ends_its_processes(raw: RawDataset, tmp_path: Path) -> None:
    def stop(_: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(raw, tmp_path / "out", workers=2, progress=stop)
    assert not workers_of_this_process()
    assert preprocess(raw, tmp_path / "out").ok


def test_a_signal_to_the_processes_is_an_interruption_not_a_fault(raw: RawDataset, tmp_path: Path) -> None:
    def stop(_: Outcome) -> None:
        for worker in workers_of_this_process():
            worker.terminate()

    with pytest.raises(InterruptedRunError, match="same command again"):
        preprocess(raw, tmp_path / "out", workers=2, progress=stop)


RUN = """
import sys
from pathlib import Path
from seerseg.dataset import open_dataset
from seerseg.store import preprocess
if __name__ == "__main__":
    preprocess(open_dataset(Path(sys.argv[1])), Path(sys.argv[2]), workers=2, progress=lambda o: print(o.case, flush=True))
"""


def test_killed_at_any_moment_and_run_again_gives_the_same(tmp_path: Path) -> None:
    folder = make_raw(tmp_path / "Dataset001_Two", 12, shape=(40, 40, 30))
    raw = open_dataset(folder)
    preprocess(raw, tmp_path / "undisturbed")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out")]
    orphans: list[psutil.Process] = []
    for moment, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for _ in range(1 + moment):
                run.stdout.readline()
            orphans += psutil.Process(run.pid).children(recursive=True)
            run.send_signal(how)
        for case in stored_cases(tmp_path / "out"):
            verify_case(tmp_path / "out", case)
    assert preprocess(raw, tmp_path / "out").ok
    whole = {name: data for name, data in stored_bytes(tmp_path / "out").items() if ".tmp-" not in name}
    assert whole == stored_bytes(tmp_path / "undisturbed")
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def double_or_die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5:
        os._exit(7)
    if number == 99:
        raise ValueError("as written")
    return 2 * number


@pytest.fixture
def _no_processes_left() -> Iterator[None]:
    yield
    assert not workers_of_this_process()


@pytest.mark.usefixtures("_no_processes_left")
@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_has_its_answer_or_its_end(workers: int) -> None:
    results = list(run_in_processes(double_or_die, range(8), workers))
    died = {r.item: r.how for r in results if isinstance(r, Died)}
    assert died == {3: "was killed by SIGKILL", 5: "ended with code 7"}
    assert sorted(r for r in results if not isinstance(r, Died)) == [0, 2, 4, 8, 12, 14]


@pytest.mark.usefixtures("_no_processes_left")
def test_what_a_process_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="as written"):
        list(run_in_processes(double_or_die, [1, 99, 2], 2))


def test_the_hippocampus_set(development_data: Path, tmp_path: Path) -> None:
    raw = open_dataset(development_data / "mr_hippocampus", strict=False)
    cases = list(raw.cases)[:6]
    report = preprocess(raw, tmp_path, cases=cases)
    assert report.done == tuple(cases)
    for case in cases:
        stored = open_case(tmp_path, case)
        assert np.array_equal(stored.volume().array, read_volume(raw.cases[case].images[0]).array)
        assert set(stored.label_counts()) == {0, 1, 2}
    shutil.rmtree(tmp_path / "cases")
    assert preprocess(raw, tmp_path, cases=cases).done == tuple(cases)
