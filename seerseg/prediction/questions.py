"""Which requests are put to which case.

First come those of the job itself; then those of the command line, --prompt for every case and --requests by case; only where
neither gives a case any, those that lie beside its image (`<case>.json`, else `<case>.txt`, one request a line), and last
those of the dataset's own `requests.jsonl` in the input folder or the one above it. What cannot be used fails alone.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seerseg.dataset import CaseFiles, Inputs, Request, check_text, scan_requests
from seerseg.errors import RequestError, did_you_mean
from seerseg.paths import safe_name
from seerseg.volume import image_stem

_SHOWN_CHARS = 200
_LISTED = 5
_FEW = 8
"""So many cases in one folder make it quicker to list it than to look for each case's files."""
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,200}")


@dataclass(frozen=True)
class BadRequest:
    """A request that cannot be put. text: its beginning."""

    id: str
    text: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """What one case is asked. Ids are unique among `requests`."""

    requests: tuple[Request, ...] = ()
    bad: tuple[BadRequest, ...] = ()


@dataclass(frozen=True)
class Questions:
    """by_case: only cases that are asked something. problems: sentences about requests that reach no case, which count as
    failures; notes: sentences that do not."""

    by_case: Mapping[str, Asked]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class _Collector:
    found: dict[str, Asked] = field(default_factory=dict)

    def add(self, case: str, entries: Sequence[tuple[str, Any]], style: str) -> None:
        """entries: (default id, text or object with "text")."""
        for default_id, entry in entries:
            asked = self.found.get(case, Asked())
            try:
                request = _request(case, default_id, entry, style)
                if any(r.id == request.id for r in asked.requests):
                    raise RequestError(f"The request id {request.id!r} stands twice for case {case}. Give every request its own id.")
                self.found[case] = Asked((*asked.requests, request), asked.bad)
            except RequestError as error:
                text = entry.get("text") if isinstance(entry, dict) else entry
                bad = BadRequest(default_id, _shown(text), _shown(error, 1000))
                self.found[case] = Asked(asked.requests, (*asked.bad, bad))

    def add_ready(self, request: Request) -> None:
        """A request that is checked already."""
        asked = self.found.get(request.case, Asked())
        if any(r.id == request.id for r in asked.requests):
            reason = f"The request id {request.id!r} stands twice for case {request.case}. Give every request its own id."
            self.found[request.case] = Asked(asked.requests, (*asked.bad, BadRequest(request.id, request.text[:_SHOWN_CHARS], reason)))
        else:
            self.found[request.case] = Asked((*asked.requests, request), asked.bad)


def gather(inputs: Inputs, *, prompts: Sequence[str] = (), requests: Path | None = None) -> Questions:
    """The requests of every case of the inputs. RequestError when the file `requests` cannot be read at all."""
    collected = _Collector()
    known = {case.id for case in inputs.cases} | (set(inputs.faults) if inputs.kind != "jobs" else set())
    problems: list[str] = []
    notes: list[str] = []
    for case, entries in inputs.asked.items():
        collected.add(case, [(str(i), entry) for i, entry in enumerate(entries, 1)], "")
    for case in sorted(known):
        collected.add(case, [(prompt_id(i, text), text) for i, text in enumerate(prompts, 1)], "")
    if requests is not None:
        unknown = _from_file(requests, known, collected, problems)
        if unknown and inputs.kind != "file":
            problems.append(_without_image(unknown, known, requests))
    implicit = [case for case in inputs.cases if case.id not in collected.found] if requests is None else []
    beside = _Listing(case.images[0].parent for case in implicit)
    for files in implicit:
        _from_beside(files, beside, collected)
    _from_dataset(inputs, [c for c in implicit if c.id not in collected.found], collected, problems, notes)
    return Questions(collected.found, tuple(problems), tuple(notes))


def _shown(text: Any, limit: int = _SHOWN_CHARS) -> str:
    return str(text)[:limit].encode("utf-8", "backslashreplace").decode()


def prompt_id(number: int, text: str) -> str:
    """The id of a request given with --prompt: its number and its words, fit for a file name."""
    return f"{number}-{safe_name(text, 40).lower()}"


def _request(case: str, default_id: str, entry: Any, style: str) -> Request:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise RequestError(f'A request of case {case} is neither a text nor an object with a "text".')
    identifier = entry.get("id", default_id)
    identifier = str(identifier) if isinstance(identifier, int) and not isinstance(identifier, bool) else identifier
    if not isinstance(identifier, str) or not identifier.strip() or not _NAME.fullmatch(identifier):
        raise RequestError(f"The request id {str(identifier)[:60]!r} of case {case} cannot be used, as files may be named by it.")
    target = entry.get("target")
    names = [target] if isinstance(target, str) else target
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise RequestError(f"The target of request {identifier!r} of case {case} must be a label name, a list of them, or null.")
    return Request(
        id=identifier,
        case=case,
        text=check_text(entry["text"], f"Request {identifier!r} of case {case}"),
        target=tuple(names) if names else None,
        style=entry["style"] if isinstance(entry.get("style"), str) else style,
        language_split=entry["language_split"] if isinstance(entry.get("language_split"), str) else "",
        has_target="target" in entry,
    )


def _from_file(path: Path, known: set[str], collected: _Collector, problems: list[str]) -> list[str]:
    """Adds the requests of a JSONL file; returns the cases that it names and that are not known."""
    requests, faults = scan_requests(path)
    problems += faults
    for request in requests:
        if request.case in known:
            collected.add_ready(request)
    return sorted({r.case for r in requests} - known)


def _without_image(unknown: Sequence[str], known: set[str], path: Path) -> str:
    listed = ", ".join(unknown[:_LISTED]) + (" ..." if len(unknown) > _LISTED else "")
    one = len(unknown) == 1
    return (
        f"{path} has requests for {len(unknown)} case{'' if one else 's'} without an image in the input: {listed}."
        f"{did_you_mean(unknown[0], known)} Add the image{'' if one else 's'} or mend the case name{'' if one else 's'}."
    )


class _Listing:
    """Whether files are there: of a folder that many are asked about its names are read once, of another each is looked for."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._asked = Counter(folders)
        self._names: dict[Path, frozenset[str]] = {}

    def has(self, folder: Path, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        if self._asked[folder] < _FEW:
            return (folder / name).exists()
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return name in self._names[folder]


def _from_beside(case: CaseFiles, listing: _Listing, collected: _Collector) -> None:
    folder = case.images[0].parent
    for stem in dict.fromkeys((case.id, image_stem(case.images[0]))):
        for ending in (".json", ".txt"):
            path = folder / (stem + ending)
            if listing.has(folder, path.name) and path.is_file():
                try:
                    entries = _read_json(path) if ending == ".json" else _read_lines(path)
                    if not entries:
                        raise RequestError(f"{path} holds no request. Write what is to be outlined into it.")
                except RequestError as error:
                    collected.found[case.id] = Asked(bad=(BadRequest(path.name, "", str(error)),))
                    return
                collected.add(case.id, [(str(i), entry) for i, entry in enumerate(entries, 1)], "")
                return


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise RequestError(f"Cannot read {path}: {error.strerror}.") from error


def _read_lines(path: Path) -> list[Any]:
    return [line for line in _read_text(path).splitlines() if line.strip()]


def _read_json(path: Path) -> list[Any]:
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f'{path} is not valid JSON ({error}). Write a text, a list of texts, or {{"requests": [...]}}.') from None
    if isinstance(value, dict) and "requests" in value:
        value = value["requests"]
    return value if isinstance(value, list) else [value]


def _from_dataset(inputs: Inputs, cases: Sequence[CaseFiles], collected: _Collector, problems: list[str], notes: list[str]) -> None:
    if not cases or inputs.kind == "jobs":
        return
    for folder in dict.fromkeys((inputs.folder, inputs.folder.resolve().parent)):
        path = folder / "requests.jsonl"
        if path.is_file():
            unknown = _from_file(path, {case.id for case in cases}, collected, problems)
            if unknown and inputs.kind == "folder":
                notes.append(f"{path} also has requests for {len(unknown)} other cases.")
            return
