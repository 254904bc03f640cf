"""Turning a public dataset's own folder layout into a raw dataset.

A converter says what the source looks like (`layout`), which cases it holds (`cases`) and, where a case is more than an image and
a label map in files, how one is read (`read`). The rest happens here, once: output layout, dataset.json, subjects.json,
label_descriptions.json, requests.jsonl; cases in parallel, each file written atomically, each case verified after it was
written and remembered by the content of its sources, so that a run may be killed at any moment and started again.

    DatasetXXX_Name/.converted/
        run.json             which converter fills this folder
        <case>.json          digests of the sources, names and sizes of what was made of them, the case's requests
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import Request, read_requests, write_requests
from seerseg.dataset.workers import each
from seerseg.errors import DatasetError, FolderError, GeometryError, ImageError, NothingToDoError, OutputError, SeerSegError, UsageError
from seerseg.paths import read_json, write_json
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Grid, Volume, read_grid, read_labels
from seerseg_data.converters.files import label_on, put_image, put_label

SCHEMA = 1
MARKERS = ".converted"
Part = Literal["Tr", "Ts"]
Labels = Mapping[str, int | tuple[int, ...]]
"""Label name -> value or values in the label files that are written."""
_NUMBERED = re.compile(r"Dataset(\d{3,})_[A-Za-z0-9._-]+")
_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceCase:
    """One case as it lies in the source.

    id: its name in the raw dataset; images: one file per channel, or the one file that holds them all; labels: the files that
    its label map is made of; part: "Tr", or "Ts" for what the source sets apart as its test set; subject: as the source names
    it; note: whatever `read` needs to know beyond the files (must be picklable and have a stable repr); content: a digest of what
    the case is made of, where its files hold more than this case; None: the bytes of its files are taken.
    """

    id: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    part: Part = "Tr"
    subject: str | None = None
    note: Any = None
    content: str | None = None


@dataclass(frozen=True)
class CaseContent:
    """What a case consists of. images: for each channel a file to be taken as it is, a volume, or the bytes of a picture file;
    label: a file, or an integer array (Z, Y, X) on the grid of the first image, or None; requests: with their targets; notes:
    what was decided on the way."""

    images: tuple[Path | Volume | bytes, ...]
    label: Path | NDArray[Any] | None = None
    requests: tuple[Request, ...] = ()
    notes: tuple[str, ...] = ()


class Converter(ABC):
    """One dataset. Subclasses set the facts and give `cases`; the others have defaults."""

    name: ClassVar[str]
    """As it is typed: "kits23"."""
    title: ClassVar[str]
    dataset_name: ClassVar[str]
    """The Name of DatasetXXX_Name."""
    licence: ClassVar[str]
    home: ClassVar[str]
    layout: ClassVar[str]
    """The source's tree, as it is after unpacking."""
    channels: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[Labels] = {}
    canonical: ClassVar[Mapping[str, str]] = {}
    """Label name -> name in the vocabulary, where the label's own name does not lead there."""
    ending: ClassVar[str] = ".nii.gz"
    version: ClassVar[int] = 1
    """Raised when the same source would give other files: then everything is made again."""

    @abstractmethod
    def cases(self, source: Path) -> Iterable[SourceCase]:
        """Every case under `source`. UsageError when the layout is not there (see `missing_layout`)."""

    def read(self, case: SourceCase) -> CaseContent:
        """The content of one case; SeerSegError when it cannot be read. Default: the files as they are."""
        return CaseContent(case.images, case.labels[0] if case.labels else None)

    def facts(self, source: Path) -> Facts:
        """Channels and labels of this source, for those datasets where they depend on it."""
        return Facts(self.channels, dict(self.labels), dict(self.canonical))

    def label_array(self, path: Path, image: Path) -> NDArray[Any]:
        """A label file as an array on the grid of an image file; GeometryError when it lies elsewhere."""
        return label_on(path, read_grid(image)[0])[0]


@dataclass(frozen=True)
class Facts:
    """What dataset.json will say. extra: further keys of it."""

    channels: tuple[str, ...]
    labels: dict[str, int | tuple[int, ...]]
    canonical: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    case: str
    status: Literal["done", "skipped", "failed"]
    message: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """folder: the dataset; failed: case -> sentence; notes: case -> what was decided; unresolved: labels the vocabulary lacks."""

    folder: Path
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    notes: dict[str, tuple[str, ...]]
    unresolved: tuple[str, ...]
    requests: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class _Job:
    converter: Converter
    case: SourceCase
    folder: Path
    facts: Facts

    @property
    def id(self) -> str:
        """Of the case, for messages."""
        return self.case.id


def missing_layout(converter: Converter, source: Path) -> UsageError:
    """The sentence for a source in which nothing of the layout was found."""
    tree = converter.layout.strip("\n")
    return UsageError(f"{source} does not hold {converter.title} as it is published. {converter.name} expects:\n{tree}")


def dataset_folder(converter: Converter, identifier: str, root: Path) -> Path:
    """The folder that an id (23, "023") or a name ("Dataset023_Kidneys") means for this converter under the raw folder.

    UsageError for any other text; FolderError when the id is another dataset's, or the folder holds what another wrote.
    """
    text = identifier.strip()
    if text.isdigit():
        text = f"Dataset{int(text):03d}_{converter.dataset_name}"
    matched = _NUMBERED.fullmatch(text)
    if matched is None:
        raise UsageError(f"-d takes a number such as 23 or a full name such as Dataset023_{converter.dataset_name}, not {identifier!r}.")
    number = int(matched[1])
    others = [p.name for p in root.iterdir() if p.is_dir() and p.name != text] if root.is_dir() else []
    taken = [name for name in others if (m := _NUMBERED.fullmatch(name)) and int(m[1]) == number]
    if taken:
        raise FolderError(f"The dataset number {number} is taken by {taken[0]} in {root}. Choose another number with -d.")
    folder = root / text
    if folder.is_dir() and any(folder.iterdir()):
        run = folder / MARKERS / "run.json"
        made_by = read_json(run, DatasetError).get("converter") if run.is_file() else None
        if made_by != converter.name:
            by = f"was made by {made_by}" if made_by else "was not made by seerseg_convert"
            raise FolderError(f"{folder} holds a dataset that {by}. Choose another number or name with -d.")
    return folder


def convert(
    converter: Converter,
    source: Path,
    identifier: str,
    root: Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int, Outcome], None] | None = None,
) -> ConversionReport:
    """Convert what lies under `source` into root/DatasetXXX_Name; see the module. progress(done, total, outcome) after each case.

    UsageError when `source` is not the layout, FolderError when the number is taken, NothingToDoError when there is no case,
    OutputError when nothing can be written any more (what was finished stays); a case's own faults are in the report.
    """
    began = time.monotonic()
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UsageError(f"The source {source} is not a folder. Give the folder that holds {converter.title} unpacked.")
    folder = dataset_folder(converter, identifier, root)
    facts = converter.facts(source)
    cases = sorted(converter.cases(source), key=lambda c: c.id)
    if not cases:
        raise NothingToDoError(f"{source} holds no case of {converter.title}. It expects:\n{converter.layout}")
    _check_names(cases)
    write_json(folder / MARKERS / "run.json", {"schema": SCHEMA, "converter": converter.name})
    jobs = [_Job(converter, case, folder, facts) for case in cases]
    outcomes: dict[str, Outcome] = {}
    for job, result in each(_convert_case, jobs, workers, preload=("nibabel", "seerseg_data.converters.base")):
        if isinstance(result, OutputError):
            raise result
        outcome = Outcome(job.id, "failed", str(result)) if isinstance(result, SeerSegError) else result
        outcomes[job.id] = outcome
        if progress is not None:
            progress(len(outcomes), len(jobs), outcome)
    ordered = [outcomes[case.id] for case in cases]
    finished = [case for case in cases if outcomes[case.id].status != "failed"]
    if not any(case.part == "Tr" for case in finished):
        first = next(o.message for o in ordered if o.status == "failed") if len(finished) < len(cases) else "It holds test cases alone."
        raise DatasetError(f"No training case of {converter.title} could be converted. {first}")
    unresolved, requests = _write_dataset(converter, folder, facts, finished)
    return ConversionReport(
        folder=folder,
        done=tuple(o.case for o in ordered if o.status == "done"),
        skipped=tuple(o.case for o in ordered if o.status == "skipped"),
        failed={o.case: o.message for o in ordered if o.status == "failed"},
        notes={o.case: o.notes for o in ordered if o.notes},
        unresolved=unresolved,
        requests=requests,
        seconds=time.monotonic() - began,
    )


def _check_names(cases: Sequence[SourceCase]) -> None:
    for case in cases:
        if _CASE.fullmatch(case.id) is None:
            raise DatasetError(f"{case.id!r} is no name for a case: letters, digits, '.', '_' and '-' are. Rename {case.images[0]}.")
    name, count = Counter(case.id for case in cases).most_common(1)[0]
    if count > 1:
        both = " and ".join(str(case.images[0]) for case in cases if case.id == name)
        raise DatasetError(f"The source holds the case {name} {count} times: {both}. Give a source that holds every case once.")


def _convert_case(job: _Job) -> Outcome:
    """Make the files of one case unless they are there already, made of the same sources."""
    case, folder = job.case, job.folder
    for path in (*case.images, *case.labels):
        if not path.exists():
            what = "image" if path in case.images else "label"
            raise DatasetError(f"Case {case.id}: the {what} {path} does not exist. Complete the source or take the case away.")
    if case.part == "Tr" and not case.labels:
        raise DatasetError(f"Case {case.id} has no label beside {case.images[0]}. Complete the source or take the case away.")
    try:
        digest = _digest(job)
    except OSError as error:
        raise ImageError(f"Case {case.id} cannot be read: {error.strerror} ({error.filename}).") from error
    marker = folder / MARKERS / f"{case.id}.json"
    known = _marker(marker)
    if known.get("digest") == digest and _whole(folder, known.get("files", {})):
        return Outcome(case.id, "skipped", notes=tuple(known.get("notes", ())))
    marker.unlink(missing_ok=True)
    try:
        content = job.converter.read(case)
        if len(content.images) != len(job.facts.channels):
            raise DatasetError(f"Case {case.id} has {len(content.images)} channels; {len(job.facts.channels)} are expected.")
        undeclared = [r.target for r in content.requests if r.target and not set(r.target) <= set(job.facts.labels)]
        if undeclared:
            raise DatasetError(f"Case {case.id}: a request asks for {undeclared[0]}, which is no label of this dataset.")
        files, notes = _write_case(job, content)
    except SeerSegError:
        _remove_case(job)
        raise
    write_json(
        marker,
        {
            "schema": SCHEMA,
            "digest": digest,
            "files": files,
            "notes": list(notes),
            "requests": [request.to_json() for request in content.requests],
        },
    )
    return Outcome(case.id, "done", notes=notes)


def _remove_case(job: _Job) -> None:
    """No half of a case stays: its images without its label would be taken for an unlabelled case."""
    name, part, ending = job.case.id, job.case.part, job.converter.ending
    images = [job.folder / f"images{part}" / f"{name}_{channel:04d}{ending}" for channel in range(len(job.facts.channels))]
    for path in (*images, job.folder / f"labels{part}" / f"{name}{ending}"):
        path.unlink(missing_ok=True)


def _write_case(job: _Job, content: CaseContent) -> tuple[dict[str, int], tuple[str, ...]]:
    """Write images and label, open them again and compare; returns name -> size of the files, and notes."""
    case, ending, notes = job.case, job.converter.ending, list(content.notes)
    grid: Grid | None = None
    files: dict[str, int] = {}
    for channel, image in enumerate(content.images):
        path = job.folder / f"images{case.part}" / f"{case.id}_{channel:04d}{ending}"
        there = put_image(image, path)
        if grid is not None and not there.close_to(grid):
            far = there.corner_distance_mm(grid)
            apart = f"its corners are {far:.3g} mm off" if np.isfinite(far) else f"{there.shape_zyx} against {grid.shape_zyx} voxels"
            raise GeometryError(f"Case {case.id}: channel {channel} lies on another grid than channel 0 ({apart}). Mend the source.")
        grid = grid or there
        files[str(path.relative_to(job.folder))] = path.stat().st_size
    if content.label is not None and grid is not None:
        path = job.folder / f"labels{case.part}" / f"{case.id}{ending}"
        notes += put_label(content.label, content.images[0], grid, path)
        _check_label(path, grid, job)
        files[str(path.relative_to(job.folder))] = path.stat().st_size
    return files, tuple(notes)


def _check_label(path: Path, grid: Grid, job: _Job) -> None:
    array, there = read_labels(path)
    if not there.close_to(grid):
        raise OutputError(f"{path} does not lie on its image. Please report this.")
    declared = {0, *(v for values in job.facts.labels.values() for v in (values if isinstance(values, tuple) else (values,)))}
    found = set(np.unique(array).tolist()) - declared
    if found:
        known = ", ".join(f"{name} {value}" for name, value in list(job.facts.labels.items())[:12])
        raise DatasetError(
            f"Case {job.id}: the label holds the value {min(found)}, which {job.converter.title} does not declare ({known}). "
            "Mend the label."
        )


def _digest(job: _Job) -> str:
    """Of everything the case is made of: the bytes of its files, their meaning, the converter's version."""
    digest = hashlib.blake2b(digest_size=16)
    head = (job.converter.name, job.converter.version, job.facts.channels, job.facts.labels, job.case.id, job.case.part, job.case.note)
    digest.update(repr(head).encode())
    if job.case.content is not None:
        digest.update(job.case.content.encode())
        return digest.hexdigest()
    for path in (*job.case.images, *job.case.labels):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(f"\0{file.name}\0".encode())
            with file.open("rb", buffering=0) as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def _marker(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) and value.get("schema") == SCHEMA else {}


def _whole(folder: Path, files: Mapping[str, int]) -> bool:
    paths = [folder / name for name in files]
    return bool(files) and all(p.is_file() and p.stat().st_size == size for p, size in zip(paths, files.values(), strict=True))


def _write_dataset(converter: Converter, folder: Path, facts: Facts, finished: Sequence[SourceCase]) -> tuple[tuple[str, ...], int]:
    """dataset.json, subjects.json, label_descriptions.json, requests.jsonl for the cases that are there."""
    training = [case for case in finished if case.part == "Tr"]
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.labels.items()}
    document = {
        "channel_names": {str(i): name for i, name in enumerate(facts.channels)},
        "labels": {"background": 0, **listed},
        "numTraining": len(training),
        "file_ending": converter.ending,
        "name": converter.title,
        "licence": converter.licence,
        "reference": converter.home,
        "converter": f"seerseg_convert {converter.name}",
        **facts.extra,
    }
    subjects: dict[str, list[str]] = {}
    for case in finished:
        if case.subject is not None:
            subjects.setdefault(case.subject, []).append(case.id)
    if subjects:
        write_json(folder / "subjects.json", subjects)
    descriptions, unresolved = describe(facts)
    write_json(folder / "label_descriptions.json", {"schema": SCHEMA, "labels": descriptions})
    ours = [line for case in finished for line in _marker(folder / MARKERS / f"{case.id}.json").get("requests", ())]
    _write_requests(folder / "requests.jsonl", ours, converter)
    write_json(folder / "dataset.json", document)
    return unresolved, len(ours)


def describe(facts: Facts) -> tuple[dict[str, Any], tuple[str, ...]]:
    """label_descriptions.json's labels: canonical name, region and side of each as the vocabulary has them; and the labels
    that it does not know, which keep their own names."""
    vocabulary = Vocabulary.load()
    described: dict[str, Any] = {}
    unresolved: list[str] = []
    for label in facts.labels:
        wanted = facts.canonical.get(label, label)
        entry = vocabulary.resolve(wanted)
        if entry is None:
            unresolved.append(label)
        side = entry.side if entry is not None else vocabulary.key(wanted)[1]
        canonical = entry.name if entry is not None else wanted
        described[label] = {
            "canonical": canonical,
            "synonyms": [],
            "region": entry.regions[0] if entry is not None and entry.regions else None,
            "laterality": side,
        }
    return described, tuple(unresolved)


def _write_requests(path: Path, ours: Sequence[dict[str, Any]], converter: Converter) -> None:
    """Our requests replace those of an earlier run; requests that others wrote stay."""
    mark = f"__{converter.name}_"
    kept = [request for request in read_requests(path) if mark not in request.id] if path.is_file() else []
    if not ours and not path.is_file():
        return
    made = [_request(line) for line in ours]
    write_requests(path, [*kept, *made])


def _request(line: Mapping[str, Any]) -> Request:
    target = line.get("target")
    return Request(
        id=line["id"],
        case=line["case"],
        text=line["text"],
        target=None if target is None else (target,) if isinstance(target, str) else tuple(target),
        style=line.get("style", ""),
        language_split=line.get("language_split", ""),
        points=tuple((z, y, x) for z, y, x in line.get("points", ())),
    )


def ask(converter: Converter, case: str, key: str, text: str, target: Sequence[str] | None, style: str, split: str = "") -> Request:
    """A request of a converter; `key` tells it from the case's others."""
    return Request(
        id=f"{case}__{converter.name}_{key}",
        case=case,
        text=text,
        target=None if target is None else tuple(target),
        style=style,
        language_split=split,
    )
