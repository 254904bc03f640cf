"""A protocol is a dialogue grammar: what the reasoner is told, how its reply is read, what an SFT target looks like,
and what well-formed means. The four published systems are four protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol as TypingProtocol
from typing import runtime_checkable

from seerseg.prompts import Box2D, Prompt
from seerseg.protocols.messages import Message
from seerseg.skills.base import Skill
from seerseg.views import CaseViews, ViewSpec
from seerseg.volume import Mask

ABSENT = "absent"


@dataclass(frozen=True)
class KeySlice:
    """The target on one slice of the case's canonical grid: what spatial answers are made from.

    area: voxels of the target there; boxes: one per connected component there (8 neighbours), the largest component first;
    points: two voxels (z, y, x) inside the target, each the deepest point of what is left when the discs around the points
    before it are taken away.
    """

    axis: int
    index: int
    area: int
    boxes: tuple[Box2D, ...]
    points: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Turn:
    """One action of a trajectory. prompt: what the segmenter was given, None for stopping; dice: of the mask after it; mask: that mask
    (`volume.encode_runs`), "" when there is none yet; learn: the action is to be learned, and not only to be seen as what there is to
    mend."""

    prompt: Prompt | None
    dice: float
    mask: str = ""
    learn: bool = True


@dataclass(frozen=True)
class Trace:
    """What is known of one request: evidence, rationale, answer and skill tag, and where the target lies. Every protocol makes
    its SFT samples from it.

    answer: the canonical name of the target, or "absent" when it is not in the scan. slices: for each axis the slice of the
    largest area first, then further slices along the planned viewing axis by index; none when absent. turns: an expert's
    trajectory, the last one a stop; none when it was not made. brief: evidence and rationale for small reasoners, which say nothing of
    the target before the request is read: the scan, then the words and what they mean.
    """

    evidence: str
    rationale: str
    answer: str
    skill: str | None = None
    slices: tuple[KeySlice, ...] = ()
    turns: tuple[Turn, ...] = ()
    brief: tuple[str, str] | None = None

    def spoken(self, *, brief: bool) -> Trace:
        """The trace as a reasoner is to learn it: with its brief evidence and rationale where that is asked for and known."""
        if not brief or self.brief is None:
            return self
        return replace(self, evidence=self.brief[0], rationale=self.brief[1])


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

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """The replies that SFT samples are trained on, one per turn. DatasetError when the trace lacks what the protocol needs."""
        ...

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """What the reasoner is shown of the mask after a turn that is not the last; None when nothing."""
        ...

    def wellformed(self, reply: str) -> float:
        """0..1, how well a reply keeps the grammar."""
        ...
