"""Spelling repair: the known words that a written word may be meant as, by what keyboards, ears and haste do.

Costs are in edits: 1 for an arbitrary letter, less for neighbouring keys, doubled letters, swapped letters, vowels and letters
that sound alike, more for a wrong first letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rapidfuzz import process
from rapidfuzz.distance import OSA

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_VOWELS = frozenset("aeiouy")
_ALIKE = tuple(frozenset(pair) for pair in "ck sz cs fv iy gj kq nm".split())


def nearest(word: str, known: Sequence[str], limit: int = 4) -> tuple[tuple[str, float], ...]:
    """(known word, cost), cheapest first, of those that `word` can reasonably be a misspelling of."""
    edits = 1 if len(word) <= 3 else 2 if len(word) <= 7 else 3
    near = process.extract(word, known, scorer=OSA.distance, score_cutoff=edits, limit=24)
    allowed = 0.26 * len(word) + 0.12
    priced = sorted((round(cost(word, other), 3), -len(other), other) for other, _, _ in near)
    return tuple((other, paid) for paid, _, other in priced if paid <= allowed or _lost_a_letter(word, other))[:limit]


def _lost_a_letter(word: str, other: str) -> bool:
    """ "lng" of "lung": short words cannot afford an edit, but inner letters do get lost."""
    return len(word) == 3 and len(other) == 4 and word[0] == other[0] and word[2] == other[3] and word[1] in other[1:3]


@lru_cache(maxsize=16384)
def cost(written: str, meant: str) -> float:
    """Weighted edits from what was written to what was meant (optimal string alignment)."""
    rows, columns = len(written), len(meant)
    before: list[float] = []
    previous = [0.0]
    for j in range(columns):
        previous.append(previous[-1] + _insertion(meant, j))
    for i in range(1, rows + 1):
        a = written[i - 1]
        dropped = 0.5 if i > 1 and a == written[i - 2] else 1.0
        current = [previous[0] + dropped]
        for j in range(1, columns + 1):
            b = meant[j - 1]
            best = min(previous[j] + dropped, current[j - 1] + _insertion(meant, j - 1), previous[j - 1] + _substitution(a, b))
            if i > 1 and j > 1 and a == meant[j - 2] and written[i - 2] == b and a != b:
                best = min(best, before[j - 2] + 0.7)
            current.append(best)
        before, previous = previous, current
    return previous[-1] + (0.5 if written[:1] != meant[:1] else 0.0)


def _insertion(meant: str, j: int) -> float:
    if j > 0 and meant[j] == meant[j - 1]:
        return 0.5
    return 0.8 if meant[j] in _VOWELS else 1.0


@lru_cache(maxsize=2048)
def _substitution(a: str, b: str) -> float:
    if a == b:
        return 0.0
    if a in _VOWELS and b in _VOWELS:
        return 0.6
    if any(a in pair and b in pair for pair in _ALIKE):
        return 0.5
    for row, keys in enumerate(_ROWS):
        i = keys.find(a)
        if i >= 0:
            for other in (row - 1, row, row + 1):
                j = _ROWS[other].find(b) if 0 <= other < 3 else -1
                if j >= 0 and abs(i - j) <= 1:
                    return 0.6
    return 1.0
