"""`nano`: a small vision-language reasoner whose weights lie in the package. A default to start from, not a clinical tool.

It is an ordinary model folder of the Qwen3-VL architecture with its own tokeniser, read by the same code as any other. One thing is
added: where the dialogue lists the names that may be answered and the reply names another, the listed name whose reply is likeliest is
taken, or "absent" when that is far less likely than the reply was; a structure of which all pieces are listed stands. It can also say
how likely each of the names is.
Sources, data and measurements:
`seerseg/weights/nano_reasoner/MODEL_CARD.md`; recipe: `scripts/train_nano_reasoner.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import ModelError
from seerseg.protocols.base import ABSENT
from seerseg.protocols.messages import Message
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners.base import ReasonerCard, Weighed
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.lazy import LazyWeigher
from seerseg.reasoners.vlm import VlmReasoner, bytes_ahead, card_ahead
from seerseg.reasoners.vlm_loading import SHIPPED as SHIPPED_MODELS
from seerseg.reasoners.vlm_loading import Source, find
from seerseg.reasoners.vlm_loading import load as load_model
from seerseg.vocabulary import Vocabulary

SHIPPED = SHIPPED_MODELS["nano"]
LICENCE = "CC-BY-SA-4.0"
MARGIN = 1.0
"""Nats by which a reply with a listed name may be less likely than the one with another name; set on validation language."""
DOUBT, MISSED = 3.0, 4.0
"""How a reply's log-likelihood (nats) becomes a share: divided by the first, for "absent", which it says too readily of words it does
not know, after taking off the second. Both were set by likelihood on validation language."""
_MAX_NEW_TOKENS = 192  # replies of names have at most 50; those with boxes, which it can be taught, up to 150
_MAX_BATCH = 48
_TARGETS = re.compile(r"<targets>(.*?)</targets>", re.DOTALL)
_REPLY = re.compile(r"<evidence>(.*?)</evidence><rationale>(.*?)</rationale><answer>(.*?)</answer>", re.DOTALL)


class NanoReasoner(VlmReasoner):
    """The shipped weights, or others that were trained from them."""

    @cached_property
    def card(self) -> ReasonerCard:
        """That of any model, under this name."""
        return _named(super().card, self.loaded.source)

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """`samples` replies per dialogue, in order; answers are among the listed names where there is a list."""
        written = super().reply(dialogues, samples, seed)
        return [[self._listed(d, text) for text in texts] for d, texts in zip(dialogues, written, strict=True)]

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """How likely every listed name, "absent" and the whole that was written are; no opinion where no names are listed."""
        listed = [number for number, dialogue in enumerate(dialogues) if _TARGETS.search(dialogue[-1].text)]
        out: list[list[Weighed]] = [[] for _ in dialogues]
        for number, texts in zip(listed, super().reply([dialogues[number] for number in listed]), strict=True):
            out[number] = self._weighed(dialogues[number], texts[0])
        return out

    def _weighed(self, dialogue: Sequence[Message], reply: str) -> list[Weighed]:
        choice = _Choice.of(dialogue, reply)
        if choice is None:
            return []
        replies = {normalise_name(name): choice.saying(name) for name in choice.names}
        replies |= {ABSENT: choice.absent()}
        if choice.stands:
            replies[choice.wanted] = reply
        asked = list(replies.values())
        likely = self.likelihoods(dialogue, asked if choice.stands else [*asked, reply])
        spoken = choice.wanted if choice.stands else choice.nearest(likely[-1], likely[: len(choice.names)])
        scores = [(score - (MISSED if answer == ABSENT else 0.0)) / DOUBT for answer, score in zip(replies, likely, strict=False)]
        weights = [math.exp(score - max(scores)) for score in scores]
        made = [
            Weighed(replies[a], weight / sum(weights), a == spoken, a == ABSENT or choice.supports(a))
            for a, weight in zip(replies, weights, strict=True)
        ]
        return sorted(made, key=lambda one: -one.share)

    def _listed(self, dialogue: Sequence[Message], reply: str) -> str:
        choice = _Choice.of(dialogue, reply)
        if choice is None or choice.stands:
            return reply
        replies = {normalise_name(name): choice.saying(name) for name in choice.names}
        own, *scores = self.likelihoods(dialogue, [reply, *replies.values()])
        return (replies | {ABSENT: choice.absent()})[choice.nearest(own, scores)]


@dataclass(frozen=True)
class _Choice:
    """A reply beside the names that may be answered (each once; "absent" is none of them). wanted: what it answers."""

    names: tuple[str, ...]
    evidence: str
    rationale: str
    wanted: str

    @classmethod
    def of(cls, dialogue: Sequence[Message], reply: str) -> _Choice | None:
        """None where no names are listed, or the reply has not the parts that it should have."""
        listed, said = _TARGETS.search(dialogue[-1].text), _REPLY.fullmatch(reply)
        if listed is None or said is None:
            return None
        names = {normalise_name(name): name for part in reversed(listed[1].split(";")) if (name := part.strip())}
        names.pop(ABSENT, None)
        return cls(tuple(reversed(names.values())), said[1], said[2], normalise_name(said[3]))

    @cached_property
    def stands(self) -> bool:
        """It may be answered as it is: it is listed, or a structure of which all pieces are."""
        listed = {normalise_name(name) for name in self.names}
        if self.wanted == ABSENT or self.wanted in listed:
            return True
        vocabulary = Vocabulary.load()
        entry = vocabulary.resolve(self.wanted)
        return entry is not None and bool(vocabulary.pieces(entry.name, listed))

    def nearest(self, own: float, scores: Sequence[float]) -> str:
        """What is answered instead, normalised: the likeliest of the names, or "absent". own, scores: log-likelihoods of the reply and of
        one with each name."""
        best = max(range(len(scores)), key=scores.__getitem__, default=None)
        if best is None or (scores[best] < own - MARGIN and not _wider(self.wanted, self.names)):
            return ABSENT
        return normalise_name(self.names[best])

    def supports(self, answer: str) -> bool:
        """Whether the words that the request was turned into ("shoulder blade: ...") are a way to say this answer, of either side."""
        quoted, colon, _ = self.rationale.rpartition(": ")
        vocabulary = Vocabulary.load()
        said, meant = vocabulary.resolve(quoted if colon else self.rationale), vocabulary.resolve(answer)
        return said is not None and meant is not None and said.base == meant.base

    def saying(self, name: str) -> str:
        """The reply, were this its answer."""
        quoted, colon, _ = self.rationale.rpartition(": ")
        return _reply(self.evidence, quoted + colon + name, name)

    def absent(self) -> str:
        """The reply that what is meant is not among the names."""
        return _reply(self.evidence, f"{self.rationale}, not among the names", ABSENT)


def _wider(answer: str, names: Sequence[str]) -> bool:
    """Whether a listed name says more than the answer does; a side counts only where the list has sides."""
    listed = [set(normalise_name(name).split()) for name in names]
    sides = {"left", "right"}
    said = set(answer.split()) - (set() if any(sides & words for words in listed) else sides)
    return any(said < words for words in listed)


def _reply(evidence: str, rationale: str, answer: str) -> str:
    return f"<evidence>{evidence}</evidence><rationale>{rationale}</rationale><answer>{answer}</answer>"


def _named(card: ReasonerCard, source: Source) -> ReasonerCard:
    shipped = source.folder == SHIPPED and source.adapter is None
    return replace(
        card,
        name="nano",
        licence=LICENCE,
        source="shipped with seerseg" if shipped else str(source.adapter or source.folder),
        notes="Small, trained on generated requests and few scans. Not for clinical use. See MODEL_CARD.md.",
    )


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **decoding: Any
) -> NanoReasoner:
    """The shipped reasoner, or that of a folder of the same kind. decoding: fields of `Decoding`."""
    found = find(source or SHIPPED, offline=offline)
    return NanoReasoner(load_model(found, device=device, dtype=dtype), _decoding(decoding))


def load_later(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, **decoding: Any
) -> LazyWeigher:
    """As `load`, but the model is put together when it is first asked."""
    found, settings = find(source or SHIPPED, offline=offline), _decoding(decoding)
    card = _named(card_ahead(found, settings, device=device, dtype=dtype), found)
    size = bytes_ahead(found, settings, device=device, dtype=dtype)
    return LazyWeigher(card, lambda: NanoReasoner(load_model(found, device=device, dtype=dtype), settings), most_bytes=size)


def _decoding(given: dict[str, Any]) -> Decoding:
    unknown = sorted(set(given) - set(Decoding.__dataclass_fields__))
    if unknown:
        raise ModelError(f"The reasoner nano has no setting {unknown[0]!r}; it has {', '.join(Decoding.__dataclass_fields__)}.")
    return Decoding(**{"max_new_tokens": _MAX_NEW_TOKENS, "max_batch": _MAX_BATCH, **given})
