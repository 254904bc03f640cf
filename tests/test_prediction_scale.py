"""Ten thousand listed cases: how long until the first is drawn, how long to find that all are done, and what is asked of the file system.

Seconds are those of the processor, as test machines are shared; what a network file system makes slow is counted instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from seerseg.dataset.inputs import find_inputs
from seerseg.prediction import Entry, Predictor, RunReport, predict_folder
from seerseg.prediction.ledger import describe, read_ledger, see_image
from seerseg.prediction.questions import gather
from seerseg.segmenters.scripted import ScriptedSegmenter

COUNT = 10_000
MOST_S = 5.0
_calls: Counter[str] = Counter()
_counting: list[Path] = []


def _note(event: str, args: tuple[object, ...]) -> None:
    if _counting and event in ("open", "os.scandir", "os.listdir") and isinstance(args[0], str | os.PathLike):
        if os.fspath(args[0]).startswith(str(_counting[0])):
            _calls[event] += 1


sys.addaudithook(_note)


@contextmanager
def counted(root: Path) -> Iterator[Counter[str]]:
    """Files opened and folders listed below root meanwhile."""
    _calls.clear()
    _counting.append(root)
    try:
        yield _calls
    finally:
        _counting.clear()


def model() -> Predictor:
    return Predictor(ScriptedSegmenter({"left lung": lambda volume, prompt: volume.array > 0}, identity="fixed"), "verbatim", device="cpu")


def name(number: int) -> str:
    return f"case_{number:05d}"


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ with many names for one tiny scan, and done/: what predicting them leaves, its ledgers those of two parts."""
    root = tmp_path_factory.mktemp("many")
    for part in ("images", "one", "done"):
        (root / part).mkdir()
    first = root / "one" / f"{name(0)}_0000.nii.gz"
    nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4)).to_filename(first)
    for number in range(COUNT):
        os.link(first, root / "images" / f"{name(number)}_0000.nii.gz")
    linked = time.time()
    predict_folder(root / "one", root / "first", model(), prompts=["left lung"])
    (entry,) = read_ledger(root / "first" / "ledger.jsonl")[0]
    record = (root / "first" / f"{name(0)}.json").read_text()
    for number in range(COUNT):
        os.link(root / "first" / f"{name(0)}.nii.gz", root / "done" / f"{name(number)}.nii.gz")
        (root / "done" / f"{name(number)}.json").write_text(record.replace(name(0), name(number)))
    time.sleep(max(0.0, linked + 3.2 - time.time()))  # what was changed this moment is not trusted to be settled
    lines: tuple[list[str], list[str]] = ([], [])
    for number in range(COUNT):
        case, image = name(number), root / "images" / f"{name(number)}_0000.nii.gz"
        files = tuple(describe(root / "done" / f"{case}{ending}") for ending in (".nii.gz", ".json"))
        seen = see_image(image)[1]
        assert seen is not None
        made: Entry = replace(entry, case=case, files=files, images=(seen,))
        lines[number % 2].append(json.dumps(made.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
    for part in (0, 1):
        (root / "done" / f"ledger.{part}.jsonl").write_text("".join(lines[part]))
    return root


def resumed(listed: Path, **settings: int) -> tuple[RunReport, float]:
    loaded = model()
    loaded.load()
    began = time.process_time()
    report = predict_folder(listed / "images", listed / "done", loaded, prompts=["left lung"], **settings)
    return report, time.process_time() - began


def test_a_finished_run_is_passed_over(listed: Path) -> None:
    with counted(listed) as calls:
        report, seconds = resumed(listed)
    assert (report.count("skipped"), report.total, report.missing, report.exit_code) == (COUNT, COUNT, (), 0)
    assert seconds < MOST_S
    assert calls["os.scandir"] + calls["os.listdir"] <= 8  # not one for each case
    assert calls["open"] <= COUNT + 20  # each scan once, its bytes unread; no output at all
    assert report.results[5].record["requests"][0]["status"] == "ok"


def test_a_scan_under_an_old_name_is_seen(listed: Path) -> None:
    """Same size, same time of change: only what was in it is another."""
    image = listed / "images" / f"{name(7)}_0000.nii.gz"
    before = image.stat()
    data = bytearray(image.read_bytes())
    image.unlink()
    data[4] ^= 1  # the time in gzip's header
    image.write_bytes(data)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.stat().st_size == before.st_size
    report, _ = resumed(listed)
    assert [r.case for r in report.results if r.status != "skipped"] == [name(7)]
    assert report.count("done") == 1


def test_the_first_case_is_drawn_soon(listed: Path, tmp_path: Path) -> None:
    firsts: list[float] = []
    loaded = model()
    loaded.load()
    began = time.process_time()
    with counted(listed) as calls:
        report = predict_folder(
            listed / "images",
            tmp_path / "out",
            loaded,
            prompts=["left lung"],
            progress=lambda result, total: firsts.append(time.process_time() - began),
            stopping=lambda: bool(firsts),
        )
    assert report.interrupted
    assert firsts[0] < MOST_S
    assert calls["os.scandir"] + calls["os.listdir"] <= 4
    assert calls["open"] < 100


def test_parts_say_what_is_missing_over_all(listed: Path, tmp_path: Path) -> None:
    """Part 0 has nothing left; a case of part 1 was never done."""
    path = listed / "done" / "ledger.1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"{name(4321)}"' not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))
    try:
        report, seconds = resumed(listed, num_parts=2, part_id=0)
    finally:
        path.write_text("".join(lines))
    assert (report.total, report.count("skipped")) == (COUNT // 2, COUNT // 2)
    assert report.missing == (name(4321),)
    assert seconds < MOST_S


def test_requests_beside_the_images_are_found_by_one_listing(tmp_path: Path) -> None:
    """No look for each case's own files, which a network file system would make slow."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(200):
        (images / f"{name(number)}_0000.nii.gz").write_bytes(b"x")
        if number % 2:
            (images / f"{name(number)}.txt").write_text("left lung\n")
    with counted(tmp_path) as calls:
        asked = gather(find_inputs(images)).by_case
    assert sorted(asked) == [name(number) for number in range(1, 200, 2)]
    assert calls["open"] <= 100
    assert calls["os.scandir"] + calls["os.listdir"] <= 4
