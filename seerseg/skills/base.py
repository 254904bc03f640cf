"""Skills: reusable reasoning artifacts that are shown to the reasoner when they fit a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Skill:
    """One skill. id: stable short name; tag: its kind (e.g. "ABBR_DISAMBIGUATE"); when: what triggers it, in words;
    what: what to do, in words."""

    id: str
    tag: str
    when: str
    what: str


class Retriever(Protocol):
    """Anything that finds skills for a request from what is known at inference alone."""

    @property
    def identity(self) -> str:
        """Changes whenever retrieval could (for resume and records)."""
        ...

    def retrieve(self, request: str, modality: str | None, limit: int) -> Sequence[Skill]:
        """The skills that fit, best first; none is better than a wrong one."""
        ...


class EmptyBank:
    """The bank mode "none": no skill ever."""

    identity = "none"

    def retrieve(self, request: str, modality: str | None, limit: int) -> Sequence[Skill]:
        """Nothing."""
        return ()


def named_skills(text: str, skills: Sequence[Skill]) -> tuple[str, ...]:
    """Ids of the skills that a rationale names: by id, by tag where only one shown skill has it, or by its number [i]."""
    folded = text.casefold()
    tags = [skill.tag for skill in skills]
    named = [
        skill.id
        for number, skill in enumerate(skills, start=1)
        if skill.id.casefold() in folded or f"[{number}]" in text or (tags.count(skill.tag) == 1 and skill.tag.casefold() in folded)
    ]
    return tuple(named)
