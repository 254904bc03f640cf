"""Stored axes to canonical axes and back, as views; and when two grids are parts of one lattice.

An orientation is nibabel's (3, 2) array: row i holds, for stored axis i, the canonical axis it becomes and +1 or -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError
from seerseg.volume.grid import Float, Grid, SourceGeometry

LATTICE_TOLERANCE_MM = 1e-2
LATTICE_TOLERANCE_VOXELS = 1e-3


def orientation_of(affine: Float) -> Float:
    """The nearest signed axis permutation from stored axes to R, A, S."""
    from nibabel.orientations import io_orientation

    return np.asarray(io_orientation(affine), dtype=np.float64)


def canonical_grid(shape_xyz: tuple[int, int, int], affine: Float, orientation: Float) -> Grid:
    """The canonical grid of an image stored with this shape (x, y, z) and affine; GeometryError when that is unusable."""
    from nibabel.orientations import inv_ornt_aff

    Grid(shape_xyz[::-1], affine)
    shape = [0, 0, 0]
    for stored, canonical in enumerate(orientation[:, 0].astype(int)):
        shape[canonical] = shape_xyz[stored]
    return Grid((shape[2], shape[1], shape[0]), affine @ inv_ornt_aff(orientation, shape_xyz))


def to_canonical(stored_xyz: NDArray[Any], orientation: Float) -> NDArray[Any]:
    """A stored (x, y, z) array as a canonical (Z, Y, X) view."""
    axes = orientation[:, 0].astype(int)
    flipped = stored_xyz[tuple(slice(None, None, int(sign)) for sign in orientation[:, 1])]
    return flipped.transpose(np.argsort(axes)[::-1])


def to_stored(canonical_zyx: NDArray[Any], orientation: Float) -> NDArray[Any]:
    """The inverse of `to_canonical`, a view too."""
    axes = orientation[:, 0].astype(int)
    stored = canonical_zyx.transpose(2 - axes)
    return stored[tuple(slice(None, None, int(sign)) for sign in orientation[:, 1])]


def source_of(grid: Grid, *, laterality: str = "known") -> SourceGeometry:
    """A source for an array that came from no file: stored as it lies."""
    z, y, x = grid.shape_zyx
    return SourceGeometry(
        shape_xyz=(x, y, z),
        affine=grid.affine,
        orientation=np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]),
        laterality=laterality,
        format="array",
    )


@dataclass(frozen=True)
class LatticeMap:
    """How one grid's voxels fall on another's: target axis of each source axis (xyz), its sign, and the target index of
    source voxel 0, so that target[axes[i]] = offset[axes[i]] + signs[i] * source[i]."""

    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    offset: tuple[int, int, int]

    def corner(self, shape_zyx: tuple[int, int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Lowest target index (z, y, x) and extent of a source array of this shape once it is turned."""
        low, extent = np.array(self.offset), np.zeros(3, dtype=np.intp)
        for source, (target, sign) in enumerate(zip(self.axes, self.signs, strict=True)):
            extent[target] = shape_zyx[2 - source]
            low[target] -= extent[target] - 1 if sign < 0 else 0
        return low[::-1], extent[::-1]

    def covers(self, shape_zyx: tuple[int, int, int], to_shape_zyx: tuple[int, int, int]) -> bool:
        """Whether source and target hold the very same voxels."""
        low, extent = self.corner(shape_zyx)
        return not low.any() and tuple(extent) == tuple(to_shape_zyx)

    def place(self, array_zyx: NDArray[Any], to_shape_zyx: tuple[int, int, int]) -> NDArray[Any]:
        """The array on the target grid: exact, zero where the source does not reach, cut where it reaches beyond; a view
        where both hold the same voxels."""
        moved = to_canonical(array_zyx.T, np.array([self.axes, self.signs], dtype=np.float64).T)
        shape = array_zyx.shape
        low, extent = self.corner((shape[0], shape[1], shape[2]))
        if self.covers((shape[0], shape[1], shape[2]), to_shape_zyx):
            return moved
        out = np.zeros(to_shape_zyx, dtype=array_zyx.dtype)
        start, stop = np.maximum(low, 0), np.minimum(low + extent, to_shape_zyx)
        if (stop > start).all():
            inner = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
            outer = tuple(slice(int(a), int(b)) for a, b in zip(start - low, stop - low, strict=True))
            out[inner] = moved[outer]
        return out


def lattice_map(grid: Grid, to: Grid) -> LatticeMap | None:
    """How `grid` falls on `to` when both are parts of one lattice (equal, permuted, flipped, cropped), else None.

    Every corner of `grid` must lie within 0.01 mm (at most a quarter voxel) or a thousandth of a voxel of its place.
    """
    matrix = to.inverse @ grid.affine
    linear = np.rint(matrix[:3, :3])
    if not (np.abs(linear).sum(axis=0) == 1).all() or not (np.abs(linear).sum(axis=1) == 1).all():
        return None
    offset = np.rint(matrix[:3, 3])
    top = np.array(grid.shape_zyx[::-1]) - 1
    corners = np.array([[a, b, c] for a in (0, top[0]) for b in (0, top[1]) for c in (0, top[2])], dtype=np.float64)
    off = np.abs(corners @ (matrix[:3, :3] - linear).T + (matrix[:3, 3] - offset)).max()
    if off > max(LATTICE_TOLERANCE_VOXELS, min(0.25, LATTICE_TOLERANCE_MM / min(to.spacing_zyx))):
        return None
    axes = np.abs(linear).argmax(axis=0)
    signs = [int(linear[axes[i], i]) for i in range(3)]
    return LatticeMap(
        (int(axes[0]), int(axes[1]), int(axes[2])), (signs[0], signs[1], signs[2]), (int(offset[0]), int(offset[1]), int(offset[2]))
    )


def check_overlap(grid: Grid, to: Grid, what: str) -> None:
    """GeometryError naming `what` when the two fields of view have no point in common (tested along the axes of both)."""
    for one, other in ((grid, to), (to, grid)):
        top = np.array(other.shape_zyx) - 0.5
        outer = np.array([[a, b, c] for a in (-0.5, top[0]) for b in (-0.5, top[1]) for c in (-0.5, top[2])])
        there = one.to_voxel(other.to_world(outer))
        touch = LATTICE_TOLERANCE_VOXELS - 0.5
        if (there.max(axis=0) <= touch).any() or (there.min(axis=0) >= np.array(one.shape_zyx) - 1 - touch).any():
            gap = np.linalg.norm(grid.corners_mm.mean(axis=0) - to.corners_mm.mean(axis=0))
            raise GeometryError(
                f"{what} lies outside the field of view of its image (their centres are {gap:.0f} mm apart). "
                "Give the files that belong together, or mend the affine of one."
            )
