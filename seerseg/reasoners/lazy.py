"""A reasoner that is loaded when it is first asked; its card is known before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from seerseg.protocols.messages import Message
from seerseg.reasoners.base import Reasoner, ReasonerCard, Weighed, WeighingReasoner


class LazyReasoner:
    """card: that of what `load` is going to give; most_bytes: as of `HoldingReasoner`, loaded or not.

    Asking it about no dialogue loads nothing; a fault of loading comes with the first question, and again with the next.
    """

    def __init__(self, card: ReasonerCard, load: Callable[[], Reasoner], *, most_bytes: int = 0) -> None:
        self.card, self.most_bytes = card, most_bytes
        self._load = load
        self._made: Reasoner | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether it was needed so far."""
        return self._made is not None

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """As the reasoner's."""
        return self.made.reply(dialogues, samples, seed) if dialogues else []

    @property
    def made(self) -> Reasoner:
        """The reasoner, loaded."""
        with self._lock:
            if self._made is None:
                self._made = self._load()
            return self._made


class LazyWeigher(LazyReasoner):
    """One that weighs. load: gives a `WeighingReasoner`."""

    def __init__(self, card: ReasonerCard, load: Callable[[], WeighingReasoner], *, most_bytes: int = 0) -> None:
        super().__init__(card, load, most_bytes=most_bytes)

    @property
    def _weigher(self) -> WeighingReasoner:
        made = self.made
        assert isinstance(made, WeighingReasoner)
        return made

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """As the reasoner's."""
        return self._weigher.weigh(dialogues) if dialogues else []
