"""How two masks on one grid agree: overlap, volume, and distances between their surfaces in mm.

Surface: the voxels of a mask that have a voxel outside the mask among their six face neighbours; outside the array is
outside the mask. Each surface voxel stands for the world position of its centre and counts once (MONAI's definition
without sub-voxels, not the area-weighted one of Nikolov et al.). Positions, not array steps, are compared, so oblique
and sheared grids are right. Distances are exact, found with a k-d tree on surface voxels: no distance map is made, and
what is held is three bytes per voxel of the box around both masks plus about a hundred per surface voxel.

Masks are bool arrays (Z, Y, X); both lie on the grid given. An image of one voxel's thickness has no metrics in mm or mL:
they are None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError
from seerseg.volume import Grid

Bool = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

DEFAULT_TOLERANCE_MM = 1.0
SURFACE_RULE = (
    "surface voxels by six face neighbours at their world positions, each counted once; NSD: share of both surfaces within the "
    "tolerance of the other; HD95: the larger of the two directed 95th percentiles; ASSD: mean over both surfaces"
)
# Distances are sums of products of floats: 3 voxels of 0.7 mm come out as 2.0999999999999996 or 2.1000000000000005 mm.
ROUNDING_MM = 1e-6


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """For each surface voxel of one mask the distance in mm to the nearest surface voxel of the other, in no order."""

    prediction_mm: NDArray[np.float64]
    reference_mm: NDArray[np.float64]

    def nsd(self, tolerance_mm: float) -> float:
        """Share, 0..1, of the surface voxels of both masks that lie within the tolerance of the other surface."""
        limit = tolerance_mm + ROUNDING_MM
        near = np.count_nonzero(self.prediction_mm <= limit) + np.count_nonzero(self.reference_mm <= limit)
        return float(near / (self.prediction_mm.size + self.reference_mm.size))

    def hausdorff_mm(self, percentile: float = 95.0) -> float:
        """The larger of the two directed percentiles (linear interpolation between ranks), as in MONAI."""
        return float(max(np.percentile(self.prediction_mm, percentile), np.percentile(self.reference_mm, percentile)))

    @property
    def mean_mm(self) -> float:
        """Average symmetric surface distance: the mean over the surface voxels of both."""
        return float((self.prediction_mm.sum() + self.reference_mm.sum()) / (self.prediction_mm.size + self.reference_mm.size))


@dataclass(frozen=True)
class MaskScores:
    """One prediction against one reference.

    dice, iou, nsd: 0..1, None when both are empty (nothing to agree on). hd95_mm, assd_mm, nsd: None too on a flat image.
    An empty prediction of a present target has dice = iou = nsd = 0 and hd95_mm = assd_mm = the image's diagonal; so has, for
    nsd and the distances, any prediction for an empty reference. tp, fp, fn: voxels. *_ml: None on a flat image.
    """

    dice: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    assd_mm: float | None
    tp: int
    fp: int
    fn: int
    reference_ml: float | None
    prediction_ml: float | None
    tolerance_mm: float

    @property
    def present(self) -> bool:
        """The reference holds at least one voxel."""
        return self.tp + self.fn > 0

    @property
    def predicted(self) -> bool:
        """The prediction holds at least one voxel."""
        return self.tp + self.fp > 0

    @property
    def failed(self) -> bool:
        """The target is there and nothing at all was drawn."""
        return self.present and not self.predicted

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def is_flat(grid: Grid) -> bool:
    """The grid is one voxel thick, so distances and volumes mean nothing."""
    return min(grid.shape_zyx) <= 1


def dice(prediction: Bool, reference: Bool) -> float | None:
    """2 |P and R| / (|P| + |R|); None when both are empty."""
    tp, fp, fn = _counts(prediction, reference)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


def iou(prediction: Bool, reference: Bool) -> float | None:
    """|P and R| / |P or R|; None when both are empty."""
    tp, fp, fn = _counts(prediction, reference)
    return tp / (tp + fp + fn) if tp + fp + fn else None


def nsd(prediction: Bool, reference: Bool, grid: Grid, tolerance_mm: float = DEFAULT_TOLERANCE_MM) -> float | None:
    """Normalised surface Dice by SURFACE_RULE; 0 when exactly one is empty, None when both are or the grid is flat."""
    return score_masks(prediction, reference, grid, tolerance_mm=tolerance_mm).nsd


def hd95(prediction: Bool, reference: Bool, grid: Grid) -> float | None:
    """95th percentile Hausdorff distance in mm by SURFACE_RULE; the diagonal when exactly one is empty, else as `nsd`."""
    return score_masks(prediction, reference, grid).hd95_mm


def assd(prediction: Bool, reference: Bool, grid: Grid) -> float | None:
    """Average symmetric surface distance in mm by SURFACE_RULE; the diagonal when exactly one is empty, else as `nsd`."""
    return score_masks(prediction, reference, grid).assd_mm


def volume_ml(mask: Bool, grid: Grid) -> float | None:
    """|det| of the affine times the voxels, in mL; None on a flat image."""
    return None if is_flat(grid) else int(np.count_nonzero(mask)) * grid.voxel_volume_mm3 / 1000.0


def score_masks(
    prediction: Bool,
    reference: Bool,
    grid: Grid,
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    box: Box | None = None,
) -> MaskScores:
    """All scores of one prediction at once.

    grid: of the whole image. box: the arrays are this part of it (half-open slices) and both masks lie wholly in it; None:
    they are whole. Raises GeometryError for a wrong shape, ValueError for a tolerance that is negative or no number.
    """
    if not tolerance_mm >= 0:
        raise ValueError(f"The tolerance must be a number of millimetres from 0 up, not {tolerance_mm!r}.")
    _check(prediction, reference, grid, box)
    inner = largest_extent(prediction, reference) if box is None else (slice(None), slice(None), slice(None))
    p, r = (prediction[inner], reference[inner]) if inner is not None else (prediction[:0], reference[:0])
    tp, fp, fn = _counts(p, r)
    flat = is_flat(grid)
    ml = grid.voxel_volume_mm3 / 1000.0
    surface: float | None = None
    hd95_mm = assd_mm = None
    if not flat and tp + fp and tp + fn:
        distances = surface_distances(p, r, grid)
        surface, hd95_mm, assd_mm = distances.nsd(tolerance_mm), distances.hausdorff_mm(), distances.mean_mm
    elif not flat and tp + fp + fn:
        surface, hd95_mm, assd_mm = 0.0, grid.diagonal_mm, grid.diagonal_mm
    return MaskScores(
        dice=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
        iou=tp / (tp + fp + fn) if tp + fp + fn else None,
        nsd=surface,
        hd95_mm=hd95_mm,
        assd_mm=assd_mm,
        tp=tp,
        fp=fp,
        fn=fn,
        reference_ml=None if flat else (tp + fn) * ml,
        prediction_ml=None if flat else (tp + fp) * ml,
        tolerance_mm=float(tolerance_mm),
    )


def surface_distances(prediction: Bool, reference: Bool, grid: Grid) -> SurfaceDistances:
    """Distances between the surfaces of two masks that are not empty.

    The arrays may be any equal crop of the grid that holds both masks wholly: only the grid's directions are used, and
    what lies outside the crop is outside the masks. Raises ValueError when one of them is empty.
    """
    p, r = surface_voxels(prediction), surface_voxels(reference)
    both = p & r
    shared = int(np.count_nonzero(both))
    p_points, r_points = _positions(p, grid), _positions(r, grid)
    if not len(p_points) or not len(r_points):
        raise ValueError("There are no distances to or from an empty mask.")
    # Voxels on both surfaces are at distance 0: only the others are looked up, and few are when masks are alike.
    p ^= both
    r ^= both
    p_only, r_only = _positions(p, grid), _positions(r, grid)
    return SurfaceDistances(
        prediction_mm=np.concatenate([np.zeros(shared), _nearest_mm(p_only, r_points)]),
        reference_mm=np.concatenate([np.zeros(shared), _nearest_mm(r_only, p_points)]),
    )


def surface_voxels(mask: Bool) -> Bool:
    """A new array with the surface voxels of a mask (module docstring)."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        after, before = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        after[1:] &= before[:-1]
        after[:-1] &= before[1:]
        after[:1] = False
        after[-1:] = False
    inner ^= mask
    return inner


def largest_extent(*masks: Bool) -> Box | None:
    """The smallest box that holds all voxels of all masks (equal shapes), None when all are empty."""
    lo: list[int] = []
    hi: list[int] = []
    ndim = masks[0].ndim
    views = masks
    for axis in range(ndim):
        line = np.zeros(views[0].shape[axis], dtype=bool)
        for mask in views:
            line |= mask.any(axis=tuple(a for a in range(ndim) if a != axis))
        found = np.flatnonzero(line)
        if not found.size:
            return None
        lo.append(int(found[0]))
        hi.append(int(found[-1]) + 1)
        # Later axes need not look outside what the first ones found.
        cut = tuple(slice(lo[axis], hi[axis]) if a == axis else slice(None) for a in range(ndim))
        views = tuple(mask[cut] for mask in views)
    return (slice(lo[0], hi[0]), slice(lo[1], hi[1]), slice(lo[2], hi[2]))


def _check(prediction: Bool, reference: Bool, grid: Grid, box: Box | None) -> None:
    shape = grid.shape_zyx if box is None else tuple(len(range(*s.indices(n))) for s, n in zip(box, grid.shape_zyx, strict=True))
    for role, mask in (("prediction", prediction), ("reference", reference)):
        if tuple(mask.shape) != shape:
            raise GeometryError(f"The {role} has shape {tuple(mask.shape)} but its grid has {shape}. Put both on one grid first.")


def _counts(prediction: Bool, reference: Bool) -> tuple[int, int, int]:
    tp = int(np.count_nonzero(prediction & reference))
    return tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp


def _positions(surface: Bool, grid: Grid) -> NDArray[np.float64]:
    """Positions (n, 3) in mm relative to the world position of voxel (0, 0, 0) of the array."""
    zyx = np.nonzero(surface)
    if np.count_nonzero(grid.affine[:3, :3]) == 3:
        # Axes along the world's: exact multiples of the spacing, in any order of the columns.
        spacing = grid.spacing_zyx
        return np.stack([index * step for index, step in zip(zyx, spacing, strict=True)], axis=1)
    return np.stack(zyx[::-1], axis=1).astype(np.float64) @ grid.affine[:3, :3].T


def _nearest_mm(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.spatial import cKDTree

    if not len(points):
        return np.zeros(0)
    # Sliding-midpoint trees: built four times faster than balanced ones and queried as fast, points being near a lattice.
    tree = cKDTree(others, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points)[0], dtype=np.float64)
