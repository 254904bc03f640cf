"""Skills: reusable reasoning artifacts that are shown to the reasoner when they fit a request.

A skill says when it fits (triggers from the words and from the scan), what to do, and carries its audit: which traces it came from,
how it fared, and the acceptance test that it passed. Its id is a hash of what it says, so that two machines that find the same
skill find one skill.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from seerseg.errors import BankError, did_you_mean

Status = Literal["candidate", "accepted", "retired"]
STATUSES: tuple[Status, ...] = ("candidate", "accepted", "retired")
TAG_OF_STYLE = {
    "ambiguous_abbreviation": "ABBR_DISAMBIGUATE",
    "abbr_or_short": "ABBR_DISAMBIGUATE",
    "messy_or_misspelled": "MESSY_INPUT_REPAIR",
    "mixed_case": "MESSY_INPUT_REPAIR",
    "keyboard_slips": "MESSY_INPUT_REPAIR",
    "speech_to_text": "MESSY_INPUT_REPAIR",
    "out_of_region_reference": "OUT_OF_REGION_REJECT",
    "absent": "OUT_OF_REGION_REJECT",
    "clinical_request": "CLINICAL_REQUEST_NORMALIZE",
    "chat": "CLINICAL_REQUEST_NORMALIZE",
    "report_style": "REPORT_STYLE_PARSE",
    "order_form": "REPORT_STYLE_PARSE",
    "verbose_request": "VERBOSE_PRUNE",
}
"""Request style -> skill tag: SEER's eight as it names them (arXiv 2603.08215, released code), the others where they belong."""
DEFAULT_TAG = "PROMPT_NORMALIZE"
TAUGHT = "taught"
"""Origin of skills that training requests teach, whatever the reasoner made of them."""
MAX_FIELD_CHARS = 600
MAX_WORDS = 24
_TAG = re.compile(r"[A-Z][A-Z0-9_]{1,39}")
_ORDERS = re.compile(
    r"\b(ignore|disregard|forget|override)\b.{0,40}\b(instruction|prompt|rule|above|previous|system|skill)"
    r"|\byou are (now|an?)\b|(^|[.!?])\s*(system|assistant|user)\s*:|<[/|]?[a-z_]|\bjailbreak\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Acceptance:
    """A paired comparison on bank cases with and without the skill. gain: mean Dice difference; low: lower confidence bound; unlike:
    requests among them that hold none of the skill's words as they stand; language: the splits of language that were asked in."""

    n: int
    gain: float
    low: float
    worst: float = 0.0
    round: int = 0
    unlike: int = 0
    language: str = ""


@dataclass(frozen=True)
class Audit:
    """Where a skill comes from and how it fared.

    sources: ids of the traces or episodes it was distilled from, with their cases, as "case/request"; trials: key of one use
    ("round/case/request") -> Dice with the skill minus Dice without, so that merging twice counts once.
    """

    origin: str = "hand"
    sources: tuple[str, ...] = ()
    trials: Mapping[str, float] = field(default_factory=dict)
    accepted: Acceptance | None = None
    note: str = ""

    @property
    def uses(self) -> int:
        """How often it was tried."""
        return len(self.trials)

    @property
    def gain(self) -> float:
        """Sum of the gains."""
        return sum(v for v in self.trials.values() if v > 0)

    @property
    def drop(self) -> float:
        """Sum of the drops, positive."""
        return -sum(v for v in self.trials.values() if v < 0)

    def merged(self, other: Audit) -> Audit:
        """Both histories; the same trial counts once. Merging is commutative and idempotent."""
        trials = {k: _agreed(self.trials.get(k), other.trials.get(k)) for k in sorted({*self.trials, *other.trials})}
        tests = [a for a in (self.accepted, other.accepted) if a is not None]
        return Audit(
            min(self.origin, other.origin),
            tuple(sorted({*self.sources, *other.sources})),
            trials,
            max(tests, key=lambda a: (a.round, a.n, a.low)) if tests else None,
            max(self.note, other.note),
        )


@dataclass(frozen=True)
class Skill:
    """One skill. tag: its kind (e.g. "ABBR_DISAMBIGUATE"); when: what triggers it, in words; what: what to do, in words.

    words: phrases of requests that it answers to; target: canonical name it leads to, None for a habit that fits many; modalities,
    regions: of scans it fits, empty for any; pattern: what the evidence looks like; example: a worked one; lesson: what went wrong
    before. id: "" makes it from the content.
    """

    id: str
    tag: str
    when: str
    what: str
    words: tuple[str, ...] = ()
    target: str | None = None
    modalities: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    pattern: str = ""
    example: str = ""
    lesson: str = ""
    status: Status = "accepted"
    audit: Audit = field(default_factory=Audit, compare=False)

    def __post_init__(self) -> None:
        if not self.id:
            said = [self.tag, self.when, self.what, sorted(self.words), self.target, sorted(self.modalities), sorted(self.regions)]
            digest = hashlib.blake2b(json.dumps(said, ensure_ascii=False).encode(), digest_size=6).hexdigest()
            object.__setattr__(self, "id", f"s-{digest}")

    @property
    def rival(self) -> bool:
        """Whether it is never shown, but heeded where it fits: taught by training requests, tested, and neither a help nor harmful."""
        return self.status == "candidate" and self.audit.origin == TAUGHT and self.audit.accepted is not None

    @property
    def leads_to(self) -> str | None:
        """The name that it leads to, "absent" among them, in lower case; None for a habit that fits many."""
        said = self.target if self.target is not None else self.what.removeprefix("answer ")
        name = " ".join(said.casefold().split())
        return name if self.target is not None or name == "absent" else None

    def to_json(self) -> dict[str, Any]:
        """One line of a bank file; empty fields are left out."""
        line, audit = asdict(self), asdict(self.audit)
        del line["audit"]
        return {**_filled(line), "audit": _filled(audit)}

    @staticmethod
    def from_json(line: Any, where: str) -> Skill:
        """The skill of a line; BankError beginning with `where` when it is none, is too long, or speaks to the reasoner."""
        if not isinstance(line, dict):
            raise BankError(f"{where}: the line is no skill: it holds no JSON object.")
        known = {"id", "tag", "when", "what", "words", "target", "modalities", "regions", "pattern", "example", "lesson", "status", "audit"}
        if unknown := sorted(set(line) - known):
            raise BankError(f"{where}: the skill has the unknown field {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
        texts = {key: line.get(key, "") for key in ("id", "tag", "when", "what", "pattern", "example", "lesson")}
        lists = {key: line.get(key, []) for key in ("words", "modalities", "regions")}
        if bad := [k for k, v in texts.items() if not isinstance(v, str)]:
            raise BankError(f"{where}: {bad[0]!r} must be a text.")
        if bad := [k for k, v in lists.items() if not isinstance(v, list) or not all(isinstance(t, str) for t in v)]:
            raise BankError(f"{where}: {bad[0]!r} must be a list of texts.")
        target = line.get("target")
        if target is not None and not isinstance(target, str):
            raise BankError(f"{where}: 'target' must be a name or null.")
        status = line.get("status", "accepted")
        if status not in STATUSES:
            raise BankError(f"{where}: the status {status!r} is none of {', '.join(STATUSES)}.")
        skill = Skill(
            **texts,
            words=tuple(lists["words"]),
            target=target,
            modalities=tuple(lists["modalities"]),
            regions=tuple(lists["regions"]),
            status=status,
            audit=_audit(line.get("audit", {}), where),
        )
        check_skill(skill, where)
        return skill

    def merged(self, other: Skill) -> Skill:
        """The same skill with both histories; the later word on its status holds: retired, then accepted, then candidate."""
        status = max(self.status, other.status, key=STATUSES.index)
        return replace(self, status=status, audit=self.audit.merged(other.audit))


def check_skill(skill: Skill, where: str) -> None:
    """BankError beginning with `where` for a skill that must not reach a prompt: an empty or overlong part, control characters, an
    impossible tag or id, or text that gives orders to the reasoner or imitates its markup."""
    if not _TAG.fullmatch(skill.tag):
        raise BankError(f"{where}: the tag {skill.tag[:40]!r} is none: write it in capitals and underscores, e.g. ABBR_DISAMBIGUATE.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:._-]{0,63}", skill.id):
        raise BankError(f"{where}: the id {skill.id[:70]!r} is none: letters, digits and : . _ - only.")
    if not skill.when.strip() or not skill.what.strip():
        raise BankError(f"{where}: the skill {skill.id} must say when it fits and what to do.")
    if len(skill.words) > MAX_WORDS:
        raise BankError(f"{where}: the skill {skill.id} has {len(skill.words)} words, at most {MAX_WORDS} are kept.")
    for part in ("when", "what", "target", "pattern", "example", "lesson", "words", "modalities", "regions"):
        value = getattr(skill, part)
        for text in (value,) if isinstance(value, str) else value or ():
            if len(text) > MAX_FIELD_CHARS:
                raise BankError(
                    f"{where}: {part!r} of the skill {skill.id} has {len(text)} characters, at most {MAX_FIELD_CHARS} are kept."
                )
            if any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text):
                raise BankError(f"{where}: {part!r} of the skill {skill.id} holds control or invisible characters.")
            if _ORDERS.search(text):
                raise BankError(
                    f"{where}: {part!r} of the skill {skill.id} imitates markup or gives orders to the reasoner ({text[:60]!r}). "
                    "Say in plain words when the skill fits and what to do."
                )


@dataclass(frozen=True)
class Query:
    """What is known of a request at inference. targets: names that may be answered, empty for any; evidence: what the reasoner
    itself wrote on an earlier reading."""

    text: str
    modality: str | None = None
    regions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    evidence: str = ""


class Retriever(Protocol):
    """Anything that finds skills for a request from what is known at inference alone."""

    @property
    def identity(self) -> str:
        """Changes whenever retrieval could (for resume and records)."""
        ...

    @property
    def mode(self) -> str:
        """The bank mode that results carry: "none", "frozen", "online" or "transductive"."""
        ...

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The skills that fit, best first; none is better than a wrong one."""
        ...


class EmptyBank:
    """The bank mode "none": no skill ever."""

    identity = "none"
    mode = "none"

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """Nothing."""
        return ()


def glossed(request: str, skills: Sequence[Skill]) -> str:
    """A request as a reasoner is shown it beside skills: with the name that they lead to, "... (by skill [1]: left lung)", where they all
    lead to one. A small reasoner that hardly reads a list of skills does read its request."""
    names = {skill.leads_to for skill in skills if skill.leads_to is not None}
    told = [(number, skill.target) for number, skill in enumerate(skills, start=1) if skill.target is not None]
    return f"{request} (by skill [{told[0][0]}]: {told[0][1]})" if len(names) == 1 and told else request


def named_skills(text: str, skills: Sequence[Skill]) -> tuple[str, ...]:
    """Ids of the skills that a rationale names: by id, by tag where only one shown skill has it, or by its number [i]."""
    folded = text.casefold()
    tags = [skill.tag for skill in skills]
    named = [
        skill.id
        for number, skill in enumerate(skills, start=1)
        if skill.id.casefold() in folded
        or re.search(rf"\[\s*{number}\s*\]", text)  # a small reasoner's tokeniser may part brackets and number
        or (tags.count(skill.tag) == 1 and skill.tag.casefold() in folded)
    ]
    return tuple(named)


def _filled(said: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items() if v not in ("", (), None, {})}


def _agreed(a: float | None, b: float | None) -> float:
    """One value for a trial that two histories may hold: the smaller where they differ, whatever the order."""
    return min(v for v in (a, b) if v is not None)


def _audit(said: Any, where: str) -> Audit:
    try:
        trials = {str(k): float(v) for k, v in dict(said.get("trials", {})).items()}
        if not all(abs(v) <= 1 for v in trials.values()):
            raise ValueError("a trial is no difference of two Dice values")
        accepted = said.get("accepted")
        test = None if accepted is None else Acceptance(**accepted)
        sources = tuple(str(s) for s in said.get("sources", ()))
        return Audit(str(said.get("origin", "hand")), sources, trials, test, str(said.get("note", "")))
    except (AttributeError, TypeError, ValueError) as fault:
        raise BankError(f"{where}: the audit of the skill cannot be read ({fault}).") from None
