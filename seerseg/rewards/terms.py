"""Reward terms by name: each a pure function of an attempt and the truth, 0..1.

A target that is not in the scan: every term but the formats is 1 for a right "absent" and 0 for anything else; `dice` and `iou` are also 1
when the segmenter itself found nothing of what was asked (both masks are empty). A target that is there: "absent" earns 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from seerseg.prompts import Box2D, Point, Prompt
from seerseg.protocols.base import KeySlice
from seerseg.protocols.seer import normalise_name
from seerseg.rewards import formulas as f
from seerseg.rewards.truth import Attempt, Truth
from seerseg.views import PixelMap, pixel_map

Term = Callable[[Attempt, Truth], float]
WINDOW_SLICES = 5  # MedVol-R1's reach of a key slice
MEDREASONER_PX = 840  # the grid that MedReasoner scores on
MEDVOL_PX = 512


def _content(term: Term) -> Term:
    """The rule for absent targets around a term that looks at what was drawn or pointed at."""

    def ruled(attempt: Attempt, truth: Truth) -> float:
        if truth.absent or attempt.absent:
            return float(truth.absent and attempt.absent)
        return 0.0 if attempt.answer is None and not attempt.overlaps else term(attempt, truth)

    return ruled


def dice(attempt: Attempt, truth: Truth) -> float:
    """Dice of the final mask."""
    return 0.0 if attempt.mask is None or not attempt.overlaps else attempt.overlaps[-1].dice


def iou(attempt: Attempt, truth: Truth) -> float:
    """IoU of the final mask."""
    return 0.0 if attempt.mask is None or not attempt.overlaps else attempt.overlaps[-1].iou


def wellformed(attempt: Attempt, truth: Truth) -> float:
    """How well the replies keep the protocol's grammar."""
    return attempt.wellformed


def name(attempt: Attempt, truth: Truth) -> float:
    """Whether the name that was answered is one of the target's."""
    said = attempt.answer.target if attempt.answer else None
    return float(said is not None and normalise_name(said) in {normalise_name(n) for n in truth.names})


def presence(attempt: Attempt, truth: Truth) -> float:
    """Whether it was rightly said that the target is, or is not, in the scan."""
    return float((attempt.answer is not None or attempt.mask is not None) and attempt.absent == truth.absent)


# ------------------------------------------------------------------------------------------------------------- MedVol-R1


def medvol_format(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medvol_format` of the last reply."""
    return f.medvol_format(attempt.replies[-1]) if attempt.replies else 0.0


def medvol_axial(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medvol_axial` of the slice that was answered."""
    boxes = _boxes(attempt)
    return f.medvol_axial(truth.areas(boxes[0].axis), boxes[0].index, WINDOW_SLICES) if boxes else 0.0


def medvol_axial_global(attempt: Attempt, truth: Truth) -> float:
    """`formulas.axial_global` of the slice that was answered."""
    boxes = _boxes(attempt)
    return f.axial_global(truth.areas(boxes[0].axis), boxes[0].index) if boxes else 0.0


def medvol_spatial(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medvol_spatial` against the boxes of the target's key slice, whatever slice was answered: a right box on another
    slice is scored against the wrong boxes."""
    boxes = _boxes(attempt)
    return _spatial(boxes, truth, truth.key_index(boxes[0].axis)) if boxes else 0.0


def medvol_spatial_own_slice(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medvol_spatial` against the boxes of the slice that was answered."""
    boxes = _boxes(attempt)
    return _spatial(boxes, truth, boxes[0].index) if boxes else 0.0


def medvol_consistency(attempt: Attempt, truth: Truth) -> float:
    """r_c: Dice of mask and truth within WINDOW_SLICES of the slice that was answered; 0 without a box."""
    boxes = _boxes(attempt)
    if not boxes or attempt.mask is None or truth.mask is None:
        return 0.0
    near: list[slice] = [slice(None)] * 3
    near[boxes[0].axis] = slice(max(0, boxes[0].index - WINDOW_SLICES), boxes[0].index + WINDOW_SLICES + 1)
    drawn, true = attempt.mask[tuple(near)], truth.mask[tuple(near)]
    total = int(np.count_nonzero(drawn)) + int(np.count_nonzero(true))
    return 2 * int(np.count_nonzero(drawn & true)) / total if total else 0.0


def _spatial(boxes: list[Box2D], truth: Truth, index: int | None) -> float:
    there = None if index is None else truth.on_slice(boxes[0].axis, index)
    if there is None:
        return 0.0
    where = pixel_map(truth.grid, boxes[0].axis, boxes[0].index, MEDVOL_PX)
    return f.medvol_spatial([where.box_to_pixel(b.lo, b.hi) for b in boxes], [where.box_to_pixel(b.lo, b.hi) for b in there.boxes])


def _boxes(attempt: Attempt) -> list[Box2D]:
    answer = attempt.spatial
    return [b for b in answer.prompt.boxes if isinstance(b, Box2D)] if answer is not None and answer.prompt is not None else []


# ----------------------------------------------------------------------------------------------------------- MedReasoner


def medreasoner_think(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medreasoner_think` of the last reply."""
    return f.medreasoner_think(attempt.replies[-1]) if attempt.replies else 0.0


def medreasoner_answer(attempt: Attempt, truth: Truth) -> float:
    """`formulas.medreasoner_answer` of the last reply; 1 when it was read as "absent", which the published grammar lacks."""
    if attempt.absent:
        return 1.0
    return f.medreasoner_answer(attempt.replies[-1]) if attempt.replies else 0.0


def on_image(prompt: Prompt, truth: Truth) -> tuple[f.Box | None, list[f.Point], f.Box, list[f.Point]] | None:
    """(box, points) of a prompt and of the truth on the prompt's slice, in pixels of MedReasoner's grid; None when the target is not
    there, or the prompt names no slice."""
    box = next((b for b in prompt.boxes if isinstance(b, Box2D)), None)
    axis, index = (box.axis, box.index) if box is not None else slice_of_points(prompt.points)
    there = truth.on_slice(axis, index)
    if there is None:
        return None
    where = pixel_map(truth.grid, axis, index, MEDREASONER_PX)
    predicted = where.box_to_pixel(box.lo, box.hi) if box is not None else None
    return predicted, [where.to_pixel(p.zyx) for p in prompt.points], _hull(there, where), [where.to_pixel(p) for p in there.points]


def _on_image(attempt: Attempt, truth: Truth) -> tuple[f.Box | None, list[f.Point], f.Box, list[f.Point]] | None:
    answer = attempt.spatial
    return None if answer is None or answer.prompt is None else on_image(answer.prompt, truth)


def slice_of_points(points: tuple[Point, ...]) -> tuple[int, int]:
    """The slice that points without a box lie on, along the first axis on which all agree; (0, -1) when there is none."""
    for axis in range(3):
        if len({round(p.zyx[axis]) for p in points}) == 1:
            return axis, round(points[0].zyx[axis])
    return 0, -1


def _hull(there: KeySlice, where: PixelMap) -> f.Box:
    boxes = [where.box_to_pixel(b.lo, b.hi) for b in there.boxes]
    low, high = np.min(boxes, axis=0), np.max(boxes, axis=0)
    return float(low[0]), float(low[1]), float(high[2]), float(high[3])


def _box_term(score: Callable[[f.Box, f.Box], float]) -> Term:
    def term(attempt: Attempt, truth: Truth) -> float:
        predicted, _, true, true_points = _on_image(attempt, truth) or (None, [], None, [])
        if predicted is None or true is None:
            return 0.0
        return f.penalised(score(predicted, true), *f.box_checks(predicted, true, true_points))

    return _content(term)


def _points_term(score: Callable[[list[f.Point], list[f.Point], f.Box], float]) -> Term:
    def term(attempt: Attempt, truth: Truth) -> float:
        image = _on_image(attempt, truth)
        if image is None or len(image[1]) < 2:
            return 0.0
        _, predicted, true, true_points = image
        return f.penalised(score(predicted[:2], true_points, true), *f.point_checks(predicted[:2], true))

    return _content(term)


# ---------------------------------------------------------------------------------------------------------- MedSAM-Agent


def agent_format(attempt: Attempt, truth: Truth) -> float:
    """`formulas.agent_format`; 1 when it was read as "absent", which the published grammar lacks."""
    return 1.0 if attempt.absent else f.agent_format(attempt.replies)


def agent_quality(attempt: Attempt, truth: Truth) -> float:
    """`formulas.agent_quality` over the masks of all turns."""
    return f.agent_quality([o.iou for o in attempt.overlaps], attempt.overlaps[-1].dice if attempt.overlaps else 0.0)


def agent_quality_running(attempt: Attempt, truth: Truth) -> float:
    """The same, paying only for a new best."""
    return f.agent_quality([o.iou for o in attempt.overlaps], attempt.overlaps[-1].dice if attempt.overlaps else 0.0, running=True)


def _drawn(term: Term) -> Term:
    """The rule for absent targets of terms that compare the final mask: two empty masks agree."""

    def ruled(attempt: Attempt, truth: Truth) -> float:
        if truth.absent:
            return float(attempt.absent or (attempt.mask is not None and not attempt.mask.any()))
        return 0.0 if attempt.absent else term(attempt, truth)

    return ruled


TERMS: dict[str, Term] = {
    "dice": _drawn(dice),
    "iou": _drawn(iou),
    "format": wellformed,
    "name": _content(name),
    "presence": presence,
    "medvol/format": medvol_format,
    "medvol/axial": _content(medvol_axial),
    "medvol/axial_global": _content(medvol_axial_global),
    "medvol/spatial": _content(medvol_spatial),
    "medvol/spatial_own_slice": _content(medvol_spatial_own_slice),
    "medvol/consistency": _content(medvol_consistency),
    "medreasoner/think": medreasoner_think,
    "medreasoner/answer": medreasoner_answer,
    "medreasoner/box_iou": _box_term(lambda p, t: f.smooth_log(f.box_iou(p, t))),
    "medreasoner/box_iou_mended": _box_term(lambda p, t: f.smooth_log_mended(f.box_iou(p, t))),
    "medreasoner/box_align": _box_term(f.box_align),
    "medreasoner/box_scale": _box_term(f.box_scale),
    "medreasoner/points_dice": _points_term(lambda p, t, box: f.smooth_log(f.points_dice(p, t))),
    "medreasoner/points_dice_mended": _points_term(lambda p, t, box: f.smooth_log_mended(f.points_dice_mended(p, t))),
    "medreasoner/points_align": _points_term(f.points_align),
    "medreasoner/points_angle": _points_term(lambda p, t, box: f.points_angle(p, t)),
    "agent/format": agent_format,
    "agent/quality": _content(agent_quality),
    "agent/quality_running": _content(agent_quality_running),
}
