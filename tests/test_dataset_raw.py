"""Raw datasets: nnU-Net's layout as it is, and every way to get it wrong answered with a sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import raw_datasets as rd

from seerseg.dataset import label_prompts, modality_of, open_dataset
from seerseg.errors import DatasetError, RequestError


def test_a_plain_nnunet_dataset(tmp_path: Path) -> None:
    dataset = open_dataset(rd.make(tmp_path / "Dataset001_Toy", channels=("CT", "PET")))
    assert dataset.name == "Dataset001_Toy"
    assert (dataset.channel_names, dataset.modalities) == (("CT", "PET"), ("CT", "PET"))
    assert dataset.labels == {"liver": (1,), "spleen": (2,)}
    assert list(dataset.cases) == ["case_1", "case_2", "case_3"]
    assert [p.name for p in dataset.cases["case_1"].images] == ["case_1_0000.nii.gz", "case_1_0001.nii.gz"]
    assert dataset.cases["case_1"].label == tmp_path / "Dataset001_Toy" / "labelsTr" / "case_1.nii.gz"
    assert dataset.subjects == {"case_1": ["case_1"], "case_2": ["case_2"], "case_3": ["case_3"]}
    assert (dataset.requests, dataset.test_cases, dataset.ignore_label, dataset.faults) == ([], {}, None, ())


def test_ignore_and_regions(tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    dataset = open_dataset(rd.make(tmp_path, labels=labels))
    assert dataset.labels == {"whole tumour": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert dataset.ignore_label == 4
    assert dataset.declared_values == {0, 1, 2, 3, 4}


def test_the_dataset_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        rd.write(tmp_path / "elsewhere" / f"{name}.nii.gz", rd.scan(1))
        rd.write(tmp_path / "elsewhere" / f"{name}_seg.nii.gz", rd.label())
    monkeypatch.setenv("TOY_SCANS", str(tmp_path / "elsewhere"))
    listed = {
        "a": {"images": ["../elsewhere/a.nii.gz"], "label": "../elsewhere/a_seg.nii.gz"},
        "b": {"images": ["$TOY_SCANS/b.nii.gz"], "label": "${TOY_SCANS}/b_seg.nii.gz"},
    }
    folder = tmp_path / "Dataset002_Listed"
    rd.describe(folder, ["MRI"], {"background": 0, "liver": 1}, 2, dataset=listed)
    dataset = open_dataset(folder)
    assert dataset.cases["a"].images == (tmp_path / "elsewhere" / "a.nii.gz",)
    assert dataset.cases["b"].label == tmp_path / "elsewhere" / "b_seg.nii.gz"

    listed["a"]["images"].append("../elsewhere/b.nii.gz")
    rd.describe(folder, ["MRI"], {"background": 0, "liver": 1}, 2, dataset=listed)
    with pytest.raises(DatasetError, match="case 'a' lists 2 images, but the dataset has 1 channel"):
        open_dataset(folder)
    listed["a"] = {"images": ["../elsewhere/gone.nii.gz"], "label": "../elsewhere/a_seg.nii.gz"}
    rd.describe(folder, ["MRI"], {"background": 0, "liver": 1}, 2, dataset=listed)
    with pytest.raises(DatasetError, match=r"gone\.nii\.gz of case 'a' does not exist"):
        open_dataset(folder)
    dataset = open_dataset(folder, strict=False)
    assert list(dataset.cases) == ["b"]
    assert [p.kind for p in dataset.faults] == ["missing-image"]


def test_test_cases_and_subjects(tmp_path: Path) -> None:
    folder = rd.make(tmp_path, ["a1", "a2", "b", "c"])
    rd.write(folder / "imagesTs" / "t_0000.nii.gz", rd.scan(9))
    (folder / "subjects.json").write_text(json.dumps({"A": ["a1", "a2"], "b": ["c"], "X": ["nowhere"]}))
    dataset = open_dataset(folder, strict=False)
    assert list(dataset.test_cases) == ["t"]
    assert dataset.test_cases["t"].label is None
    assert dataset.subjects == {"A": ["a1", "a2"], "b": ["c"], "b (case)": ["b"]}  # the case b is not the subject b
    assert dataset.subject_of == {"a1": "A", "a2": "A", "c": "b", "b": "b (case)"}
    assert [p.kind for p in dataset.faults] == ["unknown-case"]

    (folder / "subjects.json").write_text(json.dumps({"A": ["a1"], "B": ["a1"]}))
    with pytest.raises(DatasetError, match="case 'a1' is listed for the subjects 'A' and 'B'"):
        open_dataset(folder)
    (folder / "subjects.json").write_text(json.dumps({"A": ["a1", "t"]}))
    assert [p.kind for p in open_dataset(folder, strict=False).faults] == ["subject-in-test"]


def test_label_descriptions_and_label_prompts(tmp_path: Path) -> None:
    folder = rd.make(tmp_path, ["p", "q"], labels={"background": 0, "L1": 1, "spleen": 2})
    described = {"schema": 1, "L1": {"canonical": "first lumbar vertebra", "synonyms": ["L1 vertebra"], "region": "spine"}}
    (folder / "label_descriptions.json").write_text(json.dumps(described))
    dataset = open_dataset(folder)
    assert dataset.descriptions["L1"].synonyms == ("L1 vertebra",)
    inner = {"L1": described["L1"]}
    (folder / "label_descriptions.json").write_text(json.dumps({"schema": 1, "labels": inner}))
    assert open_dataset(folder).descriptions == dataset.descriptions
    (folder / "label_descriptions.json").write_text(json.dumps({"schema": 1, "labels": ["L1"]}))
    with pytest.raises(DatasetError, match="must map label names"):
        open_dataset(folder)
    prompts = label_prompts(dataset)
    assert [(r.case, r.text, r.target) for r in prompts] == [
        ("p", "first lumbar vertebra", ("L1",)),
        ("p", "spleen", ("spleen",)),
        ("q", "first lumbar vertebra", ("L1",)),
        ("q", "spleen", ("spleen",)),
    ]
    assert len({r.id for r in prompts}) == 4
    assert [r.case for r in label_prompts(dataset, ["q"])] == ["q", "q"]

    (folder / "label_descriptions.json").write_text(json.dumps({"L2": {"canonical": "second"}}))
    with pytest.raises(DatasetError, match="describes 'L2', which is no label"):
        open_dataset(folder)
    (folder / "label_descriptions.json").write_text(json.dumps({"L1": {"canonical": "x", "laterality": "up"}}))
    with pytest.raises(DatasetError, match="the description of 'L1' cannot be used"):
        open_dataset(folder)


def test_a_colour_picture_is_one_channel(tmp_path: Path) -> None:
    rd.describe(tmp_path, ["R", "G", "B"], {"background": 0, "road": 1}, 1, file_ending=".png")
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "street_0000.png").write_bytes(b"")
    dataset = open_dataset(tmp_path)
    assert dataset.channel_names == ("R-G-B",)
    assert len(dataset.cases["street"].images) == 1


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CT", "CT"),
        ("MRI", "MR"),
        ("T1ce", "MR"),
        ("FLAIR", "MR"),
        ("b-mode ultrasound", "US"),
        ("FDG-PET", "PET"),
        ("zscore", None),
        ("ctx", None),
    ],
)
def test_modalities_by_name(name: str, modality: str | None) -> None:
    assert modality_of(name) == modality


def spoil(change: str, folder: Path) -> None:
    meta = json.loads((folder / "dataset.json").read_text())
    match change:
        case "no json":
            (folder / "dataset.json").unlink()
        case "broken json":
            (folder / "dataset.json").write_text("{")
        case "not utf-8":
            (folder / "dataset.json").write_bytes(b'{"a": "\xff"}')
        case "a list":
            (folder / "dataset.json").write_text("[1]")
        case "missing channel":
            (folder / "imagesTr" / "case_2_0000.nii.gz").rename(folder / "imagesTr" / "case_2_0001.nii.gz")
        case "no images":
            for path in (folder / "imagesTr").iterdir():
                path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
        case "no folder":
            (folder / "imagesTr").rename(folder / "images")
        case "decathlon labels":
            meta["labels"] = {"0": "background", "1": "liver"}
        case "background":
            meta["labels"] = {"background": 1, "liver": 2}
        case "zero":
            meta["labels"] = {"background": 0, "liver": [0, 1]}
        case "text label":
            meta["labels"] = {"background": 0, "liver": "1"}
        case "only background":
            meta["labels"] = {"background": 0}
        case "channel gap":
            meta["channel_names"] = {"0": "CT", "2": "PET"}
        case _:
            del meta[change]
    if (folder / "dataset.json").exists() and change not in ("broken json", "not utf-8", "a list"):
        (folder / "dataset.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no json", "holds no dataset.json"),
        ("broken json", "is not valid JSON"),
        ("not utf-8", "is not UTF-8"),
        ("a list", "must hold a JSON object"),
        ("channel_names", "lacks the key 'channel_names'"),
        ("labels", "lacks the key 'labels'"),
        ("file_ending", "lacks the key 'file_ending'"),
        ("missing channel", "Case 'case_2' in .* lacks case_2_0000.nii.gz, as the dataset has 1 channel"),
        ("no images", r"holds no image named \{case\}_0000.nii.gz. It holds files like case_1_0000.mha"),
        ("no folder", "has no folder imagesTr"),
        ("decathlon labels", "Turn it round"),
        ("background", "'background' must be 0"),
        ("zero", "'liver' uses the value 0"),
        ("text label", "label 'liver' must be a whole number"),
        ("only background", "names nothing but background"),
        ("channel gap", "'channel_names' must map"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: str, sentence: str) -> None:
    folder = rd.make(tmp_path)
    spoil(change, folder)
    with pytest.raises(DatasetError, match=sentence) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(tmp_path / "nothing")


def test_a_bad_request_file_stops_opening_and_is_a_fault_when_asked(tmp_path: Path) -> None:
    folder = rd.make(tmp_path, requests=[{"id": "r", "case": "case_1", "text": "liver", "target": "liver"}])
    with (folder / "requests.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(RequestError, match=r"requests.jsonl:2: the key 'case' is missing"):
        open_dataset(folder)
    dataset = open_dataset(folder, strict=False)
    assert [r.id for r in dataset.requests] == ["r"]
    assert [p.kind for p in dataset.faults] == ["bad-request"]


def test_listing_is_linear(tmp_path: Path) -> None:
    """Six thousand files: all against all would be eighteen million comparisons."""
    folder = rd.make(tmp_path, ["seed"])
    for number in range(3_000):
        (folder / "imagesTr" / f"x{number:05d}_0000.nii.gz").touch()
        (folder / "labelsTr" / f"x{number:05d}.nii.gz").touch()
    began = time.process_time()
    assert len(open_dataset(folder).cases) == 3_001
    assert time.process_time() - began < 1


def test_the_hippocampus_set(development_data: Path) -> None:
    dataset = open_dataset(development_data / "mr_hippocampus")
    assert (len(dataset.cases), len(dataset.subjects), dataset.modalities) == (199, 129, ("MR",))
    assert all(c.label is not None for c in dataset.cases.values())
