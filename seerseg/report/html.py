"""One HTML page that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from seerseg import __version__
from seerseg.errors import NothingToDoError, OutputError
from seerseg.evaluation import Cost, Evaluation, Group, Row, Summary
from seerseg.evaluation.records import KINDS
from seerseg.evaluation.tables import cases_note, count, language_note
from seerseg.metrics import SURFACE_RULE
from seerseg.paths import read_json, write_text
from seerseg.report.plots import pair_order, require_matplotlib, robustness_svg

_THUMBNAIL_PX = 900
_MOST_PICTURES = 24
_WORST_SHOWN = 12
_RUN_SCHEMA = 1

_STYLE = """
:root { --ink: #1d2733; --soft: #5b6775; --line: #dde2e8; --free: #2a6fbb; --label: #d9731a; --bad: #b3261e; --tint: #f5f7fa; }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 32px 28px 64px; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 10px }
p { margin: 6px 0 } .soft { color: var(--soft) } .bad { color: var(--bad) } small { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0 }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; background: var(--tint) }
.card b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums }
.card span { color: var(--soft); font-size: 13px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th { text-align: left; font-weight: 600; border-bottom: 2px solid var(--line); padding: 5px 9px; white-space: nowrap }
td { border-bottom: 1px solid var(--line); padding: 5px 9px; vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap } tr.all td { border-top: 2px solid var(--line); font-weight: 600 }
.mark { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center; font-size: 14px }
.bar { background: #e9edf2; border-radius: 3px; height: 15px }
.bar i { display: block; height: 100%; background: var(--free); border-radius: 3px }
figure { margin: 0 0 22px } figure img { width: 100%; border-radius: 6px; background: #000; display: block }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px }
.shots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 18px }
svg { width: 100%; height: auto } details { margin: 8px 0 } summary { cursor: pointer; color: var(--soft) }
@media print { body { max-width: none } .shots { display: block } figure { break-inside: avoid } }
"""


def write_report(path: Path, evaluation: Evaluation, pictures: Mapping[str, Path] | None = None) -> None:
    """An evaluation as a page: headline numbers, targets, styles, the plot of robustness, the worst cases, overlays.

    pictures: case -> PNG (see `write_overlays`), embedded smaller. MissingExtraError without matplotlib.
    """
    require_matplotlib()
    about = evaluation.about
    where = f"split {about.split}" + (f", fold {about.fold}" if about.fold is not None else "")
    counted = f"{cases_note(evaluation)} &middot; {count(len(evaluation.rows), 'row')}"
    subtitle = f"{where} &middot; {counted}{escape(language_note(evaluation))}"
    parts = [f"<h1>{escape(about.dataset)}</h1>", f'<p class="soft">{subtitle}</p>', _about(evaluation), _cards(evaluation)]
    parts.append(_section("Targets", _targets(evaluation.summaries)))
    plot = robustness_svg(evaluation)
    if plot:
        note = "Each column is a case. The line runs from the mean over its paraphrases down to the worst one."
        parts.append(_section("Robustness to wording", f'<p class="soft">{note}</p>{plot}'))
    for title, groups in (("Style of request", evaluation.styles), ("Language split", evaluation.languages)):
        if groups and (groups is evaluation.styles or len(groups) > 1):
            parts.append(_section(title, _bars(groups)))
    parts.append(_section("Lowest Dice", _worst(evaluation)))
    if pictures:
        note = "Green: reference. Magenta: prediction. Yellow: both. The patient's right is on the left in axial and coronal slices."
        first = [c for c in dict.fromkeys(p.case for p in pair_order(evaluation)) if c in pictures]
        chosen = [*first, *(c for c in pictures if c not in first)][:_MOST_PICTURES]
        if len(chosen) < len(pictures):
            note += f" The {len(chosen)} cases with the lowest Dice, of {len(pictures)}."
        shots = "".join(_figure(pictures[case], case) for case in chosen)
        parts.append(_section("Overlays", f'<p class="soft">{note}</p><div class="shots">{shots}</div>'))
    left_out = [*(f"Not predicted: {m}" for m in evaluation.missing), *evaluation.faults]
    if left_out:
        parts.append(_section(f"Left out ({len(left_out)})", _lines(left_out)))
    parts.append(_section("How it was measured", _method(evaluation)))
    _write(path, f"{about.dataset}: evaluation", parts)


def write_run_report(path: Path, folder: Path) -> None:
    """A folder of seerseg_predict as a page: per case what was asked, answered and drawn, with its pictures.

    NothingToDoError when the folder holds no case file.
    """
    cases = []
    for file in sorted(folder.glob("*.json")):
        value = read_json(file, OutputError)
        if isinstance(value, dict) and value.get("schema") == _RUN_SCHEMA and "requests" in value and "case" in value:
            cases.append(value)
    if not cases:
        raise NothingToDoError(f"{folder} holds no case file of seerseg_predict. Give the folder it wrote (its -o).")
    requests = [r for c in cases for r in c["requests"]]
    counts: dict[str, int] = {}
    for request in requests:
        counts[str(request.get("status"))] = counts.get(str(request.get("status")), 0) + 1
    cards = [("Cases", str(len(cases))), ("Requests", str(len(requests))), *((k.capitalize(), str(n)) for k, n in sorted(counts.items()))]
    model = cases[0].get("model") or {}
    shown = [f"{k} {model[k]}" for k in ("reasoner", "segmenter", "protocol", "bank") if model.get(k)]
    parts = [f"<h1>{escape(folder.resolve().name)}</h1>", f'<p class="soft">{escape(", ".join(shown))}</p>', _card_grid(cards)]
    for case in cases:
        error = f'<p class="bad">{escape(str(case["error"]))}</p>' if case.get("error") else ""
        pictures = [p for p in sorted(folder.glob("*.png")) if p.stem == case["case"] or p.stem.startswith(f"{case['case']}_")]
        shots = "".join(_figure(p, p.name) for p in pictures)
        shots = f'<div class="shots">{shots}</div>' if shots else ""
        parts.append(_section(str(case["case"]), error + _run_table(case["requests"]) + shots))
    _write(path, f"{folder.name}: predictions", parts)


def _about(evaluation: Evaluation) -> str:
    about = evaluation.about
    keys = ("reasoner", "segmenter", "protocol", "plans", "seed")
    shown = [(k, str(about.model[k])) for k in keys if about.model.get(k) is not None]
    if about.model:
        shown.append(("bank", about.bank_mode))
    text = " &middot; ".join(f"{escape(k)} <b>{escape(v)}</b>" for k, v in shown)
    notes = [f"Reference labels: {escape(about.reference_note)}"] if about.reference_note else []
    if about.mixed:
        notes.append("The predictions are of several models; the one named is that of the first case.")
    return f"<p>{text}</p>" + "".join(f"<p class='soft'>{n}</p>" for n in notes)


def _cards(evaluation: Evaluation) -> str:
    cards: list[tuple[str, str]] = []
    for kind in KINDS:
        summary = evaluation.summary(kind)
        if summary:
            cards.append((f"Dice, {kind}{_interval(summary)}", f"{summary.dice.mean:.3f}"))
    free = evaluation.summary("free text")
    if free:
        cards.append(("Worst Dice over paraphrases", f"{free.dice.worst:.3f}"))
        cards.append(("Variance over paraphrases", f"{free.dice.variance:.4f}"))
    cost = next((c for c in evaluation.costs if not c.target), None)
    if cost:
        cards.append((f"Free text less label prompt{_cost_interval(cost)}", f"{cost.difference.mean:+.3f}"))
    failed, total = (sum(getattr(s, n) for s in evaluation.summaries if not s.target) for n in ("failures", "requests"))
    if total:
        cards.append((f"Nothing drawn, of {count(total, 'request')}", str(failed)))
    if evaluation.absent:
        a = evaluation.absent
        cards.append((f"Absent but drawn, of {a.requests}", str(a.false_positives)))
    return _card_grid(cards)


def _card_grid(cards: Iterable[tuple[str, str]]) -> str:
    return '<div class="cards">' + "".join(f'<div class="card"><b>{v}</b><span>{escape(k)}</span></div>' for k, v in cards) + "</div>"


def _interval(summary: Summary) -> str:
    interval = summary.dice.interval
    return f" [{interval.lo:.3f}, {interval.hi:.3f}]" if interval else ""


def _cost_interval(cost: Cost) -> str:
    interval = cost.difference.interval
    return f" [{interval.lo:+.3f}, {interval.hi:+.3f}]" if interval else ""


def _targets(summaries: Sequence[Summary]) -> str:
    if not summaries:
        return "<p>No present target was scored.</p>"
    intervals = any(s.dice.interval for s in summaries)
    head = [
        "Target",
        "Prompt",
        "n",
        "K",
        "Dice",
        *(["interval"] if intervals else []),
        "worst",
        "std",
        "variance",
        "NSD",
        "HD95 mm",
        "failed",
    ]
    several = len({s.target for s in summaries if s.target}) > 1
    body = []
    for s in (s for s in summaries if s.target or several):
        low, high = s.paraphrases
        interval = s.dice.interval
        cells = [
            str(s.n),
            str(low) if low == high else f"{low}&ndash;{high}",
            f"{s.dice.mean:.3f}",
            *([f"{interval.lo:.3f}&ndash;{interval.hi:.3f}" if interval else ""] if intervals else []),
            f"{s.dice.worst:.3f}",
            f"{s.dice.std:.3f}" if high > 1 else "",
            f"{s.dice.variance:.4f}" if high > 1 else "",
            f"{s.nsd.mean:.3f}" if s.nsd else "",
            f"{s.hd95_mm.mean:.1f}" if s.hd95_mm else "",
            f"{s.failures}/{s.requests}",
        ]
        colour = "label" if s.kind == "label prompt" else "free"
        first = f'<td>{escape(s.target or "all")}</td><td><span class="mark" style="background:var(--{colour})"></span>{s.kind}</td>'
        row_class = ' class="all"' if not s.target else ""
        body.append(f"<tr{row_class}>{first}" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>")
    heads = "".join(f"<th>{h}</th>" if i < 2 else f'<th class="n">{h}</th>' for i, h in enumerate(head))
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(body)}</table></div>'


def _bars(groups: Sequence[Group]) -> str:
    rows = []
    for g in sorted(groups, key=lambda g: -g.dice):
        failed = f', <span class="bad">{g.failures} failed</span>' if g.failures else ""
        rows.append(
            f'<span>{escape(g.name.replace("_", " "))}</span><div class="bar"><i style="width:{100 * g.dice:.1f}%"></i></div>'
            f"<span><b>{g.dice:.3f}</b> <small>{count(g.requests, 'request')}{failed}</small></span>"
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _worst(evaluation: Evaluation) -> str:
    rows: dict[tuple[str, str, str], Row] = {}
    for row in sorted(evaluation.rows, key=lambda r: r.scores.dice if r.scores and r.scores.dice is not None else 1.0):
        if row.scores is not None and row.truth == "present":
            rows.setdefault((row.case, row.target, row.kind), row)
    body = []
    for pair in pair_order(evaluation)[:_WORST_SHOWN]:
        row = rows[pair.case, pair.target, pair.kind]
        hd95 = row.scores.hd95_mm if row.scores else None
        said = row.answered or ("absent" if row.status == "absent" else "")
        cells = f"<td>{escape(pair.case)}</td><td>{escape(pair.target)}</td>"
        if pair.kind == "free text":
            cells += f"<td>{escape(row.text)}</td><td>{escape(said)}</td>"
        else:
            cells += "<td></td><td></td>"
        cells += f'<td class="n">{pair.dice.worst:.3f}</td><td class="n">{pair.dice.mean:.3f}</td>'
        body.append(f'<tr>{cells}<td class="n">{"" if hd95 is None else f"{hd95:.1f}"}</td></tr>')
    heads = "<th>Case</th><th>Target</th><th>Worst request</th><th>Answered</th>"
    heads += '<th class="n">its Dice</th><th class="n">mean</th><th class="n">HD95 mm</th>'
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(body)}</table></div>' if body else "<p>Nothing.</p>"


def _run_table(requests: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for r in requests:
        status = str(r.get("status", ""))
        colour = "" if status in ("ok", "absent") else ' class="bad"'
        ml = r.get("volume_ml")
        why = " ".join(str(r.get(k) or "") for k in ("message", "evidence", "rationale")).strip()
        body.append(
            f"<tr><td>{escape(str(r.get('text', '')))}</td><td>{escape(str(r.get('target_answered') or ''))}</td>"
            f"<td{colour}>{escape(status)}</td>"
            f'<td class="n">{"" if not isinstance(ml, int | float) else f"{ml:.2f}"}</td><td><small>{escape(why[:400])}</small></td></tr>'
        )
    heads = '<th>Request</th><th>Answer</th><th>Status</th><th class="n">mL</th><th>Why</th>'
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(body)}</table></div>'


def _method(evaluation: Evaluation) -> str:
    about = evaluation.about
    own = "".join(f", {escape(k)} {v:g} mm" for k, v in about.tolerance_mm.items() if k)
    interval = next((s.dice.interval for s in evaluation.summaries if s.dice.interval), None)
    lines = [
        "Per case and target over its paraphrases: mean, worst, standard deviation and variance (ddof 0); then the mean over cases.",
        "A present target of which nothing was drawn has Dice and NSD 0 and the image's diagonal as HD95. Absent targets are in no mean.",
        f"Surfaces: {escape(SURFACE_RULE)}.",
        f"NSD tolerance: {about.tolerance_mm.get('', 0):g} mm{own}.",
        f"Intervals: {interval.level:.0%}, {interval.resamples} bootstrap resamples of subjects, seed {interval.seed}."
        if interval
        else "No intervals: one subject only.",
        f"Made by SeerSeg {escape(__version__)}. A research tool: not a medical device.",
    ]
    return "".join(f"<p class='soft'>{line}</p>" for line in lines)


def _lines(lines: Sequence[str]) -> str:
    shown = "".join(f"<p>{escape(line)}</p>" for line in lines[:20])
    rest = "".join(f"<p>{escape(line)}</p>" for line in lines[20:])
    return shown + (f"<details><summary>{len(lines) - 20} more</summary>{rest}</details>" if rest else "")


def _figure(file: Path, caption: str) -> str:
    from PIL import Image

    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_THUMBNAIL_PX, 4 * _THUMBNAIL_PX))
        data = io.BytesIO()
        small.save(data, format="JPEG", quality=82)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    name = escape(caption)
    return f'<figure><img alt="{name}" src="data:image/jpeg;base64,{text}"><figcaption>{name}</figcaption></figure>'


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _write(path: Path, title: str, parts: Sequence[str]) -> None:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n")
