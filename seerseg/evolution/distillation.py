"""From outcomes on training cases to candidate skills: which words meant which target, and what they were mistaken for.

The templates per tag follow SEER's rule templates in kind (arXiv 2603.08215, released code v1.1: tag, trigger, act); the wording, the
search for the telling words and the lessons from failures are our own.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from seerseg.errors import BankError
from seerseg.evolution.arena import Outcome
from seerseg.protocols.base import ABSENT
from seerseg.skills.base import DEFAULT_TAG, MAX_FIELD_CHARS, MAX_WORDS, TAG_OF_STYLE, Audit, Skill, check_skill
from seerseg.vocabulary import Vocabulary, words

LONGEST = 4  # words of a telling phrase
PURE = 0.95
Writer = Callable[[Sequence[Skill]], Sequence[Skill]]
"""Rewrites the wording of candidates (a language model, say: `seerseg.evolution.writer`), in order; what it returns is checked like any
skill."""


@dataclass(frozen=True)
class Harvest:
    """Which outcomes are learned from: wins of at least `gain` over the raw request with a Dice of at least `dice` (SEER: 0.5, 0.3), and
    failures under `dice` whose truth is known."""

    dice: float = 0.5
    gain: float = 0.3


@dataclass
class Telling:
    """How often each run of words goes with each target in the training requests."""

    vocabulary: Vocabulary
    counts: dict[tuple[str, ...], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @staticmethod
    def of(examples: Iterable[tuple[str, str]], vocabulary: Vocabulary) -> Telling:
        """From (text, truth) of training requests."""
        made = Telling(vocabulary)
        for text, truth in examples:
            for run in set(_runs(words(text))):
                made.counts[run][truth] += 1
        return made

    def phrase(self, text: str, truth: str) -> str:
        """The run of words of the text that tells the target best: pure, frequent, short; else its words that are not everyday words."""
        best: tuple[float, tuple[str, ...]] | None = None
        for run in _runs(words(text)):
            if all(w in self.vocabulary.ordinary or len(w) < 2 for w in run):
                continue
            seen = self.counts.get(run, Counter())
            total = sum(seen.values())
            if total and seen[truth] / total >= PURE:
                score = math.log1p(seen[truth]) - 0.15 * len(run)
                if best is None or score > best[0]:
                    best = score, run
        if best is not None:
            return " ".join(best[1])
        telling = [w for w in words(text) if w not in self.vocabulary.ordinary and len(w) > 1]
        return " ".join(telling[:LONGEST]) or " ".join(words(text)[:LONGEST])


def distil(
    plain: Sequence[Outcome],
    raw: Sequence[Outcome],
    *,
    telling: Telling,
    harvest: Harvest = Harvest(),
    writer: Writer | None = None,
) -> list[Skill]:
    """Candidates from outcomes without skills (`plain`) and the same requests sent as they are (`raw`); those of one tag, target and
    modality share a skill. Candidates that may not be shown are left out."""
    phrases: dict[tuple[str, str, str], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for one, other in zip(plain, raw, strict=True):
        won = one.dice >= harvest.dice and one.dice - other.dice >= harvest.gain and one.wellformed >= 1
        failed = one.dice < harvest.dice
        if not (won or failed):
            continue
        phrase = telling.phrase(one.text, one.truth)
        if phrase:
            phrases[(TAG_OF_STYLE.get(one.style, DEFAULT_TAG), one.truth, one.modality or "")][phrase].append(one)
    made = []
    for (tag, truth, modality), found in sorted(phrases.items()):
        ranked = sorted(found, key=lambda p: (-len(found[p]), p))
        for start in range(0, len(ranked), MAX_WORDS):
            part = ranked[start : start + MAX_WORDS]
            made.append(_candidate(tag, truth, modality, {p: found[p] for p in part}))
    worded = made if writer is None else [replace(skill, id="") for skill in writer(made)]
    return [skill for skill in worded if _may_be_shown(skill)]


def _may_be_shown(skill: Skill) -> bool:
    try:
        check_skill(skill, "distilled")
    except BankError:
        return False
    return True


def _candidate(tag: str, truth: str, modality: str, found: Mapping[str, Sequence[Outcome]]) -> Skill:
    outcomes = [o for group in found.values() for o in group]
    wrong = Counter(o.answer for o in outcomes if o.answer not in ("", truth) and o.dice < 0.5)
    listed = ", ".join(f"'{p}'" for p in list(found)[:4])
    target = None if truth == ABSENT else truth
    example = min(outcomes, key=lambda o: (len(o.text), o.text))
    return Skill(
        id="",
        tag=tag,
        when=_plain(f"the request says {listed}" + (f" on {modality}" if modality else ""))[:MAX_FIELD_CHARS],
        what=f"answer {truth}",
        words=tuple(found),
        target=target,
        modalities=(modality,) if modality else (),
        example=_plain(f"'{example.text[:160]}' -> {truth}"),
        lesson=f"not {wrong.most_common(1)[0][0]}" if wrong else "",
        status="candidate",
        audit=Audit("loop", tuple(sorted({f"{o.case}/{o.request}" for o in outcomes}))),
    )


def _runs(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1)]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("<", "‹")).strip()
