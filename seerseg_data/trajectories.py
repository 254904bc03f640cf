"""A simulated expert that shows how to refine a mask: a box first, then clicks, with a real segmenter in the loop.

Hybrid prompting as MedSAM-Agent describes it (arXiv 2602.03320; its own generator is not published, so numbers here are ours): the box
of the target on its key slice, then clicks at the deepest point of the largest error region (missed: positive; spilt: negative). The
expert may act on the slices that a reasoner would be shown, and keeps a click only when it helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SegmenterError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.protocols.base import Turn
from seerseg.segmenters.base import Segmenter, Session
from seerseg.volume import Volume, encode_runs

Bool = NDArray[np.bool_]
_FAR = 1e6


@dataclass(frozen=True)
class Expert:
    """How the expert behaves.

    jitter: standard deviation of each box edge, as share of that side; imperfect: rate of deliberately bad boxes (shifted or of a wrong
    size), so that mending is learned, the box itself being seen and not learned; most_prompts: boxes and clicks before the stop, so
    that there are at most five turns; least_gain: of Dice, below which a click is taken back and the next largest error tried; tries:
    errors tried per turn before stopping; least_dice: of the end, below which the trajectory is dropped.
    """

    jitter: float = 0.04
    imperfect: float = 0.25
    most_prompts: int = 4
    least_gain: float = 0.005
    tries: int = 3
    least_dice: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Trajectory:
    """turns: prompts with the Dice and mask after each, a stop at the end; start, final: Dice after the box and at the end; imperfect:
    the box was deliberately bad; fault: why it is not to be learned from, "" when it is."""

    turns: tuple[Turn, ...]
    start: float
    final: float
    imperfect: bool = False
    fault: str = ""

    @property
    def kept(self) -> bool:
        """Good enough to learn from."""
        return not self.fault


def demonstrate(
    volume: Volume,
    target: Bool,
    segmenter: Segmenter,
    *,
    axis: int,
    indices: Sequence[int] | None = None,
    rng: np.random.Generator,
    expert: Expert | None = None,
) -> Trajectory:
    """One trajectory towards `target` (Z, Y, X) on the volume's grid.

    indices: the slices along `axis` that the expert sees and may act on, None for all. Deterministic in `rng`. SegmenterError when the
    segmenter holds no session or takes no boxes or points.
    """
    expert = expert or Expert()
    able = segmenter.capabilities
    if not (able.session and able.box2d and able.points):
        raise SegmenterError(
            f"The segmenter {segmenter.card.name} cannot show trajectories: they need a session, boxes on a slice and points. Use grow."
        )
    area = np.count_nonzero(target, axis=tuple(a for a in range(3) if a != axis))
    seen = list(range(len(area))) if indices is None else [i for i in indices if 0 <= i < len(area)]
    if not any(area[i] for i in seen):
        return Trajectory((), 0.0, 0.0, fault="the target is on none of the slices shown")
    key = max(seen, key=lambda i: (area[i], -i))
    imperfect = bool(rng.random() < expert.imperfect)
    box = _box(np.moveaxis(target, axis, 0)[key], axis, key, rng, expert, imperfect)
    session = segmenter.session(volume)
    try:
        first = session.add(Prompt(boxes=(box,)))
        if first.mask is None:
            return Trajectory((), 0.0, 0.0, imperfect, f"the segmenter refused the box: {first.message}")
        turns = [Turn(Prompt(boxes=(box,)), _dice(first.mask.array, target), encode_runs(first.mask.array), learn=not imperfect)]
        mask, clicked = first.mask.array, set[tuple[int, int, int]]()
        while len(turns) < expert.most_prompts:
            found = _click(session, mask, target, volume, axis, None if indices is None else seen, turns[-1].dice, expert, clicked)
            if found is None:
                break
            turn, mask = found
            turns.append(turn)
    finally:
        session.close()
    start, final = turns[0].dice, turns[-1].dice
    fault = f"it ends at Dice {final:.2f}, below {expert.least_dice:g}" if final < expert.least_dice else ""
    fault = fault or ("it ends below its start" if final < start else "")
    return Trajectory((*turns, Turn(None, final)), start, final, imperfect, fault)


def _click(
    session: Session,
    mask: Bool,
    target: Bool,
    volume: Volume,
    axis: int,
    seen: list[int] | None,
    before: float,
    expert: Expert,
    clicked: set[tuple[int, int, int]],
) -> tuple[Turn, Bool] | None:
    """The first of the largest errors whose click gains enough, and the mask after it; None when none does."""
    for zyx, positive in error_points(mask, target, volume.grid.spacing_zyx, axis=axis, indices=seen, most=expert.tries, without=clicked):
        clicked.add(zyx)
        z, y, x = (float(v) for v in zyx)
        prompt = Prompt(points=(Point((z, y, x), positive),))
        made = session.add(prompt)
        if made.status != "ok" or made.mask is None:
            if made.status == "empty":
                return None  # sessions differ in whether they keep an emptied mask
            continue
        dice = _dice(made.mask.array, target)
        if dice - before >= expert.least_gain:
            return Turn(prompt, dice, encode_runs(made.mask.array)), made.mask.array
        session.undo()
    return None


def error_points(
    mask: Bool,
    target: Bool,
    spacing_zyx: Sequence[float],
    *,
    axis: int = 0,
    indices: Sequence[int] | None = None,
    most: int = 1,
    without: set[tuple[int, int, int]] | None = None,
) -> list[tuple[tuple[int, int, int], bool]]:
    """The deepest voxel (z, y, x) of each of the `most` largest error regions, the largest first, with True where the target was missed.

    indices: only slices of `axis` that count, each by itself (regions do not run through slices that nobody sees); None: in 3D.
    """
    from scipy.ndimage import label

    wrong = mask != target
    if indices is not None:
        kept = np.zeros(mask.shape[axis], dtype=bool)
        kept[list(indices)] = True
        wrong = wrong & kept[tuple(slice(None) if a == axis else None for a in range(3))]
    for zyx in without or ():
        wrong[zyx] = False
    lines = [np.flatnonzero(wrong.any(axis=tuple(i for i in range(3) if i != a))) for a in range(3)]
    if not lines[0].size:
        return []
    box = tuple(slice(int(line[0]), int(line[-1]) + 1) for line in lines)
    structure = np.ones((3, 3, 3), dtype=bool)
    sampling = [_FAR if n == 1 else s for n, s in zip(mask.shape, spacing_zyx, strict=True)]
    if indices is not None:
        structure = structure & (np.abs(np.indices((3, 3, 3))[axis] - 1) == 0)
        sampling[axis] = _FAR
    regions: list[tuple[int, tuple[int, int, int], bool]] = []
    for positive in (True, False):
        found, count = label(wrong[box] & (target[box] == positive), structure=structure)
        sizes = np.bincount(found.ravel(), minlength=count + 1)
        sizes[0] = 0
        for number in np.argsort(-sizes, kind="stable")[: min(most, count)]:
            inner = deepest(found == number, sampling)
            z, y, x = (int(v + s.start) for v, s in zip(inner, box, strict=True))
            regions.append((int(sizes[number]), (z, y, x), positive))
    regions.sort(key=lambda r: (-r[0], not r[2], r[1]))
    return [(zyx, positive) for _, zyx, positive in regions[:most]]


def deepest(mask: Bool, spacing: Sequence[float]) -> tuple[int, ...]:
    """The voxel of a non-empty mask (any number of axes) farthest, in the units of `spacing`, from what is not in it; outside the array is
    not in it."""
    from scipy.ndimage import distance_transform_edt, find_objects

    (box,) = find_objects(mask.astype(np.uint8))
    depth = distance_transform_edt(np.pad(mask[box], 1), sampling=list(spacing))
    at = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return tuple(int(v) - 1 + s.start for v, s in zip(at, box, strict=True))


def _box(plane: Bool, axis: int, index: int, rng: np.random.Generator, expert: Expert, imperfect: bool) -> Box2D:
    """The target's box on the slice, jittered; imperfect: moved by a fifth to a half of its size, or made too small or too large."""
    low, high = [], []
    for a in (0, 1):
        line = np.flatnonzero(plane.any(axis=1 - a))
        low.append(float(line[0]))
        high.append(float(line[-1] + 1))
    size = [h - l for l, h in zip(low, high, strict=True)]  # noqa: E741
    if imperfect and rng.random() < 0.5:
        moved = rng.uniform(0.2, 0.5, 2) * rng.choice([-1.0, 1.0], 2) * size
        low, high = [v + m for v, m in zip(low, moved, strict=True)], [v + m for v, m in zip(high, moved, strict=True)]
    elif imperfect:
        grown = np.array(size) * (rng.choice([0.55, 1.8]) - 1) / 2
        low, high = [v - g for v, g in zip(low, grown, strict=True)], [v + g for v, g in zip(high, grown, strict=True)]
    edges = []
    for a, n in enumerate(plane.shape):
        noise = rng.normal(0, expert.jitter * size[a], 2)
        first = float(np.clip(low[a] + noise[0], 0, n - 1))
        edges.append((round(first, 1), round(float(np.clip(high[a] + noise[1], first + 1, n)), 1)))
    return Box2D(axis, index, (edges[0][0], edges[1][0]), (edges[0][1], edges[1][1]))


def _dice(mask: Bool, target: Bool) -> float:
    both = int(np.count_nonzero(mask)) + int(np.count_nonzero(target))
    return round(2 * int(np.count_nonzero(mask & target)) / both, 4) if both else 1.0
