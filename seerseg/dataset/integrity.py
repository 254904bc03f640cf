"""Is a raw dataset what it says it is? Every problem with what to do about it; never only the first.

Headers are compared before any voxel is decoded, each file is decoded once, cases are looked at in parallel. A label whose
array is mirrored against its image, but right in world space, is no problem: labels are brought to the image by position.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset.raw import CaseFiles, Problem, RawDataset
from seerseg.dataset.splits import SPLITS_FILE, load_splits
from seerseg.dataset.workers import each
from seerseg.errors import PlanError, SeerSegError, did_you_mean

TOLERANCE_MM = 1e-2
_SIDE_OR_VISIT = re.compile(
    r"(?:[_\-.](?:left|right|lt|rt|l|r|lh|rh|pre|post|baseline|follow-?up|fu|(?:visit|scan|ses|session|timepoint|time|tp|v|s|t)[_\-]?\d{1,2}))+$",
    re.IGNORECASE,
)
_HU_HIGHEST = 4000.0


@dataclass(frozen=True)
class IntegrityReport:
    """What was looked at and what is wrong, errors first, then by case."""

    dataset: str
    cases: int
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return not any(p.severity == "error" for p in self.problems)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"dataset": self.dataset, "cases": self.cases, "ok": self.ok, "problems": [p.to_json() for p in self.problems]}

    def explain(self, limit: int = 20) -> str:
        """Text for a person: problems grouped by kind, at most `limit` of each, each kind with what to do about it."""
        errors = sum(p.severity == "error" for p in self.problems)
        warnings = len(self.problems) - errors
        lines = [f"{self.dataset}: {_count(self.cases, 'case')} checked, {_count(errors, 'error')}, {_count(warnings, 'warning')}."]
        groups: dict[tuple[str, str], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[problem.severity, problem.kind].append(problem)
        for (severity, kind), members in groups.items():
            lines.append(f"\n{severity.upper()} {kind} ({len(members)})")
            lines += [f"  - {p.message}" for p in members[:limit]]
            lines += [f"  - ... and {len(members) - limit} more (--json lists all)"] if len(members) > limit else []
            lines += [f"  What to do: {remedy}" for remedy in dict.fromkeys(p.remedy for p in members[:limit])]
        return "\n".join(lines)


@dataclass
class _Findings:
    """What one case gave: problems, the digest of its voxels whatever their order, and the label values it holds."""

    problems: list[Problem] = field(default_factory=list)
    digest: str | None = None
    values: frozenset[int] = frozenset()

    def add(self, severity: str, kind: str, case: str, message: str, remedy: str) -> None:
        self.problems.append(Problem(severity, kind, case, message, remedy))


def verify_dataset(dataset: RawDataset, workers: int = 1, progress: Callable[[], None] | None = None) -> IntegrityReport:
    """Look at every case of imagesTr and imagesTs. Open the dataset with strict=False, so that its listing's faults are told too."""
    cases = [*dataset.cases.values(), *dataset.test_cases.values()]
    look = partial(_look_at, modalities=dataset.modalities, declared=dataset.declared_values)
    found: dict[str, _Findings] = {}
    problems = list(dataset.faults)
    for files, result in each(look, cases, workers, preload=("nibabel", "seerseg.dataset.integrity")):
        if isinstance(result, SeerSegError):
            problems.append(Problem("error", "unreadable", files.id, str(result), "Mend the case or take it away."))
        else:
            found[files.id] = result
            problems += result.problems
        if progress is not None:
            progress()
    known_missing = {p.case for p in dataset.faults if p.kind == "missing-label"}
    for files in dataset.cases.values():
        if files.label is None and files.id not in known_missing:
            wanted = dataset.folder / "labelsTr" / f"{files.id}{dataset.file_ending}"
            problems.append(
                Problem(
                    "error", "missing-label", files.id, f"Case {files.id!r} has no label.", f"Put it at {wanted}, or take the case away."
                )
            )
    problems += _request_problems(dataset, {case: findings.values for case, findings in found.items()})
    problems += _twins({case: f.digest for case, f in found.items() if f.digest}, dataset)
    problems += _alike_names(dataset)
    problems += _split_problems(dataset)
    problems.sort(key=lambda p: (p.severity != "error", p.kind, p.case or "", p.message))
    return IntegrityReport(dataset.name, len(cases), problems)


def hu_fault(percentiles: Mapping[str, float]) -> str | None:
    """Why intensities (as Volume.percentiles) cannot be Hounsfield units, None when they can."""
    low, high = percentiles["min"], percentiles["max"]
    if low >= 0 and high <= 255:
        return f"values from {low:g} to {high:g} look like grey values of a picture"
    if low >= -50:
        return f"no value lies below {low:g}, so there is neither air nor fat"
    if high - low < 100:
        return f"values span {high - low:.3g} only, as after normalisation"
    if percentiles["99.5"] > _HU_HIGHEST:
        return f"the 99.5 percentile is {percentiles['99.5']:g}, denser than bone"
    return None


def _look_at(files: CaseFiles, modalities: Sequence[str | None], declared: frozenset[int]) -> _Findings:
    from seerseg.volume import read_grid, read_volume

    found = _Findings()
    heads = []
    for path in files.images:
        try:
            heads.append(read_grid(path))
        except SeerSegError as error:
            found.add("error", "unreadable", files.id, str(error), "Copy or export the file again, or take the case away.")
    if len(heads) < len(files.images):
        return found
    first, source = heads[0]
    if source.laterality != "known":
        message = f"{files.images[0]} does not say which side is left (sform and qform codes are 0), so laterality is assumed."
        found.add(
            "warning",
            "laterality-assumed",
            files.id,
            message,
            "Check one scan by eye and set the sform, or trust no request that names a side.",
        )
    for path, (grid, _) in zip(files.images[1:], heads[1:], strict=True):
        if not grid.close_to(first):
            distance = _apart(grid.corner_distance_mm(first), grid.shape_zyx, first.shape_zyx)
            message = f"{path} and {files.images[0]} are channels of one case on different grids: {distance}."
            found.add(
                "error", "channel-grid", files.id, message, "Resample the channels to one grid, or preprocess with --resample_channels."
            )
    digests = []
    for channel, path in enumerate(files.images):
        try:
            volume = read_volume(path, channel=channel, modality=modalities[channel] if channel < len(modalities) else None)
        except SeerSegError as error:
            found.add("error", "unreadable", files.id, str(error), "Copy or export the file again, or take the case away.")
            continue
        _look_at_voxels(found, files.id, path, volume)
        digests.append(_voxel_digest(volume.array))
    if len(digests) == len(files.images):
        found.digest = "".join(digests)
    if files.label is not None:
        _look_at_label(found, files, first, declared)
    return found


def _look_at_voxels(found: _Findings, case: str, path: Path, volume: Any) -> None:
    for note in volume.source.notes:
        if "not finite" in note:
            found.add("error", "not-finite", case, f"{path}: {note}.", "Find out where NaN comes from and export the image again.")
        elif "sform and qform differ" in note:
            found.add(
                "warning",
                "sform-qform",
                case,
                f"{path}: {note}.",
                "Check one scan by eye; if the qform is the right one, set the sform to it.",
            )
        elif "every voxel" not in note and "no orientation" not in note:
            found.add("warning", "note", case, f"{path}: {note}.", "Check that this is meant.")
    levels = volume.percentiles
    if levels["min"] == levels["max"]:
        found.add(
            "warning",
            "constant",
            case,
            f"{path} is constant: every voxel is {levels['min']:g}.",
            "Export the image again, or take the case away.",
        )
    elif volume.modality == "CT" and (reason := hu_fault(levels)):
        remedy = "Export it in Hounsfield units, or rename the channel in dataset.json; until then percentile windows are used."
        found.add("warning", "hu-implausible", case, f"{path} is declared CT, but {reason}.", remedy)


def _look_at_label(found: _Findings, files: CaseFiles, image_grid: Any, declared: frozenset[int]) -> None:
    from seerseg.volume import read_grid, read_labels

    assert files.label is not None
    try:
        grid, _ = read_grid(files.label)
        _compare_positions(found, files, grid, image_grid)
        labels, _ = read_labels(files.label)
    except SeerSegError as error:
        found.add("error", "unreadable-label", files.id, str(error), "Export the label as integers on the image's grid.")
        return
    values = _values(labels)
    found.values = frozenset(values)
    undeclared = sorted(set(values) - declared)
    if undeclared:
        shown = ", ".join(f"{v} ({_count(values[v], 'voxel')})" for v in undeclared[:5]) + (" ..." if len(undeclared) > 5 else "")
        message = f"{files.label} holds values that dataset.json does not declare: {shown}."
        found.add("error", "undeclared-label", files.id, message, "Declare them under 'labels', or mend the label file.")
    if not set(values) - {0}:
        message = f"{files.label} holds nothing but background."
        found.add("warning", "empty-label", files.id, message, "Fine if every target is absent from this scan; else mend the label file.")


def _compare_positions(found: _Findings, files: CaseFiles, label: Any, image: Any) -> None:
    distance = label.corner_distance_mm(image)
    if distance <= TOLERANCE_MM:
        return
    share = distance / min(image.spacing_zyx)
    apart = _apart(distance, label.shape_zyx, image.shape_zyx)
    if share < 0.5:
        message = f"{files.label} lies beside its image by a little: {apart}, {share:.2g} of a voxel."
        found.add("warning", "position", files.id, message, "Nothing need be done: labels are brought to the image by position.")
        return
    shape_differs = label.shape_zyx != image.shape_zyx
    field_apart = _field_distance_mm(label, image)
    if shape_differs and field_apart < 0.6 * max(*image.spacing_zyx, *label.spacing_zyx):
        message = f"{files.label} is on another grid than its image ({apart}) with the same field of view."
        found.add(
            "warning",
            "label-grid",
            files.id,
            message,
            "Check it by eye: the label is resampled to the image, nearest neighbour in world position.",
        )
        return
    remedy = (
        "Export the label on the image's grid; if voxel i of one is voxel i of the other, copy the image's header to the label."
        if not shape_differs
        else "Export the label on the image's grid. Left as it is, it is resampled by world position and may lose parts."
    )
    message = (
        f"{files.label} does not lie where its image {files.images[0]} lies: {apart}; the fields of view differ by {field_apart:.1f} mm."
    )
    found.add("error", "shape" if shape_differs else "position", files.id, message, remedy)


def _apart(distance_mm: float, one: Sequence[int], other: Sequence[int]) -> str:
    if np.isfinite(distance_mm):
        return f"corners up to {distance_mm:.3g} mm apart"
    return f"shapes (z, y, x) {tuple(one)} and {tuple(other)}"


def _field_distance_mm(one: Any, other: Any) -> float:
    """Largest distance between equal outer corners of two fields of view."""
    corners = []
    for grid in (one, other):
        top = np.array(grid.shape_zyx) - 0.5
        corners.append(grid.to_world(np.array([[a, b, c] for a in (-0.5, top[0]) for b in (-0.5, top[1]) for c in (-0.5, top[2])])))
    return float(np.linalg.norm(corners[0] - corners[1], axis=1).max())


def _values(labels: NDArray[Any]) -> dict[int, int]:
    """Value -> voxels, slice by slice."""
    counts: dict[int, int] = defaultdict(int)
    for plane in labels:
        if labels.dtype.kind == "u":
            counted = np.bincount(plane.reshape(-1))
            pairs = [(int(v), int(counted[v])) for v in np.flatnonzero(counted)]
        else:
            pairs = [(int(v), int(n)) for v, n in zip(*np.unique(plane, return_counts=True), strict=True)]
        for value, number in pairs:
            counts[value] += number
    return counts


def _voxel_digest(array: NDArray[Any]) -> str:
    """Equal for arrays that hold the same voxels in any flip or permutation of axes: digest of sizes and a fine histogram."""
    low, high = np.float32(array.min()), np.float32(array.max())
    scale = np.float32(4095.0) / (high - low) if high > low else np.float32(0)
    counts = np.zeros(4096, np.int64)
    for plane in array:
        bins = (plane.reshape(-1).astype(np.float32) - low) * scale
        counts += np.bincount(bins.astype(np.int16), minlength=4096)
    return hashlib.blake2b(repr((sorted(array.shape), float(low), float(high))).encode() + counts.tobytes(), digest_size=16).hexdigest()


def _request_problems(dataset: RawDataset, values: Mapping[str, frozenset[int]]) -> list[Problem]:
    problems: list[Problem] = []
    known = {*dataset.cases, *dataset.test_cases}
    for request in dataset.requests:
        if request.case not in known:
            message = (
                f"Request {request.id!r} names case {request.case!r}, which the dataset does not hold.{did_you_mean(request.case, known)}"
            )
            problems.append(Problem("error", "request-case", request.case, message, "Mend or remove the request."))
            continue
        unknown = [name for name in request.target or () if name not in dataset.labels]
        if unknown:
            near = did_you_mean(unknown[0], dataset.labels)
            message = f"Request {request.id!r} names the label {unknown[0]!r}, which dataset.json does not declare.{near}"
            problems.append(Problem("error", "request-label", request.case, message, "Mend or remove the request."))
            continue
        held = values.get(request.case)
        if request.target and held and not any(v in held for name in request.target for v in dataset.labels[name]):
            message = (
                f"Request {request.id!r} asks for {' + '.join(request.target)}, but the label of case {request.case!r} holds none of it."
            )
            problems.append(
                Problem(
                    "warning",
                    "request-absent",
                    request.case,
                    message,
                    "If it is absent from the scan, make the target null; else mend the label.",
                )
            )
    return problems


def _twins(digests: Mapping[str, str], dataset: RawDataset) -> list[Problem]:
    groups: dict[str, list[str]] = defaultdict(list)
    for case, digest in digests.items():
        groups[digest].append(case)
    problems = []
    for cases in groups.values():
        if len({dataset.subject_of.get(case, case) for case in cases}) < 2:
            continue
        cases = sorted(cases)
        listed = ", ".join(cases[:6]) + (" ..." if len(cases) > 6 else "")
        message = f"Cases {listed} hold the same voxels, so they are one scan under several names."
        remedy = (
            f"Take the copies away, or list them as one subject in {dataset.folder / 'subjects.json'}, else training cases are tested on."
        )
        problems.append(Problem("warning", "one-subject", cases[0], message, remedy))
    return problems


def _alike_names(dataset: RawDataset) -> list[Problem]:
    """Ids that differ only by a side or a visit ("p07_left", "p07_right") and are counted as different subjects."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case in dataset.cases:
        groups[_SIDE_OR_VISIT.sub("", case)].append(case)
    alike = [cases for cases in groups.values() if len({dataset.subject_of[case] for case in cases}) > 1]
    remedy = (
        f"If they are, list them in {dataset.folder / 'subjects.json'}: {{subject: [case, ...]}}, else one person is trained and tested on."
    )
    return [
        Problem("warning", "one-subject", cases[0], f"The names of cases {', '.join(cases[:6])} look like one subject.", remedy)
        for cases in alike
    ]


def _split_problems(dataset: RawDataset) -> list[Problem]:
    path = dataset.folder / SPLITS_FILE
    if not path.is_file():
        return []
    try:
        splits = load_splits(path, dataset)
    except PlanError as error:
        return [Problem("error", "splits", None, str(error), "Mend or remove the file.")]
    left_out = sorted(set(dataset.cases) - splits.cases)
    if not left_out:
        return []
    message = f"{path} gives no place to {_count(len(left_out), 'case')}: {', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''}."
    return [Problem("warning", "splits", None, message, "Fine if they are left out on purpose.")]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
