"""An evaluation as text for a terminal (at most 100 columns) and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seerseg.evaluation.records import Evaluation, Row, Spread, Summary
from seerseg.paths import write_text

WIDTH = 100
_TARGET_WIDTH = 24


def text_table(evaluation: Evaluation) -> str:
    """What was evaluated, one line per target and kind, what free text costs, absent targets, what was left out."""
    blocks = [_header(evaluation), _targets(evaluation), _sentences(evaluation)]
    if evaluation.styles:
        blocks.append(_groups("style of request", evaluation))
    return "\n\n".join(block for block in blocks if block)


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per request, UTF-8, atomically; lesions as columns of their own."""
    text = io.StringIO()
    names = [n for n in rows[0].to_json() if n != "lesions"] if rows else []
    lesion_names = next((list(r.lesions.to_json()) for r in rows if r.lesions), [])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"lesions_{n}" for n in lesion_names)])
    for row in rows:
        content = row.to_json()
        lesions = content["lesions"] or {}
        writer.writerow([_cell(content[n]) for n in names] + [_cell(lesions.get(n)) for n in lesion_names])
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _header(evaluation: Evaluation) -> str:
    about = evaluation.about
    where = f"split {about.split}" + (f" (fold {about.fold})" if about.fold is not None else "")
    lines = [f"{about.dataset}, {where}: {count(len(evaluation.rows), 'row')} from {cases_note(evaluation)}{language_note(evaluation)}"]
    if about.model:
        parts = [f"{k} {about.model[k]}" for k in ("reasoner", "segmenter", "protocol", "plans", "seed") if about.model.get(k) is not None]
        lines.append(", ".join([*parts, f"bank {about.bank_mode}"]) + (" (predictions of several models)" if about.mixed else ""))
    interval = next((s.dice.interval for s in evaluation.summaries if s.dice.interval), None)
    note = f"NSD at {_tolerance(evaluation)}; "
    if interval is not None:
        note += f"{interval.level:.0%} intervals: {interval.resamples} bootstrap resamples of subjects, seed {interval.seed}"
    else:
        note += "no interval: one subject only"
    lines.append(note)
    if about.reference_note:
        lines.append(f"Reference labels: {about.reference_note}")
    return _wrapped(lines)


def cases_note(evaluation: Evaluation) -> str:
    """How many cases of how many subjects; where no subject has two cases, that each case was taken as one."""
    if evaluation.cases > 1 and all(row.subject == row.case for row in evaluation.rows):
        return f"{evaluation.cases} cases, each taken as a subject"
    return f"{count(evaluation.cases, 'case')} of {count(evaluation.subjects, 'subject')}"


def language_note(evaluation: Evaluation) -> str:
    """ ", test language": which language splits the free-text requests are of, "" when they do not say."""
    names = [g.name for g in evaluation.languages]
    return f", {' and '.join(names)} language" if names else ""


def _tolerance(evaluation: Evaluation) -> str:
    tolerances = evaluation.about.tolerance_mm
    own = ", ".join(f"{name} {mm:g}" for name, mm in tolerances.items() if name)
    return f"{tolerances.get('', 0):g} mm" + (f" ({own})" if own else "")


def _targets(evaluation: Evaluation) -> str:
    if not evaluation.summaries:
        return "No present target was scored."
    head = ["target", "prompt", "n", "K", "Dice", "", "worst", "std", "var", "NSD", "HD95", "failed"]
    rows = [_line(s) for s in evaluation.summaries]
    targets = [s.target for s in evaluation.summaries]
    for i in range(len(rows) - 1, 0, -1):
        if targets[i] == targets[i - 1]:
            rows[i][0] = ""
    single = len({t for t in targets if t}) == 1
    overall = sum(not t for t in targets)
    if single:  # "all" would repeat the only target
        rows = [row for row, target in zip(rows, targets, strict=True) if target]
    maps_only = all(s.kind == "label map" for s in evaluation.summaries)
    if maps_only:  # one request per target: nothing varies
        head, *rows = [[cell for i, cell in enumerate(row) if i not in (1, 3, 6, 7, 8)] for row in [head, *rows]]
    left, gap = (1, 4) if maps_only else (2, 5)
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    out = []
    for number, row in enumerate([head, *rows]):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        out.append(" ".join(cells[:gap]) + " " + "  ".join(cells[gap:]))
        if number == 0:
            out.append("-" * len(out[0]))
        if number == len(rows) - overall and not single and number:
            out.append("")
    if not maps_only:
        out.append("n: cases and targets; K: paraphrases of each; worst, std, var: over paraphrases, then mean over n;")
    out.append(f"HD95 in mm; failed: {'cases' if maps_only else 'requests'} with nothing drawn: Dice 0, NSD 0, HD95 the image's diagonal.")
    return "\n".join(line.rstrip() for line in out)


def _line(summary: Summary) -> list[str]:
    low, high = summary.paraphrases
    interval = summary.dice.interval
    return [
        _cut(summary.target or "all", _TARGET_WIDTH),
        summary.kind.replace(" prompt", "").replace("label map", "map"),
        str(summary.n),
        str(low) if low == high else f"{low}-{high}",
        f"{summary.dice.mean:.3f}",
        f"{interval.lo:.3f}-{interval.hi:.3f}" if interval else "",
        f"{summary.dice.worst:.3f}",
        f"{summary.dice.std:.3f}" if high > 1 else "-",
        f"{summary.dice.variance:.4f}" if high > 1 else "-",
        _number(summary.nsd, 3),
        _number(summary.hd95_mm, 1),
        f"{summary.failures}/{summary.requests}",
    ]


def _number(spread: Spread | None, digits: int) -> str:
    return f"{spread.mean:.{digits}f}" if spread else "-"


def _sentences(evaluation: Evaluation) -> str:
    lines = []
    for cost in evaluation.costs:
        if not cost.target:
            d = cost.difference
            interval = f" [{d.interval.lo:+.3f}, {d.interval.hi:+.3f}]" if d.interval else " (one subject, no interval)"
            lines.append(f"Free text less label prompt: Dice {d.mean:+.3f}{interval} over {count(d.cases, 'case and target pair')}.")
    for summary in evaluation.summaries:
        if not summary.target and summary.kind == "free text":
            if summary.answer_rate is not None:
                lines.append(f"Answered with the target's name: {summary.answer_rate:.1%} of {count(summary.requests, 'request')}.")
            lines.append(
                f"Present but answered as absent: {summary.false_negatives} of {summary.requests} "
                f"({summary.false_negatives / summary.requests:.1%})."
            )
        if not summary.target and summary.lesions:
            found = summary.lesions
            shown = ", ".join(
                f"{n.replace('_', ' ')} {found[n]:.3f}" for n in ("f1", "precision", "recall", "detection_rate") if found[n] is not None
            )
            lines.append(f"Lesions ({summary.kind}): {shown} ({found['reference_lesions']:.0f} in the references).")
    if evaluation.absent:
        a = evaluation.absent
        ml = "" if a.false_ml is None else f", {a.false_ml:.2f} mL on average"
        said = f"; answered as absent: {a.answered_absent}" if any(r.status != "mask" for r in evaluation.rows) else ""
        share = f"{a.false_positives} ({a.false_positives / a.requests:.1%})"
        lines.append(f"Absent targets: {count(a.requests, 'request')}; drawn nevertheless: {share}{ml}{said}.")
    if len(evaluation.languages) > 1:
        shown = ", ".join(f"{g.name} {g.dice:.3f} ({g.requests})" for g in evaluation.languages)
        lines.append(f"Free-text Dice by language split (requests): {shown}.")
    unknown = sum(r.truth == "unknown" for r in evaluation.rows)
    if unknown:
        lines.append(f"{count(unknown, 'row')} without a known truth: in no number above.")
    if evaluation.missing:
        lines.append(f"{len(evaluation.missing)} not predicted and left out (first: {evaluation.missing[0]}).")
    if evaluation.faults:
        lines.append(f"{count(len(evaluation.faults), 'fault')}, left out. First: {evaluation.faults[0]}")
    return _wrapped(lines)


def _groups(title: str, evaluation: Evaluation) -> str:
    groups = evaluation.styles
    width = max(len(title), *(len(g.name) for g in groups))
    lines = [f"{title.ljust(width)}  requests    n   Dice  failed"]
    lines += [f"{g.name.ljust(width)}  {g.requests:8d} {g.n:4d}  {g.dice:.3f}  {g.failures:6d}" for g in groups]
    return "\n".join(lines)


def count(number: int, what: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def _cut(text: str, width: int) -> str:
    """The middle goes: names of structures differ at either end ("left ...", "... of the right lung")."""
    return text if len(text) <= width else text[: (width - 2) // 2] + ".." + text[len(text) - (width - 1) // 2 :]
