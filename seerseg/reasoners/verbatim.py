"""The reasoner that does nothing: the request's own words are the answer. The other control: what free text costs a segmenter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from seerseg.protocols.messages import Message
from seerseg.protocols.seer import MAX_ANSWER_CHARS
from seerseg.reasoners.base import ReasonerCard

_REQUEST = re.compile(r"<raw_prompt>(.*)</raw_prompt>", re.DOTALL)


class VerbatimReasoner:
    """Answers every request with itself, cut to what an answer may hold."""

    card = ReasonerCard(
        name="verbatim", identity="verbatim-1", sees_images=False, notes="control: the request is sent to the segmenter as it is"
    )

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """The same reply however many samples."""
        return [[self._one(dialogue)] * samples for dialogue in dialogues]

    def _one(self, dialogue: Sequence[Message]) -> str:
        said = next((m.text for m in reversed(dialogue) if m.role == "user"), "")
        found = _REQUEST.search(said)
        words = " ".join((found[1] if found else said).split())[:MAX_ANSWER_CHARS]
        return f"<evidence>the request alone</evidence><rationale>sent as it is</rationale><answer>{words}</answer>"


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> VerbatimReasoner:
    """There is nothing to load."""
    return VerbatimReasoner()
