"""What a case leaves behind: masks in the source's own geometry, and a JSON file that says what was read, asked, answered, drawn.

`<case>.nii.gz`     one request: 1 where it is; several: a label map, where masks overlap the smaller structure wins
`<case>__<id>.nii.gz`   one file per request, with --per_request, and always for a case in which masks overlap or several requests
                    mean one target, so that nothing is lost
`<case>.json`       schema 1, see `case_json`
Equal inputs give equal bytes: times are kept in the ledger alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import Request
from seerseg.episode import Episode
from seerseg.paths import safe_name, write_json
from seerseg.prediction.questions import BadRequest
from seerseg.protocols.seer import normalise_name
from seerseg.volume import Grid, SourceGeometry, write_labels

SCHEMA = 1
BINARY_VALUE = 1
FIRST_VALUE = 2
_HASHED_FROM = 4096
_HASHED_COUNT = 61440
_ANSWERED = ("ok", "absent", "empty")


@dataclass(frozen=True)
class Legend:
    """The value of each structure, the same in every case, shard and rerun, whichever case is done first.

    values: by normalised name those of the dataset's labels, where the model or the input belongs to one. Else a name's
    value is its place in `names` (all that may be answered) plus 2, as 1 is what a single request's mask has; a name
    outside of them has a value from 4096 on that follows from its letters.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def assign(self, targets: Sequence[str]) -> dict[str, int]:
        """Distinct values for the targets of one case."""
        places = {normalise_name(name): i for i, name in enumerate(self.names)}
        found: dict[str, int] = {}
        for target in dict.fromkeys(targets):
            name = normalise_name(target)
            if name in self.values:
                value = self.values[name]
            elif name in places and not self.values:
                value = FIRST_VALUE + places[name]
            else:
                value = _HASHED_FROM + int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % _HASHED_COUNT
            while value in found.values():
                value += 1
            found[target] = value
        return found

    @property
    def identity(self) -> str:
        """Changes whenever values could."""
        return hashlib.blake2b(repr((sorted(self.values.items()), self.names)).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Answered:
    """One request solved, its mask cut to the box of its voxels: crop bool, at `lo` of the case's canonical grid."""

    request: Request
    episode: Episode
    lo: tuple[int, int, int] = (0, 0, 0)
    crop: NDArray[np.bool_] | None = None
    voxels: int = 0

    @classmethod
    def cut(cls, request: Request, episode: Episode) -> Answered:
        """Take the mask out of the episode."""
        mask = episode.mask
        if mask is None:
            return cls(request, episode)
        box = bounding_box(mask.array)
        kept = replace(episode, mask=None)
        if box is None:
            return cls(request, kept, crop=np.zeros((0, 0, 0), dtype=bool))
        crop = mask.array[box]
        crop = crop.copy() if crop.size < mask.array.size else crop
        return cls(request, kept, (box[0].start, box[1].start, box[2].start), crop, int(np.count_nonzero(crop)))

    @property
    def box(self) -> tuple[slice, ...]:
        """Where the crop lies."""
        assert self.crop is not None
        return tuple(slice(a, a + n) for a, n in zip(self.lo, self.crop.shape, strict=True))

    @property
    def answered(self) -> bool:
        """A mask is written for it, be it an empty one."""
        return self.crop is not None and self.episode.status in _ANSWERED


@dataclass(frozen=True, eq=False)
class CaseOutcome:
    """Everything that is written of a case. grid and source are None when the image could not be read; error: why nothing
    was drawn, "" when something was; pictures: file suffix -> uint8 (H, W, 3)."""

    case: str
    images: tuple[Path, ...]
    digests: tuple[str, ...] = ()
    modality: str | None = None
    grid: Grid | None = None
    source: SourceGeometry | None = None
    answered: tuple[Answered, ...] = ()
    bad: tuple[BadRequest, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    pictures: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """ "done", "partial" or "failed"."""
        good = sum(a.answered for a in self.answered)
        if self.error or not good:
            return "failed"
        return "done" if good == len(self.answered) and not self.bad else "partial"


@dataclass(frozen=True)
class Overlap:
    """Two targets of a case that share voxels, and the one that the label map shows there."""

    between: tuple[str, str]
    kept: str
    voxels: int


def bounding_box(array: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """The smallest box of a 3D bool array that holds every True, None when there is none."""
    planes = np.flatnonzero(array.any(axis=(1, 2)))
    if not planes.size:
        return None
    inner = np.any(array[planes[0] : planes[-1] + 1], axis=0)
    rows, columns = np.flatnonzero(inner.any(axis=1)), np.flatnonzero(inner.any(axis=0))
    return (
        slice(int(planes[0]), int(planes[-1]) + 1),
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )


def write_case(
    folder: Path, outcome: CaseOutcome, *, legend: Legend, model: Mapping[str, Any], per_request: bool = False, taken: Collection[str] = ()
) -> list[Path]:
    """Write the files of a case, the JSON last; returns their paths. OutputError when one cannot be written.

    taken: case names, which no file of one request may collide with.
    """
    written: list[Path] = []
    good = [a for a in outcome.answered if a.answered]
    shown = _shown(good)
    values = legend.assign(list(shown)) if len(outcome.answered) + len(outcome.bad) > 1 else dict.fromkeys(shown, BINARY_VALUE)
    overlaps = find_overlaps(list(shown.values()))
    named = [normalise_name(a.episode.target) for a in good if a.episode.target]
    doubled = len(set(named)) < len(named)
    separate = per_request or bool(overlaps) or doubled
    main = folder / f"{outcome.case}.nii.gz"
    files: dict[str, str] = {}
    if good and outcome.grid is not None and outcome.source is not None:
        names = {value: name for name, value in values.items()}
        write_labels(_label_map(list(shown.values()), values, outcome.grid), outcome.grid, outcome.source, main, legend=names)
        written.append(main)
        if separate:
            suffixes = file_suffixes(outcome.case, [a.request.id for a in outcome.answered], taken)
            for answered in good:
                path = folder / f"{outcome.case}__{suffixes[answered.request.id]}.nii.gz"
                array = _label_map([answered], {_target(answered): BINARY_VALUE}, outcome.grid)
                write_labels(array, outcome.grid, outcome.source, path, legend={BINARY_VALUE: _target(answered)})
                written.append(path)
                files[answered.request.id] = path.name
        else:
            files = {a.request.id: main.name for a in good}
    for suffix, pixels in outcome.pictures.items():
        written.append(folder / f"{outcome.case}{suffix}")
        _write_picture(written[-1], pixels)
    reason = "--per_request" if per_request else "masks overlap" if overlaps else "several requests mean one target" if doubled else None
    path = folder / f"{outcome.case}.json"
    write_json(path, case_json(outcome, values, overlaps, files, main.name if good else None, reason, model))
    return [*written, path]


def case_json(
    outcome: CaseOutcome,
    values: Mapping[str, int],
    overlaps: Sequence[Overlap],
    files: Mapping[str, str],
    main: str | None,
    separate: str | None,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a case, schema 1.

    "legend": value in `<case>.nii.gz` -> target; "requests": for each its status ("ok", "absent", "empty", "unsupported", "fault";
    "failed" when it could not be put or the case failed), "value" in `file` (1 in a file of its own), voxels, volume_ml
    and what the reasoner said; "separate_files": why there is one file per request, null when there is not.
    """
    grid, source = outcome.grid, outcome.source
    requests = [_request_json(a, outcome, values, files, main) for a in outcome.answered]
    requests += [
        {"id": b.id, "text": b.text, "status": "failed", "message": b.reason, "file": None, "value": None, "target_answered": None}
        for b in outcome.bad
    ]
    return {
        "schema": SCHEMA,
        "case": _plain(outcome.case),
        "status": outcome.status,
        "error": _plain(outcome.error),
        "image": {
            "files": [_plain(path.name) for path in outcome.images],
            "hashes": list(outcome.digests),
            "modality": outcome.modality,
            "shape_zyx": list(grid.shape_zyx) if grid else None,
            "spacing_zyx_mm": [round(s, 6) for s in grid.spacing_zyx] if grid else None,
            "stored_shape_xyz": list(source.shape_xyz) if source else None,
            "format": source.format if source else None,
            "laterality": source.laterality if source else None,
            "notes": list(source.notes) if source else [],
        },
        "model": dict(model),
        "file": main,
        "legend": {str(value): name for name, value in sorted(values.items(), key=lambda item: item[1])},
        "overlap_rule": "where masks overlap, <case>.nii.gz shows the structure with fewer voxels",
        "overlaps": [{"between": list(o.between), "kept": o.kept, "voxels": o.voxels} for o in overlaps],
        "separate_files": separate,
        "warnings": list(outcome.warnings),
        "requests": requests,
    }


def _request_json(
    answered: Answered, outcome: CaseOutcome, values: Mapping[str, int], files: Mapping[str, str], main: str | None
) -> dict[str, Any]:
    record = answered.episode.to_json()
    for key in ("text", "reason_s", "segment_s", "target_answered", "status"):
        record.pop(key)
    measured = outcome.grid is not None and outcome.source is not None and outcome.source.format != "png"  # pictures have no mm
    ml = answered.voxels * outcome.grid.voxel_volume_mm3 / 1000 if outcome.grid and measured and answered.answered else None
    file = files.get(answered.request.id)
    value = None if not answered.voxels else BINARY_VALUE if file != main else values.get(_target(answered))
    return {
        "id": answered.request.id,
        "text": answered.request.text,
        "style": answered.request.style,
        "target_answered": answered.episode.target,
        "status": answered.episode.status,
        "value": value,
        "file": file,
        "voxels": answered.voxels if answered.answered else None,
        "volume_ml": None if ml is None else round(ml, 4),
        "reply": answered.episode.replies[-1] if answered.episode.replies else "",
        **record,
    }


def _plain(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _target(answered: Answered) -> str:
    return answered.episode.target or answered.request.text[:80]


def _shown(good: Sequence[Answered]) -> dict[str, Answered]:
    """Target -> the request whose mask the label map shows: the first one, in the order asked, that has voxels."""
    first: dict[str, Answered] = {}
    for answered in good:
        if answered.voxels:
            first.setdefault(normalise_name(_target(answered)), answered)
    return {_target(answered): answered for answered in first.values()}


def _by_size(shown: Sequence[Answered]) -> list[Answered]:
    """Largest first; of equals the later asked first. Painted in this order, the last painted is what is seen."""
    return [a for _, a in sorted(enumerate(shown), key=lambda item: (-item[1].voxels, -item[0]))]


def find_overlaps(shown: Sequence[Answered]) -> list[Overlap]:
    """Every pair of masks that share voxels, in the order asked."""
    rank = {id(a): i for i, a in enumerate(_by_size(shown))}
    found = []
    for one, two in combinations(shown, 2):
        lo = np.maximum(one.lo, two.lo)
        hi = np.minimum([s.stop for s in one.box], [s.stop for s in two.box])
        if (lo >= hi).any():
            continue
        parts = [a.crop[tuple(slice(s - o, e - o) for s, e, o in zip(lo, hi, a.lo, strict=True))] for a in (one, two)]  # type: ignore[index]
        voxels = int(np.count_nonzero(parts[0] & parts[1]))
        if voxels:
            kept = one if rank[id(one)] > rank[id(two)] else two
            found.append(Overlap((_target(one), _target(two)), _target(kept), voxels))
    return found


def _label_map(shown: Sequence[Answered], values: Mapping[str, int], grid: Grid) -> NDArray[Any]:
    highest = max((values[_target(a)] for a in shown if a.voxels), default=0)
    array = np.zeros(grid.shape_zyx, dtype=np.min_scalar_type(highest))
    for answered in _by_size(shown):
        if answered.voxels:
            array[answered.box][answered.crop] = values[_target(answered)]
    return array


def file_suffixes(case: str, ids: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Request id -> how it is written in a file name: file-system-safe, distinct also where case is not told apart."""
    suffixes: dict[str, str] = {}
    used: set[str] = set()
    for identifier in ids:
        suffix = safe_name(identifier)
        if suffix.casefold() in used or f"{case}__{suffix}" in taken:
            suffix = f"{suffix}-{hashlib.blake2b(identifier.encode(), digest_size=4).hexdigest()}"
        used.add(suffix.casefold())
        suffixes[identifier] = suffix
    return suffixes


def _write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    from seerseg.paths import write_atomically

    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
