"""Plots by matplotlib (the extra 'report'), imported when one is drawn."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seerseg.errors import MissingExtraError, NothingToDoError, SeerSegError
from seerseg.evaluation import CaseTarget, Evaluation
from seerseg.paths import write_atomically

FREE_COLOUR = "#2a6fbb"
LABEL_COLOUR = "#d9731a"
_FEW_CASES, _MOST_NAMED = 4, 30
_AXES = ("step", "epoch", "time", "seconds", "minutes")
_FIRST = ("loss", "dice", "reward", "exact", "kl", "zero_spread", "faults", "accuracy", "length", "cache", "seconds", "entropy", "tokens")
"""The order of the plots of a training: words in their names."""
_MANY_POINTS = 30


def require_matplotlib() -> Any:
    """matplotlib with a backend that needs no screen; MissingExtraError when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib. Install it with: pip install 'seerseg[report]'") from error
    matplotlib.use("Agg")
    return matplotlib


def robustness_svg(evaluation: Evaluation, *, most_targets: int = 8) -> str:
    """One panel per target as an SVG element: cases in the order of their mean free-text Dice, a line from the mean down to
    the worst paraphrase, a tick where the label prompt is. "" when there is no free text with a present target."""
    by_target: dict[str, list[CaseTarget]] = defaultdict(list)
    label = {}
    for pair in evaluation.case_targets:
        if pair.kind == "free text":
            by_target[pair.target].append(pair)
        elif pair.kind == "label prompt":
            label[pair.case, pair.target] = pair.dice.mean
    if not by_target:
        return ""
    require_matplotlib()
    from matplotlib.figure import Figure

    # With few cases a panel per target would be empty: then all (case, target) pairs share one.
    few = max(len(pairs) for pairs in by_target.values()) < _FEW_CASES
    panels = {"": [p for pairs in by_target.values() for p in pairs]} if few else dict(sorted(by_target.items())[:most_targets])
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9.8, 3.4 if few else 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    for ax, (target, pairs) in zip(axes.flat, panels.items(), strict=False):
        ax.set_title(target, fontsize=9, loc="left")
        _panel(ax, sorted(pairs, key=lambda p: (p.dice.mean, p.case)), label, named=few and len(pairs) <= _MOST_NAMED)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _panel(ax: Any, pairs: Sequence[CaseTarget], label: Mapping[tuple[str, str], float], *, named: bool) -> None:
    places = list(range(len(pairs)))
    size = max(2.0, min(6.0, 160 / len(pairs)))
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(-0.7, len(pairs) - 0.3)
    ax.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.set_ylabel("Dice", fontsize=8)
    if named:
        one_case = len({p.case for p in pairs}) == 1
        names = [p.target if one_case else f"{p.target}, {p.case}" for p in pairs]
        ax.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(pairs)} cases, by mean Dice", fontsize=8)
    worst, mean = [p.dice.worst for p in pairs], [p.dice.mean for p in pairs]
    ax.vlines(places, worst, mean, color=FREE_COLOUR, alpha=0.45, linewidth=size / 2.5)
    ax.plot(places, worst, "_", color=FREE_COLOUR, markersize=size * 1.4, label="free text: worst")
    ax.plot(places, mean, "o", color=FREE_COLOUR, markersize=size, label="free text: mean")
    known = [(i, label[p.case, p.target]) for i, p in enumerate(pairs) if (p.case, p.target) in label]
    if known:
        ax.plot(*zip(*known, strict=True), "D", color=LABEL_COLOUR, markersize=size * 0.7, label="label prompt", zorder=1.5)


def plot_progress(log: Path, picture: Path) -> None:
    """Draw a training log (JSONL, one object of numbers per line) as small plots over its steps, what matters most first.

    The x axis is the first of "step", "epoch", "time", "seconds" that the lines have, else the line number. "train_loss" and
    "val_loss" share a plot, as do all quantities that differ only in such a first word, and mean, worst and spread of one score, and
    the seconds of the parts of a step. What is logged often is drawn thinly, with its running mean over it. Lines that are no JSON
    objects (the one being written) are passed over. NothingToDoError when no number is found.
    """
    curves, axis = read_log(log)
    require_matplotlib()
    from matplotlib.figure import Figure

    plots: dict[str, dict[str, tuple[list[float], list[float]]]] = defaultdict(dict)
    for name, curve in curves.items():
        plots[_family(name)][name] = curve
    ordered = sorted(plots.items(), key=lambda item: next((i for i, word in enumerate(_FIRST) if word in item[0]), len(_FIRST)))
    columns = min(3, len(plots))
    rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for spare in axes.flat[len(plots) :]:
        spare.set_visible(False)
    for ax, (title, lines) in zip(axes.flat, ordered, strict=False):
        _progress_panel(ax, title, lines, axis)
    write_atomically(picture, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _family(name: str) -> str:
    """The plot that a quantity goes to."""
    words = name.replace("/", "_").split("_")
    rest = words[1:] if words[0] in ("train", "val", "eval", "bank") and len(words) > 1 else words
    if words[0] in ("seconds", "reward", "rewards"):
        return words[0].removesuffix("s") if words[0] != "seconds" else "seconds of a step"
    if len(rest) > 1 and rest[-1] in ("mean", "worst", "std") and rest[0] != "completions":
        return "_".join(rest[:-1])
    return "_".join(rest)


def _progress_panel(ax: Any, title: str, lines: Mapping[str, tuple[list[float], list[float]]], axis: str) -> None:
    for number, (name, (x, y)) in enumerate(lines.items()):
        colour = f"C{number % 10}"
        many = len(x) > _MANY_POINTS and name != "learning_rate"
        if many:
            ax.plot(x, y, "-", color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(
            x,
            _running_mean(y) if many else y,
            "o-" if len(x) <= _MANY_POINTS else "-",
            color=colour,
            markersize=3,
            linewidth=1.4,
            label=name,
        )
    ax.set_title(title if len(lines) > 1 else next(iter(lines)), fontsize=9, loc="left")
    ax.yaxis.get_offset_text().set_fontsize(7)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.set_xlabel(axis, fontsize=8)
    ax.grid(color="#e4e7eb", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    if len(lines) > 1:
        ax.legend(fontsize=7, frameon=False)


def _running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential mean of what came so far, without a bias to zero at the start."""
    out, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(total / mass)
    return out


def read_log(log: Path) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """Quantity -> (x values, y values) of a JSONL log, and what x is."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SeerSegError(f"Cannot read the training log {log}: {error.strerror}.") from error
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(value)
    axis = next((a for a in _AXES if any(_is_number(r.get(a)) for r in records)), "line")
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for number, record in enumerate(records):
        x = record.get(axis) if axis != "line" else number
        if _is_number(x):
            for name, y in record.items():
                if name not in _AXES and _is_number(y):
                    xs, ys = curves.setdefault(str(name), ([], []))
                    xs.append(float(x))  # type: ignore[arg-type]
                    ys.append(float(y))
    if not curves:
        raise NothingToDoError(f"{log} holds no numbers to draw.")
    return curves, axis


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def pair_order(evaluation: Evaluation) -> Sequence[CaseTarget]:
    """Free-text pairs, worst mean Dice first."""
    return sorted((p for p in evaluation.case_targets if p.kind != "label prompt"), key=lambda p: (p.dice.mean, p.case, p.target))
