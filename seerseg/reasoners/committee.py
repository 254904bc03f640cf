"""`committee:nano,lexicon`: several reasoners about one request, each with a say; who knows nothing of it says nothing.

A member that weighs its answers gives each its share, another all of its say to its greedy reply. Rules are sure of the words they
know and silent about others; a small model guesses at those: together they are better than either (documentation/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import UsageError
from seerseg.protocols.messages import Message
from seerseg.reasoners import load_members
from seerseg.reasoners.base import Reasoner, ReasonerCard, Weighed, most_bytes
from seerseg.reasoners.opinions import answer_of, drawn, joint_card, opinions, spoken

DISSENT = 0.1
"""How much of its say a member leaves to answers that it does not name: it may be mistaken."""


class CommitteeReasoner:
    """Replies of the members, by what they think together."""

    def __init__(self, members: Sequence[Reasoner]) -> None:
        if len(members) < 2:
            raise UsageError("A committee needs at least two reasoners: committee:nano,lexicon.")
        self.members = tuple(members)

    @cached_property
    def card(self) -> ReasonerCard:
        """Identity and licences of all members."""
        return joint_card("committee", [member.card for member in self.members])

    @property
    def most_bytes(self) -> int:
        """That of all members."""
        return sum(most_bytes(member) for member in self.members)

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """The shares of those that have an opinion, multiplied (a log-linear pool); the reply is that of the member surest of it."""
        return [_together([o for o in heard if o]) for heard in self._heard(dialogues)]

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """The likeliest for one sample with seed 0, else drawn by share. Where one member alone has an opinion it says what it says when
        asked alone, where none has the first replies."""
        out: list[list[str]] = [[] for _ in dialogues]
        asked: dict[int, list[int]] = {}
        for number, (dialogue, told) in enumerate(zip(dialogues, self._heard(dialogues), strict=True)):
            heard = [place for place, opinion in enumerate(told) if opinion]
            if len(heard) > 1:
                found = _together([told[place] for place in heard])
                out[number] = drawn(found, found[0], dialogue, samples, seed)
            elif heard and (len(told[heard[0]]) > 1 or (samples, seed) == (1, 0)):
                out[number] = drawn(told[heard[0]], spoken(told[heard[0]]), dialogue, samples, seed)
            else:
                asked.setdefault(heard[0] if heard else 0, []).append(number)
        for place, numbers in asked.items():
            replies = self.members[place].reply([dialogues[number] for number in numbers], samples, seed)
            for number, said in zip(numbers, replies, strict=True):
                out[number] = said
        return out

    def _heard(self, dialogues: Sequence[Sequence[Message]]) -> list[list[list[Weighed]]]:
        """For each dialogue what each member thinks."""
        told = [opinions(member, dialogues) for member in self.members]
        return [[opinion[number] for opinion in told] for number in range(len(dialogues))]


def _together(found: Sequence[Sequence[Weighed]]) -> list[Weighed]:
    """One list by answer: shares multiplied, where an answer that a member does not name has `DISSENT` of its say, divided among them."""
    heard = [{answer_of(one.reply): one for one in opinion} for opinion in found]
    answers = list(dict.fromkeys(answer for opinion in heard for answer in opinion))
    scores = dict.fromkeys(answers, 1.0)
    for opinion in heard:
        left = DISSENT / max(1, len(answers) - len(opinion))
        for answer in answers:
            scores[answer] *= (1 - DISSENT) * opinion[answer].share + left / len(answers) if answer in opinion else left
    total = sum(scores.values())
    replies = {a: max((o[a] for o in heard if a in o), key=lambda one: one.share).reply for a in answers}
    return sorted((Weighed(replies[a], scores[a] / total) for a in answers), key=lambda one: -one.share)


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **settings: Any
) -> CommitteeReasoner:
    """source: the members, separated by commas. settings: those of the lexicon among them (`descriptions`, `splits`)."""
    return CommitteeReasoner(load_members(f"committee:{source or ''}", device=device, dtype=dtype, offline=offline, **settings))
