#!/usr/bin/env python
"""Train the click network of the nano segmenter (boxes, clicks, previous masks) on one CPU core, with a simulated user.

    python scripts/train_nano_segmenter.py fetch --cache CACHE
    python scripts/train_nano_clicks.py train --cache CACHE --data DATA --out OUT --minutes 40
    python scripts/train_nano_clicks.py export --out OUT --checkpoint best.pt --to seerseg/weights/nano_clicks

Items, deformation and degradation are those of train_nano_segmenter.py; so is the split: of the hippocampus set the training cases of
fold 0 are learnt from, its validation cases choose the checkpoint. The text network's image encoder is frozen (--encoder, the shipped one).

A step takes two crops of one target each. A target is asked for by a box on a slice (true, jittered or bad), a 3D box, a click, a damaged
mask or the mask of one slice; then one to five turns are played: draw, loss, update, click at the deepest point of the largest error, draw
again with the mask before and all prompts so far (seerseg_data/recipes/clicking.py). Names are never seen. `train` stops by the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seerseg.segmenters.nano import clicks
from seerseg.segmenters.nano.network import NanoNetwork
from seerseg.segmenters.nano.segmenter import SHIPPED, NanoSegmenter
from seerseg_data.recipes import items, runs
from seerseg_data.recipes.clicking import Crop, channels_of, draw_crop, draw_pair, new_user, truth_of

TURNS, TURN_ODDS = (1, 2, 3, 4, 5), (2, 3, 3, 2, 2)
UNNAMED, MISNAMED = 0.15, 0.2
"""Shares of targets for which no name is recognised, or only wrong ones."""


# ---------------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Until `--minutes` of wall clock have passed."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    say = runs.journal(args.out).info

    eyes = Eyes.of(NanoSegmenter.load(source=args.encoder))
    pools: dict[str, list[items.Item]] = {}
    for item in items.training_items(args.cache, args.data, args.phantoms):
        pools.setdefault(item.group, []).append(item)
    validation = Validation(args.cache, args.data)
    say(f"{sum(map(len, pools.values()))} items: " + ", ".join(f"{k} {len(v)}" for k, v in pools.items()))
    network, average = (clicks.ClickNetwork(clicks.ClickConfig()).to(memory_format=torch.channels_last_3d) for _ in range(2))
    if args.start:
        network.load_state_dict(torch.load(args.start, weights_only=True)["network"])
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-2, betas=(0.9, 0.98))
    say(f"{sum(p.numel() for p in network.parameters())} parameters")

    begun = checked = time.time()
    cpu = time.process_time()
    updates, seen, best = 0, 0, -1.0
    losses: dict[int, list[float]] = {}
    while (share := (time.time() - begun) / (args.minutes * 60)) < 1:
        crops = draw_pair(pools, rng)
        windows, features, concepts = eyes.look(crops)
        sight = network.sight(features)
        users = [new_user(crop.target, rng) for crop in crops]
        usable = [usable_names(known, crop.target, rng) for known, crop in zip(concepts, crops, strict=True)]
        truth = truth_of(users)
        seen += len(users)
        for turn in range(turns := rng.choices(TURNS, TURN_ODDS)[0]):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (updates + 1) / 60) * runs.cosine(share, floor=0.01)
            prompts = channels_of(users)
            concept = torch.stack([known.best(one, may) for known, one, may in zip(concepts, prompts, usable, strict=True)])
            logits = network(windows, sight, prompts, concept)
            loss = turn_loss(logits, truth, prompts)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
                updates += 1
                runs.blend(average.state_dict(), network.state_dict(), 1 - min(0.995, updates / (updates + 9)))
            losses.setdefault(turn, []).append(loss.item())
            if turn + 1 < turns:
                for user, mask in zip(users, (logits.detach() > 0).numpy(), strict=True):
                    user.click(mask, rng)
        if seen % 80 < len(users):
            used = (time.process_time() - cpu) / 60
            shown = " ".join(f"{np.mean(v[-60:]):.3f}" for _, v in sorted(losses.items()))
            say(f"{(time.time() - begun) / 60:.1f} min (cpu {used:.1f}) updates {updates} targets {seen} loss by turn {shown}")
        if time.time() - checked > args.validate_minutes * 60:
            best = max(best, mark(validation, eyes, average, args.out, best, updates, say))
            checked = time.time()
    mark(validation, eyes, average, args.out, best, updates, say)
    minutes = (time.process_time() - cpu) / 60
    say(f"end: {updates} updates, {seen} targets, {minutes:.1f} min of CPU, {(time.time() - begun) / 60:.1f} min of wall clock")


@dataclass(frozen=True, eq=False)
class Eyes:
    """The frozen encoder, and the embedded names of what it can recognise."""

    encoder: NanoNetwork
    names: Tensor

    @classmethod
    def of(cls, segmenter: NanoSegmenter) -> Eyes:
        """Those of the text network."""
        return cls(segmenter._network, segmenter._embedded_vocabulary()[1])

    def look(self, crops: list[Crop]) -> tuple[Tensor, list[Tensor], list[clicks.Concepts]]:
        """Windows (B, 2, ...), features, and what the known names look like on each crop."""
        with torch.no_grad():
            image = torch.stack([c.image for c in crops]).contiguous(memory_format=torch.channels_last_3d)
            features, pooled = self.encoder.image(image, torch.stack([c.conditions for c in crops]))
        concepts = [
            clicks.Concepts(
                self.encoder, [f[k : k + 1] for f in features], pooled[k : k + 1], image[k : k + 1, clicks.WINDOWS :], self.names
            )
            for k in range(len(crops))
        ]
        return image[:, : clicks.WINDOWS], features, concepts


def turn_loss(logits: Tensor, truth: Tensor, prompts: Tensor) -> Tensor:
    """Soft Dice and cross-entropy (weighed five times at clicks), mean over the batch. logits, truth (B, Z, Y, X)."""
    p = torch.sigmoid(logits)
    both, total = (p * truth).sum((1, 2, 3)), (p + truth).sum((1, 2, 3))
    weight = 1 + 4 * prompts[:, :2].amax(1)
    entropy = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight).mean((1, 2, 3))
    return (1 - (2 * both + 1) / (total + 1) + 2 * entropy).mean()


def usable_names(concepts: clicks.Concepts, target: np.ndarray, rng: random.Random) -> Tensor:
    """Which names may be recognised: mostly all, now and then none, or none that fits the target, as for what nobody taught the words."""
    chance = rng.random()
    if chance < UNNAMED:
        return torch.zeros(len(concepts.half))
    if chance < UNNAMED + MISNAMED:
        truth = F.avg_pool3d(torch.from_numpy(target.astype(np.float32))[None], 2)[0]
        overlap = 2 * (concepts.half * truth).sum((1, 2, 3)) / (concepts.half.sum((1, 2, 3)) + truth.sum())
        return (overlap < 0.4).float()
    return torch.ones(len(concepts.half))


# -------------------------------------------------------------------------------------------------------------- validation


def mark(
    validation: Validation,
    eyes: Eyes,
    network: clicks.ClickNetwork,
    out: Path,
    best: float,
    updates: int,
    say: Callable[[str], None],
) -> float:
    """The score: mean over groups of the mean Dice over turns, hippocampus twice. Kept as last.pt, and best.pt when it is the best."""
    scores = validation.run(eyes, network)
    score = float(np.average([np.mean(v) for v in scores.values()], weights=[2 if k == "hippocampus" else 1 for k in scores]))
    say(f"validation {score:.4f} " + "; ".join(f"{k} " + " ".join(f"{v:.3f}" for v in values) for k, values in scores.items()))
    for name in ["last.pt", *(["best.pt"] if score > best else [])]:
        runs.save(out / name, {"network": network.state_dict(), "updates": updates, "scores": scores})
    return score


class Validation:
    """Fixed crops of validation cases and of phantoms that training never drew; a careful user, box first, four clicks."""

    def __init__(self, cache: Path, data: Path | None) -> None:
        rng = random.Random(7)
        batches: dict[tuple[str, tuple[int, ...]], list[Crop]] = {}
        for item in items.held_items(cache, data):
            group = item.group if item.group == "hippocampus" else "phantoms"
            parts = {name: values for name, values in item.structures.items() if name != "hippocampus" or group == "phantoms"}
            crop = draw_crop(replace(item, structures=parts), (48, 32, 32), rng, plain=True)
            if crop is not None:
                batches.setdefault((group, tuple(crop.image.shape)), []).append(crop)
        self.batches = [(group, crops) for (group, _), crops in batches.items()]

    @torch.no_grad()
    def run(self, eyes: Eyes, network: clicks.ClickNetwork) -> dict[str, list[float]]:
        """Mean Dice after each of five turns, per group."""
        rows: dict[str, list[list[float]]] = {}
        for group, crops in self.batches:
            windows, features, concepts = eyes.look(crops)
            sight = network.sight(features)
            users = [new_user(crop.target, random.Random(11), "box2d") for crop in crops]
            dices: list[list[float]] = [[] for _ in users]
            for _ in range(5):
                prompts = channels_of(users)
                concept = torch.stack([known.best(one) for known, one in zip(concepts, prompts, strict=True)])
                found = (network(windows, sight, prompts, concept) > 0).numpy()
                for row, user, mask in zip(dices, users, found, strict=True):
                    row.append(2 * float((mask & user.target).sum()) / max(1, int(mask.sum() + user.target.sum())))
                    user.click(mask, None)
            rows.setdefault(group, []).extend(dices)
        return {group: [float(v) for v in np.mean(values, axis=0)] for group, values in rows.items()}


# ------------------------------------------------------------------------------------------------------------------ export


def export(args: argparse.Namespace) -> None:
    """A checkpoint -> model.safetensors (float16) and config.json."""
    from safetensors.torch import save_file

    state = torch.load(args.out / args.checkpoint, weights_only=True)
    args.to.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in state["network"].items()}
    save_file(tensors, args.to / "model.safetensors", metadata={"format": "seerseg-nano-clicks"})
    config = {
        "schema": clicks.SCHEMA,
        "kind": clicks.KIND,
        "encoder": clicks.encoder_digest(NanoSegmenter.load(source=args.encoder)._network),
        "network": clicks.ClickConfig().to_json(),
        "updates": state["updates"],
    }
    (args.to / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{(args.to / 'model.safetensors').stat().st_size / 1e6:.2f} MB after {state['updates']} updates")


def main() -> None:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    runs.scan_arguments(one, phantoms=24)
    runs.loop_arguments(one, minutes=40, validate_minutes=8, start="begin with the weights of another run")
    two = verbs.add_parser("export")
    two.add_argument("--checkpoint", default="best.pt")
    two.add_argument("--to", type=Path, required=True)
    for verb in (one, two):
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--encoder", type=Path, default=SHIPPED, help="folder of the text network whose image encoder is used")
    args = parser.parse_args()
    runs.run({"train": train, "export": export}[args.verb], args)


if __name__ == "__main__":
    main()
