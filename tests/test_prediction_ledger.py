"""The ledger: what counts as done, and what a damaged ledger does."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.errors import OutputError, UsageError
from seerseg.prediction.ledger import Entry, Ledger, Seen, describe, digest_images, ledger_name, make_key, read_ledger, see_image


def entry(folder: Path, case: str = "a", key: str = "k", *, status: str = "done", time: float = 1.0) -> Entry:
    path = folder / f"{case}.nii.gz"
    path.write_bytes(f"mask of {case}".encode())
    return Entry(case, key, status, (describe(path),), time=time, requests=(("r1", "ok"),))


def test_a_finished_case_is_found_again_by_another_process(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        made = entry(tmp_path)
        ledger.append(made)
    with Ledger(tmp_path) as ledger:
        assert ledger.finished("a", "k") == made
        assert ledger.finished("a", "other key") is None
        assert ledger.finished("b", "k") is None
        assert ledger.latest("a") == made
        assert ledger.problems == []


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_an_output_that_is_not_as_written_is_not_done(tmp_path: Path, damage: str) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(entry(tmp_path))
        path = tmp_path / "a.nii.gz"
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"?")
        assert ledger.finished("a", "k") is None


def test_partial_and_failed_cases_are_not_done(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(entry(tmp_path, "a", status="partial"))
        ledger.append(entry(tmp_path, "b", status="failed"))
        assert ledger.finished("a", "k") is None
        assert ledger.finished("b", "k") is None


@given(st.integers(0, 400))
def test_a_ledger_cut_anywhere_keeps_the_lines_before_and_takes_new_ones(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("out")
    with Ledger(folder) as ledger:
        for case in "abc":
            ledger.append(entry(folder, case))
    path = folder / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    lines = path.read_bytes().count(b"\n")
    with Ledger(folder) as ledger:
        assert ledger.problems == []
        complete = [c for c in "abc" if ledger.finished(c, "k")]
        assert len(complete) in (lines, lines + 1)  # a line that lacks its newline alone is whole
        ledger.append(entry(folder, "d"))
    assert [e.case for e in read_ledger(path)[0]] == [*complete, "d"]


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_garbage_lines_are_reported_and_skipped(tmp_path_factory: pytest.TempPathFactory, garbage: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("out")
    with Ledger(folder) as ledger:
        ledger.append(entry(folder))
    path = folder / "ledger.jsonl"
    lines = [g.replace(b"\n", b" ") for g in garbage]
    path.write_bytes(b"\n".join([*lines, b""]) + path.read_bytes())
    with Ledger(folder) as ledger:
        assert ledger.finished("a", "k")
        assert len(ledger.problems) <= len(lines)
        assert all(p.startswith("ledger.jsonl:") for p in ledger.problems)
    assert all(g in path.read_bytes() for g in lines)


@pytest.mark.parametrize(
    "line",
    ['{"schema":9}', '{"schema":1,"case":7}', "[]", "null", '{"schema":1,"case":"a","files":[{"name":"../x","size":1,"digest":""}]}'],
)
def test_lines_of_another_form_are_reported(tmp_path: Path, line: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with Ledger(tmp_path) as ledger:
        assert ledger.problems == ["ledger.jsonl:1 is no entry of a ledger; the line was skipped and its case will be done again."]


def test_shards_read_each_others_ledgers(tmp_path: Path) -> None:
    with Ledger(tmp_path, num_parts=2, part_id=0) as one, Ledger(tmp_path, num_parts=2, part_id=1) as two:
        one.append(entry(tmp_path, "a"))
        two.append(entry(tmp_path, "b"))
    assert sorted(p.name for p in tmp_path.glob("ledger*")) == ["ledger.0.jsonl", "ledger.1.jsonl"]
    with Ledger(tmp_path) as whole:
        assert whole.finished("a", "k")
        assert whole.finished("b", "k")
    assert ledger_name(1, 0) == "ledger.jsonl"


def test_two_processes_cannot_write_one_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(UsageError, match="Another seerseg_predict"):
        Ledger(tmp_path)
    Ledger(tmp_path).close()


def test_a_requeued_job_waits_for_the_lock_of_the_node_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = Ledger(tmp_path)
    letting_go = threading.Timer(0.7, held.close)
    letting_go.start()
    Ledger(tmp_path).close()
    letting_go.join()


def test_a_file_that_was_not_touched_is_not_read_again(tmp_path: Path) -> None:
    image = tmp_path / "a.nii.gz"
    image.write_bytes(b"one")
    assert see_image(image)[1] is None  # changed this moment: another change could have the same time
    time.sleep(3.1)
    digest, seen = see_image(image)
    assert seen is not None
    assert see_image(image, {str(image): Seen(str(image), "as before", seen.stamp)})[0] == "as before"
    before = image.stat()
    image.write_bytes(b"two")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert see_image(image, {str(image): seen})[0] not in (digest, "as before")


def test_a_ledger_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"ledger\.jsonl"):
        Ledger(tmp_path)


def test_keys_follow_content_not_names(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"one")
    (tmp_path / "b.nii.gz").write_bytes(b"one")
    first, second = digest_images([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    assert first == second
    stamp = os.stat(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(b"two")
    os.utime(tmp_path / "a.nii.gz", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digest_images([tmp_path / "a.nii.gz"]) != [first]
    base = make_key([first], [("r", "lung")], {"model": 1})
    assert base == make_key([first], [("r", "lung")], {"model": 1})
    assert len({base, make_key([second, second], [("r", "lung")], {"model": 1}), make_key([first], [("r", "liver")], {"model": 1}),
                make_key([first], [("s", "lung")], {"model": 1}), make_key([first], [("r", "lung")], {"model": 2})}) == 5  # fmt: skip


def test_a_dicom_folder_is_hashed_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "1").write_bytes(b"one")
    before = digest_images([tmp_path / "s"])
    (tmp_path / "s" / "2").write_bytes(b"two")
    assert digest_images([tmp_path / "s"]) != before
