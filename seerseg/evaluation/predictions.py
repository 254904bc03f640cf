"""What lies in a folder of predictions, and which question each file answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seerseg.dataset import RawDataset, Request
from seerseg.errors import DatasetError, NothingToDoError, OutputError, UsageError, did_you_mean
from seerseg.evaluation.records import Kind, Row, Scoring
from seerseg.evaluation.scoring import CaseJob, Drawn, Question
from seerseg.paths import read_json, safe_name
from seerseg.protocols.seer import normalise_name
from seerseg.volume import PICTURE_ENDINGS, image_stem, is_image

CASE_SCHEMA = 1
LABEL_PROMPT_STYLES = {"label prompt", "label"}


@dataclass(frozen=True)
class References:
    """The truth: label maps by case, and what their values mean.

    labels: name -> values; names: label -> further names that are right as an answer (canonical, synonyms); subject_of: case ->
    subject, a case that is not there being its own; note: on how the labels were made ("" when by hand or not known); points: published
    reference points of (case, target), voxels (z, y, x).
    """

    name: str
    files: Mapping[str, Path]
    labels: Mapping[str, tuple[int, ...]]
    subject_of: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    ignore_label: int | None = None
    note: str = ""
    points: Mapping[tuple[str, str], tuple[tuple[int, int, int], ...]] = field(default_factory=dict)

    def values(self, target: str) -> tuple[int, ...]:
        """The values of a target as rows name it: a label, or several joined by " + "; () for "" (absent)."""
        if target in self.labels:
            return tuple(sorted(self.labels[target]))
        return tuple(sorted({v for name in target.split(" + ") for v in self.labels.get(name, ())}))

    @classmethod
    def of_dataset(cls, dataset: RawDataset) -> References:
        """Training and test cases of a raw dataset that have a label map."""
        files = {c.id: c.label for c in (*dataset.cases.values(), *dataset.test_cases.values()) if c.label is not None}
        names = {label: (d.canonical, *d.synonyms) for label, d in dataset.descriptions.items()}
        meta = read_json(dataset.folder / "dataset.json", DatasetError)
        note = meta.get("label_kind", "")
        return cls(
            dataset.name,
            files,
            dataset.labels,
            dataset.subject_of,
            names,
            dataset.ignore_label,
            note if isinstance(note, str) else "",
            {(r.case, " + ".join(r.target)): r.points for r in dataset.requests if r.target and r.points},
        )

    @classmethod
    def of_folder(cls, folder: Path, labels: Mapping[str, tuple[int, ...]], *, ignore_label: int | None = None) -> References:
        """Every image file of a folder, its name without the ending being the case; NothingToDoError when there is none."""
        files = images_in(folder, "reference")
        if not files:
            raise NothingToDoError(f"{folder} holds no label map. Give the folder of the reference label maps.")
        return cls(folder.resolve().name, files, labels, {}, {}, ignore_label)


def images_in(folder: Path, role: str) -> dict[str, Path]:
    """Case -> image file of a folder; UsageError when it is no folder or two files have one name.

    A picture beside a volume of the same name is its overlay, not another mask.
    """
    if not folder.is_dir():
        raise UsageError(f"The {role} folder {folder} does not exist.")
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (p.suffix.lower() in PICTURE_ENDINGS, p.name)):
        if not path.name.startswith(".") and is_image(path):
            stem = image_stem(path)
            if stem in out and path.suffix.lower() in PICTURE_ENDINGS:
                continue
            if stem in out:
                raise UsageError(f"{folder} holds {out[stem].name} and {path.name}, which name the same case. Remove one of them.")
            out[stem] = path
    return out


@dataclass(frozen=True)
class Answered:
    """What a folder says of one request: its mask, the prediction's own status, and more where there is a JSON file."""

    drawn: Drawn
    status: str = "mask"
    text: str | None = None
    answered: str | None = None
    has_answer: bool = False
    seconds: float | None = None


def holds_requests(folder: Path, references: References) -> bool:
    """Whether the folder has answers to requests, by a `<case>.json` or a `<case>__<request id>` file, and not only label maps."""
    return any((folder / f"{case}.json").is_file() for case in references.files) or any(
        "__" in name for name in images_in(folder, "prediction")
    )


class PredictionFolder:
    """A folder that seerseg_predict wrote, or one with nothing but `<case>__<request id>.nii.gz` or `<case>.nii.gz`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = images_in(folder, "prediction")
        if not self.images and not any(folder.glob("*.json")):
            raise NothingToDoError(f"{folder} holds no predictions. Give the folder that seerseg_predict wrote (its -o).")

    def case(self, case: str) -> dict[str, Any] | None:
        """The case's JSON, None when there is none; OutputError when it is damaged."""
        path = self.folder / f"{case}.json"
        if not path.is_file():
            return None
        value = read_json(path, OutputError, CASE_SCHEMA)
        entries = value.get("requests")
        if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
            raise OutputError(f"{path} lists no requests, so it is no case file of seerseg_predict. Predict this case again.")
        return dict(value)

    def answers(self, case: str, requests: Sequence[Request], content: dict[str, Any] | None) -> dict[str, Answered]:
        """Request id -> answer, for those of `requests` that the folder holds, found by id, else by their text."""
        if content is not None:
            by_id = {entry["id"]: entry for entry in content["requests"]}
            # What was asked with --prompt has other ids than the same words in a file: equal text is the same request.
            by_text = {normalise_name(str(entry.get("text"))): entry for entry in content["requests"]}
            found = {}
            for request in requests:
                entry = by_id.get(request.id) or by_text.get(normalise_name(request.text))
                answer = self._from_entry(case, entry) if entry is not None else None
                if answer is not None:
                    found[request.id] = answer
            return found
        out = {}
        for request in requests:
            file = self.images.get(f"{case}__{request.id}") or self.images.get(f"{case}__{safe_name(request.id)}")
            if file is None and len(requests) == 1:
                file = self.images.get(case)
            if file is not None:
                out[request.id] = Answered(Drawn(file))
        return out

    def _from_entry(self, case: str, entry: Mapping[str, Any]) -> Answered | None:
        status, name, value = str(entry.get("status", "ok")), entry.get("file"), entry.get("value")
        drawn = Drawn(None)
        if status == "ok":
            whole = self.images.get(case)
            file = self.folder / Path(str(name)).name if name else whole
            if file is None or not file.is_file():
                return None
            # A file of its own holds one mask, whatever value it is written with; the case's label map holds several.
            shared = whole is not None and file.name == whole.name
            drawn = Drawn(file, (value,) if shared and isinstance(value, int) else None)
        seconds, answered, text = entry.get("seconds"), entry.get("target_answered"), entry.get("text")
        return Answered(
            drawn=drawn,
            status=status,
            text=text if isinstance(text, str) else None,
            answered=str(answered) if answered is not None else None,
            has_answer="target_answered" in entry,
            seconds=float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < float("inf") else None,
        )


def request_jobs(
    predictions: PredictionFolder,
    references: References,
    requests: Iterable[Request],
    *,
    optional: Iterable[Request] = (),
    scoring: Scoring,
) -> tuple[list[CaseJob], list[str], list[str], list[dict[str, Any]]]:
    """Jobs by case; "case: request" of what was not predicted; faults; the "model" part of every case file.

    optional: requests that take part when they were predicted and are not missed otherwise; one that asks a case for a target in
    the words of a listed request is that request, and counts once.
    """
    wanted: dict[str, list[Request]] = {}
    for request in requests:
        wanted.setdefault(request.case, []).append(request)
    required = {(r.case, r.id) for rs in wanted.values() for r in rs}
    said = {(r.case, r.target, r.text.casefold()) for rs in wanted.values() for r in rs}
    for request in optional:
        if (request.case, request.id) not in required and (request.case, request.target, request.text.casefold()) not in said:
            wanted.setdefault(request.case, []).append(request)
    jobs, missing, faults, models = [], [], [], []
    for case in sorted(wanted):
        try:
            content = predictions.case(case)
        except OutputError as error:
            faults.append(str(error))
            continue
        mine = wanted[case] if content is not None else [r for r in wanted[case] if (case, r.id) in required]
        answers = predictions.answers(case, mine, content)
        if content is not None and isinstance(content.get("model"), dict):
            models.append(content["model"])
        questions = []
        for request in mine:
            answer = answers.get(request.id)
            if answer is None:
                missing += [f"{case}: {request.id}"] if (case, request.id) in required else []
            elif answer.text is not None and normalise_name(answer.text) != normalise_name(request.text):
                faults.append(
                    f"Case {case}, request {request.id}: predicted for the text {answer.text[:60]!r}, but the request now says "
                    f"{request.text[:60]!r}. Predict it again."
                )
            else:
                question = _question(request, answer, references, scoring)
                if question.row.truth == "present" and case not in references.files:
                    faults.append(f"Case {case}, request {request.id}: {references.name} has no label map of this case.")
                else:
                    questions.append(question)
        if questions:
            jobs.append(CaseJob(case, references.files.get(case), tuple(questions), references.ignore_label, scoring.least_voxels))
    return jobs, missing, faults, models


def _question(request: Request, answer: Answered, references: References, scoring: Scoring) -> Question:
    values: tuple[int, ...] | None = None
    if request.target is not None:
        for name in request.target:
            if name not in references.labels:
                raise DatasetError(
                    f"Request {request.id} of case {request.case} has the target {name!r}, which is no label of {references.name}."
                    f"{did_you_mean(name, references.labels)}"
                )
        values = tuple(sorted({v for name in request.target for v in references.labels[name]}))
    kind: Kind = "label prompt" if normalise_name(request.style) in LABEL_PROMPT_STYLES else "free text"
    target = " + ".join(request.target) if request.target else ""
    row = Row(
        case=request.case,
        subject=references.subject_of.get(request.case, request.case),
        request=request.id,
        kind=kind,
        target=target,
        truth="unknown" if not request.has_target else "absent" if request.target is None else "present",
        text=request.text,
        style=request.style,
        language_split=request.language_split,
        status=answer.status,
        answered=answer.answered,
        answer_right=_right(request, answer, references),
        seconds=answer.seconds,
        file=answer.drawn.file.name if answer.drawn.file else "",
        file_values=answer.drawn.values,
    )
    return Question(row, values, answer.drawn, scoring.tolerance_of(target), scoring.lesions)


def _right(request: Request, answer: Answered, references: References) -> bool | None:
    if not answer.has_answer or not request.has_target or (request.target is not None and len(request.target) > 1):
        return None
    if request.target is None:
        return answer.status == "absent"
    right = {normalise_name(n) for n in (request.target[0], *references.names.get(request.target[0], ()))}
    return answer.answered is not None and normalise_name(answer.answered) in right


def label_map_jobs(
    predictions: Path,
    references: References,
    *,
    cases: Iterable[str] | None = None,
    scoring: Scoring,
) -> tuple[list[CaseJob], list[str]]:
    """One question per case and label, the same values in both label maps; and the cases without a prediction."""
    images = images_in(predictions, "prediction")
    if not images:
        raise NothingToDoError(f"{predictions} holds no label map. Give the folder of the predicted label maps.")
    jobs, missing = [], []
    for case in sorted(cases) if cases is not None else sorted(references.files):
        if case not in images:
            missing.append(case)
            continue
        questions = tuple(
            Question(
                Row(
                    case=case,
                    subject=references.subject_of.get(case, case),
                    request=str(values[0]) if len(values) == 1 else str(values),
                    kind="label map",
                    target=name,
                    truth="present",
                    file=images[case].name,
                    file_values=values,
                ),
                values,
                Drawn(images[case], values),
                scoring.tolerance_of(name),
                scoring.lesions,
            )
            for name, values in references.labels.items()
        )
        jobs.append(CaseJob(case, references.files[case], questions, references.ignore_label, scoring.least_voxels))
    return jobs, missing
