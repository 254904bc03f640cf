#!/usr/bin/env python
"""Opening and searching a large skill bank, and what a sentence encoder finds that words do not.

    python scripts/bench_bank.py [--skills 100000] [--queries 300]
    python scripts/bench_bank.py --held_out [--encoder FOLDER] [--seeds 3]

Skills are made from the vocabulary's own forms with made-up words added, three phrases each; queries hold a form in a sentence.
Prints CPU seconds to write, to open the first time (the index is made) and again, and CPU milliseconds a request. The limits: 3 s, 10 ms.

--held_out: a skill for three of five structures of the vocabulary, from its training-language forms but one. Asked in a sentence with a
form of the skill, with one that has a slip, or with the form that was held out, the structure's skill is right; asked with a form of a
structure without a skill, nothing is. Scale, margin and threshold are fitted (`calibrate`, F0.5) on half of the structures, and measured on
the other half.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from seerseg.skills.base import Query, Skill
from seerseg.skills.retrieval import ENCODED, FrozenBank, SkillIndex, Weights, calibrate
from seerseg.skills.store import BankFolder
from seerseg.vocabulary import Vocabulary, words

TAGS = ("ABBR_DISAMBIGUATE", "MESSY_INPUT_REPAIR", "VERBOSE_PRUNE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skills", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--held_out", action="store_true")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.held_out:
        held_out(given.encoder, given.seeds)
        return
    rng = random.Random(0)
    forms = [(entry.name, surface.text) for entry in Vocabulary.load() for surface in entry.surfaces]
    skills = [made(i, rng, forms) for i in range(given.skills)]
    with tempfile.TemporaryDirectory() as folder:
        bank = BankFolder(Path(folder))
        began = time.process_time()
        bank.change(lambda now: {s.id: s for s in skills}, "bench")
        written = time.process_time()
        FrozenBank.open(Path(folder))
        indexed = time.process_time()
        frozen = FrozenBank.open(Path(folder))
        opened = time.process_time()
        took, right = [], 0
        for _ in range(given.queries):
            name, form = rng.choice(forms)
            query = Query(f"please outline the {form} for me, thank you so much")
            start = time.process_time()
            found = frozen.retrieve(query, 3)
            took.append(1e3 * (time.process_time() - start))
            right += any(s.target == name for s in found)
    print(
        f"{len(skills)} skills, three phrases each: written in {written - began:.1f} s, opened the first time in {indexed - written:.1f} s"
    )
    print(f"opened again in {opened - indexed:.2f} s (limit 3)")
    print(f"a request: median {np.median(took):.2f} ms, 99th percentile {np.quantile(took, 0.99):.2f} ms (limit 10)")
    print(f"the asked structure among the three shown: {right} of {given.queries}")


SENTENCES = (
    "please outline the {}", "{}", "can you segment {} on this one, thanks", "where is the {}?", "contour {} for planning",
    "need volume of the {} for the report", "72F, follow-up: mark {}", "just the {} and nothing else",
)  # fmt: skip
KINDS = ("a known form", "one with a slip", "a form held out")
Example = tuple[Query, frozenset[str], str]


def held_out(folder: Path | None, seeds: int) -> None:
    """The table of `--held_out`, means over seeds."""
    from seerseg.skills.encoder import SentenceEncoder

    encoder = Remembered(SentenceEncoder(folder)) if folder is not None else None
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(seeds):
        skills, fit, measure = world(seed)
        plain = SkillIndex.of(skills)
        rows.setdefault("words, as shipped", []).append((*measured(plain, Weights(), None, measure), 0.0, Weights().threshold))
        ways: list[tuple[str, Any, tuple[Weights, ...]]] = [("words, fitted", None, (Weights(),))]
        if encoder is not None:
            scales = tuple(replace(ENCODED, scale=a, margin=m) for a in (0.34, 0.7, 1.0) for m in (0.0, 0.02))
            ways.append(("words or meaning", encoder, scales))
            ways.append(("meaning alone", encoder, (Weights(lexical=0.0, cosine=0.0),)))
        for name, encode, tried in ways:
            index = plain if encode is None else plain.embedded(encode)
            best = max(
                (calibrate(index, ((q, ids) for q, ids, _ in fit), w, encoder=encode) for w in tried),
                key=lambda w: measured(index, w, encode, fit)[-2],
            )
            rows.setdefault(name, []).append((*measured(index, best, encode, measure), best.scale, best.threshold))
        if encoder is not None:
            shipped = (*measured(plain.embedded(encoder), ENCODED, encoder, measure), ENCODED.scale, ENCODED.threshold)
            rows.setdefault("either, as shipped", []).append(shipped)
    print(f"{'':20} precision  recall of {'  '.join(KINDS)}  shown for nothing  F0.5  ms a request   scale  threshold")
    for name, found in rows.items():
        precision, *recalls, idle, score, took, scale, cut = np.mean(found, axis=0)
        each = "  ".join(f"{r:{len(kind)}.3f}" for r, kind in zip(recalls, KINDS, strict=True))
        print(f"{name:20} {precision:9.3f}            {each} {idle:18.3f} {score:5.3f} {took:13.2f} {scale:7.2f} {cut:10.3f}")
    if encoder is not None:
        print(f"the encoder takes {1e3 * encoder.seconds / len(encoder.known):.1f} ms of CPU a text, beside that")


class Remembered:
    """An encoder that is asked once for each text; its own milliseconds a text."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.known, self.seconds = encoder, {}, 0.0

    def __call__(self, texts: Any) -> Any:
        fresh = [t for t in dict.fromkeys(texts) if t not in self.known]
        started = time.process_time()
        if fresh:
            self.known |= dict(zip(fresh, self.encoder(fresh), strict=True))
        self.seconds += time.process_time() - started
        return np.stack([self.known[t] for t in texts])


def world(seed: int) -> tuple[list[Skill], list[Example], list[Example]]:
    """Skills, examples to fit on, examples to measure on."""
    rng = random.Random(seed)
    skills: list[Skill] = []
    halves: tuple[list[Example], list[Example]] = ([], [])
    vocabulary = Vocabulary.load()
    meant = Counter(" ".join(words(text)) for entry in vocabulary for text in entry.texts(splits=("train",)))
    for entry in vocabulary:
        forms = [t for t in entry.texts(splits=("train",)) if t != entry.name and meant[" ".join(words(t))] == 1]
        if entry.side is not None or entry.members or len(forms) < 2:
            continue  # what is said of both sides alike has no one answer
        half = halves[rng.random() < 0.5]
        asked = rng.choice(forms)
        if rng.random() < 0.6:
            known = tuple(t for t in (entry.name, *forms) if t != asked)[:24]
            skills.append(Skill("", TAGS[0], f"the request says {known[0]}", f"answer {entry.name}", words=known, target=entry.name))
            ids, said = frozenset({skills[-1].id}), (rng.choice(known), slip(rng.choice(known), rng), asked)
            half += [(Query(rng.choice(SENTENCES).format(t)), ids, kind) for t, kind in zip(said, KINDS, strict=True)]
        else:
            half.append((Query(rng.choice(SENTENCES).format(asked)), frozenset(), ""))
    return skills, halves[0], halves[1]


def slip(text: str, rng: random.Random) -> str:
    """Two letters exchanged."""
    place = rng.randrange(max(1, len(text) - 1))
    return text[:place] + text[place + 1 : place + 2] + text[place : place + 1] + text[place + 2 :]


def measured(index: SkillIndex, weights: Weights, encoder: Any, examples: list[Example]) -> tuple[float, ...]:
    """Precision, recall by kind, share of requests without a skill that are shown one, F0.5, milliseconds a request."""
    started = time.process_time()
    found = [index.search(query, weights, 1, encoder) for query, _, _ in examples]
    took = 1e3 * (time.process_time() - started) / len(examples)
    right = [bool(f) and f[0].skill.id in ids for f, (_, ids, _) in zip(found, examples, strict=True)]
    recalls = [np.mean([r for r, (_, _, kind) in zip(right, examples, strict=True) if kind == wanted]) for wanted in KINDS]
    idle = np.mean([bool(f) for f, (_, ids, _) in zip(found, examples, strict=True) if not ids])
    precision, recall = sum(right) / max(1, sum(map(bool, found))), sum(right) / sum(bool(ids) for _, ids, _ in examples)
    score = 1.25 * precision * recall / max(1e-9, 0.25 * precision + recall)
    return (precision, *map(float, recalls), float(idle), score, took)


def made(number: int, rng: random.Random, forms: list[tuple[str, str]]) -> Skill:
    """A skill for a random form."""
    name, text = rng.choice(forms)
    words = tuple(dict.fromkeys((text, f"{text} {number}", f"{rng.choice(('the', 'that'))} {text} x{rng.randrange(9999)}")))
    return Skill("", rng.choice(TAGS), f"the request says {text}", f"answer {name}", words=words, target=name)


if __name__ == "__main__":
    main()
