"""Are traces what they should be: do they parse under every protocol, and do their answers, executed, give the target?"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import RawDataset
from seerseg.errors import DatasetError
from seerseg.prompts import Prompt
from seerseg.protocols import BUILT_IN, load_protocol
from seerseg.protocols.base import ABSENT, Answer, Protocol
from seerseg.protocols.traces import TraceRow
from seerseg.segmenters.base import Segmenter
from seerseg.store import open_case
from seerseg.views import PLANES, CaseViews, Plane, View, ViewSpec, pixel_map, slice_indices
from seerseg.volume import Grid
from seerseg_data.traces import Named, name_labels

Bool = NDArray[np.bool_]
_SHOWN = 3


@dataclass(frozen=True)
class ParseCheck:
    """Traces under one protocol: read back as they should of those that it has a reply for; without: lacking what it needs (a
    trajectory); faults: the first few sentences."""

    protocol: str
    rows: int
    parsed: int
    without: int
    faults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        checked = self.rows - self.without
        share = round(self.parsed / checked, 6) if checked else None
        return {"rows": self.rows, "parsed": self.parsed, "without": self.without, "share": share, "faults": list(self.faults)}


@dataclass(frozen=True)
class ExecutionCheck:
    """Answers of a sample executed again. label: mean Dice of the label prompt where the segmenter takes words, else None; answers: mean
    Dice by protocol; refused: prompts that the segmenter did not take; cases, answered: how many cases and masks."""

    segmenter: str
    cases: int
    rows: int
    drawn: int
    label: float | None
    answers: Mapping[str, float]
    refused: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the difference of each protocol's Dice to the label prompt's."""
        gap = {} if self.label is None else {name: round(value - self.label, 6) for name, value in self.answers.items()}
        return {
            "segmenter": self.segmenter,
            "cases": self.cases,
            "rows": self.rows,
            "drawn": self.drawn,
            "label_prompt_dice": None if self.label is None else round(self.label, 6),
            "answers_dice": {name: round(value, 6) for name, value in self.answers.items()},
            "difference": gap,
            "refused": dict(self.refused),
        }


def known_protocols() -> list[str]:
    """Names of all protocols that are there."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group="seerseg.protocols"))})


def blank_views(grid: Grid, spec: ViewSpec, modality: str | None = None) -> CaseViews:
    """The views of a case with their true geometry and no picture: enough to read and write replies."""
    flat = [axis for axis, n in enumerate(grid.shape_zyx) if n == 1]
    if len(flat) == 1:
        spec = replace(spec, plane=PLANES[flat[0]], also=())
    black = np.broadcast_to(np.zeros((), np.uint8), (spec.size_px, spec.size_px, 3))

    def plane_views(plane: Plane) -> list[View]:
        axis = PLANES.index(plane)
        indices = slice_indices(spec.count, grid.shape_zyx[axis], spec.lo, spec.hi)
        return [View(black, plane, pixel_map(grid, axis, index, spec.size_px)) for index in indices]

    others = tuple(view for plane in spec.also for view in plane_views(plane))
    return CaseViews(tuple(plane_views(spec.plane)), grid, spec, modality, others)


def check_parsing(rows: Sequence[TraceRow], folder: Path, spec: ViewSpec, protocols: Sequence[str] | None = None) -> list[ParseCheck]:
    """Every row through every protocol: its replies are read back as answers, the right name or "absent" where they name one, and are
    perfectly formed. folder: the dataset's preprocessed one; no picture is decoded."""
    names = known_protocols() if protocols is None else list(protocols)
    loaded = {name: load_protocol(name) for name in names}
    parsed, without = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    faults: dict[str, list[str]] = {name: [] for name in names}
    for case, of_case in _by_case(rows).items():
        stored = open_case(folder, case)
        for name, protocol in loaded.items():
            views = blank_views(stored.grid, _spec_for(protocol, spec), stored.modality())
            for row in of_case:
                fault = _read_back(row, protocol, views)
                parsed[name] += fault == ""
                without[name] += fault is None
                if fault and len(faults[name]) < _SHOWN:
                    faults[name].append(f"{row.id}: {fault}")
    return [ParseCheck(name, len(rows), parsed[name], without[name], tuple(faults[name])) for name in names]


def check_execution(
    rows: Sequence[TraceRow],
    dataset: RawDataset,
    folder: Path,
    spec: ViewSpec,
    segmenter: Segmenter,
    *,
    most: int | None,
    channel: int = 0,
    seed: int = 0,
) -> ExecutionCheck:
    """Execute the answers of a sample of the rows whose target is there (most; None: all of them), under every protocol of one turn
    whose prompts the segmenter takes, and the label prompt beside them. Equal prompts on a case are drawn once."""
    present = [row for row in rows if row.target is not None and row.trace.answer != ABSENT]
    if most is not None and most < len(present):
        present = [present[i] for i in sorted(random.Random(seed).sample(range(len(present)), most))]
    named, able = name_labels(dataset), frozenset(segmenter.capabilities.kinds)
    loaded = {name: load_protocol(name) for name in known_protocols()}
    used = {name: p for name, p in loaded.items() if p.max_turns == 1 and p.prompt_kinds <= able}
    scores: dict[str, list[float]] = {name: [] for name in used}
    labels: list[float] = []
    refused: dict[str, int] = {}
    drawn = 0
    grouped = _by_case(present)
    for case, of_case in grouped.items():
        asked = _asked(of_case, case, folder, spec, used, named if "text" in able else None, dataset)
        masks, fresh = _draw(case, folder, channel, segmenter, [prompt for _, _, prompt in asked])
        drawn += fresh
        for row, name, prompt in asked:
            dice = masks(prompt, row, named)
            if dice is None:
                refused[name] = refused.get(name, 0) + 1
            else:
                (labels if name == "" else scores[name]).append(dice)
    means = {name: float(np.mean(found)) for name, found in scores.items() if found}
    if "" in refused:
        refused["label_prompt"] = refused.pop("")
    mean = float(np.mean(labels)) if labels else None
    return ExecutionCheck(segmenter.card.name, len(grouped), len(present), drawn, mean, means, refused)


def _asked(
    rows: Sequence[TraceRow],
    case: str,
    folder: Path,
    spec: ViewSpec,
    used: Mapping[str, Protocol],
    named: Named | None,
    dataset: RawDataset,
) -> list[tuple[TraceRow, str, Prompt]]:
    """(row, protocol or "" for the label prompt, prompt)."""
    stored = open_case(folder, case)
    asked: list[tuple[TraceRow, str, Prompt]] = []
    for name, protocol in used.items():
        views = blank_views(stored.grid, _spec_for(protocol, spec), stored.modality())
        for row in rows:
            read = protocol.read(protocol.targets(row.trace, views)[0], views)
            if isinstance(read, Answer) and read.prompt is not None:
                asked.append((row, name, read.prompt))
    for row in rows if named is not None else ():
        target = row.target or ()
        text = dataset.canonical(target[0]) if len(target) == 1 else named.answer(target) if named is not None else ""
        asked.append((row, "", Prompt(text=text)))
    return asked


def _draw(case: str, folder: Path, channel: int, segmenter: Segmenter, prompts: Sequence[Prompt]) -> tuple[Any, int]:
    """A function (prompt, row, names) -> Dice, None when the segmenter did not take the prompt; and how many masks were drawn."""
    stored = open_case(folder, case)
    volume, label = stored.volume(channel), stored.labels()
    if label is None:
        raise DatasetError(f"Case {case} was preprocessed without a label, so its answers cannot be checked.")
    distinct = {prompt.key: prompt for prompt in prompts}
    found = {key: made.mask for key, made in zip(distinct, segmenter.segment(volume, list(distinct.values())), strict=True)}
    targets: dict[tuple[str, ...], Bool] = {}
    scores: dict[tuple[str, tuple[str, ...]], float] = {}

    def dice(prompt: Prompt, row: TraceRow, named: Named) -> float | None:
        mask, target = found[prompt.key], row.target or ()
        if mask is None:
            return None
        if target not in targets:
            targets[target] = np.isin(label[0], [v for name in target for v in named.values[name]])
        key = (prompt.key, target)
        if key not in scores:
            both = int(np.count_nonzero(mask.array)) + int(np.count_nonzero(targets[target]))
            scores[key] = 2 * int(np.count_nonzero(mask.array & targets[target])) / both if both else 1.0
        return scores[key]

    return dice, len(distinct)


def _spec_for(protocol: Protocol, spec: ViewSpec) -> ViewSpec:
    """The plan's views, with the further planes that the protocol shows."""
    return replace(spec, also=tuple(plane for plane in protocol.view_spec.also if plane != spec.plane))


def _read_back(row: TraceRow, protocol: Protocol, views: CaseViews) -> str | None:
    """ "" when every reply of the row reads back; None when the trace lacks what the protocol needs; else what is wrong."""
    trace = row.trace
    try:
        replies = protocol.targets(trace, views)
    except DatasetError as error:
        return None if protocol.max_turns > 1 and not trace.turns and trace.answer != ABSENT else str(error)
    for number, reply in enumerate(replies):
        read = protocol.read(reply, views)
        if not isinstance(read, Answer):
            return read.reason
        score = protocol.wellformed(reply)
        if score < 1.0:
            return f"turn {number + 1} is well formed to {score:.2f}"
        if trace.answer == ABSENT and read.prompt is not None:
            return "it should answer that the target is absent"
        if trace.answer != ABSENT and read.absent:
            return "it answers that the target is absent"
        if trace.answer != ABSENT and read.target is not None and read.target.casefold() != trace.answer.casefold():
            return f"it answers {read.target!r}"
    return ""


def _by_case(rows: Sequence[TraceRow]) -> dict[str, list[TraceRow]]:
    found: dict[str, list[TraceRow]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found
