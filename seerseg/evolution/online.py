"""The bank mode "online": prediction without labels may add words for a target, where readings of requests agree on them.

Off unless asked for. A phrase is learnt when several requests of different scans, each read at least three times with one answer and
masks that agree, say it of one target and none says it of another. Nobody checks that the answer was right: readings may agree on a
mistake, so nothing is ever written into the bank itself, every result carries the mode, and what was learnt lies beside the results as
a bank file to be looked at, tested or thrown away. What a case is shown depends on the cases before it, so cases are done one by one.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from seerseg.episode import Episode
from seerseg.errors import BankError
from seerseg.evolution.distillation import LONGEST
from seerseg.skills.base import DEFAULT_TAG, Audit, Query, Retriever, Skill, check_skill
from seerseg.skills.retrieval import FrozenBank
from seerseg.skills.store import read_skills, write_skills
from seerseg.vocabulary import Vocabulary, words

FILE = "bank_online.jsonl"
READINGS = 3
AGREEMENT = 0.9
REQUESTS = 2
"""At least so many readings of a request, that agree so well, in so many scans."""


class OnlineBank:
    """A bank with what this run has learnt beside it. path: where that is kept, and read from when a run goes on; None for nowhere.

    BankError for a bank of the transductive mode, which results could not be told from.
    """

    mode = "online"

    def __init__(self, bank: Retriever, path: Path | None = None, vocabulary: Vocabulary | None = None) -> None:
        if bank.mode not in ("frozen", "none"):
            raise BankError(f"A bank of mode {bank.mode!r} cannot be used online: its results are to be told apart.")
        self._bank, self._path, self._vocabulary = bank, path, vocabulary or Vocabulary.load()
        self._votes: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for skill in read_skills(path) if path is not None and path.exists() else ():
            votes = self._votes[skill.words[0], ",".join(skill.modalities)]
            votes[skill.target or ""] |= {source.partition("/")[0] for source in skill.audit.sources}
        self._learnt = self._index()

    @property
    def identity(self) -> str:
        """That of the bank that it began with: what is learnt meanwhile must not have cases done again."""
        return f"online-{self._bank.identity}"

    @property
    def learnt(self) -> tuple[Skill, ...]:
        """The words in use, by id."""
        return tuple(s for s in self._skills() if s.status == "accepted")

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The bank's skills, then what was learnt."""
        found = list(self._bank.retrieve(query, limit))
        known = {(s.tag, s.target) for s in found}
        found += [s for s in self._learnt.retrieve(query, limit) if (s.tag, s.target) not in known]
        return found[:limit]

    def learn(self, case: str, modality: str | None, episodes: Sequence[Episode]) -> int:
        """Take what the settled readings of a case's requests agree on; returns how many words are in use now."""
        for episode in episodes:
            answers = agreed(episode)
            phrase = self.phrase(episode.request)
            if answers and phrase and answers != phrase:
                self._votes[phrase, modality or ""][answers].add(case)
        self._learnt = self._index()
        if self._path is not None and self._votes:
            write_skills(self._path, self._skills())
        return len(self.learnt)

    def phrase(self, text: str) -> str:
        """The words of a request that are no everyday words, "" when they are too many or too short to tell anything."""
        telling = [w for w in words(text) if w not in self._vocabulary.ordinary and len(w) > 1]
        return " ".join(telling) if 0 < len(telling) <= LONGEST and sum(map(len, telling)) > 2 else ""

    def _index(self) -> FrozenBank:
        return FrozenBank.of(self._skills())

    def _skills(self) -> list[Skill]:
        """Every phrase that was heard as a skill: in use, or a candidate that too few scans or several targets speak for."""
        made = []
        for (phrase, modality), votes in sorted(self._votes.items()):
            for target, cases in sorted(votes.items()):
                sure = len(votes) == 1 and len(cases) >= REQUESTS
                skill = Skill(
                    "o-" + hashlib.blake2b(f"{phrase}|{modality}|{target}".encode(), digest_size=6).hexdigest(),
                    DEFAULT_TAG,
                    f"the request says '{phrase}'" + (f" on {modality}" if modality else ""),
                    f"answer {target}",
                    words=(phrase,),
                    target=target,
                    modalities=(modality,) if modality else (),
                    status="accepted" if sure else "candidate",
                    audit=Audit("online", tuple(sorted(cases)), note="by agreement of readings alone"),
                )
                try:
                    check_skill(skill, "learnt")
                except BankError:  # a request may say anything
                    continue
                made.append(skill)
        return sorted(made, key=lambda s: s.id)


def agreed(episode: Episode) -> str | None:
    """The target that all readings of a request answered with masks that agree; None when they do not, are too few, or nothing was
    drawn."""
    said = episode.consensus.to_json() if episode.consensus is not None else {}
    answers = Counter(reading["answer"] for reading in said.get("readings", ()))
    sure = len(answers) == 1 and answers.total() >= READINGS and said["agreement"] >= AGREEMENT
    return episode.target if sure and episode.status == "ok" else None
