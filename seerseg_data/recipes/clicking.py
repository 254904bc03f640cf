"""What the click network learns from: crops with one target, and a simulated user who asks for it with boxes, clicks and masks.

Names are never seen. A target is asked for by a box on a slice (true, jittered or bad), a 3D box, a click, a damaged mask or the mask of
one slice; after each mask that is drawn the user clicks at the deepest point of the largest error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from seerseg.prompts import Box2D, Box3D, Point
from seerseg.segmenters.nano import clicks, inputs
from seerseg.volume import Grid
from seerseg_data.recipes.cuts import Cut, choose, deformed, degraded, mirrored_box, network_input, undeformed
from seerseg_data.recipes.items import Item, bounds
from seerseg_data.trajectories import deepest, error_points

Bool = NDArray[np.bool_]
Shape = tuple[int, int, int]

SHARES = {"hippocampus": 0.5, "torso": 0.34, "brain": 0.16}
SHAPES: tuple[Shape, ...] = ((32, 32, 32), (48, 32, 32), (48, 48, 32))
SHAPE_ODDS = (6, 4, 1)
FIRST = {"box2d": 0.55, "box3d": 0.12, "point": 0.13, "damaged": 0.12, "slice": 0.08}
"""How a target is asked for at first."""
FLAT = 0.06
"""Share of crops that show one slice repeated: single images."""
FORGET = 0.15
"""Share of turns that know the mask before and the newest click alone, as without a session."""
LEAST_VOXELS = 40
_VOXEL = (1.0, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------------------------- crops


@dataclass(frozen=True, eq=False)
class Crop:
    """image (5, Z, Y, X), conditions (8,), target (Z, Y, X) with LEAST_VOXELS at least."""

    image: Tensor
    conditions: Tensor
    target: Bool


def draw_pair(pools: Mapping[str, Sequence[Item]], rng: random.Random) -> list[Crop]:
    """Two crops of one shape; pools: items by group, of which the shares are SHARES."""
    out: list[Crop] = []
    shape = rng.choices(SHAPES, SHAPE_ODDS)[0]
    groups = [group for group in SHARES if pools.get(group)]
    while len(out) < 2:
        pool = pools[rng.choices(groups, [SHARES[group] for group in groups])[0]]
        crop = draw_crop(rng.choices(pool, [item.weight for item in pool])[0], shape, rng)
        if crop is not None and (not out or crop.image.shape == out[0].image.shape):
            out.append(crop)
    return out


def draw_crop(item: Item, shape: Shape, rng: random.Random, *, plain: bool = False) -> Crop | None:
    """A crop about one structure of the item, its longest axis along the structure's; None: there is too little of it.

    plain: the whole structure, neither deformed nor degraded, at one spacing.
    """
    npr = np.random.default_rng(rng.getrandbits(32))
    names = [name for name, values in item.structures.items() if values]
    name = rng.choice(names) if plain else choose(names, rng)
    where = np.isin(item.levels[-1].labels.numpy(), item.structures[name])
    if not plain and rng.random() < 0.3:
        parts, count = ndimage.label(where)
        if count > 1:
            where = parts == rng.randint(1, count)
    if np.count_nonzero(where) < 8:
        return None
    cut = _about(item, where, shape, npr, rng, plain=plain)
    box_lo, box_hi = item.box_mm
    mirrored = not plain and rng.random() < 0.5
    if plain:
        image, labels = undeformed(item, cut)
    else:
        image, labels = deformed(item, cut, low_mm=np.zeros(3), high_mm=item.full_mm, mirrored=mirrored, npr=npr, rng=rng)
    if mirrored:
        cut = cut.mirrored(item.full_mm)
        box_lo, box_hi = mirrored_box(box_lo, box_hi, item.full_mm)
    scaling, modality = item.scaling, item.modality
    if not plain and rng.random() < (0.4 if item.group == "hippocampus" else 0.7):
        image, scaling, modality = degraded(image, item, cut.spacing_mm, npr, rng)
    target = _target(np.isin(labels.numpy(), item.structures[name]), rng)
    if target is None:
        return None
    if not plain and rng.random() < FLAT:
        k = int(target.sum(axis=(1, 2)).argmax())
        image = image[k : k + 1].expand(*cut.shape).contiguous()
        target = np.broadcast_to(target[k : k + 1], target.shape).copy()
    return Crop(*network_input(image, scaling, modality, cut, box_lo, box_hi), target)


def _about(item: Item, where: Bool, shape: Shape, npr: np.random.Generator, rng: random.Random, *, plain: bool) -> Cut:
    """Where to look for `where`, a mask on the coarsest copy: mostly all of it with some room, now and then a part of it."""
    step_mm = item.levels[-1].spacing_mm
    low, high = (edge * step_mm for edge in bounds(where))
    extent = high - low
    order = np.argsort(np.argsort(-extent, kind="stable"), kind="stable")
    z, y, x = (sorted(shape, reverse=True)[k] for k in order)
    part = not plain and rng.random() < 0.12
    share = 0.7 if plain else rng.uniform(1.0, 1.6) if part else math.exp(rng.uniform(math.log(0.3), math.log(0.95)))
    spacing_mm = float(np.clip((extent / np.array((z, y, x))).max() / share, _finest_mm(item), 8.0))
    if item.group == "hippocampus" and spacing_mm < 1.35:
        spacing_mm = 1.0 if plain else rng.uniform(0.97, 1.03)
    centre = (low + high) / 2
    if part:
        spots = np.argwhere(where)
        centre = (spots[rng.randrange(len(spots))] + 0.5) * step_mm
    elif not plain:
        side = np.array((z, y, x)) * spacing_mm
        centre = centre + npr.uniform(-0.5, 0.5, 3) * np.clip(np.maximum(0.15 * extent, side - extent), 0, 0.4 * side)
    return Cut(centre, spacing_mm, (z, y, x))


def _finest_mm(item: Item) -> float:
    """The rule of use is `seerseg.segmenters.nano.refining.finest_mm`."""
    return max(1.0 if item.modality == inputs.CT else 0.75, 0.7 * float(np.median(item.levels[0].spacing_mm)))


def _target(target: Bool, rng: random.Random) -> Bool | None:
    """The structure on the crop, now and then one part of it; None when there is too little of it."""
    if np.count_nonzero(target) < LEAST_VOXELS:
        return None
    if rng.random() < 0.3:
        parts, count = ndimage.label(target)
        big = np.flatnonzero(np.bincount(parts.ravel())[1:] >= LEAST_VOXELS)
        if count > 1 and len(big):
            target = parts == 1 + int(rng.choice(list(big)))
    return target


# ------------------------------------------------------------------------------------------------------------------ a user


@dataclass
class User:
    """One simulated user of one target, bool (Z, Y, X): what was asked so far, on `source`, a grid over the crop's.

    before: the mask drawn last, float (Z, Y, X); forget: only it and the newest click are told.
    """

    target: Bool
    crop: Grid
    source: Grid
    boxes: tuple[Box2D | Box3D, ...] = ()
    points: list[Point] = field(default_factory=list)
    before: NDArray[np.float32] | None = None
    forget: bool = False

    def channels(self) -> Tensor:
        """The network's prompt channels (4, Z, Y, X)."""
        boxes = () if self.forget else self.boxes
        points = tuple(self.points[-1:] if self.forget else self.points)
        return clicks.prompt_channels(self.crop, self.source, boxes=boxes, points=points, before=self.before)

    def click(self, found: Bool, rng: random.Random | None) -> None:
        """Take the mask that was drawn, and click at the deepest point of its largest error, if there is one.

        rng: a careless user, who now and then clicks at another error, or beside it, or forgets.
        """
        careless = rng is not None and rng.random() < 0.3
        errors = error_points(found, self.target, _VOXEL, most=3 if careless else 1)
        self.before = found.astype(np.float32) if found.any() else None
        self.forget = rng is not None and bool(errors) and bool(found.any()) and rng.random() < FORGET
        if not errors:
            return
        zyx, positive = rng.choice(errors) if rng is not None and careless else errors[0]
        at = np.array(zyx, dtype=float)
        if rng is not None and rng.random() < 0.3:
            moved = np.clip(np.round(at + np.array([rng.gauss(0, 0.8) for _ in range(3)])), 0, np.array(found.shape) - 1)
            at = moved if self.target[tuple(moved.astype(int))] == positive else at
        z, y, x = (float(v) for v in self.source.to_voxel(self.crop.to_world(at)))
        self.points.append(Point((z, y, x), positive))


def new_user(target: Bool, rng: random.Random, kind: str | None = None) -> User:
    """A user with a first prompt; kind: of FIRST, drawn without one."""
    z, y, x = target.shape
    crop = Grid((z, y, x), np.eye(4))
    kind = kind or rng.choices(list(FIRST), list(FIRST.values()))[0]
    user = User(target, crop, crop)
    if kind == "box2d":
        axis = rng.choices((0, 1, 2), (0.6, 0.2, 0.2))[0]
        thick = 1 if rng.random() < 0.6 else rng.randint(2, 4)
        user.source, user.boxes = _slice_box(target, axis, thick, rng)
    elif kind == "box3d":
        user.boxes = (_deep_box(target, rng),)
    elif kind == "point":
        spots = np.argwhere(target)
        user.points.append(_positive(deepest(target, _VOXEL) if rng.random() < 0.5 else spots[rng.randrange(len(spots))]))
    elif kind == "slice":
        axis = rng.randrange(3)
        area = target.sum(axis=tuple(i for i in range(3) if i != axis))
        k = int(rng.choice(list(np.flatnonzero(area >= 0.5 * area.max()))))
        plane = np.moveaxis(target, axis, 0)[k]
        user.before = np.zeros(target.shape, np.float32)
        np.moveaxis(user.before, axis, 0)[k] = plane
        (top, left), (bottom, right) = bounds(plane)
        user.boxes = (Box2D(axis, k, (float(top), float(left)), (float(bottom), float(right))),)
    else:
        _ask_with_damaged(user, rng)
    return user


def _positive(zyx: Sequence[float] | NDArray[np.int_]) -> Point:
    z, y, x = (float(v) for v in zyx)
    return Point((z, y, x))


def _ask_with_damaged(user: User, rng: random.Random) -> None:
    """A mask with faults, mostly with a click at one of them; where nothing is left of it, a click on the target."""
    damaged = damage(user.target, rng)
    user.click(damaged, rng if rng.random() < 0.8 else None)
    if not damaged.any() and not any(p.positive for p in user.points):
        user.points = [_positive(deepest(user.target, _VOXEL))]
    if rng.random() < 0.3 and user.before is not None:
        user.points = []


def _deep_box(target: Bool, rng: random.Random) -> Box3D:
    """The target's box with 4 % jitter, at least a voxel thick."""
    edges = list(zip(*bounds(target), strict=True))
    noise = [[rng.gauss(0, 0.04 * (b - a)) for _ in (0, 1)] for a, b in edges]
    low, high = zip(*[(a + n[0], max(a + n[0] + 1, b + n[1])) for (a, b), n in zip(edges, noise, strict=True)], strict=True)
    return Box3D(low, high)


def _slice_box(target: Bool, axis: int, thick: int, rng: random.Random) -> tuple[Grid, tuple[Box2D, ...]]:
    """A grid whose slices are `thick` voxels, and on one of them a box with 4 % jitter; one in six is moved or of a wrong size."""
    area = target.sum(axis=tuple(i for i in range(3) if i != axis))
    k = int(area.argmax()) if rng.random() < 0.6 else int(rng.choice(list(np.flatnonzero(area >= 0.4 * area.max()))))
    slab = k // thick
    k = min(len(area) - 1, slab * thick + thick // 2)
    plane = np.moveaxis(target, axis, 0)[k]
    if not plane.any():
        k = int(area.argmax())
        slab, thick, plane = k, 1, np.moveaxis(target, axis, 0)[k]
    affine = np.eye(4)
    affine[2 - axis, 2 - axis], affine[2 - axis, 3] = thick, (thick - 1) / 2
    shape = list(target.shape)
    shape[axis] = max(1, shape[axis] // thick)
    bad = rng.random()
    spans = []
    for first, last in zip(*bounds(plane), strict=True):
        low, high = float(first), float(last)
        size = high - low
        if bad < 0.08:
            move = rng.uniform(0.2, 0.5) * rng.choice((-1, 1)) * size
            low, high = low + move, high + move
        elif bad < 0.16:
            grow = size * ((0.55 if bad < 0.12 else 1.8) - 1) / 2
            low, high = low - grow, high + grow
        low = low + rng.gauss(0, 0.04 * size)
        spans.append((low, max(low + 1, high + rng.gauss(0, 0.04 * size))))
    box = Box2D(axis, slab, (spans[0][0], spans[1][0]), (spans[0][1], spans[1][1]))
    return Grid((shape[0], shape[1], shape[2]), affine), (box,)


def damage(target: Bool, rng: random.Random) -> Bool:
    """A mask with one to three faults: too large, too small, moved, half missing, something added. It may be empty."""
    out = target.copy()
    spots = np.argwhere(target)
    for _ in range(rng.randint(1, 3)):
        fault = rng.randrange(5)
        spot = spots[rng.randrange(len(spots))]
        if fault == 0:
            out = ndimage.binary_dilation(out, iterations=rng.randint(1, 3))
        elif fault == 1:
            out = ndimage.binary_erosion(out, iterations=rng.randint(1, 2))
        elif fault == 2:
            out = ndimage.shift(out.astype(np.uint8), [rng.randint(-4, 4) for _ in range(3)], order=0) > 0
        elif fault == 3:
            normal = np.array([rng.gauss(0, 1) for _ in range(3)])
            out = out & (_combined([(g - c) * n for g, c, n in zip(_axes(out), spot, normal, strict=True)], out) < 0)
        else:
            radius = [rng.uniform(2, 7) for _ in range(3)]
            centre = spot + np.array([rng.gauss(0, 4) for _ in range(3)])
            out = out | (_combined([((g - c) / r) ** 2 for g, c, r in zip(_axes(out), centre, radius, strict=True)], out) < 1)
    return out


def _axes(mask: Bool) -> list[NDArray[np.int_]]:
    """The index along each axis, ready to be broadcast."""
    return list(np.ogrid[tuple(map(slice, mask.shape))])


def _combined(terms: Sequence[NDArray[np.float64]], mask: Bool) -> NDArray[np.float64]:
    """The sum of one term per axis, on all of the mask's voxels."""
    return np.broadcast_to(sum(terms[1:], terms[0]), mask.shape)


# -------------------------------------------------------------------------------------------------------------- a batch of them


def channels_of(users: Sequence[User]) -> Tensor:
    """(B, 4, Z, Y, X), in the memory layout of the fast convolution."""
    return torch.stack([user.channels() for user in users]).contiguous(memory_format=torch.channels_last_3d)


def truth_of(users: Sequence[User]) -> Tensor:
    """(B, Z, Y, X) float32."""
    return torch.stack([torch.from_numpy(user.target.astype(np.float32)) for user in users])
