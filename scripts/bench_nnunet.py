#!/usr/bin/env python
"""A user's own nnU-Net behind the seam: a small one trained here on the hippocampus set, then asked in free text.

nnU-Net's own planner plans the training cases (its spacing, normalisation, patch), its preprocessor prepares them, its network class
is trained by a short loop (few channels, one core, minutes) and left as a model folder of its layout. Then the test cases: label
prompts; free text through the lexicon (training vocabulary, and beside it the whole one); through the shipped reasoner. Mean, worst,
standard deviation over wordings, intervals by subject, as in reproduce_mini.py, whose requests and preprocessed folders are used.

    python scripts/bench_nnunet.py OUT --minutes 15 --only train        needs the package nnunetv2
    python scripts/bench_nnunet.py OUT --reproduction FOLDER            FOLDER: what reproduce_mini.py left
    python scripts/bench_nnunet.py OUT --reproduction FOLDER --model MY_TRAINED_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPLIT = ROOT / "seerseg_data" / "splits" / "hippocampus.json"
NAME = "Dataset004_Hippocampus"
FOLD = 0
WIDTHS = (16, 32, 64, 128)
"""Channels per stage: half of nnU-Net's, and no more stages than these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mr_hippocampus")
    parser.add_argument("--model", type=Path, help="a trained nnU-Net folder (default: the one that training leaves in OUT)")
    parser.add_argument("--minutes", type=float, default=15, help="wall clock of the training")
    parser.add_argument("--reproduction", type=Path, help="the folder of a finished reproduce_mini.py")
    parser.add_argument("--only", choices=("train", "table"))
    parser.add_argument("--limit", type=int, help="only so many test cases (for trying the script)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val for development")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    folder = given.model or given.out / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    if given.only != "table" and given.model is None and not (folder / f"fold_{FOLD}" / "checkpoint_final.pth").exists():
        train(given.data, given.out, folder, minutes=given.minutes)
    if given.only != "train":
        if given.reproduction is None:
            raise SystemExit("Give the folder that reproduce_mini.py left with --reproduction: its requests are asked.")
        table(given, folder)


def train(data: Path, out: Path, folder: Path, *, minutes: float) -> None:
    """Plans, preprocesses and trains on the training cases of fold 0; a checkpoint, validated on eight cases, every two minutes."""
    import torch

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    split = json.loads(SPLIT.read_text())
    training, validation = split["folds"][FOLD]["train"], split["folds"][FOLD]["val"][:8]
    plan, described = planned(data, out / "nnunet", training)
    configuration = plan["configurations"]["3d_fullres"]
    patch = tuple(configuration["patch_size"])
    learned, kept = (prepared(data, plan, described, cases) for cases in (training, validation))
    network = build(plan, described).to(memory_format=torch.channels_last_3d)
    print(f"{len(learned)} cases, patch {patch}, {sum(p.numel() for p in network.parameters())} parameters", flush=True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    began, step, saved = time.time(), 0, 0.0
    while (used := time.time() - began) < 60 * minutes:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - used / (60 * minutes)) ** 0.9
        images, labels = batch(learned, patch, rng)
        loss = loss_of(network(torch.from_numpy(images).contiguous(memory_format=torch.channels_last_3d)), torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()
        step += 1
        if used - saved > 120:
            saved = used
            print(f"{step} steps, {used:.0f} s, loss {loss.item():.3f}, val Dice {validate(network, kept, patch)}", flush=True)
            save(network, plan, described, folder)
    save(network, plan, described, folder)
    print(f"{step} steps, {time.time() - began:.0f} s, val Dice {validate(network, kept, patch)}: {folder}", flush=True)


def planned(data: Path, work: Path, cases: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnU-Net's own plans and dataset.json of these cases, narrowed to WIDTHS."""
    folders = {name: work / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    os.environ |= {name: str(path) for name, path in folders.items()}
    raw = folders["nnUNet_raw"] / NAME
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True, exist_ok=True)
        for case in cases:
            file = f"{case}_0000.nii.gz" if part == "imagesTr" else f"{case}.nii.gz"
            if not (raw / part / file).exists():
                (raw / part / file).symlink_to((data / part / file).resolve())
    described = {**json.loads((data / "dataset.json").read_text()), "numTraining": len(cases)}
    (raw / "dataset.json").write_text(json.dumps(described))
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    extract_fingerprints([4], num_processes=1, check_dataset_integrity=False, clean=False)
    plan_experiments([4])
    plan = json.loads((folders["nnUNet_preprocessed"] / NAME / "nnUNetPlans.json").read_text())
    configuration = plan["configurations"]["3d_fullres"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    stages = min(len(WIDTHS), kwargs["n_stages"])
    kwargs |= {"n_stages": stages, "features_per_stage": list(WIDTHS[:stages]), "n_conv_per_stage_decoder": [1] * (stages - 1)}
    kwargs |= {key: kwargs[key][:stages] for key in ("kernel_sizes", "strides", "n_conv_per_stage")}
    plan["configurations"] = {"3d_fullres": configuration}
    return plan, described


def prepared(data: Path, plan: dict[str, Any], described: dict[str, Any], cases: Sequence[str]) -> list[tuple[Any, Any]]:
    """Each case as nnU-Net's preprocessor makes it: image float32 and labels int64, both of its (Z, Y, X)."""
    import copy

    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(copy.deepcopy(plan))
    configuration = manager.get_configuration("3d_fullres")
    preprocessor, reader = configuration.preprocessor_class(verbose=False), manager.image_reader_writer_class()
    made = []
    for case in cases:
        image, properties = reader.read_images([str(data / "imagesTr" / f"{case}_0000.nii.gz")])
        labels, _ = reader.read_seg(str(data / "labelsTr" / f"{case}.nii.gz"))
        image, labels, _ = preprocessor.run_case_npy(image, labels, dict(properties), manager, configuration, described)
        made.append((image[0].astype(np.float32), np.maximum(labels[0], 0).astype(np.int64)))
    return made


def build(plan: dict[str, Any], described: dict[str, Any]) -> Any:
    """The network of the plans, untrained."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    made = plan["configurations"]["3d_fullres"]["architecture"]
    arguments = (made["network_class_name"], made["arch_kwargs"], made["_kw_requires_import"], 1, len(described["labels"]))
    return get_network_from_plans(*arguments, deep_supervision=False)


def fitted(array: Any, patch: tuple[int, ...]) -> Any:
    """Padded with 0 or cropped about the centre to the patch."""
    out = np.zeros(patch, array.dtype)
    to, of = [], []
    for size, wanted in zip(array.shape, patch, strict=True):
        shared, start = min(size, wanted), abs(size - wanted) // 2
        to.append(slice(start, start + shared) if size <= wanted else slice(0, shared))
        of.append(slice(0, shared) if size <= wanted else slice(start, start + shared))
    out[tuple(to)] = array[tuple(of)]
    return out


def batch(cases: Sequence[tuple[Any, Any]], patch: tuple[int, ...], rng: np.random.Generator) -> tuple[Any, Any]:
    """Two cases: mirrored, shifted, scaled in intensity, with noise. Images (2, 1, Z, Y, X), labels (2, Z, Y, X)."""
    images, labels = [], []
    for _ in range(2):
        image, label = (fitted(part, patch) for part in cases[rng.integers(len(cases))])
        if rng.random() < 0.5:
            image, label = image[:, :, ::-1], label[:, :, ::-1]
        shift = tuple(int(s) for s in rng.integers(-4, 5, 3))
        image, label = np.roll(image, shift, (0, 1, 2)), np.roll(label, shift, (0, 1, 2))
        noise = rng.normal(0, rng.uniform(0, 0.15), image.shape)
        images.append((image * rng.uniform(0.8, 1.25) + rng.uniform(-0.2, 0.2) + noise).astype(np.float32))
        labels.append(label)
    return np.stack(images)[:, None], np.stack(labels)


def loss_of(logits: Any, labels: Any) -> Any:
    """Cross entropy plus one minus batch Dice of the classes."""
    import torch

    chances = logits.softmax(1)
    truth = torch.nn.functional.one_hot(labels, logits.shape[1]).permute(0, 4, 1, 2, 3).float()
    over = (0, 2, 3, 4)
    dice = (2 * (chances * truth).sum(over) + 1) / (chances.sum(over) + truth.sum(over) + 1)
    return torch.nn.functional.cross_entropy(logits, labels) + 1 - dice[1:].mean()


def validate(network: Any, cases: Sequence[tuple[Any, Any]], patch: tuple[int, ...]) -> list[float]:
    """Mean Dice per class."""
    import torch

    network.eval()
    scores = []
    with torch.inference_mode():
        for image, label in cases:
            mask, label = network(torch.from_numpy(fitted(image, patch))[None, None]).argmax(1)[0].numpy(), fitted(label, patch)
            scores.append([2 * ((mask == k) & (label == k)).sum() / max(1, (mask == k).sum() + (label == k).sum()) for k in (1, 2)])
    network.train()
    return [round(float(s), 3) for s in np.mean(scores, axis=0)]


def save(network: Any, plan: dict[str, Any], described: dict[str, Any], folder: Path) -> None:
    """plans.json, dataset.json and fold_0/checkpoint_final.pth, as nnU-Net's trainer leaves them."""
    import torch

    (folder / f"fold_{FOLD}").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(described))
    kept = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
        "current_epoch": 1,
        "init_args": {"plans": plan, "configuration": "3d_fullres", "fold": FOLD, "dataset_json": described, "device": "cpu"},
    }
    file = folder / f"fold_{FOLD}" / "checkpoint_final.pth"
    torch.save(kept, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def table(given: argparse.Namespace, folder: Path) -> None:
    """OUT/table.md and OUT/table.json: what stands before the nnU-Net, row by row."""
    from reproduce_mini import paired, summary

    from seerseg.dataset import label_prompts, load_splits, open_dataset
    from seerseg.evolution.arena import StoreArena, bare
    from seerseg.model import Model, ModelSpec
    from seerseg.paths import write_json
    from seerseg.planning import load_plans
    from seerseg.reasoners import load_reasoner
    from seerseg.segmenters import load_segmenter
    from seerseg.segmenters.cache import CachedSegmenter

    dataset, stored = open_dataset(given.reproduction / "raw" / NAME), given.reproduction / "preprocessed" / NAME
    splits = load_splits(stored / "splits.json", dataset)
    chosen = splits.test if given.split == "test" else splits.folds[FOLD].val
    cases = list(chosen)[: given.limit]
    free = [r for r in dataset.requests if r.case in set(cases) and r.has_target and r.style != "label_prompt"]
    segmenter = CachedSegmenter(load_segmenter(f"nnunet:{folder}"))
    names, views = tuple(dataset.canonical(label) for label in dataset.labels), load_plans(stored / "plans.json").view_spec()
    told = ModelSpec(views=views, targets=names, closed=True, descriptions=dataset.descriptions or None)
    asked_as_it_is = ModelSpec(views=views, targets=names)  # any words reach the segmenter, which says what it does not know
    rows: list[dict[str, Any]] = []

    def add(name: str, spec: ModelSpec, reasoner: Any, requests: Sequence[Any]) -> None:
        began = time.time()
        model = Model(spec, reasoner_given=reasoner, segmenter_given=segmenter)
        arena = StoreArena(dataset, stored, model)
        made = summary(name, bare(arena, requests), requests, dataset, "none")
        rows.append({**made, "seconds": round(time.time() - began, 1)})
        print(f"{name:36} mean {made['mean']:.3f} worst {made['worst']:.3f} std {made['std']:.3f}  {rows[-1]['seconds']} s", flush=True)

    add("nnU-Net alone, label prompts", told, load_reasoner("verbatim"), label_prompts(dataset, cases))
    add("nnU-Net alone, free text", asked_as_it_is, load_reasoner("verbatim"), free)
    described = dataset.descriptions
    add("lexicon, training vocabulary", told, load_reasoner("lexicon", splits=["train"], descriptions=described), free)
    add("lexicon, whole vocabulary", told, load_reasoner("lexicon", descriptions=described), free)
    add("nano reasoner as shipped", told, load_reasoner("nano"), free)
    scores = {row["name"]: row["_scores"] for row in rows}
    order = [row["name"] for row in rows][1:]
    differences = [paired(scores, earlier, "nano reasoner as shipped", dataset.subject_of) for earlier in order[:-1]]
    plain = [{key: value for key, value in row.items() if key != "_scores"} for row in rows]
    write_json(given.out / "table.json", {"rows": plain, "differences": differences, "segmenter": segmenter.card.to_json()})
    (given.out / "table.md").write_text(written(plain, differences, f"MSD hippocampus, {given.split} cases, {given.split} language"))
    print((given.out / "table.md").read_text())


def written(rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], title: str) -> str:
    """The table as Markdown."""
    heads = ("row", "mean Dice (95 %)", "worst (95 %)", "std (95 %)", "variance", "absent right", "cases", "requests", "s")
    lines = [f"{title}; nnU-Net trained here on fold {FOLD}; bank none; intervals by subject.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row["name"], *(_with(row[part], row[ci]) for part, ci in (("mean", "ci95"), ("worst", "worst_ci95"), ("std", "std_ci95")))]
        absent = "-" if row["absent_right"] is None else f"{row['absent_right']:.2f} of {row['n_absent']}"
        numbers = (f"{row['variance']:.4f}", absent, str(row["n_cases"]), str(row["n_requests"]), f"{row['seconds']:.0f}")
        lines.append("| " + " | ".join([*cells, *numbers]) + " |")
    lines += ["", "Paired differences (later minus earlier), 95 % by subject:", ""]
    for found in differences:
        parts = ", ".join(f"{part} {_with(*found[part])}" for part in ("mean", "worst", "std"))
        lines.append(f"- {found['later']} against {found['earlier']}: {parts}")
    return "\n".join(lines) + "\n"


def _with(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


if __name__ == "__main__":
    main()
