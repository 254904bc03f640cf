"""What a dataset is: images, targets, requests, in numbers that planning uses and a person can read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.dataset import CaseFiles, RawDataset, Request, hu_fault
from seerseg.dataset.workers import each
from seerseg.errors import DatasetError, PlanError, SeerSegError
from seerseg.paths import read_json, write_json
from seerseg.planning.record import CaseRecord, ValueRecord, case_record

FINGERPRINT_SCHEMA = 1
FINGERPRINT_FILE = "fingerprint.json"
OBLIQUE_DEG = 1.0
_SIDE = re.compile(r"\b(?:left|right|lft|rt|lt|rght|bilateral|[lr]\.?h\.?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over cases."""

    min: float
    p5: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value, rounded to six digits."""
        return cls(*(float(f"{v:.6g}") for v in np.percentile(np.asarray(values, dtype=np.float64), (0, 5, 50, 95, 100))))


@dataclass(frozen=True)
class ChannelSummary:
    """Intensities of one channel over cases. dtypes: stored type -> cases; hu_faults: why values cannot be Hounsfield
    units -> cases (CT only); constant, not_finite: cases so."""

    name: str
    modality: str | None
    dtypes: dict[str, int]
    levels: dict[str, Spread]
    constant: int
    not_finite: int
    hu_faults: dict[str, int]


@dataclass(frozen=True)
class TargetSummary:
    """One label over the cases that hold it. cases: how many; border: in how many it touches the edge of the field."""

    cases: int
    volume_ml: Spread | None
    extent_mm_zyx: tuple[Spread, Spread, Spread] | None
    slices_zyx: tuple[float, float, float] | None
    border: int


@dataclass(frozen=True)
class RequestSummary:
    """Requests of the dataset. sets: paraphrase sets, requests with the same case and target; named_side: requests whose
    words name a side; targets: label name or "absent" -> requests."""

    count: int
    cases: int
    chars: Spread | None
    sets: int
    set_size: Spread | None
    styles: dict[str, int]
    language_splits: dict[str, int]
    targets: dict[str, int]
    unknown_truth: int
    named_side: int


@dataclass(frozen=True)
class Fingerprint:
    """The summary of a dataset. Lists of three are (z, y, x); failed: case -> why it could not be read."""

    dataset: str
    cases: int
    labelled: int
    subjects: int
    shape_zyx: tuple[Spread, Spread, Spread]
    spacing_zyx: tuple[Spread, Spread, Spread]
    voxels: Spread
    orientations: dict[str, int]
    oblique: int
    sheared: int
    laterality_assumed: int
    channels: tuple[ChannelSummary, ...]
    targets: dict[str, TargetSummary]
    requests: RequestSummary
    failed: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": FINGERPRINT_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str = FINGERPRINT_FILE) -> Fingerprint:
        """The inverse of `to_json`; PlanError, naming `where`, when it is not one."""
        try:
            return cls(
                **{
                    **{key: item for key, item in value.items() if key != "schema"},
                    "shape_zyx": _three(value["shape_zyx"]),
                    "spacing_zyx": _three(value["spacing_zyx"]),
                    "voxels": Spread(**value["voxels"]),
                    "channels": tuple(_channel_from(c) for c in value["channels"]),
                    "targets": {name: _target_from(t) for name, t in value["targets"].items()},
                    "requests": _requests_from(value["requests"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{where} is damaged or of another version ({error!r}). Run seerseg_fingerprint again.") from None


@dataclass(frozen=True)
class HeaderScan:
    """What headers alone say, before any voxel is decoded: enough to choose a store layout and a number of workers."""

    cases: int
    channels: int
    spacing_zyx: tuple[float, float, float]
    voxels_p95: float


def scan_headers(dataset: RawDataset, limit: int = 500) -> HeaderScan:
    """Median spacing and size over the headers of at most `limit` cases, evenly chosen; unreadable ones are passed over.

    DatasetError when none can be read.
    """
    from seerseg.volume import read_grid

    cases = list(dataset.cases.values())
    grids, reason = [], ""
    for files in cases[:: max(1, -(-len(cases) // limit))]:
        try:
            grids.append(read_grid(files.images[0])[0])
        except SeerSegError as error:
            reason = reason or str(error)
    if not grids:
        raise DatasetError(f"No case of {dataset.name} can be read, so there is nothing to plan from. {reason}")
    spacing = np.median([grid.spacing_zyx for grid in grids], axis=0)
    voxels = float(np.percentile([grid.size for grid in grids], 95))
    return HeaderScan(len(cases), len(dataset.channel_names), (float(spacing[0]), float(spacing[1]), float(spacing[2])), voxels)


def fingerprint(dataset: RawDataset, workers: int = 1, progress: Callable[[], None] | None = None) -> Fingerprint:
    """Decode every case of imagesTr once, in parallel, and summarise. DatasetError when none can be read."""
    records, failed = [], {}
    record = partial(_record, modalities=dataset.modalities)
    for files, result in each(record, list(dataset.cases.values()), workers, preload=("nibabel", "seerseg.planning.fingerprint")):
        if isinstance(result, SeerSegError):
            failed[files.id] = str(result)
        else:
            records.append(result)
        if progress is not None:
            progress()
    return summarise(dataset, records, failed)


def _record(files: CaseFiles, modalities: Sequence[str | None]) -> CaseRecord:
    from seerseg.volume import read_case, read_labels

    volumes = read_case(files.images, modalities=modalities, name=files.id)
    labels = read_labels(files.label, like=volumes[0].grid)[0] if files.label is not None else None
    return case_record(files.id, volumes, labels)


def summarise(dataset: RawDataset, records: Sequence[CaseRecord], failed: Mapping[str, str] | None = None) -> Fingerprint:
    """The fingerprint of a dataset from its cases' records, in any order. failed: cases without a record, and why."""
    failed = dict(sorted((failed or {}).items()))
    if not records:
        reason = next(iter(failed.values()), "It has no cases.")
        raise DatasetError(f"No case of {dataset.name} can be read, so there is nothing to plan from. {reason}")
    records = sorted(records, key=lambda r: r.case)
    shapes = np.array([r.shape_zyx for r in records], dtype=np.float64)
    spacings = np.array([r.spacing_zyx for r in records])
    return Fingerprint(
        dataset=dataset.name,
        cases=len(records),
        labelled=sum(r.values is not None for r in records),
        subjects=len({dataset.subject_of.get(r.case, r.case) for r in records}),
        shape_zyx=_spreads(shapes),
        spacing_zyx=_spreads(spacings),
        voxels=Spread.of(shapes.prod(axis=1)),
        orientations=_counts(r.orientation for r in records),
        oblique=sum(r.oblique_deg > OBLIQUE_DEG for r in records),
        sheared=sum(r.sheared for r in records),
        laterality_assumed=sum(r.laterality != "known" for r in records),
        channels=tuple(_channel_summary(name, c, dataset.modalities[c], records) for c, name in enumerate(dataset.channel_names)),
        targets={name: _target_summary(values, records) for name, values in dataset.labels.items()},
        requests=_request_summary(dataset.requests),
        failed=failed,
    )


def save_fingerprint(value: Fingerprint, path: Path) -> None:
    """Write fingerprint.json."""
    write_json(path, value.to_json())


def load_fingerprint(path: Path) -> Fingerprint:
    """Read fingerprint.json; PlanError when it is missing, damaged or of another version."""
    return Fingerprint.from_json(read_json(path, PlanError, FINGERPRINT_SCHEMA), str(path))


def _channel_summary(name: str, channel: int, modality: str | None, records: Sequence[CaseRecord]) -> ChannelSummary:
    found = [r.channels[channel] for r in records]
    faults = [reason for c in found if modality == "CT" and not c.constant and (reason := hu_fault(c.percentiles))]
    return ChannelSummary(
        name=name,
        modality=modality,
        dtypes=_counts(c.dtype for c in found),
        levels={level: Spread.of([c.percentiles[level] for c in found]) for level in found[0].percentiles},
        constant=sum(c.constant for c in found),
        not_finite=sum(any("not finite" in note for note in c.notes) for c in found),
        hu_faults=_counts(re.sub(r"-?\d[\d.e+]*", "N", reason) for reason in faults),
    )


def _target_summary(values: Sequence[int], records: Sequence[CaseRecord]) -> TargetSummary:
    volumes, extents, slices, border = [], [], [], 0
    for record in records:
        parts = [record.values[v] for v in values if v in record.values] if record.values else []
        if not parts:
            continue
        lo, hi = _union(parts)
        spacing = np.array(record.spacing_zyx)
        volumes.append(sum(p.voxels for p in parts) * record.voxel_volume_mm3 / 1000.0)
        extents.append((hi - lo) * spacing)
        slices.append(hi - lo)
        border += bool((lo == 0).any() or (hi == np.array(record.shape_zyx)).any())
    if not volumes:
        return TargetSummary(0, None, None, None, 0)
    touched = np.median(np.array(slices), axis=0)
    return TargetSummary(
        len(volumes), Spread.of(volumes), _spreads(np.array(extents)), (float(touched[0]), float(touched[1]), float(touched[2])), border
    )


def _union(parts: Sequence[ValueRecord]) -> tuple[Any, Any]:
    return np.min([p.lo for p in parts], axis=0), np.max([p.hi for p in parts], axis=0)


def _request_summary(requests: Sequence[Request]) -> RequestSummary:
    sets: dict[Any, int] = defaultdict(int)
    for request in requests:
        if request.has_target:
            sets[request.case, request.target] += 1
    names = [" + ".join(r.target) if r.target else "absent" for r in requests if r.has_target]
    return RequestSummary(
        count=len(requests),
        cases=len({r.case for r in requests}),
        chars=Spread.of([len(r.text) for r in requests]) if requests else None,
        sets=len(sets),
        set_size=Spread.of(list(sets.values())) if sets else None,
        styles=_counts(r.style for r in requests if r.style),
        language_splits=_counts(r.language_split for r in requests if r.language_split),
        targets=_counts(names),
        unknown_truth=sum(not r.has_target for r in requests),
        named_side=sum(_SIDE.search(r.text) is not None for r in requests),
    )


def _counts(items: Any) -> dict[str, int]:
    """Commonest first, then by name."""
    return dict(sorted(Counter(items).items(), key=lambda pair: (-pair[1], pair[0])))


def _spreads(columns: Any) -> tuple[Spread, Spread, Spread]:
    return Spread.of(columns[:, 0]), Spread.of(columns[:, 1]), Spread.of(columns[:, 2])


def _spread_from(value: Any) -> Spread | None:
    return None if value is None else Spread(**value)


def _three(value: Any) -> tuple[Spread, Spread, Spread]:
    z, y, x = (Spread(**v) for v in value)
    return z, y, x


def _channel_from(value: Any) -> ChannelSummary:
    return ChannelSummary(**{**value, "levels": {name: Spread(**v) for name, v in value["levels"].items()}})


def _target_from(value: Any) -> TargetSummary:
    extent = _three(value["extent_mm_zyx"]) if value["extent_mm_zyx"] is not None else None
    slices = tuple(value["slices_zyx"]) if value["slices_zyx"] is not None else None
    return TargetSummary(**{**value, "volume_ml": _spread_from(value["volume_ml"]), "extent_mm_zyx": extent, "slices_zyx": slices})


def _requests_from(value: Any) -> RequestSummary:
    return RequestSummary(**{**value, "chars": _spread_from(value["chars"]), "set_size": _spread_from(value["set_size"])})
