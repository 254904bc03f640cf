"""The scores of the CVPR 2025 text-guided challenge, as its published program computes them, and what that program leaves out.

Of classes (instance_label 0), for every class that the prompts name and the reference holds:

- dsc         Dice.
- nsd         normalised surface Dice at 2 mm by surface elements and their areas (MONAI's sub-voxel form, which is that of DeepMind's
              program that the challenge uses), with the file's spacing taken in the order in which it stands. The file holds (W, H, D),
              the arrays are (D, H, W): on voxels that are no cubes these are not millimetres. It is what the leaderboard showed.
- nsd_mm      SeerSeg's own at 2 mm, every axis with its own spacing and every surface voxel counted once.

Of instances (instance_label 1): f1 at an overlap of 0.5 IoU, pairs one to one, and dsc_tp, the mean Dice of the pairs (0 without pairs). An
answer with a single value is first split into face-connected parts.

Besides, reported and never averaged in: classes that were asked for and are not in the reference, and how much was drawn for them. The
published program skips them, so that drawing what is not there costs nothing.

What differs on purpose: an answer that is missing or damaged counts as an empty one (the program leaves it out of its means), and values
are not cut to 8 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.challenge.npz import PromptSet, npz_names, read_answer, read_prompts, read_spacing
from seerseg.errors import ImageError, NothingToDoError, SeerSegError, UsageError
from seerseg.metrics import largest_extent, score_masks
from seerseg.volume import Grid

SCHEMA = 1
TOLERANCE_MM = 2.0
OVERLAP_IOU = 0.5
Labels = NDArray[Any]


@dataclass(frozen=True)
class ClassScores:
    """One class of one scan. present: the reference holds it; scores are None where it does not. *_ml: None on a flat image."""

    value: int
    text: str
    present: bool
    dsc: float | None
    nsd: float | None
    nsd_mm: float | None
    reference_voxels: int
    predicted_voxels: int
    predicted_ml: float | None


@dataclass(frozen=True)
class InstanceScores:
    """The instances of one scan."""

    f1: float
    dsc_tp: float
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class ScanScores:
    """One scan. The means over its present classes are None when there is none; fault: why the answer counts as an empty one."""

    case: str
    instances: InstanceScores | None
    classes: tuple[ClassScores, ...]
    fault: str = ""

    @property
    def dsc(self) -> float | None:
        """Mean over present classes."""
        return mean(c.dsc for c in self.classes)

    @property
    def nsd(self) -> float | None:
        """Mean over present classes."""
        return mean(c.nsd for c in self.classes)

    @property
    def nsd_mm(self) -> float | None:
        """Mean over present classes."""
        return mean(c.nsd_mm for c in self.classes)

    @property
    def absent(self) -> tuple[ClassScores, ...]:
        """The classes that the reference does not hold."""
        return tuple(c for c in self.classes if not c.present)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "case": self.case,
            "dsc": self.dsc,
            "nsd": self.nsd,
            "nsd_mm": self.nsd_mm,
            "f1": self.instances.f1 if self.instances else None,
            "dsc_tp": self.instances.dsc_tp if self.instances else None,
            "instances": asdict(self.instances) if self.instances else None,
            "classes": [asdict(c) for c in self.classes],
            "fault": self.fault,
        }


@dataclass(frozen=True)
class ChallengeScores:
    """All scans. problems: references that could not be read, so that nothing could be scored."""

    scans: tuple[ScanScores, ...]
    problems: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """Answers that counted as empty, with the reason."""
        return tuple(f"{s.case}: {s.fault}" for s in self.scans if s.fault)

    @property
    def means(self) -> dict[str, float | int | None]:
        """Means over scans, each with the number of scans in it, and the false positives on absent classes."""
        absent = [c for s in self.scans for c in s.absent]
        drawn = [c for c in absent if c.predicted_voxels]
        semantic = [s for s in self.scans if s.instances is None and s.dsc is not None]
        return {
            "dsc": mean(s.dsc for s in semantic),
            "nsd": mean(s.nsd for s in semantic),
            "nsd_mm": mean(s.nsd_mm for s in semantic),
            "scans_of_classes": len(semantic),
            "f1": mean(s.instances.f1 for s in self.scans if s.instances),
            "dsc_tp": mean(s.instances.dsc_tp for s in self.scans if s.instances),
            "scans_of_instances": sum(s.instances is not None for s in self.scans),
            "absent_classes": len(absent),
            "absent_classes_drawn": len(drawn),
            "absent_ml": sum(c.predicted_ml or 0.0 for c in drawn),
        }

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, schema 1."""
        return {
            "schema": SCHEMA,
            "tolerance_mm": TOLERANCE_MM,
            "overlap_iou": OVERLAP_IOU,
            "nsd_rule": "nsd: surface elements, the file's spacing in the order in which it stands; nsd_mm: each axis with its own spacing",
            "mean": self.means,
            "scans": [s.to_json() for s in self.scans],
            "problems": list(self.problems),
        }


def evaluate_npz(
    answers: Path, references: Path, scans: Path | None = None, *, progress: Callable[[int], None] = lambda total: None
) -> ChallengeScores:
    """Score a folder of answers (segs) against one of references (gts), which decides which scans there are.

    spacing and prompts come from the file of the same name in `scans`, else from the reference's own. UsageError for a folder that is
    not there; NothingToDoError when no reference holds gts.
    """
    for folder in (answers, references, *([scans] if scans else [])):
        if not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.")
    files = sorted(p for p in references.glob("*.npz") if not p.name.startswith("."))
    if not files:
        raise NothingToDoError(f"{references} holds no .npz file, so there is nothing to score.")
    found, problems = [], []
    for path in files:
        try:
            found.append(score_scan(answers / path.name, path, scans / path.name if scans else path))
        except SeerSegError as error:
            problems.append(str(error))
        progress(len(files))
    return ChallengeScores(tuple(found), tuple(problems))


def score_scan(answer: Path, reference: Path, scan: Path) -> ScanScores:
    """Score one answer. ImageError or RequestError when reference or scan cannot be used; a bad answer counts as an empty one."""
    truth = read_answer(reference, "gts")
    prompts = read_prompts(scan)
    spacing = read_spacing(scan if "spacing" in npz_names(scan) else reference)
    fault = ""
    try:
        segs = read_answer(answer)
        if segs.shape != truth.shape:
            raise ImageError(f"{answer}: segs has the shape {segs.shape}, the reference {truth.shape}.")
    except ImageError as error:
        segs, fault = np.zeros(truth.shape, dtype=np.uint8), str(error) if answer.exists() else f"There is no answer {answer}."
    if prompts.instances:
        scores = score_instances(segs, truth)
        classes = _undrawn(segs, truth, prompts, spacing)
        return ScanScores(reference.name, scores, classes, fault)
    return ScanScores(reference.name, None, score_classes(segs, truth, prompts, spacing), fault)


def score_classes(segs: Labels, truth: Labels, prompts: PromptSet, spacing_dhw: tuple[float, float, float]) -> tuple[ClassScores, ...]:
    """The scores of every class asked for, on label maps (D, H, W) of one shape."""
    grid = grid_of(truth.shape, spacing_dhw)
    scores = []
    for value, text in prompts.first.items():
        predicted, there = segs == value, truth == value
        box = largest_extent(predicted, there)
        if box is None:
            scores.append(ClassScores(value, text, False, None, None, None, 0, 0, 0.0))
            continue
        found = score_masks(predicted[box], there[box], grid, tolerance_mm=TOLERANCE_MM, box=box)
        surface = published_nsd(predicted[box], there[box], spacing_dhw[::-1]) if found.present else None
        scores.append(
            ClassScores(
                value,
                text,
                found.present,
                found.dice if found.present else None,
                surface,
                found.nsd if found.present else None,
                found.tp + found.fn,
                found.tp + found.fp,
                found.prediction_ml,
            )
        )
    return tuple(scores)


def grid_of(shape: Sequence[int], spacing_dhw: tuple[float, float, float]) -> Grid:
    """The grid of arrays (D, H, W) in their own order: distances are all that is asked of it."""
    return Grid((shape[0], shape[1], shape[2]), np.diag([*spacing_dhw[::-1], 1.0]))


def published_nsd(predicted: NDArray[np.bool_], there: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """nsd of the module's head: spacing along the axes as the published program takes it. 0 when exactly one mask is empty."""
    import torch
    from monai.metrics import compute_surface_dice

    if not predicted.any() or not there.any():
        return 0.0
    pair = [torch.from_numpy(np.ascontiguousarray(np.pad(mask, 1)))[None, None] for mask in (predicted, there)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = compute_surface_dice(
            pair[0].float(),
            pair[1].float(),
            [TOLERANCE_MM],
            include_background=True,
            spacing=[float(s) for s in spacing],
            use_subvoxels=True,
        )
    return float(value)


def score_instances(segs: Labels, truth: Labels) -> InstanceScores:
    """F1 at OVERLAP_IOU: pairs one to one, as many as possible, of those the largest sum of overlaps."""
    from scipy import ndimage
    from scipy.optimize import linear_sum_assignment

    box = largest_extent(segs > 0, truth > 0)
    if box is None:
        return InstanceScores(0.0, 0.0, 0, 0, 0)
    segs, truth = segs[box], truth[box]
    if len(np.unique(segs[segs > 0])) == 1:
        segs = ndimage.label(segs > 0, output=np.int32)[0]
    t_values, t_sizes = np.unique(truth[truth > 0], return_counts=True)
    p_values, p_sizes = np.unique(segs[segs > 0], return_counts=True)
    both = (truth > 0) & (segs > 0)
    rows, columns = np.searchsorted(t_values, truth[both]), np.searchsorted(p_values, segs[both])
    pairs, shared = np.unique(np.stack([rows, columns], axis=1), axis=0, return_counts=True)
    overlap = shared / (t_sizes[pairs[:, 0]] + p_sizes[pairs[:, 1]] - shared)
    fit = overlap >= OVERLAP_IOU
    tp, dices = 0, []
    if fit.any():
        table = np.zeros((len(t_values), len(p_values)))
        table[pairs[fit, 0], pairs[fit, 1]] = 1 + overlap[fit] / (2 * min(table.shape))
        dice = dict(zip(map(tuple, pairs.tolist()), (2 * shared / (t_sizes[pairs[:, 0]] + p_sizes[pairs[:, 1]])).tolist(), strict=True))
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            if table[row, column] > 0:
                tp += 1
                dices.append(dice[int(row), int(column)])
    fp, fn = len(p_values) - tp, len(t_values) - tp
    return InstanceScores(2 * tp / (2 * tp + fp + fn) if tp else 0.0, float(np.mean(dices)) if dices else 0.0, tp, fp, fn)


def _undrawn(segs: Labels, truth: Labels, prompts: PromptSet, spacing: tuple[float, float, float]) -> tuple[ClassScores, ...]:
    """Of a scan of instances that holds none: what was drawn all the same."""
    if truth.any():
        return ()
    voxels = int(np.count_nonzero(segs))
    ml = voxels * grid_of(truth.shape, spacing).voxel_volume_mm3 / 1000
    value, text = next(iter(prompts.first.items()))
    return (ClassScores(value, text, False, None, None, None, 0, voxels, ml),)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there, None when none is."""
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def text_table(found: ChallengeScores) -> str:
    """Scans, their classes, and the means, as lines."""
    heads = ("scan", "class", "text", "DSC", "NSD", "NSD mm", "F1", "DSC TP", "absent mL")
    rows: list[tuple[str, ...]] = []
    for scan in found.scans:
        if scan.instances is not None:
            rows.append((scan.case, "-", "instances", "-", "-", "-", _number(scan.instances.f1), _number(scan.instances.dsc_tp), "-"))
        for one in scan.classes:
            shown = (one.dsc, one.nsd, one.nsd_mm)
            extra = "-" if one.present else f"{one.predicted_ml or 0:.2f}"
            rows.append((scan.case, str(one.value), _short(one.text), *(_number(v) for v in shown), "-", "-", extra))
    means: Mapping[str, Any] = found.means
    named = [_number(means[key]) for key in ("dsc", "nsd", "nsd_mm", "f1", "dsc_tp")]
    rows.append(("mean over scans", "", "", *named, f"{means['absent_ml']:.2f}"))
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
    told = (
        f"{means['absent_classes']} classes asked for are in no reference; for {means['absent_classes_drawn']} of them something was drawn"
    )
    counts = f"{means['scans_of_classes']} scans of classes, {means['scans_of_instances']} of instances. {told}."
    return "\n".join([*lines, counts])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 32 else text[:29] + "..."
