"""What the text network learns from: views of items, and what is asked of each in words.

A view is asked for some structures that are in it, some that are not, and now and then for words that mean nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from seerseg_data.nano_vocabulary import CANONICAL, REGION, other_words, surface_forms, swap_side
from seerseg_data.recipes.cuts import Cut, choose, deformed, degraded, mirrored_box, network_input, undeformed
from seerseg_data.recipes.items import Float, Item

FINE_SIDE = 48
_SEEN_VOXELS, _LEARNT_VOXELS = 25, 40


@dataclass(frozen=True, eq=False)
class TextView:
    """image (5, Z, Y, X), conditions (8,), truth uint8 (P, Z, Y, X), texts P, presence (P,): 1 or 0.

    half_texts Q and half_truth uint8 (Q, Z/2, Y/2, X/2), eighths: structures of the view, for the cheaper loss at half resolution.
    """

    image: Tensor
    conditions: Tensor
    truth: Tensor
    texts: list[str]
    presence: Tensor
    half_texts: list[str]
    half_truth: Tensor


def make_view(item: Item, kind: str, rng: random.Random, plain: float = 0.0) -> TextView:
    """Cut, deform and degrade one view of the item, and choose what to ask of it.

    kind: hippocampus (a whole crop at about 1 mm), coarse (the whole body or a part of it, as the first look of prediction) or fine
    (48 voxels, mostly about a structure). plain: share of the hippocampus views that are not degraded.
    """
    npr = np.random.default_rng(rng.getrandbits(32))
    full_mm = item.full_mm
    low, high = np.zeros(3), full_mm.copy()
    if kind != "hippocampus" and rng.random() < 0.6:
        low, high = _field_of_view(full_mm, rng)
    box_lo, box_hi = np.maximum(item.box_mm[0], low), np.minimum(item.box_mm[1], high)
    if (box_hi - box_lo).min() < 20:
        low, high, (box_lo, box_hi) = np.zeros(3), full_mm, item.box_mm
    cut = _cut(item, kind, (low, high), (box_lo, box_hi), npr, rng)
    mirrored = rng.random() < item.mirror
    image, labels = deformed(item, cut, low_mm=low, high_mm=high, mirrored=mirrored, npr=npr, rng=rng)
    if mirrored:
        cut = cut.mirrored(full_mm)
        box_lo, box_hi = mirrored_box(box_lo, box_hi, full_mm)
    scaling, modality = item.scaling, item.modality
    if kind != "hippocampus" or rng.random() >= plain:
        image, scaling, modality = degraded(image, item, cut.spacing_mm, npr, rng)
    jitter = npr.normal(0, 0.02, (2, 3)) * (box_hi - box_lo)
    texts, truth, presence = _ask(item, labels, mirrored, kind, rng)
    half_texts, half_truth = _ask_all(item, labels, mirrored, rng)
    stacked, conditions = network_input(image, scaling, modality, cut, box_lo + jitter[0], box_hi + jitter[1])
    return TextView(stacked, conditions, truth, texts, presence, half_texts, half_truth)


def plain_view(item: Item) -> tuple[TextView, Tensor]:
    """The whole body box, as the coarse pass of prediction sees it, with nothing asked; and its labels (Z, Y, X)."""
    low, high = item.box_mm
    spacing_mm = float(np.clip((high - low).max() / 64, 1.0, 6.0))
    z, y, x = (_rounded(extent / spacing_mm) for extent in high - low)
    cut = Cut(item.box_mm.mean(0), spacing_mm, (z, y, x))
    image, labels = undeformed(item, cut)
    stacked, conditions = network_input(image, item.scaling, item.modality, cut, low, high)
    nothing = torch.zeros(0)
    return TextView(stacked, conditions, nothing, [], nothing, [], nothing), labels


def text_batch(size: int, rng: random.Random) -> tuple[list[str], Tensor]:
    """Strings, and (size,) the index of the canonical name of each; the index after the last one: none."""
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


class Stream(IterableDataset):  # type: ignore[misc,type-arg,unused-ignore]  # torch is not read by the type checker
    """Endless batches: (kind, two views). chances: of each kind; plain: see `make_view`."""

    def __init__(self, items: Sequence[Item], *, seed: int, chances: Mapping[str, float], plain: float) -> None:
        self.items, self.seed, self.chances, self.plain = tuple(items), seed, dict(chances), plain

    def __iter__(self) -> Iterator[tuple[str, list[TextView]]]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        crops, bodies, brains = ([i for i in self.items if i.group == group] for group in ("hippocampus", "torso", "brain"))
        kinds = [kind for kind in self.chances if kind != "hippocampus" or crops]
        while True:
            kind = rng.choices(kinds, [self.chances[k] for k in kinds])[0]
            if kind == "hippocampus":
                yield kind, [make_view(rng.choice(crops), kind, rng, self.plain) for _ in range(2)]
            else:
                pool = brains if rng.random() < 0.36 and brains else bodies
                yield kind, [make_view(rng.choices(pool, [i.weight for i in pool])[0], kind, rng) for _ in range(2)]


# --------------------------------------------------------------------------------------------------------------- where to look


def _field_of_view(full_mm: Float, rng: random.Random) -> tuple[Float, Float]:
    """A part of the scan: often cut along z, less often along y and x, to 45 to 95 %."""
    low, high = np.zeros(3), full_mm.copy()
    for axis in range(3):
        if rng.random() < (0.7 if axis == 0 else 0.35):
            keep = rng.uniform(0.45, 0.95) * full_mm[axis]
            low[axis] = rng.uniform(0, full_mm[axis] - keep)
            high[axis] = low[axis] + keep
    return low, high


def _cut(item: Item, kind: str, field: tuple[Float, Float], box: tuple[Float, Float], npr: np.random.Generator, rng: random.Random) -> Cut:
    """field, box: low and high faces in mm of what is seen and of the body in it."""
    box_lo, box_hi = box
    extent = box_hi - box_lo
    coarse_mm = float(np.clip(extent.max() / 64, 1.0, 6.0))
    if kind == "hippocampus":
        spacing_mm = 1.0 * rng.uniform(0.95, 1.05)
        z, y, x = (min(64, _rounded(full / spacing_mm)) for full in item.full_mm)
        return Cut(item.full_mm / 2, spacing_mm, (z, y, x))
    if kind == "coarse":
        spacing_mm = coarse_mm * rng.uniform(1.0, 1.4)
        z, y, x = (min(80, _rounded(e / spacing_mm)) for e in extent)
        return Cut((box_lo + box_hi) / 2 + npr.normal(0, 2 * spacing_mm, 3), spacing_mm, (z, y, x))
    spacing_mm = math.exp(rng.uniform(math.log(item.finest_mm), math.log(max(item.finest_mm * 1.1, coarse_mm * 0.75))))
    centre = npr.uniform(box_lo, box_hi)
    if rng.random() < 0.75:
        coarsest = item.levels[-1]
        value = rng.choice(item.structures[choose([name for name, values in item.structures.items() if values], rng)])
        where = torch.nonzero(coarsest.labels == value)
        if len(where):
            spot = where[rng.randrange(len(where))].numpy() * coarsest.spacing_mm
            if (spot >= field[0]).all() and (spot < field[1]).all():
                centre = spot + npr.normal(0, 0.2 * FINE_SIDE * spacing_mm, 3)
    return Cut(centre, spacing_mm, (FINE_SIDE, FINE_SIDE, FINE_SIDE))


def _rounded(length: float) -> int:
    """To a multiple of 16, at least 32."""
    return max(32, 16 * math.ceil(length / 16 - 0.15))


# ----------------------------------------------------------------------------------------------------------------- what to ask


def _voxels(item: Item, labels: Tensor) -> dict[str, int]:
    """How many voxels of each structure there are."""
    counts = torch.bincount(labels.flatten(), minlength=256)
    return {name: int(counts[list(values)].sum()) for name, values in item.structures.items()}


def _mask(item: Item, labels: Tensor, name: str) -> Tensor:
    return torch.isin(labels, torch.tensor(item.structures[name], dtype=labels.dtype))


def _ask(item: Item, labels: Tensor, mirrored: bool, kind: str, rng: random.Random) -> tuple[list[str], Tensor, Tensor]:
    """(texts, truth, presence): up to 4 structures that are there (hippocampus: 3), 2 that are not, now and then words without meaning."""
    seen = _voxels(item, labels)
    pool = [name for name, count in seen.items() if count >= _SEEN_VOXELS]
    gone = [name for name, count in seen.items() if count == 0]
    gone += [name for name, region in REGION.items() if region in item.absent and name not in item.structures]
    chosen: list[str] = []
    for _ in range(min(4 if kind != "hippocampus" else 3, len(pool))):
        chosen.append(choose(pool, rng))
        pool.remove(chosen[-1])
    texts, truth, presence = [], [], []
    empty = torch.zeros(labels.shape, dtype=torch.uint8)
    for name in chosen:
        texts.append(surface_forms(swap_side(name) if mirrored else name, rng))
        truth.append(_mask(item, labels, name).to(torch.uint8))
        presence.append(1.0)
    for name in rng.sample(gone, min(len(gone), 2)):
        texts.append(surface_forms(swap_side(name) if mirrored else name, rng))
        truth.append(empty)
        presence.append(0.0)
    if rng.random() < 0.3 or not texts:
        texts.append(other_words(rng))
        truth.append(empty)
        presence.append(0.0)
    return texts, torch.stack(truth), torch.tensor(presence)


def _ask_all(item: Item, labels: Tensor, mirrored: bool, rng: random.Random) -> tuple[list[str], Tensor]:
    """(half_texts, half_truth): up to 24 structures of the view, and one that is not in it."""
    seen = _voxels(item, labels)
    there = [name for name, count in seen.items() if count >= _LEARNT_VOXELS]
    gone = [name for name, count in seen.items() if count == 0]
    names = rng.sample(there, min(len(there), 24)) + rng.sample(gone, min(len(gone), 1))
    if not names:
        return [], torch.zeros(0)
    texts = [surface_forms(swap_side(name) if mirrored else name, rng, exact=0.6, slips=0.2) for name in names]
    masks = torch.stack([_mask(item, labels, name).float() for name in names])
    return texts, (F.avg_pool3d(masks[None], 2)[0] * 8).round().to(torch.uint8)
