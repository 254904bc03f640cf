"""What the nano reasoner gives beside the lexicon and the words as they are: exact answers by style, and Dice with the frozen segmenter.

    python scripts/bench_nano_reasoner.py --raw RAW/mr_hippocampus [--cases val] [--language val] [--limit N] [--reasoners nano lexicon]
    python scripts/bench_nano_reasoner.py --chest FOLDER

The first form takes the MSD hippocampus set by the committed split (fold 0) and 16 paraphrases per case and target, one of each style, in
the language of one split; the lexicon knows training vocabulary only. Worst is the mean over (case, target) of the worst paraphrase, std
their spread (ddof 0). The second form writes the sample `ct_chest` into FOLDER and asks its 16 requests with its own closed list of names.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerseg.dataset import open_dataset
from seerseg.episode import Targets, solve
from seerseg.metrics import bootstrap_interval, dice, over_paraphrases
from seerseg.protocols import load_protocol
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners import load_reasoner
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.views import render
from seerseg.vocabulary import Vocabulary
from seerseg.volume import read_labels, read_volume
from seerseg_data.requests import Context, paraphrase_set
from seerseg_data.samples import make_sample

SPLIT = Path(__file__).resolve().parents[1] / "seerseg_data" / "splits" / "hippocampus.json"
NAMES = ("anterior hippocampus", "posterior hippocampus")
PARAPHRASES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="the hippocampus dataset folder")
    parser.add_argument("--chest", type=Path, help="where the sample ct_chest is written")
    parser.add_argument("--cases", default="val", choices=("val", "test"))
    parser.add_argument("--language", default="val", choices=("train", "val", "test"))
    parser.add_argument("--limit", type=int, default=None, help="only so many cases")
    parser.add_argument("--full_list", action="store_true", help="list every name of the segmenter instead of the two parts")
    parser.add_argument("--reasoners", nargs="+", default=["nano", "lexicon", "verbatim"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reasoners = {name: open_reasoner(name) for name in arguments.reasoners}
    segmenter = CachedSegmenter(load_segmenter("nano"))
    if arguments.raw:
        hippocampus(arguments, reasoners, segmenter)
    if arguments.chest:
        chest(arguments.chest, reasoners, segmenter)


def open_reasoner(name: str) -> Any:
    return load_reasoner(name, splits=["train"]) if name == "lexicon" else load_reasoner(name)


def hippocampus(arguments: argparse.Namespace, reasoners: dict[str, Any], segmenter: Any) -> None:
    dataset, vocabulary = open_dataset(arguments.raw), Vocabulary.load()
    splits = json.loads(SPLIT.read_text(encoding="utf-8"))
    cases = (splits["test"] if arguments.cases == "test" else splits["folds"][0]["val"])[: arguments.limit]
    names = segmenter.capabilities.vocabulary if arguments.full_list else NAMES
    targets = Targets(tuple(names), closed=not arguments.full_list)
    protocol = load_protocol("seer")
    context = Context(modality="MR", region="head", names=NAMES, unsided=True)
    scores: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in reasoners}
    right: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in reasoners}
    seconds: dict[str, float] = defaultdict(float)
    for case in cases:
        files = dataset.cases[case]
        volume = read_volume(files.images[0], modality="MR")
        labels, _ = read_labels(files.label, like=volume.grid)
        views = render(volume, protocol.view_spec)
        asked = {
            target: paraphrase_set(
                target, split=arguments.language, count=PARAPHRASES, seed=f"bench|{case}", vocabulary=vocabulary, context=context
            )
            for target in NAMES
        }
        texts = [made.text for target in NAMES for made in asked[target]]
        for name, reasoner in reasoners.items():
            started = time.perf_counter()
            episodes = iter(solve(views, volume, texts, protocol=protocol, reasoner=reasoner, segmenter=segmenter, targets=targets))
            seconds[name] += time.perf_counter() - started
            for target in NAMES:
                truth = np.isin(labels, dataset.labels[target])
                drawn = []
                for made in asked[target]:
                    episode = next(episodes)
                    mask = episode.mask.array if episode.mask is not None else np.zeros_like(truth)
                    drawn.append(dice(mask, truth) or 0.0)
                    right[name][made.style].append(normalise_name(episode.target or "") == target)
                scores[name][case, target] = drawn
    print(f"MSD hippocampus: {len(cases)} {arguments.cases} cases, {arguments.language} language, {len(names)} names listed")
    for name, found in scores.items():
        spreads = {key: over_paraphrases(values) for key, values in found.items()}
        mean, worst = ({key: getattr(spread, what) for key, spread in spreads.items()} for what in ("mean", "worst"))
        print(
            f"{name:10} requests {sum(map(len, found.values()))}  exact {np.mean([r for v in right[name].values() for r in v]):.3f}  "
            f"Dice {said(dataset, mean)}  worst {said(dataset, worst)}  "
            f"std {np.mean([s.std for s in spreads.values()]):.3f}  {seconds[name] / len(cases):.2f} s a case"
        )
        print("           exact by style: " + "  ".join(f"{style} {np.mean(values):.2f}" for style, values in right[name].items()))


def said(dataset: Any, values: dict[tuple[str, str], float]) -> str:
    """Mean and its interval by subject."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for (case, _), value in values.items():
        by_subject[dataset.subject_of[case]].append(value)
    interval = bootstrap_interval(by_subject)
    return f"{np.mean(list(values.values())):.3f}" + (f" ({interval.lo:.3f} to {interval.hi:.3f})" if interval else "")


def chest(folder: Path, reasoners: dict[str, Any], segmenter: Any) -> None:
    place = make_sample("ct_chest", folder)
    dataset = open_dataset(place)
    case = next(iter(dataset.cases))
    volume = read_volume(dataset.cases[case].images[0], modality="CT")
    requests = [json.loads(line) for line in (place / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    requests = [r for r in requests if "text" in r]
    names = tuple(name for name in dataset.labels if name != "background")
    views = render(volume, load_protocol("seer").view_spec)
    texts = [r["text"] for r in requests]
    print(f"ct_chest: {len(texts)} requests, {len(names)} names listed")
    for name, reasoner in reasoners.items():
        started = time.perf_counter()
        episodes = solve(
            views,
            volume,
            texts,
            protocol=load_protocol("seer"),
            reasoner=reasoner,
            segmenter=segmenter,
            targets=Targets(names, closed=True),
        )
        spent = time.perf_counter() - started
        wanted = [r["target"] or "absent" for r in requests]
        found = ["absent" if e.status == "absent" and e.absent_by == "reasoner" else normalise_name(e.target or "") for e in episodes]
        print(f"{name:10} exact {sum(a == b for a, b in zip(found, wanted, strict=True))} of {len(texts)}, {spent:.1f} s")
        for request, want, have in zip(texts, wanted, found, strict=True):
            if want != have:
                print(f"           {want!r} asked as {request!r}: {have!r}")


if __name__ == "__main__":
    main()
