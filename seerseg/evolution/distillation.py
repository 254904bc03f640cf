"""From training cases to candidate skills: which words meant which target, and what they were mistaken for. `distil` learns from how
requests went (wins and failures), `taught` from the requests alone: every word for a target that training language holds, whether or not
the reasoner knew it, so that words that nobody taught may be found near them.

The templates per tag follow SEER's rule templates in kind (arXiv 2603.08215, released code v1.1: tag, trigger, act); the wording, the
search for the telling words and the lessons from failures are our own.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from seerseg.dataset import Request
from seerseg.errors import BankError
from seerseg.evolution.arena import Outcome
from seerseg.protocols.base import ABSENT
from seerseg.skills.base import DEFAULT_TAG, MAX_FIELD_CHARS, MAX_WORDS, TAG_OF_STYLE, TAUGHT, Audit, Skill, check_skill
from seerseg.skills.retrieval import asked
from seerseg.vocabulary import Vocabulary, words

LONGEST = 4  # words of a telling phrase
MOST_WORDS = 14  # of a form of the vocabulary
PURE, MOSTLY = 0.95, 0.6
"""Share of the requests with a run of words that must mean one target: of any run, and of a form that the vocabulary has for it (other
targets' requests say where they lie by it)."""
KINDS = {
    "name": DEFAULT_TAG,
    "synonym": DEFAULT_TAG,
    "abbreviation": "ABBR_DISAMBIGUATE",
    "lay": "CLINICAL_REQUEST_NORMALIZE",
    "description": "CLINICAL_REQUEST_NORMALIZE",
    "relation": "CLINICAL_REQUEST_NORMALIZE",
}
"""Kind of a word of the vocabulary -> tag of the skill that keeps it."""
COMMON = 0.02
SOURCES = 24  # requests that a taught skill names as where it comes from, at most
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
    asked_for: Counter[str] = field(default_factory=Counter)
    _forms: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)

    @staticmethod
    def of(examples: Iterable[tuple[str, str]], vocabulary: Vocabulary) -> Telling:
        """From (text, truth) of training requests; what they deny does not count."""
        made = Telling(vocabulary)
        for text, truth in examples:
            made.asked_for[truth] += 1
            for run in set(_runs(words(asked(text)))):
                made.counts[run][truth] += 1
        return made

    def forms(self, truth: str) -> dict[str, tuple[str, str]]:
        """Folded form -> the form as it is written, and the tag of its kind; of a target's own words in the vocabulary."""
        if truth not in self._forms:
            entry = self.vocabulary.resolve(truth)
            listed = [(truth, DEFAULT_TAG), *((s.text, KINDS[s.kind]) for s in (entry.surfaces if entry is not None else ()))]
            made: dict[str, tuple[str, str]] = {}
            for text, tag in listed:
                made.setdefault(" ".join(words(text)), (text, tag))
            self._forms[truth] = made
        return self._forms[truth]

    def alias(self, text: str, truth: str) -> tuple[str, str]:
        """The words of a training request for its target, and the tag of their kind: the longest form of the vocabulary that it holds;
        else its telling phrase, where COMMON of the requests for it, and two, have that (slips are rarer), and no tag. "" where they are
        said of other targets too, or are but fragments of the vocabulary's forms ("front")."""
        held = max((run for run in _runs(words(text), most=MOST_WORDS) if " ".join(run) in self.forms(truth)), key=len, default=None)
        if held is not None and (len(held) > LONGEST or self.share(held, truth) >= MOSTLY):
            return self.forms(truth)[" ".join(held)]
        phrase = self.phrase(text, truth)
        run = tuple(phrase.split())
        often = self.counts[run][truth] >= max(2, COMMON * self.asked_for[truth])
        news = any(word not in self._taught_words for word in run)
        return (phrase, "") if often and news and self.share(run, truth) >= PURE else ("", "")

    @cached_property
    def _taught_words(self) -> frozenset[str]:
        """Words of the vocabulary's forms of all targets."""
        return frozenset(word for truth in self.asked_for if truth != ABSENT for form in self.forms(truth) for word in form.split())

    def share(self, run: tuple[str, ...], truth: str) -> float:
        """Of the training requests that hold a run of at most LONGEST words the share that means this target."""
        seen = self.counts.get(run, Counter())
        return seen[truth] / max(1, sum(seen.values()))

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
        phrase, _ = telling.alias(one.text, one.truth)
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


def taught(
    requests: Sequence[Request],
    *,
    telling: Telling,
    truth_of: Callable[[Request], str],
    modality_of: Callable[[str], str | None],
) -> list[Skill]:
    """Candidates from training requests, whatever came of them: per target, modality and kind of words the words for it, those of most
    requests first, at most MAX_WORDS a skill.

    A request's words for its target are the longest form of the vocabulary that it holds, else its telling phrase where COMMON of those for
    it have it (slips are rarer); neither where it is said of other targets too. Requests that deny something or ask for what is not there
    teach nothing.
    """
    found: dict[tuple[str, str, str], dict[str, list[Request]]] = defaultdict(lambda: defaultdict(list))
    asked_for = Counter(truth_of(request) for request in requests)
    for request in requests:
        truth = truth_of(request)
        if truth == ABSENT or asked(request.text) != request.text:
            continue
        phrase, tag = telling.alias(request.text, truth)
        if phrase:
            found[(tag or TAG_OF_STYLE.get(request.style, DEFAULT_TAG), truth, modality_of(request.case) or "")][phrase].append(request)
    made = []
    for (tag, truth, modality), phrases in sorted(found.items()):
        known = {text for text, _ in telling.forms(truth).values()}
        own = max(2, COMMON * asked_for[truth])
        kept = {p: r for p, r in phrases.items() if p in known or len({one.case for one in r}) >= own}
        ranked = sorted(kept, key=lambda p: (-len(kept[p]), p))
        for start in range(0, len(ranked), MAX_WORDS):
            part = {p: kept[p] for p in ranked[start : start + MAX_WORDS]}
            made.append(_taught(tag, truth, modality, part))
    return [skill for skill in made if _may_be_shown(skill)]


def _taught(tag: str, truth: str, modality: str, phrases: Mapping[str, Sequence[Request]]) -> Skill:
    said = [(r.text, f"{r.case}/{r.id}") for group in phrases.values() for r in group]
    made = _proposed(tag, truth, modality, list(phrases), said, TAUGHT)
    return replace(made, audit=replace(made.audit, sources=made.audit.sources[:SOURCES]))


def _proposed(tag: str, truth: str, modality: str, phrases: Sequence[str], said: Sequence[tuple[str, str]], origin: str) -> Skill:
    """The candidate for phrases that mean one answer. said: (text, source) of the requests that it was learned from."""
    example = min((text for text, _ in said), key=lambda text: (len(text), text))
    return Skill(
        id="",
        tag=tag,
        when=_when(phrases, modality),
        what=f"answer {truth}",
        words=tuple(phrases),
        target=None if truth == ABSENT else truth,
        modalities=(modality,) if modality else (),
        example=_plain(f"'{example[:160]}' -> {truth}"),
        status="candidate",
        audit=Audit(origin, tuple(sorted({source for _, source in said}))),
    )


def _when(phrases: Sequence[str], modality: str) -> str:
    listed = ", ".join(f"'{p}'" for p in phrases[:4])
    return _plain(f"the request says {listed}" + (f" on {modality}" if modality else ""))[:MAX_FIELD_CHARS]


def _may_be_shown(skill: Skill) -> bool:
    try:
        check_skill(skill, "distilled")
    except BankError:
        return False
    return True


def _candidate(tag: str, truth: str, modality: str, found: Mapping[str, Sequence[Outcome]]) -> Skill:
    outcomes = [o for group in found.values() for o in group]
    wrong = Counter(o.answer for o in outcomes if o.answer not in ("", truth) and o.dice < 0.5)
    made = _proposed(tag, truth, modality, list(found), [(o.text, f"{o.case}/{o.request}") for o in outcomes], "loop")
    return replace(made, lesson=f"not {wrong.most_common(1)[0][0]}" if wrong else "")


def _runs(tokens: Sequence[str], most: int = LONGEST) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for n in range(1, most + 1) for i in range(len(tokens) - n + 1)]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("<", "‹")).strip()
