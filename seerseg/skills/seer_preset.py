"""SEER's published retrieval, for comparison alone: its keys are the true label and the dataset's name, so it belongs to the
transductive mode.

Score (arXiv 2603.08215, released code v1.1): 3 [same dataset] + 4 [same style] + 6 [same canonical label] + 3 [an alias in
common] + 2 [same visual cue] + 0.4 * shared words of the request and the skill + 0.2 * the skill's Dice; the request's own skill is
left out; the best three of at least 18.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seerseg.errors import BankError
from seerseg.skills.base import Query, Skill
from seerseg.vocabulary import words

LEAST = 18.0


@dataclass(frozen=True)
class SeerKeys:
    """What SEER stores beside a skill, or knows of a row. source: id of the row that the skill came from; hint: its Dice."""

    dataset: str
    style: str
    canonical: str
    cue: str
    aliases: frozenset[str] = frozenset()
    source: str = ""
    hint: float = 0.0


@dataclass(frozen=True)
class TruthQuery(Query):
    """A query that knows the truth."""

    keys: SeerKeys | None = None


class SeerRetriever:
    """Skills with SEER's keys."""

    mode = "transductive"

    def __init__(self, skills: Sequence[tuple[Skill, SeerKeys]], identity: str) -> None:
        self._skills = list(skills)
        self.identity = f"seer-{identity}"

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The best `limit` of those that score at least 18; BankError for a query that does not know the truth."""
        if not isinstance(query, TruthQuery) or query.keys is None:
            raise BankError("SEER's published retrieval needs the true label of a request; it can only be used in the transductive mode.")
        scored = [
            (seer_score(query, skill, keys), -i, skill) for i, (skill, keys) in enumerate(self._skills) if keys.source != query.keys.source
        ]
        return [skill for score, _, skill in sorted(scored, key=lambda s: s[:2], reverse=True)[:limit] if score >= LEAST]


def seer_score(query: TruthQuery, skill: Skill, keys: SeerKeys) -> float:
    """The published score of a skill for a request."""
    own = query.keys
    if own is None:
        return 0.0
    shared = {*words(query.text)} & {*words(f"{skill.when} {skill.what} {' '.join(skill.words)} {skill.tag}")}
    return (
        3 * (keys.dataset == own.dataset)
        + 4 * (keys.style == own.style)
        + 6 * (keys.canonical == own.canonical)
        + 3 * bool(keys.aliases & own.aliases)
        + 2 * (keys.cue == own.cue)
        + 0.4 * len(shared)
        + 0.2 * keys.hint
    )
