"""Other words for a word, from WordNet 3.0 (Princeton University; its own licence allows use and redistribution with attribution).

A tiny reasoner that was never shown general language knows "head" and not "caput", "slender" and not "thin". A general dictionary, which
knows nothing of our requests, tells it. The files are WordNet's own (`data.adj`, `index.noun`, ...; wndb(5WN) is their format; Debian's
`wordnet-base` carries them); none of them is part of this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seerseg.errors import DatasetError

_MANY_SENSES = 2
_WORD = re.compile(r"[a-z]{3,14}")


@dataclass(frozen=True)
class Thesaurus:
    """others: word -> other single words for its commonest senses, those of adjectives where it can be one, else of nouns."""

    others: dict[str, tuple[str, ...]]

    @staticmethod
    def open(folder: Path) -> Thesaurus:
        """From the folder that holds WordNet's files; DatasetError when they are not there or not of its format."""
        found: dict[str, tuple[str, ...]] = {}
        for part in ("adj", "noun"):
            try:
                words, near = _synsets(folder / f"data.{part}")
                senses = _index(folder / f"index.{part}")
            except (OSError, ValueError, IndexError) as error:
                raise DatasetError(
                    f"{folder} does not hold WordNet's data.{part} and index.{part} ({error}). Unpack Debian's wordnet-base."
                ) from error
            for word, synsets in senses.items():
                if word in found or not _WORD.fullmatch(word):
                    continue
                listed = [w for synset in synsets[:_MANY_SENSES] for s in (synset, *near.get(synset, ())) for w in words.get(s, ())]
                others = tuple(dict.fromkeys(w for w in listed if w != word and _WORD.fullmatch(w)))
                if others:
                    found[word] = others
        return Thesaurus(found)

    def reworded(self, text: str, choose: Callable[[list[tuple[str, str]]], tuple[str, str]], *, never: frozenset[str]) -> str:
        """The text with one of its words replaced, as `choose` picks (word, other); itself when there is nothing to pick. never: words that
        may not come in, as they would name something else."""
        pairs = [(w, o) for w in dict.fromkeys(text.split()) for o in self.others.get(w.casefold(), ()) if o not in never]
        if not pairs:
            return text
        word, other = choose(pairs)
        return " ".join(other if w == word else w for w in text.split())


def _synsets(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Offset -> words, and offset -> offsets of the similar adjectives."""
    words: dict[str, tuple[str, ...]] = {}
    near: dict[str, tuple[str, ...]] = {}
    for line in _lines(path):
        fields = line.split(" | ")[0].split()
        count = int(fields[3], 16)
        words[fields[0]] = tuple(fields[4 + 2 * i].split("(")[0].casefold() for i in range(count))
        at = 4 + 2 * count
        pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
        near[fields[0]] = tuple(p[1] for p in pointers if p[0] == "&")
    return words, near


def _index(path: Path) -> dict[str, list[str]]:
    """Word -> offsets of its senses, the commonest first."""
    found = {}
    for line in _lines(path):
        fields = line.split()
        found[fields[0]] = fields[-int(fields[2]) :]
    return found


def _lines(path: Path) -> list[str]:
    """Without the licence that each file begins with, in lines that two spaces begin."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("  ")]
