"""SEER-Trace: for every request of a dataset evidence, rationale, answer and where the target lies -> traces.jsonl.

Works on the preprocessed store (labels lie there) and requests.jsonl. Every case is done by itself and kept as traces/<case>.jsonl, whose
first line holds a digest of image, label, requests and settings: an interrupted run goes on where it stopped, and a case whose scan or
requests changed is done again. traces.jsonl is put together from these files, cases in the order of the requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import RawDataset, Request
from seerseg.dataset.workers import each
from seerseg.errors import DatasetError, NothingToDoError, OutputError, SeerSegError
from seerseg.paths import write_atomically, write_text
from seerseg.prompts import Box2D
from seerseg.protocols.base import ABSENT, KeySlice, Trace, Turn
from seerseg.protocols.traces import KIND, SCHEMA, TraceRow
from seerseg.store import StoredCase, open_case
from seerseg.views import ViewSpec
from seerseg.vocabulary import Vocabulary
from seerseg_data.evidence import Detail, Evidence, Scene, measure, scene_sentences, sentences, survey
from seerseg_data.rationales import brief_rationale, provenance, rationale, skill_tag
from seerseg_data.statements import brief_sentence
from seerseg_data.trajectories import Expert, Trajectory, deepest, demonstrate

Bool = NDArray[np.bool_]
VERSION = 2
"""Changes whenever traces do."""
FILE = "traces.jsonl"
CASES = "traces"
_PRELOAD = ("blosc2", "scipy.ndimage", "seerseg_data.traces")


@dataclass(frozen=True)
class Settings:
    """How traces are made. detail: of the evidence; segmenter: the one that trajectories are shown with, None for none; trajectories:
    different ones per target, its requests take turns; seed: of wordings and of the expert; accept_license: of that segmenter's weights."""

    detail: Detail = "short"
    segmenter: str | None = None
    trajectories: int = 2
    expert: Expert = field(default_factory=Expert)
    device: str = "cpu"
    seed: int = 1234
    accept_license: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, what traces depend on."""
        shown = {"trajectories": self.trajectories, "expert": self.expert.to_json()} if self.segmenter else {}
        return {"version": VERSION, "detail": self.detail, "seed": self.seed, "segmenter": self.segmenter, **shown}


@dataclass(frozen=True)
class Named:
    """What the dataset's labels are called: label -> canonical name; values; regions of the body by canonical name; unions: wholes by the
    set of labels that they consist of."""

    canonical: Mapping[str, str]
    values: Mapping[str, tuple[int, ...]]
    regions: Mapping[str, tuple[str, ...]]
    unions: Mapping[frozenset[str], str]

    def answer(self, target: Sequence[str]) -> str:
        """The name of the union of labels."""
        if len(target) == 1:
            return self.canonical[target[0]]
        wanted = {v for label in target for v in self.values[label]}
        same = next((label for label, values in self.values.items() if set(values) == wanted), None)
        if same is not None:
            return self.canonical[same]
        names = [self.canonical[label] for label in target]
        return self.unions.get(frozenset(target)) or " and ".join(", ".join(names).rsplit(", ", 1))


@dataclass(frozen=True)
class Job:
    """One case to be done."""

    id: str
    folder: Path
    requests: tuple[Request, ...]
    notes: Mapping[str, Mapping[str, Any]]
    named: Named
    spec: ViewSpec
    channel: int
    hounsfield: bool
    settings: Settings


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case: "done", "skipped" (was there already) or "failed" with a sentence; counts: see `TraceReport`."""

    case: str
    status: Literal["done", "skipped", "failed"]
    message: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    trace: str = ""


@dataclass(frozen=True)
class TraceReport:
    """counts: rows, targets, absent, unseen (on none of the slices shown), empty (the label has no voxel in the case: answered
    "absent"), unknown (truth not stated: no trace), unread (the lexicon reads something else: the rationale only names the answer),
    shown, dropped (trajectories). faults: sentences about requests that no case could be done for."""

    path: Path | None
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    faults: tuple[str, ...]
    counts: Mapping[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "file": None if self.path is None else str(self.path),
            "cases": {"done": len(self.done), "skipped": len(self.skipped), "failed": self.failed},
            "faults": list(self.faults),
            "counts": dict(self.counts),
            "seconds": round(self.seconds, 3),
        }


# ------------------------------------------------------------------------------------------------------------------ the run


def make_traces(
    dataset: RawDataset,
    folder: Path,
    *,
    spec: ViewSpec,
    channel: int = 0,
    hounsfield: bool = False,
    settings: Settings | None = None,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    clean: bool = False,
    progress: Callable[[CaseOutcome], None] | None = None,
) -> TraceReport:
    """Make the traces of all requests and put `folder`/traces.jsonl together (folder: the dataset's preprocessed one).

    spec, channel, hounsfield: as the plan has them; part: (which, of how many), every so-many-th case; clean: do all again. One worker
    works in this process. NothingToDoError without requests; a case's own faults are in the report and end nothing else. OutputError
    when the folder cannot be written.
    """
    began, settings = time.monotonic(), settings or Settings()
    named = name_labels(dataset)
    jobs, faults = _jobs(dataset, Path(folder), named, spec, channel, hounsfield, settings)
    if not jobs and not faults:
        raise NothingToDoError(f"{dataset.name} has no requests to make traces of. Make them with seerseg_make_requests -d {dataset.name}.")
    _remove_stale(Path(folder) / CASES)
    outcomes: dict[str, CaseOutcome] = {}
    mine = jobs[part[0] :: part[1]]
    stream = each(_Do(clean), mine, workers, preload=_PRELOAD)
    with contextlib.closing(stream) as results:  # type: ignore[type-var]
        for job, outcome in results:
            if isinstance(outcome, OutputError):
                raise outcome
            found = outcome if isinstance(outcome, CaseOutcome) else CaseOutcome(job.id, "failed", str(outcome))
            outcomes[job.id] = found
            if progress is not None:
                progress(found)
    path = assemble(Path(folder), [job.id for job in jobs], dataset.name, settings, spec)
    counts: Counter[str] = Counter()
    for outcome in outcomes.values():
        counts.update(outcome.counts)
    by = {s: tuple(j.id for j in mine if outcomes[j.id].status == s) for s in ("done", "skipped", "failed")}
    return TraceReport(
        path,
        by["done"],
        by["skipped"],
        {case: outcomes[case].message for case in by["failed"]},
        tuple(faults),
        dict(sorted(counts.items())),
        time.monotonic() - began,
    )


def assemble(folder: Path, cases: Sequence[str], dataset: str, settings: Settings, spec: ViewSpec) -> Path | None:
    """Write traces.jsonl from the files of the cases that are there, in that order; None when none is. Other parts of the same run may
    finish meanwhile, so it is written again until nothing new has come."""
    path = folder / FILE

    def there() -> list[tuple[str, int]]:
        found = []
        for case in cases:
            with contextlib.suppress(OSError):
                found.append((case, (folder / CASES / f"{case}.jsonl").stat().st_mtime_ns))
        return found

    held: list[tuple[str, int]] = []
    while (now := there()) != held:
        held = now
        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "dataset": dataset,
            "made_by": "seerseg_make_traces",
            "settings": settings.to_json(),
            "views": spec.to_json(),
            "cases": len(held),
            "missing": len(cases) - len(held),
        }

        def write(temporary: Path, header: Mapping[str, Any] = header, held: Sequence[tuple[str, int]] = held) -> None:
            with temporary.open("wb") as out:
                out.write(json.dumps(header, ensure_ascii=False).encode() + b"\n")
                for case, _ in held:
                    with (folder / CASES / f"{case}.jsonl").open("rb") as lines:
                        next(lines, None)
                        out.writelines(lines)

        if held:
            write_atomically(path, write)
    return path if held else None


def _jobs(
    dataset: RawDataset, folder: Path, named: Named, spec: ViewSpec, channel: int, hounsfield: bool, settings: Settings
) -> tuple[list[Job], list[str]]:
    """Cases with requests, in the order of the requests, and one sentence for each request that cannot be used."""
    faults: list[str] = []
    by_case: dict[str, list[Request]] = {}
    known = {**dataset.cases, **dataset.test_cases}
    for request in dataset.requests:
        if request.case not in known:
            faults.append(f"Request {request.id!r} is of case {request.case!r}, which {dataset.name} does not hold. Mend requests.jsonl.")
            continue
        unknown = [label for label in request.target or () if label not in dataset.labels]
        if unknown:
            faults.append(
                f"Request {request.id!r} names the target {unknown[0]!r}, which is no label of {dataset.name}. Mend requests.jsonl."
            )
            continue
        by_case.setdefault(request.case, []).append(request)
    notes = provenance(dataset.folder / "requests.jsonl")
    jobs = [
        Job(case, folder, tuple(found), {r.id: notes[r.id] for r in found if r.id in notes}, named, spec, channel, hounsfield, settings)
        for case, found in by_case.items()
    ]
    return jobs, faults


def name_labels(dataset: RawDataset) -> Named:
    """What the labels are called: as label_descriptions.json says, else as the vocabulary has it (also with the dataset's own name after
    it: "Anterior" of Hippocampus), else the label's words. Two labels never share a name."""
    vocabulary = Vocabulary.load().extend(dataset.descriptions)
    subject = re.sub(r"^Dataset\d+_", "", dataset.name).replace("_", " ")
    canonical: dict[str, str] = {}
    for label in dataset.labels:
        described = dataset.descriptions.get(label)
        plain = " ".join(label.replace("_", " ").split())
        entry = None if described else vocabulary.resolve(label) or vocabulary.resolve(plain) or vocabulary.resolve(f"{plain} {subject}")
        canonical[label] = described.canonical if described else entry.name if entry is not None else plain
    twice = {name for name, count in Counter(canonical.values()).items() if count > 1}
    canonical = {label: " ".join(label.replace("_", " ").split()) if name in twice else name for label, name in canonical.items()}
    entries = {name: vocabulary.resolve(name) for name in canonical.values()}
    regions = {name: entry.regions for name, entry in entries.items() if entry is not None and entry.regions}
    by_entry = {entry.name: label for label, name in canonical.items() if (entry := entries[name]) is not None}
    unions: dict[frozenset[str], str] = {}
    for whole in vocabulary:
        parts = [by_entry[m] for m in whole.members if m in by_entry] if whole.members else []
        inner = [by_entry[e.name] for e in entries.values() if e is not None and e.part_of == whole.name]
        for found in (parts if len(parts) == len(whole.members) else [], inner):
            if len(found) > 1 and frozenset(found) not in unions:
                unions[frozenset(found)] = whole.name
    return Named(canonical, dict(dataset.labels), regions, unions)


# ---------------------------------------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class _Do:
    clean: bool

    def __call__(self, job: Job) -> CaseOutcome:
        try:
            return trace_case(job, clean=self.clean)
        except OutputError:
            raise
        except SeerSegError as error:
            return CaseOutcome(job.id, "failed", str(error))
        except MemoryError:
            return CaseOutcome(job.id, "failed", f"There is not enough memory for the traces of {job.id}. Use fewer workers (-np).")
        except OSError as error:
            return CaseOutcome(job.id, "failed", f"Cannot read {error.filename or job.id}: {error.strerror or error}. Check the file.")
        except Exception as error:
            message = f"A bug in SeerSeg stopped {job.id}: {type(error).__name__}: {error}. Please report it."
            return CaseOutcome(job.id, "failed", message, trace=traceback.format_exc())


def trace_case(job: Job, *, clean: bool = False) -> CaseOutcome:
    """Make and write the traces of one case, unless they are there already."""
    case = open_case(job.folder, job.id)
    if not case.has_labels:
        raise DatasetError(f"Case {job.id} was preprocessed without a label, so nothing is known of its targets. Add its file to labelsTr.")
    key, path = _key(job, case), job.folder / CASES / f"{job.id}.jsonl"
    if not clean and (held := _held(path)) is not None and held.get("key") == key:
        return CaseOutcome(job.id, "skipped", counts=held["counts"])
    rows, counts = case_rows(job, case)
    lines = [{"key": key, "case": job.id, "counts": counts}, *(row.to_json() for row in rows)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return CaseOutcome(job.id, "done", counts=counts)


def case_rows(job: Job, case: StoredCase) -> tuple[list[TraceRow], dict[str, int]]:
    """The rows of a case's requests, in order, and their counts. The requests of one target share its measurement."""
    scene = open_scene(job, case)
    source = {"image": case.content_hash(job.channel), "label": str(case.image.metadata["labels"]["digest"])}
    spatial: dict[tuple[str, ...], _Target | None] = {}
    names = tuple(job.named.canonical.values())
    counts: Counter[str] = Counter()
    rows = []
    for number, request in enumerate(job.requests):
        if not request.has_target:
            counts["unknown"] += 1
            continue
        rng = random.Random(f"{job.settings.seed} {job.id} {request.id}")
        target, found = request.target, None
        if target is not None:
            if target not in spatial:
                spatial[target] = _target(job, scene, target, counts)
            found = spatial[target]
            counts["empty"] += found is None
        answer = ABSENT if found is None else found.evidence.name
        how, read = rationale(request, answer, names, case.modality(job.channel), job.notes.get(request.id))
        tag = "OUT_OF_REGION_REJECT" if found is None else skill_tag(request.style)
        said = scene_sentences(scene, rng, job.settings.detail) if found is None else sentences(found.evidence, rng, job.settings.detail)
        turns = found.turns[number % len(found.turns)] if found is not None and found.turns else ()
        brief = (brief_sentence(scene.volume.modality, scene.regions), brief_rationale(answer, names, job.notes.get(request.id)))
        how = how if job.settings.detail == "short" else f"{tag}: {how}"
        trace = Trace(said, how, answer, tag, () if found is None else found.slices, turns, brief)
        kept = None if found is None else target
        rows.append(TraceRow(request.id, job.id, request.text, kept, request.style, request.language_split, trace, source))
        counts.update(rows=1, absent=found is None, unread=not read, unseen=found is not None and not found.evidence.shown)
    counts["targets"] = sum(found is not None for found in spatial.values())
    return rows, {name: int(count) for name, count in sorted(counts.items())}


def open_scene(job: Job, case: StoredCase) -> Scene:
    """The case surveyed for measuring its targets. Decodes image and label once."""
    stored = case.labels()
    if stored is None:
        raise DatasetError(f"Case {job.id} has no label map in the store.")
    counts = case.label_counts()
    names = {job.named.canonical[label]: values for label, values in job.named.values.items()}
    there = [name for name, values in names.items() if any(counts.get(v) for v in values)]
    volume = case.volume(job.channel)
    return survey(
        volume,
        stored[0],
        names,
        spec=job.spec,
        regions=_regions(job.named, there),
        hounsfield=job.hounsfield,
        sided=case.source.laterality != "assumed",
        picture=case.source.format == "png",
    )


def key_slices(scene: Scene, values: Sequence[int]) -> tuple[KeySlice, ...]:
    """Where the union of label values lies: for each axis the slice of its largest area, then the slices shown along the viewing axis that
    have at least half of that area; see `KeySlice`. () when it has no voxel."""
    box = scene.box(values)
    if box is None:
        return ()
    mask = scene.crop(values, box)
    shape, viewed = scene.grid.shape_zyx, scene.spec.axis
    first, further = [], []
    for axis in range(3):
        if axis != viewed and any(n == 1 for a, n in enumerate(shape) if a != axis):
            continue  # a line of a picture is no slice
        area = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
        largest = int(np.argmax(area))
        first.append(_key_slice(scene, mask, box, axis, largest + box[axis].start))
        if axis == viewed:
            inside = [i for i in scene.shown if box[axis].start <= i < box[axis].stop and i != largest + box[axis].start]
            further = [i for i in inside if 2 * int(area[i - box[axis].start]) >= int(area[largest])]
    return (*first, *(_key_slice(scene, mask, box, viewed, index) for index in further))


@dataclass(frozen=True)
class _Target:
    evidence: Evidence
    slices: tuple[KeySlice, ...]
    turns: tuple[tuple[Turn, ...], ...] = ()


def _target(job: Job, scene: Scene, target: tuple[str, ...], counts: Counter[str]) -> _Target | None:
    values = tuple(dict.fromkeys(v for label in target for v in job.named.values[label]))
    evidence = measure(scene, job.named.answer(target), values)
    if evidence is None:
        return None
    found = _Target(evidence, key_slices(scene, values))
    if job.settings.segmenter is None:
        return found
    turns = []
    for number in range(job.settings.trajectories):
        made = _demonstrate(job, scene, values, number)
        counts["shown" if made.kept else "dropped"] += 1
        if made.kept:
            turns.append(made.turns)
    return replace(found, turns=tuple(turns))


def _demonstrate(job: Job, scene: Scene, values: tuple[int, ...], number: int) -> Trajectory:
    settings = job.settings
    seed = hashlib.blake2b(f"{settings.seed} {job.id} {values} {number}".encode(), digest_size=8).digest()
    return demonstrate(
        scene.volume,
        scene.crop(values, (slice(None), slice(None), slice(None))),
        _segmenter(settings.segmenter or "", settings.device, settings.accept_license),
        axis=scene.spec.axis,
        indices=scene.shown,
        rng=np.random.default_rng(int.from_bytes(seed)),
        expert=settings.expert,
    )


@lru_cache(maxsize=2)
def _segmenter(name: str, device: str, accept_license: bool) -> Any:
    from seerseg.segmenters import load_segmenter

    return load_segmenter(name, device=device, accept_license=accept_license)


def _key_slice(scene: Scene, mask: Bool, box: tuple[slice, slice, slice], axis: int, index: int) -> KeySlice:
    from scipy.ndimage import find_objects, label

    plane = np.moveaxis(mask, axis, 0)[index - box[axis].start]
    start = [s.start for a, s in enumerate(box) if a != axis]
    spacing = [s for a, s in enumerate(scene.grid.spacing_zyx) if a != axis]
    found, _ = label(plane, structure=np.ones((3, 3)))
    sizes = np.bincount(found.ravel())[1:]
    pieces = find_objects(found)
    boxes = []
    for number in np.argsort(-sizes, kind="stable"):
        rows, columns = pieces[number]
        low, high = (rows.start + start[0], columns.start + start[1]), (rows.stop + start[0], columns.stop + start[1])
        boxes.append(Box2D(axis, index, low, high))
    points = []
    for row, column in two_points(plane, spacing):
        zyx = [row + start[0], column + start[1]]
        zyx.insert(axis, index)
        points.append((zyx[0], zyx[1], zyx[2]))
    return KeySlice(axis, index, int(np.count_nonzero(plane)), tuple(boxes), tuple(points))


def two_points(plane: Bool, spacing: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two pixels (row, column) of a non-empty plane: the deepest, then the deepest of what is left without the disc that fits there. Where
    that disc is all of it, the second is the pixel farthest from the first."""
    from scipy.ndimage import distance_transform_edt

    first = deepest(plane, spacing)
    radius = float(distance_transform_edt(np.pad(plane, 1), sampling=list(spacing))[first[0] + 1, first[1] + 1])
    rows, columns = np.ogrid[: plane.shape[0], : plane.shape[1]]
    away = np.hypot((rows - first[0]) * spacing[0], (columns - first[1]) * spacing[1])
    left = plane & (away >= radius)
    if left.any():
        second = deepest(left, spacing)
    else:
        second = np.unravel_index(int(np.argmax(np.where(plane, away, -1.0))), plane.shape)  # type: ignore[assignment]
    return (int(first[0]), int(first[1])), (int(second[0]), int(second[1]))


def _regions(named: Named, there: Iterable[str]) -> tuple[str, ...]:
    """Regions of the body that what is labelled here can only lie in, in order of how much does."""
    sure = Counter(r for name in there if len(regions := named.regions.get(name, ())) == 1 for r in regions if r != "whole body")
    return tuple(region for region, _ in sorted(sure.items(), key=lambda item: (-item[1], item[0])))


def _key(job: Job, case: StoredCase) -> str:
    said = {
        "image": case.content_hash(job.channel),
        "label": case.image.metadata["labels"],
        "requests": [r.to_json() for r in job.requests],
        "notes": dict(job.notes),
        "named": [sorted(job.named.canonical.items()), sorted(job.named.values.items()), sorted(job.named.regions.items())],
        "views": [job.spec.to_json(), job.channel, job.hounsfield],
        "settings": job.settings.to_json(),
    }
    if job.settings.segmenter is not None:
        said["segmenter"] = _segmenter(job.settings.segmenter, job.settings.device, job.settings.accept_license).card.identity
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _held(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            first = json.loads(next(file, b""))
    except (OSError, ValueError):
        return None
    return first if isinstance(first, dict) and isinstance(first.get("counts"), dict) else None


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
