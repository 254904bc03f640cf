"""Rollouts of GRPO: dialogues driven by the model that learns, their answers drawn by the frozen segmenter, their terms scored.

Replies of all dialogues of a call are decoded together; as soon as a batch of them is finished, a thread draws and scores it while the
next is decoded. Tokens go in as they came out: a further turn is appended to the very tokens of the reply before it, and goes on from what
the decoder remembers of it, so that no image is encoded twice in a call; between calls, when weights change, nothing is remembered. What a
dialogue draws at random depends on its key, its sample and its turn alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from seerseg.episode import Dialogue, Targets, draw, open_dialogues
from seerseg.protocols.base import Protocol as Grammar
from seerseg.protocols.messages import ImagePart
from seerseg.reasoners.decoding import Encoded, Line
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.rewards import TERMS, Overlap, RewardConfig, Truth, attempt_of
from seerseg.segmenters.base import Segmenter, Session
from seerseg.skills.base import EmptyBank, Retriever
from seerseg.training.callbacks import PartTimer
from seerseg.training.data import Bounded, Cases
from seerseg.views import CaseViews
from seerseg.volume import Volume


@dataclass(frozen=True)
class ParaphraseSet:
    """Equivalent requests on one case. target: label names whose union is meant, None when it is absent; texts: at least one."""

    case: str
    target: tuple[str, ...] | None
    texts: tuple[str, ...]

    def wordings(self, count: int, seed: Sequence[int]) -> list[str]:
        """`count` of the texts, in an order drawn from `seed`; each comes again only when all have come."""
        generator, chosen = np.random.default_rng(list(seed)), list[str]()
        while len(chosen) < count:
            chosen.extend(self.texts[int(i)] for i in generator.permutation(len(self.texts)))
        return chosen[:count]


class Scenes(Protocol):
    """Where cases come from. Methods may be called from two threads at once."""

    @property
    def targets(self) -> Targets:
        """What may be answered."""
        ...

    def views(self, case: str) -> CaseViews:
        """What the reasoner is shown."""
        ...

    def volume(self, case: str) -> Volume:
        """What is segmented."""
        ...

    def truth(self, case: str, target: tuple[str, ...] | None) -> Truth:
        """What is right."""
        ...


class StoredScenes:
    """Cases of the preprocessed store; views, volumes and truths are kept while they fit into `limit_bytes`."""

    def __init__(self, cases: Cases, limit_bytes: int) -> None:
        self._cases, self._lock = cases, threading.RLock()
        self._volumes: Bounded[Volume] = Bounded(limit_bytes // 2, lambda v: int(v.array.nbytes))
        self._truths: Bounded[Truth] = Bounded(limit_bytes // 2, lambda t: 0 if t.mask is None else int(t.mask.nbytes))

    @property
    def targets(self) -> Targets:
        """The ground's."""
        return self._cases.ground.targets

    def views(self, case: str) -> CaseViews:
        """As the plan says."""
        with self._lock:
            return self._cases.views(case)

    def volume(self, case: str) -> Volume:
        """The channel that is segmented."""
        with self._lock:
            found: Volume | None = self._volumes.get(case)
            if found is None:
                found = self._volumes[case] = self._cases.volume(case)
            return found

    def truth(self, case: str, target: tuple[str, ...] | None) -> Truth:
        """The union of labels."""
        key, ground = "\0".join([case, *(target or ())]), self._cases.ground
        with self._lock:
            found: Truth | None = self._truths.get(key)
            if found is None:
                values = ground.values_of(target or ())
                names = tuple(name for name, said in ground.label_values.items() if target and tuple(sorted(said)) == values)
                mask = None if target is None else self._cases.truth(case, target)
                points = next((r.points for r in ground.dataset.requests if r.points and (r.case, r.target) == (case, target)), ())
                found = self._truths[key] = Truth(self._cases.views(case).grid, mask, names).pointed(points)
            return found


@dataclass(frozen=True)
class Job:
    """A reply to be drawn. key: what its random numbers are made from; None: the likeliest reply."""

    case: str
    target: tuple[str, ...] | None
    text: str
    key: str | None


@dataclass(eq=False)
class Rollout:
    """A dialogue as it goes and what came of it. prompt: tokens before the first reply; reply: all tokens after it; own: 1 for each of
    them that the model chose, 0 for what it was shown; line: everything so far; images: everything shown; overlaps: of the mask after
    every turn that drew; values: reward terms and Dice; before: for each reply, see `RewardConfig.before_turns`."""

    job: Job
    dialogue: Dialogue
    prompt: Encoded
    line: Encoded
    reply: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    images: list[ImagePart] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    before: tuple[float, ...] = ()
    ended: bool = True


class Rollouts:
    """Makes rollouts. bank: asked anew for every dialogue, so it may change between steps."""

    def __init__(
        self,
        reasoner: VlmReasoner,
        scenes: Scenes,
        protocol: Grammar,
        segmenter: Segmenter,
        reward: RewardConfig,
        *,
        bank: Retriever | None = None,
        parts: PartTimer | None = None,
    ) -> None:
        self.reasoner, self.scenes, self.protocol, self.segmenter, self.reward = reasoner, scenes, protocol, segmenter, reward
        self.bank: Retriever = bank or EmptyBank()
        self.parts = parts or PartTimer()

    def run(self, jobs: Sequence[Job]) -> list[Rollout]:
        """One finished and scored rollout per job, in order."""
        self.reasoner.decoder.forget()
        with ThreadPoolExecutor(1, thread_name_prefix="segmenter") as thread:
            read = [thread.submit(self._read, job) for job in {(j.case, j.target): j for j in jobs}.values()]
            with self.parts.part("encode"):
                rollouts = self._begin(jobs)
            sessions: dict[int, Session] | None = {} if self.protocol.max_turns > 1 else None
            try:
                waiting = list(rollouts)
                for turn in range(self.protocol.max_turns):
                    waiting = self._turn(waiting, turn, thread, sessions)
                    if not waiting:
                        break
            finally:
                self.reasoner.decoder.forget()  # the memory is the step's
                for session in (sessions or {}).values():
                    session.close()
            _results(read)
        return rollouts

    def _read(self, job: Job) -> None:
        with self.parts.part("read"):
            self.scenes.volume(job.case)
            self.scenes.truth(job.case, job.target)

    def _begin(self, jobs: Sequence[Job]) -> list[Rollout]:
        known: dict[str, Encoded] = {}
        rollouts = []
        for job in jobs:
            views = self.scenes.views(job.case)
            (dialogue,) = open_dialogues(views, [job.text], protocol=self.protocol, bank=self.bank, targets=self.scenes.targets)
            encoded = self.reasoner.encode(dialogue.messages, known)
            images = [image for message in dialogue.messages for image in message.images]
            rollouts.append(Rollout(job, dialogue, encoded, encoded, images=images))
        return rollouts

    def _turn(self, waiting: list[Rollout], turn: int, thread: ThreadPoolExecutor, sessions: dict[int, Session] | None) -> list[Rollout]:
        """One reply each; returns those that want another, their tokens up to date."""
        drawn: list[Future[None]] = []

        def finished(numbers: list[int], replies: list[list[int]]) -> None:
            batch = [waiting[number] for number in numbers]
            for rollout, ids in zip(batch, replies, strict=True):
                rollout.reply += ids
                rollout.own += [1] * len(ids)
                rollout.ended = ids[-1] in self.reasoner.end_token_ids
                rollout.dialogue.step(self.reasoner.text(ids))
            drawn.append(thread.submit(self._draw, batch, sessions))

        with self.parts.part("generate"):
            lines = [Line(r.line, None if r.job.key is None else f"{r.job.key}|{turn}") for r in waiting]
            self.reasoner.decoder.replies(lines, finished)
        with self.parts.part("wait"):
            _results(drawn)
        going = [rollout for rollout in waiting if not rollout.dialogue.done]
        with self.parts.part("encode"):
            for rollout in going:
                message = rollout.dialogue.messages[-1]
                said = rollout.reply[len(rollout.line.ids) - len(rollout.prompt.ids) :]
                rollout.line = self.reasoner.extend(rollout.line, said, message)
                shown = rollout.line.ids[len(rollout.prompt.ids) + len(rollout.reply) :]
                rollout.reply += shown
                rollout.own += [0] * len(shown)
                rollout.images += message.images
        return going

    def _draw(self, batch: Sequence[Rollout], sessions: dict[int, Session] | None) -> None:
        with self.parts.part("segment"):
            cases: dict[str, list[Rollout]] = {}
            for rollout in batch:
                cases.setdefault(rollout.job.case, []).append(rollout)
            for case, alike in cases.items():
                pending = [r for r in alike if r.dialogue.pending is not None]
                draw([r.dialogue for r in pending], self.scenes.volume(case), self.segmenter, sessions)
                for rollout in pending:
                    segmentation = rollout.dialogue.segmentation
                    mask = None if segmentation is None or segmentation.mask is None else segmentation.mask.array
                    rollout.overlaps.append(self._truth(rollout).overlap(mask))
        with self.parts.part("score"):
            for rollout in batch:
                if rollout.dialogue.done:
                    truth = self._truth(rollout)
                    attempt = attempt_of(rollout.dialogue, truth, overlaps=rollout.overlaps)
                    rollout.values = {"dice": TERMS["dice"](attempt, truth), **self.reward.values(attempt, truth)}
                    rollout.before = self.reward.before_turns(attempt, truth)
                    rollout.dialogue.segmentation = None  # a mask per rollout is much to hold

    def _truth(self, rollout: Rollout) -> Truth:
        return self.scenes.truth(rollout.job.case, rollout.job.target)


def paraphrase_sets(rows: Iterable[tuple[str, tuple[str, ...] | None, str]]) -> tuple[ParaphraseSet, ...]:
    """Sets from (case, target, text), in the order in which they first come; a text that comes twice counts once."""
    found: dict[tuple[str, tuple[str, ...] | None], dict[str, None]] = {}
    for case, target, text in rows:
        found.setdefault((case, target), {})[text] = None
    return tuple(ParaphraseSet(case, target, tuple(texts)) for (case, target), texts in found.items())


def _results(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
