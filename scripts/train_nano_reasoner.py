#!/usr/bin/env python
"""Train the nano reasoner on one CPU core: a tiny Qwen3-VL with its own tokeniser, SEER's grammar, a request and a few slices -> a name.

    python scripts/train_nano_reasoner.py prepare --cache CACHE --data DATA --out OUT
    python scripts/train_nano_reasoner.py train --cache CACHE --out OUT --minutes 75
    python scripts/train_nano_reasoner.py export --out OUT --to seerseg/weights/nano_reasoner
    python scripts/train_nano_reasoner.py renew [--out FOLDER]

CACHE and DATA are those of scripts/train_nano_segmenter.py. `prepare` draws the slices of all scans once and trains the tokeniser on
training language; `train` continues from OUT/last.pt when that exists; `export` writes the model folder of the best checkpoint; `renew`
rewrites the marks of a tokeniser (the shipped one without --out) after a fixed text of a protocol was changed.

Only training language (vocabulary and sentences marked "train") and training cases are learnt from; validation language on
validation cases chooses the checkpoint; test cases and test language are not touched here.

A step is a few groups (seerseg_data/recipes/lessons.py). A group is what prediction sends for one case: system, slices, instruction and the
names that may be answered, run through the model once, and behind its cache many requests with their replies, of which the loss is taken
(nano_vlm.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seerseg.errors import UsageError
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import SHIPPED as SHIPPED_MODELS
from seerseg.reasoners.vlm_loading import load_processor
from seerseg.vocabulary import Vocabulary
from seerseg_data.recipes import exams, nano_vlm, pictures, runs
from seerseg_data.recipes.lessons import Maker
from seerseg_data.thesaurus import Thesaurus

LOSS_UNIT = 1000.0
"""Losses are sums over tokens; divided by this before they are added up, so that float32 keeps its precision."""


# ---------------------------------------------------------------------------------------------------- pictures and tokeniser


def prepare(args: argparse.Namespace) -> None:
    """OUT/pictures.npz and OUT/processor."""
    if args.cache is None or args.data is None or not (args.data / "mr_hippocampus").is_dir():
        raise UsageError("`prepare` needs --cache, and --data with a folder mr_hippocampus: a third of the requests are about its crops.")
    training, held = pictures.gather(args.cache, args.data)
    pictures.save_pictures(args.out, training, held)
    vocabulary = Vocabulary.load()
    maker, rng = Maker(training, vocabulary), random.Random(1)
    corpus: list[str] = []
    for _ in range(args.groups):
        group = maker.group(rng)
        views = pictures.as_views(group.picture, group.modality)
        corpus += [f"{s.text}</raw_prompt>{s.reply}" for s in group.samples]
        corpus += [part for message in nano_vlm.PROTOCOL.opening(views, "", (), group.names) for part in message.text.split("\n")]
    for entry in vocabulary:
        corpus += entry.texts(splits=("train",)) * 2
    tokeniser = nano_vlm.make_tokeniser(corpus)
    nano_vlm.save_processor(tokeniser, args.out / "processor")
    lengths = [len(tokeniser(text)["input_ids"]) for text in corpus[:2000]]
    print(f"{len(training)} training and {len(held)} held pictures; {len(tokeniser)} tokens; a text has {np.mean(lengths):.1f}")


def renew(args: argparse.Namespace) -> None:
    """The marks of the tokeniser in OUT, or of the shipped one."""
    nano_vlm.renew_marks((args.out or SHIPPED_MODELS["nano"]) / "tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Until `minutes` are over."""
    torch.set_num_threads(1)
    training, held = pictures.load_pictures(args.out)
    vocabulary = Vocabulary.load()
    thesaurus = Thesaurus.open(args.wordnet) if args.wordnet else None
    maker, tests = Maker(training, vocabulary, thesaurus), exams.make_exams(held, vocabulary)
    reasoner = nano_vlm.wrap(fresh_model(args), args.out / "processor")
    encoder, model = nano_vlm.Encoder(reasoner, dropout=0.1), reasoner.model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    average = runs.snapshot(model)
    step, spent, best, seen = 0, 0.0, -1.0, 0
    if (args.out / "last.pt").exists():
        kept = torch.load(args.out / "last.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        average, step, spent, best, seen = (kept[name] for name in ("average", "step", "spent", "best", "seen"))
    rng = random.Random(1000 + step)
    tell_controls(tests)

    began, marked_at, told_at = time.time() - spent, spent, spent
    tally = Tally()
    log = (args.out / "log.jsonl").open("a")
    while True:
        spent = time.time() - began
        done = spent / (60 * args.minutes)
        if done >= 1 or spent - marked_at > 60 * args.every:
            best = max(best, examine(reasoner, average, tests, args.out, best, log, {"step": step, "spent": spent, "seen": seen}))
            marked_at = spent = time.time() - began
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
            runs.save(args.out / "last.pt", {**state, "step": step, "spent": spent, "best": best, "seen": seen})
            if done >= 1:
                return
        for settings in optimiser.param_groups:
            settings["lr"] = args.rate * min(1.0, (step + 1) / 150) * runs.cosine(done, floor=0.04)
        maker.first = done < args.first
        model.train()
        optimiser.zero_grad(set_to_none=True)
        scored = 0
        for _ in range(args.groups):
            group = maker.group(rng)
            if not group.samples:
                continue
            group = replace(group, picture=group.picture and group.picture.augmented(rng))
            loss = nano_vlm.group_loss(encoder, group, rng)
            (loss.total / LOSS_UNIT).backward()
            tally.add(loss)
            scored += loss.scored
            seen += len(group.samples)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(LOSS_UNIT / scored)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 4 == 0:  # 4 steps at once
            keep = min(args.ema, (1 + step) / (40 + step))
            runs.blend(average, model.state_dict(), 1 - keep**4)
        if step % 50 == 0:
            spent = time.time() - began
            line = {"step": step, "minutes": round(spent / 60, 1), "requests": seen, **tally.line(spent - told_at)}
            print(json.dumps(line), file=log, flush=True)
            told_at, tally = spent, Tally()


@dataclass
class Tally:
    """Sums since the last line of the log."""

    total: float = 0.0
    scored: int = 0
    right: int = 0
    read: int = 0

    def add(self, loss: nano_vlm.GroupLoss) -> None:
        """One group."""
        self.total += float(loss.total.detach())
        self.scored, self.right, self.read = self.scored + loss.scored, self.right + loss.right, self.read + loss.read

    def line(self, seconds: float) -> dict[str, float]:
        """Means per scored token, and speed."""
        means = {"loss": round(self.total / self.scored, 4), "tokens_right": round(self.right / self.scored, 4)}
        return {**means, "tokens_per_s": round(self.read / seconds)}


def examine(
    reasoner: VlmReasoner, average: dict[str, Any], tests: Sequence[exams.Exam], out: Path, best: float, log: IO[str], at: dict[str, Any]
) -> float:
    """Mark the averaged weights; keep them when they are the best."""
    model = reasoner.model
    own = runs.snapshot(model)
    model.load_state_dict(average)
    model.eval()
    started = time.time()
    marks = exams.mark(tests, reasoner)
    score = exams.score(marks)
    line = {**at, "score": round(score, 4), "seconds": round(time.time() - started, 1)}
    for name, found in marks.items():
        line[name] = {"n": found.n, "exact": round(found.exact, 4), "wellformed": round(found.wellformed, 4), "styles": found.styles}
    print(json.dumps(line), file=log, flush=True)
    (out / "wrong.json").write_text(json.dumps({name: found.wrong for name, found in marks.items()}, indent=1))
    if score > best:
        runs.save(out / "best.pt", {"model": average, **at, "score": score})
    model.load_state_dict(own)
    return score


def tell_controls(tests: Sequence[exams.Exam]) -> None:
    """The lexicon with training vocabulary and the raw request on the same exams, for the log."""
    for name, settings in (("lexicon", {"splits": ["train"]}), ("verbatim", {})):
        for exam, found in exams.mark(tests, load_reasoner(name, **settings)).items():
            print(f"{name:9} {exam:18} n {found.n:4} exact {found.exact:.3f}  {found.styles}", flush=True)


# ------------------------------------------------------------------------------------------------------------------ export


def fresh_model(args: argparse.Namespace) -> Any:
    """A random model of the size asked for, with the tokeniser of OUT."""
    tokeniser = load_processor(args.out / "processor").tokenizer
    return nano_vlm.make_model(tokeniser, hidden=args.hidden, layers=args.layers, inner=args.inner)


def export(args: argparse.Namespace) -> None:
    """The model folder: fp16 weights, configuration, tokeniser, processor."""
    kept = torch.load(args.out / (args.which + ".pt"), weights_only=True)
    model = fresh_model(args)
    model.load_state_dict(kept["model"])
    model.half().save_pretrained(args.to)
    nano_vlm.save_processor(load_processor(args.out / "processor").tokenizer, args.to)
    print({k: v for k, v in kept.items() if k != "model"}, sum(f.stat().st_size for f in args.to.iterdir()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, verb in (("prepare", prepare), ("train", train), ("export", export), ("renew", renew)):
        command = commands.add_parser(name)
        command.set_defaults(verb=verb)
        command.add_argument("--cache", type=Path)
        command.add_argument("--data", type=Path)
        command.add_argument("--out", type=Path, required=name != "renew")
        command.add_argument("--to", type=Path)
        command.add_argument("--wordnet", type=Path, help="folder of WordNet's files: general words for those of the requests")
        command.add_argument("--minutes", type=float, default=75)
        command.add_argument("--every", type=float, default=8, help="minutes between marks on validation")
        command.add_argument("--groups", type=int, default=1 if name == "train" else 2500)
        command.add_argument("--first", type=float, default=0.2, help="share of the time with short requests and made-up names")
        command.add_argument("--rate", type=float, default=1e-3)
        command.add_argument("--ema", type=float, default=0.998)
        command.add_argument("--hidden", type=int, default=256)
        command.add_argument("--layers", type=int, default=4)
        command.add_argument("--inner", type=int, default=640)
        command.add_argument("--which", default="best", choices=("best", "last"))
    args = parser.parse_args()
    runs.run(args.verb, args)


if __name__ == "__main__":
    main()
