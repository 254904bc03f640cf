"""The rounds of SEER-Loop. Within a round the bank is frozen: episodes on training cases, harvest, credit, candidates (what was won and
lost, and what the training requests teach about every target); then acceptance on bank cases (`seerseg.evolution.acceptance`); then what
hurts is retired and growth is capped; then one new state. What a round costs is bounded by its settings, and by a time where one is given.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from seerseg.dataset import Request
from seerseg.evolution.acceptance import Bench, Rule, Trial, holds, sample_of, together
from seerseg.evolution.arena import Arena, Outcome
from seerseg.evolution.distillation import Harvest, Telling, Writer, distil, taught
from seerseg.skills.base import TAUGHT, Acceptance, EmptyBank, Query, Retriever, Skill
from seerseg.skills.encoder import Encoder, Remembered, adapted, keep_metric, learn_metric
from seerseg.skills.fence import Fence
from seerseg.skills.retrieval import ENCODED, FrozenBank, Weights, asked, keep_weights, kept_weights
from seerseg.skills.store import BankFolder, retire
from seerseg.vocabulary import Vocabulary, words

RIGHT = 0.5  # share of the requests which taught words fit that must mean their target, for them to be heeded where they are not shown
SLICE = 24  # requests that are run before the clock is looked at
LEARNING = 0.4  # share of the time of a round that training requests may take, and what is left of the rest's for the bench
EARLY = 0.7


@dataclass(frozen=True)
class EvolveSettings:
    """What a round costs at most. per_round: training requests (whole paraphrase sets), run without skills and with the bank; raw: those
    of them that are sent to the segmenter as they are; bench: bank requests, spread over targets and run once without skills; candidates:
    skills that are tested, those that promise most first; tests: requests that each is tried on, at least `fewest`; minutes: for all
    rounds together, None for no limit (what is not reached is left for another run).

    confidence: one-sided, of the lower bound that must be over 0; harmless: mean loss up to which a skill that does not help is kept as a
    rival; penalty: weight of drops against gains; per_target: accepted skills kept for a target; teach: propose what training requests say
    of every target, too."""

    rounds: int = 3
    per_round: int = 400
    raw: int = 100
    bench: int = 1000
    candidates: int = 60
    tests: int = 24
    minutes: float | None = None
    fewest: int = 3
    confidence: float = 0.9
    penalty: float = 1.0
    per_target: int = 20
    harmless: float = 0.005
    teach: bool = True
    harvest: Harvest = Harvest()  # noqa: RUF009
    seed: int = 1234

    @property
    def rule(self) -> Rule:
        """How a skill is tested."""
        return Rule(self.tests, self.fewest, self.confidence, self.harmless, self.seed)


@dataclass(frozen=True)
class Round:
    """What a round did. Means are over the round's training requests. left: candidates that were not tested: nothing to earn by them, or
    no place or time; threshold, margin: of retrieval, as the round found best."""

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
    left: int
    skills: int
    threshold: float
    margin: float
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
    clock: Callable[[], float] = time.monotonic
    _began: float | None = None
    _left: int = 0
    _fitted: Weights | None = None

    @cached_property
    def _encode(self) -> Encoder | None:
        """The encoder through the bank's metric, which is learnt from the training requests by the bank's first round."""
        if self.encoder is None:
            return None
        base = Remembered(self.encoder)
        if adapted(base, self.bank.folder) is base and base.identity is not None and self.bank.head() is None:
            metric = learn_metric(self._said(), base)
            if metric is not None:
                keep_metric(metric, base, self.bank.folder)
        return Remembered(adapted(base, self.bank.folder))

    @cached_property
    def _telling(self) -> Telling:
        return Telling.of(((r.text, self.truth_of(r)) for r in self.training), self.vocabulary)

    def _said(self) -> dict[tuple[str, str], list[str]]:
        """Training requests by the words for their target and the target."""
        said: dict[tuple[str, str], list[str]] = defaultdict(list)
        for request in self.training:
            if request.target is not None and asked(request.text) == request.text:
                phrase, _ = self._telling.alias(request.text, self.truth_of(request))
                if phrase:
                    said[phrase, self.truth_of(request)].append(request.text)
        return said

    def run(self, report: Callable[[Round], None] = lambda round_: None) -> list[Round]:
        """The rounds that the bank's history does not hold yet, each one head with the message "round N"; a run that was stopped goes
        on with the round it was in, one that ran out of time ends with the round it is in. BankError when the bank holds what `fence`
        forbids."""
        finished = sum(h.message.startswith("round ") for h in self.bank.history())
        rounds: list[Round] = []
        self._began = self.clock()
        for number in range(finished + 1, self.settings.rounds + 1):
            if rounds and self._late():
                break
            rounds.append(self._round(number))
            report(rounds[-1])
        return rounds

    def prepare(self, number: int) -> tuple[dict[str, Skill], FrozenBank | EmptyBank, list[Request]]:
        """The skills that stand, the frozen bank and the training requests of a round: what shards run beforehand."""
        skills = self.bank.skills()
        for skill in skills.values():
            self._guard(skill)
        live = [s for s in skills.values() if s.status == "accepted"]
        frozen = FrozenBank.of(skills.values(), weights=self._weights(), encoder=self._encode) if live else EmptyBank()
        return skills, frozen, _sample(self.training, self.settings.per_round, self.settings.seed + number)

    def _round(self, number: int) -> Round:
        self.bank.fold(f"hand-ins before round {number}")
        skills, frozen, chosen = self.prepare(number)
        plain = self._run(chosen, EmptyBank(), LEARNING / 2)
        helped = self._run(chosen[: len(plain)], frozen, LEARNING)
        chosen, plain = chosen[: len(helped)], plain[: len(helped)]
        after = dict(skills)
        for skill_id, trials in _credits(number, plain, helped).items():
            if skill_id in after:
                audit = after[skill_id].audit
                after[skill_id] = replace(after[skill_id], audit=replace(audit, trials={**audit.trials, **trials}))
        proposed = self._proposed(after, chosen, plain)
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
            left=self._left,
            skills=sum(s.status == "accepted" for s in after.values()),
            threshold=self._weights().threshold,
            margin=self._weights().margin,
            version=head.version,
        )

    def _proposed(self, after: Mapping[str, Skill], chosen: Sequence[Request], plain: Sequence[Outcome]) -> list[Skill]:
        """Candidates that the bank does not hold yet."""
        more: dict[tuple[object, ...], Skill] = {}
        if self.settings.teach:
            made = taught(self.training, telling=self._telling, truth_of=self.truth_of, modality_of=self.modality_of)
            more = {_content(s): s for s in made}
        raw = self._raw(chosen, plain, {(phrase, s.target) for s in more.values() for phrase in s.words})
        found = distil(plain, raw, telling=self._telling, harvest=self.settings.harvest, writer=self.writer)
        found = [replace(s, audit=replace(s.audit, origin=TAUGHT)) if _content(s) in more else s for s in found]
        known = {_content(s) for s in (*after.values(), *found)}
        found += [s for content, s in more.items() if content not in known]
        return list({s.id: s for s in reversed(found) if s.id not in after and not self._held_out(s)}.values())

    def _raw(self, chosen: Sequence[Request], plain: Sequence[Outcome], known: set[tuple[str, str | None]]) -> list[Outcome]:
        """The outcomes of requests that are sent to the segmenter as they are: of at most `raw` of those that may be wins by it with words
        that training does not teach anyway. The others' are as without skills: no win."""
        may = [
            r
            for r, o in zip(chosen, plain, strict=True)
            if o.dice >= max(self.settings.harvest.dice, self.settings.harvest.gain)
            and (self._telling.alias(o.text, o.truth)[0], o.truth) not in known
        ]
        ran = {o.request: o for o in self._run(may[: self.settings.raw], EmptyBank(), LEARNING, self.raw)}
        return [ran.get(o.request, o) for o in plain]

    def _bench(self, number: int, skills: Mapping[str, Skill], heeded: Mapping[str, Skill]) -> Bench:
        """The bench of a round; with an encoder threshold and margin are fitted on it, and kept in the bank."""
        known = {r.language_split for r in self.training}
        chosen = sample_of(self.testing, self.settings.bench, truth_of=self.truth_of, known=known, seed=self.settings.seed + number)
        plain = self._run(chosen, EmptyBank(), EARLY)
        bench = Bench(
            chosen[: len(plain)],
            plain,
            list(skills.values()),
            heeded,
            arena=self.arena,
            query_of=lambda r: Query(r.text, self.modality_of(r.case), targets=self.names),
            known=known,
            weights=self._weights(),
            encoder=self._encode,
        )
        if self.encoder is not None and heeded:
            bench.weights, told = bench.fitted()
            if getattr(self.encoder, "identity", None) is not None:
                head = self.bank.head()
                keep_weights(bench.weights, self.encoder, self.bank.folder, head.number + 1 if head else 1, {**told, "round": number})
            self._fitted = bench.weights
        return bench

    def _weights(self) -> Weights:
        """Of retrieval: as fitted, else as the bank keeps them for the encoder, else as given."""
        if self.encoder is None:
            return self.weights or Weights()
        head = self.bank.head()
        kept = kept_weights(self.bank.folder, self.encoder, head.number) if head else None
        return self._fitted or kept or self.weights or ENCODED

    def _late(self, share: float = 1.0) -> bool:
        """Whether so much of the time is over."""
        minutes, began = self.settings.minutes, self._began
        return minutes is not None and began is not None and self.clock() - began > 60 * minutes * share

    def _run(self, requests: Sequence[Request], bank: Retriever, share: float, arena: Arena | None = None) -> list[Outcome]:
        """Outcomes of the requests in order, of as many as there is time for, the first SLICE in any case."""
        arena = arena or self.arena
        if self.settings.minutes is None:
            return arena.run(requests, bank)
        made: list[Outcome] = []
        for start in range(0, len(requests), SLICE):
            if start and self._late(share):
                break
            made += arena.run(requests[start : start + SLICE], bank)
        return made

    def _accept(self, number: int, after: dict[str, Skill], proposed: Sequence[Skill]) -> list[bool]:
        """Test what waits and what is new, those already in use without a test first; `after` is changed."""
        waiting = [s for s in after.values() if s.status != "retired" and s.audit.accepted is None]
        for skill in (*waiting, *proposed):
            self._guard(skill)
        rivals = [s for s in after.values() if s.status == "accepted" or s.rival]
        heeded = {s.id: s for s in (*rivals, *(s for s in (*waiting, *proposed) if s.audit.origin == TAUGHT))}
        bench = self._bench(number, {s.id: s for s in (*waiting, *proposed, *heeded.values())}, heeded)
        phrases = {" ".join(words(phrase)) for s in heeded.values() for phrase in s.words}
        taught_by = {request for request, outcome in bench.plain.items() if holds(outcome.text, phrases)}
        promise = {s.id: bench.promise(s) for s in (*waiting, *proposed)}
        queue = sorted((*waiting, *proposed), key=lambda s: (s.status == "candidate", -promise[s.id], s.id))
        trials: list[Trial] = []
        self._left = 0
        for place, skill in enumerate(queue):
            hopeless = skill.status == "candidate" and promise[skill.id] <= 0
            if hopeless or place >= self.settings.candidates or self._late():
                self._left += 1
                self._leave(number, after, skill, bench, hopeless)
                continue
            trials.append(bench.tried(skill, self.settings.rule, taught_by))
        return self._judge(number, after, trials, bench)

    def _judge(self, number: int, after: dict[str, Skill], trials: Sequence[Trial], bench: Bench) -> list[bool]:
        """Whether each skill that was tried is accepted; `after` is changed. Taught words that cannot prove themselves, for there are many
        names and few requests of each, are judged together: where all of them gain, those that gained are accepted. What has fewer than
        `fewest` trials and is not accepted waits."""
        rule, verdicts = self.settings.rule, []
        proven = {t.skill.id for t in trials if len(t.gains) >= rule.fewest and t.verdict(rule, number).low > 0}
        unproven = [t for t in trials if t.skill.audit.origin == TAUGHT and t.skill.id not in proven]
        low = together(unproven, rule)
        for trial in trials:
            joint = low > 0 and trial in unproven and sum(trial.gains) > 0
            verdict = trial.verdict(rule, number, low if joint else None)
            if len(trial.gains) < rule.fewest and not joint:
                after.setdefault(trial.skill.id, trial.skill)
                continue
            verdicts.append(verdict.low > 0)
            judged = self._judged(number, trial.skill, verdict, bench.right(trial.skill))
            if joint:
                judged = replace(
                    judged, audit=replace(judged.audit, note=f"judged together with {len(unproven) - 1} others in round {number}")
                )
            after[trial.skill.id] = judged
        return verdicts

    def _leave(self, number: int, after: dict[str, Skill], skill: Skill, bench: Bench, hopeless: bool) -> None:
        """A skill that is not tested: taught words that earn nothing, as what they fit is known already, are rivals all the same; of the
        others those that are in the bank stay, and those that may earn something wait."""
        if hopeless and skill.audit.origin == TAUGHT and bench.right(skill) >= RIGHT:
            untried = Acceptance(0, 0.0, 0.0, 0.0, number)
            after[skill.id] = replace(
                skill, audit=replace(skill.audit, accepted=untried, note=f"nothing to earn in round {number}: a rival")
            )
        elif not hopeless:
            after.setdefault(skill.id, skill)

    def _judged(self, number: int, skill: Skill, verdict: Acceptance, right: float) -> Skill:
        """The skill after its test."""
        marked = replace(skill, audit=replace(skill.audit, accepted=verdict))
        if verdict.low > 0:
            return replace(marked, status="accepted")
        if skill.audit.origin == TAUGHT and (verdict.gain >= -self.settings.harmless or right >= RIGHT):
            return replace(marked, status="candidate", audit=replace(marked.audit, note=f"no gain in round {number}: a rival"))
        return retire(marked, f"refused in round {number}")

    def _held_out(self, skill: Skill) -> bool:
        return self.fence is not None and self.fence.held_out_word(skill) is not None

    def _guard(self, skill: Skill) -> None:
        if self.fence is not None and skill.status != "retired":
            self.fence.check(skill)


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


def _content(skill: Skill) -> tuple[object, ...]:
    """What a skill is, however it is worded."""
    return skill.tag, skill.target, skill.modalities, frozenset(skill.words)


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
