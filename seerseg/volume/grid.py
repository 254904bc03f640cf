"""Grids, volumes and masks: arrays that know where in the patient they lie.

Arrays are (Z, Y, X), C order. World coordinates are NIfTI's RAS millimetres: +x is the patient's right, +y anterior,
+z superior. A side is always decided by world x, never by array order. Voxel i of an axis spans [i - 1/2, i + 1/2) in
voxel coordinates. A canonical grid is one whose axes are, up to the nearest signed permutation, R, A and S; it may still
be oblique or sheared, as canonical form never resamples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError

Float = NDArray[np.float64]
ANISOTROPY_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Grid:
    """Where voxels lie: shape (Z, Y, X) and the affine (4, 4) that maps voxel (x, y, z, 1) to mm RAS.

    Raises GeometryError for an affine that is not finite or has no volume.
    """

    shape_zyx: tuple[int, int, int]
    affine: Float

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"The affine must be a finite 4x4 matrix, not {affine.tolist()}.")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3])) < ANISOTROPY_TOLERANCE * lengths.prod():
            raise GeometryError(f"The affine is singular: its voxels have no volume ({affine[:3, :3].tolist()}).")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape_zyx", tuple(int(n) for n in self.shape_zyx))

    @property
    def spacing_zyx(self) -> tuple[float, float, float]:
        """Voxel edge lengths in mm, in array order."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_volume_mm3(self) -> float:
        """|det| of the affine, right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def size(self) -> int:
        """Number of voxels."""
        z, y, x = self.shape_zyx
        return z * y * x

    @cached_property
    def inverse(self) -> Float:
        """The (4, 4) matrix from mm RAS to voxel (x, y, z)."""
        return np.asarray(np.linalg.inv(self.affine))

    def to_world(self, zyx: Any) -> Float:
        """Voxel coordinates (..., 3) in (z, y, x) order -> mm RAS (..., 3) in (x, y, z) order."""
        xyz = np.asarray(zyx, dtype=np.float64)[..., ::-1]
        return np.asarray(xyz @ self.affine[:3, :3].T + self.affine[:3, 3])

    def to_voxel(self, world_xyz: Any) -> Float:
        """mm RAS (..., 3) in (x, y, z) order -> voxel coordinates (..., 3) in (z, y, x) order."""
        xyz = np.asarray(world_xyz, dtype=np.float64) @ self.inverse[:3, :3].T + self.inverse[:3, 3]
        return np.asarray(xyz[..., ::-1])

    @property
    def corners_mm(self) -> Float:
        """World positions (8, 3) of the centres of the corner voxels."""
        top = np.array(self.shape_zyx) - 1
        return self.to_world(np.array([[a, b, c] for a in (0, top[0]) for b in (0, top[1]) for c in (0, top[2])]))

    @property
    def diagonal_mm(self) -> float:
        """The longest distance between outer corners of the field of view, in mm."""
        top = np.array(self.shape_zyx) - 0.5
        outer = self.to_world(np.array([[a, b, c] for a in (-0.5, top[0]) for b in (-0.5, top[1]) for c in (-0.5, top[2])]))
        return float(max(np.linalg.norm(outer - corner, axis=1).max() for corner in outer))

    def corner_distance_mm(self, other: Grid) -> float:
        """Largest distance in mm between equal corners of two grids; infinite when the shapes differ."""
        if self.shape_zyx != other.shape_zyx:
            return float("inf")
        return float(np.linalg.norm(self.corners_mm - other.corners_mm, axis=1).max())

    def close_to(self, other: Grid, tolerance_mm: float = 1e-2) -> bool:
        """Same shape, and every corner within `tolerance_mm` of its twin."""
        return self.corner_distance_mm(other) <= tolerance_mm

    def crop(self, lo_zyx: tuple[int, int, int], hi_zyx: tuple[int, int, int]) -> Grid:
        """The grid of array[lo:hi] (half-open voxel indices)."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(np.array(lo_zyx, dtype=np.float64))
        return Grid(tuple(h - l for l, h in zip(lo_zyx, hi_zyx, strict=True)), affine)  # type: ignore[arg-type]  # noqa: E741

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: shape (z, y, x) and affine rows."""
        return {"shape_zyx": list(self.shape_zyx), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Grid:
        """The inverse of `to_json`."""
        return cls(tuple(value["shape_zyx"]), np.array(value["affine"], dtype=np.float64))


@dataclass(frozen=True, eq=False)
class SourceGeometry:
    """How an image lay in its file, so that a mask can be written back exactly so.

    shape_xyz: stored spatial shape (after singleton dimensions were squeezed); affine: stored voxel -> mm RAS;
    orientation: (3, 2) nibabel orientation, stored axes -> canonical; header: the NIfTI header's bytes, or None for other
    formats; laterality: "known", or "assumed" where the file did not say; format: "nifti", "nrrd", "mha", "dicom",
    "png" or "array"; ndim: number of dimensions stored in the file (2, 3 or 4); notes: what was decided while reading.
    """

    shape_xyz: tuple[int, int, int]
    affine: Float
    orientation: NDArray[np.float64]
    header: bytes | None = None
    laterality: str = "known"
    format: str = "nifti"
    ndim: int = 3
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the header's bytes as hex."""
        return {
            "shape_xyz": list(self.shape_xyz),
            "affine": np.asarray(self.affine).tolist(),
            "orientation": np.asarray(self.orientation).tolist(),
            "header": self.header.hex() if self.header is not None else None,
            "laterality": self.laterality,
            "format": self.format,
            "ndim": self.ndim,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SourceGeometry:
        """The inverse of `to_json`."""
        return cls(
            shape_xyz=tuple(value["shape_xyz"]),
            affine=np.array(value["affine"], dtype=np.float64),
            orientation=np.array(value["orientation"], dtype=np.float64),
            header=bytes.fromhex(value["header"]) if value["header"] is not None else None,
            laterality=value["laterality"],
            format=value["format"],
            ndim=value["ndim"],
            notes=tuple(value["notes"]),
        )


@dataclass(frozen=True, eq=False)
class Volume:
    """One channel of a scan: array (Z, Y, X) in the file's own units (HU for CT) on a canonical grid.

    modality: "CT", "MR", "PET", "US", ... or None when unknown; channel: which channel of its case this is; siblings: gives all channels
    of the case in order, where they can be had.
    """

    array: NDArray[Any]
    grid: Grid
    modality: str | None = None
    channel: int = 0
    source: SourceGeometry | None = None
    name: str = ""
    siblings: Callable[[], Sequence[Volume]] | None = field(default=None, repr=False)
    _hash: list[str] = field(default_factory=list, init=False, repr=False)  # not copied by dataclasses.replace

    def __post_init__(self) -> None:
        if tuple(self.array.shape) != self.grid.shape_zyx:
            raise GeometryError(f"The array has shape {self.array.shape}, its grid {self.grid.shape_zyx}.")

    @property
    def content_hash(self) -> str:
        """Hex digest of voxels, type and grid: equal content has an equal hash, whatever the file's name."""
        if not self._hash:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(repr((self.array.dtype.str, self.array.shape, self.grid.affine.tolist(), self.modality, self.channel)).encode())
            digest.update(np.ascontiguousarray(self.array).data)
            self._hash.append(digest.hexdigest())
        return self._hash[0]

    @property
    def together(self) -> tuple[Volume, ...]:
        """All channels of the case in order, where they can be had; else this one alone."""
        return (self,) if self.siblings is None else tuple(self.siblings())

    def read_slice(self, axis: int, index: int) -> NDArray[Any]:
        """The 2D array at `index` of array axis `axis` (0 z: (Y, X), 1 y: (Z, X), 2 x: (Z, Y)), no copy."""
        return np.asarray(self.array[(slice(None),) * axis + (index,)])

    @cached_property
    def percentiles(self) -> dict[str, float]:
        """Intensity at "0.5", "5", "50", "95", "99.5" per cent of all finite voxels, and "min", "max"."""
        return intensity_percentiles(self.array)


PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


def intensity_percentiles(array: NDArray[Any], limit: int = 4_000_000) -> dict[str, float]:
    """Percentiles of the finite voxels, by an even stride when there are more than `limit`; exact minimum and maximum."""
    flat = array.reshape(-1)
    sample = flat[:: max(1, flat.size // limit)]
    if sample.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]
        low, high = (float(np.nanmin(flat)), float(np.nanmax(flat))) if sample.size else (0.0, 0.0)
    else:
        low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)
    values = np.percentile(sample, PERCENTILES) if sample.size else np.zeros(len(PERCENTILES))
    return {**{f"{p:g}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}, "min": low, "max": high}


@dataclass(frozen=True, eq=False)
class Mask:
    """One structure: bool array (Z, Y, X) on a grid, and the name of what it shows."""

    array: NDArray[np.bool_]
    grid: Grid
    name: str = ""

    def __post_init__(self) -> None:
        if self.array.dtype != np.bool_:
            object.__setattr__(self, "array", self.array.astype(bool))
        if tuple(self.array.shape) != self.grid.shape_zyx:
            raise GeometryError(f"The mask has shape {self.array.shape}, its grid {self.grid.shape_zyx}.")

    @property
    def volume_ml(self) -> float:
        """Volume in millilitres."""
        return int(np.count_nonzero(self.array)) * self.grid.voxel_volume_mm3 / 1000.0

    @property
    def centroid_mm(self) -> Float | None:
        """World position (3,) of the centroid, None when empty."""
        if not self.array.any():
            return None
        z, y, x = np.nonzero(self.array)
        return self.grid.to_world(np.array([z.mean(), y.mean(), x.mean()]))
