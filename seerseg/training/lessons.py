"""Skills in training: which of them a sample is shown, so that the reasoner learns to use what fits and to leave the rest.

At inference a bank shows up to three skills that fit the words of a request; most are right, some lead elsewhere. Samples are dealt so:

    none          no skills, as a bank without a fitting one shows, or no bank at all
    right         what retrieval finds for the request, a skill that leads to the answer among it; the rationale begins with that skill's
                  id, for small reasoners with its number in the list, as nano has learnt it
    distractors   skills that lead elsewhere, those first that all but fit; the rationale is as it was
    wrong         a skill that fits the words and leads elsewhere: one that retrieval finds, else a right one with another target put in its
                  place; the rationale is as it was, for what the words and the slices show outweighs a skill

What a sample is dealt depends on the seed and the trace's id alone. A skill comes from training cases only: see `open_frozen`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from seerseg.episode import SKILLS_SHOWN
from seerseg.errors import BankError
from seerseg.planning import Plans
from seerseg.protocols.base import ABSENT
from seerseg.protocols.seer import normalise_name
from seerseg.protocols.traces import TraceRow
from seerseg.skills.base import Query, Skill
from seerseg.skills.encoder import Encoder
from seerseg.skills.fence import Fence, check_bank
from seerseg.skills.retrieval import FrozenBank, fits
from seerseg.skills.store import BankFolder

if TYPE_CHECKING:
    from seerseg.training.data import Ground

Kind = Literal["none", "right", "distractors", "wrong"]
NEAR = 0.3  # score from which a skill all but fits
_POOL = 16


@dataclass(frozen=True, eq=False)
class Dealt:
    """What a sample is shown, in that order, and the row to learn from: its rationale names the skill that helps, where one does."""

    kind: Kind
    skills: tuple[Skill, ...]
    row: TraceRow


@dataclass(frozen=True, eq=False)
class Lessons:
    """A frozen bank and how it is dealt out. share: of the samples that are shown skills; right, wrong: shares of those, the rest are
    distractors; names: what may be answered; numbered: a rationale names a skill by its number."""

    bank: FrozenBank
    skills: tuple[Skill, ...]
    share: float
    right: float
    wrong: float
    seed: int
    names: tuple[str, ...]
    numbered: bool = False

    @staticmethod
    def planned(bank: FrozenBank, skills: Sequence[Skill], plans: Plans, names: Sequence[str]) -> Lessons:
        """As the plan says."""
        share, right, wrong = (float(plans.value(f"sft.skills_{name}")) for name in ("share", "right", "wrong"))
        return Lessons(bank, tuple(skills), share, right, wrong, int(plans.value("training.seed")), tuple(names))

    def deal(self, row: TraceRow, modality: str | None) -> Dealt:
        """What the samples of a trace are shown. modality: of the case, as prediction knows it."""
        rng = random.Random(f"{self.seed}/{row.id}")
        if rng.random() >= self.share:
            return Dealt("none", (), row)
        query = Query(row.text, modality, targets=self.names)
        answer = normalise_name(row.trace.answer)
        found = list(self.bank.retrieve(query, SKILLS_SHOWN))
        right = [s for s in found if leads_to(s) == answer]
        lot = rng.random()
        if right and lot < self.right:
            shown = [right[0], *self._elsewhere(rng, query, answer, rng.randrange(SKILLS_SHOWN))]
            rng.shuffle(shown)
            called = f"[{shown.index(right[0]) + 1}]" if self.numbered else f"{right[0].id}:"
            told = replace(row.trace, rationale=f"{called} {row.trace.rationale}")
            return Dealt("right", tuple(shown), replace(row, trace=told))
        misleading = self._misleading(rng, found, right, answer) if lot < self.right + self.wrong else None
        if misleading is not None:
            shown = [misleading, *self._elsewhere(rng, query, answer, rng.randrange(SKILLS_SHOWN))]
            rng.shuffle(shown)
            return Dealt("wrong", tuple(shown), row)
        shown = self._elsewhere(rng, query, answer, rng.randint(1, SKILLS_SHOWN))
        return Dealt("distractors" if shown else "none", tuple(shown), row)

    def _misleading(self, rng: random.Random, found: Sequence[Skill], right: Sequence[Skill], answer: str) -> Skill | None:
        other = [s for s in found if leads_to(s) not in (None, answer)]
        if other:
            return other[0]
        names = [name for name in self.names if normalise_name(name) != answer]
        if not right or not names:
            return None
        name = rng.choice(names)
        return replace(right[0], id="", target=name, what=f"answer {name}", example="", lesson="")

    def _elsewhere(self, rng: random.Random, query: Query, answer: str, count: int) -> list[Skill]:
        """At most `count` skills that do not contradict the scan and do not lead to the answer, half of them near misses."""
        if not count:
            return []
        nearly = self.bank.index.search(query, replace(self.bank.weights, threshold=NEAR, margin=0.0), _POOL)
        near = [f.skill for f in nearly if leads_to(f.skill) != answer and f.score < self.bank.weights.threshold]
        far = rng.sample(self._others, min(_POOL, len(self._others)))
        pool = {s.id: s for s in (*near[: (count + 1) // 2], *far, *near) if leads_to(s) != answer and fits(s, query)}
        return list(pool.values())[:count]

    @cached_property
    def _others(self) -> list[Skill]:
        return sorted(self.skills, key=lambda s: s.id)


def leads_to(skill: Skill) -> str | None:
    """The name that a skill leads to, normalised; None for a habit that fits many."""
    if skill.target is not None:
        return normalise_name(skill.target)
    return ABSENT if normalise_name(skill.what.removeprefix("answer ")) == ABSENT else None


def training_fence(ground: Ground) -> Fence:
    """Around every case that is no training case of the fold, and their requests."""
    requests = ground.dataset.requests
    known = {*ground.dataset.cases, *ground.dataset.test_cases, *(r.case for r in requests)}
    held = known - set(ground.fold.train)
    return Fence.around(held, requests, requests)


def open_frozen(
    folder: Path, ground: Ground, *, version: str | None = None, encoder: Encoder | None = None
) -> tuple[FrozenBank, list[Skill]]:
    """The newest state of a bank, or the one whose content has the hash `version` (a run that is continued learns from what it began
    with), and its skills in use.

    BankError when there is none, for a bank of the transductive mode, and for one that holds what training must not have seen.
    """
    bank = BankFolder(folder)
    numbers = [h.number for h in bank.history() if version is None or h.version == version]
    if not numbers:
        what = "is no skill bank in" if version is None else f"is no state of the version {version}, which the run began with, in"
        raise BankError(f"There {what} {folder}. Make one with seerseg_evolve or seerseg_bank add, or name another with --bank.")
    return FrozenBank.open(folder, number=numbers[-1], encoder=encoder), check_bank(bank, numbers[-1], training_fence(ground))
