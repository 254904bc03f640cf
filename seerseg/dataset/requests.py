"""Requests: free text asking for one target in one case, and the JSONL file that holds them.

One JSON object per line:

    {"id": "r1", "case": "case_001", "text": "plz outline the lft lung", "target": "left lung", "style": "messy", "language_split": "train"}

`target` is a label name of `dataset.json`, a list of them (their union), or null (the target is absent from the case);
without the key the truth is unknown. `id` may be missing: then it is "line00001" and so on. `points`, where the makers of a dataset
published reference points of the target, are voxels [[z, y, x], ...] of the case's canonical grid. Other keys are tolerated.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.errors import OutputError, RequestError
from seerseg.paths import write_text

MAX_REQUEST_CHARS = 4000
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")
_JOINERS = "\u200c\u200d"  # between letters of Persian and Indic scripts they carry meaning


@dataclass(frozen=True)
class Request:
    """Free text asking for one target in one case.

    target: label names whose union is meant; None with has_target=True: the target is absent from the case;
    has_target=False: the truth is unknown. style, language_split: "" when not stated. points: published reference points of the target,
    voxels (z, y, x) of the canonical grid.
    """

    id: str
    case: str
    text: str
    target: tuple[str, ...] | None = None
    style: str = ""
    language_split: str = ""
    has_target: bool = True
    points: tuple[tuple[int, int, int], ...] = ()

    @property
    def absent(self) -> bool:
        """The target is known not to be in the case."""
        return self.has_target and self.target is None

    def to_json(self) -> dict[str, Any]:
        """One line of the file, as a dict; the inverse of reading it."""
        line: dict[str, Any] = {"id": self.id, "case": self.case, "text": self.text}
        if self.has_target:
            line["target"] = None if self.target is None else self.target[0] if len(self.target) == 1 else list(self.target)
        if self.style:
            line["style"] = self.style
        if self.language_split:
            line["language_split"] = self.language_split
        if self.points:
            line["points"] = [list(point) for point in self.points]
        return line


def check_text(text: str, where: str = "The request") -> str:
    """The text in Unicode form NFC, stripped, runs of blanks made one, control and invisible characters taken out.

    RequestError, its sentence beginning with `where`, when nothing is left or more than MAX_REQUEST_CHARS are.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    kept = (
        c
        if c in "\n" + _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zs")
        else " "
        if c in "\t\v\f" or c.isspace()
        else ""
        for c in text
    )
    text = re.sub(r"[ ]*\n\s*", "\n", re.sub(r" +", " ", "".join(kept))).strip(" \n\t" + _JOINERS)
    if not text or not any(c.isprintable() and not c.isspace() for c in text.replace(_JOINERS[0], "").replace(_JOINERS[1], "")):
        raise RequestError(f"{where} is empty. Say in words what is to be outlined.")
    if len(text) > MAX_REQUEST_CHARS:
        raise RequestError(
            f"{where} has {len(text)} characters, at most {MAX_REQUEST_CHARS} are read. Shorten it to what is to be outlined."
        )
    return unicodedata.normalize("NFC", text)


def scan_requests(path: Path) -> tuple[list[Request], list[str]]:
    """Every good line of a request file, and one sentence (naming file:line) for every line that is not.

    RequestError only when the file itself cannot be read. Ids are unique among the requests returned.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"The request file {path} does not exist.") from None
    except OSError as error:
        raise RequestError(f"Cannot read the request file {path}: {error.strerror}.") from error
    requests: list[Request] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            request = _parse(raw, number, f"{path}:{number}")
        except RequestError as error:
            faults.append(str(error))
            continue
        if request.id in seen:
            faults.append(
                f"{path}:{number}: the id {request.id!r} was already used in line {seen[request.id]}. Give every request its own id."
            )
            continue
        seen[request.id] = number
        requests.append(request)
    return requests, faults


def read_requests(path: Path) -> list[Request]:
    """The requests of a JSONL file in file order; RequestError naming file:line at the first line that cannot be used."""
    requests, faults = scan_requests(path)
    if faults:
        more = f" ({len(faults) - 1} more lines of this file cannot be used either.)" if len(faults) > 1 else ""
        raise RequestError(faults[0] + more)
    return requests


def write_requests(path: Path, requests: Iterable[Request]) -> None:
    """Write requests as UTF-8 JSONL, atomically; `read_requests` gives equal ones back when their texts had been checked."""
    try:
        write_text(path, "".join(json.dumps(request.to_json(), ensure_ascii=False) + "\n" for request in requests))
    except UnicodeEncodeError as error:
        raise OutputError(f"Cannot write {path}: a request holds characters that are no valid Unicode ({error.reason}).") from error


def _parse(raw: bytes, number: int, where: str) -> Request:
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise RequestError(f"{where}: the line is not UTF-8 text. Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: the line is not valid JSON ({str(error)[:200]}). One JSON object per line is needed.") from None
    if not isinstance(line, dict):
        raise RequestError(f'{where}: the line is no JSON object. Write it as {{"id": ..., "case": ..., "text": ..., "target": ...}}.')
    for key in ("case", "text"):
        if key not in line:
            raise RequestError(f"{where}: the key {key!r} is missing.")
    if not isinstance(line["text"], str):
        raise RequestError(f"{where}: 'text' must be a string, not {json.dumps(line['text'])[:80]}.")
    return Request(
        id=_name(line.get("id", f"line{number:05d}"), "id", where),
        case=_name(line["case"], "case", where),
        text=check_text(line["text"], f"{where}: the request text"),
        target=_target(line.get("target"), where),
        style=_word(line.get("style"), "style", where),
        language_split=_word(line.get("language_split"), "language_split", where),
        has_target="target" in line,
        points=_points(line.get("points"), where),
    )


def _name(value: Any, key: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**18 else ""
    valid = isinstance(value, str) and _NAME.fullmatch(value) and value.strip(" .") and not _has_surrogates(value)
    if not valid:
        shown = json.dumps(value)[:80]
        raise RequestError(f"{where}: {key!r} must be a name of 1 to 200 characters without slashes and control characters, not {shown}.")
    return str(value)


def _word(value: Any, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 200 or _has_surrogates(value):
        raise RequestError(f"{where}: {key!r} must be a string of at most 200 characters, not {json.dumps(value)[:80]}.")
    return value


def _target(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() and not _has_surrogates(n) for n in names):
        shown = json.dumps(value)[:80]
        raise RequestError(
            f"{where}: 'target' must be a label name, a list of label names, or null for a target that is absent, not {shown}."
        )
    return tuple(dict.fromkeys(names))


def _points(value: Any, where: str) -> tuple[tuple[int, int, int], ...]:
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(p, list) and len(p) == 3 and all(type(v) is int and abs(v) < 1 << 31 for v in p) for p in listed):
        raise RequestError(f"{where}: 'points' must be a list of voxels [z, y, x], three whole numbers each, not {json.dumps(value)[:80]}.")
    return tuple((z, y, x) for z, y, x in listed)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
