"""The card of a dataset's requests: counts, lengths, overlap between the languages of the splits, examples, a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from seerseg.paths import write_atomically, write_json, write_text
from seerseg.vocabulary import fold, words
from seerseg_data.requests.files import CARD_JSON, Written, digest
from seerseg_data.requests.generate import Made
from seerseg_data.requests.styles import SPLITS, STYLES
from seerseg_data.requests.wording import FAMILIES

CARD_MD = "requests_card.md"
CARD_PNG = "requests_card.png"
SCHEMA = 1
_EXAMPLES = 2


def write_card(written: Written, *, made_by: str, rewriting: dict[str, Any] | None = None, figure: bool = True) -> dict[str, Any]:
    """requests_card.json, .md and (with matplotlib, extra `report`) .png beside the request file; the JSON is returned.

    rewriting: what a writer model did, for the record.
    """
    card = describe(written, made_by=made_by, rewriting=rewriting)
    folder = written.path.parent
    write_text(folder / CARD_MD, _markdown(card, with_figure=figure and _draw(card, folder / CARD_PNG)))
    write_json(folder / CARD_JSON, card)
    return card


def describe(written: Written, *, made_by: str, rewriting: dict[str, Any] | None = None) -> dict[str, Any]:
    """The card as JSON-ready values."""
    report = written.report
    made = report.made
    texts = [m.request.text for m in made]
    sets = Counter((m.request.case, m.name, m.request.language_split) for m in made if not m.request.absent)
    return {
        "schema": SCHEMA,
        "dataset": written.path.parent.resolve().name,
        "made_by": made_by,
        "requests_digest": digest(written.path),
        "seed": report.seed,
        "settings": {
            "per_target": report.settings.per_target,
            "styles": list(report.settings.styles),
            "absent_per_case": report.settings.absent_per_case,
            "unions": report.settings.unions,
            "folds": list(report.settings.folds),
            "language": report.settings.language,
        },
        "context": {
            "modality": report.context.modality,
            "region": report.context.region,
            "names": list(report.context.names),
            "unsided": report.context.unsided,
        },
        "counts": {
            "requests": len(made),
            "cases": len({m.request.case for m in made}),
            "paraphrase_sets": len(sets),
            "per_set": [min(sets.values(), default=0), max(sets.values(), default=0)],
            "absent": sum(m.request.absent for m in made),
            "by_language": _counted(m.request.language_split for m in made),
            "cases_by_language": _counted(s for _, s in {(m.request.case, m.request.language_split) for m in made}),
            "by_style": _counted(m.request.style for m in made),
            "by_target": _counted("(absent)" if m.request.absent else m.name for m in made),
            "with_slips": sum(bool(m.wording.slips) for m in made),
        },
        "length": {"characters": _spread([len(t) for t in texts]), "words": _spread([len(t.split()) for t in texts])},
        "overlap": {f"train_{split}": overlap(made, "train", split) for split in ("val", "test")},
        "replaced": dict(report.replaced),
        "faults": dict(report.faults),
        "notes": list(report.notes),
        "rewriting": rewriting,
        "examples": _examples(made),
    }


def overlap(made: Sequence[Made], one: str, other: str) -> dict[str, Any]:
    """What the language of two splits shares. Templates, forms and slips are counted exactly and must not be shared (a canonical
    name may be said in any language and is no form here); words and letter trigrams are shared by any two texts of one language and
    are reported: `of_other`, the share of the other's that the first has too, and Jaccard."""
    first, second = ([m for m in made if m.wording.split == split] for split in (one, other))
    out: dict[str, Any] = {"requests": [len(first), len(second)]}
    for name, listed in (
        ("templates", (templates_of(first), templates_of(second))),
        ("forms", (forms_of(first), forms_of(second))),
        ("slip_kinds", (slips_of(first), slips_of(second))),
        ("texts", tuple({fold(m.request.text) for m in part if m.wording.style != "label_prompt"} for part in (first, second))),
    ):
        out[name] = {"counts": [len(listed[0]), len(listed[1])], "shared": sorted(listed[0] & listed[1])[:20]}
        out[name]["shared_count"] = len(listed[0] & listed[1])
    for name, pick in (("words", words), ("trigrams", _trigrams)):
        a, b = ({piece for m in part if m.wording.style != "label_prompt" for piece in pick(m.request.text)} for part in (first, second))
        shared = len(a & b)
        out[name] = {
            "counts": [len(a), len(b)],
            "of_other": round(shared / len(b), 4) if b else None,
            "jaccard": round(shared / len(a | b), 4) if a | b else None,
        }
    return out


def templates_of(made: Iterable[Made]) -> set[str]:
    """The sentences and phrases used, by their text where it is a sentence."""
    used: set[str] = set()
    for one in made:
        for part in filter(None, one.wording.template.split("+")):
            family, split, number = part.split("/")
            used.add(FAMILIES[family][split][int(number)] if family in FAMILIES else part)
    return used


def forms_of(made: Iterable[Made]) -> set[str]:
    """ "target: surface" for every surface that is not the canonical name."""
    return {f"{m.name}: {m.wording.surface}" for m in made if fold(m.wording.surface) != fold(m.name)}


def slips_of(made: Iterable[Made]) -> set[str]:
    """The kinds of slips, those of sides and of heard words with what became of them."""
    out: set[str] = set()
    for one in made:
        for slip in one.wording.slips:
            kind, _, detail = slip.partition(":")
            out.add(slip if kind == "side" else f"{kind}:{detail.split('>')[-1]}" if kind.startswith("heard") else kind)
    return out


def _trigrams(text: str) -> set[str]:
    folded = f" {' '.join(words(text))} "
    return {folded[i : i + 3] for i in range(len(folded) - 2)}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    ordered = sorted(numbers)
    if not ordered:
        return {}
    return {
        "min": ordered[0],
        "median": ordered[len(ordered) // 2],
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "max": ordered[-1],
        "mean": round(sum(ordered) / len(ordered), 1),
    }


def _examples(made: Sequence[Made]) -> dict[str, dict[str, list[list[str]]]]:
    out: dict[str, dict[str, list[list[str]]]] = {}
    for one in made:
        listed = out.setdefault(one.request.style, {}).setdefault(one.wording.split, [])
        if len(listed) < _EXAMPLES and all(one.request.text != text for text, _ in listed):
            listed.append([one.request.text, f"{one.name} (absent)" if one.request.absent else one.name])
    return {style: out[style] for style in STYLES if style in out}


def _markdown(card: dict[str, Any], *, with_figure: bool) -> str:
    counts, settings = card["counts"], card["settings"]
    low, high = counts["per_set"]
    lines = [
        f"# Requests of {card['dataset']}",
        "",
        f"{counts['requests']} requests for {counts['cases']} cases, made by {card['made_by']} with seed {card['seed']}: "
        f"{counts['paraphrase_sets']} paraphrase sets of {low if low == high else f'{low} to {high}'} wordings, "
        f"{counts['absent']} requests for what is not in the scan. {counts['with_slips']} have slips.",
        "",
        f"Modality {card['context']['modality'] or 'unknown'}, region {card['context']['region'] or 'unknown'}; "
        f"{'no side is ever said' if card['context']['unsided'] else 'sides are said'}. "
        f"Validation language for the validation cases of fold {', '.join(map(str, settings['folds']))}"
        + (f"; but all cases were asked in {settings['language']} language." if settings["language"] else "."),
        "",
    ]
    lines += ["![counts](requests_card.png)", ""] if with_figure else []
    for title, key in (("language", "by_language"), ("style", "by_style"), ("target", "by_target")):
        lines += [f"| {title} | requests |", "| --- | ---: |", *(f"| {name} | {n} |" for name, n in counts[key].items()), ""]
    spread = card["length"]
    lines += ["| length | min | median | p95 | max | mean |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | " + " | ".join(f"{v:g}" for v in values.values()) + " |" for name, values in spread.items() if values]
    lines += ["", "## Overlap between the languages", ""]
    lines += ["| of train and | templates | forms | slip kinds | whole texts | its words known to train | trigrams known to train |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for split in ("val", "test"):
        found = card["overlap"][f"train_{split}"]
        shared = [f"{found[k]['shared_count']} of {found[k]['counts'][1]}" for k in ("templates", "forms", "slip_kinds", "texts")]
        shares = ["-" if found[k]["of_other"] is None else f"{100 * found[k]['of_other']:.1f} %" for k in ("words", "trigrams")]
        lines.append(f"| {split} | " + " | ".join((*shared, *shares)) + " |")
    lines += ["", "Templates, forms and slip kinds must share nothing; canonical names may be said in every language.", ""]
    if card["rewriting"]:
        told = card["rewriting"]
        lines += [f"Rewritten by {told['writer']}: {told['kept']} kept, {told['refused']} refused.", ""]
    lines += ["## Examples", ""]
    for style, by_split in card["examples"].items():
        lines += [f"**{style}** ({STYLES[style].about})", ""]
        lines += [f"- {split}: {_quoted(text)} → {name}" for split in SPLITS for text, name in by_split.get(split, ())]
        lines.append("")
    for note in (*card["notes"], *card["faults"].values()):
        lines.append(f"- {note}")
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> str:
    return "“" + text.replace("*", "\\*").replace("|", "\\|").replace("<", "&lt;") + "”"


def _draw(card: dict[str, Any], path: Path) -> bool:
    """Requests by style and language as stacked bars, and lengths; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    counts = card["counts"]["by_style"]
    names = list(counts)[::-1]
    figure = Figure(figsize=(9, 0.32 * len(names) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.barh(names, [counts[n] for n in names], color="#3b6ea5")
    left.set_title("Requests by style", fontsize=10)
    found = card["overlap"]["train_test"]
    shares = {"templates": 0.0, "forms": 0.0, "slip kinds": 0.0, "texts": 0.0}
    for name in shares:
        part = found[name.replace(" ", "_")]
        shares[name] = part["shared_count"] / part["counts"][1] if part["counts"][1] else 0.0
    shares |= {name: found[name]["of_other"] or 0.0 for name in ("words", "trigrams")}
    right.barh(list(shares)[::-1], [100 * v for v in list(shares.values())[::-1]], color="#a5563b")
    right.set_xlim(0, 100)
    right.set_title("Test language known to training (%)", fontsize=10)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    return True
