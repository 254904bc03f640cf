#!/usr/bin/env python
"""All protocols on the same cases, requests and segmenter: what each costs and what it gives.

    python scripts/bench_protocols.py --raw RAW/mr_hippocampus [--cases test] [--language test] [--limit 6] [--wordings 4] [--rows ...]

Who speaks is part of a row's name. `nano` and `lexicon` are reasoners that read the request. `expert` is a script that knows the target: a
ceiling for what a trained reasoner of that protocol could get from this segmenter, not a result of one. The expert's boxes are those of the
target's largest slice, its edges jittered by 4 % of their side, drawn anew for every wording; its name is always right; as agent it is the
simulated expert of seerseg_data.trajectories. The shipped nano reasoner was trained on the protocol seer alone, so it speaks no other here.

Per (case, target): mean, worst and std (ddof 0) over wordings; then the mean over cases, its 95 % interval by subject. Tokens are those of
the replies, by the nano reasoner's tokeniser; seconds are of CPU, one thread, for all requests of a case.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from seerseg.dataset import open_dataset
from seerseg.episode import Episode, Targets, solve
from seerseg.metrics import bootstrap_interval, dice, over_paraphrases
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols import load_protocol
from seerseg.protocols.base import KeySlice, Trace
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmentation, Segmenter, Session
from seerseg.views import CaseViews, render
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Volume, read_labels, read_volume
from seerseg_data.evidence import survey
from seerseg_data.requests import Context, paraphrase_set
from seerseg_data.traces import key_slices
from seerseg_data.trajectories import Expert, demonstrate

SPLIT = Path(__file__).resolve().parents[1] / "seerseg_data" / "splits" / "hippocampus.json"
NAMES = ("anterior hippocampus", "posterior hippocampus")
JITTER = 0.04
ROWS = {
    "SEER, nano": ("seer", "nano"),
    "SEER, lexicon": ("seer", "lexicon"),
    "SEER, expert (the name)": ("seer", "expert"),
    "MedVol-R1, expert (slice and boxes)": ("medvol-r1", "expert"),
    "MedReasoner, expert (box and two points)": ("medreasoner", "expert"),
    "MedSAM-Agent, expert (box and clicks)": ("medsam-agent", "expert"),
    "combined, expert (name and box)": ("seerseg", "expert"),
}


class Counted:
    """A segmenter that counts the prompts it answers."""

    def __init__(self, inner: Segmenter) -> None:
        self.inner, self.calls = inner, 0
        self.capabilities, self.card = inner.capabilities, inner.card

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        self.calls += len(prompts)
        return self.inner.segment(volume, prompts)

    def session(self, volume: Volume) -> Session:
        return _CountedSession(self, self.inner.session(volume))


class _CountedSession:
    def __init__(self, owner: Counted, inner: Session) -> None:
        self._owner, self._inner = owner, inner

    def add(self, prompt: Prompt) -> Segmentation:
        self._owner.calls += 1
        return self._inner.add(prompt)

    def undo(self) -> Segmentation | None:
        return self._inner.undo()

    def close(self) -> None:
        self._inner.close()


@dataclass
class Row:
    """What one way came to."""

    scores: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Case:
    """One case as all ways get it."""

    name: str
    volume: Volume
    truth: dict[str, NDArray[np.bool_]]
    labels: NDArray[Any]
    wordings: dict[str, list[str]]


def jittered(slices: Sequence[KeySlice], rng: np.random.Generator) -> tuple[KeySlice, ...]:
    """The same slices with every box's edges moved a little."""
    out = []
    for one in slices:
        boxes = []
        for box in one.boxes:
            size = np.array(box.hi) - np.array(box.lo)
            low = np.maximum(np.array(box.lo) + rng.normal(0, JITTER, 2) * size, 0)
            high = np.maximum(np.array(box.hi) + rng.normal(0, JITTER, 2) * size, low + 1)
            boxes.append(Box2D(box.axis, box.index, (float(low[0]), float(low[1])), (float(high[0]), float(high[1]))))
        out.append(replace(one, boxes=tuple(boxes)))
    return tuple(out)


def experts_replies(protocol: Any, views: CaseViews, case: Case, target: str, wording: int, segmenter: Segmenter) -> tuple[str, ...]:
    """What the expert says for one wording."""
    rng = np.random.default_rng([wording, *target.encode(), *case.name.encode()])
    scene = survey(case.volume, case.labels, {name: (k + 1,) for k, name in enumerate(NAMES)}, spec=views.spec, sided=False)
    slices = jittered(key_slices(scene, (NAMES.index(target) + 1,)), rng)
    trace = Trace("The structure is in sight.", "The request names it.", target, slices=slices)
    if protocol.name == "medsam-agent":
        shown = demonstrate(
            case.volume, case.truth[target], segmenter, axis=views.spec.axis, indices=scene.shown, rng=rng, expert=Expert(imperfect=0.0)
        )
        trace = replace(trace, turns=shown.turns)
    replies: tuple[str, ...] = protocol.targets(trace, views)
    return replies


def ask(
    way: tuple[str, str], case: Case, row: Row, reasoners: Callable[[str], Any], segmenter: Segmenter, count: Callable[[str], int]
) -> None:
    """All requests of one case, one way."""
    protocol = load_protocol(way[0])
    views = render(case.volume, protocol.view_spec)
    targets = Targets(NAMES, closed=True)
    asked = [(target, wording, text) for target in NAMES for wording, text in enumerate(case.wordings[target])]
    counted = Counted(segmenter)
    episodes: list[Episode] = []
    if way[1] == "expert":
        scripts = [experts_replies(protocol, views, case, target, wording, segmenter) for target, wording, _ in asked]
        started = time.process_time()
        for (_, _, text), replies in zip(asked, scripts, strict=True):
            speaker = ScriptedReasoner(list(replies))
            episodes += solve(views, case.volume, [text], protocol=protocol, reasoner=speaker, segmenter=counted, targets=targets)
    else:
        reasoner = reasoners(way[1])
        started = time.process_time()
        texts = [text for _, _, text in asked]
        episodes = solve(views, case.volume, texts, protocol=protocol, reasoner=reasoner, segmenter=counted, targets=targets)
    row.seconds += time.process_time() - started
    row.calls += counted.calls
    for (target, _, _), episode in zip(asked, episodes, strict=True):
        truth = case.truth[target]
        row.scores[case.name, target].append(dice(episode.mask.array, truth) or 0.0 if episode.mask is not None else 0.0)
        row.turns.append(len(episode.replies))
        row.tokens.append(sum(count(reply) for reply in episode.replies))


def read_case(dataset: Any, name: str, language: str, wordings: int, vocabulary: Vocabulary) -> Case:
    """Scan, targets and requests."""
    files = dataset.cases[name]
    volume = read_volume(files.images[0], modality="MR")
    labels, _ = read_labels(files.label, like=volume.grid)
    context = Context(modality="MR", region="head", names=NAMES, unsided=True)
    texts = {
        target: [
            made.text
            for made in paraphrase_set(target, split=language, count=wordings, seed=f"bench|{name}", vocabulary=vocabulary, context=context)
        ]
        for target in NAMES
    }
    return Case(name, volume, {target: labels == k + 1 for k, target in enumerate(NAMES)}, labels, texts)


def report(rows: dict[str, Row], dataset: Any, cases: int) -> None:
    """The table."""
    heads = ("protocol, who speaks", "mean (95 % by subject)", "worst", "std", "turns", "tokens", "segmenter calls a case", "CPU s a case")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, row in rows.items():
        spreads = {key: over_paraphrases(values) for key, values in row.scores.items()}
        by_subject: dict[str, list[float]] = defaultdict(list)
        for (case, _), spread in spreads.items():
            by_subject[dataset.subject_of[case]].append(spread.mean)
        interval = bootstrap_interval(by_subject)
        mean = f"{np.mean([s.mean for s in spreads.values()]):.3f}" + (f" ({interval.lo:.3f} to {interval.hi:.3f})" if interval else "")
        worst, std = np.mean([s.worst for s in spreads.values()]), np.mean([s.std for s in spreads.values()])
        print(
            f"| {name} | {mean} | {worst:.3f} | {std:.3f} | {np.mean(row.turns):.1f} | {np.mean(row.tokens):.0f} | "
            f"{row.calls / cases:.1f} | {row.seconds / cases:.1f} |"
        )


def main() -> None:
    """Every way on every case, then one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="the hippocampus dataset folder")
    parser.add_argument("--cases", default="test", choices=("val", "test"))
    parser.add_argument("--language", default="test", choices=("train", "val", "test"))
    parser.add_argument("--limit", type=int, default=None, help="only so many cases")
    parser.add_argument("--wordings", type=int, default=4, help="per case and target")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--segmenter", default="nano")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, vocabulary = open_dataset(options.raw), Vocabulary.load()
    splits = json.loads(SPLIT.read_text(encoding="utf-8"))
    cases = (splits["test"] if options.cases == "test" else splits["folds"][0]["val"])[: options.limit]
    segmenter = load_segmenter(options.segmenter)
    held: dict[str, Any] = {"nano": load_reasoner("nano")}

    def reasoners(name: str) -> Any:
        if name not in held:
            held[name] = load_reasoner(name, splits=["train"]) if name == "lexicon" else load_reasoner(name)
        return held[name]

    def count(reply: str) -> int:
        return len(held["nano"].encode_reply(reply))

    rows = {name: Row() for name in options.rows}
    for number, name in enumerate(cases):
        case = read_case(dataset, name, options.language, options.wordings, vocabulary)
        for title in options.rows:
            ask(ROWS[title], case, rows[title], reasoners, segmenter, count)
        print(f"{number + 1} of {len(cases)}: {name}", flush=True)
    subjects = len({dataset.subject_of[case] for case in cases})
    print(
        f"\nMSD hippocampus, {len(cases)} {options.cases} cases of {subjects} subjects, {len(NAMES)} targets, {options.wordings} wordings "
        f"of {options.language} language, two names listed; segmenter {segmenter.card.identity}\n"
    )
    report(rows, dataset, len(cases))


if __name__ == "__main__":
    main()
