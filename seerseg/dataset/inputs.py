"""What a prediction is given to work on: a folder of images, one image, DICOM folders, or a jobs file.

Folders are listed once and grouped in one pass, however many images they hold. Nothing is dropped silently: what was not
taken is named with the reason, and a case that cannot be worked on is named with its fault while the others go on.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from seerseg.dataset.raw import CaseFiles
from seerseg.errors import NothingToDoError, RequestError, UsageError, did_you_mean
from seerseg.volume import image_stem, is_image

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_JOB_KEYS = ("case", "image", "images", "requests", "modality")
_JOBS_ENDINGS = (".json", ".jsonl")
_COMPANIONS = {"dataset.json", "requests.jsonl", "subjects.json", "label_descriptions.json", "splits.json", "plans.json", "ledger.jsonl"}


@dataclass(frozen=True)
class Inputs:
    """The cases that were found.

    cases: sorted by id, those that can be tried; faults: case id -> why it cannot be; ignored: one line for each file or
    folder that was not taken, with the reason; asked: case id -> requests as the jobs file gives them (texts or objects);
    modalities: case id -> modality as the jobs file gives it; kind: what was given; folder: where it lies.
    """

    cases: tuple[CaseFiles, ...]
    kind: Literal["folder", "file", "jobs"]
    folder: Path
    faults: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    asked: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    modalities: Mapping[str, str] = field(default_factory=dict)


def find_cases(path: str | Path, *, channels: int | None = None) -> tuple[list[CaseFiles], list[str]]:
    """The cases at `path`, and a line for whatever was ignored or cannot be used, with the reason. See `find_inputs`."""
    found = find_inputs(path, channels=channels)
    return list(found.cases), [*found.ignored, *(f"{case}: {fault}" for case, fault in sorted(found.faults.items()))]


def find_inputs(path: str | Path, *, channels: int | None = None) -> Inputs:
    """The cases at `path`.

    A folder of nnU-Net names (`case_0000.nii.gz`; channels of one case are grouped), a folder of other image files (each a
    case), folders of DICOM files (each a case, named by its path), one image, or a jobs file (.json, .jsonl: a list of
    {"case"?, "image" | "images", "requests"?, "modality"?}, paths relative to the file). channels: how many each case must have;
    None: as many as most cases of the folder have.

    UsageError when `path` does not exist or is of no use; RequestError for a jobs file that is no JSON; NothingToDoError when
    nothing was found. What is wrong with one case is in `.faults`.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UsageError(f"The input {where} does not exist.{_near_path(where)}")
    if where.is_dir():
        found = _from_folder(where, channels)
    elif where.suffix.lower() in _JOBS_ENDINGS:
        found = _from_jobs(where, channels)
    else:
        found = _from_file(where, channels)
    if not found.cases and not found.faults:
        raise NothingToDoError(_nothing(where, found))
    return found


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark, "DICM" at byte 128."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def split_channel(stem: str) -> tuple[str, int | None]:
    """("case_a", 1) for "case_a_0001"; (stem, None) without a four-digit channel suffix."""
    match = _CHANNEL.fullmatch(stem)
    return (match["case"], int(match["channel"])) if match else (stem, None)


def _from_folder(folder: Path, channels: int | None) -> Inputs:
    images, folders, others, ignored = _list(folder)
    if not images:
        cases = _dicom_cases(folder, folders, others)
        if cases:
            return Inputs(tuple(cases), "folder", folder, ignored=tuple(ignored))
    taken, faults = _group(images, channels, ignored)
    if images and folders:
        dicom = [_dicom_case(sub, sub.name) for sub in folders if _holds_dicom(sub)]
        known = {case.id for case in taken}
        taken += [case for case in dicom if case.id not in known]
        folders = [sub for sub in folders if sub not in {case.images[0] for case in dicom}]
    ignored += [f"{sub.name}: a folder; folders are searched for DICOM series only, give it as the input itself" for sub in folders]
    names = {case.id for case in taken} | {image_stem(p) for case in taken for p in case.images}
    ignored += [f"{p.name}: not an image that SeerSeg reads" for p in others if not _is_companion(p, names)]
    return Inputs(tuple(sorted(taken, key=lambda c: c.id)), "folder", folder, faults=faults, ignored=tuple(sorted(ignored)))


def _list(folder: Path) -> tuple[list[Path], list[Path], list[Path], list[str]]:
    """Images, folders and other files directly in a folder, sorted by name; hidden ones as lines of `ignored`."""
    images: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    ignored: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = folder / entry.name
                if entry.name.startswith("."):
                    if is_image(path):
                        ignored.append(f"{entry.name}: a hidden file")
                elif entry.is_dir():
                    folders.append(path)
                else:
                    (images if image_stem(path) != entry.name else others).append(path)  # by the name alone: no look at each file
    except OSError as error:
        raise UsageError(f"Cannot list the input folder {folder}: {error.strerror}.") from error
    return images, folders, others, ignored


def _group(images: Sequence[Path], channels: int | None, ignored: list[str]) -> tuple[list[CaseFiles], dict[str, str]]:
    """Cases and faults from image files. A suffix `_0000` counts as a channel only where the folder has a channel 0."""
    split = [(path, *split_channel(image_stem(path))) for path in images]
    has_channels = any(channel == 0 for _, _, channel in split)
    parts: dict[str, dict[int, list[Path]]] = {}
    plain: dict[str, list[Path]] = {}
    for path, case, channel in split:
        if has_channels and channel is not None:
            parts.setdefault(case, {}).setdefault(channel, []).append(path)
        else:
            plain.setdefault(image_stem(path), []).append(path)
    expected = channels
    if expected is None and parts:
        expected = Counter(len(files) for files in parts.values()).most_common(1)[0][0]
    cases: list[CaseFiles] = []
    faults: dict[str, str] = {}
    for case, files in parts.items():
        fault = _channel_fault(case, files, expected or len(files))
        if fault:
            faults[case] = fault
        else:
            cases.append(CaseFiles(case, tuple(files[i][0] for i in sorted(files))))
    for case, paths in plain.items():
        if case in parts:
            ignored += [f"{p.name}: case {case} is made of the files with channel suffixes" for p in paths]
        elif len(paths) > 1:
            faults[case] = (
                f"Case {case} is given more than once: {', '.join(p.name for p in paths)}. Keep one of them or rename the others."
            )
        elif channels is not None and channels > 1:
            faults[case] = (
                f"Case {case} has one image, {paths[0].name}, but {channels} channels are needed: "
                f"name them {case}_0000 to {case}_{channels - 1:04d}."
            )
        else:
            cases.append(CaseFiles(case, (paths[0],)))
    return cases, faults


def _channel_fault(case: str, files: Mapping[int, Sequence[Path]], expected: int) -> str | None:
    twice = next((paths for paths in files.values() if len(paths) > 1), None)
    if twice:
        return f"A channel of case {case} is given more than once: {', '.join(p.name for p in twice)}. Keep one of them."
    missing = [i for i in range(expected) if i not in files]
    if missing:
        names = ", ".join(f"{case}_{i:04d}" for i in missing[:4])
        return f"Case {case} has {len(files)} of {expected} channels; missing: {names}. Add the missing files."
    beyond = [i for i in sorted(files) if i >= expected]
    if beyond:
        return f"Case {case} has channels up to {beyond[-1]:04d}, but {expected} are expected: {files[beyond[-1]][0].name} is one too many."
    return None


def _from_file(path: Path, channels: int | None) -> Inputs:
    if not is_image(path):
        if is_dicom(path):
            raise UsageError(f"{path} is one DICOM file. Give the folder that holds the whole series: {path.parent}.")
        raise UsageError(
            f"{path} is not an image that SeerSeg reads (NIfTI, NRRD, MHA, PNG, JPG, a DICOM folder) nor a jobs file (.json, .jsonl)."
        )
    stem = image_stem(path)
    case, channel = split_channel(stem)
    if channel != 0:
        case = stem
    if channels is None or channels == 1 or channel != 0:
        cases, faults = _group([path], channels, []) if channel is None else ([CaseFiles(case, (path,))], {})
        return Inputs(tuple(cases), "file", path.parent, faults=faults)
    siblings = [p for p in _list(path.parent)[0] if split_channel(image_stem(p))[0] == case and split_channel(image_stem(p))[1] is not None]
    cases, faults = _group(siblings, channels, [])
    return Inputs(tuple(cases), "file", path.parent, faults=faults)


def _holds_dicom(folder: Path) -> bool:
    """Whether the first plausible file of a folder (ending .dcm, .ima or none at all) is DICOM."""
    try:
        names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith(".") and e.is_file())
    except OSError:
        return False
    plausible = (n for n in names if Path(n).suffix.lower() in (".dcm", ".ima", "") or Path(n).suffix[1:].isdigit())
    return any(is_dicom(folder / name) for _, name in zip(range(3), plausible, strict=False))


def _dicom_case(folder: Path, name: str) -> CaseFiles:
    return CaseFiles(name, (folder,))


def _dicom_cases(folder: Path, folders: Iterable[Path], others: Sequence[Path]) -> list[CaseFiles]:
    """The folder itself if it holds DICOM files, else each folder below it that does (named by its path, joined by '_')."""
    if others and _holds_dicom(folder):
        return [_dicom_case(folder, folder.resolve().name)]
    cases = []
    for top in folders:
        for root, below, files in os.walk(top):
            below.sort()
            if files and _holds_dicom(Path(root)):
                cases.append(_dicom_case(Path(root), "_".join(Path(root).relative_to(folder).parts)))
    return sorted(cases, key=lambda c: c.id)


def _from_jobs(path: Path, channels: int | None) -> Inputs:
    cases: dict[str, CaseFiles] = {}
    faults: dict[str, str] = {}
    asked: dict[str, tuple[Any, ...]] = {}
    modalities: dict[str, str] = {}
    for place, entry in _job_entries(path):
        try:
            case = _job_case(entry, path.parent, place)
            if channels is not None and len(case.images) != channels:
                raise RequestError(f"{place}: case {case.id} has {len(case.images)} images, but {channels} channels are needed.")
            if case.id in cases and cases[case.id].images != case.images:
                raise RequestError(f'{place}: case {case.id} stands for other images above; give this job another "case".')
            requests = _job_requests(entry, place)
        except RequestError as error:
            faults[place] = str(error)
            continue
        cases[case.id] = case
        asked[case.id] = asked.get(case.id, ()) + requests
        if isinstance(entry.get("modality"), str):
            modalities[case.id] = entry["modality"]
    ordered = tuple(cases[name] for name in sorted(cases))
    return Inputs(ordered, "jobs", path.parent, faults=faults, asked={c: r for c, r in asked.items() if r}, modalities=modalities)


def _job_entries(path: Path) -> list[tuple[str, Any]]:
    """(place, entry) for each job; an entry that is a RequestError could not be parsed."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text. Save the jobs file as UTF-8.") from None
    except OSError as error:
        raise RequestError(f"Cannot read the jobs file {path}: {error.strerror}.") from error
    if path.suffix.lower() == ".jsonl":
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    entries.append((f"{path.name}:{number}", json.loads(line)))
                except (json.JSONDecodeError, RecursionError) as error:
                    entries.append((f"{path.name}:{number}", RequestError(f"{path.name}:{number} is not valid JSON ({error}).")))
        return entries
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f'{path} is not valid JSON ({error}). A jobs file is a list of objects with "image" and "requests".') from None
    if isinstance(value, dict):
        value = value["jobs"] if isinstance(value.get("jobs"), list) else [value]
    if not isinstance(value, list):
        raise RequestError(f'{path} holds {type(value).__name__}, not a list of jobs: [{{"image": ..., "requests": [...]}}].')
    return [(f"{path.name} job {number}", entry) for number, entry in enumerate(value, 1)]


def _job_case(entry: Any, folder: Path, place: str) -> CaseFiles:
    if isinstance(entry, RequestError):
        raise entry
    if not isinstance(entry, dict):
        raise RequestError(f'{place} is {type(entry).__name__}, not an object with "image" and "requests".')
    for key in entry:
        if key not in _JOB_KEYS:
            raise RequestError(f"{place} has the unknown key {key!r}.{did_you_mean(key, _JOB_KEYS)} Known keys: {', '.join(_JOB_KEYS)}.")
    images = entry.get("images", [entry["image"]] if "image" in entry else None)
    if "image" in entry and "images" in entry:
        raise RequestError(f'{place} has both "image" and "images"; keep one.')
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise RequestError(f'{place} names no image: give "image": a path, or "images": a list of paths, one for each channel.')
    paths = tuple(folder / Path(i).expanduser() for i in images)
    for path in paths:
        if not path.exists():
            raise RequestError(f"{place}: the image {path} does not exist.")
    case = entry.get("case", path_case(paths[0]))
    if not isinstance(case, str) or not case or case != Path(case).name or case.startswith("."):
        raise RequestError(f"{place}: {case!r} cannot be a case name, as files are named by it.")
    return CaseFiles(case, paths)


def path_case(image: Path) -> str:
    """The case name that an image's own name gives: without ending and channel suffix `_0000`; a folder's name as it is."""
    if image.is_dir():
        return image.resolve().name
    stem = image_stem(image)
    case, channel = split_channel(stem)
    return case if channel == 0 else stem


def _job_requests(entry: Mapping[str, Any], place: str) -> tuple[Any, ...]:
    requests = entry.get("requests", [])
    if isinstance(requests, str | dict):
        requests = [requests]
    if not isinstance(requests, list):
        raise RequestError(f'{place}: "requests" is {type(requests).__name__}, not a list of texts or objects with "text".')
    return tuple(requests)


def _is_companion(path: Path, names: set[str]) -> bool:
    """Files that belong beside images: request side files and the dataset's own descriptions."""
    return path.name in _COMPANIONS or (path.suffix.lower() in (".txt", ".json") and path.stem in names)


def _near_path(where: Path) -> str:
    try:
        names = os.listdir(where.parent)
    except OSError:
        return ""
    return did_you_mean(where.name, names)


def _nothing(where: Path, found: Inputs) -> str:
    lines = [f"There is no image in {where}."]
    for name in ("imagesTs", "imagesTr"):
        if (where / name).is_dir():
            lines.append(f"It looks like a dataset: give {where / name}.")
            break
    if found.kind == "jobs":
        return f"The jobs file {where} holds no job."
    lines += ["Ignored: " + "; ".join(found.ignored[:5]) + (" ..." if len(found.ignored) > 5 else "") + "."] if found.ignored else []
    return " ".join(lines)
