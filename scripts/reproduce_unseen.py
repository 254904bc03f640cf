#!/usr/bin/env python
"""What each part brings on a dataset that SFT and GRPO never saw: drawn CT phantoms of torsos with lesions, seeds of their own.

    python scripts/reproduce_unseen.py OUT [--cases 30] [--model FOLDER] [--encoder FOLDER] [--no_reasoner]

Structures: those that the frozen segmenter draws with a Dice of 0.6 or more from label prompts on six training cases (never chosen on test
cases). Their requests, in test language, on the test cases; SEER-Loop on training and bank cases, skills accepted in training and
validation language, each evolution within --evolve_minutes. --model: a model
folder that was trained elsewhere (reproduce_mini leaves OUT/results/.../fold_0/sft/model). Rows and intervals as in reproduce_mini.py.

Not wholly unseen: torsos by the same drawing, other seeds and without lesions, were among what both nano models were first trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduce_mini import FOLD, FREE, LEXICON, Run, parser

from seerseg.dataset import Request, label_prompts, load_splits
from seerseg.evolution.arena import StoreArena, bare
from seerseg.model import Model
from seerseg.paths import read_json, write_json

LEAST, JUDGED_ON = 0.6, 6
"""Dice of label prompts from which a structure takes part, and how many training cases that is judged on."""


class Unseen(Run):
    """The same rows on phantoms."""

    name, number, wholes = "Dataset910_PhantomLesions", 910, False
    said = "Drawn CT phantoms of torsos with lesions (exact labels), {split} cases, {split} language, fold {fold}, seed 0, nano segmenter."

    def prepare(self) -> None:
        """Draw, plan, preprocess, requests."""
        raw = self.folders["raw"] / self.name
        line = ("seerseg_sample", "phantoms_lesions", "-n", self.given.cases, "--seed", self.given.first_seed)
        self.command("phantoms", *line, "-o", self.folders["raw"], done=raw / "dataset.json")
        self.stored.mkdir(parents=True, exist_ok=True)
        self.requests()

    def command(self, what: str, *line: Any, done: Path | None = None, allowed: Sequence[int] = (0,)) -> None:
        """As any command; an evolution has its time, and takes what another of the same reasoner asked on these scans."""
        if line[0] == "seerseg_evolve":
            line = (*line, "--max_minutes", self.given.evolve_minutes)
            folder = Path(line[line.index("-o") + 1])
            other = folder.with_name(folder.name.removesuffix("_by_meaning"))
            if other != folder and not folder.exists():
                folder.mkdir(parents=True)
                for memo in other.glob("memo*.jsonl"):
                    shutil.copy(memo, folder)
                if (other / "masks").is_dir():
                    shutil.copytree(other / "masks", folder / "masks")
        super().command(what, *line, done=done, allowed=allowed)

    def known(self) -> set[str]:
        """Labels that the segmenter draws, judged on training cases."""
        kept = self.out / "structures.json"
        if not kept.exists():
            cases = load_splits(self.stored / "splits.json", self.dataset).folds[FOLD].train[:JUDGED_ON]
            prompts = label_prompts(self.dataset, list(cases))
            arena = StoreArena(self.dataset, self.stored, self.alone, memo=self.out / "memo" / "train.jsonl")
            found: dict[str, list[float]] = defaultdict(list)
            for outcome, prompt in zip(bare(arena, prompts), prompts, strict=True):
                if prompt.target is not None and len(prompt.target) == 1:
                    found[prompt.target[0]].append(outcome.dice)
            write_json(kept, {"cases": len(cases), "dice": {label: float(np.mean(values)) for label, values in sorted(found.items())}})
        return {label for label, value in read_json(kept)["dice"].items() if value >= LEAST}

    def rows(self) -> None:
        """Every row, then the table."""
        self.open()
        cases, known = self.cases(), self.known()
        print(f"{len(known)} of {len(self.dataset.labels)} structures, {len(cases)} cases: {', '.join(sorted(known))}")

        def takes_part(request: Request) -> bool:
            return request.case in cases and request.has_target and (request.target is None or set(request.target) <= known)

        free = fewer([r for r in self.dataset.requests if takes_part(r) and r.style != "label_prompt"], self.given.wordings)
        table: list[dict[str, Any]] = []

        def add(*row: Any, **more: Any) -> None:
            table.append(self.row(*row, **more))
            self.write(table)

        add("segmenter alone, label prompts", self.alone, [r for r in label_prompts(self.dataset, cases) if takes_part(r)])
        add(FREE, self.alone, free)
        add(LEXICON, self.lexicon, free)
        self.with_bank(add, "lexicon", self.lexicon, free)
        if self.given.no_reasoner:
            print((self.out / "table.md").read_text())
            return
        if self.given.model is not None:
            self.shipped = Model(_named(self.shipped, self.given.model), segmenter_given=self.segmenter)
        add(self.given.reasoner, self.shipped, free)
        self.with_bank(add, self.given.reasoner, self.shipped, free)
        print((self.out / "table.md").read_text())


def fewer(requests: Sequence[Request], wordings: int | None) -> list[Request]:
    """At most so many wordings of each case and target, drawn by the names of the requests; all for None."""
    sets: dict[tuple[str, tuple[str, ...] | None], list[Request]] = defaultdict(list)
    for request in sorted(requests, key=lambda r: hashlib.blake2b(r.id.encode(), digest_size=8).digest()):
        sets[request.case, request.target].append(request)
    kept = {r.id for found in sets.values() for r in found[:wordings]}
    return [r for r in requests if r.id in kept]


def _named(model: Model, folder: Path) -> Any:
    from dataclasses import replace

    return replace(model.spec, reasoner=f"nano:{folder.resolve()}")


def main() -> None:
    given: argparse.ArgumentParser = parser(__doc__, readings=1)
    given.add_argument("--cases", type=int, default=30)
    given.add_argument("--first_seed", type=int, default=7000)
    given.add_argument("--model", type=Path)
    given.add_argument("--evolve_minutes", type=float, default=10, help="for the evolution of one bank")
    given.add_argument("--no_reasoner", action="store_true", help="the lexicon's rows alone")
    given.add_argument("--wordings", type=int, help="only so many of the wordings of a case and target: free text costs 1.7 s each")
    run = Unseen(given.parse_args())
    run.prepare()
    run.rows()


if __name__ == "__main__":
    main()
