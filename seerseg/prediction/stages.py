"""What the pipeline's stages do with one case. What is wrong with a case is kept in it and recorded; the run goes on."""

from __future__ import annotations

import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.consensus import Readings
from seerseg.dataset import CaseFiles, Inputs
from seerseg.errors import ImageError, OutputError, RequestError, SeerSegError
from seerseg.paths import read_json
from seerseg.prediction.ledger import Entry, Ledger, Seen, describe, is_intact, make_key, now, see_image
from seerseg.prediction.outputs import SCHEMA, Answered, CaseOutcome, Legend, write_case
from seerseg.prediction.predictor import Predictor
from seerseg.prediction.questions import Asked, BadRequest
from seerseg.vocabulary import Vocabulary, words
from seerseg.volume import Volume, read_case, read_grid

SUMMARISED = ("id", "text", "target_answered", "status", "volume_ml", "file", "value", "message")
_COLOURS = ((230, 60, 60), (70, 200, 90), (80, 140, 255), (250, 200, 50), (200, 90, 230), (60, 210, 210), (255, 140, 60), (180, 220, 90))


@dataclass(frozen=True)
class Options:
    """How a run reads and writes. channel: which channel is shown and segmented; readers, writers: threads; limit_bytes: what may be in
    flight, None for a quarter of the memory that this process may use and the reasoner leaves; overlap=False: one stage after the
    other."""

    per_request: bool = False
    overwrite: bool = False
    overlay: bool = False
    resample_channels: bool = False
    modality: str | None = None
    channels: int | None = None
    channel: int = 0
    readers: int = 1
    writers: int = 1
    limit_bytes: int | None = None
    overlap: bool = True

    @property
    def shaping(self) -> dict[str, Any]:
        """Those that change what is written."""
        return {
            "schema": SCHEMA,
            "per_request": self.per_request,
            "overlay": self.overlay,
            "resample_channels": self.resample_channels,
            "channel": self.channel,
        }


@dataclass(frozen=True)
class CaseResult:
    """What became of a case. status: "done", "skipped" (done before), "partial" or "failed"; record: "warnings" and "requests" of
    its JSON, with what a summary needs of each (`SUMMARISED`); fault: the traceback when it failed for a reason that is a bug."""

    case: str
    status: str
    error: str = ""
    seconds: float = 0.0
    record: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


class Written(Mapping[str, Any]):
    """What a summary needs of a case's JSON file, read when it is first asked for; nothing where the file cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _value(self) -> dict[str, Any]:
        try:
            value = read_json(self._path)
            requests = [{key: request.get(key) for key in SUMMARISED} for request in value["requests"]]
            return {"requests": requests, "warnings": value["warnings"]}
        except (SeerSegError, KeyError, TypeError, AttributeError):
            return {}

    def __getitem__(self, key: str) -> Any:
        return self._value[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)


@dataclass(eq=False)
class Work:
    """One case on its way through the stages."""

    files: CaseFiles
    asked: Asked
    fault: str = ""
    started: float = 0.0
    digests: tuple[str, ...] = ()
    seen: tuple[Seen, ...] = ()
    key: str = ""
    modality: str | None = None
    skipped: bool = False
    volume: Volume | None = None
    readings: Readings | None = None
    outcome: CaseOutcome | None = None
    bug: str = ""

    @property
    def case(self) -> str:
        """The case's name."""
        return self.files.id


class Stages:
    """The stages of one run. Each takes and gives a `Work`; what is wrong with one case is kept in it."""

    def __init__(
        self,
        folder: Path,
        predictor: Predictor,
        legend: Legend,
        options: Options,
        inputs: Inputs,
        ledger: Ledger,
        taken: frozenset[str],
        modalities: Sequence[str | None],
        report: Callable[[CaseResult], None],
    ) -> None:
        self.folder, self.predictor, self.legend, self.options, self.inputs = folder, predictor, legend, options, inputs
        self.ledger, self.taken, self.modalities, self.report = ledger, taken, modalities, report
        self.results: list[CaseResult] = []
        self._settings = {"model": predictor.identity, "legend": legend.identity, **options.shaping}
        self._lock = threading.Lock()

    def settled(self, work: Work) -> bool:
        """Hash the image and report the case if it is done already. What is wrong with the image is kept for `read`."""
        work.started = time.monotonic()

        def body() -> None:
            work.modality = self.inputs.modalities.get(work.case, self.options.modality)
            known = {} if self.options.overwrite else {i.path: i for entry in self.ledger.lines(work.case) for i in entry.images}
            looked = _look(work.files.images, known)
            work.digests, work.seen = tuple(d for d, _ in looked), tuple(s for _, s in looked if s is not None)
            work.key = self._key(work)
            work.skipped = not self.options.overwrite and self.ledger.finished(work.case, work.key) is not None

        self._guard(work, body)
        if work.skipped:
            self._finish(CaseResult(work.case, "skipped", record=Written(self.folder / f"{work.case}.json")))
        return work.skipped

    def read(self, work: Work) -> Work:
        """Read the image, render its views and open its dialogues."""

        def body() -> None:
            if not work.asked.requests:
                raise RequestError(work.asked.bad[0].reason if work.asked.bad else f"Case {work.case} has no request.")
            work.volume = self._volume(work)
            work.readings = self.predictor.open_readings(work.volume, [r.text for r in work.asked.requests])

        self._guard(work, body)
        return work

    def think(self, work: Work) -> Work:
        """Let the reasoner answer all requests of the case in one batch."""
        readings = work.readings
        if readings is not None:
            self._guard(work, lambda: self.predictor.reason(readings))
        return work

    def draw(self, work: Work) -> Work:
        """Draw all answers in one call and cut the masks to their boxes; the volume is let go."""

        def body() -> None:
            volume, readings = work.volume, work.readings
            if volume is None or readings is None:
                return
            answered = []
            episodes = self.predictor.finish(readings, volume)
            work.readings = None
            for request in work.asked.requests:
                answered.append(Answered.cut(request, episodes.pop(0)))
            pictures = overlay_pictures(volume, answered) if self.options.overlay else {}
            work.outcome = CaseOutcome(
                case=work.case,
                images=work.files.images,
                digests=work.digests,
                modality=volume.modality,
                grid=volume.grid,
                source=volume.source,
                answered=tuple(answered),
                bad=work.asked.bad,
                warnings=tuple(warnings_of(volume, answered)),
                pictures=pictures,
            )

        if not work.fault:
            self._guard(work, body)
        work.readings = work.volume = None
        return work

    def write(self, work: Work) -> None:
        """Write the case's files, then its line in the ledger."""
        if not work.fault:
            self._guard(work, lambda: self._write_files(work), writing=True)
        if work.fault:
            work.outcome = self._failed(work)
            try:
                self._write_files(work)
            except OSError as error:
                raise self._unwritable(error) from error

    def _write_files(self, work: Work) -> None:
        outcome = work.outcome
        assert outcome is not None
        written = []
        if self.inputs.kind != "jobs" or work.files.images:
            written = write_case(
                self.folder,
                outcome,
                legend=self.legend,
                model=self.predictor.identity,
                per_request=self.options.per_request,
                taken=self.taken,
            )
        entry = Entry(
            case=work.case,
            key=work.key,
            status=outcome.status,
            files=tuple(describe(path) for path in written),
            error=outcome.error,
            seconds=round(time.monotonic() - work.started, 3),
            peak_rss_mb=peak_rss_mb(),
            time=now(),
            images=work.seen,
            requests=tuple((a.request.id, a.episode.status) for a in outcome.answered) + tuple((b.id, "failed") for b in outcome.bad),
        )
        with self._lock:
            self._remove_stale(work, {path.name for path in written})
            self.ledger.append(entry)
        record: Mapping[str, Any] = Written(self.folder / f"{work.case}.json") if written else {}
        self._finish(CaseResult(work.case, outcome.status, outcome.error, entry.seconds, record, work.bug))

    def _finish(self, result: CaseResult) -> None:
        with self._lock:
            self.results.append(result)
            self.report(result)

    def _remove_stale(self, work: Work, fresh: set[str]) -> None:
        """Take away what an earlier run made of this case from another image, model or request, so that it is not taken for this one's."""
        earlier = self.ledger.latest(work.case)
        if earlier is None or not work.key or (earlier.key == work.key and work.fault):
            return
        for file in earlier.files:
            if file.name not in fresh and is_intact(self.folder, file):
                (self.folder / file.name).unlink(missing_ok=True)

    def _key(self, work: Work) -> str:
        asked = [(r.id, r.text) for r in work.asked.requests] + [(b.id, b.reason) for b in work.asked.bad]
        return make_key(work.digests, asked, {**self._settings, "modality": [work.modality, *self.modalities]})

    def _volume(self, work: Work) -> Volume:
        paths = work.files.images
        if not self.options.channel < len(paths):
            raise ImageError(
                f"Case {work.case} has {len(paths)} channel{'s' if len(paths) > 1 else ''}, so there is no channel {self.options.channel}."
            )
        known = self.modalities if work.modality is None and len(self.modalities) == len(paths) else [work.modality] * len(paths)
        volumes = read_case(paths, modalities=known, resample_channels=self.options.resample_channels, name=work.case)
        shown = replace(volumes[self.options.channel], source=volumes[0].source)
        together = self.predictor.segmenter.capabilities.channels > 1  # else the other channels are let go
        return replace(shown, siblings=lambda: volumes) if together else shown

    def _failed(self, work: Work) -> CaseOutcome:
        bad = [(r.id, r.text, work.fault) for r in work.asked.requests] + [(b.id, b.text, b.reason) for b in work.asked.bad]
        return CaseOutcome(
            case=work.case,
            images=work.files.images,
            digests=work.digests,
            modality=work.modality,
            bad=tuple(BadRequest(*b) for b in bad),
            error=work.fault,
        )

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"Cannot write to {self.folder}: {error.strerror or error}. Choose another folder.")

    def _guard(self, work: Work, body: Callable[[], None], *, writing: bool = False) -> None:
        """Run; whatever is wrong with this case alone becomes its fault. A fault of the output folder goes on to the caller."""
        if work.fault:
            return
        try:
            body()
        except OutputError:
            raise
        except SeerSegError as error:
            work.fault = str(error)
        except OSError as error:
            if writing:
                raise self._unwritable(error) from error
            work.fault = f"Case {work.case} could not be read: {error}."
        except MemoryError:
            work.fault = f"There was not enough memory for case {work.case}. Predict it alone, or on a machine with more."
        except Exception as error:
            work.bug = traceback.format_exc()
            work.fault = f"Case {work.case} failed for a reason that is a fault of the program: {type(error).__name__}: {error}"


def cost_bytes(work: Work) -> int:
    """What a case holds while in flight: its channels and one mask for each request; 0 when its header cannot be read."""
    if work.fault or not work.files.images:
        return 0
    try:
        size = read_grid(work.files.images[0])[0].size
    except (SeerSegError, OSError, ValueError):
        return 0
    return size * (4 * len(work.files.images) + len(work.asked.requests))


def _look(images: Sequence[Path], known: Mapping[str, Seen]) -> list[tuple[str, Seen | None]]:
    """`see_image` of each; ImageError for one that cannot be opened."""
    try:
        return [see_image(path, known) for path in images]
    except FileNotFoundError as error:
        raise ImageError(f"The image {error.filename} does not exist (a broken link?).") from None
    except PermissionError as error:
        raise ImageError(f"Cannot read {error.filename}: permission denied.") from None


def warnings_of(volume: Volume, answered: Sequence[Answered]) -> list[str]:
    """What a person should know before using the masks."""
    warnings = []
    if volume.source is not None and volume.source.laterality == "assumed":
        vocabulary = Vocabulary.load()
        for one in answered:
            named = [one.request.text, one.episode.target or ""]
            if any(vocabulary.side_words.get(word) in ("left", "right") for text in named for word in words(text)):
                warnings.append(
                    f"Request {one.request.id!r} names a side, but the image does not say which side is which; left and right are assumed."
                )
    return warnings


def overlay_pictures(volume: Volume, answered: Sequence[Answered], count: int = 6) -> dict[str, Any]:
    """ ".png" -> a montage of axial slices through what was drawn, each target in its own colour; {} when nothing was."""
    from seerseg.views import SEER_VIEWS, montage, overlay, render_slice

    drawn = [a for a in answered if a.voxels and a.crop is not None]
    if not drawn:
        return {}
    low, high = min(a.lo[0] for a in drawn), max(a.box[0].stop for a in drawn) - 1
    spec = replace(SEER_VIEWS, window="volume")
    pictures, captions = [], []
    for index in sorted({round(i) for i in np.linspace(low, high, count + 2)[1:-1]} | ({low} if low == high else set())):
        view = render_slice(volume, spec, index)
        for number, one in enumerate(drawn):
            if one.crop is not None and one.box[0].start <= index < one.box[0].stop:
                plane = np.zeros(volume.grid.shape_zyx[1:], dtype=bool)
                plane[one.box[1:]] = one.crop[index - one.lo[0]]
                view = overlay(view, plane, _COLOURS[number % len(_COLOURS)], 0.45)
        pictures.append(view.pixels)
        captions.append(f"z {index}")
    return {".png": montage(pictures, captions=captions)}


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
