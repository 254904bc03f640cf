"""What a network is shown of an item: a cut on an isotropic grid, as the scan is, or deformed and then degraded.

Deformation stands for other bodies and positions, degradation for other scanners and protocols. Random numbers come from two
generators: `rng` for chances and single numbers, `npr` for arrays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seerseg.segmenters.nano import inputs
from seerseg_data.recipes.items import Float, Item, Level

_IMPORTANT = {
    "left lung": 4, "right lung": 4, "lungs": 3, "ribs": 4, "vertebral column": 4, "anterior hippocampus": 3, "posterior hippocampus": 3,
    "liver": 2, "spleen": 2, "left kidney": 2, "right kidney": 2, "thoracic vertebral column": 2, "lumbar vertebral column": 1.5,
    "hippocampus": 1.5, "left hippocampus": 1.5, "right hippocampus": 1.5, "heart": 1.5, "aorta": 1.5, "left ribs": 0.4, "right ribs": 0.4,
}  # fmt: skip
"""How often a structure is asked for, beside 1 for the others."""


def choose(names: Sequence[str], rng: random.Random) -> str:
    """One of the names, the important ones more often."""
    return rng.choices(names, [_IMPORTANT.get(name, 1.0) for name in names])[0]


@dataclass(frozen=True, eq=False)
class Cut:
    """A grid of `shape` voxels of `spacing_mm`, along the item's axes, about `centre_mm`, all as (z, y, x)."""

    centre_mm: Float
    spacing_mm: float
    shape: tuple[int, int, int]

    @property
    def origin_mm(self) -> Float:
        """(3,): the centre of the first voxel."""
        return self.centre_mm - (np.array(self.shape) - 1) / 2 * self.spacing_mm

    def mirrored(self, full_mm: Float) -> Cut:
        """The same place in the frame of the scan mirrored left to right."""
        centre_mm = self.centre_mm.copy()
        centre_mm[2] = full_mm[2] - centre_mm[2]
        return Cut(centre_mm, self.spacing_mm, self.shape)


def mirrored_box(low_mm: Float, high_mm: Float, full_mm: Float) -> tuple[Float, Float]:
    """A box of the item in the frame of the scan mirrored left to right."""
    low, high = low_mm.copy(), high_mm.copy()
    low[2], high[2] = full_mm[2] - high_mm[2], full_mm[2] - low_mm[2]
    return low, high


def network_input(
    image: Tensor, scaling: inputs.Intensities, modality: str, cut: Cut, low_mm: Float, high_mm: Float
) -> tuple[Tensor, Tensor]:
    """What the networks take: (5, Z, Y, X) windows and coordinates, (8,) conditions; the box is the body's, in the cut's frame."""
    coordinates = inputs.coordinates(cut.shape, cut.origin_mm.tolist(), cut.spacing_mm, low_mm.tolist(), high_mm.tolist())
    conditions = inputs.conditions(cut.spacing_mm, low_mm.tolist(), high_mm.tolist(), modality)
    return torch.cat([scaling.channels(image), coordinates]), conditions


# ------------------------------------------------------------------------------------------------------------------ as it is


def undeformed(item: Item, cut: Cut) -> tuple[Tensor, Tensor]:
    """Image (trilinear, float32) and labels (nearest, int64) on the cut; outside the field of view: background and 0."""
    level = _level(item, cut.spacing_mm)
    lines = [torch.arange(n, dtype=torch.float32) * cut.spacing_mm + o for n, o in zip(cut.shape, cut.origin_mm.tolist(), strict=True)]
    where = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    inside = ((where >= 0) & (where < torch.tensor(item.full_mm, dtype=torch.float32))).all(-1)
    extent_mm = torch.tensor(level.spacing_mm * np.array(level.image.shape), dtype=torch.float32)
    return _read(level, (where / extent_mm * 2 - 1).flip(-1), inside, item.scaling.background)


def _level(item: Item, spacing_mm: float, *, nearly: bool = False) -> Level:
    """The coarsest copy that the cut still resolves: its finest voxel edge and a third more is no larger than the cut's.

    nearly: or its longest edge is at least a tenth smaller.
    """
    chosen = item.levels[0]
    for level in item.levels:
        if np.min(level.spacing_mm) * 1.3 <= spacing_mm or (nearly and np.max(level.spacing_mm) <= max(spacing_mm * 0.9, 1e-3)):
            chosen = level
    return chosen


def _read(level: Level, unit_xyz: Tensor, inside: Tensor, background: float) -> tuple[Tensor, Tensor]:
    """Both arrays of a level at places (Z, Y, X, 3) between -1 and 1."""
    at = unit_xyz[None]
    image, labels = level.image.float()[None, None] - background, level.labels.float()[None, None]
    picked = F.grid_sample(image, at, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    chosen = F.grid_sample(labels, at, mode="nearest", padding_mode="border", align_corners=False)[0, 0]
    return picked * inside + background, (chosen * inside).round().long()


# ------------------------------------------------------------------------------------------------------------------ deformed


def deformed(
    item: Item, cut: Cut, *, low_mm: Float, high_mm: Float, mirrored: bool, npr: np.random.Generator, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """As `undeformed`, but turned by about 6 degrees, stretched by about 8 %, bent by about 2 % of the side, and mirrored on demand.

    low_mm, high_mm: the field of view, in the item's frame.
    """
    level = _level(item, cut.spacing_mm, nearly=True)
    matrix = _turned(npr.normal(0, 0.10, 3) if rng.random() < 0.6 else np.zeros(3)) * np.exp(npr.normal(0, 0.08, 3))
    if mirrored:
        matrix[:, 2] *= -1
    lines = [torch.arange(n, dtype=torch.float32) * cut.spacing_mm - (n - 1) / 2 * cut.spacing_mm for n in cut.shape]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1) @ torch.from_numpy(matrix.T.astype(np.float32))
    if rng.random() < 0.6:
        size_mm = float(max(cut.shape)) * cut.spacing_mm
        bend = torch.from_numpy(npr.normal(0, 0.018 * size_mm, (1, 3, 4, 4, 4)).astype(np.float32))
        grid = grid + F.interpolate(bend, size=cut.shape, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)
    where = grid + torch.from_numpy(cut.centre_mm.astype(np.float32))
    inside = ((where >= torch.tensor(low_mm, dtype=torch.float32)) & (where < torch.tensor(high_mm, dtype=torch.float32))).all(-1)
    voxel = where / torch.tensor(level.spacing_mm, dtype=torch.float32) - 0.5
    unit = (voxel + 0.5) / torch.tensor(level.image.shape, dtype=torch.float32) * 2 - 1
    return _read(level, unit.flip(-1), inside, item.scaling.background)


def _turned(angles: Float) -> Float:
    """(3, 3): rotations about z, y and x, one after the other."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = matrix @ turn
    return matrix


# ------------------------------------------------------------------------------------------------------------------ degraded


def degraded(
    image: Tensor, item: Item, spacing_mm: float, npr: np.random.Generator, rng: random.Random
) -> tuple[Tensor, inputs.Intensities, str]:
    """(image, how to scale it, the modality that is told): thick slices, blur, noise, bias field, another contrast or modality."""
    if rng.random() < 0.35:
        image = _thick_slices(image, spacing_mm, rng, body=item.group == "torso")
    if rng.random() < 0.25:
        image = _blurred(image)
    if item.modality != inputs.CT:
        image = _other_mr(image, item, npr, rng)
        return image, item.scaling, item.modality if rng.random() < 0.9 else inputs.UNKNOWN
    if rng.random() >= 0.85:
        return _as_mr(image, npr, rng)
    noise = rng.uniform(0.96, 1.04), rng.uniform(-15, 15)
    image = image * noise[0] + noise[1] + _normal(image, npr, rng.uniform(0, 35))
    if rng.random() < 0.3:  # other soft tissue contrast
        image = torch.where(image > 0, image * rng.uniform(0.8, 1.3), image)
    return image, item.scaling, item.modality if rng.random() < 0.95 else inputs.UNKNOWN


def _normal(image: Tensor, npr: np.random.Generator, sd: float = 1.0) -> Tensor:
    return torch.from_numpy(npr.normal(0, sd, image.shape).astype(np.float32))


def _thick_slices(image: Tensor, spacing_mm: float, rng: random.Random, *, body: bool) -> Tensor:
    """Means over 4 to 11 mm (head: two voxels) along one axis, mostly z, and read back between them."""
    axis = 0 if rng.random() < 0.7 else rng.randrange(3)
    factor = min(6, max(2, round(rng.uniform(4, 11) / spacing_mm))) if body else 2
    line = image.movedim(axis, 0)
    n = len(line) // factor * factor
    thick = line[:n].reshape(n // factor, factor, *line.shape[1:]).mean(1)
    rows = thick.movedim(0, -1)[None].flatten(1, 2)
    smooth = F.interpolate(rows, size=n, mode="linear", align_corners=False)[0].reshape(*line.shape[1:], n).movedim(-1, 0)
    return torch.cat([smooth, line[n:]]).movedim(0, axis)


def _blurred(image: Tensor) -> Tensor:
    """By (1, 2, 1) / 4 along every axis."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 3
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = 1
        image = F.conv3d(F.pad(image[None, None], pad, mode="replicate"), kernel.view(shape))[0, 0]
    return image


def _as_mr(image: Tensor, npr: np.random.Generator, rng: random.Random) -> tuple[Tensor, inputs.Intensities, str]:
    """A CT's shapes with the grey values of another modality: a random curve with knots between -200 and 400 HU."""
    knots = np.sort(npr.uniform(-200, 400, 4))
    values = npr.uniform(0.1, 1, 6)
    values[0] = rng.uniform(0, 0.1)
    image = torch.from_numpy(np.interp(image.clamp(-1000, 800).numpy(), [-1000, *knots, 800], values).astype(np.float32))
    image = image + 0.03 * _normal(image, npr)
    flat = image.flatten()
    return image, inputs.Intensities.measure(flat[flat > 0.1][::3], inputs.MR), inputs.MR


def _other_mr(image: Tensor, item: Item, npr: np.random.Generator, rng: random.Random) -> Tensor:
    """Gamma, another contrast, a bias field and noise, in units of the scan's own range."""
    low, span = item.scaling.low, item.scaling.high - item.scaling.low
    unit = ((image - low) / span).clamp(min=0)
    if rng.random() < 0.5:
        unit = unit ** math.exp(rng.gauss(0, 0.25))
    if rng.random() < (0.25 if item.group == "brain" else 0.05):
        values = np.concatenate([[0.0], npr.uniform(0.05, 1.2, 5), [1.5]])
        unit = torch.from_numpy(np.interp(unit.numpy(), [0, 0.2, 0.4, 0.55, 0.7, 0.85, 1.5], values).astype(np.float32))
    if rng.random() < 0.4:
        bias = torch.from_numpy(npr.normal(0, 0.15, (1, 1, 3, 3, 3)).astype(np.float32))
        unit = unit * F.interpolate(bias, size=image.shape, mode="trilinear", align_corners=True)[0, 0].exp()
    if rng.random() < 0.6:
        unit = unit + rng.uniform(0, 0.06) * _normal(unit, npr)
    return unit * span + low
