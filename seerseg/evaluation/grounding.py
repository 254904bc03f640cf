"""Boxes and points of answers against the reference, as MedReasoner's released code scores U-MRG-14K (eval/, commit 0b544ab).

Everything lies on a square image of 840 pixels. For each request whose target is there:

    iou          of box and reference box, I / (U + 1e-6)
    pdice        of the circles whose diameters are the pairs of points, as published: 2 I / (U + 1e-5), which divides by the union, so
                 that it exceeds Dice and reaches 2; pdice_mended: 2 I / (A + B)
    dice         of mask and reference on the slice of the answer, both brought to the 840 pixels: 2 I / (A + B + 1e-6)

An answer that cannot be read, names no box or points, or lies where the target is not, counts 0, as published. Of a dialogue of several
turns the last box counts. `dice_voxels` is Dice of the whole mask in voxels, as everywhere else. What differs from the published numbers:
images keep their proportions (padded, not stretched). Reference points are those that the dataset's requests carry (the converter of
U-MRG-14K keeps them), else found in the mask (the two deep points of `rewards.key_slice`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import NothingToDoError, SeerSegError
from seerseg.evaluation.predictions import PredictionFolder, References
from seerseg.evaluation.records import Row
from seerseg.evaluation.scoring import read_drawn, read_reference
from seerseg.metrics import Interval, bootstrap_interval
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols.seer import normalise_name
from seerseg.rewards import Truth
from seerseg.rewards import formulas as f
from seerseg.rewards.terms import MEDREASONER_PX, on_image, slice_of_points
from seerseg.views import PixelMap, pixel_map

Bool = NDArray[np.bool_]
MEASURES = ("iou", "pdice", "pdice_mended", "dice", "dice_voxels")


@dataclass(frozen=True)
class Grounded:
    """One request. readable: it names a box or two points; category: the target."""

    case: str
    subject: str
    request: str
    category: str
    readable: bool
    iou: float
    pdice: float
    pdice_mended: float
    dice: float
    dice_voxels: float


@dataclass(frozen=True)
class Grounding:
    """All requests. faults: sentences on cases that could not be read; they are left out."""

    rows: tuple[Grounded, ...]
    faults: tuple[str, ...] = ()

    def means(self, category: str | None = None) -> dict[str, float]:
        """The mean over requests of each measure, as published; of one category, or of all."""
        rows = [row for row in self.rows if category in (None, row.category)]
        return {name: float(np.mean([getattr(row, name) for row in rows])) for name in MEASURES}

    def interval(self, measure: str) -> Interval | None:
        """95 % by bootstrap over subjects."""
        by_subject: dict[str, list[float]] = {}
        for row in self.rows:
            by_subject.setdefault(row.subject, []).append(getattr(row, measure))
        return bootstrap_interval(by_subject)

    @property
    def categories(self) -> list[str]:
        """By name."""
        return sorted({row.category for row in self.rows})

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {name: self.interval(name) for name in MEASURES}
        return {
            "grid_px": MEDREASONER_PX,
            "requests": len(self.rows),
            "readable": sum(row.readable for row in self.rows),
            "means": self.means(),
            "intervals": {name: interval.to_json() if interval else None for name, interval in found.items()},
            "categories": {name: {"requests": sum(r.category == name for r in self.rows), **self.means(name)} for name in self.categories},
            "rows": [asdict(row) for row in self.rows],
            "faults": list(self.faults),
        }

    def text(self) -> str:
        """A table of means, in per cent as published."""
        heads = ("category", "requests", "IoU", "pDice", "Dice", "pDice mended", "Dice in voxels")
        order = ("iou", "pdice", "dice", "pdice_mended", "dice_voxels")
        listed: list[tuple[str, str | None]] = [("all", None)]
        listed += [(name, name) for name in self.categories] if len(self.categories) > 1 else []
        lost = f"{sum(not r.readable for r in self.rows)} of {len(self.rows)} answers name neither a box nor two points"
        lines = [f"Boxes and points on {MEDREASONER_PX} px, in per cent; {lost}"]
        lines.append(f"{heads[0]:<32}" + "".join(f"{head:>{max(10, len(head) + 2)}}" for head in heads[1:]))
        for title, category in listed:
            means = self.means(category)
            count = len([row for row in self.rows if category in (None, row.category)])
            cells = [str(count), *(f"{100 * means[name]:.2f}" for name in order)]
            lines.append(
                f"{title[:31]:<32}" + "".join(f"{cell:>{max(10, len(head) + 2)}}" for cell, head in zip(cells, heads[1:], strict=True))
            )
        return "\n".join(lines)


def ground(rows: Sequence[Row], predictions: Path, references: References) -> Grounding:
    """Score what was answered to the requests of an evaluation whose target is there. NothingToDoError when the folder holds no file
    that says what was answered (seerseg_predict writes one per case)."""
    folder = PredictionFolder(predictions)
    wanted: dict[str, list[Row]] = {}
    for row in rows:
        if row.truth == "present" and row.kind != "label map" and row.case in references.files:
            wanted.setdefault(row.case, []).append(row)
    found, faults = list[Grounded](), list[str]()
    for case, asked in sorted(wanted.items()):
        try:
            content = folder.case(case)
            if content is not None:
                found += _case(content["requests"], asked, predictions, references)
        except SeerSegError as error:
            faults.append(f"Case {case}: {error}")
    if not found:
        raise NothingToDoError(
            faults[0] if faults else f"{predictions} says nothing of what was answered. Boxes and points need the JSON of seerseg_predict."
        )
    return Grounding(tuple(found), tuple(faults))


def _case(entries: Sequence[Mapping[str, Any]], asked: Sequence[Row], predictions: Path, references: References) -> list[Grounded]:
    by_id = {entry["id"]: entry for entry in entries}
    by_text = {normalise_name(str(entry.get("text"))): entry for entry in entries}
    reference = read_reference(references.files[asked[0].case])
    truths: dict[str, Truth] = {}
    found = []
    for row in asked:
        entry = by_id.get(row.request) or by_text.get(normalise_name(row.text)) or {}
        if row.target not in truths:
            whole = Truth(reference.grid, np.isin(reference.array, references.values(row.target)))
            truths[row.target] = whole.pointed(references.points.get((row.case, row.target), ()))
        truth = truths[row.target]
        drawn = read_drawn(predictions / row.file, reference, row.file_values) if row.file else None
        found.append(_grounded(row, _answered(entry), truth, drawn))
    return found


def _answered(entry: Mapping[str, Any]) -> Prompt | None:
    """What was answered; of several turns the last one with a box, else the last."""
    turns = entry.get("turns")
    said = [turn.get("prompt") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    prompts = [prompt for prompt in map(Prompt.from_json, [*said, entry.get("prompt")]) if prompt is not None]
    return next((prompt for prompt in reversed(prompts) if prompt.boxes), prompts[-1] if prompts else None)


def _grounded(row: Row, prompt: Prompt | None, truth: Truth, drawn: Bool | None) -> Grounded:
    boxes = [b for b in prompt.boxes if isinstance(b, Box2D)] if prompt is not None else []
    readable = prompt is not None and bool(boxes or len(prompt.points) >= 2)
    iou = pdice = mended = dice = 0.0
    if prompt is not None and readable and _inside(prompt, truth):
        axis, index = (boxes[0].axis, boxes[0].index) if boxes else slice_of_points(prompt.points)
        image = on_image(prompt, truth)
        if image is not None:
            box, points, true_box, true_points = image
            iou = 0.0 if box is None else published_iou(box, true_box)
            if len(points) >= 2:
                pdice = f.points_dice(points[:2], true_points)
                mended = f.points_dice_mended(points[:2], true_points)
        if drawn is not None and truth.mask is not None and index >= 0:
            where = pixel_map(truth.grid, axis, index, MEDREASONER_PX)
            dice = published_dice(on_pixels(drawn, where), on_pixels(truth.mask, where))
    whole = row.scores.dice if row.scores is not None and row.scores.dice is not None else 0.0
    return Grounded(row.case, row.subject, row.request, row.target, readable, iou, pdice, mended, dice, whole)


def _inside(prompt: Prompt, truth: Truth) -> bool:
    """Whether it lies on the reference's grid at all."""
    try:
        prompt.check(truth.grid)
    except SeerSegError:
        return False
    return True


def published_iou(a: f.Box, b: f.Box) -> float:
    """I / (U + 1e-6)."""
    inner = f.area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return inner / (f.area(a) + f.area(b) - inner + 1e-6)


def published_dice(a: Bool, b: Bool) -> float:
    """2 I / (A + B + 1e-6)."""
    return 2.0 * int(np.count_nonzero(a & b)) / (int(np.count_nonzero(a)) + int(np.count_nonzero(b)) + 1e-6)


def on_pixels(mask: Bool, where: PixelMap) -> Bool:
    """A slice of a mask (Z, Y, X) on the pixels of a view (size, size): each pixel has the voxel that its centre lies in."""
    plane = np.take(mask, where.index, axis=where.axis)
    lines = []
    for side, (offset, scale) in enumerate(zip(where.offset, where.scale, strict=True)):
        voxel = np.floor((offset - np.arange(MEDREASONER_PX)) / scale + 0.5).astype(int)
        lines.append((np.clip(voxel, 0, plane.shape[side] - 1), (voxel >= 0) & (voxel < plane.shape[side])))
    (rows, row_there), (cols, col_there) = lines
    return np.asarray(plane[np.ix_(rows, cols)] & row_there[:, None] & col_there[None, :])
