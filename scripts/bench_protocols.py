#!/usr/bin/env python
"""All protocols on the same cases, requests and segmenter: what each costs and what it gives.

    python scripts/bench_protocols.py --raw RAW/mr_hippocampus [--cases test] [--language test] [--limit 6] [--wordings 4] [--rows ...]
        [--models NAME=RUN/fold_0/sft/model NAME=RUN/fold_0/grpo/model ...]

Who speaks is part of a row's name. `nano` and `lexicon` are reasoners that read the request; a row of --models is a reasoner that
seerseg_train made, with the protocol and the views it was trained with. `expert` is a script that knows the target: a ceiling for what a
trained reasoner of that protocol could get from this segmenter, not a result of one. The expert's boxes are those of the target's largest
slice, its edges jittered by 4 % of their side, drawn anew for every wording; its name is always right; as agent it is the simulated expert
of seerseg_data.trajectories. The shipped nano reasoner was trained on the protocol seer alone, so by itself it speaks no other.

Per (case, target): mean, worst and std (ddof 0) over wordings; then the mean over cases, its 95 % interval by subject. Unreadable: share of
all replies that the protocol could not read (in protocols of one turn a reply that is asked for again counts, too). Idle: of the masks
of dialogues of several turns, the share that was no better than one before. Tokens are those of the replies, by the nano reasoner's
tokeniser, in which the fixed parts of every protocol's replies are short marks; seconds are of CPU, one thread, for all requests of a
case. Models of one protocol are compared in pairs, each with the one before it.
"""

from __future__ import annotations

import argparse
import itertools
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
from seerseg.episode import Episode, Targets, finish, open_dialogues, reason
from seerseg.metrics import bootstrap_interval, over_paraphrases, paired_bootstrap
from seerseg.model import read_spec
from seerseg.paths import write_json
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols import load_protocol
from seerseg.protocols.base import Fault, KeySlice, Trace
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.rewards import Overlap, Truth, improving
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmentation, Segmenter, Session
from seerseg.views import CaseViews, ViewSpec, render
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


@dataclass(frozen=True)
class Way:
    """A protocol, who speaks it, and what is shown (None: as the protocol was published)."""

    protocol: str
    speaker: str
    views: ViewSpec | None = None


@dataclass
class Row:
    """What one way came to, by case and target."""

    scores: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    turns: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    idle: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[int] = field(default_factory=list)
    unreadable: list[bool] = field(default_factory=list)
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


def episodes_of(texts: Sequence[str], views: CaseViews, case: Case, way: Way, reasoner: Any, segmenter: Segmenter) -> list[Episode]:
    """Requests of one case to the end, the mask of every turn kept."""
    targets = Targets(NAMES, closed=True)
    dialogues = open_dialogues(views, texts, protocol=load_protocol(way.protocol), targets=targets)
    for dialogue in dialogues:
        dialogue.keep_masks = True
    reason(dialogues, reasoner)
    return finish(dialogues, case.volume, reasoner=reasoner, segmenter=segmenter)


def ask(way: Way, case: Case, row: Row, reasoners: Callable[[str], Any], segmenter: Segmenter, count: Callable[[str], int]) -> None:
    """All requests of one case, one way."""
    protocol = load_protocol(way.protocol)
    views = render(case.volume, way.views or protocol.view_spec)
    asked = [(target, wording, text) for target in NAMES for wording, text in enumerate(case.wordings[target])]
    counted = Counted(segmenter)
    episodes: list[Episode] = []
    if way.speaker == "expert":
        scripts = [experts_replies(protocol, views, case, target, wording, segmenter) for target, wording, _ in asked]
        started = time.process_time()
        for (_, _, text), replies in zip(asked, scripts, strict=True):
            episodes += episodes_of([text], views, case, way, ScriptedReasoner(list(replies)), counted)
    else:
        reasoner = reasoners(way.speaker)
        started = time.process_time()
        episodes = episodes_of([text for _, _, text in asked], views, case, way, reasoner, counted)
    row.seconds += time.process_time() - started
    row.calls += counted.calls
    for (target, _, _), episode in zip(asked, episodes, strict=True):
        key, truth = (case.name, target), Truth(case.volume.grid, case.truth[target])
        row.scores[key].append(truth.overlap(None if episode.mask is None else episode.mask.array).dice)
        row.turns[key].append(float(len(episode.replies)))
        drawn: list[Overlap] = []
        for turn in episode.turns:  # a turn without a mask leaves the one before it
            drawn.append(truth.overlap(turn.mask.array) if turn.mask is not None else drawn[-1] if drawn else Overlap(0.0, 0.0))
        row.idle[key] += [1.0 - better for better in improving(drawn)]
        row.tokens.append(sum(count(reply) for reply in episode.replies))
        row.unreadable += [isinstance(protocol.read(reply, views), Fault) for reply in episode.replies]


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


def of_subjects(values: dict[tuple[str, str], list[float]], dataset: Any) -> str:
    """The mean over (case, target) of their means, with its interval by subject."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for (case, _), found in values.items():
        if found:
            by_subject[dataset.subject_of[case]].append(float(np.mean(found)))
    if not by_subject:
        return "-"
    interval = bootstrap_interval(by_subject)
    mean = f"{np.mean([v for found in by_subject.values() for v in found]):.3f}"
    return mean if interval is None else f"{mean} ({interval.lo:.3f} to {interval.hi:.3f})"


def report(rows: dict[str, Row], dataset: Any, cases: int) -> None:
    """The table."""
    heads = ("protocol, who speaks", "mean (95 % by subject)", "worst", "std", "turns", "idle", "unreadable", "tokens",
             "segmenter calls a case", "CPU s a case")  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name, row in rows.items():
        spreads = [over_paraphrases(values) for values in row.scores.values()]
        worst, std = np.mean([s.worst for s in spreads]), np.mean([s.std for s in spreads])
        print(
            f"| {name} | {of_subjects(row.scores, dataset)} | {worst:.3f} | {std:.3f} | {of_subjects(row.turns, dataset)} | "
            f"{of_subjects(row.idle, dataset)} | {np.mean(row.unreadable):.2f} | {np.mean(row.tokens):.0f} | {row.calls / cases:.1f} | "
            f"{row.seconds / cases:.1f} |"
        )


def differences(rows: dict[str, Row], ways: dict[str, Way], dataset: Any) -> None:
    """Models of one protocol, each less the one before it, paired by case and target."""
    names = [name for name in rows if ways[name].speaker not in ("expert", "nano", "lexicon")]
    for earlier, later in itertools.pairwise(names):
        if ways[earlier].protocol != ways[later].protocol:
            continue
        said = []
        for what in ("scores", "turns", "idle"):
            before, after = ({k: float(np.mean(v)) for k, v in getattr(rows[n], what).items() if v} for n in (earlier, later))
            both = [key for key in after if key in before]
            if both:
                found = paired_bootstrap(
                    {k: before[k] for k in both}, {k: after[k] for k in both}, {k: dataset.subject_of[k[0]] for k in both}
                )
                interval = f" ({found.interval.lo:+.3f} to {found.interval.hi:+.3f})" if found.interval else ""
                said.append(f"{'Dice' if what == 'scores' else what} {found.mean:+.3f}{interval}")
        print(f"\n{later} less {earlier}, paired, 95 % by subject: {'; '.join(said)}")


def trained(said: Sequence[str]) -> dict[str, Way]:
    """Rows of --models NAME=FOLDER: the folder of a stage's model in its run."""
    found = {}
    for one in said:
        name, equals, folder = one.partition("=")
        place = Path(folder).expanduser().resolve()
        if not equals or not (place / "config.json").is_file():
            raise SystemExit(f"--models {one!r} is no NAME=FOLDER with a model in it, as in agent=RUN/fold_0/sft/model.")
        spec = read_spec(place.parents[1])
        found[f"{spec.protocol}, {name}"] = Way(
            spec.protocol, f"nano:{place}" if spec.reasoner.startswith("nano") else str(place), spec.views
        )
    return found


def main() -> None:
    """Every way on every case, then one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="the hippocampus dataset folder")
    parser.add_argument("--cases", default="test", choices=("val", "test"))
    parser.add_argument("--language", default="test", choices=("train", "val", "test"))
    parser.add_argument("--limit", type=int, default=None, help="only so many cases")
    parser.add_argument("--wordings", type=int, default=4, help="per case and target")
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--models", nargs="+", default=(), metavar="NAME=FOLDER", help="models that seerseg_train made")
    parser.add_argument("--segmenter", default="nano")
    parser.add_argument("--out", type=Path, help="every number as JSON, after each case")
    parser.add_argument("--read", type=Path, help="ask nothing; the table of such a file, also of a run that was stopped")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, vocabulary = open_dataset(options.raw), Vocabulary.load()
    if options.read:
        report_file(options.read, dataset)
        return
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

    ways = {name: Way(*ROWS[name]) for name in options.rows} | trained(options.models)
    rows = {name: Row() for name in ways}
    for number, name in enumerate(cases):
        case = read_case(dataset, name, options.language, options.wordings, vocabulary)
        for title, way in ways.items():
            ask(way, case, rows[title], reasoners, segmenter, count)
        print(f"{number + 1} of {len(cases)}: {name}", flush=True)
        if options.out:
            said = {title: {"protocol": ways[title].protocol, "speaker": ways[title].speaker, **plain(row)} for title, row in rows.items()}
            write_json(options.out, {"cases": number + 1, "rows": said})
    subjects = len({dataset.subject_of[case] for case in cases})
    print(
        f"\nMSD hippocampus, {len(cases)} {options.cases} cases of {subjects} subjects, {len(NAMES)} targets, {options.wordings} wordings "
        f"of {options.language} language, two names listed; segmenter {segmenter.card.identity}\n"
    )
    report(rows, dataset, len(cases))
    differences(rows, ways, dataset)


def report_file(path: Path, dataset: Any) -> None:
    """The table of what --out wrote."""
    said = json.loads(path.read_text(encoding="utf-8"))
    rows, ways = {}, {}
    for title, one in said["rows"].items():
        ways[title] = Way(one["protocol"], one["speaker"])
        row = rows[title] = Row(tokens=one["tokens"], unreadable=one["unreadable"], calls=one["calls"], seconds=one["seconds"])
        for what in ("scores", "turns", "idle"):
            getattr(row, what).update({tuple(key.split("|")): values for key, values in one[what].items()})
    names = {case for row in rows.values() for case, _ in row.scores}
    print(f"{said['cases']} cases of {len({dataset.subject_of[case] for case in names})} subjects\n")
    report(rows, dataset, said["cases"])
    differences(rows, ways, dataset)


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    by_key = {what: {"|".join(key): values for key, values in getattr(row, what).items()} for what in ("scores", "turns", "idle")}
    return {**by_key, "tokens": row.tokens, "unreadable": row.unreadable, "calls": row.calls, "seconds": row.seconds}


if __name__ == "__main__":
    main()
