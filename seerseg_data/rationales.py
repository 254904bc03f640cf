"""Rationales: how the words of a request lead to its answer, and which skill that takes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from seerseg.dataset import Request
from seerseg.protocols.base import ABSENT
from seerseg.reasoners.lexicon import LexiconReasoner
from seerseg.vocabulary import Split, Vocabulary
from seerseg_data.requests.styles import STYLES

_TAG_WORDS = (
    ("MESSY_INPUT_REPAIR", "mess typo spell keyboard speech dictat noisy punct case"),
    ("ABBR_DISAMBIGUATE", "abbr short"),
    ("OUT_OF_REGION_REJECT", "absent region"),
    ("REPORT_STYLE_PARSE", "report"),
    ("CLINICAL_REQUEST_NORMALIZE", "clinic order"),
    ("VERBOSE_PRUNE", "verbose chat letter"),
)
BRIEF_WORDS = 5
"""Of a request that a brief rationale repeats."""
_SPELT = re.compile(r"Spelling repaired: ([^.]*)\.\s*")
_MEANS = re.compile(r"'([^']*)' means ([^.]*)\.\s*")


def provenance(path: Path) -> dict[str, dict[str, Any]]:
    """What a request file says, by id, of how each request was made: "asked" (the canonical name of what is asked for, also of what is
    absent), "surface" (the words that name it), "template" (names of the sentences it was put into), "slips" ("kind:word>what became of
    it"). Nothing for lines that say or are nothing."""
    found: dict[str, dict[str, Any]] = {}
    try:
        data = path.read_bytes()
    except OSError:
        return found
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if b'"asked"' not in raw:
            continue
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            line = json.loads(raw)
            texts = {key: line[key] for key in ("asked", "surface", "template", "writer") if isinstance(line.get(key), str)}
            slips = [s for s in line.get("slips", ()) if isinstance(s, str)] if isinstance(line.get("slips", ()), list) else []
            if texts.get("asked"):
                found[str(line.get("id", f"line{number:05d}"))] = {**texts, "slips": slips}
    return found


def skill_tag(style: str) -> str:
    """The skill tag of a style of request: ours as `requests.styles` has them; for a style from elsewhere, the nearest by its words."""
    if style in STYLES:
        return STYLES[style].skill_tag
    words = [w for w in re.split(r"[^a-z]+", style.casefold()) if w]
    return next((tag for tag, starts in _TAG_WORDS if any(w.startswith(s) for w in words for s in starts.split())), "PROMPT_NORMALIZE")


def rationale(
    request: Request, answer: str, names: Sequence[str], modality: str | None, note: Mapping[str, Any] | None = None
) -> tuple[str, bool]:
    """How the words of a request lead to the answer, and whether that is known: by how the request was made (`provenance`), else because
    the lexicon, which knows the request's language split, reads them so too. Where it is not, only what is certain is said."""
    if note is not None:
        return _told(request, answer, note), True
    return _read(request, answer, names, modality)


def brief_rationale(answer: str, names: Sequence[str], note: Mapping[str, Any] | None = None) -> str:
    """The words that name the structure and what they mean, as the nano reasoner is taught: "pes hippocampi: anterior hippocampus"; for
    what is absent also why. names: those that may be answered. Without `note` (see `provenance`) only the answer."""
    asked, surface = ("", "") if note is None else (str(note["asked"]), "" if note.get("writer") else str(note.get("surface", "")))
    if not asked:
        return answer if answer != ABSENT else "not in this scan"
    shown = surface and surface.casefold() != asked.casefold() and len(surface.split()) <= BRIEF_WORDS
    means = f"{surface}: {asked}" if shown else asked
    if answer != ABSENT:
        return means
    return f"{means}, {'not in this scan' if asked.casefold() in {n.casefold() for n in names} else 'not among the names'}"


def _told(request: Request, answer: str, note: Mapping[str, Any]) -> str:
    asked, surface = str(note["asked"]), str(note.get("surface", ""))
    pairs = [slip.partition(":")[2].split(">") for slip in note.get("slips", ())]
    mended = [(pair[1], pair[0]) for pair in pairs if len(pair) == 2 and pair[1]]
    own = {w for text in (surface, asked) for w in text.casefold().split()}
    chosen = [m for m in mended if m[1].casefold() in own][:3] or mended[:1]  # slips in what is asked for are worth naming
    found = [", ".join(f"{wrong} -> {right}" for wrong, right in chosen)] if chosen else []
    if note.get("writer"):
        found = []  # rewritten since: only what is asked for is certain
    elif "not_sibling" in str(note.get("template", "")):
        found.append(f"what is left out leaves {asked}")
    elif surface and surface.casefold() != asked.casefold():
        kind, side = _kind(asked, surface), asked.split()[0].casefold()
        verb = {"abbreviation": "is short for", "description": "describes", "relation": "describes"}.get(kind, "means")
        if side in ("left", "right") and side not in surface.casefold().split() and kind != "abbreviation":
            verb = f"on the {side} is"  # the side is said elsewhere in the request
        found.append(f"'{surface}' {verb} {asked}")
    if answer == ABSENT:
        return "; ".join([*found, f"not in this scan: {asked}"])
    if not found:
        return f"named as it is: {answer}"
    return "; ".join(found if found[-1].casefold().endswith(answer.casefold()) else [*found, f"so {answer}"])


@lru_cache(maxsize=4096)
def _kind(asked: str, surface: str) -> str:
    vocabulary = Vocabulary.load()
    entry = vocabulary.entries.get(asked) or vocabulary.resolve(asked)
    return next((s.kind for s in entry.surfaces if s.text.casefold() == surface.casefold()), "") if entry is not None else ""


def _read(request: Request, answer: str, names: Sequence[str], modality: str | None) -> tuple[str, bool]:
    decision = _lexicon(request.language_split, frozenset(names)).decide(request.text, tuple(names), modality=modality)
    spelt = _SPELT.match(decision.rationale)
    found = [f"{spelt[1]}"] if spelt else []
    rest = _SPELT.sub("", decision.rationale)
    agrees = decision.answer.casefold() == answer.casefold()
    if agrees and answer != ABSENT:
        found += [f"'{said}' means {meant}" for said, meant in _MEANS.findall(rest) if said.casefold() != meant.casefold()]
        for note in _MEANS.sub("", rest).strip().rstrip(".").split(". "):
            if note and note != "Taken as it stands":
                found.append(note[0].lower() + note[1:])
        if not found:
            return f"named as it is: {answer}", True
        return "; ".join(found if found[-1].endswith(answer) else [*found, f"so {answer}"]), True
    if answer == ABSENT:
        meant = _MEANS.search(rest) if agrees else None
        if meant is not None and meant[2].casefold() not in {n.casefold() for n in names}:
            return "; ".join([*found, f"not in this scan: {meant[2]}"]), True
        return "what is asked for is not in this scan", agrees
    return f"the words mean {answer}", False


@lru_cache(maxsize=8)
def _lexicon(split: str, names: frozenset[str]) -> LexiconReasoner:
    """The lexicon that knows the words of the splits up to this one. names: only for the cache, as it remembers lists of names."""
    splits: tuple[Split, ...] = {"train": ("train",), "val": ("train", "val")}.get(split, ("train", "val", "test"))  # type: ignore[assignment]
    return LexiconReasoner(vocabulary=Vocabulary.load().only(splits))
