"""A protocol is a dialogue grammar: what the reasoner is told, how its reply is read, what an SFT target looks like,
and what well-formed means. The four published systems are four protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol as TypingProtocol
from typing import runtime_checkable

from seerseg.prompts import Prompt
from seerseg.protocols.messages import Message
from seerseg.skills.base import Skill
from seerseg.views import CaseViews, ViewSpec
from seerseg.volume import Mask

ABSENT = "absent"


@dataclass(frozen=True)
class Trace:
    """Evidence, rationale, answer and skill tag for one request: one SFT sample of a SEER-Trace.

    answer: the canonical name of the target, or "absent" when it is not in the scan.
    """

    evidence: str
    rationale: str
    answer: str
    skill: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a reply says.

    target: the name that was answered, None with absent=True ("the target is not in this scan"); prompt: what the
    segmenter is given, None when absent or when a turn only stops; done: no further turn is wanted;
    skills: ids or tags of the skills that the rationale names.
    """

    target: str | None
    prompt: Prompt | None
    evidence: str = ""
    rationale: str = ""
    absent: bool = False
    done: bool = True
    skills: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """Why a reply could not be read, in one sentence."""

    reason: str


@runtime_checkable
class Protocol(TypingProtocol):
    """A dialogue grammar. Methods are pure; `read` and `wellformed` never raise, on any string."""

    @property
    def name(self) -> str:
        """The name used on the command line and in run folders."""
        ...

    @property
    def max_turns(self) -> int:
        """How many replies an episode may have."""
        ...

    @property
    def prompt_kinds(self) -> frozenset[str]:
        """The kinds of prompt its answers make ("text", "box2d", ...): a segmenter must take them."""
        ...

    @property
    def view_spec(self) -> ViewSpec:
        """The views it was published with; a plan may replace them."""
        ...

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """The dialogue's first messages. targets: names that may be answered, empty when any may."""
        ...

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """Read a reply."""
        ...

    def target(self, trace: Trace, views: CaseViews) -> str:
        """The reply that an SFT sample is trained on."""
        ...

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """What the reasoner is shown of the mask after a turn that is not the last; None when nothing."""
        ...

    def wellformed(self, reply: str) -> float:
        """0..1, how well a reply keeps the grammar."""
        ...
