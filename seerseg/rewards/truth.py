"""What a reward compares: the truth of one request, and what an attempt to meet it came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from seerseg.episode import Dialogue, Episode
from seerseg.metrics import largest_extent
from seerseg.prompts import Box2D
from seerseg.protocols.base import Answer, Fault, KeySlice, Protocol
from seerseg.views import CaseViews
from seerseg.volume import Grid

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """Agreement of one drawn mask with the truth; both are 1 when both are empty."""

    dice: float
    iou: float


def improving(overlaps: Sequence[Overlap]) -> tuple[bool, ...]:
    """Of the masks of a dialogue, in order, which are better (Dice) than all before them; the first when it has anything right."""
    best, found = 0.0, []
    for overlap in overlaps:
        found.append(overlap.dice > best)
        best = max(best, overlap.dice)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Truth:
    """What a request means in its case. mask: bool (Z, Y, X) on the canonical grid, None when the target is absent; names: answers
    that name it; slices: the key slices of its trace, where there are any (others are found in the mask when asked for)."""

    grid: Grid
    mask: Bool | None
    names: tuple[str, ...] = ()
    slices: tuple[KeySlice, ...] = ()

    @property
    def absent(self) -> bool:
        """The target is not in the scan."""
        return self.mask is None

    def pointed(self, points: Sequence[tuple[int, int, int]]) -> Truth:
        """The same with these two reference points (z, y, x) instead of those found in the mask, on the slice along the first axis on
        which both lie; itself when they are not two, lie on no one slice or where the target is not."""
        for axis in range(3):
            if len(points) == 2 and self.mask is not None and points[0][axis] == points[1][axis]:
                there = self.on_slice(axis, points[0][axis])
                return self if there is None else replace(self, slices=(replace(there, points=tuple(points)), *self.slices))
        return self

    @cached_property
    def _box(self) -> tuple[slice, slice, slice] | None:
        return None if self.mask is None else largest_extent(self.mask)

    @cached_property
    def _voxels(self) -> int:
        return 0 if self.mask is None else int(np.count_nonzero(self.mask))

    @cached_property
    def _areas(self) -> dict[int, tuple[int, ...]]:
        return {}

    def areas(self, axis: int) -> tuple[int, ...]:
        """Voxels of the target on each slice along an axis."""
        if axis not in self._areas:
            across = tuple(a for a in range(3) if a != axis)
            counts = np.zeros(self.grid.shape_zyx[axis]) if self.mask is None else np.count_nonzero(self.mask, axis=across)
            self._areas[axis] = tuple(int(n) for n in counts)
        return self._areas[axis]

    def key_index(self, axis: int) -> int | None:
        """The slice of the largest area, the first of equals; None when absent."""
        listed = next((s for s in self.slices if s.axis == axis), None)
        if listed is not None:
            return listed.index
        areas = self.areas(axis)
        return areas.index(max(areas)) if any(areas) else None

    def on_slice(self, axis: int, index: int) -> KeySlice | None:
        """The target on one slice, None when it is not there."""
        listed = next((s for s in self.slices if (s.axis, s.index) == (axis, index) and s.points), None)
        if listed is not None or self.mask is None or not 0 <= index < self.grid.shape_zyx[axis]:
            return listed
        return key_slice(self.mask, axis, index)

    def overlap(self, mask: Bool | None) -> Overlap:
        """Of a drawn mask (None: nothing was drawn) with the truth."""
        drawn = 0 if mask is None else int(np.count_nonzero(mask))
        if mask is None or not drawn or self.mask is None or self._box is None:
            nothing = float(not drawn and not self._voxels)
            return Overlap(nothing, nothing)
        both = int(np.count_nonzero(mask[self._box] & self.mask[self._box]))
        return Overlap(2 * both / (drawn + self._voxels), both / (drawn + self._voxels - both))


@dataclass(frozen=True, eq=False)
class Attempt:
    """A finished dialogue as rewards see it.

    replies and readings: one per turn; mask: what stands at the end (None: nothing was drawn); overlaps: of the mask after every
    turn that drew, in order; wellformed: the mean over replies of what the protocol says; absent: it says that the target is not in the
    scan.
    """

    replies: tuple[str, ...]
    readings: tuple[Answer | Fault, ...]
    mask: Bool | None
    overlaps: tuple[Overlap, ...]
    wellformed: float
    absent: bool = False

    @property
    def answer(self) -> Answer | None:
        """The last reading, None when it is a fault."""
        last = self.readings[-1] if self.readings else None
        return last if isinstance(last, Answer) else None

    @property
    def spatial(self) -> Answer | None:
        """The last answer that gave the segmenter something."""
        return next((r for r in reversed(self.readings) if isinstance(r, Answer) and r.prompt is not None), None)


def attempt_of(
    done: Dialogue | Episode,
    truth: Truth,
    *,
    protocol: Protocol | None = None,
    views: CaseViews | None = None,
    overlaps: Sequence[Overlap] | None = None,
) -> Attempt:
    """What a finished dialogue or an episode came to. An episode needs its protocol and views beside it. overlaps: of every drawn
    turn, where they were kept; without them the final mask stands for all.

    As in `episode.conclude`: a fault ends a dialogue of several turns and the mask before it stands; a stop before anything was drawn
    says that the target is absent.
    """
    if isinstance(done, Dialogue):
        protocol, views, drawn = done.protocol, done.views, done.segmentation
        broken = done.fault is not None or done.answer is None
        last: Answer | Fault | None = done.fault or done.answer
        lost = drawn is None or drawn.mask is None or (broken and not done.several_turns)
        mask = None if lost or drawn is None or drawn.mask is None else drawn.mask.array
        absent = not broken and done.answer is not None and (done.answer.absent or (done.answer.prompt is None and drawn is None))
    else:
        mask, last, absent = None if done.mask is None else done.mask.array, done.answer, done.absent_by == "reasoner"
    if protocol is None or views is None:
        raise TypeError("An episode is scored with its protocol and views.")
    readings = [protocol.read(reply, views) for reply in done.replies]
    if readings and not isinstance(readings[-1], Fault) and (last is None or _in_fault(done)):
        readings[-1] = Fault("The name may not be answered.")  # it can be read, but was refused
    kept = tuple(overlaps) if overlaps is not None else () if mask is None or absent else (truth.overlap(mask),)
    grammar = [protocol.wellformed(reply) for reply in done.replies]
    return Attempt(tuple(done.replies), tuple(readings), mask, kept, sum(grammar) / len(grammar) if grammar else 0.0, absent)


def _in_fault(done: Dialogue | Episode) -> bool:
    """Whether nothing could be made of the last reply."""
    return done.fault is not None if isinstance(done, Dialogue) else done.status == "fault"


def key_slice(mask: Bool, axis: int, index: int) -> KeySlice | None:
    """The target on one slice: area, a box per connected component (8 neighbours, largest first), two deep points; None when empty."""
    from scipy import ndimage

    plane = np.take(mask, index, axis=axis)
    if not plane.any():
        return None
    labels, count = ndimage.label(plane, structure=np.ones((3, 3), bool))
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    found = ndimage.find_objects(labels)
    boxes = tuple(
        Box2D(axis, index, (found[i][0].start, found[i][1].start), (found[i][0].stop, found[i][1].stop))
        for i in np.argsort(-sizes, kind="stable")
    )
    return KeySlice(axis, index, int(plane.sum()), boxes, _deep_points(plane, axis, index))


def _deep_points(plane: Bool, axis: int, index: int) -> tuple[tuple[int, int, int], ...]:
    """Two voxels, each the deepest of what is left when the disc around the one before it is taken away; where the disc covers all,
    of what is left without that voxel; twice the same voxel when there is one alone."""
    from scipy import ndimage

    whole = np.pad(plane, 1)
    left, rows, columns = whole.copy(), *np.ogrid[: whole.shape[0], : whole.shape[1]]
    points: list[tuple[int, int, int]] = []
    for _ in range(2):
        depth = ndimage.distance_transform_edt(left)
        row, column = (int(v) for v in np.unravel_index(int(depth.argmax()), depth.shape))
        point = [row - 1, column - 1]
        point.insert(axis, index)
        points.append((point[0], point[1], point[2]))
        left &= (rows - row) ** 2 + (columns - column) ** 2 >= depth[row, column] ** 2
        if not left.any():
            left = whole.copy()
            left[row, column] = int(plane.sum()) == 1
    return tuple(points)
