"""From a dataset on disk to requests.jsonl beside its dataset.json, never over what a person wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.dataset import RawDataset, Splits, load_splits, make_splits, open_dataset
from seerseg.errors import DatasetError, OutputError, UsageError
from seerseg.paths import write_text
from seerseg.planning import Plans, load_plans
from seerseg_data.requests.generate import Report, Settings, make

REQUESTS_FILE = "requests.jsonl"
CARD_JSON = "requests_card.json"
_TOLERATED = ("bad-request", "missing-label")


@dataclass(frozen=True)
class Written:
    """What a run left. path: the request file; backup: where the file that was there before lies now, None when there was none."""

    path: Path
    report: Report
    backup: Path | None
    splits: Splits


def open_labelled(folder: Path) -> RawDataset:
    """A raw dataset whose request file may be broken (it is about to be made) and whose cases may lack label maps (they are named
    later); DatasetError for everything else."""
    dataset = open_dataset(folder, strict=False)
    broken = next((p for p in dataset.faults if p.severity == "error" and p.kind not in _TOLERATED), None)
    if broken is not None:
        raise DatasetError(f"{broken.message} {broken.remedy}")
    return dataset


def splits_of(dataset: RawDataset, preprocessed: Path | None) -> Splits:
    """The splits that planning wrote; where it has not run, those that it will make: the raw folder's splits.json, else the rule."""
    for folder in (preprocessed, dataset.folder):
        if folder is not None and (folder / "splits.json").is_file():
            return load_splits(folder / "splits.json", dataset)
    return make_splits(dataset.subjects)


def plans_of(preprocessed: Path | None, name: str) -> Plans | None:
    """The plans of a dataset, None when it was not planned."""
    path = preprocessed / f"{name}.json" if preprocessed is not None else None
    return load_plans(path) if path is not None and path.is_file() else None


def write_dataset_requests(
    dataset: RawDataset,
    *,
    splits: Splits,
    settings: Settings,
    seed: int = 0,
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[], None] | None = None,
    rewrite: Callable[[Report], Report] | None = None,
) -> Written:
    """Make the requests of a dataset and write them, the whole file at once.

    UsageError when a request file is there that this program did not write, or that was edited since, unless `overwrite`: then it
    is kept as requests.jsonl.bak (.bak2, ...). DatasetError when no case could be used. rewrite: what a writer model makes of it.
    """
    path = dataset.folder / REQUESTS_FILE
    ours = is_ours(path)
    if path.exists() and not ours and not overwrite:
        raise UsageError(
            f"{path} is there and was not made by seerseg_make_requests, or was edited since. "
            "Give --overwrite to replace it (it is kept as requests.jsonl.bak)."
        )
    report = make(dataset, splits=splits, settings=settings, seed=seed, workers=workers, progress=progress)
    if not report.made and report.faults:
        raise DatasetError(next(iter(report.faults.values())))
    if rewrite is not None:
        report = rewrite(report)
    backup = _back_up(path) if path.exists() and not ours else None
    write_text(path, "".join(json.dumps(made.to_json(), ensure_ascii=False) + "\n" for made in report.made))
    return Written(path, report, backup, splits)


def digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, hex."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def is_ours(path: Path) -> bool:
    """Whether a request file is, byte for byte, the one that the card beside it tells of."""
    card = path.with_name(CARD_JSON)
    try:
        told: Any = json.loads(card.read_text(encoding="utf-8"))
        return isinstance(told, dict) and told.get("requests_digest") == digest(path)
    except (OSError, ValueError):
        return False


def _back_up(path: Path) -> Path:
    number = 1
    while True:
        kept = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if not kept.exists():
            break
        number += 1
    try:
        shutil.copy2(path, kept)
    except OSError as error:
        raise OutputError(f"Cannot keep {path} as {kept.name}: {error.strerror}. Nothing was changed.") from error
    return kept
