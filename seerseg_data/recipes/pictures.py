"""Slices of a training item as a reasoner sees them, with what is known to be on them, and the file they are kept in."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError
from seerseg.paths import write_atomically
from seerseg.views import CaseViews, PixelMap, View, ViewSpec, render
from seerseg.vocabulary import Entry
from seerseg.volume import Grid, Volume
from seerseg_data.recipes.items import Item, held_items, training_items

SIDE_PX = 96
SCHEMA = 1
_FILE = "pictures.npz"
_PHANTOMS = 40
_SHOWN_VOXELS = 50
_REGION_MARKS = {
    "chest": ("left lung", "right lung", "heart", "lungs"),
    "abdomen": ("liver", "left kidney", "right kidney", "spleen"),
    "pelvis": ("left hip bone", "right hip bone", "urinary bladder", "left gluteus maximus"),
    "head": ("skull", "brain", "cerebellum", "hippocampus", "brain tumour", "left thalamus"),
}
"""A region is shown when one of these is."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Slices of one scan as the reasoner sees them.

    pixels uint8 (n, SIDE_PX, SIDE_PX); kind: the item's group; seen: names with voxels in it; missing: labelled names without; absent:
    regions of the body of which nothing is in it; said: the regions in words.
    """

    pixels: NDArray[np.uint8]
    kind: str
    modality: str
    plane: str
    seen: tuple[str, ...]
    missing: tuple[str, ...]
    absent: frozenset[str]
    said: str

    def shows(self, entry: Entry, name: str) -> bool:
        """False when it is known that the structure is not in it."""
        if name in self.seen or entry.name in self.seen:
            return True
        return not (name in self.missing or entry.name in self.missing or (entry.regions and self.absent.issuperset(entry.regions)))

    def augmented(self, rng: random.Random) -> Picture:
        """Mostly with other contrast and brightness."""
        if rng.random() < 0.3:
            return self
        shown = np.clip(self.pixels * rng.uniform(0.8, 1.2) + rng.uniform(-20, 20), 0, 255).astype(np.uint8)
        return replace(self, pixels=shown)


def as_views(picture: Picture | None, modality: str | None) -> CaseViews:
    """What a protocol needs of views; without picture a case of which nothing is shown."""
    grid = Grid((8, 8, 8), np.eye(4))
    where = PixelMap(0, 0, (1.0, 1.0), (0.0, 0.0), (8, 8))
    plane: Any = picture.plane if picture else "axial"
    views = [] if picture is None else [View(np.repeat(p[..., None], 3, axis=2), plane, where) for p in picture.pixels]
    return CaseViews(tuple(views), grid, ViewSpec(plane=plane), modality)


# -------------------------------------------------------------------------------------------------------------------- drawing


def gather(cache: Path, data: Path) -> tuple[list[Picture], list[Picture]]:
    """(training, held) pictures of all items that can be found, by one seed; held ones as prediction shows them."""
    rng = random.Random(0)
    training: list[Picture] = []
    for item in training_items(cache, data, _PHANTOMS):
        many = {"hippocampus": 3, "brain": 14}.get(item.group, 6 if "phantom" in item.name else 24)
        training += take(item, rng, many)
    return training, [take(item, rng, 1, plain=True)[0] for item in held_items(cache, data)]


def take(item: Item, rng: random.Random, count: int, *, plain: bool = False) -> list[Picture]:
    """Renderings of one item: parts of its extent, other planes, the planes' own windows. plain: as prediction shows it."""
    image, labels = item.levels[0].image.numpy().astype(np.float32), item.levels[0].labels.numpy()
    return [_picture(item, image, labels, rng, plain=plain) for _ in range(count)]


def _picture(item: Item, image: NDArray[np.float32], labels: NDArray[np.int16], rng: random.Random, *, plain: bool) -> Picture:
    from PIL import Image

    crop = item.group == "hippocampus"
    size = len(labels)
    low, high = 0, size
    if not plain and not crop and rng.random() < 0.7:
        length = rng.randint(max(4, int(0.3 * size)), size)
        low = rng.randint(0, size - length)
        high = low + length
    image, labels = image[low:high], labels[low:high]
    if not plain and crop and rng.random() < 0.5:  # which side a crop shows is not recorded
        image, labels = image[:, :, ::-1], labels[:, :, ::-1]
    z, y, x = image.shape
    volume = Volume(np.ascontiguousarray(image), Grid((z, y, x), np.diag([*item.levels[0].spacing_mm[::-1], 1.0])), item.modality)
    plane: Any = "axial" if plain else rng.choices(("axial", "coronal", "sagittal"), (0.8, 0.12, 0.08))[0]
    count = 8 if plain or rng.random() < 0.7 else rng.randint(3, 8)
    spec = ViewSpec(plane=plane, count=count) if plain else ViewSpec(plane=plane, count=count, gamma=rng.uniform(0.75, 1.3))
    small = [Image.fromarray(v.pixels[..., 0]).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC) for v in render(volume, spec).views]
    voxels = np.bincount(labels.ravel(), minlength=512)
    counts = {name: int(voxels[list(values)].sum()) if values else 0 for name, values in item.structures.items()}
    seen = tuple(name for name, number in counts.items() if number >= _SHOWN_VOXELS)
    missing = tuple(name for name, number in counts.items() if number == 0 and item.structures[name])
    return Picture(np.stack([np.asarray(s) for s in small]), item.group, item.modality, plane, seen, missing, *_regions(item, seen))


def _regions(item: Item, seen: tuple[str, ...]) -> tuple[frozenset[str], str]:
    """(absent regions, the shown ones in words)."""
    absent = set(item.absent) - {"trunk"}
    shown = [region for region, marks in _REGION_MARKS.items() if any(mark in seen for mark in marks)]
    for region, marks in _REGION_MARKS.items():
        if region not in shown and any(mark in item.structures for mark in marks):
            absent.add(region)
    if shown == ["head"]:
        absent |= {"chest", "abdomen", "pelvis", "upper limb", "lower limb", "spine"} - ({"neck"} if item.group != "hippocampus" else set())
    elif "head" not in shown and ("chest" in shown or "abdomen" in shown):
        absent |= {"head"}
    if item.group == "hippocampus":
        absent.add("neck")
    said = " and ".join(shown) or ("spine" if any("vertebra" in name for name in seen) else "body")
    return frozenset(absent), said


# -------------------------------------------------------------------------------------------------------------------- the file


def save_pictures(folder: Path, training: Sequence[Picture], held: Sequence[Picture]) -> None:
    """Write `folder`/pictures.npz: the pixels of all pictures one after the other, and what is known of each as JSON."""
    rows = []
    for picture in (*training, *held):
        row = asdict(replace(picture, pixels=np.zeros(0, np.uint8)))
        rows.append({**row, "pixels": len(picture.pixels), "absent": sorted(picture.absent)})
    known = json.dumps({"schema": SCHEMA, "training": len(training), "pictures": rows})
    pixels = np.concatenate([picture.pixels for picture in (*training, *held)])
    write_atomically(folder / _FILE, lambda temporary: np.savez(temporary, pixels=pixels, known=np.array(known)))


def load_pictures(folder: Path) -> tuple[list[Picture], list[Picture]]:
    """(training, held) as they were saved; DatasetError where there are none, or an older version's. Nothing loaded can run code."""
    path, again = folder / _FILE, "Run `train_nano_reasoner.py prepare` with this folder as --out."
    if not path.is_file():
        older = " (pictures.pkl was written by an older version and is not read)" if (folder / "pictures.pkl").is_file() else ""
        raise DatasetError(f"There are no pictures in {folder}{older}. {again}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            pixels, known = stored["pixels"], json.loads(str(stored["known"]))
        if known["schema"] != SCHEMA:
            raise ValueError(f"schema {known['schema']}")
        ends = np.cumsum([row["pixels"] for row in known["pictures"]])
        parts = np.split(pixels, ends[:-1])
        pictures = [_from_row(row, part) for row, part in zip(known["pictures"], parts, strict=True)]
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} is damaged or of another version ({error}). {again}") from error
    return pictures[: known["training"]], pictures[known["training"] :]


def _from_row(row: dict[str, Any], pixels: NDArray[np.uint8]) -> Picture:
    texts = {name: row[name] for name in ("kind", "modality", "plane", "said")}
    return Picture(pixels, seen=tuple(row["seen"]), missing=tuple(row["missing"]), absent=frozenset(row["absent"]), **texts)
