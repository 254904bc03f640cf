"""The rounds of SEER-Loop. Within a round the bank is frozen: episodes on training cases, harvest, credit, candidates (what was won and
lost, and what the training requests teach about every target); then acceptance on bank cases by paired comparison with and without the
skill, first in words that the skill does not hold; then what hurts is retired and growth is capped; then one new state.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from seerseg.dataset import Request
from seerseg.evolution.arena import Arena, Outcome, bare
from seerseg.evolution.distillation import Harvest, Telling, Writer, distil, taught
from seerseg.skills.base import TAUGHT, Acceptance, EmptyBank, Query, Skill
from seerseg.skills.encoder import Encoder, Remembered
from seerseg.skills.fence import Fence
from seerseg.skills.retrieval import FrozenBank, SkillIndex, Weights
from seerseg.skills.store import BankFolder, retire
from seerseg.vocabulary import Vocabulary, words

TOGETHER = 6  # requests of a case that a skill is tried on at once


@dataclass(frozen=True)
class EvolveSettings:
    """per_round: training requests a round (whole paraphrase sets); tests: bank requests a candidate is tried on at most, at least
    `fewest`; confidence: one-sided, of the lower bound that must be over 0; harmless: mean loss up to which a skill that does not help is
    kept as a rival; penalty: weight of drops against gains; per_target: accepted skills kept for a target; candidates: tested in a round
    at most, those with most sources first; teach: propose what training requests say of every target, too."""

    rounds: int = 3
    per_round: int = 400
    tests: int = 24
    fewest: int = 3
    confidence: float = 0.9
    penalty: float = 1.0
    per_target: int = 20
    candidates: int = 60
    harmless: float = 0.005
    teach: bool = True
    harvest: Harvest = Harvest()  # noqa: RUF009
    seed: int = 1234


@dataclass(frozen=True)
class Round:
    """What a round did. Means are over the round's training requests."""

    number: int
    requests: int
    mean_plain: float
    mean_with: float
    helped: int
    hurt: int
    proposed: int
    tested: int
    accepted: int
    refused: int
    retired: int
    skills: int
    version: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(eq=False)
class SeerLoop:
    """arena: the reasoner's episodes; raw: the same requests sent to the segmenter as they are; training, testing: requests of training
    and of bank cases; truth_of: a request's canonical target or "absent"; modality_of: a case's modality; writer: rewrites candidates;
    encoder: of sentences, for retrieval; names: what may be answered, empty for anything."""

    arena: Arena
    raw: Arena
    training: Sequence[Request]
    testing: Sequence[Request]
    bank: BankFolder
    vocabulary: Vocabulary
    truth_of: Callable[[Request], str]
    modality_of: Callable[[str], str | None]
    settings: EvolveSettings = field(default_factory=EvolveSettings)
    fence: Fence | None = None
    weights: Weights | None = None
    writer: Writer | None = None
    encoder: Encoder | None = None
    names: tuple[str, ...] = ()

    @cached_property
    def _encode(self) -> Remembered | None:
        return Remembered(self.encoder) if self.encoder is not None else None

    def run(self, report: Callable[[Round], None] = lambda round_: None) -> list[Round]:
        """The rounds that the bank's history does not hold yet, each one head with the message "round N"; a run that was stopped goes
        on with the round it was in. BankError when the bank holds what `fence` forbids."""
        finished = sum(h.message.startswith("round ") for h in self.bank.history())
        rounds = []
        for number in range(finished + 1, self.settings.rounds + 1):
            rounds.append(self._round(number))
            report(rounds[-1])
        return rounds

    def prepare(self, number: int) -> tuple[dict[str, Skill], FrozenBank | EmptyBank, list[Request]]:
        """The skills that stand, the frozen bank and the training requests of a round: what shards run beforehand."""
        skills = self.bank.skills()
        for skill in skills.values():
            self._guard(skill)
        live = [s for s in skills.values() if s.status == "accepted"]
        frozen = FrozenBank.of(skills.values(), weights=self.weights, encoder=self._encode) if live else EmptyBank()
        return skills, frozen, _sample(self.training, self.settings.per_round, self.settings.seed + number)

    def _round(self, number: int) -> Round:
        self.bank.fold(f"hand-ins before round {number}")
        skills, frozen, chosen = self.prepare(number)
        plain, helped = bare(self.arena, chosen), self.arena.run(chosen, frozen)
        after = dict(skills)
        for skill_id, trials in _credits(number, plain, helped).items():
            if skill_id in after:
                audit = after[skill_id].audit
                after[skill_id] = replace(after[skill_id], audit=replace(audit, trials={**audit.trials, **trials}))
        telling = Telling.of(((r.text, self.truth_of(r)) for r in self.training), self.vocabulary)
        found = distil(plain, bare(self.raw, chosen), telling=telling, harvest=self.settings.harvest, writer=self.writer)
        if self.settings.teach:
            more = {_content(s): s for s in taught(self.training, telling=telling, truth_of=self.truth_of, modality_of=self.modality_of)}
            found = [replace(s, audit=replace(s.audit, origin=TAUGHT)) if _content(s) in more else s for s in found]
            known = {_content(s) for s in (*after.values(), *found)}
            found += [s for content, s in more.items() if content not in known]
        proposed = list({s.id: s for s in reversed(found) if s.id not in after and not self._held_out(s)}.values())
        verdicts = self._accept(number, after, proposed)
        retired = _purge(after, number, self.settings) + _cap(after, number, self.settings)
        head = self.bank.change(lambda now: {**now, **after}, f"round {number}")
        return Round(
            number=number,
            requests=len(chosen),
            mean_plain=_mean([o.dice for o in plain]),
            mean_with=_mean([o.dice for o in helped]),
            helped=sum(b.dice > a.dice + 0.01 for a, b in zip(plain, helped, strict=True)),
            hurt=sum(b.dice < a.dice - 0.01 for a, b in zip(plain, helped, strict=True)),
            proposed=len(proposed),
            tested=len(verdicts),
            accepted=sum(verdicts),
            refused=len(verdicts) - sum(verdicts),
            retired=retired,
            skills=sum(s.status == "accepted" for s in after.values()),
            version=head.version,
        )

    def _accept(self, number: int, after: dict[str, Skill], proposed: Sequence[Skill]) -> list[bool]:
        """Test what waits and what is new, those already in use without a test first; `after` is changed."""
        waiting = [s for s in after.values() if s.status != "retired" and s.audit.accepted is None]
        queue = sorted([*waiting, *proposed], key=lambda s: (s.status == "candidate", -len(s.audit.sources), s.id))
        queue = queue[: self.settings.candidates]
        for skill in queue:
            self._guard(skill)
        rivals = [s for s in after.values() if s.status == "accepted" or s.rival] + [s for s in queue if s.audit.origin == TAUGHT]
        known = {s.id: s for s in rivals}
        pool = [replace(s, status="accepted") for s in known.values()]
        phrases = {" ".join(words(phrase)) for s in known.values() for phrase in s.words}
        taught_by = {r.id: _holds(r.text, phrases) for r in self.testing}
        verdicts = []
        for skill in queue:
            verdict = self._test(number, skill, pool, taught_by)
            if verdict is None:
                after.setdefault(skill.id, skill)
                continue
            good = verdict.low > 0
            verdicts.append(good)
            marked = replace(skill, audit=replace(skill.audit, accepted=verdict))
            if good:
                after[skill.id] = replace(marked, status="accepted")
            elif skill.audit.origin == TAUGHT and verdict.gain >= -self.settings.harmless:
                after[skill.id] = replace(
                    marked, status="candidate", audit=replace(marked.audit, note=f"no gain in round {number}: a rival")
                )
            else:
                after[skill.id] = retire(marked, f"refused in round {number}")
        return verdicts

    def _test(self, number: int, skill: Skill, pool: Sequence[Skill], taught_by: Mapping[str, bool]) -> Acceptance | None:
        """The paired comparison on bank requests that would be shown the skill, all others of `pool` its rivals; None when fewer than
        `fewest` would. Half of them hold the skill's own words, where so many do: a gain in either half is enough when the other loses
        nothing. Of the others those in another language than training's come first, and of these those without words of any skill of
        the pool (taught_by: request -> whether it holds some). A skill that does harm at once is not tried to the end."""
        rivals = [s for s in pool if s.id != skill.id]
        index = SkillIndex.of([replace(skill, status="accepted"), *rivals], self._encode).showing({skill.id})
        alone = FrozenBank(index, skill.id, weights=self.weights, encoder=self._encode)
        fitting = [r for r in self.testing if alone.retrieve(Query(r.text, self.modality_of(r.case), targets=self.names), 1)]
        known = {r.language_split for r in self.training}

        def familiar(request: Request) -> int:
            return 2 * (request.language_split in known) + taught_by[request.id]

        mixed = _spread(fitting, familiar, f"{self.settings.seed}/{skill.id}")
        own, others = ([r for r in mixed if _says(r.text, skill) == said] for said in (True, False))
        half = min(len(own), max(self.settings.tests // 2, self.settings.tests - len(others)))
        fitting = [*others[: self.settings.tests - half], *own[:half]]
        if len(fitting) < self.settings.fewest:
            return None
        gains: list[float] = []
        for start in range(0, len(fitting), TOGETHER):
            part = fitting[start : start + TOGETHER]
            gains += [b.dice - a.dice for a, b in zip(bare(self.arena, part), self.arena.run(part, alone), strict=True)]
            if len(gains) >= self.settings.fewest and lower_bound([-g for g in gains], self.settings.confidence) > 0:
                break
        tried = fitting[: len(gains)]
        low = proven(gains, [_says(r.text, skill) for r in tried], self.settings)
        return Acceptance(
            len(gains),
            round(_mean(gains), 6),
            round(low, 6),
            round(min(gains), 6),
            number,
            sum(not _says(r.text, skill) for r in tried),
            " and ".join(sorted({r.language_split for r in tried if r.language_split})),
        )

    def _held_out(self, skill: Skill) -> bool:
        return self.fence is not None and self.fence.held_out_word(skill) is not None

    def _guard(self, skill: Skill) -> None:
        if self.fence is not None and skill.status != "retired":
            self.fence.check(skill)


def proven(gains: Sequence[float], own: Sequence[bool], settings: EvolveSettings) -> float:
    """The larger lower bound of the gains in requests that hold the skill's own words and in those that do not. Two bounds are two chances,
    so each is taken at half the risk; the bound of all gains where either half has lost more than is harmless, or is too small to tell."""
    halves = [[g for g, o in zip(gains, own, strict=True) if o is said] for said in (True, False)]
    if any(len(h) < settings.fewest or _mean(h) < -settings.harmless for h in halves):
        return lower_bound(gains, settings.confidence)
    return max(lower_bound(h, (1 + settings.confidence) / 2) for h in halves)


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


def _credits(number: int, plain: Sequence[Outcome], helped: Sequence[Outcome]) -> Mapping[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for a, b in zip(plain, helped, strict=True):
        for skill in b.credited:
            found[skill][f"{number}/{b.case}/{b.request}"] = round(b.dice - a.dice, 6)
    return found


def _purge(after: dict[str, Skill], number: int, settings: EvolveSettings) -> int:
    """Retire accepted skills whose drops outweigh their gains."""
    bad = [s for s in after.values() if s.status == "accepted" and s.audit.uses and s.audit.gain - settings.penalty * s.audit.drop < 0]
    for skill in bad:
        after[skill.id] = retire(skill, f"purged in round {number}: it cost more than it gained")
    return len(bad)


def _cap(after: dict[str, Skill], number: int, settings: EvolveSettings) -> int:
    """Retire the weakest accepted skills of a target over the cap: by what they gained in tests and in use."""
    groups: dict[str | None, list[Skill]] = defaultdict(list)
    for skill in after.values():
        if skill.status == "accepted":
            groups[skill.target].append(skill)
    weak = []
    for group in groups.values():
        ranked = sorted(group, key=lambda s: (-(s.audit.gain - s.audit.drop + (s.audit.accepted.low if s.audit.accepted else 0)), s.id))
        weak += ranked[settings.per_target :]
    for skill in weak:
        after[skill.id] = retire(skill, f"over the cap of round {number}")
    return len(weak)


def _spread(requests: Sequence[Request], familiar: Callable[[Request], int], seed: str) -> list[Request]:
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


def _content(skill: Skill) -> tuple[object, ...]:
    """What a skill is, however it is worded."""
    return skill.tag, skill.target, skill.modalities, frozenset(skill.words)


def _says(text: str, skill: Skill) -> bool:
    """Whether a request holds one of the skill's own phrases as it stands."""
    return _holds(text, [" ".join(words(phrase)) for phrase in skill.words])


def _holds(text: str, phrases: Iterable[str]) -> bool:
    said = f" {' '.join(words(text))} "
    return any(f" {phrase} " in said for phrase in phrases)


def _sample(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """Whole paraphrase sets in a seeded order until `count` requests are reached."""
    sets: dict[tuple[str, tuple[str, ...] | None], list[Request]] = defaultdict(list)
    for request in requests:
        sets[(request.case, request.target)].append(request)
    keys = sorted(sets, key=str)
    random.Random(seed).shuffle(keys)
    chosen: list[Request] = []
    for key in keys:
        if len(chosen) >= count:
            break
        chosen += sets[key]
    return chosen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
