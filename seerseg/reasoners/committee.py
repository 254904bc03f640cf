"""`committee:nano,lexicon`: several reasoners about one request, each with a say; who knows nothing of it says nothing.

A member that weighs its answers gives each its share, another all of its say to its greedy reply. Rules are sure of the words they
know and silent about others; a small model guesses at those: together they are better than either (documentation/experiments.md).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import UsageError
from seerseg.protocols.messages import Message
from seerseg.protocols.seer import last_between, normalise_name
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.base import Reasoner, ReasonerCard, Weighed, WeighingReasoner

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
        cards = [member.card for member in self.members]
        said = hashlib.sha256("|".join(card.identity for card in cards).encode()).hexdigest()
        return ReasonerCard(
            name="committee",
            identity=f"committee-{said[:16]}",
            licence=", ".join(dict.fromkeys(card.licence for card in cards if card.licence)),
            source=", ".join(card.identity for card in cards),
            sees_images=any(card.sees_images for card in cards),
            notes=" ".join(card.notes for card in cards if card.notes),
        )

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """The shares of those that have an opinion, multiplied (a log-linear pool); the reply is that of the member surest of it."""
        opinions = [_opinions(member, dialogues) for member in self.members]
        return [_together([opinion[number] for opinion in opinions]) for number in range(len(dialogues))]

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """The likeliest for one sample with seed 0, else drawn by share. Where one member alone has an opinion it speaks for itself, where
        none has the first."""
        opinions = [_opinions(member, dialogues) for member in self.members]
        out: list[list[str]] = [[] for _ in dialogues]
        alone: dict[int, list[int]] = {}
        for number, dialogue in enumerate(dialogues):
            heard = [place for place, opinion in enumerate(opinions) if opinion[number]]
            if len(heard) < 2:
                alone.setdefault(heard[0] if heard else 0, []).append(number)
                continue
            found = _together([opinion[number] for opinion in opinions])
            drawing = random.Random(f"{seed}/{dialogue[-1].text}")
            greedy = samples == 1 and seed == 0
            out[number] = [found[0].reply] if greedy else drawing.choices([w.reply for w in found], [w.share for w in found], k=samples)
        for place, numbers in alone.items():
            replies = self.members[place].reply([dialogues[number] for number in numbers], samples, seed)
            for number, said in zip(numbers, replies, strict=True):
                out[number] = said
        return out


def _opinions(member: Reasoner, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
    if isinstance(member, WeighingReasoner):
        return member.weigh(dialogues)
    return [[Weighed(replies[0], 1.0)] for replies in member.reply(dialogues)]


def _together(opinions: Sequence[Sequence[Weighed]]) -> list[Weighed]:
    """One list by answer: shares multiplied, where an answer that a member does not name has `DISSENT` of its say, divided among them."""
    heard = [{_answer(one.reply): one for one in opinion} for opinion in opinions if opinion]
    answers = list(dict.fromkeys(answer for opinion in heard for answer in opinion))
    scores = dict.fromkeys(answers, 1.0)
    for opinion in heard:
        left = DISSENT / max(1, len(answers) - len(opinion))
        for answer in answers:
            scores[answer] *= (1 - DISSENT) * opinion[answer].share + left / len(answers) if answer in opinion else left
    total = sum(scores.values())
    replies = {a: max((o[a] for o in heard if a in o), key=lambda one: one.share).reply for a in answers}
    return sorted((Weighed(replies[a], scores[a] / total) for a in answers), key=lambda one: -one.share)


def _answer(reply: str) -> str:
    said = last_between(reply, "answer")
    return reply if said is None else normalise_name(said)


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **settings: Any
) -> CommitteeReasoner:
    """source: the members, separated by commas. settings: those of the lexicon among them (`descriptions`, `splits`)."""
    names = [name for part in str(source or "").split(",") if (name := part.strip())]
    if any(name.partition(":")[0].casefold() == "committee" for name in names):
        raise UsageError("A committee cannot be a member of a committee: name its members.")
    made = [
        load_reasoner(name, device=device, dtype=dtype, offline=offline, **(settings if name.partition(":")[0] == "lexicon" else {}))
        for name in names
    ]
    return CommitteeReasoner(made)
