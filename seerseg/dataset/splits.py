"""Who is tested, who learns, who judges: splits of a dataset by subject.

Test subjects are set apart first. The rest is dealt into ten parts; fold k of five takes parts 2k and 2k+1 as
validation (choose checkpoints), part 2k+2 (mod 10) as bank (accept skills) and all others as training cases.
Over the five folds every subject that is not a test subject is validated exactly once. Cases of one subject never part.

A dataset's splits are written once, to `splits.json` in its preprocessed folder, by whichever process comes first. A
`splits.json` in the raw folder takes the place of the rule.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.dataset.raw import RawDataset
from seerseg.errors import PlanError
from seerseg.paths import read_json, write_text

SPLIT_SEED = 12345
FOLDS = 5
_PARTS = 2 * FOLDS
SPLITS_SCHEMA = 1
SPLITS_FILE = "splits.json"


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

    @classmethod
    def from_json(cls, value: Any, where: str = SPLITS_FILE) -> Splits:
        """The inverse of `to_json`; other keys are tolerated. PlanError, naming `where`, when it is not of that form."""
        if not isinstance(value, dict) or value.get("schema") != SPLITS_SCHEMA:
            found = value.get("schema") if isinstance(value, dict) else None
            raise PlanError(f"{where} has schema version {found!r}, this SeerSeg reads version {SPLITS_SCHEMA}. Mend or remove it.")
        folds, seed = value.get("folds"), value.get("seed", SPLIT_SEED)
        if not isinstance(folds, list) or not folds or not all(isinstance(f, dict) for f in folds) or not isinstance(seed, int):
            raise PlanError(f"{where} lacks a list of 'folds', each with 'train', 'val' and 'bank'. Mend or remove it.")
        read = [Fold(*(_case_list(fold, part, f"{where}, fold {k},") for part in ("train", "val", "bank"))) for k, fold in enumerate(folds)]
        return cls(test=_case_list(value, "test", where), folds=tuple(read), seed=seed)

    @property
    def cases(self) -> frozenset[str]:
        """Every case that has a place."""
        return frozenset(self.test).union(*(set(f.train) | set(f.val) | set(f.bank) for f in self.folds))


def _case_list(value: Mapping[str, Any], part: str, where: str) -> tuple[str, ...]:
    listed = value.get(part, [] if part in ("bank", "test") else None)
    if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed) or len(set(listed)) != len(listed):
        raise PlanError(f"{where} must give {part!r} as a list of case ids, each once. Mend or remove the file.")
    return tuple(listed)


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


def check_splits(splits: Splits, dataset: RawDataset, where: str = SPLITS_FILE) -> None:
    """PlanError when a case is unknown, or a subject has cases in two parts that must be apart.

    Train and val may be equal, as they are where there are too few subjects; test never meets anything.
    """
    unknown = sorted(splits.cases - set(dataset.cases))
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise PlanError(f"{where} names cases that {dataset.name} does not hold: {shown}. Restore them, or remove {where} to deal anew.")
    for k, fold in enumerate(splits.folds):
        parts = {"train": fold.train, "bank": fold.bank, "test": splits.test}
        if set(fold.val) != set(fold.train):
            parts["val"] = fold.val
        owner: dict[str, tuple[str, str]] = {}
        for part, cases in parts.items():
            for case in cases:
                subject = dataset.subject_of[case]
                before, other = owner.setdefault(subject, (part, case))
                if before != part:
                    raise PlanError(
                        f"{where}, fold {k}: case {case!r} ({part}) is of the same subject as {other!r} ({before}), "
                        f"subject {subject!r}. Cases of one subject must not part: mend or remove {where}."
                    )


def load_splits(path: Path, dataset: RawDataset) -> Splits:
    """Read and check a splits file."""
    splits = Splits.from_json(read_json(path, PlanError), str(path))
    check_splits(splits, dataset, str(path))
    return splits


def load_or_make_splits(dataset: RawDataset, folder: Path) -> Splits:
    """The splits in `folder`/splits.json; made there first when they are not, race-free.

    Any number of processes may call this at once: one complete file appears, and all return its content. A `splits.json`
    of the raw dataset is taken instead of the rule, and must not contradict a file that is there already.
    """
    path, raw_path = Path(folder) / SPLITS_FILE, dataset.folder / SPLITS_FILE
    given = load_splits(raw_path, dataset) if raw_path.is_file() else None
    if not path.exists():
        made = given or make_splits(dataset.subjects)
        _write_once(path, json.dumps(made.to_json(), indent=1, ensure_ascii=False) + "\n")
    splits = load_splits(path, dataset)
    if given is not None and given != splits:
        raise PlanError(
            f"{raw_path} and {path} differ. Remove the second to take the first (models trained on it then have other test cases)."
        )
    return splits


def _write_once(path: Path, text: str) -> None:
    """Put a complete file at `path` unless one is there: the first of several processes wins."""

    complete = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    write_text(complete, text)
    try:
        os.link(complete, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        write_text(path, text)  # no hard links on this file system: equal datasets make equal bytes, so a race is harmless
    finally:
        complete.unlink(missing_ok=True)
