"""From boxes, clicks and a mask before to a mask: one crop about what was pointed at, widened until the target fits, then a closer look.

Crops lie along the world's axes, as those of the text network do, and every crop is drawn twice, once mirrored left to right, and
averaged: what is on the left is drawn like what is on the right.

Where words came too and the whole scan fits one view, as a scan cut out around its target does, three opinions are averaged: the click
network's on the crop, its on the whole view, and what the words mean there, bent to the box and the clicks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.segmenters.nano import inputs
from seerseg.segmenters.nano.clicks import WINDOWS, ClickNetwork, Concepts, prompt_channels
from seerseg.segmenters.nano.inference import (
    CROP_MM,
    PRESENCE_THRESHOLD,
    Field,
    Float32,
    Scan,
    averaged,
    coarse_grid,
    isotropic,
    look,
    paint,
    picture,
)
from seerseg.segmenters.nano.network import NanoNetwork, normalise, side_of
from seerseg.segmenters.nano.obeying import implied, obeying
from seerseg.volume import Grid, Mask, Volume, resample

Bool = NDArray[np.bool_]
World = NDArray[np.float64]

SIDES = (32, 48)
"""A crop's sides, voxels."""
ROOM = 1.4
"""A crop's side is at least this much longer than what is pointed at."""
CLICK_MM = 24.0
"""What a click without a box or mask is thought to mean, at first."""
LOOKS = 6
"""A target that reaches the crop's faces is looked at again from farther, at most this often."""
CLOSER = 1.6
"""A crop this much coarser than the finest is followed by a finer one about the newest click."""
ZOOM = 2.5
TRUST_CT, TRUST_OTHER = 1.0, 0.5
"""How far the scan's own intensities are believed near the boundary; see `inference.paint`."""
EDIT_MM = 30.0
BALL, REACH, LEAST_REACH_MM = 1.3, 3.0, 6.0
"""Of a click's distance from the edge of the mask before: within the first it changes the mask always, within the second it may. Where a
box stands beside the clicks, the mask before was drawn from prompts too, and a click may change all of it (chosen on validation cases),
unless the target is too large to be seen as finely as the scan allows: a coarse crop would blur what finer ones have drawn."""
HELD = 4
RIM = 3
"""Voxels at the faces of a finer crop that are not believed."""
NEAR, FAR, SAID = 0.25, 0.25, 0.5
"""Weights of the logits: of the click network on the crop, on the whole view, and of the words (chosen on validation cases)."""
LEAST_OVERLAP = 0.25
"""Dice of what the words mean with the boxes (where they speak) or with the mask before, below which something else is pointed at."""
BEYOND_CROP = -12.0
"""Logit of the click network outside its crop about what is pointed at."""


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A crop seen plainly and mirrored: windows (2, 2, Z, Y, X), sight as `ClickNetwork.sight`, concepts of either."""

    grid: Grid
    windows: Tensor
    sight: list[Tensor]
    concepts: tuple[Concepts, Concepts]


class Desk:
    """One volume on the desk: its scaling, and the crops encoded so far. reuse: a crop that still fits serves the next prompt too, so that
    a session encodes the image once; without it what is drawn depends on the prompt alone."""

    def __init__(
        self,
        encoder: NanoNetwork,
        network: ClickNetwork,
        names: Tensor,
        volume: Volume,
        *,
        reuse: bool = False,
        presence: float = PRESENCE_THRESHOLD,
    ) -> None:
        """names (P, T): the known names, embedded; presence: below it what words mean is not in the scan."""
        self._encoder, self._network, self._names, self._reuse, self._presence = encoder, network, names, reuse, presence
        self._own_shape = volume.grid.shape_zyx
        self._volume = _thickened(volume)
        self._seen: Scan | None = None
        self._held: list[_Encoded] = []
        self._view: _Encoded | None = None
        self._said: dict[str, Float32 | None] = {}

    @torch.inference_mode()
    def hears(self, words: str, before: Mask | None) -> bool:
        """Whether words may count beside the mask before: that lies on more than one slice, the whole scan fits one view, and they mean
        something in it."""
        return bool(words) and _deep(before) and self._meant(words) is not None

    @torch.inference_mode()
    def draw(self, prompt: Prompt, words: str = "") -> Bool:
        """The mask (Z, Y, X) for a checked prompt with a box, a positive click or a mask that is not empty. words: they count where `hears`
        says so and what they mean overlaps the boxes and the mask before."""
        if self._volume.grid.shape_zyx != self._own_shape:
            prompt = _lifted(prompt, self._own_shape, self._volume.grid)
        prompt = _sliced(prompt, self._volume.grid.shape_zyx)
        mask = self._drawn(prompt, words)
        for positive in (False, True):
            for point in prompt.points:
                if point.positive is positive:
                    mask[tuple(min(n - 1, max(0, int(np.floor(v + 0.5)))) for v, n in zip(point.zyx, mask.shape, strict=True))] = positive
        if mask.shape != self._own_shape:
            mask = np.ascontiguousarray(mask[tuple(slice(1, 2) if n == 1 else slice(None) for n in self._own_shape)])
        return mask

    def _drawn(self, prompt: Prompt, words: str) -> Bool:
        """The mask, on the thickened volume."""
        scan = self._scan()
        meant = self._meant(words) if words and _deep(prompt.mask) else None
        field_lo, field_hi = _world_box(self._volume.grid, np.full(3, -0.5), np.array(self._volume.grid.shape_zyx) - 0.5)
        low, high = _pointed_at(self._volume.grid, prompt)
        if meant is not None and self._overlap(prompt, meant) >= LEAST_OVERLAP:
            return self._agreed(scan, prompt, meant, self._crop(scan, np.maximum(low, field_lo), np.minimum(high, field_hi)))
        for _ in range(LOOKS):
            low, high = np.maximum(low, field_lo), np.minimum(high, field_hi)
            crop = self._crop(scan, low, high)
            logits = self._look(crop, prompt, prompt.mask)
            wider = _beyond(crop.grid, logits, field_lo, field_hi)
            if wider is None:
                break
            low, high = np.minimum(low, wider[0]), np.maximum(high, wider[1])
        mask = self._paint(scan, crop.grid, logits)
        spacing = crop.grid.spacing_zyx[0]
        coarse = spacing > CLOSER * finest_mm(scan)
        if prompt.points and coarse:
            mask = self._closer(scan, prompt, mask, max(finest_mm(scan), spacing / ZOOM))
        if prompt.mask is not None and prompt.points and _deep(prompt.mask):
            everywhere = bool(prompt.boxes) and not coarse
            mask = edited(prompt.mask.array, mask, prompt.points, self._volume.grid.spacing_zyx, everywhere=everywhere)
        return mask

    def _agreed(self, scan: Scan, prompt: Prompt, meant: Float32, crop: _Encoded) -> Bool:
        """What the crop, the whole view and the words say together. meant: logits of the words on the view."""
        view = self._whole(scan)
        far = self._look(view, prompt, prompt.mask)
        near = np.asarray(resample(self._look(crop, prompt, prompt.mask), crop.grid, view.grid, order=1, fill=BEYOND_CROP))
        clicks = (*implied(meant, view.grid, self._volume.grid, prompt.boxes), *prompt.points)
        said = obeying(meant, view.grid, self._volume.grid, clicks)
        return self._paint(scan, view.grid, np.ascontiguousarray(NEAR * near + FAR * far + SAID * said, dtype=np.float32))

    def _overlap(self, prompt: Prompt, meant: Float32) -> float:
        """The smaller of both of LEAST_OVERLAP."""
        view, source = self._whole(self._scan()).grid, self._volume.grid
        found = 1 / (1 + np.exp(-meant.clip(-30, 30)))
        overlaps = [1.0]
        if prompt.boxes:
            box = prompt_channels(view, source, boxes=prompt.boxes, points=(), before=None)[2].numpy()
            overlaps.append(_soft_dice(found[box != 0], box[box != 0] > 0))
        if prompt.mask is not None:
            overlaps.append(_soft_dice(found, averaged(prompt.mask.array.view(np.uint8), source, view, 0.0)))
        return min(overlaps)

    def _meant(self, words: str) -> Float32 | None:
        """Logits of the words on the whole view, plain and mirrored, averaged; None when the scan does not fit one view or what they mean
        is not in it."""
        if words not in self._said:
            scan = self._scan()
            self._said[words] = self._decoded(scan, words) if _in_one_view(scan) else None
        return self._said[words]

    def _decoded(self, scan: Scan, words: str) -> Float32 | None:
        view, query = self._whole(scan), self._encoder.text([words])
        logits, seen = self._encoder.decode(*view.concepts[0].seen, query)
        if float(torch.sigmoid(seen[0])) < self._presence or not bool((logits > 0).any()):
            return None
        mirrored, _ = self._encoder.decode(*view.concepts[1].seen, self._encoder.text([_other_side(words)]))
        return np.ascontiguousarray((0.5 * (logits[0] + mirrored[0].flip(-1))).float().cpu().numpy())

    def _whole(self, scan: Scan) -> _Encoded:
        """All of the scan, on the grid on which words are read."""
        if self._view is None:
            self._view = self._encoded(scan, *coarse_grid(scan))
        return self._view

    def _scan(self) -> Scan:
        if self._seen is None:
            self._seen = look(self._volume)
        return self._seen

    def _closer(self, scan: Scan, prompt: Prompt, mask: Bool, spacing: float) -> Bool:
        """The mask with what a finer crop about the newest click shows."""
        source = self._volume.grid
        middle = source.to_world(np.array(prompt.points[-1].zyx))[::-1]
        half = SIDES[0] * spacing / ROOM / 2
        crop = self._crop(scan, middle - half, middle + half)
        logits = self._look(crop, prompt, Mask(mask, source))
        near = np.zeros(crop.grid.shape_zyx, dtype=np.float32)
        near[RIM:-RIM, RIM:-RIM, RIM:-RIM] = 1
        inside = np.asarray(resample(near, crop.grid, source, order=1, fill=0.0)) > 0.5
        return np.where(inside, self._paint(scan, crop.grid, logits), mask)

    def _crop(self, scan: Scan, low: World, high: World) -> _Encoded:
        """The encoded crop about a box of the world (z, y, x), mm."""
        spacing, grid = crop_grid(scan, low, high)
        for held in reversed(self._held):
            same = held.grid.shape_zyx == grid.shape_zyx and held.grid.close_to(grid, 1e-6)
            if same or (self._reuse and _fits(held.grid, spacing, low, high)):
                return held
        made = self._encoded(scan, spacing, grid)
        self._held = [*self._held[1 - HELD :], made]
        return made

    def _encoded(self, scan: Scan, spacing: float, grid: Grid) -> _Encoded:
        image, conditions = picture(self._encoder, scan, grid, spacing)
        mirror = image.flip(-1)
        mirror[:, WINDOWS] *= -1  # x, relative to the body
        both = torch.cat([image, mirror]).contiguous(memory_format=torch.channels_last_3d)
        features, pooled = self._encoder.image(both, conditions.expand(2, -1))
        plain, mirrored = (
            Concepts(self._encoder, [f[k : k + 1] for f in features], pooled[k : k + 1], both[k : k + 1, WINDOWS:], self._names)
            for k in (0, 1)
        )
        return _Encoded(grid, both[:, :WINDOWS], self._network.sight(features), (plain, mirrored))

    def _look(self, crop: _Encoded, prompt: Prompt, before: Mask | None) -> Float32:
        """Logits on the crop."""
        source = self._volume.grid
        share = None
        if before is not None and before.array.any():
            share = averaged(before.array.view(np.uint8), source, crop.grid, 0.0).clip(0, 1)
        channels = prompt_channels(crop.grid, source, boxes=prompt.boxes, points=prompt.points, before=share)
        both = torch.stack([channels, channels.flip(-1)]).to(crop.windows.device).contiguous(memory_format=torch.channels_last_3d)
        concept = torch.stack([known.best(one) for known, one in zip(crop.concepts, both, strict=True)])
        plain, mirrored = self._network(crop.windows, crop.sight, both, concept).float().cpu()
        return np.ascontiguousarray((0.5 * (plain + mirrored.flip(-1))).numpy())

    def _paint(self, scan: Scan, grid: Grid, logits: Float32) -> Bool:
        return paint(Field(grid, logits), self._volume, TRUST_CT if scan.modality == inputs.CT else TRUST_OTHER)


# ------------------------------------------------------------------------------------------------------------------ edits


def edited(
    before: Bool, drawn: Bool, points: tuple[Point, ...], spacing_mm: tuple[float, float, float], *, everywhere: bool = False
) -> Bool:
    """The mask before, changed by what was drawn about the clicks that contradict it, and there alone; `drawn` when none does.

    A click in the middle of an error lies as far from the error's edge as from the edge of the mask before, so the ball of that radius is
    the error's (BALL times it on validation cases). About it a positive click adds what was drawn, a negative one takes away what was not.
    everywhere: it does so wherever that is, not about it alone.
    """
    out: Bool | None = None
    for point in points:
        at = tuple(min(n - 1, max(0, int(np.floor(v + 0.5)))) for v, n in zip(point.zyx, before.shape, strict=True))
        if bool(before[at]) is point.positive:
            continue
        radius = _to_the_edge(before, at, spacing_mm)
        reach = float(np.linalg.norm(np.multiply(before.shape, spacing_mm))) if everywhere else max(REACH * radius, LEAST_REACH_MM)
        window = tuple(slice(max(0, v - int(reach / s) - 1), v + int(reach / s) + 2) for v, s in zip(at, spacing_mm, strict=True))
        axes = np.ogrid[tuple(slice(span.start, min(span.stop, n)) for span, n in zip(window, before.shape, strict=True))]
        away = np.sqrt(sum(((a - v) * s) ** 2 for a, v, s in zip(axes, at, spacing_mm, strict=True)))
        out = before.copy() if out is None else out
        part = out[window]
        part[((away <= reach) & (drawn[window] == point.positive)) | (away <= BALL * radius)] = point.positive
    return drawn if out is None else out


def _to_the_edge(mask: Bool, at: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> float:
    """Distance, mm, from a voxel to the nearest one on the other side of the mask, at most EDIT_MM."""
    window = tuple(slice(max(0, v - int(EDIT_MM / s) - 1), v + int(EDIT_MM / s) + 2) for v, s in zip(at, spacing_mm, strict=True))
    others = np.argwhere(mask[window] != mask[at])
    if not len(others):
        return EDIT_MM
    away = (others + [span.start for span in window] - np.array(at)) * spacing_mm
    return min(EDIT_MM, float(np.sqrt((away**2).sum(1).min())))


def _deep(mask: Mask | None) -> bool:
    """Whether there is a mask on more than one slice."""
    return mask is not None and bool(mask.array.any()) and _single(_extent(mask.array), mask.array.shape) is None


# ------------------------------------------------------------------------------------------------------------------- crops


def _in_one_view(scan: Scan) -> bool:
    """Whether words are read from the whole scan at once, about as finely as clicks are."""
    grid = scan.volume.grid
    extent = np.array(grid.shape_zyx) * grid.spacing_zyx
    return bool(extent.max() < CROP_MM) and coarse_grid(scan)[0] <= CLOSER * finest_mm(scan)


def _soft_dice(one: Float32, other: NDArray[Any]) -> float:
    return float(2 * (one * other).sum() / max(1e-6, float(one.sum() + other.sum())))


def _other_side(words: str) -> str:
    """The words for a mirrored scan: left and right exchanged."""
    swapped = {1: "right", 2: "left"}.get(side_of(words))
    return words if swapped is None else " ".join(swapped if side_of(word) in (1, 2) else word for word in normalise(words).split())


def finest_mm(scan: Scan) -> float:
    """The finest crop of a scan."""
    return max(1.0 if scan.modality == inputs.CT else 0.75, 0.7 * float(np.median(scan.volume.grid.spacing_zyx)))


def crop_grid(scan: Scan, low: World, high: World) -> tuple[float, Grid]:
    """Spacing in mm and grid of the crop about a box of the world (z, y, x): as fine as SIDES allow, the scan's own spacing when that is
    near. Then its voxels lie on the scan's, where axes agree."""
    source = scan.volume.grid
    extent = np.maximum(high - low, 1e-3)
    own = float(np.median(source.spacing_zyx))
    spacing = max(finest_mm(scan), ROOM * float(extent.max()) / SIDES[-1])
    if 0.7 <= spacing / own <= 1.3:
        spacing = own
    shape = [next((n for n in SIDES if 1.2 * e / spacing <= n), SIDES[-1]) for e in extent]
    centre = (low + high) / 2
    if spacing == own:
        centre = source.to_world(np.round(source.to_voxel(centre[::-1])))[::-1]
        return spacing, isotropic((centre - np.array(shape) // 2 * spacing).tolist(), spacing, shape)
    return spacing, isotropic((centre - (np.array(shape) - 1) / 2 * spacing).tolist(), spacing, shape)


def _fits(grid: Grid, spacing: float, low: World, high: World) -> bool:
    """Whether the crop shows the box with two voxels to spare, at about this spacing."""
    step = grid.spacing_zyx[0]
    origin = grid.affine[:3, 3][::-1]
    end = origin + (np.array(grid.shape_zyx) - 1) * step
    return bool(1 / 1.3 <= step / spacing <= 1.3 and (low >= origin + 2 * step).all() and (high <= end - 2 * step).all())


def _world_box(grid: Grid, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[World, World]:
    """The box of the world (z, y, x), mm, about a box of voxel coordinates."""
    ends = np.stack([low, high])
    corners = np.array([[ends[a][0], ends[b][1], ends[c][2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    world = grid.to_world(corners)[:, ::-1]
    return world.min(0), world.max(0)


def _pointed_at(grid: Grid, prompt: Prompt) -> tuple[World, World]:
    """The box of the world about boxes, the mask before and positive clicks. What is known on one slice alone is taken to be as deep as
    it is wide."""
    spacing = np.array(grid.spacing_zyx)
    spans: list[tuple[NDArray[np.float64], NDArray[np.float64], int | None]] = []
    for box in prompt.boxes:
        low, high = np.zeros(3), np.zeros(3)
        plane = [a for a in range(3) if not isinstance(box, Box2D) or a != box.axis]
        low[plane], high[plane] = np.array(box.lo) - 0.5, np.array(box.hi) - 0.5
        if isinstance(box, Box2D):
            low[box.axis] = high[box.axis] = box.index
        spans.append((low, high, box.axis if isinstance(box, Box2D) else None))
    if prompt.mask is not None and prompt.mask.array.any():
        lines = _extent(prompt.mask.array)
        spans.append(
            (np.array([low - 0.5 for low, _ in lines]), np.array([high - 0.5 for _, high in lines]), _single(lines, grid.shape_zyx))
        )
    bounds = []
    for low, high, axis in spans:
        if axis is not None and all(other is not None for _, _, other in spans):
            half = float(((high - low) * spacing)[[a for a in range(3) if a != axis]].max()) / 2 / spacing[axis]
            low[axis], high[axis] = low[axis] - half, high[axis] + half
        bounds.append(_world_box(grid, low, high))
    reach = 0.0 if spans else CLICK_MM / 2
    for point in prompt.points:
        if point.positive:
            world = grid.to_world(np.array(point.zyx))[::-1]
            bounds.append((world - reach, world + reach))
    return np.min([low for low, _ in bounds], axis=0), np.max([high for _, high in bounds], axis=0)


def _extent(mask: Bool) -> list[tuple[int, int]]:
    """First and one past the last index of a mask that is not empty, per axis."""
    lines = [np.flatnonzero(mask.any(axis=tuple(i for i in range(3) if i != a))) for a in range(3)]
    return [(int(line[0]), int(line[-1]) + 1) for line in lines]


def _single(lines: list[tuple[int, int]], shape: tuple[int, ...]) -> int | None:
    """The axis across which a mask of this extent lies on one slice of several."""
    return next((a for a, (low, high) in enumerate(lines) if high - low == 1 and shape[a] > 1), None)


def _sliced(prompt: Prompt, shape: tuple[int, ...]) -> Prompt:
    """A mask on one slice alone says where the target is not on that slice, as a box does: the prompt with that box."""
    if prompt.boxes or prompt.mask is None or not prompt.mask.array.any():
        return prompt
    lines = _extent(prompt.mask.array)
    axis = _single(lines, shape)
    if axis is None:
        return prompt
    plane = [line for a, line in enumerate(lines) if a != axis]
    box = Box2D(axis, lines[axis][0], (plane[0][0], plane[1][0]), (plane[0][1], plane[1][1]))
    return replace(prompt, boxes=(box,))


def _beyond(grid: Grid, logits: Float32, field_lo: World, field_hi: World) -> tuple[World, World] | None:
    """A wider box of the world when the target reaches faces of the crop with scan behind them; None when it does not."""
    found = logits > 0
    step = grid.spacing_zyx[0]
    low = grid.affine[:3, 3][::-1].copy()
    high = low + (np.array(grid.shape_zyx) - 1) * step
    wanted_lo, wanted_hi = (low + high) / 2, (low + high) / 2
    reached = False
    for axis in range(3):
        faces = np.moveaxis(found, axis, 0)
        least = max(3, 0.01 * faces[0].size)
        if np.count_nonzero(faces[0]) >= least and low[axis] - step > field_lo[axis]:
            wanted_lo[axis], reached = low[axis] - 0.35 * (high[axis] - low[axis]), True
        if np.count_nonzero(faces[-1]) >= least and high[axis] + step < field_hi[axis]:
            wanted_hi[axis], reached = high[axis] + 0.35 * (high[axis] - low[axis]), True
    return (wanted_lo, wanted_hi) if reached else None


# ---------------------------------------------------------------------------------------------------------- single slices


def _thickened(volume: Volume) -> Volume:
    """A volume of one slice as three such slices, together as deep as the slice is wide; any other as it is."""
    flat = [axis for axis, n in enumerate(volume.grid.shape_zyx) if n == 1]
    if not flat:
        return volume
    array, affine = volume.array, volume.grid.affine.copy()
    widest = max(n * s for n, s in zip(volume.grid.shape_zyx, volume.grid.spacing_zyx, strict=True))
    for axis in flat:
        column = 2 - axis
        affine[:3, column] *= widest / 3 / float(np.linalg.norm(affine[:3, column]))
        affine[:3, 3] -= affine[:3, column]
        array = np.repeat(array, 3, axis=axis)
    return Volume(array, Grid((array.shape[0], array.shape[1], array.shape[2]), affine), volume.modality, volume.channel, name=volume.name)


def _lifted(prompt: Prompt, shape: tuple[int, int, int], grid: Grid) -> Prompt:
    """The prompt for a volume of this shape on the grid of its thickened twin."""
    lift = np.array([float(n == 1) for n in shape])
    boxes: list[Box2D | Box3D] = []
    for box in prompt.boxes:
        axes = [a for a in range(3) if not isinstance(box, Box2D) or a != box.axis]
        lo = tuple(-1.0 if lift[a] else v for a, v in zip(axes, box.lo, strict=True))
        hi = tuple(4.0 if lift[a] else v for a, v in zip(axes, box.hi, strict=True))
        index = box.index + int(lift[box.axis]) if isinstance(box, Box2D) else 0
        boxes.append(Box2D(box.axis, index, lo, hi) if isinstance(box, Box2D) else Box3D(lo, hi))  # type: ignore[arg-type]
    points = tuple(Point(tuple(float(v) for v in np.array(p.zyx) + lift), p.positive) for p in prompt.points)  # type: ignore[arg-type]
    mask = prompt.mask
    if mask is not None:
        array = mask.array
        for axis in np.flatnonzero(lift):
            array = np.repeat(array, 3, axis=int(axis))
        mask = Mask(array, grid, mask.name)
    return Prompt(boxes=tuple(boxes), points=points, mask=mask)
