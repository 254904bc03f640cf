"""What a bank must not have seen, and a bank that is watched while something is learned from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.dataset import Request
from seerseg.errors import BankError
from seerseg.skills.base import Query, Skill
from seerseg.skills.encoder import Encoder
from seerseg.skills.retrieval import FrozenBank, Weights
from seerseg.skills.store import BankFolder
from seerseg.vocabulary import words


@dataclass(frozen=True)
class Fence:
    """What a bank must not have seen. cases: validation, test and bank cases; texts: their requests, folded; forms: words of
    held-out language, folded, of which a skill may not even hold one (in experiments)."""

    cases: frozenset[str]
    texts: frozenset[str]
    forms: frozenset[str] = frozenset()

    @staticmethod
    def around(cases: Iterable[str], requests: Iterable[Request], allowed: Iterable[Request] = (), forms: Iterable[str] = ()) -> Fence:
        """Around held-out cases, their requests and held-out words; what training requests hold too is no leak."""
        held = frozenset(cases)
        common = {_folded(r.text) for r in allowed if r.case not in held}
        said = f" {' | '.join(sorted(common))} "
        return Fence(
            held,
            frozenset(_folded(r.text) for r in requests if r.case in held and len(words(r.text)) > 2) - common,
            frozenset(form for form in map(_folded, forms) if form and f" {form} " not in said),
        )

    def check(self, skill: Skill) -> None:
        """BankError when a skill stems from a held-out case, repeats a held-out request or holds a word of held-out language."""
        for source in (*skill.audit.sources, *skill.audit.trials):
            inside = self.cases.intersection(source.split("/"))
            if inside:
                raise BankError(
                    f"The skill {skill.id} stems from {source!r}, but case {min(inside)!r} is held out: a bank must not learn from "
                    "validation, bank or test cases. Retire it, or make a bank of mode 'transductive' and report it under that name."
                )
        if leaked := self.held_out_word(skill):
            raise BankError(
                f"The skill {skill.id} holds {leaked!r}, a word of held-out language. Retire it: it would be tested on what it was told."
            )
        for text in _texts(skill):
            said = words(text)
            for length in self._lengths:
                for start in range(len(said) - length + 1):
                    run = " ".join(said[start : start + length])
                    if run in self.texts:
                        raise BankError(
                            f"The skill {skill.id} repeats a held-out request ({run[:60]!r}). Retire it: it would be tested on what it "
                            "was told."
                        )

    def held_out_word(self, skill: Skill) -> str | None:
        """The first word of held-out language in a skill; what is made of training requests can hold one by chance, where two phrases
        meet."""
        said = [f" {' '.join(words(text))} " for text in _texts(skill)]
        return next((form for form in sorted(self.forms) if any(f" {form} " in text for text in said)), None)

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """How many words held-out requests have."""
        return tuple(sorted({text.count(" ") + 1 for text in self.texts}))


def _texts(skill: Skill) -> tuple[str, ...]:
    return (skill.when, skill.what, skill.example, skill.lesson, skill.pattern, *skill.words)


class LiveBank:
    """The newest state of a bank that others write to, looked up when told to: `refresh` before a step, so that no request of the step
    is shown a skill of the step before.

    fence: checked for every skill in use that comes in; say: told when the state changes. BankError for a bank that holds nothing yet,
    was evolved on test cases, or holds what the fence forbids.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fence: Fence | None = None,
        weights: Weights | None = None,
        encoder: Encoder | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.fence, self.say = BankFolder(folder), fence, say
        self._weights, self._encoder = weights, encoder
        self._checked: set[str] = set()
        self.number = 0
        self._open(self.newest())

    def newest(self) -> int:
        """The number of the newest state on this machine's view of the disk."""
        head = self.folder.head()
        if head is None:
            raise BankError(f"There is no skill bank in {self.folder.folder}. Make one with seerseg_evolve or seerseg_bank add.")
        return head.number

    def refresh(self, number: int | None = None) -> int:
        """Go to the newest state, or to the one that several processes agreed on; returns its number."""
        wanted = self.newest() if number is None else number
        if wanted != self.number:
            self._open(wanted)
        return self.number

    @property
    def version(self) -> str:
        """The hash of the state's content."""
        return self._version

    @property
    def mode(self) -> str:
        """How the bank was evolved."""
        return self._frozen.mode

    @property
    def identity(self) -> str:
        """That of the state as it is now."""
        return self._frozen.identity

    @property
    def root(self) -> str:
        """The version of the oldest state: what stays the same while the bank grows."""
        return self.folder.history()[0].version

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The skills of the state that `refresh` went to."""
        return self._frozen.retrieve(query, limit)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"number": self.number, "version": self.version}

    def check_descends(self, kept: Mapping[str, Any]) -> None:
        """BankError unless the state that a checkpoint kept is one of this bank's."""
        number, version = int(kept["number"]), str(kept["version"])
        if self.folder.head_at(number).version != version:
            raise BankError(
                f"The run was shown state {number} of a bank with the version {version}, but that state of {self.folder.folder} is "
                "another. Bring that bank back with --bank, or begin anew with --overwrite."
            )

    def _open(self, number: int) -> None:
        head = self.folder.head_at(number)
        check_bank(self.folder, number, self.fence, self._checked)
        self._frozen = FrozenBank.open(self.folder.folder, number=number, weights=self._weights, encoder=self._encoder)
        self.number, self._version = number, head.version
        self.say(f"The bank is at state {number} ({self._frozen.index.size} skills in use, version {head.version[:12]})")


def check_bank(folder: BankFolder, number: int | None, fence: Fence | None, known: set[str] | None = None) -> list[Skill]:
    """The skills in use of a state, all of them inside the fence; BankError otherwise, and for a bank that was evolved on test cases.
    known: digests of skills that were checked before; filled in."""
    if folder.mode == "transductive":
        raise BankError(
            f"The bank {folder.folder} is of mode 'transductive': it was evolved on test cases with test labels, so nothing may learn "
            "from it. Evolve another in mode 'frozen'."
        )
    seen = set() if known is None else known
    live = [skill for skill in folder.skills(number).values() if skill.status == "accepted"]
    for skill in live if fence is not None else ():
        digest = hashlib.blake2b(json.dumps(skill.to_json(), sort_keys=True).encode(), digest_size=12).hexdigest()
        if digest not in seen and fence is not None:
            fence.check(skill)
            seen.add(digest)
    return live


def _folded(text: str) -> str:
    return " ".join(words(text))
