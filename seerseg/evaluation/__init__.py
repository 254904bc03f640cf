"""Predictions against references: rows per request, stability per case and target, summaries with intervals by subject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seerseg.dataset import Request
from seerseg.errors import NothingToDoError, OutputError, UsageError
from seerseg.evaluation.predictions import PredictionFolder, References, holds_requests, label_map_jobs, request_jobs
from seerseg.evaluation.records import About, Absent, CaseTarget, Cost, Evaluation, Group, Row, Scoring, Spread, Summary
from seerseg.evaluation.scoring import CaseJob, score_jobs_in_order
from seerseg.evaluation.summary import case_targets, summarise
from seerseg.evaluation.tables import text_table, write_csv

__all__ = [
    "About",
    "Absent",
    "CaseTarget",
    "Cost",
    "Evaluation",
    "Group",
    "References",
    "Row",
    "Scoring",
    "Spread",
    "Summary",
    "case_targets",
    "evaluate",
    "evaluate_label_maps",
    "holds_requests",
    "summarise",
    "text_table",
    "write_csv",
]

Progress = Callable[[int, int], None]


def evaluate(
    predictions: Path,
    references: References,
    requests: Iterable[Request],
    *,
    optional: Iterable[Request] = (),
    cases: Sequence[str] | None = None,
    split: str = "all",
    fold: int | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
    chill: bool = False,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Score what seerseg_predict (or any tool that names its masks `<case>__<request id>.nii.gz`) wrote for `requests`.

    optional: requests that count when they were predicted (label prompts). cases: only these; split and fold: only what the result says of
    itself. chill: leave out what was not predicted; otherwise OutputError naming it. NothingToDoError when there is nothing to score.
    What could not be scored is in `faults`, never an exception.
    """
    folder = PredictionFolder(predictions)
    chosen = None if cases is None else set(cases)
    jobs, missing, faults, models = request_jobs(
        folder,
        references,
        [r for r in requests if chosen is None or r.case in chosen],
        optional=[r for r in optional if chosen is None or r.case in chosen],
        scoring=scoring,
    )
    if missing and not chill:
        raise OutputError(_missing_sentence(missing, predictions, "requests"))
    if not jobs:
        raise NothingToDoError(
            faults[0]
            if faults
            else f"{predictions} holds no prediction for any of the requests. Give the folder and the requests of one run."
        )
    about = About(
        dataset=references.name,
        predictions=str(predictions),
        split=split,
        fold=fold,
        tolerance_mm={"": scoring.tolerance_mm, **scoring.tolerances},
        model=models[0] if models else {},
        mixed=any(model != models[0] for model in models),
        reference_note=references.note,
    )
    return _run(about, jobs, missing, faults, workers, progress)


def evaluate_label_maps(
    predictions: Path,
    references: References,
    *,
    cases: Sequence[str] | None = None,
    split: str = "all",
    fold: int | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
    chill: bool = False,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Compare label maps value by value, as nnU-Net's evaluation does; parameters and errors as in `evaluate`."""
    if not references.labels:
        raise UsageError("No label was named to compare. Give their values (-l 1 2 3) or a dataset.json (-djfile).")
    jobs, missing = label_map_jobs(
        predictions,
        references,
        cases=cases,
        scoring=scoring,
    )
    if missing and not chill:
        raise OutputError(_missing_sentence(missing, predictions, "cases"))
    if not jobs:
        raise NothingToDoError(f"{predictions} holds no prediction for any reference of {references.name}. The file names must be equal.")
    about = About(
        dataset=references.name,
        predictions=str(predictions),
        split=split,
        fold=fold,
        tolerance_mm={"": scoring.tolerance_mm, **scoring.tolerances},
        reference_note=references.note,
    )
    return _run(about, jobs, missing, [], workers, progress)


def _run(about: About, jobs: list[CaseJob], missing: Sequence[str], faults: Sequence[str], workers: int, progress: Progress) -> Evaluation:
    rows: list[Row] = []
    sentences: list[str] = [*faults]
    found: Any
    for done, found in enumerate(score_jobs_in_order(jobs, workers), start=1):
        rows += found[0]
        sentences += found[1]
        progress(done, len(jobs))
    return summarise(about, rows, missing=missing, faults=sentences)


def _missing_sentence(missing: Sequence[str], predictions: Path, what: str) -> str:
    shown = "; ".join(missing[:3]) + (f"; and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"{len(missing)} {what} have no prediction in {predictions} ({shown}). "
        "Predict them, choose the cases that were predicted (--split, --cases), or leave the others out with --chill."
    )
