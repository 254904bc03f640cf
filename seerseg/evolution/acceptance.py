"""Acceptance of skills on bank cases: which requests a candidate would be shown for, from which score on skills are shown at all, what a
candidate can earn, and the paired comparison with and without it.

All of it happens on one sample of bank requests, the bench, which the reasoner answers once without skills; what a candidate can earn if
it is followed is known from that, so that the few candidates worth it are tested, the most promising first.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

from seerseg.dataset import Request
from seerseg.evolution.arena import Arena, Outcome
from seerseg.skills.base import Acceptance, Query, Skill
from seerseg.skills.encoder import Encoder
from seerseg.skills.retrieval import SkillIndex, Weights, telling
from seerseg.vocabulary import words

TOGETHER = 6  # requests of a case that a skill is tried on at once
PER_SET = 24  # requests of one case and target in a sample: every pair costs the segmenter a mask
THRESHOLDS = (0.74, 0.76, 0.78, 0.8, 0.82, 0.85, 0.88, 0.92)
MARGINS = (1e-4, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045)
"""Values that `Bench.fitted` chooses from."""
MOST_DRAWN = 0.1  # share of the requests for what is not there that a bank may have drawn all the same
ENOUGH = 30  # requests in another language than training's, from which on the choice is made on them alone


@dataclass(frozen=True)
class Rule:
    """How a skill is tested. tests: requests at most, at least `fewest`; confidence: one-sided, of the lower bound that must be over 0;
    harmless: mean loss that is no harm."""

    tests: int = 24
    fewest: int = 3
    confidence: float = 0.9
    harmless: float = 0.005
    seed: int = 1234


class Bench:
    """A sample of bank requests, their outcomes without skills, and which of the candidates would be shown for each.

    skills: all candidates and all that are in use, by id, as if in use; heeded: ids of those that count as rivals. Work is done when
    asked for.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        plain: Sequence[Outcome],
        skills: Sequence[Skill],
        heeded: Collection[str],
        *,
        arena: Arena,
        query_of: Callable[[Request], Query],
        known: Collection[str],
        weights: Weights,
        encoder: Encoder | None = None,
    ) -> None:
        self._requests, self._arena, self._known = list(requests), arena, known
        self.plain = {r.id: o for r, o in zip(requests, plain, strict=True)}
        self._skills = {s.id: replace(s, status="accepted") for s in skills}
        self._heeded, self._query_of, self._encoder, self.weights = frozenset(heeded), query_of, encoder, weights
        if encoder is not None:
            encoder([text for r in requests for text in (r.text, telling(r.text) or r.text)])  # one batch, not one by one

    @cached_property
    def _index(self) -> SkillIndex:
        return SkillIndex.of(self._skills.values(), self._encoder)

    def _lowest(self) -> Weights:
        """Under which every skill is found that may be shown by any of the values to choose from."""
        if self._encoder is None:
            return self.weights
        least = min(self.weights.threshold - self.weights.margin, THRESHOLDS[0] - MARGINS[-1])
        return replace(self.weights, threshold=least + MARGINS[-1], margin=MARGINS[-1])

    @cached_property
    def _found(self) -> dict[str, list[tuple[str, float, float]]]:
        """For each request the skills that fit it: id, score and gap."""
        lowest = self._lowest()
        return {
            r.id: [(f.skill.id, f.score, f.gap) for f in self._index.contenders(self._query_of(r), lowest, self._heeded, self._encoder)]
            for r in self._requests
        }

    def fitted(self) -> tuple[Weights, dict[str, float]]:
        """Threshold and margin under which the heeded skills together earn most, were the best of each request followed, and how much that
        is; no request is asked for it. What is earned where something is to be drawn and where nothing is count alike, and at most
        MOST_DRAWN may be lost of the latter. The values that were given where none earns. In another language than training's, where there
        are enough such requests."""
        foreign = [r for r in self._requests if r.language_split not in self._known]
        chosen = foreign if len(foreign) >= ENOUGH else self._requests
        tops: dict[str, tuple[float, float, float]] = {}
        for request in chosen:
            top = next(((s, score, gap) for s, score, gap in self._found[request.id] if s in self._heeded), None)
            if top is not None:
                tops[request.id] = (top[1], top[2], self._earned(self._skills[top[0]], self.plain[request.id]))
        sides = [[r.id for r in chosen if (r.target is None) is absent] for absent in (False, True)]

        def gain(threshold: float, margin: float) -> float:
            present, absent = (  # of fewer than ENOUGH none counts more than it would among so many
                sum(tops[i][2] for i in side if i in tops and tops[i][0] >= threshold and tops[i][1] >= margin) / max(len(side), ENOUGH)
                for side in sides
            )
            return present + absent if absent >= -MOST_DRAWN else -math.inf

        best = max((gain(t, m), m, t) for t in THRESHOLDS for m in MARGINS)
        told = {"requests": float(len(chosen)), "gain": round(best[0], 6)}
        return (replace(self.weights, threshold=best[2], margin=best[1]), told) if best[0] > 0 else (self.weights, told)

    def fitting(self, skill: Skill) -> list[Request]:
        """The requests that would be shown the skill, were it the only one in use and the heeded ones its rivals."""
        return self._fitting.get(skill.id, [])

    @cached_property
    def _fitting(self) -> dict[str, list[Request]]:
        found: dict[str, list[Request]] = defaultdict(list)
        for request in self._requests:
            for skill, score, gap in self._found[request.id]:
                if score >= self.weights.threshold and (gap >= self.weights.margin or not self.weights.margin):
                    found[skill].append(request)
        return found

    def promise(self, skill: Skill) -> float:
        """What the skill can earn in all, were it always followed: what is misread now and would be drawn as well as that name is, less
        what would be lost."""
        return sum(self._earned(skill, self.plain[request.id]) for request in self.fitting(skill))

    def _earned(self, skill: Skill, outcome: Outcome) -> float:
        """The Dice that a request gains or loses when the name that a skill leads to is answered; of a habit, all that is missing."""
        name = skill.leads_to
        if name == outcome.answer.casefold():
            return 0.0
        right = name is None or name == outcome.truth.casefold()
        return (self._drawn.get(outcome.truth, 1.0) if right else 0.0) - outcome.dice

    @cached_property
    def _drawn(self) -> dict[str, float]:
        """How well each target is drawn where it is answered."""
        found: dict[str, list[float]] = defaultdict(list)
        for outcome in self.plain.values():
            if outcome.answer.casefold() == outcome.truth.casefold():
                found[outcome.truth].append(outcome.dice)
        return {truth: _mean(values) for truth, values in found.items()}

    def right(self, skill: Skill) -> float:
        """The share of the requests that would be shown the skill that mean what it says; 0 where there are none."""
        return _mean([float(self.plain[r.id].truth.casefold() == skill.leads_to) for r in self.fitting(skill)])

    def tried(self, skill: Skill, rule: Rule, taught_by: Collection[str]) -> Trial:
        """The paired comparison on requests that would be shown the skill. Half of them hold its own words, where so many do. Of the
        others those in another language than training's come first, and of these those that hold no phrase of any skill (taught_by: ids of
        those that do). A skill that does harm at once is not tried to the end."""

        def familiar(request: Request) -> int:
            return 2 * (request.language_split in self._known) + (request.id in taught_by)

        mixed = spread(self.fitting(skill), familiar, f"{rule.seed}/{skill.id}")
        own, others = ([r for r in mixed if says(r.text, skill) == said] for said in (True, False))
        half = min(len(own), max(rule.tests // 2, rule.tests - len(others)))
        fitting = [*others[: rule.tests - half], *own[:half]]
        alone = Always(self._skills[skill.id])
        gains: list[float] = []
        for start in range(0, len(fitting), TOGETHER):
            part = fitting[start : start + TOGETHER]
            gains += [o.dice - self.plain[o.request].dice for o in self._arena.run(part, alone)]
            if len(gains) >= rule.fewest and lower_bound([-g for g in gains], rule.confidence) > 0:
                break
        return Trial(skill, tuple(fitting[: len(gains)]), tuple(gains))


@dataclass(frozen=True)
class Trial:
    """A skill, the requests that it was tried on and what each gained."""

    skill: Skill
    requests: tuple[Request, ...]
    gains: tuple[float, ...]

    def verdict(self, rule: Rule, number: int, low: float | None = None) -> Acceptance:
        """What the audit keeps. low: the bound of trials that this one was judged together with; its own by default: a gain in either half
        of the requests, with and without the skill's own words, is enough when the other loses nothing."""
        own = [says(r.text, self.skill) for r in self.requests]
        return Acceptance(
            len(self.gains),
            round(_mean(self.gains), 6),
            round(proven(self.gains, own, rule) if low is None else low, 6),
            round(min(self.gains, default=0.0), 6),
            number,
            own.count(False),
            " and ".join(sorted({r.language_split for r in self.requests if r.language_split})),
        )


def together(trials: Sequence[Trial], rule: Rule) -> float:
    """The lower bound of the mean gain of skills that cannot prove it each for itself; -inf for fewer than `fewest` trials in all."""
    gains = [gain for trial in trials for gain in trial.gains]
    return lower_bound(gains, rule.confidence) if len(gains) >= rule.fewest else -math.inf


class Always:
    """Shows one skill, whatever is asked."""

    mode = "frozen"

    def __init__(self, skill: Skill) -> None:
        self.identity, self._skill = skill.id, skill

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The skill."""
        return (self._skill,)


def sample_of(
    requests: Sequence[Request], count: int, *, truth_of: Callable[[Request], str], known: Collection[str], seed: int
) -> list[Request]:
    """At most `count` requests, half of them in another language than training's where there are as many: PER_SET of one case and target,
    as each pair costs a mask, then of the next pair, by turns of the targets; what is left of the pairs when all had their turn."""
    rng = random.Random(seed)
    sets: dict[tuple[str, str], tuple[list[Request], list[Request]]] = defaultdict(lambda: ([], []))
    for request in rng.sample(list(requests), len(requests)):
        sets[truth_of(request), request.case][request.language_split in known].append(request)
    helpings: dict[str, list[tuple[int, list[Request]]]] = defaultdict(list)
    for truth, case in rng.sample(sorted(sets), len(sets)):
        mixed = [r for pair in zip_longest(*sets[truth, case]) for r in pair if r is not None]
        helpings[truth] += [(start, mixed[start : start + PER_SET]) for start in range(0, len(mixed), PER_SET)]
    waiting = {truth: sorted(parts, key=lambda part: part[0], reverse=True) for truth, parts in sorted(helpings.items())}
    chosen: list[Request] = []
    while len(chosen) < count and any(waiting.values()):
        for parts in waiting.values():
            chosen += parts.pop()[1] if parts else []
    return chosen[:count]


def proven(gains: Sequence[float], own: Sequence[bool], rule: Rule) -> float:
    """The larger lower bound of the gains in requests that hold the skill's own words and in those that do not. Two bounds are two chances,
    so each is taken at half the risk; the bound of all gains where either half has lost more than is harmless, or is too small to tell."""
    halves = [[g for g, o in zip(gains, own, strict=True) if o is said] for said in (True, False)]
    if any(len(h) < rule.fewest or _mean(h) < -rule.harmless for h in halves):
        return lower_bound(gains, rule.confidence)
    return max(lower_bound(h, (1 + rule.confidence) / 2) for h in halves)


def lower_bound(differences: Sequence[float], confidence: float) -> float:
    """One-sided lower confidence bound of the mean by Student's t; a standard deviation under 0.05 counts as 0.05, so that three
    equal gains prove less than thirty."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return -math.inf
    mean = _mean(differences)
    deviation = max(0.05, math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1)))
    return mean - float(t.ppf(confidence, n - 1)) * deviation / math.sqrt(n)


def spread(requests: Sequence[Request], familiar: Callable[[Request], int], seed: str) -> list[Request]:
    """The least familiar first; of a case TOGETHER at a time, as one case's are run in one batch; seeded."""
    rng = random.Random(seed)
    mixed = rng.sample(list(requests), len(requests))
    cases = {case: n for n, case in enumerate(rng.sample(sorted({r.case for r in mixed}), len({r.case for r in mixed})))}
    places: dict[tuple[int, str], int] = defaultdict(int)
    keyed: list[tuple[int, int, int, int]] = []
    for order, request in enumerate(mixed):
        group = familiar(request)
        keyed.append((group, places[group, request.case] // TOGETHER, cases[request.case], order))
        places[group, request.case] += 1
    return [mixed[key[3]] for key in sorted(keyed)]


def says(text: str, skill: Skill) -> bool:
    """Whether a request holds one of the skill's own phrases as it stands."""
    return holds(text, [" ".join(words(phrase)) for phrase in skill.words])


def holds(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text holds one of the phrases, words folded and joined by blanks, as it stands."""
    said = f" {' '.join(words(text))} "
    return any(f" {phrase} " in said for phrase in phrases)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
