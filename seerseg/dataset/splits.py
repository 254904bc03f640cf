"""Who is tested, who learns, who judges: splits of a dataset by subject.

Test subjects are set apart first. The rest is dealt into ten parts; fold k of five takes parts 2k and 2k+1 as
validation (choose checkpoints), part 2k+2 (mod 10) as bank (accept skills) and all others as training cases.
Over the five folds every subject that is not a test subject is validated exactly once. Cases of one subject never part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPLIT_SEED = 12345
FOLDS = 5
_PARTS = 2 * FOLDS
SPLITS_SCHEMA = 1


@dataclass(frozen=True)
class Fold:
    """Case ids of one fold, each sorted; the three never share a subject."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    bank: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """The whole division of a dataset: `test` is the same for every fold."""

    test: tuple[str, ...]
    folds: tuple[Fold, ...]
    seed: int = SPLIT_SEED

    def to_json(self) -> dict[str, object]:
        """A JSON-ready dict (`splits.json`)."""
        return {
            "schema": SPLITS_SCHEMA,
            "seed": self.seed,
            "test": list(self.test),
            "folds": [{"train": list(f.train), "val": list(f.val), "bank": list(f.bank)} for f in self.folds],
        }


def _rank(seed: int, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}:{subject}".encode()).digest()


def make_splits(subjects: Mapping[str, Sequence[str]], seed: int = SPLIT_SEED, test_fraction: float = 0.2) -> Splits:
    """Deal subjects into test and five folds.

    subjects: subject id -> its case ids. The order is that of a hash of seed and subject id, so it depends on neither
    the machine nor the listing order. With fewer than five subjects nothing can be set apart for every use: then all
    cases train and also validate, test and bank are empty, and the caller must say so.
    """
    order = sorted(subjects, key=lambda s: _rank(seed, s))

    def cases(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted(case for name in names for case in subjects[name]))

    if len(order) < FOLDS:
        everything = cases(order)
        return Splits(test=(), folds=tuple(Fold(everything, everything, ()) for _ in range(FOLDS)), seed=seed)
    test_count = max(1, round(test_fraction * len(order)))
    test, rest = order[:test_count], order[test_count:]
    parts = [rest[i::_PARTS] for i in range(_PARTS)]
    folds = []
    for k in range(FOLDS):
        val_parts, bank_part = {2 * k, 2 * k + 1}, (2 * k + 2) % _PARTS
        folds.append(
            Fold(
                train=cases([s for i, p in enumerate(parts) if i not in val_parts and i != bank_part for s in p]),
                val=cases([s for i in sorted(val_parts) for s in parts[i]]),
                bank=cases(parts[bank_part]),
            )
        )
    return Splits(test=cases(test), folds=tuple(folds), seed=seed)
