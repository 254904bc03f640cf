"""Evidence: what a scan shows of a target, computed from voxels and labels, and said in sentences that are true.

`survey` reads a case once (body, midline, boxes and contacts of all labels); `measure` then costs one crop per target; `sentences`
words a measurement for a reasoner. Directions are the patient's and decided in world millimetres (RAS: +x right, +y front, +z up), so
that the same anatomy gives the same words however its file was stored. What cannot be known is not said: no side without a midline, no
brightness where the target is on none of the slices shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError
from seerseg.views import CT_FLOOR, PLANES, ViewSpec, slice_indices, window_bounds
from seerseg.volume import Grid, Volume
from seerseg_data.statements import HOUNSFIELD, SHORT_TOKENS, Detail, hounsfield_word, numbers, scene_sentences, sentences, tokens

__all__ = [
    "BOTH_SIDES",
    "CONTRAST",
    "HOUNSFIELD",
    "ONE_SIDE",
    "SHORT_TOKENS",
    "TAIL",
    "TOUCHING_FACES",
    "Detail",
    "Evidence",
    "Part",
    "Relation",
    "Scene",
    "hounsfield_word",
    "measure",
    "numbers",
    "scene_sentences",
    "sentences",
    "survey",
    "tokens",
]

Bool = NDArray[np.bool_]

CONTRAST = 0.08
"""Difference of median grey (0..1 as shown) between a target and the shell around it from which it is called brighter or darker."""
SHELL_MM = 5.0
"""How far the shell reaches; it begins one pixel off the target."""
LEAST_PIXELS = 6
"""Of target and of shell, for a word about brightness."""
ONE_SIDE = 0.95
"""Share of a target's voxels beyond the midline from which it lies on that side."""
BOTH_SIDES = 0.20
"""Share of a target's voxels on its smaller side from which it lies on both sides."""
TAIL = 5.0
"""Per cent of a structure's voxels at either end that count for nothing when it is called above, below, beside another."""
DOMINANT = 0.7
"""Share of the distance between centres that must lie along the direction that is named."""
TOUCHING_FACES = 3
"""Voxel faces shared from which two structures touch."""
NEAR_MM = 100.0
"""Farther apart, a neighbour says nothing about where to look."""
LEAST_NEIGHBOUR = 20
"""Voxels of a neighbour that says something about where to look."""
NARROWEST_BODY_MM = 100.0
"""A narrower body is a limb or a crop, whose middle is not the body's midline."""
_FACES = (("bottom", "top"), ("back", "front"), ("left", "right"))
_DIRECTIONS = (("to the left of", "to the right of"), ("behind", "in front of"), ("below", "above"))  # world x, y, z
_THIRDS = (("lower", "middle", "upper"), ("back", "middle", "front"), ("left", "middle", "right"))  # z, y, x
# A picture has no patient's directions: its own are named, as displayed (rising y is up, rising x is left).
_PICTURE_FACES = (("", ""), ("bottom", "top"), ("right", "left"))
_PICTURE_DIRECTIONS = (("to the right of", "to the left of"), ("below", "above"), ("", ""))
_PICTURE_THIRDS = (("", "", ""), ("lower", "middle", "upper"), ("right", "middle", "left"))
_LIMBS = {"upper limb", "lower limb"}
_MOST_BODY = 96
_MOST_POINTS = 50_000


@dataclass(frozen=True)
class Relation:
    """Where the target lies as seen from a neighbour: where is "above", "in front of", ... or None; touches: they share faces."""

    other: str
    where: str | None
    touches: bool


@dataclass(frozen=True)
class Evidence:
    """What is known of one target of one case.

    Slices are counted from 1 in display order along `plane`: shown, of the `shown_of` slices that the view spec shows; shown_largest,
    the one with the largest area; first_slice to last_slice, of all `slices_of` slices of the scan, of which it is on `slices_with`.
    side: "left", "mostly left", "right", "mostly right", "both", "midline" or None when there is no midline to go by; thirds: for
    z, y, x the third of the body box that its centre lies in, None where it fills most of the box or sides are unknown. extent_mm:
    (z, y, x) along the grid's axes. contrast: "darker", "similar", "brighter" or None; hounsfield: median, of CT alone. pieces:
    connected components (26 neighbours); main_piece: the largest one's share. edges: faces of the field of view that it reaches.
    picture: directions are those of the picture, not of a patient.
    """

    name: str
    modality: str | None
    regions: tuple[str, ...]
    plane: str
    shown: tuple[int, ...]
    shown_largest: int | None
    shown_of: int
    first_slice: int
    last_slice: int
    slices_with: int
    slices_of: int
    side: str | None
    thirds: tuple[str | None, str | None, str | None]
    relations: tuple[Relation, ...]
    extent_mm: tuple[float, float, float]
    volume_ml: float | None
    contrast: str | None
    hounsfield: float | None
    pieces: int
    main_piece: float
    edges: tuple[str, ...]
    picture: bool = False


@dataclass(frozen=True)
class Part:
    """One label or union of labels as it lies in the case: world points (N, 3) of (at most `_MOST_POINTS` of) its voxels, x y z."""

    name: str
    values: frozenset[int]
    box: tuple[slice, slice, slice]
    voxels: int
    centre_mm: NDArray[np.float64]
    low_mm: NDArray[np.float64]
    high_mm: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scene:
    """One case, read once. midline_mm: world x, None when unknown; body_mm: (2, 3) low and high world x, y, z of what is imaged of the
    body; contacts: shared faces of pairs of label values; named: labels that have voxels here; sided: left and right are known;
    picture: a 2D image without patient's directions."""

    volume: Volume
    labels: NDArray[Any]
    spec: ViewSpec
    hounsfield: bool
    regions: tuple[str, ...]
    sided: bool
    midline_mm: float | None
    body_mm: NDArray[np.float64]
    boxes: Mapping[int, tuple[slice, slice, slice]]
    contacts: Mapping[tuple[int, int], int]
    named: tuple[Part, ...]
    picture: bool = False
    _grey: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """The case's canonical grid."""
        return self.volume.grid

    @property
    def shown(self) -> list[int]:
        """Slice indices that the view spec shows, rising."""
        return slice_indices(self.spec.count, self.grid.shape_zyx[self.spec.axis], self.spec.lo, self.spec.hi)

    def box(self, values: Sequence[int]) -> tuple[slice, slice, slice] | None:
        """The box of the union of label values, None when it has no voxel."""
        boxes = [self.boxes[v] for v in values if v in self.boxes]
        if not boxes:
            return None
        z, y, x = (slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3))
        return z, y, x

    def crop(self, values: Sequence[int], box: tuple[slice, slice, slice]) -> Bool:
        """The union of label values inside a box."""
        there = self.labels[box]
        return there == values[0] if len(values) == 1 else np.isin(there, np.asarray(sorted(values), dtype=there.dtype))

    def grey(self, index: int) -> NDArray[np.uint8]:
        """A slice along the viewing axis as it is shown, 0..255 per voxel."""
        if index not in self._grey:
            plane = np.asarray(self.volume.read_slice(self.spec.axis, index))
            low, high = window_bounds(self.volume, plane, self.spec.window)
            shown = (plane.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
            shown = np.clip(np.nan_to_num(shown, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
            self._grey[index] = np.rint(shown**self.spec.gamma * 255).astype(np.uint8)
        return self._grey[index]


def survey(
    volume: Volume,
    labels: NDArray[Any],
    names: Mapping[str, Sequence[int]],
    *,
    spec: ViewSpec,
    regions: Sequence[str] = (),
    hounsfield: bool | None = None,
    sided: bool = True,
    picture: bool = False,
) -> Scene:
    """Read a case once. labels: integers (Z, Y, X) on the volume's grid; names: canonical name -> label values.

    regions: of the body, as the vocabulary has them for what is labelled here; hounsfield: intensities are HU (None: when the modality
    is CT); sided: the file says which side is left; picture: a 2D image file. DatasetError when the label map is of another shape.
    """
    from scipy.ndimage import find_objects

    if labels.shape != volume.grid.shape_zyx:
        raise DatasetError(f"The label map of {volume.name or 'a case'} has shape {labels.shape}, its image {volume.grid.shape_zyx}.")
    flat = [axis for axis, n in enumerate(labels.shape) if n == 1]
    if len(flat) == 1 and spec.axis not in flat:
        spec = replace(spec, plane=PLANES[flat[0]])  # as `views.render` shows it
    wanted = sorted({int(v) for values in names.values() for v in values})
    in_hu = volume.modality == "CT" if hounsfield is None else hounsfield
    if labels.dtype.itemsize > 2 and int(labels.max(initial=0)) > 65535:
        boxes = {v: found for v in wanted if (found := _box_of(labels == v)) is not None}
    else:
        listed = find_objects(labels)
        boxes = {v: listed[v - 1] for v in wanted if 0 < v <= len(listed) and listed[v - 1] is not None}
    body, step_mm = (None, 0.0) if picture else _body(volume, in_hu)
    limb = bool(regions) and set(regions) <= _LIMBS
    scene = Scene(
        volume,
        labels,
        spec,
        in_hu,
        tuple(regions),
        sided or picture,
        _midline(body, step_mm, volume.grid) if sided and not limb else None,
        _body_box(body, volume.grid),
        boxes,
        _contacts(labels, boxes),
        (),
        picture,
    )
    return replace(scene, named=tuple(part for name, values in names.items() if (part := _part(scene, name, tuple(values))) is not None))


def measure(scene: Scene, name: str, values: Sequence[int]) -> Evidence | None:
    """The evidence of the union of label values; None when it has no voxel in this case."""
    target = _part(scene, name, tuple(values))
    if target is None:
        return None
    mask = scene.crop(tuple(values), target.box)
    axis, grid = scene.spec.axis, scene.grid
    area = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    start = target.box[axis].start
    shown = [(number, int(area[i - start])) for number, i in enumerate(scene.shown, 1) if 0 <= i - start < len(area) and area[i - start]]
    pieces, main = _pieces(mask)
    flat = grid.shape_zyx[axis] == 1
    return Evidence(
        name=name,
        modality=scene.volume.modality,
        regions=scene.regions,
        plane=scene.spec.plane,
        shown=tuple(number for number, _ in shown),
        shown_largest=max(shown, key=lambda s: s[1])[0] if shown else None,
        shown_of=len(scene.shown),
        first_slice=start + 1,
        last_slice=target.box[axis].stop,
        slices_with=int(np.count_nonzero(area)),
        slices_of=grid.shape_zyx[axis],
        side=_side(scene, target, mask),
        thirds=_thirds(scene, target),
        relations=_relations(scene, target),
        extent_mm=tuple((s.stop - s.start) * step for s, step in zip(target.box, grid.spacing_zyx, strict=True)),
        volume_ml=None if flat else target.voxels * grid.voxel_volume_mm3 / 1000.0,
        contrast=_contrast(scene, mask, target.box),
        hounsfield=_median_hu(scene, mask, target.box),
        pieces=pieces,
        main_piece=main,
        edges=tuple(
            word
            for a, words in enumerate(_PICTURE_FACES if scene.picture else _FACES)
            for word, reaches in zip(words, (target.box[a].start == 0, target.box[a].stop == grid.shape_zyx[a]), strict=True)
            if reaches and grid.shape_zyx[a] > 1 and (a < 2 or scene.sided)
        ),
        picture=scene.picture,
    )


# ------------------------------------------------------------------------------------------------------------------- a case


def _box_of(mask: Bool) -> tuple[slice, slice, slice] | None:
    lines = [np.flatnonzero(mask.any(axis=tuple(i for i in range(3) if i != axis))) for axis in range(3)]
    if not lines[0].size:
        return None
    z, y, x = (slice(int(line[0]), int(line[-1]) + 1) for line in lines)
    return z, y, x


def _body(volume: Volume, in_hu: bool) -> tuple[tuple[Bool, tuple[int, int, int]] | None, float]:
    """What is body, on every n-th voxel, with that n per axis; None when that cannot be told. Second: size of one step in mm."""
    from scipy.ndimage import binary_opening, label

    if volume.modality not in ("CT", "MR") or min(volume.grid.shape_zyx) < 2:
        return None, 0.0
    stride = tuple(max(1, math.ceil(n / _MOST_BODY)) for n in volume.grid.shape_zyx)
    coarse = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    high = volume.percentiles["99.5"]
    low = min(0.0, volume.percentiles["0.5"])  # air is 0 where nothing is negative, also when the scan is a crop without air
    solid = np.asarray(coarse > (-300.0 if in_hu else low + 0.12 * (high - low)))
    if min(solid.shape) >= 5:
        solid = binary_opening(solid)
    found, count = label(solid)
    if count == 0:
        return None, 0.0
    sizes = np.bincount(found.ravel())
    sizes[0] = 0
    keep = sizes >= 0.2 * sizes.max()
    keep[0] = False
    solid = keep[found]
    if np.count_nonzero(solid) < 0.02 * solid.size:
        return None, 0.0
    step = max(n * s for n, s in zip(stride, volume.grid.spacing_zyx, strict=True))
    return (solid, (stride[0], stride[1], stride[2])), step


def _midline(body: tuple[Bool, tuple[int, int, int]] | None, step_mm: float, grid: Grid) -> float | None:
    """World x of the middle of the body, None when the body leaves the field of view at a side or is too narrow to be one."""
    if body is None:
        return None
    solid, stride = body
    across = np.count_nonzero(solid, axis=(0, 1))
    if max(int(across[0]), int(across[-1])) > 0.05 * int(across.max()):
        return None
    middles, widths = [], []
    for z in range(solid.shape[0]):
        columns = np.flatnonzero(solid[z].any(axis=0))
        if columns.size:
            rows = np.flatnonzero(solid[z].any(axis=1))
            y = (rows[0] + rows[-1]) / 2 * stride[1]
            ends = grid.to_world([[z * stride[0], y, columns[0] * stride[2]], [z * stride[0], y, columns[-1] * stride[2]]])[:, 0]
            middles.append(float(ends.mean()))
            widths.append(float(np.ptp(ends)))
    return float(np.median(middles)) if np.median(widths) + step_mm >= NARROWEST_BODY_MM else None


def _body_box(body: tuple[Bool, tuple[int, int, int]] | None, grid: Grid) -> NDArray[np.float64]:
    """Low and high world x, y, z of the body, of the field of view where the body is not known."""
    if body is None:
        top = np.array(grid.shape_zyx) - 0.5
        corners = grid.to_world([[a, b, c] for a in (-0.5, top[0]) for b in (-0.5, top[1]) for c in (-0.5, top[2])])
        return np.stack([corners.min(axis=0), corners.max(axis=0)])
    solid, stride = body
    world = grid.to_world(np.argwhere(solid) * np.array(stride))
    half = np.array(grid.spacing_zyx[::-1]) * np.array(stride[::-1]) / 2
    return np.stack([world.min(axis=0) - half, world.max(axis=0) + half])


def _contacts(labels: NDArray[Any], boxes: Mapping[int, Any]) -> dict[tuple[int, int], int]:
    """Pairs of label values (rising) -> voxel faces that they share."""
    found: dict[tuple[int, int], int] = {}
    if len(boxes) < 2:
        return found
    z, y, x = (slice(min(b[a].start for b in boxes.values()), max(b[a].stop for b in boxes.values())) for a in range(3))
    inner = labels[z, y, x]
    for axis in range(3):
        first, second = np.moveaxis(inner, axis, 0)[:-1], np.moveaxis(inner, axis, 0)[1:]
        meet = (first != second) & (first != 0) & (second != 0)
        pairs = np.sort(np.stack([first[meet], second[meet]]).astype(np.int64), axis=0)
        codes, counts = np.unique(pairs[0] * (2**32) + pairs[1], return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            pair = (code >> 32, code & 0xFFFFFFFF)
            found[pair] = found.get(pair, 0) + count
    return found


def _part(scene: Scene, name: str, values: tuple[int, ...]) -> Part | None:
    box = scene.box(values)
    if box is None:
        return None
    mask = scene.crop(values, box)
    flat = np.flatnonzero(mask)
    if not flat.size:
        return None
    taken = flat[:: max(1, math.ceil(flat.size / _MOST_POINTS))]
    zyx = np.stack(np.unravel_index(taken, mask.shape), axis=1) + np.array([s.start for s in box])
    world = scene.grid.to_world(zyx)
    low, high = np.percentile(world, (TAIL, 100 - TAIL), axis=0)
    return Part(name, frozenset(values), box, int(flat.size), world.mean(axis=0), low, high)


# ---------------------------------------------------------------------------------------------------------------- one target


def _side(scene: Scene, target: Part, mask: Bool) -> str | None:
    if scene.midline_mm is None:
        return None
    flat = np.flatnonzero(mask)
    zyx = np.stack(np.unravel_index(flat[:: max(1, math.ceil(flat.size / _MOST_POINTS))], mask.shape), axis=1)
    x = scene.grid.to_world(zyx + np.array([s.start for s in target.box]))[:, 0]
    right = float(np.mean(x > scene.midline_mm))
    margin = 0.02 * float(scene.body_mm[1, 0] - scene.body_mm[0, 0])
    if abs(float(target.centre_mm[0]) - scene.midline_mm) > margin and max(right, 1 - right) >= ONE_SIDE:
        return "right" if right > 0.5 else "left"
    if min(right, 1 - right) >= BOTH_SIDES:
        narrow = float(target.high_mm[0] - target.low_mm[0]) <= 4 * margin
        return "midline" if narrow else "both"
    return None if abs(float(target.centre_mm[0]) - scene.midline_mm) <= margin else "mostly right" if right > 0.5 else "mostly left"


def _thirds(scene: Scene, target: Part) -> tuple[str | None, str | None, str | None]:
    low, high = scene.body_mm
    found: list[str | None] = []
    for axis, world in enumerate((2, 1, 0)):
        size = float(high[world] - low[world])
        unknown = scene.grid.shape_zyx[axis] == 1 or (world == 0 and scene.midline_mm is None and not scene.picture)
        if unknown or float(target.high_mm[world] - target.low_mm[world]) > 0.6 * size:
            found.append(None)
            continue
        share = (float(target.centre_mm[world]) - float(low[world])) / size
        found.append((_PICTURE_THIRDS if scene.picture else _THIRDS)[axis][min(2, max(0, math.floor(3 * share)))])
    return found[0], found[1], found[2]


def _relations(scene: Scene, target: Part) -> tuple[Relation, ...]:
    """Neighbours that it can be placed by: those it touches first, then the nearest."""
    found: list[tuple[tuple[int, float], Relation]] = []
    for other in scene.named:
        if other.values & target.values or other.voxels < LEAST_NEIGHBOUR:
            continue
        faces = sum(scene.contacts.get((min(a, b), max(a, b)), 0) for a in target.values for b in other.values)
        step = target.centre_mm - other.centre_mm
        distance = float(np.linalg.norm(step))
        axis = int(np.argmax(np.abs(step)))
        where = None
        if distance > 0 and abs(float(step[axis])) >= DOMINANT * distance and (axis > 0 or scene.sided):
            up = step[axis] > 0
            apart = target.low_mm[axis] >= other.high_mm[axis] if up else target.high_mm[axis] <= other.low_mm[axis]
            where = (_PICTURE_DIRECTIONS if scene.picture else _DIRECTIONS)[axis][int(up)] if apart else None
        touches = faces >= TOUCHING_FACES
        if (where and distance <= NEAR_MM) or touches:
            found.append(((0 if touches and where else 1, distance), Relation(other.name, where, touches)))
    return tuple(relation for _, relation in sorted(found, key=lambda item: (item[0], item[1].other)))[:4]


def _contrast(scene: Scene, mask: Bool, box: tuple[slice, slice, slice]) -> str | None:
    """Against the shell around it on the slices shown, as grey as it is shown there."""
    from scipy.ndimage import binary_dilation, generate_binary_structure

    axis = scene.spec.axis
    spacing = [s for a, s in enumerate(scene.grid.spacing_zyx) if a != axis]
    sizes = [n for a, n in enumerate(scene.grid.shape_zyx) if a != axis]
    spans = [s for a, s in enumerate(box) if a != axis]
    reach = min(8, max(2, round(SHELL_MM / min(spacing)) + 1))
    crop = tuple(slice(max(0, s.start - reach), min(n, s.stop + reach)) for s, n in zip(spans, sizes, strict=True))
    inside: list[NDArray[np.uint8]] = []
    around: list[NDArray[np.uint8]] = []
    for index in scene.shown:
        if not box[axis].start <= index < box[axis].stop:
            continue
        plane = np.moveaxis(mask, axis, 0)[index - box[axis].start]
        wide = np.pad(plane, [(s.start - c.start, c.stop - s.stop) for s, c in zip(spans, crop, strict=True)])
        grown = binary_dilation(wide, generate_binary_structure(2, 1), iterations=reach)
        ring = grown & ~binary_dilation(wide, generate_binary_structure(2, 2))
        if scene.hounsfield:  # padding outside a scanner's field is no surroundings
            ring &= np.asarray(scene.volume.read_slice(axis, index))[crop] >= CT_FLOOR
        grey = scene.grey(index)[crop]
        inside.append(grey[wide])
        around.append(grey[ring])
    if sum(map(len, inside)) < LEAST_PIXELS or sum(map(len, around)) < LEAST_PIXELS:
        return None
    step = (float(np.median(np.concatenate(inside))) - float(np.median(np.concatenate(around)))) / 255
    return "similar" if abs(step) < CONTRAST else "brighter" if step > 0 else "darker"


def _median_hu(scene: Scene, mask: Bool, box: tuple[slice, slice, slice]) -> float | None:
    if not scene.hounsfield:
        return None
    values = scene.volume.array[box][mask]
    return float(np.median(values[:: max(1, values.size // _MOST_POINTS)]))


def _pieces(mask: Bool) -> tuple[int, float]:
    from scipy.ndimage import label

    found, count = label(mask, structure=np.ones((3, 3, 3)))
    return int(count), float(np.bincount(found.ravel())[1:].max() / np.count_nonzero(mask))
