"""Preprocessing: every case of a raw dataset decoded once, measured for planning, and stored.

Resumes by content: a case is skipped when the bytes of its raw files, the layout and what was asked for are those it was made
from and its stored files are whole. Cases finish in any order, one bad case never ends the run, and a stored file is either
the old one or the new one, so the run may be killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.dataset import CaseFiles, RawDataset
from seerseg.dataset.workers import Died, run_in_processes
from seerseg.errors import ImageError, NothingToDoError, OutputError, SeerSegError, StoreError, UsageError, did_you_mean
from seerseg.planning import CaseRecord, case_record
from seerseg.store.case import CASES, LABELS, SourceFile, StoredCase, hash_source, verify_case, write_case
from seerseg.store.layout import StoreLayout
from seerseg.volume import read_case, read_labels

STALE_S = 3600.0
_PRELOAD = ("blosc2", "nibabel", "seerseg.store.preprocess")
_FEWER = "Use fewer workers (-np), or a machine with more memory."


@dataclass(frozen=True)
class Outcome:
    """What became of one case: "done", "skipped" (was there already) or "failed" with a sentence; trace: of a bug only."""

    case: str
    status: str
    message: str = ""
    record: CaseRecord | None = None
    trace: str = ""


@dataclass(frozen=True)
class PreprocessReport:
    """Cases by what became of them, in the dataset's order. records: of all that are stored now; seconds: wall time."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    records: dict[str, CaseRecord]
    seconds: float

    @property
    def ok(self) -> bool:
        """No case failed."""
        return not self.failed


@dataclass(frozen=True)
class _Job:
    files: CaseFiles
    modalities: tuple[str | None, ...]
    folder: Path
    layout: StoreLayout
    resample_channels: bool
    clean: bool


def preprocess(
    dataset: RawDataset,
    folder: Path,
    *,
    layout: StoreLayout | None = None,
    workers: int = 1,
    cases: Iterable[str] | None = None,
    resample_channels: bool = False,
    clean: bool = False,
    progress: Callable[[Outcome], None] | None = None,
) -> PreprocessReport:
    """Store the cases of `dataset` (all, or those named) under its preprocessed `folder`, in `workers` processes.

    With one worker everything happens in this process. clean: do all again. progress is called in this process after each case.
    Each worker holds one case at a time. NothingToDoError when there is no case, UsageError for an unknown one, OutputError when
    the folder cannot be written, InterruptedRunError when the workers were told to stop; a case's own faults are in the report.
    """
    began = time.monotonic()
    folder, layout = Path(folder), layout or StoreLayout()
    jobs = [_Job(files, dataset.modalities, folder, layout, resample_channels, clean) for files in _chosen(dataset, cases)]
    _remove_stale(folder)
    outcomes: dict[str, Outcome] = {}
    stream = _in_processes(jobs, workers) if workers > 1 and len(jobs) > 1 else (_store(job) for job in jobs)
    with contextlib.closing(stream):
        for outcome in stream:
            outcomes[outcome.case] = outcome
            if progress is not None:
                progress(outcome)
    ordered = [outcomes[job.files.id] for job in jobs]
    return PreprocessReport(
        done=tuple(o.case for o in ordered if o.status == "done"),
        skipped=tuple(o.case for o in ordered if o.status == "skipped"),
        failed={o.case: o.message for o in ordered if o.status == "failed"},
        records={o.case: o.record for o in ordered if o.record is not None},
        seconds=time.monotonic() - began,
    )


def _chosen(dataset: RawDataset, cases: Iterable[str] | None) -> list[CaseFiles]:
    known = {**dataset.cases, **dataset.test_cases}
    names = list(dataset.cases) if cases is None else list(dict.fromkeys(cases))
    for name in names:
        if name not in known:
            raise UsageError(f"{dataset.name} has no case {name!r}.{did_you_mean(name, known)}")
    if not names:
        raise NothingToDoError(f"{dataset.name} has no case to preprocess. Put its images into {dataset.folder / 'imagesTr'}.")
    return [known[name] for name in names]


def _in_processes(jobs: Sequence[_Job], workers: int) -> Generator[Outcome]:
    """Outcomes in the order of completion. A case whose process dies is tried once more, alone, before it counts as failed."""
    died: list[_Job] = []
    for outcome in run_in_processes(_store, jobs, workers, preload=_PRELOAD):
        if isinstance(outcome, Died):
            died.append(outcome.item)
        else:
            yield outcome
    for job in died:
        for outcome in run_in_processes(_store, [job], 1, preload=_PRELOAD):
            if isinstance(outcome, Died):
                case = job.files.id
                message = f"The process that preprocessed {case} {outcome.how}, also when alone: probably too little memory. {_FEWER}"
                outcome = Outcome(case, "failed", message)
            yield outcome


def _store(job: _Job) -> Outcome:
    """Store one case; every fault becomes an outcome, except an OutputError, which would meet all other cases too."""
    case = job.files.id
    try:
        return _store_or_skip(job)
    except OutputError:
        raise
    except SeerSegError as error:
        return Outcome(case, "failed", str(error))
    except MemoryError:
        return Outcome(case, "failed", f"There is not enough memory to preprocess {case}. {_FEWER}")
    except OSError as error:
        return Outcome(case, "failed", f"Cannot read {error.filename or job.files.images[0]}: {error.strerror or error}. Check the file.")
    except Exception as error:
        message = f"A bug in SeerSeg stopped {case}: {type(error).__name__}: {error}. Please report it."
        return Outcome(case, "failed", message, trace=traceback.format_exc())


def _store_or_skip(job: _Job) -> Outcome:
    files = job.files
    paths = [*files.images, *([files.label] if files.label is not None else [])]
    before = [_state(path) for path in paths]
    sources = tuple(hash_source(path) for path in paths)
    record = None if job.clean else _current(job, sources)
    if record is not None:
        return Outcome(files.id, "skipped", record=record)
    volumes = read_case(files.images, modalities=job.modalities, resample_channels=job.resample_channels, name=files.id)
    labels = read_labels(files.label, volumes[0].grid) if files.label is not None else None
    if [_state(path) for path in paths] != before:
        raise ImageError(f"The files of case {files.id} were changed while they were read. Run the same command again.")
    record = case_record(files.id, volumes, labels[0] if labels is not None else None)
    write_case(job.folder, files.id, volumes, labels, job.layout, sources=sources, record=record.to_json(), settings=_settings(job))
    return Outcome(files.id, "done", record=record)


def _current(job: _Job, sources: tuple[SourceFile, ...]) -> CaseRecord | None:
    """The record of the stored case when it is what would be written now, byte-checked; None when it must be written."""
    try:
        case: StoredCase = verify_case(job.folder, job.files.id)
    except StoreError:
        return None
    facts = case.image.metadata
    if case.sources != sources or facts["layout"] != job.layout.to_json() or facts["settings"] != _settings(job):
        return None
    try:
        return CaseRecord.from_json(case.record) if case.record is not None else None
    except (KeyError, TypeError):
        return None


def _settings(job: _Job) -> dict[str, Any]:
    return {"modalities": list(job.modalities), "labelled": job.files.label is not None, "resample_channels": job.resample_channels}


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remove_stale(folder: Path) -> None:
    """Remove what a killed run left half-written; younger files may belong to a run that goes on beside this one."""
    for kind in (CASES, LABELS):
        for path in (folder / kind).glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
