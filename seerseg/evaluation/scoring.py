"""One case: its label map and its predictions are read once, every mask is scored once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, SeerSegError
from seerseg.evaluation.records import Row
from seerseg.metrics import LesionScores, MaskScores, score_lesions, score_masks
from seerseg.metrics.masks import Bool, Box
from seerseg.volume import Grid, read_labels
from seerseg.volume.orientation import lattice_map

_MOST_BOXES = 1 << 16  # label values up to here get their boxes in one pass


@dataclass(frozen=True)
class Drawn:
    """Where a predicted mask is: a file and its values there (None: every voxel over 0); no file: an empty mask."""

    file: Path | None
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Question:
    """A row still without scores, the values that are its target in the reference (None: absent), and what was drawn."""

    row: Row
    values: tuple[int, ...] | None
    drawn: Drawn
    tolerance_mm: float
    lesions: bool = False


@dataclass(frozen=True)
class CaseJob:
    """All questions on one case. reference: its label map, None where it has none and nothing but absent targets is asked.

    ignore_label: voxels of this value in the reference count neither way. least_voxels: a target with fewer voxels in the
    reference (but some) is cut off by the field of view: its truth is unknown.
    """

    case: str
    reference: Path | None
    questions: tuple[Question, ...]
    ignore_label: int | None = None
    least_voxels: int = 1


@dataclass(eq=False)
class _Labels:
    """A label map whose masks are cut out by value."""

    array: NDArray[Any]
    grid: Grid
    boxes: list[Box | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        from scipy import ndimage

        high = int(self.array.max()) if self.array.size else 0
        if high < _MOST_BOXES and self.array.dtype.kind in "iu":
            self.boxes = ndimage.find_objects(self.array)

    def box(self, values: tuple[int, ...] | None) -> Box | None:
        """The box around all voxels of these values (None: all over 0), None when there are none."""
        if not self.boxes and self.array.any():
            from scipy import ndimage

            mask = self.array > 0 if values is None else np.isin(self.array, values)
            found: list[Box | None] = ndimage.find_objects(mask.view(np.uint8))
            return found[0] if found else None
        chosen = self.boxes if values is None else [self.boxes[v - 1] for v in values if 1 <= v <= len(self.boxes)]
        return _around([b for b in chosen if b is not None])

    def mask(self, values: tuple[int, ...] | None, box: Box) -> Bool:
        """The mask inside a box, a new array."""
        part = self.array[box]
        if values is None:
            return np.asarray(part > 0)
        return np.asarray(part == values[0]) if len(values) == 1 else np.isin(part, values)


def score_case(job: CaseJob) -> tuple[list[Row], list[str]]:
    """The rows of a case, and a sentence for each file that could not be used (its rows carry it as note, without scores)."""
    faults: list[str] = []
    try:
        reference = _Labels(*read_labels(job.reference)) if job.reference is not None else None
    except SeerSegError as error:
        sentence = f"Case {job.case}: {error}"
        return [replace(q.row, note=sentence) for q in job.questions], [sentence]
    rows: dict[int, Row] = {}
    known: dict[Any, tuple[MaskScores, LesionScores | None]] = {}
    by_file: dict[Path | None, list[int]] = {}
    for number, question in enumerate(job.questions):
        by_file.setdefault(question.drawn.file, []).append(number)
    for file, numbers in by_file.items():
        try:
            drawn = _Labels(*_on_grid_of(file, reference)) if file is not None else None
        except SeerSegError as error:
            faults.append(f"Case {job.case}: {error}")
            rows |= {n: replace(job.questions[n].row, note=faults[-1]) for n in numbers}
            continue
        for number in numbers:
            rows[number] = _score(job, job.questions[number], reference, drawn, known)
    return [rows[number] for number in range(len(job.questions))], faults


def read_reference(file: Path) -> _Labels:
    """A reference label map and its grid; errors as of `read_labels`."""
    return _Labels(*read_labels(file))


def read_drawn(file: Path, reference: _Labels, values: tuple[int, ...] | None) -> Bool:
    """A predicted mask (Z, Y, X) on its reference's grid; errors as of a case that is scored."""
    array, _ = _on_grid_of(file, reference)
    return np.asarray(array > 0) if values is None else np.isin(array, values)


def _on_grid_of(file: Path, reference: _Labels | None) -> tuple[NDArray[Any], Grid]:
    """A prediction on its reference's grid: as it is or exactly flipped; GeometryError for any other grid."""
    array, grid = read_labels(file)
    if reference is None or grid.close_to(reference.grid):
        return array, grid if reference is None else reference.grid
    lattice = lattice_map(grid, reference.grid)
    if lattice is not None and sorted(grid.shape_zyx) == sorted(reference.grid.shape_zyx):
        moved = lattice.place(array, reference.grid.shape_zyx)
        # Places of equal extent give a view of the same voxels; one that is shifted would lose some at the border.
        if np.shares_memory(moved, array):
            return np.ascontiguousarray(moved), reference.grid
    distance = grid.corner_distance_mm(reference.grid)
    how = (
        f"its corners are up to {distance:.3g} mm off"
        if np.isfinite(distance)
        else f"shape (z, y, x) {grid.shape_zyx} instead of {reference.grid.shape_zyx}"
    )
    raise GeometryError(f"{file} is not on the grid of its reference ({how}). Predict on the image that the reference was drawn on.")


def _score(
    job: CaseJob,
    question: Question,
    reference: _Labels | None,
    drawn: _Labels | None,
    known: dict[Any, tuple[MaskScores, LesionScores | None]],
) -> Row:
    row = question.row
    frame = reference or drawn
    if frame is None:  # an absent target in a case without labels, and nothing drawn: the grid is not needed
        empty = MaskScores(None, None, None, None, None, 0, 0, 0, None, 0.0, question.tolerance_mm)
        return replace(row, scores=empty if row.truth == "absent" else None, drawn_ml=0.0)
    grid = frame.grid
    r_box = reference.box(question.values) if reference is not None and question.values is not None else None
    p_box = drawn.box(question.drawn.values) if drawn is not None else None
    box = _around([b for b in (r_box, p_box) if b is not None]) or (slice(0, 0), slice(0, 0), slice(0, 0))
    p = drawn.mask(question.drawn.values, box) if drawn is not None and p_box else np.zeros([s.stop - s.start for s in box], bool)
    r = reference.mask(question.values, box) if reference is not None and question.values and r_box else np.zeros_like(p)
    if job.ignore_label is not None and reference is not None:
        p &= reference.array[box] != job.ignore_label
    voxels = int(np.count_nonzero(p))
    # The same mask for the same target has the same scores, in whatever file it lies: paraphrases mostly agree.
    key = (
        question.values,
        str(box),
        hashlib.blake2b(np.packbits(p).data, digest_size=16).digest(),
        question.tolerance_mm,
        question.lesions,
    )
    if key not in known:
        lesions = score_lesions(p, r, grid) if question.lesions else None
        known[key] = score_masks(p, r, grid, tolerance_mm=question.tolerance_mm, box=box), lesions
    scores, lesions = known[key]
    row = replace(row, drawn_voxels=voxels, drawn_ml=scores.prediction_ml)
    if row.truth == "unknown":
        return row
    if row.truth == "present" and 0 < scores.tp + scores.fn < job.least_voxels:
        return replace(row, truth="unknown", note=f"only {scores.tp + scores.fn} voxels of the target are in the field of view")
    if row.truth == "present" and not scores.present:
        row = replace(row, truth="absent", note="the reference holds no voxel of the target")
        if row.answer_right is not None:
            row = replace(row, answer_right=None)
    return replace(row, scores=scores, lesions=lesions)


def _around(boxes: list[Box]) -> Box | None:
    if not boxes:
        return None
    lo = [min(b[axis].start for b in boxes) for axis in range(3)]
    hi = [max(b[axis].stop for b in boxes) for axis in range(3)]
    return slice(lo[0], hi[0]), slice(lo[1], hi[1]), slice(lo[2], hi[2])


def score_jobs_in_order(jobs: list[CaseJob], workers: int) -> Any:
    """Yield `score_case` of every job, in order; with several workers in as many processes, a few jobs ahead at most."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(score_case, jobs)
        return
    from collections import deque
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Spawned, not forked: a forked child of a process with threads (torch, BLAS) can hang.
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        waiting: deque[Any] = deque()
        for job in jobs:
            waiting.append(pool.submit(score_case, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
