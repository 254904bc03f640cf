"""Prediction of a whole input: overlapped, resumable, one bad case never ending the run.

A case is skipped when the ledger shows it done with the same image bytes, requests, model and output options and its
files are as they were written. So a corrected scan under an old name is done again, and a run that was killed at any
moment is continued by the same command. Cases that failed, wholly or in part, are tried again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seerseg.dataset import CaseFiles, Inputs, LabelDescription, find_inputs, open_dataset
from seerseg.dataset.raw import label_values
from seerseg.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_SOME_FAILED, DatasetError, OutputError, SeerSegError, UsageError
from seerseg.paths import read_json
from seerseg.prediction.ledger import Entry, Ledger, read_ledger
from seerseg.prediction.outputs import Legend
from seerseg.prediction.pipeline import Pipeline
from seerseg.prediction.predictor import Predictor
from seerseg.prediction.questions import Asked, Questions, gather
from seerseg.prediction.stages import CaseResult, Options, Stages, Work, cost_bytes, peak_rss_mb
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners.base import most_bytes
from seerseg.volume import IMAGE_ENDINGS

_TEMPORARY = re.compile(r"\.tmp-[A-Za-z0-9_]{8}-(.+)")
_IN_FLIGHT_SHARE = 0.25
_FALLBACK_RAM_BYTES = 4 << 30


@dataclass(frozen=True)
class RunReport:
    """What became of a run. total: cases of this shard; not_started: left for the next run because of a signal; missing: cases of all
    shards that are not done yet; problems: sentences that count as failures; notes: sentences that do not."""

    output: Path
    total: int
    results: tuple[CaseResult, ...]
    interrupted: bool = False
    not_started: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    model: Mapping[str, Any] = field(default_factory=dict)

    def count(self, status: str) -> int:
        """How many cases ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def exit_code(self) -> int:
        """0, 3 when anything failed, 75 when stopped by a signal before the end."""
        if self.interrupted:
            return EXIT_REQUEUE
        return EXIT_SOME_FAILED if self.problems or any(r.status in ("partial", "failed") for r in self.results) else EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "output": str(self.output),
            "exit_code": self.exit_code,
            "total": self.total,
            "counts": {status: self.count(status) for status in ("done", "skipped", "partial", "failed")},
            "cases": [
                {"case": r.case, "status": r.status, "error": r.error, "seconds": r.seconds, "requests": r.record.get("requests", [])}
                for r in self.results
            ],
            "interrupted": self.interrupted,
            "not_started": list(self.not_started),
            "missing": list(self.missing),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "ignored": list(self.ignored),
            "seconds": self.seconds,
            "peak_rss_mb": self.peak_rss_mb,
            "model": dict(self.model),
        }


def predict_folder(
    source: str | Path,
    output: str | Path,
    predictor: Predictor,
    *,
    prompts: Sequence[str] = (),
    requests: str | Path | None = None,
    options: Options | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    progress: Callable[[CaseResult, int], None] = lambda result, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> RunReport:
    """Predict every case of `source` (see `find_inputs`) for its requests (see `gather`) into the folder `output`.

    Shard part_id of num_parts takes every num_parts-th case, by name. progress(result, cases of this shard) is called
    from one thread at a time. stopping(): True asks to end early, finishing what is being drawn and written.

    UsageError: contradictory arguments, no request at all, the output folder in use; NothingToDoError: no case; OutputError:
    the disk is full or read-only (what was written stays recorded); ModelError: the model cannot be loaded.
    """
    began = time.monotonic()
    options = options or Options()
    folder = check_output(Path(output).expanduser(), Path(source).expanduser())
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UsageError(f"Part {part_id} of {num_parts} parts does not exist: --part_id counts from 0 to --num_parts minus 1.")
    inputs = find_inputs(source, channels=options.channels)
    questions = gather(inputs, prompts=prompts, requests=Path(requests).expanduser() if requests is not None else None)
    every, notes = _plan(inputs, questions)
    check_collisions(folder, inputs)
    mine = every[part_id::num_parts]
    predictor.load()
    with Ledger(folder, num_parts=num_parts, part_id=part_id) as ledger:
        clean(folder, [work.case for work in mine])
        beside = dataset_beside(inputs, notes) or DatasetBeside()
        run = Stages(
            folder,
            predictor,
            predictor.legend if predictor.legend.values or not beside.values else Legend(beside.values),
            options,
            inputs,
            ledger,
            frozenset(work.case for work in every),
            beside.modalities,
            lambda result: progress(result, len(mine)),
        )
        pipeline: Pipeline[Work] = Pipeline(
            read=run.read,
            think=run.think,
            draw=run.draw,
            write=run.write,
            cost_bytes=cost_bytes,
            limit_bytes=options.limit_bytes or default_limit_bytes(most_bytes(predictor.model.reasoner)),
            readers=options.readers,
            writers=options.writers,
            overlap=options.overlap,
            stopping=stopping,
            settled=run.settled,
        )
        pipeline.run(mine)
        notes += ledger.problems
    finished = {result.case for result in run.results}
    left = tuple(work.case for work in mine if work.case not in finished)
    return RunReport(
        output=folder,
        total=len(mine),
        results=tuple(sorted(run.results, key=lambda r: r.case)),
        interrupted=bool(left),
        not_started=left,
        missing=_missing(ledger, [work.case for work in every], run.results, others=num_parts > 1),
        problems=questions.problems,
        notes=(*questions.notes, *notes),
        ignored=inputs.ignored,
        seconds=round(time.monotonic() - began, 3),
        peak_rss_mb=peak_rss_mb(),
        model=predictor.identity,
    )


@dataclass(frozen=True)
class DatasetBeside:
    """The dataset that an input folder belongs to. values: by normalised label, canonical name and synonym."""

    values: Mapping[str, int] = field(default_factory=dict)
    modalities: tuple[str | None, ...] = ()


def dataset_beside(inputs: Inputs, notes: list[str]) -> DatasetBeside | None:
    """What the dataset.json in the input folder or the one above it says; None when there is none. One that cannot be read is noted."""
    for folder in dict.fromkeys((inputs.folder, inputs.folder.resolve().parent)):
        path = folder / "dataset.json"
        if inputs.kind == "jobs" or not path.is_file():
            continue
        modalities: tuple[str | None, ...] = ()
        descriptions: Mapping[str, LabelDescription] = {}
        try:
            dataset = open_dataset(folder, strict=False)
            labels, descriptions, modalities = dataset.labels, dataset.descriptions, dataset.modalities
        except SeerSegError:  # a folder of test cases alone has label values too
            try:
                labels = label_values(read_json(path, DatasetError), path)[0]
            except (SeerSegError, AttributeError) as error:
                notes.append(f"Label values do not follow {path}, as it cannot be read: {error}")
                continue
        values: dict[str, int] = {}
        for label, numbers in labels.items():
            described = descriptions.get(label)
            for name in (label, *((described.canonical, *described.synonyms) if described else ())):
                if len(numbers) == 1:
                    values.setdefault(normalise_name(name), numbers[0])
        return DatasetBeside(values, modalities)
    return None


def check_output(folder: Path, source: Path) -> Path:
    """Make the output folder; UsageError or OutputError when it cannot be one."""
    if folder.name.lower().endswith(IMAGE_ENDINGS):
        raise UsageError(f"-o must name a folder, not an image: {folder}. The masks are named after the cases.")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output {folder} is a file. Choose a folder.")
    if source.is_dir() and folder.exists() and folder.samefile(source):
        raise UsageError(f"The output folder {folder} is the input folder. Choose another, so that masks are never taken for scans.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the output folder {folder}: {error.strerror}. Choose another.") from error
    return folder


def check_collisions(folder: Path, inputs: Inputs) -> None:
    """UsageError when a mask would be written over an image of the input."""
    place = folder.resolve()
    same: dict[Path, bool] = {}  # of each folder of images, asked once
    for case in inputs.cases:
        for image in case.images:
            if image.name == f"{case.id}.nii.gz":
                if image.parent not in same:
                    same[image.parent] = image.parent.resolve() == place
                if same[image.parent]:
                    raise UsageError(f"The mask of case {case.id} would overwrite its image {image}. Choose another output folder.")


def clean(folder: Path, cases: Sequence[str]) -> None:
    """Remove temporary files that a killed run left of these cases; those of other shards may be in use."""
    mine = set(cases)
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match:
            name = re.sub(r"(\.nii\.gz|\.json|\.png)$", "", match[1])
            if name in mine or any(name[: m.start()] in mine for m in re.finditer("__", name)):
                Path(entry.path).unlink(missing_ok=True)


def _plan(inputs: Inputs, questions: Questions) -> tuple[list[Work], list[str]]:
    """The work of all shards, by case name, and notes. UsageError when nothing at all is asked."""
    files = {case.id: case for case in inputs.cases}
    works = {case: Work(files[case], asked) for case, asked in questions.by_case.items() if case in files}
    for case, fault in inputs.faults.items():
        works[case] = Work(CaseFiles(case, ()), questions.by_case.get(case, Asked()), fault=fault)
    unasked = [case for case in files if case not in works]
    if len(unasked) == len(files) and files and not questions.problems:
        raise UsageError(
            f'There are {len(files)} cases, but no request. Give --prompt "left lung" (repeatable), --requests FILE.jsonl, a jobs file, '
            "or a file <case>.txt beside each image."
        )
    notes = [f"{len(unasked)} cases have no request and were left out: {', '.join(unasked[:5])}{' ...' if len(unasked) > 5 else ''}."]
    return [works[case] for case in sorted(works)], notes if unasked else []


def _missing(ledger: Ledger, cases: Sequence[str], results: Sequence[CaseResult], *, others: bool) -> tuple[str, ...]:
    """Cases of all shards that no ledger shows as done. others: other shards may have written meanwhile."""
    here = {result.case: result.status for result in results}
    newest: dict[str, Entry | None] = {case: ledger.latest(case) for case in cases if case not in here}
    for path in sorted(ledger.folder.glob("ledger*.jsonl")) if others else ():
        for entry in read_ledger(path)[0] if path != ledger.path else ():
            before = newest.get(entry.case)
            if entry.case in newest and (before is None or before.time <= entry.time):
                newest[entry.case] = entry

    def state(case: str) -> str:
        last = newest.get(case)
        return here.get(case) or (last.status if last is not None else "")

    return tuple(case for case in cases if state(case) not in ("done", "skipped"))


def default_limit_bytes(held_bytes: int, ram_bytes: int | None = None) -> int:
    """What may be in flight: a quarter of the memory that the reasoner leaves, at least a 32nd of all. held_bytes: what the reasoner may
    come to hold; ram_bytes: all that there is, asked of the machine when None."""
    from seerseg.planning.hardware import hardware

    ram = ram_bytes or hardware(ask_gpus=lambda: "").ram_bytes or _FALLBACK_RAM_BYTES
    return int(max((ram - held_bytes) * _IN_FLIGHT_SHARE, ram * _IN_FLIGHT_SHARE / 8))
