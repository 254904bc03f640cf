"""From scores of requests to what may be said of a method: stability over paraphrases, intervals by subject."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
BOOTSTRAP_SEED = 12345
Item = TypeVar("Item", bound=Hashable)
Subject = TypeVar("Subject", bound=Hashable)


@dataclass(frozen=True)
class ParaphraseScores:
    """One score over the paraphrases of one (case, target).

    worst: the smallest, or the largest where small is good. std, variance: population (ddof 0), 0 for one paraphrase.
    count: how many paraphrases; styles: their styles, sorted, each once.
    """

    mean: float
    worst: float
    std: float
    variance: float
    count: int
    styles: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "styles": list(self.styles)}


@dataclass(frozen=True)
class Interval:
    """Percentile bootstrap interval of a mean over cases, subjects resampled whole."""

    lo: float
    hi: float
    level: float
    subjects: int
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b - a over the cases that both have, and its interval (None for a single subject).

    better: share of the resamples in which the mean difference is over 0, None for a single subject.
    """

    mean: float
    interval: Interval | None
    better: float | None
    cases: int
    subjects: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "interval": self.interval.to_json() if self.interval else None}


def over_paraphrases(values: Sequence[float], styles: Sequence[str] = (), *, high_is_good: bool = True) -> ParaphraseScores:
    """Mean, worst, std and variance (ddof 0) of one score over the paraphrases of one (case, target).

    values: one finite number per paraphrase, at least one (ValueError otherwise).
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"The scores of a paraphrase set must be finite and at least one, not {list(values)}.")
    # Equal scores have no variance, whatever the rounding of their mean.
    variance = float(array.var()) if np.ptp(array) > 0 else 0.0
    return ParaphraseScores(
        mean=float(array.mean()),
        worst=float(array.min() if high_is_good else array.max()),
        std=variance**0.5,
        variance=variance,
        count=int(array.size),
        styles=tuple(sorted(set(styles))),
    )


def bootstrap_interval(
    values_by_subject: Mapping[Subject, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = BOOTSTRAP_SEED,
) -> Interval | None:
    """Interval of the plain mean over all values, resampling subjects with replacement; None for fewer than two subjects.

    The same values give the same interval whatever order the subjects come in.
    """
    means = _resampled_means(values_by_subject, resamples, seed)
    if means is None:
        return None
    lo, hi = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    subjects = sum(1 for values in values_by_subject.values() if len(values))
    return Interval(float(lo), float(hi), level, subjects, resamples, seed)


def paired_bootstrap(
    a: Mapping[Item, float],
    b: Mapping[Item, float],
    subject_of: Mapping[Item, Subject],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = BOOTSTRAP_SEED,
) -> PairedDifference:
    """How much better run b is than run a on the same items.

    a, b: item, such as (case, target), -> score; items that only one of them has are left out. subject_of: item -> subject.
    Raises ValueError when they share no item.
    """
    items = [item for item in a if item in b]
    if not items:
        raise ValueError("The two runs have no case and target in common, so they cannot be compared.")
    by_subject: dict[Subject, list[float]] = {}
    for item in items:
        by_subject.setdefault(subject_of[item], []).append(b[item] - a[item])
    means = _resampled_means(by_subject, resamples, seed)
    return PairedDifference(
        mean=float(np.mean([b[item] - a[item] for item in items])),
        interval=bootstrap_interval(by_subject, resamples=resamples, level=level, seed=seed),
        better=float(np.mean(means > 0)) if means is not None else None,
        cases=len(items),
        subjects=len(by_subject),
    )


def _resampled_means(values: Mapping[Subject, Sequence[float]], resamples: int, seed: int) -> NDArray[np.float64] | None:
    kept = sorted((str(subject), float(np.sum(v)), len(v)) for subject, v in values.items() if len(v))
    if len(kept) < 2:
        return None
    sums, counts = np.array([k[1] for k in kept]), np.array([k[2] for k in kept])
    drawn = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=resamples)
    return np.asarray((drawn @ sums) / (drawn @ counts))
