"""Rows to case-target rows to summaries: DESIGN section 8, once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from seerseg.evaluation.records import (
    ABSENT_STATUS,
    HIT_DICE,
    KINDS,
    About,
    Absent,
    CaseTarget,
    Cost,
    Evaluation,
    Group,
    Kind,
    Row,
    Spread,
    Summary,
)
from seerseg.metrics import ParaphraseScores, bootstrap_interval, over_paraphrases, paired_bootstrap


def summarise(about: About, rows: Sequence[Row], *, missing: Sequence[str] = (), faults: Sequence[str] = ()) -> Evaluation:
    """Everything that follows from the rows. Rows without scores take no part; absent targets are counted apart."""
    rows = sorted(rows, key=lambda r: (r.case, _natural(r.target), KINDS.index(r.kind), r.request))
    pairs = case_targets(rows)
    present = [r for r in rows if r.truth == "present" and r.scores is not None]
    free = [r for r in present if r.kind == "free text"]
    return Evaluation(
        about=about,
        rows=tuple(rows),
        case_targets=tuple(pairs),
        summaries=tuple(_summaries(pairs, present)),
        costs=tuple(_costs(pairs)),
        absent=_absent([r for r in rows if r.truth == "absent" and r.scores is not None]),
        styles=tuple(_groups([r for r in free if r.style], lambda r: r.style)),
        languages=tuple(_groups([r for r in free if r.language_split], lambda r: r.language_split)),
        missing=tuple(missing),
        faults=tuple(faults),
    )


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts "2" before "10", and "L2" before "L10"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def case_targets(rows: Iterable[Row]) -> list[CaseTarget]:
    """One record per (case, target, kind) whose target is present, over its paraphrases."""
    sets: dict[tuple[str, str, Kind], list[Row]] = defaultdict(list)
    for row in rows:
        if row.truth == "present" and row.scores is not None:
            sets[row.case, row.target, row.kind].append(row)
    return [
        CaseTarget(
            case=case,
            subject=members[0].subject,
            target=target,
            kind=kind,
            dice=over_paraphrases([r.scores.dice or 0.0 for r in members if r.scores], _styles(members)),
            nsd=_scores(members, "nsd", high_is_good=True),
            hd95_mm=_scores(members, "hd95_mm", high_is_good=False),
            failures=sum(r.failed for r in members),
            answered_absent=sum(r.status == ABSENT_STATUS for r in members),
        )
        for (case, target, kind), members in sets.items()
    ]


def _scores(members: Sequence[Row], name: str, *, high_is_good: bool) -> ParaphraseScores | None:
    values = [getattr(r.scores, name) for r in members]
    if any(v is None for v in values):
        return None
    return over_paraphrases(values, _styles(members), high_is_good=high_is_good)


def _styles(members: Sequence[Row]) -> list[str]:
    return [r.style for r in members if r.style]


def _summaries(pairs: Sequence[CaseTarget], present: Sequence[Row]) -> list[Summary]:
    out = []
    targets = sorted({p.target for p in pairs}, key=_natural)
    for target in (*targets, ""):
        for kind in KINDS:
            chosen = [p for p in pairs if p.kind == kind and target in ("", p.target)]
            if chosen:
                out.append(_summary(target, kind, chosen, [r for r in present if r.kind == kind and target in ("", r.target)]))
    return out


def _summary(target: str, kind: Kind, pairs: Sequence[CaseTarget], rows: Sequence[Row]) -> Summary:
    right = [r.answer_right for r in rows if r.answer_right is not None]
    by_target: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        by_target[pair.target].append(pair.dice.mean)
    return Summary(
        target=target,
        kind=kind,
        n=len(pairs),
        subjects=len({p.subject for p in pairs}),
        requests=len(rows),
        paraphrases=(min(p.dice.count for p in pairs), max(p.dice.count for p in pairs)),
        styles=tuple(sorted({s for p in pairs for s in p.dice.styles})),
        dice=_spread([(p.subject, p.dice) for p in pairs]),
        nsd=_spread([(p.subject, p.nsd) for p in pairs if p.nsd]) if any(p.nsd for p in pairs) else None,
        hd95_mm=_spread([(p.subject, p.hd95_mm) for p in pairs if p.hd95_mm]) if any(p.hd95_mm for p in pairs) else None,
        failures=sum(p.failures for p in pairs),
        false_negatives=sum(p.answered_absent for p in pairs),
        answer_rate=float(np.mean(right)) if right else None,
        hit_rate=float(np.mean([r.scores is not None and (r.scores.dice or 0.0) >= HIT_DICE for r in rows])),
        macro_dice=float(np.mean([np.mean(v) for v in by_target.values()])) if not target else None,
        lesions=_lesions(rows),
    )


def _spread(found: Sequence[tuple[str, ParaphraseScores]]) -> Spread:
    by_subject: dict[str, list[float]] = defaultdict(list)
    for subject, scores in found:
        by_subject[subject].append(scores.mean)
    mean, worst, std, variance = (float(np.mean([getattr(s, n) for _, s in found])) for n in ("mean", "worst", "std", "variance"))
    return Spread(mean, worst, std, variance, bootstrap_interval(by_subject))


def _lesions(rows: Sequence[Row]) -> dict[str, float | None] | None:
    counted = [r.lesions for r in rows if r.lesions is not None]
    if not counted:
        return None
    tp, fp, fn, touched = (sum(getattr(x, n) for x in counted) for n in ("tp", "fp", "fn", "touched"))
    f1 = [x.f1 for x in counted if x.f1 is not None]
    return {
        "mean_f1": float(np.mean(f1)) if f1 else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
        "detection_rate": touched / (tp + fn) if tp + fn else None,
        "reference_lesions": float(tp + fn),
        "predicted_lesions": float(tp + fp),
    }


def _costs(pairs: Sequence[CaseTarget]) -> list[Cost]:
    out = []
    for target in (*sorted({p.target for p in pairs}, key=_natural), ""):
        label, free = (
            {(p.case, p.target): p.dice.mean for p in pairs if p.kind == kind and target in ("", p.target)} for kind in KINDS[:2]
        )
        if set(label) & set(free):
            out.append(Cost(target, paired_bootstrap(label, free, {(p.case, p.target): p.subject for p in pairs})))
    return out


def _absent(rows: Sequence[Row]) -> Absent | None:
    if not rows:
        return None
    drawn = [r.drawn_ml for r in rows if r.drawn_ml is not None]
    return Absent(
        requests=len(rows),
        cases=len({r.case for r in rows}),
        false_positives=sum(r.drawn_voxels > 0 for r in rows),
        answered_absent=sum(r.status == ABSENT_STATUS for r in rows),
        false_ml=float(np.mean(drawn)) if drawn else None,
    )


def _groups(rows: Sequence[Row], name_of: Callable[[Row], str]) -> list[Group]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[name_of(row)].append(row)
    out = []
    for name, members in sorted(groups.items()):
        pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in members:
            if row.scores is not None and row.scores.dice is not None:
                pairs[row.case, row.target].append(row.scores.dice)
        dice = float(np.mean([np.mean(v) for v in pairs.values()]))
        out.append(Group(name, len(members), len(pairs), dice, sum(r.failed for r in members)))
    return out
