"""What the reasoner sees: windowed slices as images in radiological display order, with an exact pixel <-> voxel map.

Display order, as doctors and their training images have it: axial and coronal show the patient's right on the viewer's
left; axial has anterior on top, coronal and sagittal superior on top, sagittal anterior on the left. On a canonical grid
each of these is both image axes reversed, so rows and columns run against the two in-plane voxel axes. Pixels keep the
physical aspect: a slice is scaled evenly in mm to fit a square and centred on black.

Pixel (row, col) is the centre of a pixel; it covers [row - 1/2, row + 1/2), as voxels do. Boxes are edges, points are
centres: mapping one as the other would shift it by half a voxel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from seerseg.volume import Grid

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
_IN_PLANE = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
Pixels = NDArray[np.uint8]
CT_FLOOR = -1024.0  # HU; scanners pad with -2000 or -3024 outside their round field


class SliceSource(Protocol):
    """Anything whose slices can be read singly: a Volume, or one channel of a stored case."""

    @property
    def grid(self) -> Grid:
        """A canonical grid."""
        ...

    @property
    def modality(self) -> str | None:
        """As in Volume."""
        ...

    @property
    def percentiles(self) -> Mapping[str, float]:
        """At least "0.5" and "99.5" of the whole volume."""
        ...

    def read_slice(self, axis: int, index: int) -> NDArray[Any]:
        """The 2D array at `index` of array axis `axis`."""
        ...


@dataclass(frozen=True)
class ViewSpec:
    """Which slices are shown, and how.

    count slices of `plane`, evenly spaced from fraction lo to hi of the axis, as squares of size_px. window: "slice" (the
    slice's own 0.5 to 99.5 percentile, SEER's), "volume" (the whole volume's), or (centre, width) in the scan's units.
    gamma: exponent applied after windowing. also: further planes that are shown in the same way.
    """

    plane: Plane = "axial"
    count: int = 8
    size_px: int = 448
    lo: float = 0.10
    hi: float = 0.90
    window: Literal["slice", "volume"] | tuple[float, float] = "slice"
    gamma: float = 1.0
    also: tuple[Plane, ...] = ()

    @property
    def axis(self) -> int:
        """The array axis that runs through the slices."""
        return PLANES.index(self.plane)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        window: Any = list(self.window) if isinstance(self.window, tuple) else self.window
        value = {
            "plane": self.plane,
            "count": self.count,
            "size_px": self.size_px,
            "lo": self.lo,
            "hi": self.hi,
            "window": window,
            "gamma": self.gamma,
        }
        return {**value, "also": list(self.also)} if self.also else value  # one plane is written as it always was

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ViewSpec:
        """The inverse of `to_json`."""
        window = value["window"]
        return cls(**{**value, "window": tuple(window) if isinstance(window, list) else window, "also": tuple(value.get("also", ()))})


SEER_VIEWS = ViewSpec()
MEDVOL_R1_VIEWS = ViewSpec(count=64, size_px=256, lo=0.0, hi=1.0, window="volume")


def agreed_views(planned: ViewSpec, own: ViewSpec) -> ViewSpec:
    """What a reasoner is shown in training and prediction alike: the planned views; for a protocol that was published with views of
    its own those, in the planned plane, window and gamma."""
    if own == SEER_VIEWS:
        return planned
    also = tuple(own.plane if plane == planned.plane else plane for plane in own.also)
    return replace(own, plane=planned.plane, window=planned.window, gamma=planned.gamma, also=also)


@dataclass(frozen=True)
class PixelMap:
    """The affine between pixels of one view and voxels of its slice, per axis: pixel = offset + sign * scale * voxel.

    All four are pairs (vertical, horizontal); `voxels` the in-plane shape.
    """

    axis: int
    index: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    voxels: tuple[int, int]

    def to_voxel(self, row: float, col: float) -> tuple[float, float, float]:
        """Pixel centre coordinates -> voxel (z, y, x)."""
        v = (self.offset[0] - row) / self.scale[0]
        h = (self.offset[1] - col) / self.scale[1]
        out = [v, h]
        out.insert(self.axis, float(self.index))
        return out[0], out[1], out[2]

    def to_pixel(self, zyx: Sequence[float]) -> tuple[float, float]:
        """Voxel (z, y, x) -> pixel (row, col); the coordinate through the slices is ignored."""
        a, b = _IN_PLANE[self.axis]
        return self.offset[0] - self.scale[0] * zyx[a], self.offset[1] - self.scale[1] * zyx[b]

    def box_to_voxel(self, row0: float, col0: float, row1: float, col1: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Half-open pixel edges (a pixel r spans edges r to r + 1) -> half-open voxel edges (lo, hi), array order."""
        z = [self.to_voxel(r - 0.5, c - 0.5) for r, c in ((row0, col0), (row1, col1))]
        a, b = _IN_PLANE[self.axis]
        lo = tuple(min(z[0][i], z[1][i]) + 0.5 for i in (a, b))
        hi = tuple(max(z[0][i], z[1][i]) + 0.5 for i in (a, b))
        return (lo[0], lo[1]), (hi[0], hi[1])

    def box_to_pixel(self, lo: Sequence[float], hi: Sequence[float]) -> tuple[float, float, float, float]:
        """Half-open voxel edges, array order -> half-open pixel edges (row0, col0, row1, col1)."""
        rows = [self.offset[0] - self.scale[0] * (edge - 0.5) + 0.5 for edge in (lo[0], hi[0])]
        cols = [self.offset[1] - self.scale[1] * (edge - 0.5) + 0.5 for edge in (lo[1], hi[1])]
        return min(rows), min(cols), max(rows), max(cols)


@dataclass(frozen=True, eq=False)
class View:
    """One slice as an image: pixels uint8 (size, size, 3), and where they lie."""

    pixels: Pixels
    plane: Plane
    map: PixelMap

    @property
    def index(self) -> int:
        """Which slice of the canonical grid."""
        return self.map.index

    @cached_property
    def key(self) -> str:
        """Hex digest of the pixels."""
        return hashlib.blake2b(np.ascontiguousarray(self.pixels).data, digest_size=16).hexdigest()


class LaterView(View):
    """A slice that is drawn when its pixels are looked at first."""

    def __init__(self, plane: Plane, where: PixelMap, draw: Callable[[], Pixels]) -> None:
        self.__dict__.update(plane=plane, map=where, _draw=draw)

    @cached_property
    def pixels(self) -> Pixels:
        """As of `View`."""
        made: Pixels = self.__dict__["_draw"]()
        return made


@dataclass(frozen=True, eq=False)
class CaseViews:
    """The views of one channel of one case, in slice order.

    others: those of the planes `spec.also`, plane after plane; source: what further slices can be rendered from, kept only where
    there are several planes (a dialogue of several turns shows slices that it did not open with).
    """

    views: tuple[View, ...]
    grid: Grid
    spec: ViewSpec
    modality: str | None = None
    others: tuple[View, ...] = ()
    source: SliceSource | None = None

    def at(self, axis: int, index: int) -> View:
        """The view of that slice: the shown one, else rendered from the source, else the nearest that is shown along this axis
        (along the first plane where that axis has none)."""
        shown = [view for view in (*self.views, *self.others) if view.map.axis == axis]
        nearest = min(shown or self.views, key=lambda view: abs(view.index - index))
        if self.source is None or (nearest.map.axis == axis and nearest.index == index):
            return nearest
        return render_slice(self.source, replace(self.spec, plane=PLANES[axis]), index)


def slice_indices(count: int, size: int, lo: float, hi: float) -> list[int]:
    """Indices of `count` evenly spaced slices from round(lo (n-1)) to round(hi (n-1)), each once, rising."""
    wanted = np.linspace(round(lo * (size - 1)), round(hi * (size - 1)), max(1, count))
    return sorted({int(i) for i in np.rint(wanted)})


def pixel_map(grid: Grid, axis: int, index: int, size_px: int) -> PixelMap:
    """How a slice of `grid` is laid into a square of size_px: scaled evenly in mm, centred."""
    a, b = _IN_PLANE[axis]
    voxels = grid.shape_zyx[a], grid.shape_zyx[b]
    spacing = grid.spacing_zyx[a], grid.spacing_zyx[b]
    px_per_mm = size_px / max(voxels[0] * spacing[0], voxels[1] * spacing[1])
    inner = tuple(max(1, round(n * s * px_per_mm)) for n, s in zip(voxels, spacing, strict=True))
    scale = inner[0] / voxels[0], inner[1] / voxels[1]
    first = [(size_px - n) // 2 for n in inner]
    # voxel 0 is the last pixel row: its upper edge -1/2 lies at pixel edge first + inner - 1/2
    offset = tuple(f + n - 0.5 - s / 2 for f, n, s in zip(first, inner, scale, strict=True))
    return PixelMap(axis=axis, index=index, scale=scale, offset=(offset[0], offset[1]), voxels=voxels)


def window_bounds(source: SliceSource, plane: NDArray[Any], window: str | tuple[float, float]) -> tuple[float, float]:
    """The intensities shown as black and white. What a CT holds below air is padding: it is black and counts for nothing."""
    if isinstance(window, tuple):
        centre, width = window
        return centre - width / 2, centre + width / 2
    floor = CT_FLOOR if source.modality == "CT" else -np.inf
    if window == "volume":
        return max(source.percentiles["0.5"], floor), source.percentiles["99.5"]
    finite = plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane.reshape(-1)
    finite = finite[finite >= floor] if source.modality == "CT" else finite
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 0.0)
    return float(low), float(high)


def render(source: SliceSource, spec: ViewSpec = SEER_VIEWS, *, later: bool = False) -> CaseViews:
    """The views that `spec` asks for. Reads those slices and nothing else. later: each is drawn when it is looked at first.

    An image of a single slice is shown in the plane in which it was taken, and in no other.
    """
    shape = source.grid.shape_zyx
    flat = [axis for axis, n in enumerate(shape) if n == 1]
    if spec.axis in flat:
        spec = replace(spec, also=())
    elif len(flat) == 1:
        spec = replace(spec, plane=PLANES[flat[0]], also=())
    views = _plane(source, spec, later)
    others = tuple(view for plane in spec.also for view in _plane(source, replace(spec, plane=plane), later))
    kept = source if spec.also else None
    return CaseViews(views=views, grid=source.grid, spec=spec, modality=source.modality, others=others, source=kept)


def _plane(source: SliceSource, spec: ViewSpec, later: bool) -> tuple[View, ...]:
    indices = slice_indices(spec.count, source.grid.shape_zyx[spec.axis], spec.lo, spec.hi)
    if not later:
        return tuple(render_slice(source, spec, index) for index in indices)
    places = [pixel_map(source.grid, spec.axis, index, spec.size_px) for index in indices]
    return tuple(LaterView(spec.plane, where, partial(_pixels, source, spec, where)) for where in places)


def render_slice(source: SliceSource, spec: ViewSpec, index: int) -> View:
    """One slice as `spec` shows it."""
    where = pixel_map(source.grid, spec.axis, index, spec.size_px)
    return View(pixels=_pixels(source, spec, where), plane=spec.plane, map=where)


def _pixels(source: SliceSource, spec: ViewSpec, where: PixelMap) -> Pixels:
    plane = np.asarray(source.read_slice(where.axis, where.index))
    low, high = window_bounds(source, plane, spec.window)
    shown = (plane.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
    shown = np.clip(np.nan_to_num(shown, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    if spec.gamma != 1.0:
        shown = shown**spec.gamma
    grey = _lay(np.rint(shown * 255).astype(np.uint8), where, spec.size_px, smooth=True)
    return np.repeat(grey[..., None], 3, axis=2)


def mask_pixels(mask_slice: NDArray[Any], where: PixelMap, size_px: int) -> NDArray[np.bool_]:
    """A bool slice (in-plane array order) as bool pixels (size_px, size_px) of the view that `where` belongs to."""
    return _lay(mask_slice.astype(np.uint8) * 255, where, size_px, smooth=False) > 127


def _lay(plane: NDArray[np.uint8], where: PixelMap, size_px: int, *, smooth: bool) -> NDArray[np.uint8]:
    from PIL import Image

    inner = [round(s * n) for s, n in zip(where.scale, where.voxels, strict=True)]
    first = [round(o + 0.5 + s / 2 - n) for o, s, n in zip(where.offset, where.scale, inner, strict=True)]
    flipped = np.ascontiguousarray(plane[::-1, ::-1])
    if flipped.shape != tuple(inner):
        way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        flipped = np.asarray(Image.fromarray(flipped).resize((inner[1], inner[0]), way))
    out = np.zeros((size_px, size_px), np.uint8)
    out[first[0] : first[0] + inner[0], first[1] : first[1] + inner[1]] = flipped
    return out


def overlay(
    view: View, mask_slice: NDArray[Any], colour: tuple[int, int, int] = (0, 255, 0), alpha: float = 0.5, *, outline: bool = False
) -> View:
    """The view with a mask slice (bool, in-plane array order) painted on it: filled with `alpha`, or as a 2 px outline."""
    size = view.pixels.shape[0]
    shown = mask_pixels(mask_slice, view.map, size)
    if outline:
        inner = shown.copy()
        for step in (1, 2):
            for axis in (0, 1):
                inner &= np.roll(shown, step, axis) & np.roll(shown, -step, axis)
        shown, alpha = shown & ~inner, 1.0
    pixels = view.pixels.copy()
    pixels[shown] = np.rint((1 - alpha) * pixels[shown] + alpha * np.array(colour)).astype(np.uint8)
    return View(pixels=pixels, plane=view.plane, map=view.map)


def montage(images: Sequence[Pixels], columns: int | None = None, gap_px: int = 2, captions: Sequence[str] = ()) -> Pixels:
    """Equal images (H, W, 3) in a grid, left to right and top to bottom, with an optional caption in each upper left corner."""
    from PIL import Image, ImageDraw

    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    sheet = np.zeros((rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3), np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap_px), (i % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    if captions:
        canvas = Image.fromarray(sheet)
        draw = ImageDraw.Draw(canvas)
        for i, caption in enumerate(captions):
            at = ((i % columns) * (width + gap_px) + 4, (i // columns) * (height + gap_px) + 4)
            draw.text(at, caption, fill=(255, 230, 120), font_size=max(10, height // 24), stroke_width=1, stroke_fill=(0, 0, 0))
        sheet = np.asarray(canvas)
    return sheet
