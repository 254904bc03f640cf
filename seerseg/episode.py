"""The loop, once: requests on one case become dialogues, replies become answers, answers become masks.

Prediction, evolution, trace checking and training drive the same `Dialogue`; only where replies come from differs. What may go wrong
between turns: a reply that cannot be read ends a dialogue of several turns, and the mask so far stands (a dialogue of one turn is asked
once more, sampled); a segmenter that fails or refuses in a turn leaves the mask as it was, and the reasoner is told.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from typing import Protocol as Protocol_

import numpy as np

from seerseg.errors import SegmenterError
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer, Fault, Protocol
from seerseg.protocols.combined import Agreement, Checked, narrowed
from seerseg.protocols.messages import Message, TextPart, text_message
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners.base import Reasoner
from seerseg.segmenters.base import RefiningSession, Segmentation, Segmenter, Session
from seerseg.skills.base import EmptyBank, Query, Retriever, Skill, glossed, named_skills
from seerseg.views import CaseViews
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Mask, Volume

Status = Literal["ok", "absent", "empty", "unsupported", "fault"]
SKILLS_SHOWN = 3
ABSENT_BELOW = 0.5  # a presence score under this means "not in this scan"
SECOND_READING = 2  # added to the seed: not the reply that was given, nor the one after a fault


@dataclass(frozen=True)
class Targets:
    """Names that may be answered. closed: nothing else may (a dataset's labels, a closed vocabulary)."""

    names: tuple[str, ...] = ()
    closed: bool = False

    def resolve(self, said: str) -> str | None:
        """The listed name that `said` spells; the structure of which all pieces or both sides are listed ("lungs"); `said` itself when
        any name may be answered; None when it is not allowed."""
        wanted = normalise_name(said)
        for name in self.names:
            if normalise_name(name) == wanted:
                return name
        if not self.closed:
            return said
        entry = Vocabulary.load().resolve(said)
        return entry.name if entry is not None and Vocabulary.load().pieces(entry.name, self._listed) else None

    def pieces(self, name: str) -> tuple[str, ...]:
        """The listed names that `name` is to be drawn as; () for what is asked for as it is: a listed name, or a pair, which a segmenter
        takes by its own word."""
        if not self.closed or normalise_name(name) in self._listed:
            return ()
        vocabulary = Vocabulary.load()
        if name in vocabulary and vocabulary[name].members and self._listed.keys() >= set(vocabulary[name].members):
            return ()
        return tuple(self._listed[piece] for piece in vocabulary.pieces(name, self._listed))

    @cached_property
    def _listed(self) -> dict[str, str]:
        return {normalise_name(name): name for name in self.names}


class Recorded(Protocol_):
    """Anything that goes into the record of an episode."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        ...


@dataclass(frozen=True, eq=False)
class Episode:
    """One request solved.

    status: "ok" a mask with voxels; "absent" the target is not in the scan (`absent_by` says who found so), mask empty;
    "empty" the segmenter found nothing of a target it was sure to look for, mask empty; "unsupported" the segmenter cannot
    do what was answered, no mask; "fault" no reply could be read, no mask. message: a sentence for the person, or "".
    drawn_from: the kinds of prompt that the segmenter was given; agreement: how mask and answer fit, where the protocol checks it; turns:
    what came of each action of a dialogue of several turns (masks only where they were kept); consensus: how several readings agreed.
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
    drawn_from: tuple[str, ...] = ()
    agreement: Agreement | None = None
    turns: tuple[Segmentation, ...] = ()
    consensus: Recorded | None = None

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
            "drawn_from": list(self.drawn_from),
            "agreement": self.agreement.to_json() if self.agreement else None,
            "consensus": self.consensus.to_json() if self.consensus else None,
            "turns": [{"prompt": t.prompt.to_json(), "status": t.status, "message": t.message} for t in self.turns],
            "replies": list(self.replies),
            "skills_shown": list(self.skills_shown),
            "skills": list(answer.skills) if answer else [],
            "reason_s": round(self.reason_s, 4),
            "segment_s": round(self.segment_s, 4),
        }


@dataclass(eq=False)
class Dialogue:
    """The state of one request: messages so far, what the last reply said, what is to be drawn.

    keep_masks: keep the mask of every turn in `turns` (rewards need them; else only the last one is held).
    """

    views: CaseViews
    request: str
    protocol: Protocol
    skills: tuple[Skill, ...] = ()
    targets: Targets = field(default_factory=Targets)
    keep_masks: bool = False
    messages: list[Message] = field(init=False)
    replies: list[str] = field(init=False, default_factory=list)
    answer: Answer | None = field(init=False, default=None)
    fault: Fault | None = field(init=False, default=None)
    pending: Prompt | None = field(init=False, default=None)
    segmentation: Segmentation | None = field(init=False, default=None)
    agreement: Agreement | None = field(init=False, default=None)
    asked: list[Prompt] = field(init=False, default_factory=list)
    turns: list[Segmentation] = field(init=False, default_factory=list)
    done: bool = field(init=False, default=False)
    reason_s: float = field(init=False, default=0.0)
    segment_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.messages = self.protocol.opening(self.views, glossed(self.request, self.skills), self.skills, self.targets.names)

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
        if read.prompt is not None:
            self.asked.append(read.prompt)
        self.done = read.done or read.absent or len(self.replies) >= self.protocol.max_turns
        return self.done

    def observe(self, segmentation: Segmentation) -> None:
        """Take what was drawn for `pending`, checked where the protocol can; unless done, the protocol shows it to the reasoner. A turn
        without a mask leaves the one before it."""
        self.pending = None
        self.segment_s += segmentation.seconds
        if isinstance(self.protocol, Checked) and self.answer is not None and segmentation.mask is not None:
            mask, self.agreement = self.protocol.check(self.answer, segmentation.prompt, segmentation.mask)
            segmentation = replace(segmentation, mask=mask)
        if self.several_turns:
            self.turns.append(segmentation if self.keep_masks else replace(segmentation, mask=None))
        if segmentation.mask is not None or self.segmentation is None or self.segmentation.mask is None:
            self.segmentation = segmentation
        if not self.done:
            shown = self.protocol.observe(self.segmentation.mask, self.views)
            if shown is None:
                self.done = True
            else:
                trouble = (TextPart(f"The action changed nothing: {segmentation.message}"),) if segmentation.mask is None else ()
                self.messages.append(Message(shown.role, (*trouble, *shown.parts)))

    @property
    def several_turns(self) -> bool:
        """The protocol may have more than one reply."""
        return self.protocol.max_turns > 1

    def again(self) -> Dialogue:
        """The same request, not yet answered."""
        return Dialogue(self.views, self.request, self.protocol, self.skills, self.targets, self.keep_masks)

    def forget_fault(self) -> None:
        """Back to before the reply that could not be read, so that another can be asked for."""
        if self.fault is not None:
            self.messages.pop()
            self.fault, self.done = None, False

    def reopen(self) -> _Reading:
        """Back to before the last reply, so that another can be asked for; gives what it came to."""
        reading = _Reading(self.messages.pop(), self.answer, self.segmentation, self.agreement)
        self.answer = self.segmentation = self.agreement = None
        self.done = False
        return reading

    def settle(self, first: _Reading) -> None:
        """Of two readings keep the one that does not contradict itself, else the one whose mask and answer fit better, the first where
        they are even."""
        second, before = self.agreement, first.agreement
        if self.fault is None and second is not None and before is not None:
            if (not second.doubtful, second.score) > (not before.doubtful, before.score):
                return
        self.messages[-1] = first.message
        self.fault, self.answer, self.segmentation, self.agreement = None, first.answer, first.segmentation, first.agreement

    def _allowed(self, read: Answer | Fault) -> Answer | Fault:
        if isinstance(read, Fault):
            return read
        skills = named_skills(read.rationale, self.skills)
        if read.target is None:
            return replace(read, skills=skills)
        name = self.targets.resolve(read.target)
        if name is None or (self.several_turns and self.targets.pieces(name)):
            return Fault(f"The answer {read.target!r} is none of the {len(self.targets.names)} names that may be answered.")
        prompt = read.prompt
        if prompt is not None and prompt.text is not None:
            prompt = replace(prompt, text=name)
        return replace(read, target=name, prompt=prompt, skills=skills)


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one reply came to."""

    message: Message
    answer: Answer | None
    segmentation: Segmentation | None
    agreement: Agreement | None


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
    """One reply to every dialogue that wants one, in one batch; a reply that cannot be read is asked for again, sampled, unless the
    dialogue has several turns."""
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
        waiting = [d for d in waiting if d.fault is not None and not d.several_turns]
        if attempt < retries:
            for dialogue in waiting:
                dialogue.forget_fault()


def draw(dialogues: Sequence[Dialogue], volume: Volume, segmenter: Segmenter, sessions: dict[int, Session] | None = None) -> None:
    """Draw everything that is pending, in one call, so that the image is encoded once. Answers that say one thing in several ways are
    narrowed to what the segmenter takes; what another protocol's answers lack is for the segmenter to refuse.

    sessions: where given, a dialogue of several turns is drawn in a session of its own (by `id`), which remembers its turns; a segmenter
    without sessions is given the mask before, or all that was asked so far where it takes no mask.
    """
    able = segmenter.capabilities
    batch = [d for d in dialogues if d.pending is not None]
    if sessions is not None and (able.session or able.previous_mask):
        for dialogue in batch:
            dialogue.observe(_draw_turn(dialogue, volume, segmenter, sessions))
        return
    whole = [_given(d, segmenter) for d in batch]
    pieces = [[replace(prompt, text=name) for name in d.targets.pieces(prompt.text or "")] for d, prompt in zip(batch, whole, strict=True)]
    if batch:
        drawn = iter(segmenter.segment(volume, [p for prompt, parts in zip(whole, pieces, strict=True) for p in parts or [prompt]]))
        for dialogue, prompt, parts in zip(batch, whole, pieces, strict=True):
            dialogue.observe(_united(prompt, [next(drawn) for _ in parts]) if parts else next(drawn))


def _united(prompt: Prompt, pieces: Sequence[Segmentation]) -> Segmentation:
    """A structure that is drawn as its pieces; not at all where one of them cannot be drawn."""
    without = next((piece for piece in pieces if piece.mask is None), None)
    masks = [piece.mask for piece in pieces if piece.mask is not None]
    seconds = sum(piece.seconds for piece in pieces)
    if without is not None or not masks:
        return replace(without or pieces[0], prompt=prompt, seconds=seconds)
    array = np.logical_or.reduce([mask.array for mask in masks])
    known = [piece.presence for piece in pieces if piece.presence is not None]
    names = ", ".join(str(piece.prompt.text) for piece in pieces)
    return replace(
        pieces[0],
        prompt=prompt,
        status="ok" if array.any() else "empty",
        mask=Mask(array, masks[0].grid, prompt.text or ""),
        presence=max(known, default=None),
        message=f"Drawn as its pieces: {names}.",
        seconds=seconds,
    )


def _draw_turn(dialogue: Dialogue, volume: Volume, segmenter: Segmenter, sessions: dict[int, Session]) -> Segmentation:
    prompt = _given(dialogue, segmenter)
    try:
        if id(dialogue) not in sessions:
            sessions[id(dialogue)] = segmenter.session(volume) if segmenter.capabilities.session else RefiningSession(segmenter, volume)
        return sessions[id(dialogue)].add(prompt)
    except SegmenterError as fault:
        return Segmentation(prompt, "unsupported", message=str(fault))


def _given(dialogue: Dialogue, segmenter: Segmenter) -> Prompt:
    """What the segmenter is given of what the dialogue asked for."""
    able, prompt = segmenter.capabilities, dialogue.asked[-1]
    if isinstance(dialogue.protocol, Checked):
        prompt = narrowed(prompt, able)
    if len(dialogue.asked) == 1 or able.session or able.previous_mask or not dialogue.several_turns:
        return prompt
    boxes = next((p.boxes for p in reversed(dialogue.asked) if p.boxes), ())  # a new box replaces the one before it, as in a session of SAM
    return replace(prompt, boxes=boxes, points=tuple(point for p in dialogue.asked for point in p.points))


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
    second_reading: bool = False,
) -> list[Episode]:
    """All requests of one case, to the end. second_reading: see `finish`."""
    dialogues = open_dialogues(views, requests, protocol=protocol, bank=bank, targets=targets)
    reason(dialogues, reasoner, seed=seed)
    return finish(dialogues, volume, reasoner=reasoner, segmenter=segmenter, seed=seed, second_reading=second_reading)


def finish(
    dialogues: Sequence[Dialogue],
    volume: Volume,
    *,
    reasoner: Reasoner,
    segmenter: Segmenter,
    seed: int = 0,
    second_reading: bool = False,
) -> list[Episode]:
    """Draw what the first replies asked for; go on with dialogues of several turns until all are done.

    second_reading: where an answer contradicts itself or its mask, ask the reasoner once more, sampled, and keep the reading that fits
    better. Off by default: it calls the reasoner from the drawing stage.
    """
    sessions: dict[int, Session] | None = {} if any(d.several_turns for d in dialogues) else None
    try:
        draw(dialogues, volume, segmenter, sessions)
        while any(not d.done for d in dialogues):
            reason(dialogues, reasoner, seed=seed)
            draw(dialogues, volume, segmenter, sessions)
        if second_reading:
            doubtful = [d for d in dialogues if d.agreement is not None and d.agreement.doubtful]
            firsts = [d.reopen() for d in doubtful]
            reason(doubtful, reasoner, seed=seed + SECOND_READING, retries=0)
            draw(doubtful, volume, segmenter, sessions)
            for dialogue, first in zip(doubtful, firsts, strict=True):
                dialogue.settle(first)
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
        "turns": tuple(dialogue.turns),
        "agreement": dialogue.agreement,
        "drawn_from": tuple(sorted(drawn.prompt.kinds)) if drawn else (),
    }
    stands = dialogue.several_turns and drawn is not None and drawn.mask is not None
    if answer is None or (dialogue.fault is not None and not stands):
        why = dialogue.fault.reason if dialogue.fault else "There was no reply."
        return Episode(status="fault", mask=None, message=f"The reasoner's reply could not be read: {why}", **common)
    if answer.absent:
        said = "The reasoner finds that the target is not in this scan."
        return Episode(status="absent", absent_by="reasoner", mask=_nothing(volume, ""), message=said, **common)
    if drawn is None:
        said = "The reasoner stopped before anything was drawn: the target is not in this scan."
        return Episode(status="absent", absent_by="reasoner", mask=_nothing(volume, ""), message=said, **common)
    common |= {"presence": drawn.presence, "nearest": drawn.nearest}
    if drawn.status == "unsupported":
        return Episode(status="unsupported", mask=None, message=drawn.message, **common)
    if drawn.mask is None:
        raise SegmenterError(f"The segmenter answered {drawn.status!r} without a mask.")
    name = answer.target or drawn.mask.name or dialogue.request[:80]
    mask = Mask(drawn.mask.array, drawn.mask.grid, name)
    told = _told(dialogue, drawn)
    if drawn.status == "ok":
        return Episode(status="ok", mask=mask, message=told, **common)
    if drawn.presence is not None and drawn.presence < ABSENT_BELOW:
        said = f"The segmenter does not find {name!r} in this scan (presence {drawn.presence:.2f})."
        return Episode(status="absent", absent_by="segmenter", mask=mask, message=said, **common)
    return Episode(status="empty", mask=mask, message=told or f"The segmenter found no voxel of {name!r}.", **common)


def _told(dialogue: Dialogue, drawn: Segmentation) -> str:
    """What a person should know of a mask that was drawn."""
    said = [drawn.message]
    if dialogue.fault is not None:
        said.append(f"The dialogue ended at reply {len(dialogue.replies)}: {dialogue.fault.reason} The mask before it stands.")
    elif dialogue.turns and dialogue.turns[-1].status == "unsupported":
        said.append(f"The last action changed nothing: {dialogue.turns[-1].message}")
    if dialogue.agreement is not None:
        said.append(dialogue.agreement.message)
    elif isinstance(dialogue.protocol, Checked):
        said.append("The answer had no anchor to check the mask with.")
    return " ".join(part for part in said if part)


def _nothing(volume: Volume, name: str) -> Mask:
    return Mask(np.zeros(volume.grid.shape_zyx, dtype=bool), volume.grid, name)
