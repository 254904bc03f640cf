"""Each published layout, in miniature: the files arrive, geometry and sides stay, labels mean what they meant."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from convert_sources import LEFT, RIGHT, blob, centre_mm, mha, nifti, scan
from PIL import Image

from seerseg.dataset import open_dataset, verify_dataset
from seerseg.errors import ImageError, UsageError
from seerseg.rewards import Truth
from seerseg.views import pixel_map
from seerseg.volume import read_labels, read_volume
from seerseg_data.converters import CONVERTERS, ConversionReport, convert, load_converter
from seerseg_data.converters.cvpr_text import PROMPTS, read_npz


def run(name: str, source: Path, root: Path, number: str = "7") -> ConversionReport:
    report = convert(load_converter(name), source, number, root)
    assert report.failed == {}
    assert report.unresolved == () or name in ("kits23", "umrg")
    dataset = open_dataset(report.folder)
    errors = [p.message for p in verify_dataset(dataset).problems if p.severity == "error"]
    assert errors == []
    assert convert(load_converter(name), source, number, root).done == ()  # nothing is done twice
    return report


def test_every_converter_names_its_facts() -> None:
    for name, made in CONVERTERS.items():
        assert made.name == name
        assert made.licence
        assert made.home.startswith("http")
        assert "SOURCE/" in made.layout
        assert made.dataset_name.isalnum()


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_another_folder_is_refused_with_the_expected_tree(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "readme.txt").write_text("x")
    with pytest.raises(UsageError, match="expects"):
        convert(load_converter(name), tmp_path / "source", "7", tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_kits23(tmp_path: Path) -> None:
    """Stored with the slice axis first; two tumours on the right, a cyst on the left."""
    label = blob(slice(17, 23)) | blob(slice(1, 7))
    label[18:21, 7:11, 9:12] = 2  # higher and larger
    label[18:20, 7:9, 4:6] = 2
    label[2:5, 8:11, 5:8] = 3
    for case in ("case_00000", "case_00003"):
        nifti(scan(), tmp_path / "kits" / case / "imaging.nii.gz", "IPL")
        nifti(label, tmp_path / "kits" / case / "segmentation.nii.gz", "IPL")
    report = run("kits23", tmp_path / "kits", tmp_path / "raw")
    made = report.folder / "labelsTr" / "case_00000.nii.gz"
    assert nib.aff2axcodes(nib.load(made).affine) == ("I", "P", "L")
    data = nib.load(tmp_path / "kits" / "case_00000" / "segmentation.nii.gz").get_fdata()
    out = nib.load(made).get_fdata()
    assert np.array_equal(np.isin(out, (2, 3, 4, 5)), data == 2)
    assert np.array_equal(np.isin(out, (6, 7, 8, 9)), data == 3)
    assert np.array_equal(out == 1, data == 1)
    assert centre_mm(made, 2)[0] > 0 > centre_mm(made, 6)[0]  # +x is the patient's right
    assert centre_mm(made, 2)[2] > centre_mm(made, 3)[2]
    asked = {r.id.removeprefix("case_00000__kits23_"): r for r in open_dataset(report.folder).requests if r.case == "case_00000"}
    assert asked["tumour_largest_train"].target == ("largest kidney tumour",)
    assert asked["tumour_highest_val"].target == ("largest kidney tumour",)
    assert asked["tumour_lowest_test"].target == ("second largest kidney tumour",)
    assert asked["tumour_smallest_train"].target == ("second largest kidney tumour",)
    assert asked["tumour_right_train"].target == ("largest kidney tumour", "second largest kidney tumour")
    assert asked["tumour_left_train"].absent
    assert asked["cyst_left_test"].target == ("largest kidney cyst",)
    assert asked["cyst_right_test"].absent
    assert asked["all_train"].target == ("kidney tumour", "kidney cyst")
    assert "cyst_largest_train" not in asked  # with one cyst the word "largest" asks nothing
    assert {r.language_split for r in asked.values()} == {"train", "val", "test"}


def test_kits23_asks_nothing_doubtful(tmp_path: Path) -> None:
    label = blob(slice(10, 16)) | blob(slice(4, 7))  # kidneys side by side, 15 mm apart
    label[11:13, 8:10, 4:6] = 2
    label[5:7, 8:10, 4:6] = 2  # the same size, the same height
    nifti(scan(), tmp_path / "kits" / "case_00001" / "imaging.nii.gz", "IPL")
    nifti(label, tmp_path / "kits" / "case_00001" / "segmentation.nii.gz", "IPL")
    report = run("kits23", tmp_path / "kits", tmp_path / "raw")
    assert {r.id.split("_")[-2] for r in open_dataset(report.folder).requests} == {"all"}


def test_ct_org(tmp_path: Path) -> None:
    for number, codes in ((3, "LAS"), (21, "LPS"), (139, "RAS")):
        nifti(scan(number), tmp_path / "OrganSegmentations" / f"volume-{number}.nii.gz", codes)
        nifti(blob(RIGHT) | blob(LEFT, value=3), tmp_path / "OrganSegmentations" / f"labels-{number}.nii.gz", "RAS")
    report = run("ct_org", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert sorted(dataset.cases) == ["ctorg_021", "ctorg_139"]
    assert sorted(dataset.test_cases) == ["ctorg_003"]
    made = report.folder / "labelsTr" / "ctorg_021.nii.gz"
    assert nib.aff2axcodes(nib.load(made).affine) == ("L", "P", "S")  # brought onto its image
    assert centre_mm(made, 1)[0] > 0 > centre_mm(made, 3)[0]
    image = tmp_path / "OrganSegmentations" / "volume-21.nii.gz"
    assert (report.folder / "imagesTr" / "ctorg_021_0000.nii.gz").samefile(image)


def test_abdomenct1k(tmp_path: Path) -> None:
    nested = tmp_path / "AbdomenCT-1K-ImagePart1" / "AbdomenCT-1K-ImagePart1"
    nifti(scan(), nested / "Case_00001_0000.nii.gz", "LPS")
    nifti(scan(1), nested / "Case_00002_0000.nii.gz", "LPS")  # published without a mask
    nifti(blob(RIGHT), tmp_path / "Mask" / "Case_00001.nii.gz", "LPS", moved_mm=0.2)
    report = run("abdomenct1k", tmp_path, tmp_path / "raw")
    assert report.done == ("Case_00001",)
    assert "0.346 mm" in report.notes["Case_00001"][0]
    made = report.folder / "labelsTr" / "Case_00001.nii.gz"
    assert np.allclose(nib.load(made).affine, nib.load(nested / "Case_00001_0000.nii.gz").affine)
    assert centre_mm(made, 1)[0] > 0
    assert open_dataset(report.folder).canonical("kidneys") == "kidneys"


def test_pengwin(tmp_path: Path) -> None:
    label = blob(RIGHT, value=21) | blob(LEFT, value=11) | blob(slice(11, 13), value=1)
    label[16:18, 7:9, 5:7] = 23
    mha(scan(), tmp_path / "PENGWIN_CT_train_images_part1" / "001.mha")
    mha(scan(1), tmp_path / "PENGWIN_CT_train_images_part2" / "051.mha")
    mha(label, tmp_path / "PENGWIN_CT_train_labels" / "001.mha")
    mha(label, tmp_path / "PENGWIN_CT_train_labels" / "051.mha")
    report = run("pengwin", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert dataset.labels["right hip bone"] == tuple(range(21, 31))
    made = report.folder / "labelsTr" / "pengwin_001.nii.gz"
    assert centre_mm(made, *range(21, 31))[0] > 0 > centre_mm(made, *range(11, 21))[0]
    image = nib.load(report.folder / "imagesTr" / "pengwin_001_0000.nii.gz")
    bright = nib.affines.apply_affine(image.affine, np.argwhere(np.asanyarray(image.dataobj) == 900).mean(axis=0))
    assert (bright > 10).all()  # right, front, top
    assert set(np.unique(nib.load(made).get_fdata())) == {0, 1, 11, 21, 23}


def test_totalsegmentator(tmp_path: Path) -> None:
    for case in ("s0001", "s0002"):
        nifti(scan(), tmp_path / case / "ct.nii.gz")
        nifti(blob(RIGHT), tmp_path / case / "segmentations" / "kidney_right.nii.gz")
        nifti(blob(LEFT), tmp_path / case / "segmentations" / "kidney_left.nii.gz")
        nifti(blob(slice(15, 17), slice(6, 8), slice(4, 6)), tmp_path / case / "segmentations" / "adrenal_gland_right.nii.gz")
        nifti(np.zeros((24, 20, 16), np.uint8), tmp_path / case / "segmentations" / "vertebrae_L5.nii.gz")
    (tmp_path / "meta.csv").write_text(
        "\ufeffimage_id;age;gender;institute;study_type;split\ns0001;60;m;A;ct;train\ns0002;50;f;A;ct;test\n"
    )
    report = run("totalsegmentator", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert sorted(dataset.cases) == ["s0001"]
    assert sorted(dataset.test_cases) == ["s0002"]
    assert dataset.labels == {"adrenal_gland_right": (1,), "kidney_left": (2,), "kidney_right": (3,), "vertebrae_L5": (4,)}
    assert dataset.canonical("kidney_right") == "right kidney"
    assert dataset.canonical("vertebrae_L5") == "vertebra L5"
    made = report.folder / "labelsTr" / "s0001.nii.gz"
    assert centre_mm(made, 3)[0] > 0 > centre_mm(made, 2)[0]
    assert np.count_nonzero(nib.load(made).get_fdata() == 1) == 8  # the smaller structure keeps what both claim
    assert "8 voxels were of two structures" in report.notes["s0001"][0]


def test_totalsegmentator_mr(tmp_path: Path) -> None:
    nifti(scan(), tmp_path / "s0001" / "mri.nii.gz", "LPS")
    nifti(blob(LEFT), tmp_path / "s0001" / "segmentations" / "lung_left.nii.gz", "LPS")
    report = run("totalsegmentator", tmp_path, tmp_path / "raw")
    assert open_dataset(report.folder).modalities == ("MR",)
    assert centre_mm(report.folder / "labelsTr" / "s0001.nii.gz", 1)[0] < 0


def msd_task(folder: Path, modality: dict[str, str], labels: dict[str, str], cases: list[str], tests: list[str]) -> None:
    document = {
        "name": folder.name,
        "modality": modality,
        "labels": labels,
        "numTraining": len(cases),
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases],
        "test": [f"./imagesTs/{c}.nii.gz" for c in tests],
    }
    (folder / "dataset.json").write_text(json.dumps(document))


def test_decathlon_with_four_channels(tmp_path: Path) -> None:
    folder = tmp_path / "Task01_BrainTumour"
    stack = np.stack([scan(i) for i in range(4)], axis=-1)
    nifti(stack, folder / "imagesTr" / "BRATS_001.nii.gz", "LAS")
    nifti(blob(RIGHT, value=1) | blob(LEFT, value=3), folder / "labelsTr" / "BRATS_001.nii.gz", "LAS")
    nifti(stack, folder / "imagesTs" / "BRATS_485.nii.gz", "LAS")
    (folder / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"macOS")
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    msd_task(folder, modality, labels, ["BRATS_001"], ["BRATS_485"])
    report = run("msd", folder, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert dataset.channel_names == ("FLAIR", "T1w", "t1gd", "T2w")
    assert dataset.canonical("edema") == "peritumoural oedema"
    assert len(dataset.test_cases["BRATS_485"].images) == 4
    for channel, path in enumerate(dataset.cases["BRATS_001"].images):
        assert np.array_equal(read_volume(path).array.T, scan(channel))
        assert nib.load(path).shape == (24, 20, 16)
    assert centre_mm(report.folder / "labelsTr" / "BRATS_001.nii.gz", 1)[0] > 0


def test_decathlon_hippocampus_pairs_are_one_person(tmp_path: Path) -> None:
    folder = tmp_path / "Task04_Hippocampus"
    names = ["hippocampus_001", "hippocampus_002", "hippocampus_003"]
    for i, name in enumerate(names):
        nifti(scan(i), folder / "imagesTr" / f"{name}.nii.gz")
        nifti(blob(RIGHT), folder / "labelsTr" / f"{name}.nii.gz")
    msd_task(folder, {"0": "MRI"}, {"0": "background", "1": "Anterior", "2": "Posterior"}, names, [])
    report = run("msd", folder, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert sorted(dataset.subjects.values()) == [names[:2], names[2:]]
    assert dataset.canonical("Anterior") == "anterior hippocampus"
    assert dataset.modalities == ("MR",)


def png(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def test_brainmetshare_slices(tmp_path: Path) -> None:
    """PNG slices as on a screen: the lesion is drawn on the left of the picture, so it lies on the patient's right."""
    top = tmp_path / "stanford_release_brainmask"
    for part, case, folders in (("train", "Mets_005", "0123s"), ("test", "Mets_010", "0123")):
        for number in folders:
            for z in range(11):
                shown = np.full((18, 22), 40 + z)
                if number == "s":
                    shown = np.zeros((18, 22))
                    if 8 <= z <= 9:
                        shown[3:6, 2:6] = 255
                name = "seg" if number == "s" else number
                png(shown, top / f"mets_stanford_releaseMask_{part}" / case / name / f"{z}.png")
    report = run("brainmetshare", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert dataset.modalities == ("MR", "MR", "MR", "MR")
    assert sorted(dataset.test_cases) == ["Mets_010"]
    volume = read_volume(dataset.cases["Mets_005"].images[0])
    assert volume.source is not None
    assert volume.source.laterality == "assumed"
    assert np.allclose(volume.grid.spacing_zyx, (1.0, 0.94, 0.94))
    assert (np.diff(volume.array[:, 0, 0]) == 1).all()  # slices by number, not by the letters of their names
    made = report.folder / "labelsTr" / "Mets_005.nii.gz"
    assert set(np.unique(nib.load(made).get_fdata())) == {0, 1}
    centre = centre_mm(made)
    assert centre[0] > 0
    assert centre[1] > 0
    assert centre[2] > 0


def test_brainmetshare_nifti(tmp_path: Path) -> None:
    for name in ("bravo", "t1_pre", "t1_gd", "flair"):
        nifti(scan(), tmp_path / "train" / "Mets_005" / f"{name}.nii.gz", "LPS")
        nifti(scan(), tmp_path / "test" / "Mets_010" / f"{name}.nii.gz", "LPS")
    nifti(blob(LEFT, value=255), tmp_path / "train" / "Mets_005" / "seg.nii.gz", "LPS")
    report = run("brainmetshare", tmp_path, tmp_path / "raw")
    made = report.folder / "labelsTr" / "Mets_005.nii.gz"
    assert set(np.unique(nib.load(made).get_fdata())) == {0, 1}
    assert centre_mm(made)[0] < 0


def npz(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def lps(array_xyz: np.ndarray) -> np.ndarray:
    """(D, H, W) as SimpleITK gives a scan whose axes are L, P, S."""
    return np.ascontiguousarray(array_xyz[::-1, ::-1].T)


def test_cvpr_training_files(tmp_path: Path) -> None:
    grey = np.clip(scan(), 0, 255).astype(np.uint8)
    label = blob(RIGHT, value=1) | blob(LEFT, value=3)
    npz(tmp_path / "CT" / "CT_AMOS" / "CT_AMOS_amos_0001.npz", imgs=lps(grey), gts=lps(label), spacing=np.array([2.0, 2.5, 3.0]))
    prompts = {
        "CT_AMOS": {
            "1": ["Right kidney in abdominal CT", "Segment the right kidney"],
            "3": ["Spleen visible in CT"],
            "9": ["Liver in CT"],
            "instance_label": 0,
        }
    }
    (tmp_path / PROMPTS).write_text(json.dumps(prompts))
    report = run("cvpr_text", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert dataset.labels == {"right kidney": (1,), "spleen": (2,), "liver": (3,)}
    assert dataset.modalities == (None,)  # 0..255 are no Hounsfield units
    volume = read_volume(dataset.cases["CT_AMOS_amos_0001"].images[0])
    assert np.array_equal(volume.array.T, grey)  # axes: (D, H, W) is (z, y, x), x to the left, y to the back
    assert np.allclose(volume.grid.spacing_zyx, (3.0, 2.5, 2.0))  # spacing is (x, y, z)
    made = report.folder / "labelsTr" / "CT_AMOS_amos_0001.nii.gz"
    assert centre_mm(made, 1)[0] > 0 > centre_mm(made, 2)[0]
    assert sorted((r.text, r.target) for r in dataset.requests) == [
        ("Right kidney in abdominal CT", ("right kidney",)),
        ("Segment the right kidney", ("right kidney",)),
        ("Spleen visible in CT", ("spleen",)),
    ]


def test_cvpr_validation_files(tmp_path: Path) -> None:
    grey = np.clip(scan(), 0, 255).astype(np.uint8)
    said = {"2": "The liver in this MR scan", "instance_label": 0}
    npz(tmp_path / "3D_val_npz" / "MR_x_1.npz", imgs=lps(grey), spacing=(2.0, 2.5, 3.0), text_prompts=said)
    npz(tmp_path / "3D_val_gt" / "3D_val_gt_text" / "MR_x_1.npz", gts=lps(blob(RIGHT, value=2)), spacing=(2.0, 2.5, 3.0))
    lesions = blob(RIGHT, value=1) | blob(LEFT, value=2)
    npz(
        tmp_path / "3D_val_npz" / "MR_y_1.npz",
        imgs=lps(grey),
        spacing=(2.0, 2.5, 3.0),
        text_prompts={"1": "brain metastasis", "instance_label": 1},
    )
    npz(tmp_path / "3D_val_gt" / "3D_val_gt_text" / "MR_y_1.npz", gts=lps(lesions), spacing=(2.0, 2.5, 3.0))
    report = run("cvpr_text", tmp_path, tmp_path / "raw")
    dataset = open_dataset(report.folder)
    assert dataset.labels == {"liver": (1,), "brain metastasis": (2,)}
    assert [r.target for r in dataset.requests] == [("liver",), ("brain metastasis",)]
    labels, _ = read_labels(report.folder / "labelsTr" / "MR_y_1.nii.gz")
    assert np.array_equal(labels.T > 0, lesions > 0)  # instances become one structure
    assert set(np.unique(labels)) == {0, 2}


def hostile(path: Path, payload: bytes) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("text_prompts.npy", head.getvalue() + payload)


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("was_run", "w"))


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps(_RunsCode()),
        b"cos\nsystem\n(S'touch was_run'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfrombuffer\n(S'x'\ntR.",
        b"\x80\x04not a pickle",
    ],
)
def test_cvpr_hostile_pickles_are_not_run(payload: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grey = np.zeros((4, 5, 6), np.uint8)
    good = {"1": "liver", "instance_label": 0}
    npz(tmp_path / "val" / "CT_good.npz", imgs=grey, gts=grey + 1, spacing=(1.0, 1, 1), text_prompts=good)
    npz(tmp_path / "val" / "CT_bad.npz", imgs=grey, gts=grey, spacing=(1.0, 1, 1))
    hostile(tmp_path / "val" / "CT_bad.npz", payload)
    with pytest.raises(ImageError, match="was not run"):
        read_npz(tmp_path / "val" / "CT_bad.npz", ("text_prompts",))
    report = convert(load_converter("cvpr_text"), tmp_path / "val", "7", tmp_path / "raw")
    assert report.done == ("CT_good",)
    assert "Do not trust this file" in report.failed["CT_bad"]
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("kind", ["no zip", "cut short", "missing", "other shape", "bad spacing"])
def test_cvpr_damaged_files_are_named(kind: str, tmp_path: Path) -> None:
    grey = np.zeros((4, 5, 6), np.uint8)
    said = {"1": "liver", "instance_label": 0}
    npz(tmp_path / "v" / "CT_good.npz", imgs=grey, gts=grey + 1, spacing=(1.0, 1, 1), text_prompts=said)
    bad = npz(
        tmp_path / "v" / "CT_bad.npz",
        imgs=grey,
        gts=grey[:-1] if kind == "other shape" else grey,
        spacing=(1.0, 0, 1) if kind == "bad spacing" else (1.0, 1, 1),
        text_prompts=said,
    )
    if kind == "no zip":
        bad.write_bytes(b"nothing")
    elif kind == "cut short":
        bad.write_bytes(bad.read_bytes()[:-200])
    elif kind == "missing":
        npz(bad, imgs=grey, gts=grey, text_prompts=said)
    report = convert(load_converter("cvpr_text"), tmp_path / "v", "7", tmp_path / "raw")
    assert report.done == ("CT_good",)
    assert report.failed["CT_bad"].count("\n") == 0
    assert "CT_bad" in report.failed["CT_bad"]
    assert not (report.folder / "imagesTr" / "CT_bad_0000.nii.gz").exists()


def test_cvpr_modalities_do_not_mix(tmp_path: Path) -> None:
    for name in ("CT_a.npz", "US_b.npz"):
        npz(tmp_path / "v" / name, imgs=np.zeros((2, 3, 4), np.uint8), spacing=(1.0, 1, 1), text_prompts={"1": "liver"})
    with pytest.raises(UsageError, match="CT, US"):
        convert(load_converter("cvpr_text"), tmp_path / "v", "7", tmp_path / "raw")


def picture(array: np.ndarray) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": "x.png"}


def umrg_row(
    identifier: str, category: str, question: str, image: np.ndarray, mask: np.ndarray, points: Any = ((4, 2), (7, 5))
) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "images": [picture(image)],
        "masks": [picture(mask)],
        "reward_model": {"ground_truth": json.dumps({"bbox_2d": [3, 2, 8, 5], "point_2d": points}), "style": "rule"},
        "extra_info": {"id": identifier, "category": category, "supercategory": "Abdomen", "index": 0},
    }


def test_umrg(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 3))
    grey = np.random.default_rng(1).integers(0, 255, (20, 30))
    mask = np.zeros((20, 30))
    mask[2:6, 3:9] = 255  # top left of the picture
    rows = [
        umrg_row("a/1", "liver", "Which organ might be enlarged in this patient?", grey, mask),
        umrg_row("a/2", "polyp", "What should be taken out?", colour, mask),
        umrg_row("a/3", "spleen", "Where would blood cells be filtered?", grey, mask.T[:20, :20].repeat(2, 1)[:, :30]),
    ]
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    report = convert(load_converter("umrg"), tmp_path, "7", tmp_path / "raw")
    assert report.failed == {}
    dataset = open_dataset(report.folder)
    assert dataset.labels == {"liver": (1,), "polyp": (2,), "spleen": (3,)}
    assert dataset.subjects["picture_" + next(s for s in dataset.subjects if "umrg_a-1" in dataset.subjects[s])[8:]] == [
        "umrg_a-1",
        "umrg_a-3",
    ]
    shown = np.asarray(Image.open(report.folder / "labelsTr" / "umrg_a-1.png"))
    assert np.array_equal(shown, (mask > 0) * 1)
    assert np.asarray(Image.open(dataset.cases["umrg_a-2"].images[0])).shape == (20, 30, 3)
    labels, grid = read_labels(report.folder / "labelsTr" / "umrg_a-2.png")
    centre = grid.to_world(np.argwhere(labels == 2).mean(axis=0))
    middle = grid.corners_mm.mean(axis=0)
    assert centre[0] > middle[0]
    assert centre[1] > middle[1]
    assert next((r.case, r.target) for r in dataset.requests) == ("umrg_a-1", ("liver",))
    assert convert(load_converter("umrg"), tmp_path, "7", tmp_path / "raw").done == ()
    (request,) = (r for r in dataset.requests if r.case == "umrg_a-1")
    assert request.points == ((0, 17, 25), (0, 14, 22)), "rows and columns run backwards on the canonical grid"
    liver, grid = read_labels(report.folder / "labelsTr" / "umrg_a-1.png")
    views = pixel_map(grid, 0, 0, 60)  # 20 x 30 pixels, each 2 x 2, in the middle of a square
    for (x, y), voxel in zip(((4, 2), (7, 5)), request.points, strict=True):
        assert liver[voxel] == 1, "the points lie in the mask as they lie in the picture"
        assert views.to_pixel(voxel) == pytest.approx((2 * y + 0.5 + 10, 2 * x + 0.5))
    truth = Truth(grid, liver == 1).pointed(request.points)
    assert truth.on_slice(0, 0).points == request.points != Truth(grid, liver == 1).on_slice(0, 0).points
    rows[1]["masks"] = []
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    again = convert(load_converter("umrg"), tmp_path, "7", tmp_path / "raw")
    assert again.skipped == ("umrg_a-1", "umrg_a-3")
    assert "no mask" in again.failed["umrg_a-2"]


@pytest.mark.parametrize(
    "points", [None, [], [[1, 2]], [[1, 2], [30, 2]], [[1, 2], [3, 20]], [[1, 2], [-1, 3]], [[1, 2], ["a", 3]], "points"]
)
def test_umrg_points_that_are_no_two_pixels_are_left_out(tmp_path: Path, points: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    mask = np.zeros((20, 30))
    mask[2:6, 3:9] = 255
    parquet.write_table(arrow.Table.from_pylist([umrg_row("b", "liver", "What is it?", mask, mask, points)]), tmp_path / "train-0.parquet")
    report = convert(load_converter("umrg"), tmp_path, "7", tmp_path / "raw")
    assert report.failed == {}
    (request,) = open_dataset(report.folder).requests
    assert request.points == ()
