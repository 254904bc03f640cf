"""What members of a committee or a cascade think of a request, and one reply drawn from it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from seerseg.protocols.messages import Message
from seerseg.protocols.seer import last_between, normalise_name
from seerseg.reasoners.base import Reasoner, ReasonerCard, Weighed, WeighingReasoner


def opinions(member: Reasoner, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
    """What it weighs; a member that cannot gives all of its say to its greedy reply."""
    if isinstance(member, WeighingReasoner):
        return member.weigh(dialogues)
    return [[Weighed(replies[0], 1.0, spoken=True)] for replies in member.reply(dialogues)]


def answer_of(reply: str) -> str:
    """What tells one opinion from another: the answer, normalised, or the whole reply where it has none."""
    said = last_between(reply, "answer")
    return reply if said is None else normalise_name(said)


def spoken(opinion: Sequence[Weighed]) -> Weighed:
    """What its reasoner says when plainly asked, else the likeliest."""
    return next((one for one in opinion if one.spoken), opinion[0])


def drawn(opinion: Sequence[Weighed], first: Weighed, dialogue: Sequence[Message], samples: int, seed: int) -> list[str]:
    """`first` for one sample with seed 0, else drawn by share; by request and seed alone."""
    if samples == 1 and seed == 0:
        return [first.reply]
    draw = random.Random(f"{seed}/{dialogue[-1].text}")
    return draw.choices([one.reply for one in opinion], [one.share for one in opinion], k=samples)


def joint_card(name: str, cards: Sequence[ReasonerCard], *, besides: str = "") -> ReasonerCard:
    """Identity and licences of all members. besides: what else shapes replies."""
    said = hashlib.sha256("|".join([*(card.identity for card in cards), *filter(None, [besides])]).encode()).hexdigest()
    return ReasonerCard(
        name=name,
        identity=f"{name}-{said[:16]}",
        licence=", ".join(dict.fromkeys(card.licence for card in cards if card.licence)),
        source=", ".join(card.identity for card in cards),
        sees_images=any(card.sees_images for card in cards),
        notes=" ".join(card.notes for card in cards if card.notes),
    )
