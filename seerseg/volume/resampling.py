"""Resampling by world position, slab by slab."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.volume.grid import Float, Grid

SLAB_VOXELS = 1 << 22


def resample(
    array: NDArray[Any], grid: Grid, to: Grid, *, order: int, fill: float = 0, slab: bool = True
) -> NDArray[Any]:
    """The array (Z, Y, X) on `grid`, read at the voxel centres of `to`.

    order 0: nearest voxel (voxel i owns [i - 1/2, i + 1/2)), same type; order 1: linear, float32, constant beyond the
    outermost centres up to the edge of the field of view. Outside the field of view: `fill`. slab=False does the whole
    volume at once.
    """
    from scipy.ndimage import affine_transform

    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, not {order}")
    flip = np.eye(4)[[2, 1, 0, 3]]
    matrix = flip @ grid.inverse @ to.affine @ flip
    source = array.view(np.uint8) if array.dtype == np.bool_ else array
    out = np.empty(to.shape_zyx, dtype=np.float32 if order else source.dtype)
    step = max(1, SLAB_VOXELS // max(1, to.shape_zyx[1] * to.shape_zyx[2])) if slab else to.shape_zyx[0]
    for start in range(0, to.shape_zyx[0], step):
        part = out[start : start + step]
        offset = matrix[:3, 3] + matrix[:3, 0] * start
        affine_transform(source, matrix[:3, :3], offset, output_shape=part.shape, output=part, order=order, mode="nearest", prefilter=False)
        outside = _outside(matrix[:3, :3], offset, part.shape, array.shape)
        if outside is not None:
            part[outside] = fill
    return out.view(np.bool_) if array.dtype == np.bool_ and order == 0 else out


def _outside(linear: Float, offset: Float, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Which voxels of a target slab lie outside the source's field of view; None when none does."""
    outside: NDArray[np.bool_] | None = None
    index = [np.arange(n, dtype=np.float64) for n in shape]
    for axis in range(3):
        parts = [linear[axis, k] * index[k] for k in range(3)]
        low = offset[axis] + sum(float(p.min()) for p in parts)
        high = offset[axis] + sum(float(p.max()) for p in parts)
        if low >= -0.5 and high < source_shape[axis] - 0.5:
            continue
        where = parts[0][:, None, None] + parts[1][None, :, None] + (parts[2] + offset[axis])[None, None, :]
        bad = (where < -0.5) | (where >= source_shape[axis] - 0.5)
        outside = bad if outside is None else outside | bad
    return outside
