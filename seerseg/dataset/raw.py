"""Raw datasets: nnU-Net's folder layout unchanged, plus requests, subjects and label descriptions.

DatasetXXX_Name/
    dataset.json                "channel_names", "labels", "file_ending" as nnU-Net has them; or with a "dataset" key
                                (case -> {"images": [...], "label": ...}, paths relative to this folder, $VARS expanded)
    imagesTr/ {case}_{XXXX}{file_ending}    labelsTr/ {case}{file_ending}    [imagesTs/ labelsTs/]
    [subjects.json]             {subject: [case, ...]}; a case that it does not list is its own subject
    [requests.jsonl]            see seerseg.dataset.requests
    [label_descriptions.json]   {label: {"canonical", "synonyms", "region", "laterality"}}
    [splits.json]               overrides the planned splits
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.dataset.requests import Request, read_requests, scan_requests
from seerseg.errors import DatasetError, RequestError
from seerseg.paths import read_json
from seerseg.vocabulary import LabelDescription

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")
_MODALITY_WORDS = {
    "CT": {"ct", "cta", "cbct", "ctpa", "hu"},
    "MR": {"mr", "mri", "t1", "t2", "flair", "t1w", "t2w", "t1c", "t1ce", "t1gd", "t1n", "t2f", "t2star", "adc", "dwi", "cine", "mra", "pd",
           "pdw", "swi", "asl", "dce", "bold", "lge"},
    "PET": {"pet", "pt", "suv", "fdg"},
    "US": {"us", "ultrasound", "echo", "sonography"},
    "XR": {"xray", "xr", "cr", "dx", "mammography"},
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset. severity: "error" (must be mended) or "warning"; case: None when it is
    about the whole dataset; remedy: what to do."""

    severity: str
    kind: str
    case: str | None
    message: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"severity": self.severity, "kind": self.kind, "case": self.case, "message": self.message, "remedy": self.remedy}


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case: one per channel, in channel order, and the label map, None where there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True, eq=False)
class RawDataset:
    """A dataset as it lies on disk; no image has been opened.

    labels: name -> values (several for a region), without background and ignore; ignore_label: value that means "not
    annotated"; cases: imagesTr (or the "dataset" key); test_cases: imagesTs; subjects: subject -> its cases among
    `cases`, covering all of them; descriptions: only labels that label_descriptions.json describes; faults: what was
    found wrong while listing (strict=False only).
    """

    name: str
    folder: Path
    channel_names: tuple[str, ...]
    modalities: tuple[str | None, ...]
    labels: dict[str, tuple[int, ...]]
    file_ending: str
    cases: dict[str, CaseFiles]
    test_cases: dict[str, CaseFiles] = field(default_factory=dict)
    subjects: dict[str, list[str]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    descriptions: dict[str, LabelDescription] = field(default_factory=dict)
    ignore_label: int | None = None
    faults: tuple[Problem, ...] = ()

    def canonical(self, label: str) -> str:
        """The canonical name of a label: that of its description, else the label's own name."""
        description = self.descriptions.get(label)
        return description.canonical if description else label

    @cached_property
    def subject_of(self) -> dict[str, str]:
        """Case -> subject, for all of `cases`."""
        return {case: subject for subject, cases in self.subjects.items() for case in cases}

    @property
    def declared_values(self) -> frozenset[int]:
        """Every value that a label file may hold: background, labels, ignore."""
        values = {0, *(v for values in self.labels.values() for v in values)}
        return frozenset(values | ({self.ignore_label} if self.ignore_label is not None else set()))


def label_prompts(dataset: RawDataset, cases: Iterable[str] | None = None) -> list[Request]:
    """One request per case and label whose text is the label's canonical name (default: every labelled case)."""
    chosen = list(cases) if cases is not None else [c.id for c in (*dataset.cases.values(), *dataset.test_cases.values()) if c.label]
    return [
        Request(id=f"{case}__label{number:03d}", case=case, text=dataset.canonical(label), target=(label,), style="label_prompt")
        for case in chosen
        for number, label in enumerate(dataset.labels, start=1)
    ]


def modality_of(channel_name: str) -> str | None:
    """ "CT", "MR", "PET", "US" or "XR" as a channel's name says it, None when it does not ("zscore", "rgb_to_0_1", ...)."""
    words = set(re.split(r"[^a-z0-9]+", channel_name.casefold()))
    return next((modality for modality, known in _MODALITY_WORDS.items() if words & known), None)


def open_dataset(folder: Path, *, strict: bool = True) -> RawDataset:
    """List a raw dataset in time linear in its files.

    DatasetError (RequestError for requests.jsonl), one sentence, at the first thing that breaks the contract. With
    strict=False everything that concerns single cases, subjects, descriptions or requests is collected in `faults`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"The dataset folder {folder} does not exist.")
    meta_path = folder / "dataset.json"
    if not meta_path.is_file():
        raise DatasetError(f"{folder} holds no dataset.json, so it is no dataset. Give the folder that holds dataset.json and imagesTr.")
    meta = read_json(meta_path, DatasetError)
    channel_names = _channel_names(meta, meta_path)
    labels, ignore = label_values(meta, meta_path)
    faults = _Faults(strict)
    ending = meta.get("file_ending", "")
    if not isinstance(ending, str) or (not ending and "dataset" not in meta):
        raise DatasetError(f"{meta_path} lacks the key 'file_ending' (for example \".nii.gz\"). Add it.")
    if ending in PICTURE_ENDINGS and len(channel_names) in (3, 4):
        channel_names = ("-".join(channel_names),)  # one colour picture is one image, not several channels
    if "dataset" in meta:
        cases = _listed_cases(meta["dataset"], folder, meta_path, len(channel_names), faults)
    else:
        cases = _scan_cases(folder, "Tr", ending, len(channel_names), faults)
    if not cases:
        raise DatasetError(_no_cases(folder, ending, faults))
    test_cases = _scan_cases(folder, "Ts", ending, len(channel_names), faults) if ending and (folder / "imagesTs").is_dir() else {}
    return RawDataset(
        name=folder.resolve().name,
        folder=folder,
        channel_names=channel_names,
        modalities=tuple(modality_of(name) for name in channel_names),
        labels=labels,
        file_ending=ending,
        cases=cases,
        test_cases=test_cases,
        subjects=_subjects(folder / "subjects.json", cases, test_cases, faults),
        requests=_requests(folder / "requests.jsonl", faults),
        descriptions=_descriptions(folder / "label_descriptions.json", labels, faults),
        ignore_label=ignore,
        faults=tuple(faults.found),
    )


class _Faults:
    """Raises at once when strict, else collects."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.found: list[Problem] = []

    def error(
        self, kind: str, case: str | None, message: str, remedy: str, fault: type[DatasetError | RequestError] = DatasetError
    ) -> None:
        if self.strict:
            raise fault(f"{message} {remedy}")
        self.found.append(Problem("error", kind, case, message, remedy))

    def warning(self, kind: str, case: str | None, message: str, remedy: str) -> None:
        if not self.strict:
            self.found.append(Problem("warning", kind, case, message, remedy))


def _channel_names(meta: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(meta, dict):
        raise DatasetError(f"{path} must hold a JSON object, as nnU-Net's does.")
    names = meta.get("channel_names", meta.get("modality"))
    if names is None:
        raise DatasetError(f'{path} lacks the key \'channel_names\' (for example {{"0": "CT"}}). Add it.')
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise DatasetError(f'{path}: \'channel_names\' must map "0", "1", ... to names.')
    return tuple(str(names[str(i)]) for i in range(len(names)))


def label_values(meta: dict[str, Any], path: Path) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Label name -> values, and the ignore value or None, as the "labels" of a dataset.json have them; DatasetError naming `path`."""
    raw = meta.get("labels")
    if not isinstance(raw, dict) or not raw:
        raise DatasetError(f'{path} lacks the key \'labels\' (for example {{"background": 0, "liver": 1}}). Add it.')
    if all(key.isdigit() for key in raw) and all(isinstance(value, str) for value in raw.values()):
        raise DatasetError(
            f"{path}: 'labels' maps numbers to names, as the Medical Segmentation Decathlon has it. Turn it round: name to number."
        )
    labels: dict[str, tuple[int, ...]] = {}
    for name, value in raw.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values):
            raise DatasetError(f"{path}: label {name!r} must be a whole number from 0 or a list of them, not {value!r}.")
        labels[name] = tuple(dict.fromkeys(values))
    ignored = labels.pop("ignore", None)
    if labels.pop("background", (0,)) != (0,):
        raise DatasetError(f"{path}: the label 'background' must be 0.")
    if ignored is not None and len(ignored) != 1:
        raise DatasetError(f"{path}: the label 'ignore' must be one number, not {list(ignored)}.")
    if not labels:
        raise DatasetError(f"{path}: 'labels' names nothing but background. Add the structures that the label files hold.")
    zero = [name for name, values in labels.items() if 0 in values]
    if zero:
        raise DatasetError(f"{path}: label {zero[0]!r} uses the value 0, which is background. Give it another value.")
    return labels, ignored[0] if ignored else None


def _listed_cases(listed: Any, folder: Path, path: Path, channels: int, faults: _Faults) -> dict[str, CaseFiles]:
    if not isinstance(listed, dict):
        raise DatasetError(f"{path}: the key 'dataset' must map each case to its 'images' and 'label'.")
    cases = {}
    for case, entry in sorted(listed.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not all(isinstance(i, str) for i in images) or not isinstance(label, str | None):
            faults.error(
                "bad-entry", case, f"{path}: case {case!r} must have 'images' (a list of paths) and 'label' (a path).", "Mend its entry."
            )
            continue
        if len(images) != channels:
            message = f"{path}: case {case!r} lists {len(images)} images, but the dataset has {channels} channels."
            faults.error("missing-channel", case, message, "List one image per channel, in channel order.")
            continue
        files = CaseFiles(case, tuple(_expand(i, folder) for i in images), _expand(label, folder) if label else None)
        missing = next((p for p in files.images if not p.exists()), None)
        if missing is not None:
            faults.error(
                "missing-image",
                case,
                f"The image {missing} of case {case!r} does not exist.",
                f"Mend its entry in {path} or put the file there.",
            )
            continue
        if files.label is not None and not files.label.is_file():
            faults.error(
                "missing-label",
                case,
                f"The label {files.label} of case {case!r} does not exist.",
                f"Mend its entry in {path} or put the file there.",
            )
            files = CaseFiles(case, files.images)
        cases[case] = files
    return cases


def _expand(text: str, folder: Path) -> Path:
    path = Path(os.path.expandvars(text)).expanduser()
    return path if path.is_absolute() else Path(os.path.normpath(folder / path))


def _scan_cases(folder: Path, part: str, ending: str, channels: int, faults: _Faults) -> dict[str, CaseFiles]:
    images_folder, labels_folder = folder / f"images{part}", folder / f"labels{part}"
    if not images_folder.is_dir():
        raise DatasetError(f"{folder} has no folder imagesTr. Put the training images there, named {{case}}_0000{ending} and so on.")
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for name, path in _files(images_folder):
        matched = _CHANNEL_SUFFIX.fullmatch(name.removesuffix(ending)) if name.endswith(ending) else None
        if matched is None:
            message = f"The file {path} is not named like {{case}}_XXXX{ending}, so it is not used."
            faults.warning(
                "ignored-file", None, message, f"Rename it to its case and channel number, for example case_0000{ending}, or take it away."
            )
            continue
        found[matched[1]][int(matched[2])] = path
    labels = (
        {name.removesuffix(ending): path for name, path in _files(labels_folder) if name.endswith(ending)} if labels_folder.is_dir() else {}
    )
    cases = {}
    for case in sorted(found):
        numbers = found[case]
        missing = [c for c in range(channels) if c not in numbers]
        if missing:
            wanted = ", ".join(f"{case}_{c:04d}{ending}" for c in missing)
            message = f"Case {case!r} in {images_folder} lacks {wanted}, as the dataset has {channels} channel{'s' * (channels > 1)}."
            faults.error("missing-channel", case, message, "Add the file, or take the case away.")
            continue
        for extra in sorted(set(numbers) - set(range(channels))):
            message = f"{numbers[extra]} is channel {extra}, but dataset.json declares {channels} channel{'s' * (channels > 1)}."
            faults.warning("undeclared-channel", case, message, "Add the channel to 'channel_names' or take the file away.")
        cases[case] = CaseFiles(case, tuple(numbers[c] for c in range(channels)), labels.pop(case, None))
    for case in sorted(set(labels) - set(found)):
        faults.warning(
            "orphan-label",
            case,
            f"The label {labels[case]} belongs to no image.",
            f"Add the image {case}_0000{ending} or take the label away.",
        )
    return cases


def _files(folder: Path) -> list[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        return [(entry.name, folder / entry.name) for entry in entries if not entry.name.startswith(".")]


def _no_cases(folder: Path, ending: str, faults: _Faults) -> str:
    if faults.found and faults.found[0].severity == "error":
        return f"{folder} holds no usable case. {faults.found[0].message} {faults.found[0].remedy}"
    names = [name for name, _ in _files(folder / "imagesTr")] if (folder / "imagesTr").is_dir() else []
    example = f" It holds files like {sorted(names)[0]}." if names else ""
    wanted = f"{{case}}_0000{ending or '.nii.gz'}"
    return f"{folder / 'imagesTr'} holds no image named {wanted}.{example} Rename the images or mend 'file_ending' in dataset.json."


def _subjects(path: Path, cases: Mapping[str, CaseFiles], test_cases: Mapping[str, CaseFiles], faults: _Faults) -> dict[str, list[str]]:
    listed: Any = {}
    if path.is_file():
        try:
            listed = read_json(path, DatasetError)
        except DatasetError as error:
            faults.error("bad-subjects", None, str(error), "Without it every case counts as its own subject.")
    if not isinstance(listed, dict) or not all(isinstance(v, list) and all(isinstance(c, str) for c in v) for v in listed.values()):
        faults.error("bad-subjects", None, f"{path} must map each subject to a list of its cases.", "Mend it.")
        listed = {}
    subjects: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for subject, members in listed.items():
        for case in dict.fromkeys(members):
            if case in owner:
                message = f"{path}: case {case!r} is listed for the subjects {owner[case]!r} and {subject!r}."
                faults.error("bad-subjects", case, message, "A case is of one person: list it once.")
                continue
            owner[case] = subject
            if case in cases:
                subjects.setdefault(subject, []).append(case)
            elif case not in test_cases:
                faults.warning(
                    "unknown-case", case, f"{path} lists case {case!r}, which the dataset does not hold.", "Mend the name or take it away."
                )
        if any(c in cases for c in members) and any(c in test_cases for c in members):
            message = f"Subject {subject!r} has cases in imagesTr and in imagesTs, so the test set is not independent."
            faults.warning("subject-in-test", None, message, "Move all its cases to one of the two.")
    for case in cases:
        if case not in owner:
            own = case if case not in listed else f"{case} (case)"
            subjects[own] = [case]
    return subjects


def _requests(path: Path, faults: _Faults) -> list[Request]:
    if not path.is_file():
        return []
    if faults.strict:
        return read_requests(path)
    try:
        requests, bad = scan_requests(path)
    except RequestError as error:
        requests, bad = [], [str(error)]
    for sentence in bad:
        faults.error("bad-request", None, sentence, "Mend the line or take it away.", RequestError)
    return requests


def _descriptions(path: Path, labels: Mapping[str, tuple[int, ...]], faults: _Faults) -> dict[str, LabelDescription]:
    if not path.is_file():
        return {}
    try:
        listed = read_json(path, DatasetError)
    except DatasetError as error:
        faults.error("bad-description", None, str(error), "Without it labels go by their own names.")
        return {}
    if isinstance(listed, dict) and "labels" in listed and "labels" not in labels:
        listed = listed["labels"]
    if not isinstance(listed, dict):
        faults.error("bad-description", None, f"{path} must map label names to descriptions.", "Mend it.")
        return {}
    descriptions = {}
    for label, entry in listed.items():
        if label == "schema":
            continue
        if label not in labels:
            faults.error(
                "bad-description", None, f"{path} describes {label!r}, which is no label of dataset.json.", "Mend the name or take it away."
            )
            continue
        described = _description(entry, label)
        if described is None:
            remedy = 'Write {"canonical": "left lung", "synonyms": [...], "region": "chest", "laterality": "left"}.'
            faults.error("bad-description", None, f"{path}: the description of {label!r} cannot be used.", remedy)
            continue
        descriptions[label] = described
    return descriptions


def _description(entry: Any, label: str) -> LabelDescription | None:
    if not isinstance(entry, dict):
        return None
    canonical, synonyms = entry.get("canonical", label), entry.get("synonyms", [])
    region, laterality = entry.get("region"), entry.get("laterality")
    sound = (
        isinstance(canonical, str)
        and canonical.strip() != ""
        and isinstance(synonyms, list)
        and all(isinstance(s, str) and s.strip() for s in synonyms)
        and isinstance(region, str | None)
        and laterality in (None, "", "left", "right", "both")
    )
    return LabelDescription(canonical.strip(), tuple(s.strip() for s in synonyms), region or None, laterality or None) if sound else None
