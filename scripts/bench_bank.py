#!/usr/bin/env python
"""Opening and searching a large skill bank.

    python scripts/bench_bank.py [--skills 100000] [--queries 300]

Skills are made from the vocabulary's own forms with made-up words added, three phrases each; queries hold a form in a sentence.
Prints CPU seconds to write, to open the first time (the index is made) and again, and CPU milliseconds a request. The limits: 3 s, 10 ms.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from seerseg.skills.base import Query, Skill
from seerseg.skills.retrieval import FrozenBank
from seerseg.skills.store import BankFolder
from seerseg.vocabulary import Vocabulary

TAGS = ("ABBR_DISAMBIGUATE", "MESSY_INPUT_REPAIR", "VERBOSE_PRUNE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skills", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    given = parser.parse_args()
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


def made(number: int, rng: random.Random, forms: list[tuple[str, str]]) -> Skill:
    """A skill for a random form."""
    name, text = rng.choice(forms)
    words = tuple(dict.fromkeys((text, f"{text} {number}", f"{rng.choice(('the', 'that'))} {text} x{rng.randrange(9999)}")))
    return Skill("", rng.choice(TAGS), f"the request says {text}", f"answer {name}", words=words, target=name)


if __name__ == "__main__":
    main()
