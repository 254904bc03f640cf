"""What a prediction may be given: folders, files, DICOM folders, jobs files; and what is said about the rest."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.dataset.inputs import find_cases, find_inputs, split_channel
from seerseg.errors import NothingToDoError, RequestError, SeerSegError, UsageError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def dicom(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"\0" * 128 + b"DICM")
    return folder


def shape(path: Path, **settings: int) -> dict[str, list[str]]:
    return {case.id: [p.name for p in case.images] for case in find_inputs(path, **settings).cases}


def test_channels_of_nnunet_names_are_grouped_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")
    assert shape(tmp_path) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}


def test_four_digits_are_a_name_where_no_channel_0_exists(tmp_path: Path) -> None:
    touch(tmp_path, "liver_0001.nii.gz", "liver_0002.nii.gz")
    assert shape(tmp_path) == {"liver_0001": ["liver_0001.nii.gz"], "liver_0002": ["liver_0002.nii.gz"]}


def test_other_images_are_cases_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "one.nrrd", "two.nii", "three.mha", "four.v1.nii.gz")
    assert shape(tmp_path) == {"four.v1": ["four.v1.nii.gz"], "one": ["one.nrrd"], "three": ["three.mha"], "two": ["two.nii"]}


def test_a_missing_channel_fails_that_case_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz", "d_0000.nii.gz", "d_0001.nii.gz")
    found = find_inputs(tmp_path)
    assert [c.id for c in found.cases] == ["a", "d"]
    assert "b_0001" in found.faults["b"]
    assert "c_0000" in found.faults["c"]


def test_the_number_of_channels_may_be_given(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "c.nii.gz", "e_0000.nii.gz", "e_0001.nii.gz", "e_0002.nii.gz")
    found = find_inputs(tmp_path, channels=2)
    assert [c.id for c in found.cases] == ["b"]
    assert sorted(found.faults) == ["a", "c", "e"]
    assert "one too many" in found.faults["e"]


def test_the_same_case_twice_is_a_sentence(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a.nrrd", "b.nii.gz")
    found = find_inputs(tmp_path)
    assert [c.id for c in found.cases] == ["b"]
    assert "a.nii.gz, a.nrrd" in found.faults["a"]


def test_the_same_channel_twice_is_a_sentence(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0000.nrrd", "b_0000.nii.gz")
    assert "a_0000.nii.gz, a_0000.nrrd" in find_inputs(tmp_path).faults["a"]


def test_whatever_is_not_taken_is_named_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a.nii.gz", "notes.docx", "._a_0000.nii.gz", "sub/b.nii.gz", "a.txt", "requests.jsonl", "dataset.json")
    cases, ignored = find_cases(tmp_path)
    assert [c.id for c in cases] == ["a"]
    text = "\n".join(ignored)
    assert len(ignored) == 4
    assert all(name in text for name in ("a.nii.gz: ", "notes.docx: not an image", "._a_0000.nii.gz: a hidden", "sub: a folder"))


def test_an_empty_folder_is_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToDoError, match="no image"):
        find_inputs(tmp_path)
    touch(tmp_path, "readme.md")
    with pytest.raises(NothingToDoError, match=r"readme\.md: not an image"):
        find_inputs(tmp_path)


def test_a_dataset_folder_gets_a_hint(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTs/a_0000.nii.gz")
    with pytest.raises(NothingToDoError, match="imagesTs"):
        find_inputs(tmp_path)


def test_a_path_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    touch(tmp_path / "imagesTs", "a.nii.gz")
    with pytest.raises(UsageError, match=r"Did you mean imagesTs\?"):
        find_inputs(tmp_path / "imageTs")


def test_a_single_file(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b.nrrd", "c_0007.nii.gz", "other.nii.gz")
    assert shape(tmp_path / "a_0000.nii.gz") == {"a": ["a_0000.nii.gz"]}
    assert shape(tmp_path / "a_0000.nii.gz", channels=2) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}
    assert shape(tmp_path / "b.nrrd") == {"b": ["b.nrrd"]}
    assert shape(tmp_path / "c_0007.nii.gz") == {"c_0007": ["c_0007.nii.gz"]}
    with pytest.raises(UsageError, match="not an image"):
        find_inputs(touch(tmp_path, "x.pdf") / "x.pdf")
    with pytest.raises(UsageError, match="one DICOM file"):
        find_inputs(dicom(tmp_path, "x.dcm") / "x.dcm")


def test_a_dicom_folder_is_a_case_and_a_folder_of_them_are_many(tmp_path: Path) -> None:
    dicom(tmp_path / "p1", "1.dcm", "2.dcm")
    dicom(tmp_path / "p2" / "study" / "series", "IM0001", "IM0002")
    touch(tmp_path, "DICOMDIR.txt")
    assert shape(tmp_path / "p1") == {"p1": ["p1"]}
    assert shape(tmp_path) == {"p1": ["p1"], "p2_study_series": ["series"]}


def test_dicom_folders_beside_images_are_cases_too(tmp_path: Path) -> None:
    dicom(tmp_path / "p1", "1.dcm")
    touch(tmp_path, "a.nii.gz", "empty/readme.md")
    found = find_inputs(tmp_path)
    assert [c.id for c in found.cases] == ["a", "p1"]
    assert any(line.startswith("empty: ") for line in found.ignored)


def test_a_jobs_file(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "a_0000.nii.gz", "b1.nii.gz", "b2.nii.gz")
    jobs = [
        {"image": "scans/a_0000.nii.gz", "requests": ["left lung", {"id": "r2", "text": "spine", "target": None}]},
        {"case": "b", "images": ["scans/b1.nii.gz", "scans/b2.nii.gz"], "requests": "liver", "modality": "MR"},
    ]
    for path, text in ((tmp_path / "jobs.json", json.dumps(jobs)), (tmp_path / "jobs.jsonl", "\n".join(map(json.dumps, jobs)))):
        path.write_text(text)
        found = find_inputs(path)
        assert {c.id: [p.name for p in c.images] for c in found.cases} == {"a": ["a_0000.nii.gz"], "b": ["b1.nii.gz", "b2.nii.gz"]}
        assert found.asked == {"a": ("left lung", {"id": "r2", "text": "spine", "target": None}), "b": ("liver",)}
        assert found.modalities == {"b": "MR"}
        assert all(image.is_absolute() for case in found.cases for image in case.images)


def test_a_bad_job_fails_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    lines = [
        json.dumps({"image": "a.nii.gz", "requests": ["liver"]}),
        "{broken",
        json.dumps(["a.nii.gz"]),
        json.dumps({"image": "none.nii.gz"}),
        json.dumps({"imagge": "a.nii.gz"}),
        json.dumps({"image": "b.nii.gz", "case": "../b"}),
        json.dumps({"image": "b.nii.gz", "case": "a"}),
        json.dumps({"image": "b.nii.gz", "requests": 7}),
        json.dumps({"image": "a.nii.gz", "requests": ["spleen"]}),
        json.dumps({"images": []}),
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(lines))
    found = find_inputs(path)
    assert [c.id for c in found.cases] == ["a"]
    assert found.asked == {"a": ("liver", "spleen")}
    assert sorted(found.faults) == [f"jobs.jsonl:{n}" for n in (10, 2, 3, 4, 5, 6, 7, 8)]
    assert "Did you mean image or images?" in found.faults["jobs.jsonl:5"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"7", b'"text"', b"[" * 100_000])
def test_a_jobs_file_that_is_none_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "jobs.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"jobs\.json"):
        find_inputs(path)


@given(st.lists(st.one_of(st.none(), st.integers(), st.text(), st.dictionaries(st.text(), st.text())), max_size=4))
def test_any_json_list_is_read_without_a_traceback(tmp_path_factory: pytest.TempPathFactory, value: list[object]) -> None:
    path = tmp_path_factory.mktemp("jobs") / "jobs.json"
    path.write_text(json.dumps(value))
    try:
        assert find_inputs(path).faults
    except SeerSegError:
        pass


@given(st.from_regex(r"[a-z_0-9]{1,12}", fullmatch=True), st.integers(0, 9999))
def test_channel_suffixes_come_apart_as_they_were_put_together(case: str, channel: int) -> None:
    assert split_channel(f"{case}_{channel:04d}") == (case, channel)


def test_listing_is_linear(tmp_path: Path) -> None:
    for i in range(4000):
        (tmp_path / f"case{i:05d}_0000.nii.gz").touch()
    started = time.process_time()
    assert len(find_inputs(tmp_path).cases) == 4000
    assert time.process_time() - started < 2.0
