"""The reasoner seam: something that reads a dialogue (text and slice images) and writes a reply.

An implementation is a class with the methods of `Reasoner` and one entry-point line in the group `seerseg.reasoners`.
Prompts are built so that what is shared comes first: system, images, instruction, and the request last; an implementation
should encode the images of one case once, however many requests and samples follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from seerseg.protocols.messages import Message


@dataclass(frozen=True)
class ReasonerCard:
    """Where a reasoner comes from. `identity` changes whenever its replies could; `sees_images` is False for controls
    that read words alone; looks_late: it does, but most of its replies are made from the words alone."""

    name: str
    identity: str
    licence: str = ""
    source: str = ""
    sees_images: bool = True
    looks_late: bool = False
    notes: str = ""


@runtime_checkable
class Reasoner(Protocol):
    """Writes replies. Deterministic for a given seed; `samples` 1 with seed 0 is the greedy reply."""

    @property
    def card(self) -> ReasonerCard:
        """Where it comes from."""
        ...

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """For each dialogue (ending with a user message) `samples` replies. A reply is any string at all."""
        ...


class ReasonerFactory(Protocol):
    """Loads a reasoner. `source`: a folder or hub id, or None for its default; never the network when offline."""

    def __call__(
        self, *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **settings: Any
    ) -> Reasoner:
        """A loaded reasoner; `settings` are its own."""
        ...


@runtime_checkable
class HoldingReasoner(Protocol):
    """A reasoner that holds main memory worth counting."""

    @property
    def most_bytes(self) -> int:
        """The most that it may come to hold: weights and what it remembers of dialogues; 0 where both are on a GPU."""
        ...


def most_bytes(reasoner: Reasoner) -> int:
    """What a reasoner says that it may come to hold of main memory; 0 for one that says nothing."""
    return reasoner.most_bytes if isinstance(reasoner, HoldingReasoner) else 0


@dataclass(frozen=True)
class Weighed:
    """One thing that a request can mean: a reply that says so, and how likely that is, 0..1. spoken: it is what the reasoner replies when
    it is plainly asked, which is not always the likeliest; at most one of a list is. sound: False where the reply's own reasons are known
    not to support its answer."""

    reply: str
    share: float
    spoken: bool = False
    sound: bool = True


@runtime_checkable
class WeighingReasoner(Reasoner, Protocol):
    """A reasoner that can say how likely every answer is, calibrated on language that it was not trained on."""

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """For each dialogue replies with different answers, the likeliest first; their shares sum to 1. Empty: no opinion at all."""
        ...
