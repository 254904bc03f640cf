"""What an evaluation holds: one row per request, one per case and target, summaries. No files are touched here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from seerseg.metrics import (
    DEFAULT_TOLERANCE_MM,
    LESION_RULE,
    SURFACE_RULE,
    Interval,
    LesionScores,
    MaskScores,
    PairedDifference,
    ParaphraseScores,
)

EVALUATION_SCHEMA = 1
Kind = Literal["label prompt", "free text", "label map"]
KINDS: tuple[Kind, ...] = ("label prompt", "free text", "label map")
Truth = Literal["present", "absent", "unknown"]
ABSENT_STATUS = "absent"
HIT_DICE = 0.1  # from this Dice on a finding counts as hit, as in ReXGroundingCT


@dataclass(frozen=True)
class Scoring:
    """How masks are scored. tolerance_mm: for NSD, `tolerances` overriding it per target; lesions: lesion-wise F1 too;
    least_voxels: smaller targets are left out as cut off."""

    tolerance_mm: float = DEFAULT_TOLERANCE_MM
    tolerances: Mapping[str, float] = field(default_factory=dict)
    lesions: bool = False
    least_voxels: int = 1

    def tolerance_of(self, target: str) -> float:
        """The tolerance in mm for a target."""
        return self.tolerances.get(target, self.tolerance_mm)


@dataclass(frozen=True)
class Row:
    """One request (or one label of a label map) against its reference.

    target: label name, several joined by " + ", "" for a request whose target is absent; status: what the prediction says of
    itself ("ok", "absent", "empty", "unsupported", "fault", "failed") or "mask" when only a file was there; answered: the
    name that the reasoner gave; answer_right: it is the target's name (None when not known); scores: None when the truth is
    unknown or the row could not be scored, and then note says why; drawn_ml: None on a flat image; file, file_values: where the
    mask lies in the prediction folder ("": nothing was drawn) and its values there (None: every voxel over 0).
    """

    case: str
    subject: str
    request: str
    kind: Kind
    target: str
    truth: Truth
    text: str = ""
    style: str = ""
    language_split: str = ""
    status: str = "mask"
    answered: str | None = None
    answer_right: bool | None = None
    scores: MaskScores | None = None
    lesions: LesionScores | None = None
    drawn_voxels: int = 0
    drawn_ml: float | None = None
    seconds: float | None = None
    note: str = ""
    file: str = ""
    file_values: tuple[int, ...] | None = None

    @property
    def failed(self) -> bool:
        """The target is there and nothing was drawn."""
        return self.scores is not None and self.scores.failed

    def to_json(self) -> dict[str, Any]:
        """JSON-ready and flat but for the lesions."""
        out = {k: v for k, v in asdict(self).items() if k not in ("scores", "lesions")}
        scores = self.scores.to_json() if self.scores else {}
        out |= {k: scores.get(k) for k in ("dice", "iou", "nsd", "hd95_mm", "assd_mm", "reference_ml", "prediction_ml", "tp", "fp", "fn")}
        out |= {"failed": self.failed, "tolerance_mm": scores.get("tolerance_mm")}
        return out | {"lesions": self.lesions.to_json() if self.lesions else None}


@dataclass(frozen=True)
class CaseTarget:
    """All requests of one kind for one present target of one case: its paraphrase set. hd95_mm: worst is the largest."""

    case: str
    subject: str
    target: str
    kind: Kind
    dice: ParaphraseScores
    nsd: ParaphraseScores | None
    hd95_mm: ParaphraseScores | None
    failures: int
    answered_absent: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        out = asdict(self)
        for name in ("dice", "nsd", "hd95_mm"):
            scores = getattr(self, name)
            out[name] = scores.to_json() if scores else None
        return out


@dataclass(frozen=True)
class Spread:
    """One score over cases: means over (case, target) of their mean, worst, std and variance over paraphrases."""

    mean: float
    worst: float
    std: float
    variance: float
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "interval": self.interval.to_json() if self.interval else None}


@dataclass(frozen=True)
class Summary:
    """Present targets of one name ("" for all) and one kind. n: (case, target) pairs; paraphrases: fewest and most per pair.

    failures: requests with nothing drawn; false_negatives: of those, answered as absent; answer_rate: share of the requests
    whose answer was the target's name, None when not known; hit_rate: share of the requests with a Dice of at least
    HIT_DICE; macro_dice: plain mean of the targets' means (only for "").
    """

    target: str
    kind: Kind
    n: int
    subjects: int
    requests: int
    paraphrases: tuple[int, int]
    styles: tuple[str, ...]
    dice: Spread
    nsd: Spread | None
    hd95_mm: Spread | None
    failures: int
    false_negatives: int
    answer_rate: float | None
    hit_rate: float
    macro_dice: float | None
    lesions: Mapping[str, float | None] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        out = asdict(self)
        for name in ("dice", "nsd", "hd95_mm"):
            spread = getattr(self, name)
            out[name] = spread.to_json() if spread else None
        return out | {"failure_rate": self.failures / self.requests, "false_negative_rate": self.false_negatives / self.requests}


@dataclass(frozen=True)
class Absent:
    """Requests whose target is not in the scan. false_positives: with any voxel drawn; answered_absent: those said to be
    absent; false_ml: mean mL drawn over all of them, None on flat images."""

    requests: int
    cases: int
    false_positives: int
    answered_absent: int
    false_ml: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, rates included."""
        rates = {
            "false_positive_rate": self.false_positives / self.requests,
            "answered_absent_rate": self.answered_absent / self.requests,
        }
        return asdict(self) | rates


@dataclass(frozen=True)
class Cost:
    """What free text costs: mean Dice of free text less that of the label prompt, over the (case, target) that have both."""

    target: str
    difference: PairedDifference

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"target": self.target, **self.difference.to_json()}


@dataclass(frozen=True)
class Group:
    """Free-text requests of one style or one language split: mean over (case, target) of the mean Dice of those requests."""

    name: str
    requests: int
    n: int
    dice: float
    failures: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class About:
    """Where the numbers come from. model: the "model" part of the predictions' JSON files (empty when there are none);
    reference_note: for example that the labels were made automatically; mixed: the predictions are of several models."""

    dataset: str
    predictions: str
    split: str = "all"
    fold: int | None = None
    tolerance_mm: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False
    reference_note: str = ""

    @property
    def bank_mode(self) -> str:
        """Which skills were in play, "none" when the predictions say nothing of a bank."""
        return str(self.model.get("bank_mode") or self.model.get("bank") or "none")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"bank_mode": self.bank_mode, "surface_rule": SURFACE_RULE, "lesion_rule": LESION_RULE}


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found. missing: "case: request" of what was asked but not predicted (left out, never averaged in);
    faults: sentences on what could not be scored."""

    about: About
    rows: tuple[Row, ...]
    case_targets: tuple[CaseTarget, ...]
    summaries: tuple[Summary, ...]
    costs: tuple[Cost, ...]
    absent: Absent | None
    styles: tuple[Group, ...]
    languages: tuple[Group, ...]
    missing: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def summary(self, kind: Kind, target: str = "") -> Summary | None:
        """The summary of one kind and target ("": all targets)."""
        return next((s for s in self.summaries if s.kind == kind and s.target == target), None)

    @property
    def cases(self) -> int:
        """Cases with at least one row."""
        return len({row.case for row in self.rows})

    @property
    def subjects(self) -> int:
        """Subjects with at least one row."""
        return len({row.subject for row in self.rows})

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json; with label maps also nnU-Net's keys, so that its scripts read it."""
        out: dict[str, Any] = {
            "schema": EVALUATION_SCHEMA,
            "about": self.about.to_json(),
            "cases": self.cases,
            "subjects": self.subjects,
            "summaries": [s.to_json() for s in self.summaries],
            "cost_of_free_text": [c.to_json() for c in self.costs],
            "absent": self.absent.to_json() if self.absent else None,
            "styles": [g.to_json() for g in self.styles],
            "languages": [g.to_json() for g in self.languages],
            "missing": list(self.missing),
            "faults": list(self.faults),
            "case_targets": [c.to_json() for c in self.case_targets],
            "rows": [r.to_json() for r in self.rows],
        }
        return out | (_nnunet_keys(self) if any(row.kind == "label map" for row in self.rows) else {})


def _nnunet_keys(evaluation: Evaluation) -> dict[str, Any]:
    per_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation.rows:
        if row.kind == "label map" and row.scores is not None:
            s = row.scores
            per_case.setdefault(row.case, {})[row.request] = {
                "Dice": s.dice, "IoU": s.iou, "TP": s.tp, "FP": s.fp, "FN": s.fn, "n_pred": s.tp + s.fp, "n_ref": s.tp + s.fn,
            }  # fmt: skip
    labels = sorted({label for metrics in per_case.values() for label in metrics})
    mean = {label: _mean_of([metrics[label] for metrics in per_case.values() if label in metrics]) for label in labels}
    return {
        "foreground_mean": _mean_of(list(mean.values())),
        "mean": mean,
        "metric_per_case": [{"case": case, "metrics": metrics} for case, metrics in per_case.items()],
    }


def _mean_of(metrics: list[dict[str, Any]]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in metrics[0] if metrics else ():
        values = [m[name] for m in metrics if m[name] is not None]
        out[name] = sum(values) / len(values) if values else None
    return out
