#!/usr/bin/env python
"""What each part brings, on held-out hippocampus cases with held-out language. See reproduce_mini.sh.

Every row runs the same requests of the same test cases through the same frozen segmenter; only what stands before it differs. Per case and
target the mean, worst and standard deviation (ddof 0) of Dice over its wordings; then the mean over cases and targets; intervals (95 %) by
resampling subjects. Requests for what is not there, and for the whole of all labels, have columns of their own. The lexicon and the bank
know training language only; skills are accepted on bank cases, asked in training and in validation language too. Nothing is chosen on test
cases, but for the row that says so (--transductive): a bank evolved on the test cases with their labels, as SEER's released code does. That
is no result and shows what such labels are worth.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.consensus import ConsensusSettings
from seerseg.dataset import RawDataset, Request, label_prompts, load_splits, open_dataset
from seerseg.evolution.arena import Outcome, StoreArena, bare
from seerseg.metrics import bootstrap_interval, over_paraphrases, paired_bootstrap
from seerseg.model import Model, ModelSpec, read_spec
from seerseg.paths import write_json, write_text
from seerseg.planning import load_plans
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.base import ReasonerCard
from seerseg.reasoners.cascade import CascadeReasoner
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.skills.base import EmptyBank, Retriever
from seerseg.skills.encoder import Remembered, SentenceEncoder
from seerseg.skills.retrieval import ENCODED, FrozenBank
from seerseg.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
SPLIT = ROOT / "seerseg_data" / "splits" / "hippocampus.json"
NAME = "Dataset004_Hippocampus"
FOLD = 0
FREE, LEXICON = "segmenter alone, free text", "lexicon, training vocabulary"
WHOLE = "control: all labels together, whatever is asked"
EXPECTED = ConsensusSettings(decide="expected_dice")
LEAST_WORST = 0.05  # a worst Dice from which a relative gain says something


def parser(what: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """What both tables take."""
    made = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--reasoner", default="nano", help="what is trained")
    made.add_argument("--per_target", type=int, default=16, help="wordings of a case and target")
    made.add_argument("--rounds", type=int, default=1, help="of SEER-Loop")
    made.add_argument("--per_round", type=int, default=320, help="requests of a round")
    made.add_argument("--readings", type=int, default=3, help="of the consensus")
    made.add_argument("--encoder", type=Path, help="folder of a sentence encoder: rows more, with skills found by meaning too")
    made.add_argument("--transductive", action="store_true", help="also the row that evolves on the test cases with their labels")
    made.add_argument("--limit", type=int, help="only so many cases (for trying the script)")
    made.add_argument("--split", choices=("test", "val"), default="test", help="val for development")
    made.set_defaults(**defaults)
    return made


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mr_hippocampus")
    given.add_argument("--sft_minutes", type=float, default=20)
    given.add_argument("--grpo_minutes", type=float, default=20)
    given.add_argument(
        "--evolve_on", choices=("shipped", "sft", "grpo"), default="shipped", help="the model of the rows that follow; by validation"
    )
    run = Run(given.parse_args())
    run.prepare()
    run.rows()


class Run:
    """The stages, each kept when it is done."""

    name, number = NAME, 4
    said = "MSD hippocampus, {split} cases of the committed split, {split} language, fold {fold}, seed 0, nano segmenter."
    wholes = True
    """Whether requests for the whole of all labels are among what is learnt from and, apart, among what is asked: a model that was only
    ever asked for parts forgets that the whole can be meant, and guesses a part where it is in doubt."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.folders = {part: self.out / part for part in ("raw", "preprocessed", "results")}
        self.environment = {**os.environ, **{f"seerseg_{part}": str(path) for part, path in self.folders.items()}}
        os.environ |= self.environment
        self.stored = self.folders["preprocessed"] / self.name
        self.seconds: dict[str, float] = {}

    def prepare(self) -> None:
        """Plan, preprocess, requests, traces, training."""
        if not (self.given.data / "dataset.json").is_file():
            raise SystemExit(f"There is no dataset in {self.given.data}. Give the folder of MSD hippocampus in the raw layout with --data.")
        raw = self.folders["raw"] / self.name
        if not raw.exists():
            raw.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.given.data, raw, copy_function=_link)
        self.stored.mkdir(parents=True, exist_ok=True)
        if not (self.stored / "splits.json").exists():
            shutil.copy(SPLIT, self.stored / "splits.json")
        self.requests()
        self.command("traces", "seerseg_make_traces", "-d", self.number, done=self.stored / "traces.jsonl")
        for stage, minutes in (("sft", self.given.sft_minutes), ("grpo", self.given.grpo_minutes)):
            line = ("seerseg_train", self.name, FOLD, "--stage", stage, "--reasoner", self.given.reasoner, "--max_minutes", minutes, "-c")
            if minutes > 0:
                self.command(stage, *line, done=self.out / f"{stage}.done", allowed=(0, 75))
                (self.out / f"{stage}.done").touch()

    def requests(self) -> None:
        """Plan, preprocess, requests, and the plan that follows them."""
        made = self.out / "requests.done"
        self.command("preprocessing", "seerseg_plan_and_preprocess", "-d", self.number, done=made)
        wholes = ("--unions",) if self.wholes else ()
        line = ("seerseg_make_requests", "-d", self.number, "--per_target", self.given.per_target, "--overwrite", *wholes)
        self.command("requests", *line, done=made)
        self.command("plans that follow the requests", "seerseg_plan_and_preprocess", "-d", self.number, done=made)
        made.touch()
        self.dataset = open_dataset(self.folders["raw"] / self.name)
        self.plans = load_plans(self.stored / "plans.json")

    def command(self, what: str, *line: Any, done: Path | None = None, allowed: Sequence[int] = (0,)) -> None:
        """One command as a user types it, unless `done` is there."""
        if done is not None and done.exists():
            return
        print(f"== {what}: {' '.join(map(str, line))}", flush=True)
        program = Path(sys.executable).with_name(str(line[0]))
        began = time.time()
        code = subprocess.run([program, *map(str, line[1:])], env=self.environment, check=False).returncode
        self.seconds[what] = round(time.time() - began, 1)
        if code not in allowed:
            raise SystemExit(f"{line[0]} ended with code {code}.")

    def cases(self) -> list[str]:
        """Those that the table is about."""
        splits = load_splits(self.stored / "splits.json", self.dataset)
        chosen = splits.test if self.given.split == "test" else splits.folds[FOLD].val
        return list(chosen)[: self.given.limit]

    def open(self) -> None:
        """The segmenter that all rows share, and the models that stand before it unless trained here."""
        self.segmenter = CachedSegmenter(load_segmenter("nano"))
        names = tuple(self.dataset.canonical(label) for label in self.dataset.labels)
        views = self.plans.view_spec()
        told = ModelSpec(views=views, targets=names, closed=True, descriptions=self.dataset.descriptions or None)
        lexicon = load_reasoner("lexicon", splits=["train"], descriptions=self.dataset.descriptions)
        self.alone = Model(ModelSpec(views=views), reasoner_given=load_reasoner("verbatim"), segmenter_given=self.segmenter)
        self.lexicon = Model(told, reasoner_given=lexicon, segmenter_given=self.segmenter)
        self.shipped = Model(replace(told, reasoner=self.given.reasoner), segmenter_given=self.segmenter)
        self.whole = Model(told, reasoner_given=Whole(names), segmenter_given=self.segmenter)

    def rows(self) -> None:
        """Every row, then the table."""
        self.open()
        cases = self.cases()
        free = [r for r in self.dataset.requests if r.case in set(cases) and r.has_target and r.style != "label_prompt"]
        table: list[dict[str, Any]] = []

        def add(*row: Any, **more: Any) -> None:
            table.append(self.row(*row, **more))
            self.write(table)

        add("segmenter alone, label prompts", self.alone, label_prompts(self.dataset, cases))
        add(FREE, self.alone, free)
        add(LEXICON, self.lexicon, free)
        add(WHOLE, self.whole, free)
        add(f"{self.given.reasoner} as shipped", self.shipped, free)
        chosen = self.shipped
        trained = [(stage, name, model) for stage, name in (("sft", "after SFT"), ("grpo", "after GRPO")) if (model := self.trained(stage))]
        for more, how in (("", None), (", by expected Dice", EXPECTED)):
            for stage, name, model in trained:
                add(f"{self.given.reasoner} {name}{more}", model, free, consensus=how)
                chosen = model if stage == self.given.evolve_on else chosen
        name = f"{self.given.reasoner} {'as shipped' if chosen is self.shipped else 'trained here'}"
        if chosen is self.shipped:
            add(f"{name}, by expected Dice", chosen, free, consensus=EXPECTED)
        rules_first = CascadeReasoner([self.lexicon.reasoner, chosen.reasoner])
        both = Model(chosen.spec, reasoner_given=rules_first, segmenter_given=self.segmenter)
        add(f"cascade: lexicon, then {name}", both, free)
        add("cascade, by expected Dice", both, free, consensus=EXPECTED)
        if self.given.rounds and self.given.encoder is not None:
            bank = self.bank(self.lexicon, encoder=self.given.encoder)
            add("lexicon + SEER-Loop by meaning", self.lexicon, free, bank)
            add("cascade + that bank, by expected Dice", both, free, bank, consensus=EXPECTED)
        if self.given.rounds:
            self.with_bank(add, name, chosen, free)
        print((self.out / "table.md").read_text())

    def with_bank(self, add: Any, name: str, model: Model, free: Sequence[Request]) -> None:
        """Rows of a model with the bank that it evolved, and with several readings."""
        bank = self.bank(model)
        add(f"{name} + SEER-Loop by words", model, free, bank)
        if self.given.encoder is not None:
            bank = self.bank(model, encoder=self.given.encoder)
            add(f"{name} + SEER-Loop by meaning", model, free, bank)
            add(f"{name} + SEER-Loop by meaning, by expected Dice", model, free, bank, consensus=EXPECTED)
        if self.given.readings > 1:
            add(
                f"{name} + SEER-Loop + consensus of {self.given.readings}",
                model,
                free,
                bank,
                consensus=ConsensusSettings(self.given.readings),
            )
        if self.given.split == "test" and self.given.transductive:
            add(f"NO RESULT: {name}, evolved on these cases with their labels", model, free, self.bank(model, mode="transductive"))

    def trained(self, stage: str) -> Model | None:
        """The model that a stage left, with the shared segmenter."""
        found = sorted(self.folders["results"].glob(f"{self.name}/*/fold_{FOLD}/{stage}/model"))
        if not found:
            return None
        # a model that began as nano chooses among the listed names as nano does
        reasoner = f"nano:{found[0]}" if self.given.reasoner == "nano" else str(found[0])
        spec = replace(read_spec(found[0].parents[1]), reasoner=reasoner, segmenter_identity=None, bank="none")
        return Model(spec, segmenter_given=self.segmenter)

    def bank(self, model: Model, encoder: Path | None = None, mode: str = "frozen") -> Retriever:
        """Rounds of SEER-Loop on training cases with a reasoner; skills are found by words, with `encoder` also by meaning."""
        reasoner = model.spec.reasoner if model is not self.lexicon else "lexicon"
        marks = ("_lexicon" if model is self.lexicon else "", "_by_meaning" if encoder else "", f"_{mode}" if mode != "frozen" else "")
        folder = self.out / f"bank{''.join(marks)}"
        line = ["seerseg_evolve", self.name, FOLD, "--reasoner", reasoner, "-o", folder, "--rounds", self.given.rounds, "--mode", mode]
        line += ["--per_round", self.given.per_round, "--vocabulary", "train", *(["--encoder", encoder] if encoder else [])]
        self.command(folder.name, *line)
        if encoder is None:
            return FrozenBank.open(folder)
        return FrozenBank.open(folder, weights=ENCODED, encoder=Remembered(SentenceEncoder(encoder)))

    def row(
        self,
        name: str,
        model: Model,
        requests: Sequence[Request],
        bank: Retriever | None = None,
        *,
        consensus: ConsensusSettings | None = None,
    ) -> dict[str, Any]:
        """One row: the scores of its requests."""
        began = time.time()
        arena = StoreArena(self.dataset, self.stored, model, memo=self.out / "memo" / f"{self.given.split}.jsonl", consensus=consensus)
        outcomes = bare(arena, requests) if bank is None else arena.run(requests, bank)
        made = summary(name, outcomes, requests, self.dataset, (bank or EmptyBank()).mode)
        made["seconds"] = round(time.time() - began, 1)
        print(f"{name:34} mean {made['mean']:.3f} worst {made['worst']:.3f} std {made['std']:.3f}  {made['seconds']} s", flush=True)
        return made

    def write(self, table: list[dict[str, Any]]) -> None:
        """OUT/table.json and OUT/table.md, after every row."""
        scores = {row["name"]: row["_scores"] for row in table}
        pairs = compared([row["name"] for row in table])
        differences = [paired(scores, a, b, self.dataset.subject_of) for a, b in pairs]
        write_json(self.out / "table.json", [{k: v for k, v in row.items() if k != "_scores"} for row in table])
        write_json(self.out / "differences.json", differences)
        write_json(self.out / "seconds.json", self.seconds)
        split = self.given.split
        said = self.said.format(split=split, fold=FOLD)
        heads = ("row", "mean Dice (95 %)", "worst (95 %)", "std (95 %)", "variance", "absent right", "wholes", "cases", "requests", "bank")
        lines = [said, "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for r in table:
            cells = [r["name"], _with(r["mean"], r["ci95"]), _with(r["worst"], r["worst_ci95"]), _with(r["std"], r["std_ci95"])]
            absent = "-" if r["absent_right"] is None else f"{r['absent_right']:.2f} of {r['n_absent']}"
            wholes = "-" if r["wholes_mean"] is None else f"{r['wholes_mean']:.3f} of {r['n_wholes']}"
            cells += [f"{r['variance']:.4f}", absent, wholes, str(r["n_cases"]), str(r["n_requests"]), r["bank"]]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Paired differences (later minus earlier), 95 % by subject:", ""]
        lines += [
            f"- {d['later']} against {d['earlier']}: mean {_with(*d['mean'])}, worst {_with(*d['worst'])}, std {_with(*d['std'])}"
            for d in differences
        ]
        free = next((r for r in table if r["name"] == FREE), None)
        if free is not None and len(table) > 2:
            lines += ["", f"Against {FREE} (SEER's headline figures: variance -82 %, worst +18.6 %):", ""]
            lines += [f"- {r['name']}: {headline(r, free)}" for r in table[2:]]
        write_text(self.out / "table.md", "\n".join(lines) + "\n")


class Whole:
    """Answers with the structure that all labels are together: what a stability measure alone would praise."""

    def __init__(self, names: Sequence[str]) -> None:
        vocabulary = Vocabulary.load()
        above = [set(vocabulary.wholes(name)) for name in names]
        self.name = next(w for w in vocabulary.wholes(names[0]) if all(w in one for one in above) and vocabulary.pieces(w, names))
        self.card = ReasonerCard(name="whole", identity=f"whole-{self.name}", sees_images=False)

    def reply(self, dialogues: Sequence[Any], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """Always the same."""
        said = f"<evidence>none</evidence><rationale>none</rationale><answer>{self.name}</answer>"
        return [[said] * samples for _ in dialogues]


def summary(name: str, outcomes: Sequence[Outcome], requests: Sequence[Request], dataset: RawDataset, mode: str) -> dict[str, Any]:
    """Mean, worst, std over wordings, then over cases and targets; requests for absent targets and for wholes apart."""
    sets: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
    absent = [o.dice for o, r in zip(outcomes, requests, strict=True) if r.target is None]
    wholes = [o.dice for o, r in zip(outcomes, requests, strict=True) if len(r.target or ()) > 1]
    for outcome, request in zip(outcomes, requests, strict=True):
        if request.target is not None and len(request.target) == 1:
            sets[(request.case, request.target)].append(outcome.dice)
    scores = {key: over_paraphrases(values) for key, values in sets.items()}
    row: dict[str, Any] = {"name": name}
    for part, key in (("mean", "ci95"), ("worst", "worst_ci95"), ("std", "std_ci95"), ("variance", None)):
        by_subject: dict[str, list[float]] = defaultdict(list)
        for (case, _), found in scores.items():
            by_subject[dataset.subject_of[case]].append(getattr(found, part))
        row[part] = float(np.mean([v for values in by_subject.values() for v in values]))
        interval = bootstrap_interval(by_subject)
        if key:
            row[key] = [interval.lo, interval.hi] if interval else None
    row |= {"n_cases": len({case for case, _ in scores}), "n_requests": sum(map(len, sets.values())), "bank": mode}
    row |= {"n_absent": len(absent), "absent_right": float(np.mean(absent)) if absent else None}
    row |= {"n_wholes": len(wholes), "wholes_mean": float(np.mean(wholes)) if wholes else None}
    row["_scores"] = scores
    return row


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """Rows (earlier, later) whose difference is told: neighbours, and every row against each control that the table has. The first row
    asks otherwise than the others, by label prompts."""
    controls = [name for name in (FREE, LEXICON, WHOLE) if name in names]
    pairs = [*pairwise(names[1:])]
    return pairs + [(one, name) for name in names[1:] if name not in controls for one in controls if (one, name) not in pairs]


def headline(row: dict[str, Any], free: dict[str, Any]) -> str:
    """Relative change of variance and of worst; a gain over next to nothing is no figure."""
    variance = f"variance {100 * (row['variance'] / free['variance'] - 1):+.0f} %" if free["variance"] > 0 else "variance from 0"
    some = free["worst"] >= LEAST_WORST
    worst = (
        f"worst {100 * (row['worst'] / free['worst'] - 1):+.1f} %"
        if some
        else f"worst {row['worst']:.3f} from {free['worst']:.3f}, no ratio"
    )
    return f"{variance}, {worst}, mean {row['mean'] - free['mean']:+.3f}"


def paired(scores: dict[str, Any], earlier: str, later: str, subject_of: dict[str, str]) -> dict[str, Any]:
    """Later minus earlier on the same cases and targets."""
    made: dict[str, Any] = {"earlier": earlier, "later": later}
    for part in ("mean", "worst", "std"):
        a, b = ({key: getattr(s, part) for key, s in scores[name].items()} for name in (earlier, later))
        found = paired_bootstrap(a, b, {key: subject_of[key[0]] for key in a})
        made[part] = [found.mean, [found.interval.lo, found.interval.hi] if found.interval else None]
    return made


def _with(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    main()
