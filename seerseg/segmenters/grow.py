"""`grow`: a segmenter without weights. A box, points or a mask on one slice are grown to 3D by classical methods.

It needs no download and runs anywhere; it knows no anatomy, so it follows intensities: good where a structure stands out from its
surroundings, poor where it does not (measured in documentation/experiments.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SegmenterError
from seerseg.prompts import Box2D, Box3D, Point, Prompt, box_voxels
from seerseg.segmenters.base import Capabilities, ModelCard, RefiningSession, Segmentation, answered, refusal
from seerseg.segmenters.growing import (
    Appearance,
    Propagation,
    Read,
    Start,
    ball,
    carve,
    clean,
    extend,
    propagate,
    signed_mm,
    smooth,
    start_at_points,
    start_in_box,
)
from seerseg.volume import Volume

Bool = NDArray[np.bool_]
VERSION = "grow-1"
"""Changes whenever the masks do."""
MARGIN_MM = 20.0
"""Seen around a box beside half its size."""
POINT_MM = 40.0
"""Half the side of the first crop around points; doubled while no region in it is good enough."""
GOOD_FIT = 0.15
"""`Start.fit` (0..1) of a region around points that is good enough to look no further."""
MOST_VOXELS = 250_000
"""Of a 3D box with its surroundings."""
CLICK_MM = 25.0
"""Most that one click adds around itself."""
CARVE_MM = 60.0
"""Farthest that one negative click removes."""


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> GrowSegmenter:
    """The segmenter; there is nothing to load, so a `source` is a SegmenterError and the other arguments change nothing."""
    del device, dtype, offline
    if source is not None:
        raise SegmenterError(f"The segmenter grow has no weights and takes no source, but {str(source)!r} was given; write grow.")
    return GrowSegmenter()


class GrowSegmenter:
    """Boxes, points or a previous mask -> 3D mask.

    Each box is grown by itself, the masks are united. A Box2D gives the target on its slice, which is propagated both ways until the
    target ends; a Box3D is looked at in 3D and bounds it. Points without a box start on their slice across the coarsest axis. A mask
    on a single slice is propagated; a 3D mask is fitted to the image, unless points or boxes come with it: then positive points
    outside it extend it, negative ones inside it carve, boxes add. Nothing standing out is "empty" with a message. No float copy of
    the volume is made: slices are read one by one, cropped. Thread-safe, stateless.
    """

    @property
    def capabilities(self) -> Capabilities:
        """All spatial kinds, no words."""
        return Capabilities(box2d=True, box3d=True, points=True, previous_mask=True, session=True)

    @property
    def card(self) -> ModelCard:
        """Named "grow"."""
        return ModelCard("grow", VERSION, "Apache-2.0", "none", notes="Classical methods; knows no anatomy.")

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order; see the class."""
        return [self._answer(volume, prompt) for prompt in prompts]

    def session(self, volume: Volume) -> RefiningSession:
        """A session in which every prompt refines the mask before it."""
        return RefiningSession(self, volume, keeps_empty=False)

    def _answer(self, volume: Volume, prompt: Prompt) -> Segmentation:
        start = time.perf_counter()
        refused = refusal(self.card.name, self.capabilities, volume, prompt)
        if refused is not None:
            return refused
        if not (prompt.boxes or prompt.mask is not None or any(point.positive for point in prompt.points)):
            message = "Negative points alone do not say where the target is: add a positive point, a box or a mask."
            return Segmentation(prompt, "unsupported", message=message, nearest=self.capabilities.kinds)
        if prompt.mask is not None and not prompt.mask.array.any():
            message = "The previous mask is empty: give a mask with voxels, a box or a point."
            return Segmentation(prompt, "unsupported", message=message, nearest=self.capabilities.kinds)
        mask = grow(volume, prompt)
        message = "" if mask.any() else "Nothing stands out from its surroundings there."
        return answered(volume, prompt, mask, message=message, seconds=time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------------------- one prompt


def grow(volume: Volume, prompt: Prompt) -> Bool:
    """The mask (Z, Y, X) for a checked prompt with a box, a mask or a positive point."""
    shape = volume.grid.shape_zyx
    out = np.zeros(shape, dtype=np.bool_)
    for box in prompt.boxes:
        if isinstance(box, Box2D):
            _grow_box2d(volume, box, prompt.points, out)
        else:
            _grow_box3d(volume, box, prompt.points, out)
    if prompt.mask is not None:
        previous = prompt.mask.array
        axis = _single_slice_axis(previous)
        if axis is not None:
            _grow_slice(volume, previous, axis, out)
        elif prompt.boxes or prompt.points:
            out |= previous
        else:
            _fit_mask(volume, previous, out)
    if not prompt.boxes and prompt.mask is None:
        _grow_points(volume, prompt.points, out)
    return _apply_points(volume, out, prompt.points)


def _coarse_axis(volume: Volume) -> int:
    """The axis with the widest spacing, z among equals."""
    spacing = volume.grid.spacing_zyx
    return max(range(3), key=lambda axis: (round(spacing[axis], 3), -axis))


def _in_plane(volume: Volume, axis: int) -> tuple[float, float, float]:
    """Spacing in mm: between slices of the axis, rows, columns."""
    spacing = volume.grid.spacing_zyx
    rows, columns = (step for i, step in enumerate(spacing) if i != axis)
    return spacing[axis], rows, columns


def _reader(volume: Volume, axis: int, crop: tuple[slice, slice]) -> Read:
    def read(index: int) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            return volume.read_slice(axis, index)[crop].astype(np.float32)

    return read


def _put(out: Bool, axis: int, crop: tuple[slice, slice], masks: dict[int, Bool]) -> None:
    view = np.moveaxis(out, axis, 0)
    for index, mask in masks.items():
        view[(index, *crop)] |= mask


def _cropped(box: tuple[slice, ...], sizes: Sequence[int], spacing_mm: Sequence[float]) -> tuple[slice, slice]:
    """The box with its surroundings, within the slice."""
    crop = []
    for span, n, step in zip(box, sizes, spacing_mm, strict=True):
        margin = math.ceil((span.stop - span.start) / 2 + MARGIN_MM / step)
        crop.append(slice(max(0, span.start - margin), min(n, span.stop + margin)))
    return crop[0], crop[1]


def _marks(volume: Volume, axis: int, index: int, crop: tuple[slice, slice], points: Sequence[Point], positive: bool) -> Bool:
    """Pixels of the crop that hold such points of that slice."""
    marks = np.zeros(tuple(span.stop - span.start for span in crop), dtype=np.bool_)
    for point in points:
        z, y, x = nearest = [_voxel(v, n) for v, n in zip(point.zyx, volume.grid.shape_zyx, strict=True)]
        row, column = [v for i, v in enumerate((z, y, x)) if i != axis]
        if point.positive == positive and nearest[axis] == index:
            row, column = row - crop[0].start, column - crop[1].start
            if 0 <= row < marks.shape[0] and 0 <= column < marks.shape[1]:
                marks[row, column] = True
    return marks


def _voxel(value: float, size: int) -> int:
    return min(size - 1, max(0, math.floor(value + 0.5)))


def _start(
    volume: Volume, axis: int, index: int, box: tuple[slice, ...], crop: tuple[slice, slice], points: Sequence[Point]
) -> Start | None:
    image = _reader(volume, axis, crop)(index)
    _, rows, columns = _in_plane(volume, axis)
    local = (
        slice(box[0].start - crop[0].start, box[0].stop - crop[0].start),
        slice(box[1].start - crop[1].start, box[1].stop - crop[1].start),
    )
    inside, outside = (_marks(volume, axis, index, crop, points, positive) for positive in (True, False))
    return start_in_box(image, local, (rows, columns), inside, outside & ~inside)


def _grow_box2d(volume: Volume, box: Box2D, points: Sequence[Point], out: Bool) -> None:
    sizes = [n for i, n in enumerate(volume.grid.shape_zyx) if i != box.axis]
    spacing = _in_plane(volume, box.axis)
    pixels = box_voxels(box.lo, box.hi, sizes)
    crop = _cropped(pixels, sizes, spacing[1:])
    start = _start(volume, box.axis, box.index, pixels, crop, points)
    if start is not None:
        span = (0, volume.grid.shape_zyx[box.axis])
        masks = propagate(_reader(volume, box.axis, crop), span, box.index, start, spacing, Propagation())
        _put(out, box.axis, crop, masks)


def _grow_box3d(volume: Volume, box: Box3D, points: Sequence[Point], out: Bool) -> None:
    """As on a slice, in 3D at once; a box of more than MOST_VOXELS with its surroundings is looked at by every second voxel, or third."""
    shape, spacing = volume.grid.shape_zyx, volume.grid.spacing_zyx
    voxels = box_voxels(box.lo, box.hi, shape)
    crop = []
    for span, n, step_mm in zip(voxels, shape, spacing, strict=True):
        margin = math.ceil((span.stop - span.start) / 4 + 10 / step_mm)
        crop.append(slice(max(0, span.start - margin), min(n, span.stop + margin)))
    stride = [1, 1, 1]
    while math.prod(math.ceil((span.stop - span.start) / step) for span, step in zip(crop, stride, strict=True)) > MOST_VOXELS:
        stride[min(range(3), key=lambda axis: stride[axis] * spacing[axis])] += 1
    image = _window(volume, tuple(slice(span.start, span.stop, step) for span, step in zip(crop, stride, strict=True)))
    local = []
    for span, around, step in zip(voxels, crop, stride, strict=True):
        first = (span.start - around.start) // step
        local.append(slice(first, max(first + 1, math.ceil((span.stop - around.start) / step))))
    marks = {True: np.zeros(image.shape, dtype=np.bool_), False: np.zeros(image.shape, dtype=np.bool_)}
    for point in points:
        at = tuple((_voxel(v, n) - around.start) // step for v, n, around, step in zip(point.zyx, shape, crop, stride, strict=True))
        if all(0 <= v < n for v, n in zip(at, image.shape, strict=True)):
            marks[point.positive][at] = True
    coarse = tuple(s * step for s, step in zip(spacing, stride, strict=True))
    start = start_in_box(image, tuple(local), coarse, marks[True], marks[False] & ~marks[True])
    if start is not None:
        mask = start.mask
        for axis, step in enumerate(stride):
            mask = np.repeat(mask, step, axis=axis) if step > 1 else mask
        out[voxels] |= mask[tuple(slice(span.start - a.start, span.stop - a.start) for span, a in zip(voxels, crop, strict=True))]


def _grow_points(volume: Volume, points: Sequence[Point], out: Bool) -> None:
    """Each slice that holds positive points, across the coarsest axis, is grown by itself."""
    axis = _coarse_axis(volume)
    shape = volume.grid.shape_zyx
    sizes = [n for i, n in enumerate(shape) if i != axis]
    spacing = _in_plane(volume, axis)
    placed = [[_voxel(v, n) for v, n in zip(point.zyx, shape, strict=True)] for point in points if point.positive]
    for key in sorted({voxel[axis] for voxel in placed}):
        here = [[v for i, v in enumerate(voxel) if i != axis] for voxel in placed if voxel[axis] == key]
        best: tuple[Start, tuple[slice, slice]] | None = None
        half_mm = POINT_MM
        while True:
            crop = _around(here, half_mm, sizes, spacing[1:])
            inside, outside = (_marks(volume, axis, key, crop, points, positive) for positive in (True, False))
            edge = _inner_edge(crop, sizes)
            start = start_at_points(_reader(volume, axis, crop)(key), inside, outside & ~inside, edge, (spacing[1], spacing[2]))
            if start is not None and (best is None or start.fit > best[0].fit):
                best = start, crop
            if not edge.any() or (best is not None and best[0].fit >= GOOD_FIT):
                break
            half_mm *= 2
        if best is not None:
            start, crop = best
            _put(out, axis, crop, propagate(_reader(volume, axis, crop), (0, shape[axis]), key, start, spacing, Propagation()))


def _around(pixels: Sequence[Sequence[int]], half_mm: float, sizes: Sequence[int], spacing_mm: Sequence[float]) -> tuple[slice, slice]:
    """The crop of the slice that holds the pixels and `half_mm` around them."""
    crop = []
    for values, n, step in zip(zip(*pixels, strict=True), sizes, spacing_mm, strict=True):
        reach = math.ceil(half_mm / step)
        crop.append(slice(max(0, min(values) - reach), min(n, max(values) + reach + 1)))
    return crop[0], crop[1]


def _inner_edge(crop: tuple[slice, slice], sizes: Sequence[int]) -> Bool:
    """The outermost pixels of the crop on those of its sides that are not sides of the slice."""
    edge = np.zeros(tuple(span.stop - span.start for span in crop), dtype=np.bool_)
    for axis, (span, n) in enumerate(zip(crop, sizes, strict=True)):
        view = np.moveaxis(edge, axis, 0)
        view[0] |= span.start > 0
        view[-1] |= span.stop < n
    return edge


def _single_slice_axis(mask: Bool) -> int | None:
    """The axis across which the mask lies on one slice, though the volume has more."""
    for axis in range(3):
        if mask.shape[axis] > 1 and np.count_nonzero(mask.any(axis=tuple(i for i in range(3) if i != axis))) == 1:
            return axis
    return None


def _bounds(mask: Bool) -> tuple[slice, ...]:
    lines = [np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis))) for axis in range(mask.ndim)]
    return tuple(slice(int(line[0]), int(line[-1]) + 1) for line in lines)


def _mask_model(image: NDArray[np.float32], mask: Bool, spacing_mm: tuple[float, float]) -> Appearance | None:
    from scipy.ndimage import binary_dilation

    return Appearance.fit(image[mask], image[binary_dilation(mask, ball(15.0, spacing_mm)) & ~mask])


def _grow_slice(volume: Volume, previous: Bool, axis: int, out: Bool) -> None:
    spacing = _in_plane(volume, axis)
    bounds = _bounds(previous)
    key = bounds[axis].start
    pixels = tuple(span for i, span in enumerate(bounds) if i != axis)
    sizes = [n for i, n in enumerate(volume.grid.shape_zyx) if i != axis]
    crop = _cropped(pixels, sizes, spacing[1:])
    mask = np.moveaxis(previous, axis, 0)[(key, *crop)]
    read = _reader(volume, axis, crop)
    model = _mask_model(read(key), mask, (spacing[1], spacing[2]))
    masks = {key: mask}
    if model is not None:
        masks = propagate(read, (0, volume.grid.shape_zyx[axis]), key, Start(mask, model, 0.0), spacing, Propagation())
    _put(out, axis, crop, masks)


def _fit_mask(volume: Volume, previous: Bool, out: Bool) -> None:
    """A 3D mask moved to the edges near it, slice by slice; where intensities tell nothing apart it stays as it was."""
    axis = _coarse_axis(volume)
    spacing = _in_plane(volume, axis)
    in_plane = (spacing[1], spacing[2])
    bounds = _bounds(previous)
    sizes = [n for i, n in enumerate(volume.grid.shape_zyx) if i != axis]
    crop = _cropped(tuple(span for i, span in enumerate(bounds) if i != axis), sizes, spacing[1:])
    read = _reader(volume, axis, crop)
    masks = {}
    for index in range(bounds[axis].start, bounds[axis].stop):
        mask = np.moveaxis(previous, axis, 0)[(index, *crop)]
        if not mask.any():
            continue
        image = read(index)
        model = _mask_model(image, mask, in_plane)
        moved = None
        if model is not None:
            moved = clean(smooth(model.score(image), in_plane) + signed_mm(mask, in_plane) / max(in_plane) > 0, mask, in_plane)
        masks[index] = mask if moved is None or not moved.any() else moved
    _put(out, axis, crop, masks)


def _apply_points(volume: Volume, mask: Bool, points: Sequence[Point]) -> Bool:
    """Positive points outside the mask extend it, negative ones inside it carve it; afterwards each point lies on its own side."""
    shape, spacing = volume.grid.shape_zyx, volume.grid.spacing_zyx
    placed = [(tuple(_voxel(v, n) for v, n in zip(point.zyx, shape, strict=True)), point.positive) for point in points]
    wanted = [voxel for voxel, positive in placed if positive]
    unwanted = [voxel for voxel, positive in placed if not positive and voxel not in wanted]
    if not mask.any():
        return mask
    for voxel in wanted:
        if not mask[voxel]:
            window, local = _near(voxel, CLICK_MM + 10, mask.shape, spacing)
            mask[window] = extend(_window(volume, window), mask[window], local, CLICK_MM, spacing)
    for voxel in unwanted:
        if mask[voxel]:
            window, local = _near(voxel, CARVE_MM, mask.shape, spacing)
            part = mask[window]
            keep, drop = np.zeros_like(part), np.zeros_like(part)
            drop[local] = True
            for other in wanted:
                at = tuple(v - span.start for v, span in zip(other, window, strict=True))
                if all(0 <= v < n for v, n in zip(at, part.shape, strict=True)):
                    keep[at] = True
            mask[window] = carve(_window(volume, window), part, keep if keep.any() else _core(part, drop, spacing), drop, spacing)
            mask[voxel] = False
    return mask


def _near(
    voxel: tuple[int, ...], radius_mm: float, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> tuple[tuple[slice, ...], tuple[int, int, int]]:
    """The window within `radius_mm` of the voxel along each axis, and the voxel's place in it."""
    reach = [math.ceil(radius_mm / step) for step in spacing]
    window = tuple(slice(max(0, v - r), min(n, v + r + 1)) for v, r, n in zip(voxel, reach, shape, strict=True))
    z, y, x = (v - span.start for v, span in zip(voxel, window, strict=True))
    return window, (z, y, x)


def _window(volume: Volume, window: tuple[slice, ...]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(volume.array[window], dtype=np.float32)


def _core(mask: Bool, drop: Bool, spacing: tuple[float, float, float]) -> Bool:
    """The deepest voxels of the mask, weighed by their distance from the clicks to drop."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    away = np.minimum(distance_transform_edt(~drop, sampling=spacing), 40.0)
    worth = np.where(mask, depth * away, 0)
    return np.asarray((worth >= 0.7 * worth.max()) & mask & ~drop) if worth.max() > 0 else np.zeros_like(mask)
