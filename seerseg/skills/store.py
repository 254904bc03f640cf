"""A skill bank on disk: immutable versions named by their content, a line of heads, and an inbox that many processes may write.

    BANK/versions/<hash>.jsonl     header line, then one skill per line, sorted by id; never changed once written
    BANK/heads/00000012.json       {"schema", "number", "version", "parent", "message", "made", "consumed"}: the newest number is the bank
    BANK/inbox/<unique>.jsonl      skills and trials handed in since; one file per hand-in, written by rename

Nothing is locked, so a network file system is no danger: a head is made with a hard link that fails when another process made the same
number first, and then the fold starts again from that head. A crash at any moment leaves the newest whole head. Folding is
idempotent: a skill is its content, a trial counts once, and a head names the hand-ins that it holds until they are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seerseg.errors import BankError, OutputError
from seerseg.paths import read_json, write_json, write_text
from seerseg.skills.base import Skill, check_skill

SCHEMA = 1
KIND = "seerseg_bank"
MAX_ATTEMPTS = 200


@dataclass(frozen=True)
class Head:
    """One state of the bank. version: hash of its file; parent: number of the head before it, None for the first; consumed: hand-ins
    that it holds and whose files may still be there."""

    number: int
    version: str
    parent: int | None
    message: str
    made: str
    consumed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": SCHEMA,
            "number": self.number,
            "version": self.version,
            "parent": self.parent,
            "message": self.message,
            "made": self.made,
            "consumed": list(self.consumed),
        }


Edit = Callable[[dict[str, Skill]], dict[str, Skill]]
"""What a change does with the skills by id; it may be asked again on a newer state."""


class BankFolder:
    """The bank in a folder. Reading makes nothing; the first change makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ------------------------------------------------------------------------------------------------------------ reading

    def head(self) -> Head | None:
        """The newest head, None for a bank that holds nothing yet."""
        numbers = self._numbers()
        return self.head_at(numbers[-1]) if numbers else None

    def head_at(self, number: int) -> Head:
        """The head of that number; BankError when there is none or it is damaged."""
        path = self._head_path(number)
        if not path.exists():
            known = self._numbers()
            raise BankError(
                f"The bank {self.folder} has no state {number}; it has {f'{known[0]} to {known[-1]}' if known else 'none yet'}."
            )
        said = read_json(path, BankError, SCHEMA)
        try:
            return Head(
                int(said["number"]), str(said["version"]), said["parent"], str(said["message"]), str(said["made"]), tuple(said["consumed"])
            )
        except (KeyError, TypeError, ValueError):
            raise BankError(f"{path} is no head of a bank. Remove it to go back to the state before it.") from None

    def history(self) -> list[Head]:
        """All heads, oldest first."""
        return [self.head_at(number) for number in self._numbers()]

    def skills(self, number: int | None = None) -> dict[str, Skill]:
        """Skills by id of the newest (or a given) state, in the order of ids; what is in the inbox is not among them."""
        head = self.head() if number is None else self.head_at(number)
        return {} if head is None else {s.id: s for s in read_skills(self.version_path(head.version), expected=head.version)}

    def version_path(self, version: str) -> Path:
        """Where the file of a version lies."""
        return self.folder / "versions" / f"{version}.jsonl"

    def waiting(self) -> list[Path]:
        """Hand-ins that no head has taken yet, by name."""
        head = self.head()
        taken = set(head.consumed) if head else set()
        return [p for p in self._inbox() if p.name not in taken]

    @property
    def mode(self) -> str:
        """How the bank was evolved: "frozen" unless `declare` said otherwise."""
        path = self.folder / "bank.json"
        return str(read_json(path, BankError, SCHEMA).get("mode", "frozen")) if path.exists() else "frozen"

    # ----------------------------------------------------------------------------------------------------------- changing

    def declare(self, mode: str) -> None:
        """Say once how the bank is evolved; BankError when it already is of another mode, for results carry it."""
        if self.mode != mode and self.head() is not None:
            raise BankError(
                f"The bank {self.folder} is of mode {self.mode!r}; evolve another folder in mode {mode!r}, so that none is mistaken."
            )
        write_json(self.folder / "bank.json", {"schema": SCHEMA, "mode": mode})

    def hand_in(self, skills: Iterable[Skill]) -> Path:
        """Give skills (with their trials) to the bank from any process; they are in it after the next `fold`. Returns the file."""
        found = list(skills)
        for skill in found:
            check_skill(skill, "The skill handed in")
        path = self.folder / "inbox" / f"{time.time_ns():020d}-{uuid.uuid4().hex}.jsonl"
        write_text(path, _text(found))
        return path

    def fold(self, message: str = "fold") -> Head | None:
        """Take every hand-in into a new state; None when there was nothing to take. Hand-ins are removed after the head stands."""
        if not self.waiting() and self.head() is None:
            return None
        if not self.waiting():
            self._clear(self.head())
            return None
        return self.change(lambda skills: skills, message)

    def change(self, edit: Edit, message: str) -> Head:
        """A new state: the newest one with all hand-ins, after `edit`. Safe beside other processes: on a race the edit is asked again."""
        for attempt in range(MAX_ATTEMPTS):
            head = self.head()
            base = {} if head is None else self.skills(head.number)
            taken = set(head.consumed) if head else set()
            present = self._inbox()
            fresh = [p for p in present if p.name not in taken]
            for path in fresh:
                for skill in _hand_in(path):
                    base[skill.id] = base[skill.id].merged(skill) if skill.id in base else skill
            after = edit(dict(base))
            made = self._commit(
                head, after, message, (*(n for n in sorted(taken) if (self.folder / "inbox" / n).exists()), *(p.name for p in fresh))
            )
            if made is not None:
                self._clear(made)
                return made
            time.sleep(min(0.2, 0.002 * 2 ** min(attempt, 6)) * (0.5 + (os.getpid() % 97) / 97))
        raise OutputError(f"The bank {self.folder} is changed so often that this change found no gap. Try again.")

    def restore(self, number: int, message: str = "") -> Head:
        """A new state that equals an earlier one; hand-ins that wait stay waiting. OutputError when another process was faster."""
        head, before = self.head(), self.head_at(number)
        last = head.number if head else 0
        consumed = head.consumed if head else ()
        if not self._publish(Head(last + 1, before.version, before.parent, message or f"restore {number}", _now(), consumed)):
            raise OutputError(f"The bank {self.folder} was changed meanwhile; look at its history and try again.")
        return self.head_at(last + 1)

    def undo(self) -> Head:
        """A new state that equals the one before the newest. A second undo goes one further back; `restore` brings any state again."""
        head = self.head()
        if head is None or head.parent is None:
            raise BankError(f"The bank {self.folder} has nothing to undo.")
        return self.restore(head.parent, f"undo {head.number}")

    # ------------------------------------------------------------------------------------------------------------ private

    def _numbers(self) -> list[int]:
        folder = self.folder / "heads"
        try:
            return sorted(int(p.stem) for p in folder.iterdir() if p.suffix == ".json" and p.stem.isdigit())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _head_path(self, number: int) -> Path:
        return self.folder / "heads" / f"{number:08d}.json"

    def _inbox(self) -> list[Path]:
        try:
            return sorted(p for p in (self.folder / "inbox").iterdir() if p.suffix == ".jsonl" and not p.name.startswith(".tmp-"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _commit(self, head: Head | None, skills: dict[str, Skill], message: str, consumed: tuple[str, ...]) -> Head | None:
        for skill in skills.values():
            check_skill(skill, f"The bank {self.folder}")
        text = _text(skills[key] for key in sorted(skills))
        version = _digest(text)
        path = self.version_path(version)
        if not path.exists():
            write_text(path, text)
        number = 1 if head is None else head.number + 1
        made = Head(number, version, None if head is None else head.number, message, _now(), consumed)
        return made if self._publish(made) else None

    def _publish(self, head: Head) -> bool:
        """Make the head's file unless its number is taken: a hard link is atomic where renaming would overwrite."""
        path = self._head_path(head.number)
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        write_text(temporary, json.dumps(head.to_json(), indent=1, ensure_ascii=False) + "\n")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _clear(self, head: Head | None) -> None:
        for name in head.consumed if head else ():
            (self.folder / "inbox" / name).unlink(missing_ok=True)


def read_skills(path: Path, expected: str | None = None) -> list[Skill]:
    """The skills of a bank file in file order; BankError naming file and line. expected: the hash that its content must have."""
    text = _read(path)
    if expected is not None and _digest(text) != expected:
        raise BankError(f"{path} was changed by hand or is damaged: its content is not that of its name. Undo, or import it as a file.")
    return list(_parse(text, path))


def write_skills(path: Path, skills: Iterable[Skill]) -> None:
    """Write a bank file (for export), sorted by id."""
    write_text(path, _text(sorted(skills, key=lambda s: s.id)))


def merge_skills(*banks: Iterable[Skill]) -> dict[str, Skill]:
    """Skills of several banks by id; the order of the banks does not matter, and merging twice changes nothing."""
    merged: dict[str, Skill] = {}
    for bank in banks:
        for skill in bank:
            merged[skill.id] = merged[skill.id].merged(skill) if skill.id in merged else skill
    return dict(sorted(merged.items()))


def retire(skill: Skill, note: str) -> Skill:
    """The skill, never to be retrieved again; its history stays."""
    return replace(skill, status="retired", audit=replace(skill.audit, note=note))


def _hand_in(path: Path) -> list[Skill]:
    """A hand-in; one that another process took and removed meanwhile holds nothing (the race is then lost at the head)."""
    try:
        return read_skills(path)
    except BankError:
        if path.exists():
            raise
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BankError(f"The bank file {path} does not exist.") from None
    except UnicodeDecodeError:
        raise BankError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as fault:
        raise BankError(f"Cannot read the bank file {path}: {fault.strerror}.") from fault


def _parse(text: str, path: Path) -> Iterator[Skill]:
    seen: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            raise BankError(f"{where}: the line is not valid JSON. Mend or remove it.") from None
        if not seen and number == 1:
            if not isinstance(line, dict) or line.get("kind") != KIND:
                raise BankError(f"{path} is no bank file: its first line names no kind {KIND!r}.")
            if line.get("schema") != SCHEMA:
                raise BankError(f"{path} has bank schema {line.get('schema')!r}, this version reads {SCHEMA}.")
            seen[""] = 1
            continue
        skill = Skill.from_json(line, where)
        if skill.id in seen:
            raise BankError(f"{where}: the id {skill.id!r} was already used in line {seen[skill.id]}.")
        seen[skill.id] = number
        yield skill
    if not seen:
        raise BankError(f"{path} is no bank file: it is empty.")


def _text(skills: Iterable[Skill]) -> str:
    head = {"schema": SCHEMA, "kind": KIND}
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *(s.to_json() for s in skills)))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
