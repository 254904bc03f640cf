"""How many lesions were found, whatever their size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.metrics.masks import Bool, largest_extent
from seerseg.volume import Grid

DEFAULT_OVERLAP_DICE = 0.2
LESION_RULE = (
    "lesions are 26-connected components of the reference and of the prediction, those under the smallest volume left out; "
    "pairs are one to one, chosen for the largest sum of Dice among pairs of at least the overlap threshold; "
    "a lesion is touched when the whole prediction shares a voxel with it"
)


@dataclass(frozen=True)
class LesionScores:
    """Lesions of one case by LESION_RULE.

    tp: matched pairs; fn: reference lesions without a partner; fp: predicted ones without; touched: reference lesions that the
    prediction shares a voxel with. Rates are None where their denominator is 0.
    """

    tp: int
    fp: int
    fn: int
    touched: int
    matched_dice: float | None
    overlap_dice: float
    smallest_mm3: float

    @property
    def f1(self) -> float | None:
        """2 tp / (2 tp + fp + fn)."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else None

    @property
    def precision(self) -> float | None:
        """tp / (tp + fp)."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else None

    @property
    def recall(self) -> float | None:
        """tp / (tp + fn)."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else None

    @property
    def detection_rate(self) -> float | None:
        """Share of reference lesions that the prediction touches."""
        return self.touched / (self.tp + self.fn) if self.tp + self.fn else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, rates included."""
        rates = {"f1": self.f1, "precision": self.precision, "recall": self.recall, "detection_rate": self.detection_rate}
        return {**rates, **asdict(self)}


def score_lesions(
    prediction: Bool,
    reference: Bool,
    grid: Grid,
    *,
    overlap_dice: float = DEFAULT_OVERLAP_DICE,
    smallest_mm3: float = 0.0,
) -> LesionScores:
    """Match the lesions of two masks (Z, Y, X) by LESION_RULE.

    overlap_dice: Dice from which a pair may match, over 0 up to 1 (0.2: ReXGroundingCT's). smallest_mm3: components of less
    volume are no lesions, on either side.
    """
    from scipy.optimize import linear_sum_assignment

    if not 0 < overlap_dice <= 1:
        raise ValueError(f"The overlap threshold must be over 0 and at most 1, not {overlap_dice!r}.")
    box = largest_extent(prediction, reference)
    if box is None:
        return LesionScores(0, 0, 0, 0, None, overlap_dice, smallest_mm3)
    smallest = smallest_mm3 / grid.voxel_volume_mm3
    p_labels, p_sizes = _components(prediction[box], smallest)
    r_labels, r_sizes = _components(reference[box], smallest)
    touched = int(np.count_nonzero(np.bincount(r_labels[prediction[box]], minlength=len(r_sizes))[1:] * (r_sizes[1:] > 0)))
    # One number per (reference, prediction) pair of labels; only voxels in both are counted.
    both = (r_labels > 0) & (p_labels > 0)
    pairs, shared = np.unique(np.stack([r_labels[both], p_labels[both]], axis=1), axis=0, return_counts=True)
    n_r, n_p = int(np.count_nonzero(r_sizes[1:])), int(np.count_nonzero(p_sizes[1:]))
    scores = 2 * shared / (r_sizes[pairs[:, 0]] + p_sizes[pairs[:, 1]]) if len(pairs) else np.zeros(0)
    fit = scores >= overlap_dice
    pairs, scores = pairs[fit], scores[fit]
    tp, total = 0, 0.0
    if len(pairs):
        rows, r_index = np.unique(pairs[:, 0], return_inverse=True)
        columns, p_index = np.unique(pairs[:, 1], return_inverse=True)
        table = np.zeros((len(rows), len(columns)))
        table[r_index, p_index] = scores
        chosen = table[linear_sum_assignment(table, maximize=True)]
        tp, total = int(np.count_nonzero(chosen)), float(chosen.sum())
    return LesionScores(tp, n_p - tp, n_r - tp, touched, total / tp if tp else None, overlap_dice, smallest_mm3)


def _components(mask: Bool, smallest: float) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Component labels from 1 (0: none) and the voxels of each label (index 0: 0); those under `smallest` voxels become 0."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=bool), output=np.int32)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    small = (sizes > 0) & (sizes < smallest)
    if small.any():
        labels[small[labels]] = 0
        sizes[small] = 0
    return labels, sizes
