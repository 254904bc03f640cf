"""`cascade`: reasoners that are asked one after the other, the next only about what those before it cannot read. The default.

`cascade` is `cascade:lexicon,nano`: the rules read what they have words for, at no cost; only a request whose words they do not know goes
to the small model, which is loaded then, and is believed only where it is sure. Where nobody is, the first says what it says: the rules'
"absent". What "sure" means was chosen on validation language (documentation/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import UsageError
from seerseg.protocols.base import ABSENT
from seerseg.protocols.messages import Message
from seerseg.reasoners import load_members
from seerseg.reasoners.base import Reasoner, ReasonerCard, Weighed, WeighingReasoner, most_bytes
from seerseg.reasoners.opinions import answer_of, drawn, joint_card, opinions, spoken

SURE = 0.4
"""The least share of the likeliest answer of a member after the first; it must also be what that says when plainly asked, and sound."""


class CascadeReasoner:
    """The first member speaks wherever it has an opinion. One after it is asked about the rest alone, and believed where it cannot weigh
    its answers or is sure of one."""

    def __init__(self, members: Sequence[Reasoner], *, sure: float = SURE) -> None:
        if len(members) < 2:
            raise UsageError("A cascade needs at least two reasoners: cascade:lexicon,nano.")
        self.members, self.sure = tuple(members), sure

    @cached_property
    def card(self) -> ReasonerCard:
        """Identity and licences of all members; nothing is loaded for it."""
        cards = [member.card for member in self.members]
        made = joint_card("cascade", cards, besides=str(self.sure))
        return replace(made, looks_late=made.sees_images and not cards[0].sees_images)

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """The reply of the member that reads the request; where that is one after the first, samples are drawn by share."""
        out: list[list[str]] = [[] for _ in dialogues]
        left, greedy = list(range(len(dialogues))), (samples, seed) == (1, 0)
        for place, member in enumerate(self.members):
            if not left:
                return out
            told = dict(zip(left, self._told(place, [dialogues[number] for number in left]), strict=True))
            own = [number for number in left if self._speaks(place, told[number])]
            if greedy or (place > 0 and isinstance(member, WeighingReasoner)):
                found = [drawn(told[number], spoken(told[number]), dialogues[number], samples, seed) for number in own]
            else:
                found = member.reply([dialogues[number] for number in own], samples, seed)
            for number, said in zip(own, found, strict=True):
                out[number] = said
            left = [number for number in left if not out[number]]
        for number, said in zip(left, self.members[0].reply([dialogues[number] for number in left], samples, seed), strict=True):
            out[number] = said
        return out

    @property
    def most_bytes(self) -> int:
        """That of all members."""
        return sum(most_bytes(member) for member in self.members)

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """What the first member thinks that has an opinion, sure or not: whoever asks for shares decides by them."""
        out: list[list[Weighed]] = [[] for _ in dialogues]
        for member in self.members:
            left = [number for number, opinion in enumerate(out) if not opinion]
            found = opinions(member, [dialogues[number] for number in left]) if left else []
            for number, opinion in zip(left, found, strict=True):
                out[number] = opinion
        return out

    def _told(self, place: int, asked: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """Opinions of a member. One after the first that says "absent" is not asked how sure it is of that: it would cost the most."""
        member = self.members[place]
        if place == 0 or not isinstance(member, WeighingReasoner):
            return opinions(member, asked)
        names = [number for number, (reply,) in enumerate(member.reply(asked)) if answer_of(reply) != ABSENT]
        weighed = dict(zip(names, member.weigh([asked[number] for number in names]), strict=True))
        return [weighed.get(number, []) for number in range(len(asked))]

    def _speaks(self, place: int, opinion: Sequence[Weighed]) -> bool:
        return bool(opinion) and (place == 0 or (opinion[0].share >= self.sure and opinion[0].spoken and opinion[0].sound))


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **settings: Any
) -> CascadeReasoner:
    """source: the members, separated by commas; None: lexicon,nano. settings: those of the lexicon among them (`splits` ...)."""
    whole = f"cascade:{source}" if source else "cascade"
    return CascadeReasoner(load_members(whole, device=device, dtype=dtype, offline=offline, lazily=True, **settings))
