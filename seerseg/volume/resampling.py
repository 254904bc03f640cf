"""Resampling by world position, slab by slab: memory beside input and output stays at a few planes or 4 million voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.volume.grid import Float, Grid

SLAB_VOXELS = 1 << 22
ALIGNED_TOLERANCE_VOXELS = 1e-3
TIE = 1e-6  # voxel i owns [i - 1/2, i + 1/2): a position within this of a lower edge is on it, whatever float noise says


def resample(array: NDArray[Any], grid: Grid, to: Grid, *, order: int, fill: float = 0, slab: bool = True) -> NDArray[Any]:
    """The array (Z, Y, X) on `grid`, read at the voxel centres of `to`; ValueError when its shape is not the grid's.

    order 0: the nearest voxel (voxel i owns [i - 1/2, i + 1/2)), type kept. order 1: linear, float32, constant from the
    outermost centres to the edge of the field of view; not smoothed, so a much coarser `to` samples, it does not average.
    Outside the field of view: `fill`. slab=False treats an oblique target at once instead of slab by slab.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (nearest) or 1 (linear), not {order}")
    if array.shape != grid.shape_zyx:
        raise ValueError(f"the array has shape {array.shape}, its grid {grid.shape_zyx}")
    matrix = (grid.inverse @ to.affine)[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
    source = array.view(np.uint8) if array.dtype == np.bool_ else array
    dtype = np.dtype(np.float32) if order else source.dtype
    axes = _aligned(matrix, to.shape_zyx)
    if axes is None:
        out = _oblique(source, matrix, to.shape_zyx, dtype, order, fill, slab)
    else:
        moved = source.transpose(np.argsort(axes))
        lines = [_line(matrix[a, k], matrix[a, 3], source.shape[a], to.shape_zyx[k], order) for k, a in enumerate(np.argsort(axes))]
        out = np.empty(to.shape_zyx, dtype) if all(line.covers for line in lines) else np.full(to.shape_zyx, fill, dtype)
        inner = out[tuple(slice(line.start, line.stop) for line in lines)]
        if inner.size:
            (_linear if order else _nearest)(moved, lines, inner)
    return out.view(np.bool_) if array.dtype == np.bool_ and order == 0 else out


@dataclass(frozen=True, eq=False)
class _Line:
    """One axis: target voxels start..stop lie in the source; each reads source voxel `low`, and `high` with weight `weight`."""

    start: int
    stop: int
    covers: bool
    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: NDArray[np.float32]


def _aligned(matrix: Float, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """For each source axis the one target axis that it runs along, None when the grids are oblique to each other."""
    reach = np.abs(matrix[:3, :3]) * (np.array(shape) - 1)
    axes = np.abs(matrix[:3, :3]).argmax(axis=1)
    if sorted(axes) != [0, 1, 2]:
        return None
    reach[np.arange(3), axes] = 0
    return (int(axes[0]), int(axes[1]), int(axes[2])) if reach.sum(axis=1).max() <= ALIGNED_TOLERANCE_VOXELS else None


def _line(scale: float, offset: float, source: int, target: int, order: int) -> _Line:
    where = offset + scale * np.arange(target)
    nearest = np.floor(where + (0.5 + TIE)).astype(np.intp)
    inside = np.flatnonzero((nearest >= 0) & (nearest < source))
    start, stop = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
    if not order:
        return _Line(start, stop, stop - start == target, nearest[start:stop], nearest[start:stop], np.zeros(0, np.float32))
    held = np.clip(where[start:stop], 0, source - 1)
    low = np.minimum(np.floor(held).astype(np.intp), max(0, source - 2))
    return _Line(start, stop, stop - start == target, low, np.minimum(low + 1, source - 1), (held - low).astype(np.float32))


def _nearest(source: NDArray[Any], lines: list[_Line], out: NDArray[Any]) -> None:
    z, y, x = (line.low for line in lines)
    for k in range(out.shape[0]):
        if k and z[k] == z[k - 1]:
            out[k] = out[k - 1]
        else:
            out[k] = source[z[k]].take(y, axis=0).take(x, axis=1)


def _linear(source: NDArray[Any], lines: list[_Line], out: NDArray[Any]) -> None:
    z, y, x = lines
    planes: dict[int, NDArray[np.float32]] = {}
    for k in range(out.shape[0]):
        low, high, weight = int(z.low[k]), int(z.high[k]), z.weight[k]
        planes = {i: planes[i] if i in planes else _plane(source[i], y, x) for i in {low, high}}
        np.subtract(planes[high], planes[low], out=out[k])
        out[k] *= weight
        out[k] += planes[low]


def _plane(plane: NDArray[Any], y: _Line, x: _Line) -> NDArray[np.float32]:
    """A source plane (Y, X) at the target's y and x."""
    values = plane.astype(np.float32, order="C", copy=False)
    for line, axis, weight in ((y, 0, y.weight[:, None]), (x, 1, x.weight)):
        low, high = values.take(line.low, axis=axis), values.take(line.high, axis=axis)
        high -= low
        high *= weight
        high += low
        values = high
    return values


def _oblique(
    source: NDArray[Any], matrix: Float, shape: tuple[int, int, int], dtype: np.dtype[Any], order: int, fill: float, slab: bool
) -> NDArray[Any]:
    from scipy.ndimage import affine_transform

    out = np.empty(shape, dtype=dtype)
    linear = matrix[:3, :3]
    step = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2])) if slab else shape[0]
    for start in range(0, shape[0], step):
        part = out[start : start + step]
        offset = matrix[:3, 3] + linear[:, 0] * start
        read_at = offset if order else offset + TIE
        affine_transform(source, linear, read_at, output_shape=part.shape, output=part, order=order, mode="nearest", prefilter=False)
        outside = _outside(linear, offset + TIE, part.shape, source.shape)
        if outside is not None:
            part[outside] = fill
    return out


def _outside(linear: Float, offset: Float, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Which voxels of a target slab lie outside the source's field of view; None when none does."""
    outside: NDArray[np.bool_] | None = None
    for axis in range(3):
        z, y, x = (linear[axis, k] * np.arange(shape[k], dtype=np.float64) for k in range(3))
        low, high = (offset[axis] + f(z) + f(y) + f(x) for f in (np.min, np.max))
        last = source_shape[axis] - 0.5
        if low < -0.5 or high >= last:
            where = z[:, None, None] + y[None, :, None] + (x + offset[axis])
            bad = (where < -0.5) | (where >= last)
            outside = bad if outside is None else np.logical_or(outside, bad, out=outside)
    return outside
