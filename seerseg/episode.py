"""The loop, once: requests on one case become dialogues, replies become answers, answers become masks.

Prediction, evolution, trace checking and training drive the same `Dialogue`; only where replies come from differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from seerseg.errors import SegmenterError
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer, Fault, Protocol
from seerseg.protocols.messages import Message, text_message
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners.base import Reasoner
from seerseg.segmenters.base import Segmentation, Segmenter, Session
from seerseg.skills.base import EmptyBank, Query, Retriever, Skill, named_skills
from seerseg.views import CaseViews
from seerseg.volume import Mask, Volume

Status = Literal["ok", "absent", "empty", "unsupported", "fault"]
SKILLS_SHOWN = 3
ABSENT_BELOW = 0.5  # a presence score under this means "not in this scan"


@dataclass(frozen=True)
class Targets:
    """Names that may be answered. closed: nothing else may (a dataset's labels, a closed vocabulary)."""

    names: tuple[str, ...] = ()
    closed: bool = False

    def resolve(self, said: str) -> str | None:
        """The listed name that `said` spells; `said` itself when any name may be answered; None when it is not allowed."""
        wanted = normalise_name(said)
        for name in self.names:
            if normalise_name(name) == wanted:
                return name
        return None if self.closed else said


@dataclass(frozen=True, eq=False)
class Episode:
    """One request solved.

    status: "ok" a mask with voxels; "absent" the target is not in the scan (`absent_by` says who found so), mask empty;
    "empty" the segmenter found nothing of a target it was sure to look for, mask empty; "unsupported" the segmenter cannot
    do what was answered, no mask; "fault" no reply could be read, no mask. message: a sentence for the person, or "".
    """

    request: str
    status: Status
    replies: tuple[str, ...]
    answer: Answer | None
    mask: Mask | None
    message: str = ""
    absent_by: Literal["reasoner", "segmenter"] | None = None
    presence: float | None = None
    nearest: tuple[str, ...] = ()
    skills_shown: tuple[str, ...] = ()
    reason_s: float = 0.0
    segment_s: float = 0.0

    @property
    def target(self) -> str | None:
        """The name that was answered, None when absent or unread."""
        return None if self.answer is None else self.answer.target

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without voxels."""
        answer = self.answer
        return {
            "text": self.request,
            "target_answered": self.target,
            "status": self.status,
            "absent_by": self.absent_by,
            "message": self.message,
            "presence": None if self.presence is None else round(float(self.presence), 4),
            "nearest": list(self.nearest),
            "evidence": answer.evidence if answer else "",
            "rationale": answer.rationale if answer else "",
            "prompt": answer.prompt.to_json() if answer and answer.prompt else None,
            "replies": list(self.replies),
            "skills_shown": list(self.skills_shown),
            "skills": list(answer.skills) if answer else [],
            "reason_s": round(self.reason_s, 4),
            "segment_s": round(self.segment_s, 4),
        }


@dataclass(eq=False)
class Dialogue:
    """The state of one request: messages so far, what the last reply said, what is to be drawn."""

    views: CaseViews
    request: str
    protocol: Protocol
    skills: tuple[Skill, ...] = ()
    targets: Targets = field(default_factory=Targets)
    messages: list[Message] = field(init=False)
    replies: list[str] = field(init=False, default_factory=list)
    answer: Answer | None = field(init=False, default=None)
    fault: Fault | None = field(init=False, default=None)
    pending: Prompt | None = field(init=False, default=None)
    segmentation: Segmentation | None = field(init=False, default=None)
    done: bool = field(init=False, default=False)
    reason_s: float = field(init=False, default=0.0)
    segment_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.messages = self.protocol.opening(self.views, self.request, self.skills, self.targets.names)

    def step(self, reply: str) -> bool:
        """Take a reply. True when no further reply is wanted (what is `pending` may still have to be drawn)."""
        self.replies.append(reply)
        self.messages.append(text_message("assistant", reply))
        self.pending = None
        read = self._allowed(self.protocol.read(reply, self.views))
        if isinstance(read, Fault):
            self.fault = read
            self.done = True
            return True
        self.fault, self.answer, self.pending = None, read, read.prompt
        self.done = read.done or read.absent or len(self.replies) >= self.protocol.max_turns
        return self.done

    def observe(self, segmentation: Segmentation) -> None:
        """Take what was drawn for `pending`; unless done, the protocol shows it to the reasoner."""
        self.pending = None
        self.segmentation = segmentation
        self.segment_s += segmentation.seconds
        if not self.done:
            shown = self.protocol.observe(segmentation.mask, self.views)
            if shown is None:
                self.done = True
            else:
                self.messages.append(shown)

    def forget_fault(self) -> None:
        """Back to before the reply that could not be read, so that another can be asked for."""
        if self.fault is not None:
            self.messages.pop()
            self.fault, self.done = None, False

    def _allowed(self, read: Answer | Fault) -> Answer | Fault:
        if isinstance(read, Fault):
            return read
        skills = named_skills(read.rationale, self.skills)
        if read.target is None:
            return replace(read, skills=skills)
        name = self.targets.resolve(read.target)
        if name is None:
            return Fault(f"The answer {read.target!r} is none of the {len(self.targets.names)} names that may be answered.")
        prompt = read.prompt
        if prompt is not None and prompt.text is not None:
            prompt = replace(prompt, text=name)
        return replace(read, target=name, prompt=prompt, skills=skills)


def open_dialogues(
    views: CaseViews,
    requests: Sequence[str],
    *,
    protocol: Protocol,
    bank: Retriever | None = None,
    targets: Targets | None = None,
) -> list[Dialogue]:
    """One dialogue per request on the same views."""
    retriever, allowed = bank or EmptyBank(), targets or Targets()
    queries = [Query(text, views.modality, targets=allowed.names if allowed.closed else ()) for text in requests]
    return [Dialogue(views, q.text, protocol, skills=tuple(retriever.retrieve(q, SKILLS_SHOWN)), targets=allowed) for q in queries]


def reason(dialogues: Sequence[Dialogue], reasoner: Reasoner, *, seed: int = 0, retries: int = 1) -> None:
    """One reply to every dialogue that wants one, in one batch; a reply that cannot be read is asked for again, sampled."""
    waiting = [d for d in dialogues if not d.done and d.pending is None]
    for attempt in range(retries + 1):
        if not waiting:
            return
        started = time.perf_counter()
        replies = reasoner.reply([d.messages for d in waiting], samples=1, seed=seed + attempt)
        seconds = (time.perf_counter() - started) / len(waiting)
        for dialogue, reply in zip(waiting, replies, strict=True):
            dialogue.step(reply[0])
            dialogue.reason_s += seconds
        waiting = [d for d in waiting if d.fault is not None]
        if attempt < retries:
            for dialogue in waiting:
                dialogue.forget_fault()


def draw(dialogues: Sequence[Dialogue], volume: Volume, segmenter: Segmenter, sessions: dict[int, Session] | None = None) -> None:
    """Draw everything that is pending, in one call, so that the image is encoded once.

    sessions: where given, a dialogue that will go on is drawn in a session of its own (by `id`), which remembers its turns.
    """
    batch = [d for d in dialogues if d.pending is not None]
    if sessions is not None and segmenter.capabilities.session:
        for dialogue in batch:
            if id(dialogue) not in sessions:
                sessions[id(dialogue)] = segmenter.session(volume)
            if dialogue.pending is not None:
                dialogue.observe(sessions[id(dialogue)].add(dialogue.pending))
        return
    prompts = [d.pending for d in batch if d.pending is not None]
    if prompts:
        for dialogue, segmentation in zip(batch, segmenter.segment(volume, prompts), strict=True):
            dialogue.observe(segmentation)


def solve(
    views: CaseViews,
    volume: Volume,
    requests: Sequence[str],
    *,
    protocol: Protocol,
    reasoner: Reasoner,
    segmenter: Segmenter,
    bank: Retriever | None = None,
    targets: Targets | None = None,
    seed: int = 0,
) -> list[Episode]:
    """All requests of one case, to the end."""
    dialogues = open_dialogues(views, requests, protocol=protocol, bank=bank, targets=targets)
    reason(dialogues, reasoner, seed=seed)
    return finish(dialogues, volume, reasoner=reasoner, segmenter=segmenter, seed=seed)


def finish(dialogues: Sequence[Dialogue], volume: Volume, *, reasoner: Reasoner, segmenter: Segmenter, seed: int = 0) -> list[Episode]:
    """Draw what the first replies asked for; go on with dialogues of several turns until all are done."""
    several_turns = any(d.protocol.max_turns > 1 for d in dialogues)
    sessions: dict[int, Session] | None = {} if several_turns else None
    try:
        draw(dialogues, volume, segmenter, sessions)
        while any(not d.done for d in dialogues):
            reason(dialogues, reasoner, seed=seed)
            draw(dialogues, volume, segmenter, sessions)
    finally:
        for session in (sessions or {}).values():
            session.close()
    return [conclude(d, volume) for d in dialogues]


def conclude(dialogue: Dialogue, volume: Volume) -> Episode:
    """What came of a dialogue that is done and drawn."""
    answer, drawn = dialogue.answer, dialogue.segmentation
    common: dict[str, Any] = {
        "request": dialogue.request,
        "replies": tuple(dialogue.replies),
        "answer": answer,
        "skills_shown": tuple(s.id for s in dialogue.skills),
        "reason_s": dialogue.reason_s,
        "segment_s": dialogue.segment_s,
    }
    if dialogue.fault is not None or answer is None:
        why = dialogue.fault.reason if dialogue.fault else "There was no reply."
        return Episode(status="fault", mask=None, message=f"The reasoner's reply could not be read: {why}", **common)
    if answer.absent:
        said = "The reasoner finds that the target is not in this scan."
        return Episode(status="absent", absent_by="reasoner", mask=_nothing(volume, ""), message=said, **common)
    if drawn is None:
        return Episode(status="empty", mask=_nothing(volume, answer.target or ""), message="Nothing was drawn.", **common)
    common |= {"presence": drawn.presence, "nearest": drawn.nearest}
    if drawn.status == "unsupported":
        return Episode(status="unsupported", mask=None, message=drawn.message, **common)
    if drawn.mask is None:
        raise SegmenterError(f"The segmenter answered {drawn.status!r} without a mask.")
    name = answer.target or drawn.mask.name
    mask = Mask(drawn.mask.array, drawn.mask.grid, name)
    if drawn.status == "ok":
        return Episode(status="ok", mask=mask, message=drawn.message, **common)
    if drawn.presence is not None and drawn.presence < ABSENT_BELOW:
        said = f"The segmenter does not find {name!r} in this scan (presence {drawn.presence:.2f})."
        return Episode(status="absent", absent_by="segmenter", mask=mask, message=said, **common)
    return Episode(status="empty", mask=mask, message=drawn.message or f"The segmenter found no voxel of {name!r}.", **common)


def _nothing(volume: Volume, name: str) -> Mask:
    return Mask(np.zeros(volume.grid.shape_zyx, dtype=bool), volume.grid, name)
