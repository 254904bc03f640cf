"""`medsam2`: boxes, points or a mask on key slices, propagated through the volume by SAM2's memory (MedSAM2, or any SAM2 video model).

The slices along any one axis are a film; an object is marked on one or more of them and followed both ways. Each direction starts from
the marked slices alone, as MedSAM2's own script does by a reset between them, and ends where the object's score says that it is gone.

`medsam2:SOURCE?name=value&name=value` takes: window (centre,width), slices (first,one past the last), stop_after (slices without the
object after which a direction ends, or never), joined (boxes of a slice are one object: on or off), memo_mb (image features that are kept).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SegmenterError
from seerseg.prompts import Box2D, Box3D, Point, Prompt, box_voxels
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, answered, check_licence, refusal
from seerseg.segmenters.closed import split_source, switch
from seerseg.segmenters.sam2_network import Found, Marks, Network, Sam2Network, Track
from seerseg.segmenters.slices import (
    box_pixels,
    grey_scale,
    in_plane,
    mask_from_logits,
    mask_to_square,
    nearest_slice,
    point_pixels,
    read_window,
    slice_axis,
    squared,
)
from seerseg.volume import Volume

VERSION = "medsam2-1"
"""Changes whenever the masks of the same weights do."""
LICENCE = "terms that allow research and education only, as far as we know (the model card at wanglab/MedSAM2 says what holds)"
MEDSAM2_PX = 512
MEMO_BYTES = 2**30
"""Image features held for the volume that was asked about last."""


@dataclass(frozen=True)
class Propagation:
    """slices: first and one past the last slice looked at, None for all. stop_after: end a direction after that many slices in a row
    without the object, None for never. joined: all boxes of a prompt on one slice are one object, not one each."""

    slices: tuple[int, int] | None = None
    stop_after: int | None = 3
    joined: bool = False


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, accept_license: bool = False
) -> Medsam2Segmenter:
    """MedSAM2 from a transformers folder or hub id, its original .pt, or HUB_ID/FILE.pt; None: the hub's latest, where it is here.

    ModelError where these are MedSAM2's weights, by their name or their network (it sees 512 px, SAM2's 1024), and their licence is not
    accepted; UsageError for an option that there is not (see the module)."""
    place, given = split_source(str(source or ""), _READERS, "the segmenter medsam2")
    propagation = Propagation(**{name: given[name] for name in ("slices", "stop_after", "joined") if name in given})
    from seerseg.segmenters.sam2_weights import load_sam2

    if not place or "medsam2" in "/".join(Path(place).parts[-2:]).casefold():
        check_licence("MedSAM2's weights", LICENCE, accepted=accept_license)
    loaded = load_sam2(place or None, device=device, dtype=dtype, offline=offline)
    if loaded.model.config.image_size == MEDSAM2_PX:
        check_licence(f"MedSAM2's weights ({place})", LICENCE, accepted=accept_license)
    return Medsam2Segmenter(
        Sam2Network(loaded.model),
        identity=f"{loaded.identity}-{dtype or 'float32'}",
        source=str(loaded.folder),
        window=given.get("window"),
        propagation=propagation,
        memo_bytes=given.get("memo_mb", MEMO_BYTES >> 20) << 20,
    )


def _range(value: str) -> tuple[int, int]:
    first, comma, last = value.partition(",")
    if not (comma and first.strip().isdigit() and last.strip().isdigit() and int(first) < int(last)):
        raise ValueError("write the first slice and one past the last, such as 10,60")
    return int(first), int(last)


def _stop(value: str) -> int | None:
    if value.casefold() == "never":
        return None
    if not value.isdigit() or int(value) < 1:
        raise ValueError("write a number of slices from 1 on, or never")
    return int(value)


def _megabytes(value: str) -> int:
    if not value.isdigit():
        raise ValueError("write a whole number of megabytes")
    return int(value)


_READERS = {"window": read_window, "slices": _range, "stop_after": _stop, "joined": switch, "memo_mb": _megabytes}


class Medsam2Segmenter:
    """Boxes, points or a mask -> 3D mask; see the module.

    Every box is an object of its own (unless `joined`); a Box3D is marked on its middle slice across the widest spacing and bounds the
    slices. Points refine the box nearest to them; without a box or mask, all points are one object on the slices across the widest
    spacing. A mask on one slice is followed across that slice's axis, a 3D mask from its largest slice. A negative point on a slice
    without other marks corrects what was found there, and what lies beyond. Slices are read and encoded one by one, each once for all
    prompts of a call; the features of the last volume are kept up to `memo_bytes`. window: centre and width, None as MedSAM2 chooses.
    """

    def __init__(
        self,
        network: Network,
        *,
        identity: str = "unnamed",
        source: str = "",
        window: tuple[float, float] | None = None,
        propagation: Propagation = Propagation(),
        memo_bytes: int = MEMO_BYTES,
    ) -> None:
        self._network = network
        self._window = window
        self._propagation = propagation
        self._memo_bytes = memo_bytes
        self._memo: _Slices | None = None
        self._lock = threading.RLock()
        self._card = ModelCard(
            name="medsam2",
            identity=f"{VERSION}-{identity}-{window}-{propagation}",
            code_licence="Apache-2.0",
            weights_licence=f"MedSAM2's: {LICENCE}; other weights: as their card says",
            source=source,
        )

    @property
    def capabilities(self) -> Capabilities:
        """All spatial kinds and sessions; the object's score on its key slice is the presence."""
        return Capabilities(box2d=True, box3d=True, points=True, previous_mask=True, session=True, presence=True)

    @property
    def card(self) -> ModelCard:
        """Where the weights come from."""
        return self._card

    def release(self) -> None:
        """Forget the features of the last volume."""
        self._memo = None

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order; all objects of one axis are followed side by side."""
        started = time.perf_counter()
        scenes: list[_Scene | Segmentation] = []
        with self._lock, _memory_sentence(self):
            slices = self._slices(volume) if prompts else None
            for prompt in prompts:
                refused = refused_prompt(self, volume, prompt)
                if refused is None and slices is not None:
                    scene = _Scene(slices, self._propagation)
                    scene.mark(prompt)
                    scenes.append(scene)
                elif refused is not None:
                    scenes.append(refused)
            made = [scene for scene in scenes if isinstance(scene, _Scene)]
            _run(made)
            seconds = (time.perf_counter() - started) / max(1, len(made))
            return [
                scene.answer(prompt, seconds) if isinstance(scene, _Scene) else scene for scene, prompt in zip(scenes, prompts, strict=True)
            ]

    def session(self, volume: Volume) -> Medsam2Session:
        """A session that keeps the memory of its objects: clicks correct what was found, boxes add objects, a mask begins anew."""
        return Medsam2Session(self, volume)

    def _slices(self, volume: Volume) -> _Slices:
        if self._memo is None or self._memo.key != volume.content_hash:
            self._memo = _Slices(self._network, volume, self._window, self._memo_bytes)
        return self._memo

    def open_scene(self, volume: Volume) -> _Scene:
        """An empty scene on the volume, for sessions."""
        with self._lock:
            return _Scene(self._slices(volume), self._propagation)

    def advance(self, scene: _Scene, prompt: Prompt) -> Segmentation:
        """Mark, follow and answer, for sessions."""
        started = time.perf_counter()
        with self._lock, _memory_sentence(self):
            scene.mark(prompt)
            _run([scene])
            return scene.answer(prompt, time.perf_counter() - started)


class Medsam2Session:
    """Several turns on one volume. Undo returns to the state before the last turn that counted; refused turns do not count."""

    def __init__(self, segmenter: Medsam2Segmenter, volume: Volume) -> None:
        self._segmenter = segmenter
        self._volume: Volume | None = volume
        self._turns: list[tuple[_Scene, Segmentation]] = []

    def add(self, prompt: Prompt) -> Segmentation:
        """The mask of all objects with the prompt taken into account."""
        if self._volume is None:
            raise SegmenterError("The segmentation session is closed; open a new one.")
        begun = bool(self._turns) and prompt.mask is None
        refused = refused_prompt(self._segmenter, self._volume, prompt, begun=begun)
        if refused is not None:
            return refused
        scene = self._turns[-1][0].copy() if begun else self._segmenter.open_scene(self._volume)
        made = self._segmenter.advance(scene, prompt)
        self._turns.append((scene, made))
        return made

    def undo(self) -> Segmentation | None:
        """Forget the last turn."""
        if self._turns:
            self._turns.pop()
        return self._turns[-1][1] if self._turns else None

    def close(self) -> None:
        """Release the volume and the memory of its objects."""
        self._volume = None
        self._turns.clear()


def refused_prompt(segmenter: Medsam2Segmenter, volume: Volume, prompt: Prompt, *, begun: bool = False) -> Segmentation | None:
    """Why the prompt cannot be tried, or None. begun: there is an object already, so negative points alone will do."""
    refused = refusal(segmenter.card.name, segmenter.capabilities, volume, prompt)
    if refused is not None:
        return refused
    message = ""
    if prompt.mask is not None and not prompt.mask.array.any():
        message = "The previous mask is empty: give a mask with voxels, a box or a point."
    elif not (begun or prompt.boxes or prompt.mask is not None or any(point.positive for point in prompt.points)):
        message = "Negative points alone do not say where the target is: add a positive point, a box or a mask."
    return Segmentation(prompt, "unsupported", message=message, nearest=segmenter.capabilities.kinds) if message else None


# ------------------------------------------------------------------------------------------------------- objects on a volume


class _Slices:
    """The slices of one volume and their features, each encoded once while `memo_bytes` last (the longest unused are dropped)."""

    def __init__(self, network: Network, volume: Volume, window: tuple[float, float] | None, memo_bytes: int) -> None:
        self.network = network
        self.volume = volume
        self.key = volume.content_hash
        self._grey = grey_scale(volume, window)
        self._limit = memo_bytes
        self._held: OrderedDict[tuple[int, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def features(self, axis: int, index: int) -> Any:
        key = (axis, index)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        image = squared(self._grey(self.volume.read_slice(axis, index)), self.network.size_px)
        features, size = self.network.encode(image)
        self._held[key] = features, size
        self._bytes += size
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1][1]
        return features


@dataclass(eq=False)
class _Object:
    """One object: its axis, the slices it may be on, what was marked where, and what was found."""

    axis: int
    span: tuple[int, int]
    forward: Track
    backward: Track
    lo: tuple[float, ...] = ()
    hi: tuple[float, ...] = ()
    """Box (z, y, x) that stands for the object when points look for theirs."""
    marks: dict[int, Marks] = field(default_factory=dict)
    found: dict[int, Found] = field(default_factory=dict)
    later: dict[int, Marks] = field(default_factory=dict)
    """Corrections that wait until the object was followed."""
    scores: dict[int, float] = field(default_factory=dict)
    """Of the marked slices, -1 for those of a joined object."""

    def copy(self) -> _Object:
        twin = _Object(self.axis, self.span, self.forward.copy(), self.backward.copy(), self.lo, self.hi)
        twin.marks, twin.found, twin.scores = dict(self.marks), dict(self.found), dict(self.scores)
        return twin

    def mark(self, slices: _Slices, index: int, marks: Marks, *, correction: bool) -> None:
        """Marks on a slice join those made there before. correction: the object was followed already."""
        before = self.marks.get(index)
        if before is not None and marks.mask is None:
            marks = Marks(np.concatenate([before.points, marks.points]), np.concatenate([before.labels, marks.labels]))
        features = slices.features(self.axis, index)
        known = correction or (before is not None and before.mask is not None)
        previous = self.found.get(index) if known else None
        found = self.forward.mark(index, features, marks, previous=previous, conditioned=correction and before is None)
        self.backward.adopt(self.forward, index)
        self.marks[index], self.found[index] = marks, found
        if marks.mask is None:
            self.scores[index] = found.score

    def rewind(self) -> None:
        """Forget what was followed; marked slices stay."""
        self.found = {index: self.found[index] for index in self.marks}


class _Scene:
    """The objects of one prompt or session."""

    def __init__(self, slices: _Slices, propagation: Propagation) -> None:
        self.slices = slices
        self.propagation = propagation
        self.objects: list[_Object] = []

    def copy(self) -> _Scene:
        twin = _Scene(self.slices, self.propagation)
        twin.objects = [one.copy() for one in self.objects]
        return twin

    def mark(self, prompt: Prompt) -> None:
        """Mark what the prompt names on its slices; nothing is followed yet. Corrections of what is not yet found wait."""
        fresh: list[_Object] = []
        if prompt.mask is not None:
            fresh.append(self._from_mask(prompt.mask.array))
        fresh += self._from_boxes(prompt.boxes)
        known = [*self.objects, *fresh]
        self.objects = known
        spacing = self.slices.volume.grid.spacing_zyx
        if prompt.points:
            if known:
                groups: dict[int, list[Point]] = {}
                for point in prompt.points:
                    groups.setdefault(min(range(len(known)), key=lambda i: _distance_mm(known[i], point, spacing)), []).append(point)
                for number, points in groups.items():
                    self._points(known[number], points, followed=known[number] not in fresh)
            else:
                one = self._new(slice_axis(self.slices.volume))
                placed = [point.zyx for point in prompt.points if point.positive]
                one.lo, one.hi = tuple(np.min(placed, axis=0)), tuple(np.max(placed, axis=0))
                self.objects = [one]
                self._points(one, prompt.points, followed=False)

    def _new(self, axis: int, span: tuple[int, int] | None = None) -> _Object:
        depth = self.slices.volume.grid.shape_zyx[axis]
        low, high = span or (0, depth)
        if self.propagation.slices is not None:
            low, high = max(low, self.propagation.slices[0]), min(high, self.propagation.slices[1])
        return _Object(axis, (low, high), self.slices.network.track(depth), self.slices.network.track(depth))

    def _plane(self, axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of a slice, and the network's."""
        return in_plane(self.slices.volume.grid.shape_zyx, axis), (self.slices.network.size_px, self.slices.network.size_px)

    def _from_mask(self, mask: NDArray[np.bool_]) -> _Object:
        counts = [mask.sum(axis=tuple(i for i in range(3) if i != axis)) for axis in range(3)]
        axis = next((a for a in range(3) if mask.shape[a] > 1 and np.count_nonzero(counts[a]) == 1), slice_axis(self.slices.volume))
        one = self._new(axis)
        index = int(counts[axis].argmax())
        lines = [np.flatnonzero(count) for count in counts]
        one.lo, one.hi = tuple(line[0] - 0.5 for line in lines), tuple(line[-1] + 0.5 for line in lines)
        shown = mask_to_square(np.take(mask, index, axis=axis), self.slices.network.size_px)
        one.mark(self.slices, index, Marks(np.zeros((0, 2), np.float32), np.zeros(0, np.int32), shown), correction=False)
        return one

    def _from_boxes(self, boxes: Iterable[Box2D | Box3D]) -> list[_Object]:
        shape = self.slices.volume.grid.shape_zyx
        made: list[_Object] = []
        for box in boxes:
            if isinstance(box, Box2D):
                axis, index, span, lo, hi = box.axis, box.index, None, box.lo, box.hi
                whole = list(lo), list(hi)
                whole[0].insert(axis, index)
                whole[1].insert(axis, index + 1)
            else:
                axis = slice_axis(self.slices.volume)
                depth = box_voxels(box.lo, box.hi, shape)[axis]
                span, index = (depth.start, depth.stop), (depth.start + depth.stop - 1) // 2
                lo, hi = in_plane(box.lo, axis), in_plane(box.hi, axis)
                whole = list(box.lo), list(box.hi)
            x0, y0, x1, y1 = box_pixels(lo, hi, *self._plane(axis))
            one = self._new(axis, span)
            one.lo, one.hi = (tuple(edge - 0.5 for edge in edges) for edges in whole)
            corners = Marks(np.array([[x0, y0], [x1, y1]], np.float32), np.array([2, 3], np.int32))
            one.mark(self.slices, index, corners, correction=False)
            made.append(one)
        return self._join(made) if self.propagation.joined else made

    def _join(self, objects: list[_Object]) -> list[_Object]:
        """Objects on the same slice as one, marked there by the union of their masks."""
        groups: dict[tuple[int, int], list[_Object]] = {}
        for one in objects:
            groups.setdefault((one.axis, next(iter(one.marks))), []).append(one)
        made = []
        for (axis, index), group in groups.items():
            if len(group) == 1:
                made += group
                continue
            size = self.slices.network.size_px
            one = self._new(axis, (min(g.span[0] for g in group), max(g.span[1] for g in group)))
            one.lo, one.hi = tuple(np.min([g.lo for g in group], axis=0)), tuple(np.max([g.hi for g in group], axis=0))
            one.scores = {-1: max(score for g in group for score in g.scores.values())}
            whole = np.zeros((size, size), dtype=np.bool_)
            for found in (g.found[index] for g in group):
                if found.there:
                    whole |= mask_from_logits(found.logits, (size, size))[::-1, ::-1]
            one.mark(self.slices, index, Marks(np.zeros((0, 2), np.float32), np.zeros(0, np.int32), whole), correction=False)
            made.append(one)
        return made

    def _points(self, one: _Object, points: Sequence[Point], *, followed: bool) -> None:
        shape = self.slices.volume.grid.shape_zyx
        groups: dict[int, list[Point]] = {}
        for point in points:
            groups.setdefault(nearest_slice(point.zyx[one.axis], shape[one.axis]), []).append(point)
        corrections: dict[int, Marks] = {}
        for index, group in sorted(groups.items(), key=lambda item: not any(p.positive for p in item[1])):
            places = [point_pixels(in_plane(p.zyx, one.axis), *self._plane(one.axis)) for p in group]
            marks = Marks(np.array(places, np.float32), np.array([int(p.positive) for p in group], np.int32))
            if followed or index in one.marks:
                one.mark(self.slices, index, marks, correction=followed)
            elif any(p.positive for p in group):
                one.mark(self.slices, index, marks, correction=False)
            else:
                corrections[index] = marks
        one.span = min(one.span[0], *one.marks), max(one.span[1], *(i + 1 for i in one.marks))
        one.later = corrections
        if followed:
            one.rewind()

    def answer(self, prompt: Prompt, seconds: float) -> Segmentation:
        """The union of all objects on the volume's own grid."""
        out = np.zeros(self.slices.volume.grid.shape_zyx, dtype=np.bool_)
        for one in self.objects:
            view = np.moveaxis(out, one.axis, 0)
            for index, found in one.found.items():
                if found.there:
                    view[index] |= mask_from_logits(found.logits, view[index].shape)
        scores = [score for one in self.objects for score in one.scores.values()]
        presence = float(1 / (1 + np.exp(-np.clip(max(scores), -30, 30)))) if scores else None
        message = "" if out.any() else "The network sees nothing there."
        return answered(self.slices.volume, prompt, out, presence=presence, message=message, seconds=seconds)


def _distance_mm(one: _Object, point: Point, spacing: Sequence[float]) -> float:
    """From the object's box to the point across its slices' plane; the way along the slices only decides between equals."""
    away = [max(lo - v, v - hi, 0.0) * step for v, lo, hi, step in zip(point.zyx, one.lo, one.hi, spacing, strict=True)]
    return float(np.hypot(*in_plane(away, one.axis))) + 1e-3 * away[one.axis]


def _run(scenes: Sequence[_Scene]) -> None:
    """Follow all objects, make the corrections that waited, and follow those objects again."""
    pairs = [(scene, one) for scene in scenes for one in scene.objects if one.marks]
    _follow_all([(s, o) for s, o in pairs if len(o.found) == len(o.marks)])
    waiting = [(s, o) for s, o in pairs if o.later]
    for scene, one in waiting:
        one.forward, one.backward = one.forward.copy(), one.backward.copy()
        for index, marks in one.later.items():
            one.mark(scene.slices, index, marks, correction=True)
        one.later = {}
        one.rewind()
    _follow_all(waiting)


def _follow_all(pairs: Sequence[tuple[_Scene, _Object]]) -> None:
    for axis in range(3):
        here = [(scene, one) for scene, one in pairs if one.axis == axis]
        for reverse in (False, True):
            runs = [_Run(scene, one, reverse) for scene, one in here]
            low, high = min((r.one.span[0] for r in runs), default=0), max((r.one.span[1] for r in runs), default=0)
            for index in reversed(range(low, high)) if reverse else range(low, high):
                for run in runs:
                    run.step(index)


class _Run:
    """One object on its way along the slices."""

    def __init__(self, scene: _Scene, one: _Object, reverse: bool) -> None:
        self.scene, self.one, self.reverse = scene, one, reverse
        self._start = min(one.marks)
        self._last = min(one.marks) if reverse else max(one.marks)
        self._absent = 0
        self._track = one.backward if reverse else one.forward

    def step(self, index: int) -> None:
        one, stop = self.one, self.scene.propagation.stop_after
        beyond = index < self._start if self.reverse else index > self._start
        if index in one.marks or not beyond or not one.span[0] <= index < one.span[1]:
            return
        after_all = index < self._last if self.reverse else index > self._last
        if after_all and stop is not None and self._absent >= stop:
            return
        found = self._track.follow(index, self.scene.slices.features(one.axis, index), reverse=self.reverse)
        if found.there:
            one.found[index] = found
        self._absent = 0 if found.there else self._absent + after_all


@contextmanager
def _memory_sentence(segmenter: Medsam2Segmenter) -> Iterator[None]:
    """A GPU that is full becomes a sentence, and what was held on it is released."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if type(fault).__name__ != "OutOfMemoryError" and not isinstance(fault, MemoryError):
            raise
        segmenter.release()
        raise SegmenterError(
            "There is no memory left for medsam2. Give fewer boxes at a time, load it in bfloat16, or use the device cpu."
        ) from fault
