"""The published reward formulas, on numbers, boxes and text alone; and mended forms of those that pay for the wrong thing.

Boxes are (row0, col0, row1, col1) half-open edges, points (row, col) centres, in pixels of one image. A box of inclusive pixels r0..r1
has the edges r0, r1 + 1, so the IoU of half-open edges is that of inclusive pixels. Sources: MedVol-R1 (arXiv 2605.26621) figure and code;
MedReasoner (arXiv 2508.08177) released reward code; MedSAM-Agent (arXiv 2602.03320) released reward code. Every value lies in 0..1.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from seerseg.protocols.spatial import trimmed

Box = tuple[float, float, float, float]
Point = tuple[float, float]
_TINY = 1e-5  # MedReasoner's guard against division by zero
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TWO_BLOCKS = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*", re.DOTALL
)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def clip(value: float, low: float = 0.0, high: float = 1.0) -> float:
    """`value` kept within low..high."""
    return min(max(value, low), high)


def area(box: Box) -> float:
    """Area of a box, 0 when it is turned inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 when both are empty."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - inner
    return inner / union if union > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------- MedVol-R1


def medvol_format(reply: str) -> float:
    """r_f: the mean of four checks: exactly a think and an answer block; a thought; an answer that is JSON; the share of valid boxes.

    A box is valid as four integers in 0..1000 with x0 < x1 and y0 < y1. An empty list ("absent") holds no invalid box: our rule.
    """
    think, answer = _THINK.search(reply), _ANSWER.search(reply)
    parsed = _parsed(answer.group(1)) if answer else None
    return (
        float(_TWO_BLOCKS.fullmatch(reply) is not None)
        + float(bool(think and think.group(1).strip()))
        + float(parsed is not None)
        + _valid_boxes(parsed)
    ) / 4


def _valid_boxes(parsed: Any) -> float:
    if parsed == []:
        return 1.0
    entries = parsed if isinstance(parsed, list) else []
    boxes = [
        box for entry in entries if isinstance(entry, dict) and isinstance(entry.get("bbox_2d_list"), list) for box in entry["bbox_2d_list"]
    ]
    return sum(map(_is_box_0_1000, boxes)) / len(boxes) if boxes else 0.0


def _is_box_0_1000(box: Any) -> bool:
    whole = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 1000 for v in box)
    return bool(whole and box[0] < box[2] and box[1] < box[3])


def medvol_axial(areas: Sequence[float], index: int, reach: int = 5) -> float:
    """r_a: the target's area on slice `index` over the largest within +-reach slices, 0 when there is none.

    Local: a slice at a local maximum gets 1 however small its area. `axial_global` is the mended form.
    """
    if not 0 <= index < len(areas):
        return 0.0
    most = max(areas[max(0, index - reach) : index + reach + 1])
    return areas[index] / most if most > 0 else 0.0


def axial_global(areas: Sequence[float], index: int) -> float:
    """The target's area on slice `index` over the largest of the whole scan."""
    return medvol_axial(areas, index, reach=len(areas))


def medvol_spatial(predicted: Sequence[Box], true: Sequence[Box]) -> float:
    """r_s: IoU summed over the best one-to-one matching of boxes, over max(1, N, M)."""
    if not predicted or not true:
        return 0.0
    from scipy.optimize import linear_sum_assignment

    table = [[box_iou(p, t) for t in true] for p in predicted]
    rows, columns = linear_sum_assignment(table, maximize=True)
    return sum(table[r][c] for r, c in zip(rows, columns, strict=True)) / max(1, len(predicted), len(true))


# ----------------------------------------------------------------------------------------------------------- MedReasoner


def medreasoner_think(reply: str) -> float:
    """F_think: 0 without a think block, 0.2 when it is empty, else 1."""
    found = _THINK.search(reply)
    return 0.0 if found is None else 1.0 if found.group(1).strip() else 0.2


def medreasoner_answer(reply: str) -> float:
    """F_seg: 0 without an answer block, 0.2 when it is no JSON object (single quotes are taken), 0.4 when a key is missing or both
    fields are malformed, 0.6 when one is, else 1."""
    found = _ANSWER.search(reply)
    if found is None:
        return 0.0
    said = _parsed(found.group(1).replace("'", '"'))
    if not isinstance(said, dict):
        return 0.2
    if not all(key in said for key in ("bbox", "points_1", "points_2")):
        return 0.4
    good = int(_numbers(said["bbox"], 4)) + int(_numbers(said["points_1"], 2) and _numbers(said["points_2"], 2))
    return (0.4, 0.6, 1.0)[good]


def smooth_log(value: float, k: float = 3.0) -> float:
    """0.9 ln(k v + 1) / ln(k + 1) + 0.1: no overlap at all still earns 0.1."""
    return 0.9 * math.log(k * value + 1) / math.log(k + 1) + 0.1


def smooth_log_mended(value: float, k: float = 3.0) -> float:
    """ln(k v + 1) / ln(k + 1): nothing for nothing."""
    return math.log(k * value + 1) / math.log(k + 1)


def smooth_exp(value: float, c: float, k: float = 3.0) -> float:
    """0.9 (s(v) - s(2)) / (s(0) - s(2)) + 0.1 with s(v) = 1 / (1 + e^(k (v - c))): 1 at 0, 0.1 at 2."""
    low, high, here = (1 / (1 + math.exp(k * (v - c))) for v in (2.0, 0.0, value))
    return 0.9 * (here - low) / (high - low) + 0.1


def penalised(reward: float, v1: float, v2: float) -> float:
    """clip(R (0.7 + 0.3 (v1 + v2) / 2))."""
    return clip(reward * (0.7 + 0.3 * (v1 + v2) / 2))


def box_checks(predicted: Box, true: Box, true_points: Sequence[Point]) -> tuple[float, float]:
    """v1: a factor 1/2 for each true point outside the predicted box; v2: 1 when the areas are within a factor 2, else 1/2."""
    v1 = math.prod(1.0 if _inside(point, predicted) else 0.5 for point in true_points)
    return v1, 1.0 if 0.5 * area(true) < area(predicted) < 2 * area(true) else 0.5


def point_checks(predicted: Sequence[Point], true: Box) -> tuple[float, float]:
    """v1: a factor 1/2 for each predicted point outside the true box; v2: 1 when the two lie more than 10 px apart, else 1/2."""
    v1 = math.prod(1.0 if _inside(point, true) else 0.5 for point in predicted)
    return v1, 1.0 if math.dist(predicted[0], predicted[1]) > 10 else 0.5


def box_align(predicted: Box, true: Box) -> float:
    """The mean difference of edges over the true diagonal, at most 2, through `smooth_exp` with c = 1."""
    mean = sum(abs(a - b) for a, b in zip(predicted, true, strict=True)) / 4
    return smooth_exp(min(mean / (math.hypot(true[2] - true[0], true[3] - true[1]) + _TINY), 2.0), c=1.0)


def box_scale(predicted: Box, true: Box) -> float:
    """sqrt(d log area^2 + d log aspect^2), at most 1, through `smooth_exp` with c = 1/2; 0 for a box without area."""
    if not (area(predicted) > 0 and area(true) > 0):
        return 0.0
    heights, widths = [b[2] - b[0] for b in (predicted, true)], [b[3] - b[1] for b in (predicted, true)]
    by_area = math.log(area(predicted) / area(true))
    by_aspect = math.log((widths[0] / heights[0]) / (widths[1] / heights[1]))
    return smooth_exp(min(math.hypot(by_area, by_aspect), 1.0), c=0.5)


def circles_overlap(a: Sequence[Point], b: Sequence[Point]) -> tuple[float, float, float]:
    """Areas of the intersection and of both circles whose diameters are the point pairs."""
    (ra, ca), (rb, cb) = ((math.dist(*pair) / 2 + _TINY, [(p + q) / 2 for p, q in zip(*pair, strict=True)]) for pair in (a, b))
    d = math.dist(ca, cb)
    if d >= ra + rb - _TINY:
        inner = 0.0
    elif d <= abs(ra - rb) + _TINY:
        inner = math.pi * min(ra, rb) ** 2
    else:
        angles = [clip((d * d + r * r - o * o) / (2 * d * r), -1.0, 1.0) for r, o in ((ra, rb), (rb, ra))]
        kite = 0.5 * math.sqrt(max(0.0, (-d + ra + rb) * (d + ra - rb) * (d - ra + rb) * (d + ra + rb)))
        inner = ra * ra * math.acos(angles[0]) + rb * rb * math.acos(angles[1]) - kite
    return inner, math.pi * ra * ra, math.pi * rb * rb


def points_dice(predicted: Sequence[Point], true: Sequence[Point]) -> float:
    """2 I / U of the circles, as published: it divides by the union, so it reaches 2. Give it to `smooth_log`; the clip hides it."""
    inner, a, b = circles_overlap(predicted, true)
    return 2 * inner / (a + b - inner + _TINY)


def points_dice_mended(predicted: Sequence[Point], true: Sequence[Point]) -> float:
    """2 I / (A + B)."""
    inner, a, b = circles_overlap(predicted, true)
    return 2 * inner / (a + b)


def points_align(predicted: Sequence[Point], true: Sequence[Point], true_box: Box) -> float:
    """Half the smaller of both pairings' summed mean L1 distances, over the true box's diagonal, through `smooth_exp` with c = 1."""

    def apart(p: Point, q: Point) -> float:
        return (abs(p[0] - q[0]) + abs(p[1] - q[1])) / 2

    straight = apart(predicted[0], true[0]) + apart(predicted[1], true[1])
    crossed = apart(predicted[0], true[1]) + apart(predicted[1], true[0])
    diagonal = math.hypot(true_box[2] - true_box[0], true_box[3] - true_box[1]) + _TINY
    return smooth_exp(min(min(straight, crossed) / 2 / diagonal, 2.0), c=1.0)


def points_angle(predicted: Sequence[Point], true: Sequence[Point]) -> float:
    """`smooth_log` of |cos| of the angle between the two pairs."""
    (ay, ax), (by, bx) = ((q[0] - p[0], q[1] - p[1]) for p, q in (predicted, true))
    return smooth_log(clip(abs(ay * by + ax * bx) / ((math.hypot(ay, ax) + 1e-8) * (math.hypot(by, bx) + 1e-8))))


# ---------------------------------------------------------------------------------------------------------- MedSAM-Agent


def agent_format(replies: Sequence[str]) -> float:
    """F: 1 when there is a box or a point and the last call is a stop, 1/2 for one of both, else 0."""
    calls = [_tool(body) for reply in replies for body in _TOOL_CALL.findall(reply)]
    acted = any(name in ("add_bbox", "add_point") for name in calls)
    return (int(acted) + int(bool(calls) and calls[-1] == "stop_action")) / 2


def agent_quality(ious: Sequence[float], final_dice: float, *, running: bool = False) -> float:
    """Q = clip((IoU_T + Dice_T) / 2 - P + B) over the T masks of an episode, P = B = 0 for T = 1.

    P = max IoU - IoU_T + 0.01 T. B = 0.1 times every rise of IoU, as published: it pays again for every re-climb, so that going down and up
    again by more than 0.2 earns more than its turns cost. running: it pays only for a new best.
    """
    if not ious:
        return 0.0
    penalty = bonus = 0.0
    if len(ious) > 1:
        penalty = max(ious) - ious[-1] + 0.01 * len(ious)
        best = ious[0]
        for before, now in itertools.pairwise(ious):
            bonus += 0.1 * max(0.0, now - (best if running else before))
            best = max(best, now)
    return clip((ious[-1] + final_dice) / 2 - penalty + bonus)


def _parsed(text: str) -> Any:
    try:
        return trimmed(json.loads(text.strip()))
    except (ValueError, RecursionError):
        return None


def _tool(body: str) -> str:
    said = _parsed(body)
    if isinstance(said, dict):
        return str(said.get("name", ""))
    return next((name for name in ("add_bbox", "add_point", "stop_action") if name in body), "")


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int | float) and math.isfinite(v) for v in value)


def _inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
