"""Logits bent as little as clicks demand: where a click contradicts them, a smooth field is added about it. Boxes speak as clicks at
their edges, where the logits contradict them.

A logit grows with the distance from the boundary, so a field that is wider than the click's own error moves the boundary about it as a
whole, instead of cutting a hole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seerseg.prompts import Box2D, Box3D, Point
from seerseg.volume import Grid

Float32 = NDArray[np.float32]

WIDTH_MM = 4.0
"""Standard deviation of the field of one click (chosen on validation cases)."""
MARGIN = 1.0
"""A click's voxel has at least this logit in its direction."""
MOST = 30.0
"""Logits are not moved farther: two clicks side by side that contradict each other would ask for any amount."""
SWEEPS = 200
EDGE_VOXELS, EDGE_SHARE = 0.5, 0.025
"""How far, in voxels of the logits and as share of the box's side, an edge may be off: the larger counts."""


def obeying(logits: Float32, grid: Grid, source: Grid, points: tuple[Point, ...]) -> Float32:
    """logits (Z, Y, X) on `grid`, and the least field (in the norm of its Gaussian kernel) that gives the voxel of every click its side
    by MARGIN; the same array when all clicks are obeyed. points: in voxel coordinates of `source`; those that fall outside `grid` and
    those whose voxel an earlier one has count as obeyed.

    With K the kernel between clicks and s their signs, the weights s a, a >= 0, solve the dual of that quadratic problem by coordinate
    ascent (as for a support vector machine).
    """
    at: dict[tuple[int, ...], float] = {}
    for point in reversed(points):  # the newest click on a voxel counts
        voxel = tuple(int(v) for v in np.floor(grid.to_voxel(source.to_world(np.array(point.zyx, dtype=np.float64))) + 0.5))
        if all(0 <= v < n for v, n in zip(voxel, logits.shape, strict=True)):
            at.setdefault(voxel, 1.0 if point.positive else -1.0)
    if not at:
        return logits
    voxels, signs = np.array(list(at)), np.array(list(at.values()))
    short = MARGIN - signs * logits[tuple(voxels.T)]
    if (short <= 0).all():
        return logits
    width = WIDTH_MM / np.array(grid.spacing_zyx)
    apart = (voxels[:, None] - voxels[None]) / width
    kernel = signs[:, None] * signs * np.exp(-(apart**2).sum(-1) / 2)
    weights = np.zeros(len(signs))
    for _ in range(SWEEPS):
        for i in range(len(weights)):
            weights[i] = max(0.0, weights[i] + short[i] - float(kernel[i] @ weights))
    field = np.zeros(logits.shape, dtype=np.float32)
    for voxel, weight in zip(voxels, signs * weights, strict=True):
        lines = [np.exp(-(((np.arange(n) - v) / w) ** 2) / 2) for n, v, w in zip(logits.shape, voxel, width, strict=True)]
        field += (weight * lines[0][:, None, None] * lines[1][:, None] * lines[2]).astype(np.float32)
    return logits + field.clip(-MOST, MOST)


def implied(logits: Float32, grid: Grid, source: Grid, boxes: tuple[Box2D | Box3D, ...]) -> tuple[Point, ...]:
    """Clicks, in voxel coordinates of `source`, for what the logits (Z, Y, X) on `grid` say against the boxes, on its slice for a box on a
    slice; () where they agree.

    Where the target is drawn beyond an edge: two negative clicks, at the highest logit there and at the highest just beyond the edge.
    Where nothing that is drawn comes near an edge, which the target touches somewhere: a positive click just inside, at the highest logit.
    """
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape_zyx), indexing="ij"), -1).reshape(-1, 3)
    where = source.to_voxel(grid.to_world(index))
    steps, values = grid.spacing_zyx[0] / np.array(source.spacing_zyx), logits.ravel()
    clicks: list[Point] = []

    def click(among: NDArray[np.bool_], positive: bool) -> None:
        z, y, x = (float(v) for v in where[int(np.where(among, values, -np.inf).argmax())])
        clicks.append(Point((z, y, x), positive))

    for box in boxes:
        flat = box.axis if isinstance(box, Box2D) else None
        seen = np.ones(len(where), bool) if flat is None else np.abs(where[:, flat] - box.index) <= max(0.5, 0.5 * steps[flat]) + 1e-3  # type: ignore[union-attr]
        spans = list(zip((a for a in range(3) if a != flat), box.lo, box.hi, strict=True))
        for axis, low, high in spans:
            room = max(EDGE_VOXELS * steps[axis], EDGE_SHARE * (high - low))
            beside = seen.copy()
            for other, lo, hi in spans:
                if other != axis:
                    beside &= (where[:, other] >= lo - 0.5) & (where[:, other] <= hi - 0.5)
            for out in (low - 0.5 - where[:, axis], where[:, axis] - (high - 0.5)):
                beyond = seen & (out > room) & (values > 0)
                for among in (beyond, beyond & (out <= room + steps[axis])):
                    if among.any():
                        click(among, False)
                near = beside & (out > -room - steps[axis])
                inside = near & (out <= -room)
                if inside.any() and not (near & (values > 0)).any():
                    click(inside, True)
    return tuple(clicks)
