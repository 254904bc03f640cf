"""Several readings of one request, and the one that the others agree with most.

A request is read as it is, in other words that the bank knows for the same target, and again by sampling. The mask that is kept is the
medoid by Dice; the mean Dice to the other readings says how sure the answer is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seerseg.episode import SKILLS_SHOWN, Dialogue, Episode, Targets, reason
from seerseg.errors import UsageError
from seerseg.metrics.masks import dice
from seerseg.protocols.base import Protocol
from seerseg.reasoners.base import Reasoner
from seerseg.skills.base import EmptyBank, Query, Retriever
from seerseg.views import CaseViews
from seerseg.volume import Mask


@dataclass(frozen=True)
class ConsensusSettings:
    """readings: how often a request is read in all, 1 for plainly once; least: agreement under which nothing is drawn, 0 for never."""

    readings: int = 1
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.readings < 1 or not 0 <= self.least <= 1:
            raise UsageError(
                f"A consensus needs at least 1 reading and a least agreement from 0 to 1, not {self.readings} and {self.least}."
            )


@dataclass(frozen=True)
class Consensus:
    """agreement: mean agreement of the kept reading with the others, 0..1; readings: text and answer of each, the request's own first."""

    agreement: float
    readings: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"agreement": round(self.agreement, 4), "readings": [{"text": t, "answer": a} for t, a in self.readings]}


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


def open_readings(
    views: CaseViews,
    texts: Sequence[str],
    *,
    readings: int,
    protocol: Protocol,
    bank: Retriever | None = None,
    targets: Targets | None = None,
) -> list[Dialogue]:
    """`readings` dialogues for each text, one after the other: as it is, then reworded, then as it is again (to be sampled)."""
    retriever, allowed = bank or EmptyBank(), targets or Targets()
    out = []
    for text in texts:
        query = Query(text, views.modality, targets=allowed.names if allowed.closed else ())
        skills = tuple(retriever.retrieve(query, SKILLS_SHOWN))
        said = [text, *reworded(text, retriever, query, readings - 1)]
        said += [text] * (readings - len(said))
        out += [Dialogue(views, words, protocol, skills=skills, targets=allowed) for words in said]
    return out


def read(dialogues: Sequence[Dialogue], reasoner: Reasoner, *, readings: int, seed: int = 0) -> None:
    """The first replies: greedy for the first dialogue of each text and every rewording, sampled for repetitions."""
    plain: list[Dialogue] = []
    again: list[tuple[Dialogue, list[Dialogue]]] = []
    for start in range(0, len(dialogues), readings):
        group = dialogues[start : start + readings]
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


def settle(episodes: Sequence[Episode], *, readings: int, least: float = 0.0) -> list[Episode]:
    """One episode for each text from `readings` of them: the medoid, marked with its agreement; emptied where that is under `least`."""
    out = []
    for start in range(0, len(episodes), readings):
        group = episodes[start : start + readings]
        place, agreement = medoid(group)
        kept = replace(
            group[place],
            request=group[0].request,
            consensus=Consensus(agreement, tuple((e.request, _said(e)) for e in group)),
            reason_s=sum(e.reason_s for e in group),
            segment_s=sum(e.segment_s for e in group),
        )
        if agreement < least and kept.mask is not None:
            message = f"The {readings} readings of the request agree too little ({agreement:.2f}, least {least:.2f}): nothing is drawn."
            kept = replace(kept, status="empty", mask=Mask(np.zeros_like(kept.mask.array), kept.mask.grid, kept.mask.name), message=message)
        out.append(kept)
    return out


def medoid(group: Sequence[Episode]) -> tuple[int, float]:
    """Place and mean agreement of the episode that agrees most with the others, the earliest among equals; (0, 1.0) for one alone.

    Two episodes agree by the Dice of their masks; by 1 when both find nothing there; by 0 where one has no mask at all.
    """
    if len(group) == 1:
        return 0, 1.0
    keys = [_key(e) for e in group]
    known: dict[tuple[str, str], float] = {}
    total = np.zeros(len(group))
    for i, one in enumerate(group):
        for j in range(i + 1, len(group)):
            pair = (min(keys[i], keys[j]), max(keys[i], keys[j]))
            if pair not in known:
                known[pair] = _agreement(one, group[j])
            total[[i, j]] += known[pair]
    best = int(np.argmax(np.round(total, 9)))
    return best, float(total[best] / (len(group) - 1))


def _agreement(one: Episode, other: Episode) -> float:
    if one.mask is None or other.mask is None:
        return 0.0
    found = dice(one.mask.array, other.mask.array)
    return 1.0 if found is None else found


def _key(episode: Episode) -> str:
    """Equal for equal masks."""
    import hashlib

    return "" if episode.mask is None else hashlib.blake2b(np.packbits(episode.mask.array).tobytes(), digest_size=12).hexdigest()


def _said(episode: Episode) -> str:
    return "absent" if episode.status == "absent" else episode.target or episode.status
