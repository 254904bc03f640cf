"""What a request may mean, read several times or weighed, and the one mask that is kept of it.

A request is read as it is, in other words that the bank knows for the same target, and again by sampling; a reasoner that can say how
likely every answer is tells that instead of being sampled. Kept is either the medoid by Dice, or, by expected Dice, the mask that can
be expected to fit best, be it a reading's or that of several pieces of one structure together: where a reasoner does not know whether
the head or the tail is meant, both are drawn and the message says so. (Minimum Bayes risk, as in Kumar and Byrne, HLT-NAACL 2004, with
Dice between masks as the gain and the variance penalty of SEER's stability objective.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from seerseg.episode import SKILLS_SHOWN, Dialogue, Episode, Targets, reason
from seerseg.errors import UsageError
from seerseg.metrics.masks import dice
from seerseg.protocols.base import Protocol
from seerseg.protocols.messages import Message
from seerseg.reasoners.base import Reasoner, Weighed, WeighingReasoner
from seerseg.skills.base import EmptyBank, Query, Retriever
from seerseg.views import CaseViews
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Mask

Decision = Literal["likeliest", "expected_dice"]
LEAST_SHARE = 0.02  # an answer that is less likely is not drawn
_TOGETHER = 4  # pieces of one structure that are tried together


@dataclass(frozen=True)
class ConsensusSettings:
    """readings: how often a request is read in all, 1 for plainly once; least: agreement (expected Dice) under which nothing is drawn, 0
    for never; decide: which mask is kept; caution: how much the variance of Dice over what may be meant counts against its mean."""

    readings: int = 1
    least: float = 0.0
    decide: Decision = "likeliest"
    caution: float = 0.5

    def __post_init__(self) -> None:
        if self.readings < 1 or not 0 <= self.least <= 1:
            raise UsageError(
                f"A consensus needs at least 1 reading and a least agreement from 0 to 1, not {self.readings} and {self.least}."
            )
        if self.decide not in ("likeliest", "expected_dice") or not 0 <= self.caution <= 1:
            raise UsageError(
                f"A consensus decides by likeliest or expected_dice with a caution from 0 to 1, not {self.decide}, {self.caution}."
            )

    @property
    def plain(self) -> bool:
        """Every request is read once and the answer is drawn."""
        return self.readings == 1 and self.decide == "likeliest"


@dataclass(frozen=True)
class Consensus:
    """agreement: of the kept mask with the readings, 0..1: their mean Dice, or the expected one where they were weighed; readings: text
    and answer of each, the request's own first; shares: how likely each of them is, () where all count alike."""

    agreement: float
    readings: tuple[tuple[str, str], ...]
    shares: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        told = [{"text": t, "answer": a} for t, a in self.readings]
        shares = [{"share": round(share, 4)} for share in self.shares] or [{} for _ in told]
        return {"agreement": round(self.agreement, 4), "readings": [a | b for a, b in zip(told, shares, strict=True)]}


def reworded(text: str, bank: Retriever, query: Query, limit: int) -> list[str]:
    """The request with a phrase that a retrieved skill answers to put into other words of the same skill, at most `limit` of them."""
    out: list[str] = []
    for skill in bank.retrieve(query, SKILLS_SHOWN):
        for phrase in sorted(skill.words, key=len, reverse=True):
            found = re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)
            if found is None:
                continue
            others = [w for w in (skill.target, *skill.words) if w and w.casefold() != phrase.casefold()]
            out += [text[: found.start()] + other + text[found.end() :] for other in others]
            break
    return list(dict.fromkeys(out))[:limit]


@dataclass(eq=False)
class Readings:
    """The dialogues about the requests of one case, one group for each request, its own wording first. shares: how likely each of a
    group is, None where all count alike."""

    texts: tuple[str, ...]
    groups: list[list[Dialogue]]
    settings: ConsensusSettings
    shares: list[list[float]] | None = field(default=None, init=False)

    @classmethod
    def open(
        cls,
        views: CaseViews,
        texts: Sequence[str],
        *,
        settings: ConsensusSettings,
        protocol: Protocol,
        bank: Retriever | None = None,
        targets: Targets | None = None,
    ) -> Readings:
        """As many dialogues for each text as are to be read: as it is, then reworded, then as it is again (to be sampled)."""
        retriever, allowed = bank or EmptyBank(), targets or Targets()
        groups = []
        for text in texts:
            query = Query(text, views.modality, targets=allowed.names if allowed.closed else ())
            skills = tuple(retriever.retrieve(query, SKILLS_SHOWN))
            said = [text, *(reworded(text, retriever, query, settings.readings - 1) if settings.readings > 1 else ())]
            said += [text] * (settings.readings - len(said))
            groups.append([Dialogue(views, words, protocol, skills=skills, targets=allowed) for words in said])
        return cls(tuple(texts), groups, settings)

    @property
    def dialogues(self) -> list[Dialogue]:
        """All of them, group after group."""
        return [dialogue for group in self.groups for dialogue in group]

    def ask(self, reasoner: Reasoner, *, seed: int = 0) -> None:
        """The first replies: what the reasoner weighs where that is wanted and can be had, else greedy for the first dialogue of each
        request and every rewording, sampled for repetitions."""
        one_turn = not any(dialogue.several_turns for dialogue in self.dialogues)
        if self.settings.decide == "expected_dice" and one_turn and isinstance(reasoner, WeighingReasoner):
            self._weigh(reasoner)
        else:
            self._read(reasoner, seed)

    def settle(self, episodes: Sequence[Episode]) -> list[Episode]:
        """One episode for each request from those of `dialogues`: what is kept, marked with its agreement; emptied where that is under
        the least."""
        if self.settings.plain:
            return list(episodes)
        rest = iter(episodes)
        out = []
        for number, text in enumerate(self.texts):
            group = [next(rest) for _ in self.groups[number]]
            shares = tuple(self.shares[number]) if self.shares is not None else ()
            if self.settings.decide == "likeliest":
                place, agreement = medoid(group)
                kept = group[place]
            else:
                kept, agreement = expected_best(group, shares or (1 / len(group),) * len(group), caution=self.settings.caution)
            kept = replace(
                kept,
                request=text,
                consensus=Consensus(agreement, tuple((e.request, _said(e)) for e in group), shares),
                reason_s=sum(e.reason_s for e in group),
                segment_s=sum(e.segment_s for e in group),
            )
            out.append(self._enough(kept, agreement))
        return out

    def _enough(self, kept: Episode, agreement: float) -> Episode:
        if agreement >= self.settings.least or kept.mask is None:
            return kept
        what = (
            f"The {self.settings.readings} readings of the request agree"
            if self.settings.readings > 1
            else "What the request may mean agrees"
        )
        message = f"{what} too little ({agreement:.2f}, least {self.settings.least:.2f}): nothing is drawn."
        return replace(kept, status="empty", mask=Mask(np.zeros_like(kept.mask.array), kept.mask.grid, kept.mask.name), message=message)

    def _weigh(self, reasoner: WeighingReasoner) -> None:
        import time

        different = [list({d.request: d for d in group}.values()) for group in self.groups]
        started = time.perf_counter()
        told = iter(_weighed(reasoner, [d.messages for group in different for d in group]))
        seconds = (time.perf_counter() - started) / max(1, sum(map(len, different)))
        self.shares = []
        for number, group in enumerate(different):
            found: dict[str, tuple[Dialogue, float]] = {}
            for asked in group:
                for one in (weighed := next(told)):
                    if one.share < LEAST_SHARE and one is not weighed[0]:
                        continue
                    dialogue = asked.again()
                    dialogue.step(one.reply)
                    said = dialogue.answer.target or "" if dialogue.answer is not None else f"!{one.reply}"
                    first, share = found.get(said, (dialogue, 0.0))
                    found[said] = (first, share + one.share / len(group))
            order = sorted(found.values(), key=lambda pair: -pair[1])
            total = sum(share for _, share in order)
            self.groups[number] = [dialogue for dialogue, _ in order]
            self.shares.append([share / total for _, share in order])
            order[0][0].reason_s += seconds * len(group)

    def _read(self, reasoner: Reasoner, seed: int) -> None:
        plain: list[Dialogue] = []
        again: list[tuple[Dialogue, list[Dialogue]]] = []
        for group in self.groups:
            first, repeated = group[0], [d for d in group[1:] if d.request == group[0].request]
            plain += [first, *(d for d in group[1:] if d.request != first.request)]
            if repeated:
                again.append((first, repeated))
        if again:
            most = max(len(repeated) for _, repeated in again)
            drawn = reasoner.reply([first.messages for first, _ in again], samples=most, seed=seed + 1)
            for (_, repeated), replies in zip(again, drawn, strict=True):
                for dialogue, reply in zip(repeated, replies, strict=False):
                    dialogue.step(reply)
        reason(plain, reasoner, seed=seed)


def _weighed(reasoner: WeighingReasoner, asked: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
    """Its opinions; its plain reply where it has none."""
    told = reasoner.weigh(asked)
    silent = [number for number, opinion in enumerate(told) if not opinion]
    if silent:
        for number, replies in zip(silent, reasoner.reply([asked[number] for number in silent]), strict=True):
            told[number] = [Weighed(replies[0], 1.0)]
    return told


def medoid(group: Sequence[Episode]) -> tuple[int, float]:
    """Place and mean agreement of the episode that agrees most with the others, the earliest among equals; (0, 1.0) for one alone.

    Two episodes agree by the Dice of their masks; by 1 when both find nothing there; by 0 where one has no mask at all.
    """
    if len(group) == 1:
        return 0, 1.0
    agree = _Agreements()
    total = np.zeros(len(group))
    for i, one in enumerate(group):
        for j in range(i + 1, len(group)):
            total[[i, j]] += agree(one, group[j])
    best = int(np.argmax(np.round(total, 9)))
    return best, float(total[best] / (len(group) - 1))


def expected_best(group: Sequence[Episode], shares: Sequence[float], *, caution: float = 0.0) -> tuple[Episode, float]:
    """The episode, one of the group or pieces of one structure together, with the highest E[agreement] - caution * Var[agreement] over
    the group by its shares (they sum to 1), and its E[agreement]. A fault or a refusal agrees with nothing, not with itself either."""
    agree = _Agreements()
    best: tuple[float, Episode, float] | None = None
    for candidate in (*group, *_together(group, shares)):
        values = np.array([agree(candidate, one) for one in group])
        mean = float(values @ np.asarray(shares))
        worth = mean - caution * float((values - mean) ** 2 @ np.asarray(shares))
        if best is None or worth > best[0] + 1e-9:
            best = worth, candidate, mean
    assert best is not None
    return best[1], best[2]


def _together(group: Sequence[Episode], shares: Sequence[float]) -> Iterator[Episode]:
    """Readings that are pieces or sides of one structure, drawn together: by twos, threes, fours of the likeliest of each structure."""
    vocabulary = Vocabulary.load()
    above: dict[str, list[int]] = {}
    for place, one in enumerate(group):
        entry = vocabulary.resolve(one.target) if one.status == "ok" and one.target is not None else None
        for whole in vocabulary.wholes(entry.name) if entry is not None else ():
            above.setdefault(whole, []).append(place)
    seen: set[tuple[int, ...]] = set()
    for whole, places in above.items():
        likeliest = sorted(places, key=lambda place: -shares[place])[:_TOGETHER]
        for count in range(2, len(likeliest) + 1):
            for some in combinations(likeliest, count):
                if some not in seen:
                    seen.add(some)
                    yield _union([group[place] for place in some], [shares[place] for place in some], whole)


def _union(parts: Sequence[Episode], shares: Sequence[float], whole: str) -> Episode:
    names = [part.target or "" for part in parts]
    masks = [part.mask for part in parts if part.mask is not None]
    complete = Vocabulary.load().pieces(whole, {(e.name if (e := Vocabulary.load().resolve(n)) else n) for n in names})
    name = whole if complete else " and ".join(names)
    array = np.logical_or.reduce([mask.array for mask in masks])
    told = " or ".join(f"{n!r} ({share:.2f})" for n, share in zip(names, shares, strict=True))
    answer = parts[0].answer
    return replace(
        parts[0],
        answer=None if answer is None else replace(answer, target=name),
        mask=Mask(array, masks[0].grid, name),
        message=f"The request may mean {told}: all of it is drawn.",
        presence=max((part.presence for part in parts if part.presence is not None), default=None),
    )


class _Agreements:
    """Agreement of episodes by Dice, each pair of different masks compared once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}
        self._keys: dict[int, tuple[Episode, str]] = {}

    def __call__(self, one: Episode, other: Episode) -> float:
        a, b = sorted((self._key(one), self._key(other)))
        if (a, b) not in self._known:
            self._known[a, b] = _agreement(one, other)
        return self._known[a, b]

    def _key(self, episode: Episode) -> str:
        """Equal for equal masks."""
        import hashlib

        if id(episode) not in self._keys:
            packed = b"" if episode.mask is None else np.packbits(episode.mask.array).tobytes()
            self._keys[id(episode)] = episode, hashlib.blake2b(packed, digest_size=12).hexdigest() if episode.mask is not None else ""
        return self._keys[id(episode)][1]


def _agreement(one: Episode, other: Episode) -> float:
    if one.mask is None or other.mask is None:
        return 0.0
    found = dice(one.mask.array, other.mask.array)
    return 1.0 if found is None else found


def _said(episode: Episode) -> str:
    return "absent" if episode.status == "absent" else episode.target or episode.status
