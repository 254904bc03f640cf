"""Answering one scan after the other so that nothing that is wrong with one costs more than its own answer.

Every scan of the input gets an answer of its name: the label map, or, where the scan or its prompts cannot be used, an empty one of the
right shape. With `never_fail` an empty answer is written before the scan is touched, so that even a process that is killed half way
(memory, time limit) has answered; a missing file can void a whole submission.

Where two classes claim a voxel, the one with fewer voxels in this scan has it; of two of equal size the one with the lower value.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.challenge.npz import CT_WINDOW, PromptSet, as_stored, known_shape, read_prompts, read_scan, write_answer
from seerseg.dataset import check_text
from seerseg.errors import (
    EXIT_DONE,
    EXIT_REQUEUE,
    EXIT_SOME_FAILED,
    NothingToDoError,
    OutputError,
    RequestError,
    SeerSegError,
    UsageError,
)
from seerseg.prediction.predictor import Predictor
from seerseg.volume import Volume

MOST_INSTANCES = 255
CONFLICT_RULE = "where classes overlap, the one with fewer voxels has the voxel; of equal ones the one with the lower value"
_ANSWERED = ("ok", "absent", "empty")
_UNKNOWN_SHAPE = (1, 1, 1)


@dataclass(frozen=True)
class ClassAnswer:
    """What came of one class. status: as of an `Episode`, or "failed" when its text could not be put; target: the name answered;
    voxels: in the answer, after conflicts."""

    value: int
    text: str
    status: str
    target: str | None = None
    voxels: int = 0
    message: str = ""


@dataclass(frozen=True)
class ScanAnswer:
    """What came of one scan. status: "done", "partial" (some classes could not be answered) or "failed" (an empty answer was
    written); reason: the sentence; fault: the traceback when it failed for a reason that is a bug."""

    case: str
    status: str
    reason: str = ""
    shape: tuple[int, ...] = ()
    classes: tuple[ClassAnswer, ...] = ()
    instances: bool = False
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class ChallengeReport:
    """What became of a run. not_started: scans left because of a signal; ignored: files that are no scans."""

    output: Path
    answers: tuple[ScanAnswer, ...]
    not_started: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    never_fail: bool = False
    seconds: float = 0.0
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0; 3 when a scan failed, wholly or in part, unless never_fail; 75 when stopped by a signal."""
        if self.not_started:
            return EXIT_REQUEUE
        failed = any(answer.status != "done" for answer in self.answers)
        return EXIT_SOME_FAILED if failed and not self.never_fail else EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "output": str(self.output),
            "exit_code": self.exit_code,
            "conflict_rule": CONFLICT_RULE,
            "scans": [answer.to_json() for answer in self.answers],
            "not_started": list(self.not_started),
            "ignored": list(self.ignored),
            "seconds": self.seconds,
            "model": dict(self.model),
        }


class Answerer:
    """A model that is made when first needed, and asked for all classes of a scan in one call, so that the scan is encoded once.

    make: gives the predictor; with never_fail what it raises is the reason of every scan's empty answer instead of the run's end.
    """

    def __init__(self, make: Callable[[], Predictor], *, never_fail: bool = False) -> None:
        self._make, self.never_fail = make, never_fail
        self._predictor: Predictor | None = None

    @property
    def predictor(self) -> Predictor:
        """Loaded."""
        if self._predictor is None:
            made = self._make()
            made.load()
            self._predictor = made
        return self._predictor

    @property
    def identity(self) -> Mapping[str, Any]:
        """What is known of the model; empty when it could not be loaded."""
        return {} if self._predictor is None else self._predictor.identity

    def load(self) -> None:
        """Load the model now, unless its faults belong to the scans."""
        if not self.never_fail:
            _ = self.predictor

    def label_map(self, volume: Volume, prompts: PromptSet) -> tuple[NDArray[Any], tuple[ClassAnswer, ...], tuple[str, ...]]:
        """The canonical label map (Z, Y, X), what came of each class, and notes. One call of the model for all classes."""
        asked, answers = {}, {}
        for value, text in prompts.first.items():
            try:
                asked[value] = check_text(text, f"The text of class {value}")
            except RequestError as error:
                answers[value] = ClassAnswer(value, text[:200], "failed", message=str(error))
        masks: dict[int, NDArray[np.bool_]] = {}
        predictions = self.predictor.predict(volume, list(asked.values())) if asked else []
        for (value, text), found in zip(asked.items(), predictions, strict=True):
            if found.mask is not None and found.status in _ANSWERED:
                masks[value] = found.mask.array
            answers[value] = ClassAnswer(value, text, found.status, found.target, 0, found.message)
        if prompts.instances:
            array, notes = number_instances(masks, volume.grid.shape_zyx)
        else:
            array, notes = paint(masks, volume.grid.shape_zyx)
        counts = np.bincount(array.reshape(-1)) if array.size else np.zeros(1, np.int64)
        ended = []
        for value in prompts.texts:
            drawn = int(counts[1:].sum()) if prompts.instances else int(counts[value]) if value < len(counts) else 0
            one = answers[value]
            ended.append(ClassAnswer(one.value, one.text, one.status, one.target, drawn if value in masks else 0, one.message))
        return array, tuple(ended), notes


def paint(masks: Mapping[int, NDArray[np.bool_]], shape_zyx: Sequence[int]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Masks by value as one label map of the smallest type that holds the values; conflicts by CONFLICT_RULE."""
    top = max(masks, default=0)
    array = np.zeros(shape_zyx, dtype=np.min_scalar_type(top))
    sizes = {value: int(np.count_nonzero(mask)) for value, mask in masks.items()}
    for value in sorted(masks, key=lambda v: (-sizes[v], -v)):
        array[masks[value]] = value
    notes = []
    lost = sum(sizes.values()) - int(np.count_nonzero(array))
    if lost:
        notes.append(f"{lost} voxels were claimed more than once: {CONFLICT_RULE}")
    if top > MOST_INSTANCES:
        notes.append(f"the value {top} needs more than 8 bits; the published evaluation cuts values to 8 bits")
    return array, tuple(notes)


def number_instances(masks: Mapping[int, NDArray[np.bool_]], shape_zyx: Sequence[int]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Face-connected parts of all masks together, numbered from 1 in array order, as the published evaluation splits a mask itself.

    Only the MOST_INSTANCES largest are kept: the evaluation reads 8 bits.
    """
    from scipy import ndimage

    union = np.zeros(shape_zyx, dtype=np.bool_)
    for mask in masks.values():
        union |= mask
    labels, count = ndimage.label(union, output=np.int32)
    if count <= MOST_INSTANCES:
        return labels.astype(np.uint8), ()
    sizes = np.bincount(labels.reshape(-1))[1:]
    kept = np.sort(np.argsort(-sizes, kind="stable")[:MOST_INSTANCES])
    table = np.zeros(count + 1, dtype=np.uint8)
    table[kept + 1] = np.arange(1, MOST_INSTANCES + 1)
    return table[labels], (f"of {count} instances the {MOST_INSTANCES} largest were kept: the published evaluation reads 8 bits",)


def predict_npz(
    source: str | Path,
    output: str | Path,
    answerer: Answerer,
    *,
    ct_window: tuple[float, float] | None = CT_WINDOW,
    progress: Callable[[ScanAnswer, int], None] = lambda answer, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> ChallengeReport:
    """Answer every .npz of a folder (or one file) into a file of the same name in `output`.

    UsageError: input and output are one folder; NothingToDoError: no .npz; OutputError: an answer cannot be written; ModelError: the model
    cannot be loaded (with never_fail that is a reason like others). progress gets every answer and the number of scans.
    """
    began = time.monotonic()
    scans, ignored = list_npz(Path(source))
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output {folder} is a file. Choose a folder.")
    if folder.is_dir() and folder.samefile(scans[0].parent):
        raise UsageError(f"The output folder {folder} is the input folder: answers have the names of the scans. Choose another.")
    answerer.load()
    if answerer.never_fail:
        for path in scans:
            write_answer(nothing_for(path), folder / path.name)
    answers: list[ScanAnswer] = []
    for path in scans:
        if stopping():
            break
        answers.append(answer_npz(path, folder / path.name, answerer, ct_window=ct_window))
        progress(answers[-1], len(scans))
    left = tuple(path.name for path in scans[len(answers) :])
    seconds = round(time.monotonic() - began, 3)
    return ChallengeReport(folder, tuple(answers), left, ignored, answerer.never_fail, seconds, answerer.identity)


def list_npz(source: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The scans of a folder, by name, and the files that are none; one file stands for itself."""
    if source.is_file() and source.suffix == ".npz":
        return [source], ()
    if not source.is_dir():
        raise UsageError(f"There is no folder of .npz files {source}. Give one with -i.")
    entries = sorted(p for p in source.iterdir() if not p.name.startswith("."))
    scans = [p for p in entries if p.suffix == ".npz"]
    if not scans:
        raise NothingToDoError(f"{source} holds no .npz file. Give the folder of the challenge's scans with -i.")
    named = {p.stem for p in scans}
    return scans, tuple(p.name for p in entries if p.suffix != ".npz" and not (p.suffix == ".json" and p.stem in named))


def answer_npz(path: Path, into: Path, answerer: Answerer, *, ct_window: tuple[float, float] | None = CT_WINDOW) -> ScanAnswer:
    """Answer one scan. Whatever is wrong with it becomes the reason of an empty answer; OutputError when none can be written."""
    began = time.monotonic()
    try:
        prompts = read_prompts(path)
        volume = read_scan(path, ct_window=ct_window)
        array, classes, notes = answerer.label_map(volume, prompts)
        segs = np.ascontiguousarray(as_stored(array, volume))
    except OutputError:
        raise
    except Exception as error:  # a crash would cost the answer
        segs = nothing_for(path)
        write_answer(segs, into)
        reason, fault = reason_of(error, path.name)
        return ScanAnswer(path.name, "failed", reason, segs.shape, seconds=round(time.monotonic() - began, 3), fault=fault)
    write_answer(segs, into)
    status, reason = sum_up(classes)
    seconds = round(time.monotonic() - began, 3)
    return ScanAnswer(path.name, status, reason, segs.shape, classes, prompts.instances, notes, seconds)


def nothing_for(path: Path) -> NDArray[np.uint8]:
    """An empty answer to a scan: of its shape where that can be read, else of a single voxel."""
    return np.zeros(known_shape(path) or _UNKNOWN_SHAPE, dtype=np.uint8)


def sum_up(classes: Sequence[ClassAnswer]) -> tuple[str, str]:
    """Status of a scan by those of its classes, and the sentences of those that could not be answered."""
    failed = [c for c in classes if c.status not in _ANSWERED]
    said = " ".join(f"Class {c.value} ({c.text[:60]!r}): {c.message}" for c in failed)
    return ("done" if not failed else "failed" if len(failed) == len(classes) else "partial"), said


def reason_of(error: Exception, name: str) -> tuple[str, str]:
    """The sentence for what went wrong, and the traceback when it is a bug."""
    if isinstance(error, SeerSegError):
        return str(error), ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"There was not enough memory for {name}. Use a machine or a GPU with more.", ""
    if isinstance(error, OSError):
        return f"{name} could not be read: {error}.", ""
    return f"{name} failed for a reason that is a fault of the program: {type(error).__name__}: {error}", traceback.format_exc()
