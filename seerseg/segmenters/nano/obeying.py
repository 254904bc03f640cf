"""Logits bent as little as clicks demand: where a click contradicts them, a smooth field is added about it.

A logit grows with the distance from the boundary, so a field that is wider than the click's own error moves the boundary about it as a
whole, instead of cutting a hole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seerseg.prompts import Point
from seerseg.volume import Grid

Float32 = NDArray[np.float32]

WIDTH_MM = 4.0
"""Standard deviation of the field of one click (chosen on validation cases)."""
MARGIN = 1.0
"""A click's voxel has at least this logit in its direction."""
MOST = 30.0
"""Logits are not moved farther: two clicks side by side that contradict each other would ask for any amount."""
SWEEPS = 200


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
