#!/usr/bin/env python
"""Training requests in which the words for the target are words that nobody knows, for GRPO to learn what to do then.

    python scripts/unknown_words.py RAW/DatasetXXX/requests.jsonl -o requests_unknown.jsonl --share 0.4

In training language nano knows every name, so an exact answer always pays and GRPO unlearns to answer the whole structure, or nothing,
when in doubt. Here a share of the training requests names its target by a made-up word ("the mirdal hippocampus"): a guess at its parts
then pays less than their whole.
Only requests in training language are changed, and no label prompt; SFT is not to be given such requests, for its
traces would teach what the made-up words mean. Put the file in the place of requests.jsonl for `seerseg_train --stage grpo`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from seerseg.vocabulary import Vocabulary, words

CONSONANTS, VOWELS = "bcdfglmnprstv", "aeiou"
ENDS = ("", "l", "r", "s", "x", "n", "tal", "ral", "dus")
FORMS = ("{new} {whole}", "{new} part of the {whole}", "{new} end of the {whole}", "{new} portion of the {whole}", "{whole} {new}", "{new}")


def made_up(rng: random.Random) -> str:
    """A word of two or three syllables that looks like one of anatomy."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3))) + rng.choice(ENDS)


def unknown(request: dict[str, Any], rng: random.Random, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The request with a made-up word in the place of what it calls its target, beside the structure that this is a piece of, where there
    is one; None where the request is not to be changed or does not hold the words that it was made with."""
    surface, target = request.get("surface"), request.get("target")
    fit = request.get("language_split") == "train" and request.get("style") != "label_prompt" and isinstance(target, str)
    if not fit or not surface or surface not in request["text"]:
        return None
    entry = vocabulary.resolve(request.get("asked") or target)
    wholes = vocabulary.wholes(entry.name) if entry is not None else ()
    said = rng.choice(FORMS if wholes else FORMS[-1:]).format(new=made_up(rng), whole=wholes[0] if wholes else "")
    return {**request, "text": request["text"].replace(surface, said), "surface": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.4, help="of the requests that can be changed")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.requests.is_file() or not 0 < given.share <= 1:
        raise SystemExit(f"{given.requests} must be a requests.jsonl, and the share {given.share} above 0 and at most 1.")
    rng, vocabulary, changed, lines = random.Random(given.seed), Vocabulary.load(), 0, []
    for line in given.requests.read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        new = unknown(request, rng, vocabulary) if "text" in request else None
        if new is not None and rng.random() < given.share and not set(words(new["surface"])) <= set(words(request["surface"])):
            request, changed = new, changed + 1
        lines.append(json.dumps(request, ensure_ascii=False))
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{changed} of {len(lines)} requests hold a made-up word now: {given.output}")


if __name__ == "__main__":
    main()
