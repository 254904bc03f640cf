"""A language model words what a skill says of when it fits; what it may not say falls back to the rule template.

The template knows the facts: which words meant which structure, on which scans, and what it was mistaken for. The model puts them
into a sentence. Its sentence is taken only when it still holds one of the words and the structure's name, names no structure besides
but the one it was mistaken for, repeats no held-out request, and may be shown (`check_skill`): a model adds no knowledge of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seerseg.errors import BankError
from seerseg.protocols.base import ABSENT
from seerseg.skills.base import Skill, check_skill
from seerseg.skills.fence import Fence
from seerseg.vocabulary import words

ASK = (
    "Write one short sentence that tells a colleague when this rule applies. Keep the quoted words and the name of the structure exactly "
    "as they are. Answer with the sentence only, on one line."
)
LABEL = "Rule"
LONGEST_CHARS = 240


@dataclass(eq=False)
class LessonWriter:
    """rewrite: texts and a seed -> one text for each, "" where there is none; names: all that may be answered; fence: what a lesson must
    not repeat. kept, refused: how many sentences were taken, and why others were not."""

    name: str
    rewrite: Callable[[Sequence[str], int], Sequence[str]]
    names: tuple[str, ...]
    fence: Fence | None = None
    seed: int = 0
    kept: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def __call__(self, skills: Sequence[Skill]) -> list[Skill]:
        """The skills in order, reworded where the model's sentence may be taken."""
        said = self.rewrite([facts(skill) for skill in skills], self.seed) if skills else []
        return [self._taken(skill, text) for skill, text in zip(skills, said, strict=True)]

    def told(self) -> dict[str, Any]:
        """For the report of a run."""
        return {"writer": self.name, "kept": self.kept, "refused": dict(sorted(self.refused.items()))}

    def _taken(self, skill: Skill, raw: str) -> Skill:
        text = one_line(raw)
        fault = self._fault(skill, text)
        reworded = replace(skill, id="", when=text or skill.when)
        if fault is None:
            try:
                check_skill(reworded, "written")
                if self.fence is not None:
                    self.fence.check(reworded)
            except BankError:
                fault = "must not be shown"
        if fault is not None:
            self.refused[fault] += 1
            return skill
        self.kept += 1
        return reworded

    def _fault(self, skill: Skill, text: str) -> str | None:
        if not text:
            return "empty"
        if len(text) > LONGEST_CHARS:
            return "too long"
        said = _padded(text)
        if not any(_padded(phrase) in said for phrase in skill.words):
            return "without the words"
        target = skill.target or ABSENT
        if _padded(target) not in said:
            return "without the structure"
        allowed = {_padded(name) for name in (target, skill.lesson.removeprefix("not "), *skill.words)}
        # "lung" within "left lung" is no other structure
        other = [name for name in self.names if _padded(name) in said and not any(_padded(name) in known for known in allowed)]
        return "names another structure" if other else None


def facts(skill: Skill) -> str:
    """What the model is told of a candidate."""
    listed = ", ".join(f"'{phrase}'" for phrase in skill.words[:4])
    where = f" on {' and '.join(skill.modalities)}" if skill.modalities else ""
    wrong = skill.lesson.removeprefix("not ")
    said = f"Requests that say {listed}{where} mean {skill.target or ABSENT}."
    return said + (f" They were mistaken for {wrong}." if wrong and wrong != skill.lesson else "")


def one_line(raw: str) -> str:
    """The first line of a model's answer that is not empty, without quotes around it."""
    lines = (" ".join(line.split()).strip("\"'`* \u201c\u201d") for line in raw.splitlines())
    return next((line for line in lines if line), "")


def _padded(text: str) -> str:
    return f" {' '.join(words(text))} "
