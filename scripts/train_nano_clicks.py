#!/usr/bin/env python
"""Train the click network of the nano segmenter (boxes, clicks, previous masks) on one CPU core, with a simulated user.

    python scripts/train_nano_segmenter.py fetch --cache CACHE
    python scripts/train_nano_clicks.py train --cache CACHE --data DATA --out OUT --minutes 40
    python scripts/train_nano_clicks.py export --out OUT --checkpoint best.pt --to seerseg/weights/nano_clicks

Items, deformation and degradation are those of train_nano_segmenter.py; so is the split: of the hippocampus set the training cases of
fold 0 are learnt from, its validation cases choose the checkpoint. The text network's image encoder is frozen (--encoder, the shipped one).

A step takes two crops of one target each. A target is asked for by a box on a slice (true, jittered or bad), a 3D box, a click, a damaged
mask or the mask of one slice; then one to five turns are played: draw, loss, update, click at the deepest point of the largest error, draw
again with the mask before and all prompts so far. Names are never seen. `train` stops by the wall clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seerseg.prompts import Box2D, Box3D, Point  # noqa: E402
from seerseg.segmenters.nano import clicks, inputs  # noqa: E402
from seerseg.segmenters.nano.network import NanoNetwork  # noqa: E402
from seerseg.segmenters.nano.segmenter import SHIPPED, NanoSegmenter  # noqa: E402
from seerseg.volume import Grid  # noqa: E402
from seerseg_data.trajectories import deepest, error_points  # noqa: E402


def _text_training() -> ModuleType:
    """train_nano_segmenter.py, for its items, deformation and degradation."""
    spec = importlib.util.spec_from_file_location("train_nano_segmenter", ROOT / "scripts" / "train_nano_segmenter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


text = _text_training()

SHARES = {"hippocampus": 0.5, "torso": 0.34, "brain": 0.16}
SHAPES = ((32, 32, 32), (48, 32, 32), (48, 48, 32))
SHAPE_ODDS = (6, 4, 1)
FIRST = {"box2d": 0.55, "box3d": 0.12, "point": 0.13, "damaged": 0.12, "slice": 0.08}
TURNS, TURN_ODDS = (1, 2, 3, 4, 5), (2, 3, 3, 2, 2)
FLAT = 0.06
"""Share of crops that show one slice repeated: single images."""
UNNAMED, MISNAMED = 0.15, 0.2
"""Shares of targets for which no name is recognised, or only wrong ones."""
FORGET = 0.15
"""Share of turns that know the mask before and the newest click alone, as without a session."""
LEAST_VOXELS = 40


# ------------------------------------------------------------------------------------------------------------------- crops


@dataclass
class Crop:
    """image (5, Z, Y, X), conditions (8,), target bool (Z, Y, X)."""

    image: Tensor
    conditions: Tensor
    target: np.ndarray


def finest(item: Any) -> float:
    """The finest crop of an item, mm; the rule of use is `refining.finest_mm`."""
    return max(1.0 if item.modality == inputs.CT else 0.75, 0.7 * float(np.median(item.levels[0][2])))


def draw_crop(item: Any, shape: tuple[int, int, int], rng: random.Random, *, plain: bool = False) -> Crop | None:
    """A crop about one structure of the item; plain: neither deformed nor degraded. None: nothing there."""
    npr = np.random.default_rng(rng.getrandbits(32))
    names = [name for name, values in item.structures.items() if values]
    name = rng.choice(names) if plain else text._choose(names, rng)
    _, coarse, step = item.levels[-1]
    where = np.isin(coarse.numpy(), item.structures[name])
    if not plain and rng.random() < 0.3:  # one part of it
        parts, count = ndimage.label(where)
        if count > 1:
            where = parts == rng.randint(1, count)
    if np.count_nonzero(where) < 8:
        return None
    lines = [np.flatnonzero(where.any(axis=tuple(i for i in range(3) if i != a))) for a in range(3)]
    low, high = np.array([line[0] for line in lines]) * step, np.array([line[-1] + 1 for line in lines]) * step
    extent = high - low
    order = np.argsort(np.argsort(-extent, kind="stable"), kind="stable")
    shape = tuple(sorted(shape, reverse=True)[k] for k in order)  # type: ignore[assignment]
    cut = not plain and rng.random() < 0.12
    share = 0.7 if plain else rng.uniform(1.0, 1.6) if cut else math.exp(rng.uniform(math.log(0.3), math.log(0.95)))
    spacing = float(np.clip((extent / np.array(shape)).max() / share, finest(item), 8.0))
    if item.group == "hippocampus" and spacing < 1.35:
        spacing = 1.0 if plain else rng.uniform(0.97, 1.03)
    centre = (low + high) / 2
    if cut:
        spots = np.argwhere(where)
        centre = (spots[rng.randrange(len(spots))] + 0.5) * step
    elif not plain:
        side = np.array(shape) * spacing
        centre = centre + npr.uniform(-0.5, 0.5, 3) * np.clip(np.maximum(0.15 * extent, side - extent), 0, 0.4 * side)
    full = np.array(item.levels[0][0].shape) * item.levels[0][2]
    mirrored = not plain and rng.random() < 0.5
    if plain:
        state = rng.getstate()
        image, labels = _undeformed(item, centre, spacing, shape, full)
        rng.setstate(state)
    else:
        image, labels = text._sample(item, np.array(centre), spacing, list(shape), np.zeros(3), full, mirrored, npr, rng)
    box_lo, box_hi = item.box[0].copy(), item.box[1].copy()
    if mirrored:
        centre[2] = full[2] - centre[2]
        box_lo[2], box_hi[2] = full[2] - item.box[1][2], full[2] - item.box[0][2]
    scaling, modality = item.scaling, item.modality
    if not plain and rng.random() < (0.4 if item.group == "hippocampus" else 0.7):
        image, scaling, modality = text._degrade(image, item, spacing, npr, rng)
    target = _target(item, labels.numpy(), name, rng)
    if not plain and target is not None and rng.random() < FLAT:
        k = int(target.sum(axis=(1, 2)).argmax())
        image = image[k : k + 1].expand(*shape).contiguous()
        target = np.broadcast_to(target[k : k + 1], target.shape).copy()
    if target is None:
        return None
    origin = centre - (np.array(shape) - 1) / 2 * spacing
    stacked = torch.cat([scaling.channels(image), inputs.coordinates(shape, origin, spacing, box_lo, box_hi)])
    return Crop(stacked, inputs.conditions(spacing, box_lo, box_hi, modality), target)


def _undeformed(item: Any, centre: np.ndarray, spacing: float, shape: tuple[int, ...], full: np.ndarray) -> tuple[Tensor, Tensor]:
    image, labels, step = item.levels[0]
    for level in item.levels:
        if np.min(level[2]) * 1.3 <= spacing:
            image, labels, step = level
    lines = [torch.arange(n, dtype=torch.float32) * spacing + float(c - (n - 1) / 2 * spacing) for n, c in zip(shape, centre, strict=True)]
    where = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    inside = ((where >= 0) & (where < torch.tensor(full, dtype=torch.float32))).all(-1)
    unit = (where / torch.tensor(step * np.array(image.shape), dtype=torch.float32) * 2 - 1).flip(-1)[None]
    background = item.scaling.background
    picked = F.grid_sample(image.float()[None, None] - background, unit, padding_mode="border", align_corners=False)[0, 0] * inside
    chosen = F.grid_sample(labels.float()[None, None], unit, mode="nearest", padding_mode="border", align_corners=False)[0, 0] * inside
    return picked + background, chosen.round().long()


def _target(item: Any, labels: np.ndarray, name: str, rng: random.Random) -> np.ndarray | None:
    """The structure on the crop, now and then one part of it; None when there is too little of it."""
    target = np.isin(labels, item.structures[name])
    if np.count_nonzero(target) < LEAST_VOXELS:
        return None
    if rng.random() < 0.3:
        parts, count = ndimage.label(target)
        big = np.flatnonzero(np.bincount(parts.ravel())[1:] >= LEAST_VOXELS)
        if count > 1 and len(big):
            target = parts == 1 + int(rng.choice(list(big)))
    return target


# ------------------------------------------------------------------------------------------------------------------ a user


@dataclass
class User:
    """One simulated user of one target: what was asked so far, on `source`, a grid over the crop."""

    target: np.ndarray
    crop: Grid
    source: Grid
    boxes: tuple[Box2D | Box3D, ...] = ()
    points: list[Point] = field(default_factory=list)
    before: np.ndarray | None = None
    forget: bool = False

    def channels(self) -> Tensor:
        """The network's prompt channels."""
        boxes = () if self.forget else self.boxes
        points = tuple(self.points[-1:] if self.forget else self.points)
        return clicks.prompt_channels(self.crop, self.source, boxes=boxes, points=points, before=self.before)

    def click(self, found: np.ndarray, rng: random.Random | None) -> None:
        """The mask drawn, and a click at the deepest point of the largest error; rng: now and then of another error, or beside it."""
        careless = rng is not None and rng.random() < 0.3
        errors = error_points(found, self.target, (1.0, 1.0, 1.0), most=3 if careless else 1)
        self.before = found.astype(np.float32) if found.any() else None
        self.forget = rng is not None and bool(errors) and found.any() and rng.random() < FORGET
        if not errors:
            return
        zyx, positive = (rng.choice(errors) if careless else errors[0]) if rng is not None else errors[0]
        at = np.array(zyx, dtype=float)
        if rng is not None and rng.random() < 0.3:
            moved = np.clip(np.round(at + np.array([rng.gauss(0, 0.8) for _ in range(3)])), 0, np.array(found.shape) - 1)
            at = moved if self.target[tuple(moved.astype(int))] == positive else at
        z, y, x = (float(v) for v in self.source.to_voxel(self.crop.to_world(at)))
        self.points.append(Point((z, y, x), positive))


def new_user(target: np.ndarray, rng: random.Random, kind: str | None = None) -> User:
    """The first prompt; kind: of FIRST, drawn without one."""
    crop = Grid(target.shape, np.eye(4))
    kind = kind or rng.choices(list(FIRST), list(FIRST.values()))[0]
    user = User(target, crop, crop)
    if kind == "box2d":
        axis = rng.choices((0, 1, 2), (0.6, 0.2, 0.2))[0]
        thick = 1 if rng.random() < 0.6 else rng.randint(2, 4)
        user.source, user.boxes = _box(target, axis, thick, rng)
    elif kind == "box3d":
        lines = [np.flatnonzero(target.any(axis=tuple(i for i in range(3) if i != a))) for a in range(3)]
        edges = [(line[0], line[-1] + 1) for line in lines]
        noise = [[rng.gauss(0, 0.04 * (b - a)) for _ in (0, 1)] for a, b in edges]
        low, high = zip(*[(a + n[0], max(a + n[0] + 1, b + n[1])) for (a, b), n in zip(edges, noise, strict=True)], strict=True)
        user.boxes = (Box3D(low, high),)
    elif kind == "point":
        spots = np.argwhere(target)
        at = deepest(target, (1.0, 1.0, 1.0)) if rng.random() < 0.5 else spots[rng.randrange(len(spots))]
        user.points.append(Point(tuple(float(v) for v in at)))  # type: ignore[arg-type]
    elif kind == "slice":
        axis = rng.randrange(3)
        area = target.sum(axis=tuple(i for i in range(3) if i != axis))
        k = int(rng.choice(list(np.flatnonzero(area >= 0.5 * area.max()))))
        before = np.zeros(target.shape, np.float32)
        np.moveaxis(before, axis, 0)[k] = np.moveaxis(target, axis, 0)[k]
        user.before = before
        edges = [np.flatnonzero(np.moveaxis(target, axis, 0)[k].any(axis=1 - a)) for a in (0, 1)]
        low, high = (float(edges[0][0]), float(edges[1][0])), (float(edges[0][-1] + 1), float(edges[1][-1] + 1))
        user.boxes = (Box2D(axis, k, low, high),)
    else:
        damaged = damage(target, rng)
        user.before = damaged.astype(np.float32) if damaged.any() else None
        user.click(damaged, rng if rng.random() < 0.8 else None)
        if not damaged.any() and not any(p.positive for p in user.points):
            user.points = [Point(tuple(float(v) for v in deepest(target, (1.0, 1.0, 1.0))))]  # type: ignore[arg-type]
        if rng.random() < 0.3 and user.before is not None:
            user.points = []
    return user


def _box(target: np.ndarray, axis: int, thick: int, rng: random.Random) -> tuple[Grid, tuple[Box2D, ...]]:
    """A box on a slice of `thick` voxels, with 4 % jitter; one in six deliberately moved or of a wrong size."""
    area = target.sum(axis=tuple(i for i in range(3) if i != axis))
    k = int(area.argmax()) if rng.random() < 0.6 else int(rng.choice(list(np.flatnonzero(area >= 0.4 * area.max()))))
    slab = k // thick
    k = min(len(area) - 1, slab * thick + thick // 2)
    plane = np.moveaxis(target, axis, 0)[k]
    if not plane.any():
        k = int(area.argmax())
        slab, thick, plane = k, 1, np.moveaxis(target, axis, 0)[k]
    affine = np.eye(4)
    affine[2 - axis, 2 - axis], affine[2 - axis, 3] = thick, (thick - 1) / 2
    shape = list(target.shape)
    shape[axis] = max(1, shape[axis] // thick)
    spans = []
    for a in (0, 1):
        line = np.flatnonzero(plane.any(axis=1 - a))
        spans.append((float(line[0]), float(line[-1] + 1)))
    bad = rng.random()
    for a, (low, high) in enumerate(spans):
        size = high - low
        if bad < 0.08:
            move = rng.uniform(0.2, 0.5) * rng.choice((-1, 1)) * size
            low, high = low + move, high + move
        elif bad < 0.16:
            grow = size * ((0.55 if bad < 0.12 else 1.8) - 1) / 2
            low, high = low - grow, high + grow
        low = low + rng.gauss(0, 0.04 * size)
        spans[a] = (low, max(low + 1, high + rng.gauss(0, 0.04 * size)))
    box = Box2D(axis, slab, (spans[0][0], spans[1][0]), (spans[0][1], spans[1][1]))
    return Grid((shape[0], shape[1], shape[2]), affine), (box,)


def damage(target: np.ndarray, rng: random.Random) -> np.ndarray:
    """A mask with one to three faults: too large, too small, moved, half missing, something added."""
    out = target.copy()
    spots = np.argwhere(target)
    for _ in range(rng.randint(1, 3)):
        fault = rng.randrange(5)
        spot = spots[rng.randrange(len(spots))]
        if fault == 0:
            out = ndimage.binary_dilation(out, iterations=rng.randint(1, 3))
        elif fault == 1:
            out = ndimage.binary_erosion(out, iterations=rng.randint(1, 2))
        elif fault == 2:
            out = ndimage.shift(out.astype(np.uint8), [rng.randint(-4, 4) for _ in range(3)], order=0) > 0
        elif fault == 3:
            normal = np.array([rng.gauss(0, 1) for _ in range(3)])
            away = sum((g - c) * n for g, c, n in zip(np.ogrid[tuple(map(slice, out.shape))], spot, normal, strict=True))
            out = out & (np.broadcast_to(away, out.shape) < 0)
        else:
            radius = [rng.uniform(2, 7) for _ in range(3)]
            centre = spot + np.array([rng.gauss(0, 4) for _ in range(3)])
            ball = sum(((g - c) / r) ** 2 for g, c, r in zip(np.ogrid[tuple(map(slice, out.shape))], centre, radius, strict=True))
            out = out | np.broadcast_to(ball < 1, out.shape)
    return out


# ---------------------------------------------------------------------------------------------------------------- training


def loss_of(logits: Tensor, truth: Tensor, prompts: Tensor) -> Tensor:
    """Soft Dice and cross-entropy (weighed five times at clicks), mean over the batch."""
    p = torch.sigmoid(logits)
    both, total = (p * truth).sum((1, 2, 3)), (p + truth).sum((1, 2, 3))
    weight = 1 + 4 * prompts[:, :2].amax(1)
    entropy = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight).mean((1, 2, 3))
    return (1 - (2 * both + 1) / (total + 1) + 2 * entropy).mean()


def encoded(encoder: NanoNetwork, names: Tensor, crops: list[Crop]) -> tuple[Tensor, list[Tensor], list[clicks.Concepts]]:
    """Windows (B, 2, ...), features of the frozen encoder, and what the known names look like on each crop."""
    with torch.no_grad():
        image = torch.stack([c.image for c in crops]).contiguous(memory_format=torch.channels_last_3d)
        features, pooled = encoder.image(image, torch.stack([c.conditions for c in crops]))
    concepts = [
        clicks.Concepts(encoder, [f[k : k + 1] for f in features], pooled[k : k + 1], image[k : k + 1, clicks.WINDOWS :], names)
        for k in range(len(crops))
    ]
    return image[:, : clicks.WINDOWS], features, concepts


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


def channels_of(users: list[User]) -> Tensor:
    return torch.stack([user.channels() for user in users]).contiguous(memory_format=torch.channels_last_3d)


class Validation:
    """Fixed crops of validation cases and of phantoms that training never drew; a careful user, box first, four clicks."""

    def __init__(self, cache: Path, data: Path | None) -> None:
        rng = random.Random(7)
        groups: dict[str, list[Any]] = {"hippocampus": [], "phantoms": text.phantom_items(8, cache / "phantoms", first_seed=900)}
        if data and (data / "mr_hippocampus").is_dir():
            cases = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())["folds"][0]["val"]
            groups["hippocampus"] = text.hippocampus_items(data / "mr_hippocampus", cases)
            for item in groups["hippocampus"]:
                del item.structures["hippocampus"]
        self.crops: list[tuple[str, list[Crop]]] = []
        for group, items in groups.items():
            made = [crop for item in items if (crop := draw_crop(item, (48, 32, 32), rng, plain=True)) is not None]
            by_shape: dict[tuple[int, ...], list[Crop]] = {}
            for crop in made:
                by_shape.setdefault(tuple(crop.image.shape), []).append(crop)
            self.crops += [(group, some) for some in by_shape.values()]

    @torch.no_grad()
    def run(self, encoder: NanoNetwork, names: Tensor, network: clicks.ClickNetwork) -> dict[str, list[float]]:
        """Mean Dice after each of five turns, per group."""
        rows: dict[str, list[list[float]]] = {}
        for group, crops in self.crops:
            windows, features, concepts = encoded(encoder, names, crops)
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


def batch(pools: dict[str, list[Any]], rng: random.Random) -> list[Crop]:
    """Two crops of one shape."""
    out: list[Crop] = []
    shape = rng.choices(SHAPES, SHAPE_ODDS)[0]
    groups = [g for g in SHARES if pools.get(g)]
    while len(out) < 2:
        pool = pools[rng.choices(groups, [SHARES[g] for g in groups])[0]]
        crop = draw_crop(rng.choices(pool, [item.weight for item in pool])[0], shape, rng)
        if crop is not None and (not out or crop.image.shape == out[0].image.shape):
            out.append(crop)
    return out


def train(args: argparse.Namespace) -> None:
    """Until `--minutes` of wall clock have passed."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.txt").open("a", buffering=1)

    def say(line: str) -> None:
        print(line, flush=True)
        log.write(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}\n")

    segmenter = NanoSegmenter.load(source=args.encoder)
    encoder, names = segmenter._network, segmenter._embedded_vocabulary()[1]
    items = text.training_items(args.cache, args.data, args.phantoms)
    pools: dict[str, list[Any]] = {}
    for item in items:
        pools.setdefault(item.group, []).append(item)
    validation = Validation(args.cache, args.data)
    say(f"{len(items)} items: " + ", ".join(f"{k} {len(v)}" for k, v in pools.items()))
    network = clicks.ClickNetwork(clicks.ClickConfig()).to(memory_format=torch.channels_last_3d)
    if args.start:
        network.load_state_dict(torch.load(args.start, weights_only=True)["network"])
    average = clicks.ClickNetwork(clicks.ClickConfig()).to(memory_format=torch.channels_last_3d)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-2, betas=(0.9, 0.98))
    say(f"{sum(p.numel() for p in network.parameters())} parameters")
    begun = checked = time.time()
    cpu = time.process_time()
    updates, seen, best = 0, 0, -1.0
    running: dict[int, list[float]] = {}
    while (share := (time.time() - begun) / (args.minutes * 60)) < 1:
        crops = batch(pools, rng)
        windows, features, concepts = encoded(encoder, names, crops)
        sight = network.sight(features)
        users = [new_user(crop.target, rng) for crop in crops]
        usable = [usable_names(known, crop.target, rng) for known, crop in zip(concepts, crops, strict=True)]
        truth = torch.stack([torch.from_numpy(user.target.astype(np.float32)) for user in users])
        seen += len(users)
        for turn in range(turns := rng.choices(TURNS, TURN_ODDS)[0]):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (updates + 1) / 60) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
            prompts = channels_of(users)
            concept = torch.stack([known.best(one, may) for known, one, may in zip(concepts, prompts, usable, strict=True)])
            logits = network(windows, sight, prompts, concept)
            loss = loss_of(logits, truth, prompts)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
                updates += 1
                keep = min(0.995, updates / (updates + 9))
                with torch.no_grad():
                    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                        mean.lerp_(value, 1 - keep)
            running.setdefault(turn, []).append(loss.item())
            if turn + 1 < turns:
                found = (logits.detach() > 0).numpy()
                for user, mask in zip(users, found, strict=True):
                    user.click(mask, rng)
        if seen % 80 < len(users):
            used = (time.process_time() - cpu) / 60
            losses = " ".join(f"{np.mean(v[-60:]):.3f}" for _, v in sorted(running.items()))
            say(f"{(time.time() - begun) / 60:.1f} min (cpu {used:.1f}) updates {updates} targets {seen} loss by turn {losses}")
        if time.time() - checked > args.validate_minutes * 60:
            best = max(best, _validated(args, validation, (encoder, names), average, best, updates, say))
            checked = time.time()
    _validated(args, validation, (encoder, names), average, best, updates, say)
    minutes = (time.process_time() - cpu) / 60
    say(f"end: {updates} updates, {seen} targets, {minutes:.1f} min of CPU, {(time.time() - begun) / 60:.1f} min of wall clock")


def _validated(
    args: argparse.Namespace,
    validation: Validation,
    eyes: tuple[NanoNetwork, Tensor],
    network: clicks.ClickNetwork,
    best: float,
    updates: int,
    say: Any,
) -> float:
    """The score: mean over groups of the mean Dice over turns, hippocampus twice. Kept as last.pt, and best.pt when it is the best."""
    scores = validation.run(*eyes, network)
    score = float(np.average([np.mean(v) for v in scores.values()], weights=[2 if k == "hippocampus" else 1 for k in scores]))
    say(f"validation {score:.4f} " + "; ".join(f"{k} " + " ".join(f"{v:.3f}" for v in values) for k, values in scores.items()))
    state = {"network": network.state_dict(), "updates": updates, "scores": scores}
    for name in ["last.pt", *(["best.pt"] if score > best else [])]:
        torch.save(state, args.out / "tmp")
        os.replace(args.out / "tmp", args.out / name)
    return score


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
    one.add_argument("--cache", type=Path, required=True)
    one.add_argument("--data", type=Path)
    one.add_argument("--minutes", type=float, default=40)
    one.add_argument("--validate_minutes", type=float, default=8)
    one.add_argument("--lr", type=float, default=1.5e-3)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--phantoms", type=int, default=24)
    one.add_argument("--start", type=Path, help="begin with the weights of another run")
    two = verbs.add_parser("export")
    two.add_argument("--checkpoint", default="best.pt")
    two.add_argument("--to", type=Path, required=True)
    for verb in (one, two):
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--encoder", type=Path, default=SHIPPED, help="folder of the text network whose image encoder is used")
    args = parser.parse_args()
    {"train": train, "export": export}[args.verb](args)


if __name__ == "__main__":
    main()
