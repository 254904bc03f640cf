"""An image as it lies in a file, before its voxels are decoded, and the one pass that makes them canonical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError
from seerseg.volume.grid import Float, Grid, SourceGeometry
from seerseg.volume.orientation import canonical_grid, orientation_of, to_stored

SLAB_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Voxels:
    """Decoded voxels: raw (x, y, z) as stored, any strides; value = raw * slope + inter. keep: what owns the memory."""

    raw_xyz: NDArray[Any]
    slope: float = 1.0
    inter: float = 0.0
    keep: Any = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A readable image: geometry from its header, and `decode` for the voxels (raises ImageError)."""

    path: Path
    grid: Grid
    source: SourceGeometry
    decode: Callable[[], Voxels]
    modality: str | None = None


def check_stored(path: Path, shape_xyz: tuple[int, ...], affine: Float) -> tuple[Grid, NDArray[np.float64]]:
    """Canonical grid and orientation; ImageError or GeometryError naming the file when shape or affine is unusable."""
    if min(shape_xyz) < 1:
        raise ImageError(f"{path} holds no voxels: its header gives the shape {tuple(shape_xyz)}. Export the image again.")
    try:
        if np.isfinite(affine).all() and np.abs(affine).max() < 1e9:
            Grid(shape_xyz[::-1], affine)  # type: ignore[arg-type]
            orientation = orientation_of(affine)
            if np.isfinite(orientation).all():
                return canonical_grid(shape_xyz, affine, orientation), orientation  # type: ignore[arg-type]
    except (GeometryError, np.linalg.LinAlgError):
        pass
    rows = np.array2string(affine[:3], precision=4, separator=", ").replace("\n", "")
    raise GeometryError(f"{path} has an affine that is singular or not finite ({rows}), so its place in space is unknown. Mend its header.")


def squeeze_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The three spatial sizes (x, y, z) of a stored shape; ImageError when it has more than three that are not 1."""
    if len(shape) < 2:
        raise ImageError(f"{path} has {len(shape)} dimension(s); an image has two or three.")
    if any(n > 1 for n in shape[3:]):
        n = next(n for n in shape[3:] if n > 1)
        raise ImageError(
            f"{path} has the shape {'x'.join(map(str, shape))}: {n} volumes in one file. "
            "SeerSeg reads one volume per file; split it and give each channel or time point its own file."
        )
    x, y, z = (*shape[:3], 1)[:3]
    return int(x), int(y), int(z)


def canonical_intensities(stored: Stored) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Decode to a canonical (Z, Y, X) C-order array, int16 where lossless, else float32; and what was decided.

    Voxels that are not finite become the smallest finite one. ImageError when none is finite. An array that is stored in
    this type and only flipped is turned in place; any other is copied once.
    """
    voxels = stored.decode()
    raw, slope, inter = voxels.raw_xyz.T, voxels.slope, voxels.inter
    if raw.dtype.kind not in "iufb":
        raise ImageError(f"{stored.path} holds {raw.dtype} values, not one number per voxel. Export it as a plain intensity image.")
    dtype, exact = _lossless_dtype(raw, slope, inter)
    notes: list[str] = []
    if raw.dtype.kind in "iu" and raw.dtype.itemsize >= 4 and dtype == np.float32 and _beyond(raw, 1 << 24):
        notes.append("integers beyond 16777216 were rounded to float32")
    kind: Any = np.int64 if exact else np.float64
    scale = None if slope == 1 and inter == 0 else lambda values: values.astype(kind) * kind(slope) + kind(inter)
    out = _turned(raw, stored, dtype, scale)
    if dtype == np.float32:
        notes += _finite_only(out, stored.path)
    return out, (*notes, *_constant_note(out))


def _turned(raw: NDArray[Any], stored: Stored, dtype: Any, scale: Callable[[NDArray[Any]], NDArray[Any]] | None) -> NDArray[Any]:
    """Stored voxels (z, y, x) as a canonical C-order array of this type."""
    orientation = stored.source.orientation
    if scale is None and raw.dtype == dtype and raw.flags.c_contiguous and raw.flags.writeable and (orientation[:, 0] == [0, 1, 2]).all():
        _flip(raw, *(int(sign) for sign in orientation[::-1, 1]))
        return raw
    out = np.empty(stored.grid.shape_zyx, dtype=dtype)
    into = to_stored(out, orientation).T
    with np.errstate(over="ignore", invalid="ignore"):
        for part in slabs(raw):
            into[part] = raw[part] if scale is None else scale(raw[part])
    return out


def _flip(array: NDArray[Any], z: int, y: int, x: int) -> None:
    """Reverse the axes whose sign is -1, in place, with one plane of extra memory."""
    if (z, y, x) == (1, 1, 1):
        return
    last = len(array) - 1
    for low in range(len(array) if z > 0 else len(array) // 2 + len(array) % 2):
        high = low if z > 0 else last - low
        held = array[low].copy()
        if high != low:
            array[low] = array[high][::y, ::x]
        array[high] = held[::y, ::x]


def _finite_only(out: NDArray[np.float32], path: Path) -> list[str]:
    """Replace what is not finite by the smallest finite value; a note when there was any."""
    missing, lowest = 0, np.inf
    for part in slabs(out):
        values = out[part]
        finite = np.isfinite(values)
        count = int(np.count_nonzero(finite))
        missing += finite.size - count
        if count < finite.size:
            values = values[finite]
        lowest = min(lowest, float(values.min(initial=np.inf)))
    if missing == out.size:
        raise ImageError(f"{path} holds no finite voxel, only NaN or infinity. Export the image again.")
    if not missing:
        return []
    for part in slabs(out):
        out[part][~np.isfinite(out[part])] = lowest
    return [f"{missing} voxels were not finite and were read as {lowest:g}, the smallest finite value"]


def canonical_integers(stored: Stored) -> NDArray[Any]:
    """Decode a label map to a canonical (Z, Y, X) array of the smallest of uint8, uint16, int16 and int32.

    Values stored as floats must be whole numbers; ImageError names the first that is not.
    """
    voxels = stored.decode()
    raw, slope, inter = voxels.raw_xyz.T, voxels.slope, voxels.inter
    if raw.dtype.kind not in "iufb":
        raise ImageError(f"{stored.path} holds {raw.dtype} values, not label numbers. Export it as an integer label map.")
    low, high = np.inf, -np.inf
    scaled = slope != 1 or inter != 0
    for part in slabs(raw):
        values = raw[part].astype(np.float64) * slope + inter if scaled else raw[part]
        if values.dtype.kind == "f":
            wrong = ~np.isfinite(values) | (np.abs(values - np.rint(values)) > (1e-4 if scaled else 0))
            if wrong.any():
                raise ImageError(
                    f"{stored.path} is no label map: it holds the value {values[wrong][0]:g}, and labels are whole numbers. "
                    "Give a label map, or round it if it was interpolated."
                )
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    dtype = next((d for d in (np.uint8, np.uint16, np.int16, np.int32) if np.iinfo(d).min <= low and high <= np.iinfo(d).max), None)
    if dtype is None:
        raise ImageError(f"{stored.path} is no label map: its values reach from {low:g} to {high:g}. Labels are 32-bit integers.")
    return _turned(raw, stored, dtype, (lambda values: np.rint(values.astype(np.float64) * slope + inter)) if scaled else None)


def slabs(array: NDArray[Any]) -> list[slice]:
    """Ranges of the first axis, each of about 16 MB in the array's own type."""
    step = max(1, SLAB_BYTES // max(1, array.nbytes // max(1, array.shape[0])))
    return [slice(a, min(a + step, array.shape[0])) for a in range(0, array.shape[0], step)]


def _beyond(raw: NDArray[Any], limit: int) -> bool:
    return int(raw.max()) > limit or int(raw.min()) < -limit


def _constant_note(array: NDArray[Any]) -> tuple[str, ...]:
    first = array.flat[0]
    if array.flat[array.size // 2] != first or array.flat[-1] != first or any((array[part] != first).any() for part in slabs(array)):
        return ()
    return (f"every voxel has the value {float(first):g}",)


def _lossless_dtype(raw: NDArray[Any], slope: float, inter: float) -> tuple[Any, bool]:
    """int16 when every scaled value is a whole number that int16 holds, else float32; and whether integers suffice to scale."""
    info = np.iinfo(np.int16)
    whole = float(slope).is_integer() and float(inter).is_integer() and max(abs(slope), abs(inter)) < 1 << 31
    if raw.dtype.kind in "iub":
        if raw.dtype.itemsize == 8 and _beyond(raw, 1 << 31):
            return np.float32, False
        if not whole:
            return np.float32, False
        if raw.dtype == np.int16 and slope == 1 and inter == 0:
            return np.int16, True
        ends = [int(raw.min()) * int(slope) + int(inter), int(raw.max()) * int(slope) + int(inter)]
        return (np.int16, True) if info.min <= min(ends) and max(ends) <= info.max else (np.float32, True)
    for part in slabs(raw):
        with np.errstate(invalid="ignore", over="ignore"):
            values = raw[part] * slope + inter if slope != 1 or inter != 0 else raw[part]
            small = (values >= info.min) & (values <= info.max) & (np.rint(values) == values)
        if not small.all():
            return np.float32, False
    return np.int16, False
