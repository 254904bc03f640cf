"""What segmenters of single slices share: grey levels, display order, and where boxes, points and masks lie in a network's square image.

A slice is shown to a network in radiological display order, both in-plane axes reversed (see `views`), stretched to a square of
`size_px` pixels. Pixel p of the network spans [p, p + 1) here, so its centre lies at p + 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SegmenterError
from seerseg.volume import Volume

Grey = NDArray[np.uint8]
SOFT_TISSUE = (40.0, 400.0)
"""Centre and width in HU: what MedSAM and MedSAM2 show of a CT unless told otherwise."""
_SAMPLE = 4_000_000


@dataclass(frozen=True)
class GreyScale:
    """Linear map of intensities low..high to 0..255. zero_is_black: exact zeros are background whatever the window."""

    low: float
    high: float
    zero_is_black: bool = False

    def __call__(self, plane: NDArray[Any]) -> Grey:
        """The plane as uint8; what is not a number is black."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = (plane.astype(np.float32) - np.float32(self.low)) / np.float32(max(self.high - self.low, 1e-12))
        grey = (np.clip(np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0) * 255).astype(np.uint8)
        if self.zero_is_black:
            grey[plane == 0] = 0
        return grey


def read_window(value: str) -> tuple[float, float]:
    """ "40,400" as centre and width; ValueError saying what is taken."""
    try:
        centre, width = (float(part) for part in value.split(","))
    except ValueError:
        raise ValueError("write centre and width, such as 40,400") from None
    if not (np.isfinite((centre, width)).all() and width > 0):
        raise ValueError("write centre and width, such as 40,400, the width above 0")
    return centre, width


def grey_scale(volume: Volume, window: tuple[float, float] | None = None) -> GreyScale:
    """How MedSAM and MedSAM2 prepare a scan: a window (centre, width), by default that of soft tissue for CT; 8-bit images as they
    are; else from the 0.5th to the 99.5th percentile of what is not zero. Then least to greatest value left becomes 0..255."""
    if window is not None and not (np.isfinite(window).all() and window[1] > 0):
        raise SegmenterError(f"The window {window} is none: give a centre and a width above 0.")
    if window is None and volume.modality == "CT":
        window = SOFT_TISSUE
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        least, greatest = (float(np.clip(volume.percentiles[name], low, high)) for name in ("min", "max"))
        return GreyScale(least, greatest) if least < greatest else GreyScale(low, high)
    if volume.array.dtype == np.uint8:
        return GreyScale(0.0, 255.0)
    flat = volume.array.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)]
    sample = sample[(sample != 0) & np.isfinite(sample)]
    if not sample.size:
        return GreyScale(0.0, 1.0, zero_is_black=True)
    low, high = (float(v) for v in np.percentile(sample.astype(np.float64), (0.5, 99.5)))
    return GreyScale(low, high, zero_is_black=True) if low < high else GreyScale(min(low, 0.0), max(high, 0.0) or 1.0, zero_is_black=True)


def displayed(plane: NDArray[Any]) -> NDArray[Any]:
    """A slice in array order as it is displayed, or the other way round (a view)."""
    return plane[::-1, ::-1]


def squared(grey: Grey, size_px: int) -> Grey:
    """A slice in array order as the square image (size_px, size_px) that a network sees: displayed, stretched bicubically."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(displayed(grey)))
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC))


def box_pixels(lo: Sequence[float], hi: Sequence[float], shape: Sequence[int], sizes_px: Sequence[float]) -> tuple[float, ...]:
    """Half-open voxel edges on a slice of that shape -> (x first, y first, x last, y last), the first and last pixels of the
    displayed, stretched image that the box holds. Clipped to the slice. With one pixel a voxel: the outermost voxels, as SAM wants."""
    first, last = [], []
    for low, high, n, size in zip(lo, hi, shape, sizes_px, strict=True):
        a, b = (np.clip(n - edge, 0, n) * size / n for edge in (high, low))
        first.append(float(min(a, (a + b - 1) / 2)))
        last.append(float(max(b - 1, (a + b - 1) / 2)))
    return first[1], first[0], last[1], last[0]


def point_pixels(voxel: Sequence[float], shape: Sequence[int], sizes_px: Sequence[float]) -> tuple[float, float]:
    """Voxel coordinates on a slice -> pixel (x, y) of the displayed, stretched image; voxel centres of one pixel each keep integers."""
    y, x = ((n - 0.5 - v) * size / n - 0.5 for v, n, size in zip(voxel, shape, sizes_px, strict=True))
    return float(x), float(y)


def mask_to_square(plane: NDArray[np.bool_], size_px: int) -> NDArray[np.bool_]:
    """A mask on a slice (array order) as a network sees it; a mask that would vanish keeps the pixel of each of its voxels."""
    rows, columns = (np.minimum(((np.arange(size_px) + 0.5) * n / size_px).astype(int), n - 1) for n in plane.shape)
    shown = displayed(plane)
    square = shown[np.ix_(rows, columns)]
    if plane.any() and not square.any():
        at = np.argwhere(shown)
        square = square.copy()
        square[tuple(((at[:, i] + 0.5) * size_px / plane.shape[i]).astype(int) for i in range(2))] = True
    return np.asarray(square, dtype=np.bool_)


def mask_from_logits(logits: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Logits (h, w) of the square image -> mask on a slice of that shape (array order): bilinear to the slice's own pixels, then > 0."""
    import torch
    from torch.nn.functional import interpolate

    whole = interpolate(torch.from_numpy(np.ascontiguousarray(logits))[None, None], size=shape, mode="bilinear", align_corners=False)
    return np.asarray(displayed((whole[0, 0] > 0).numpy()))


def slice_axis(volume: Volume) -> int:
    """The axis across which slices are taken when nobody says: the one with a single slice, else the widest spacing (z among equals)."""
    shape, spacing = volume.grid.shape_zyx, volume.grid.spacing_zyx
    flat = [axis for axis, n in enumerate(shape) if n == 1]
    return flat[0] if flat else max(range(3), key=lambda axis: (round(spacing[axis], 3), -axis))


def in_plane(values: Sequence[Any], axis: int) -> tuple[Any, Any]:
    """The two of three values (z, y, x) that belong to the plane across `axis`."""
    first, second = (value for i, value in enumerate(values) if i != axis)
    return first, second


def nearest_slice(value: float, count: int) -> int:
    """The slice that holds a voxel coordinate."""
    return int(min(count - 1, max(0, np.floor(value + 0.5))))
