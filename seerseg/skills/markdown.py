"""Skills as a folder of SKILL.md files, the convention of agent skills: one folder a skill, YAML-like front matter, then prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seerseg.errors import BankError
from seerseg.paths import safe_name, write_text
from seerseg.skills.base import Skill

FILE = "SKILL.md"
_SECTIONS = {"When": "when", "What to do": "what", "Evidence": "pattern", "Example": "example", "Lesson": "lesson"}


def write_folder(folder: Path, skills: Iterable[Skill]) -> None:
    """<folder>/<id>/SKILL.md for every skill. Front matter: name, description (what agents choose by), and our fields as JSON values."""
    for skill in skills:
        line = skill.to_json()
        front = {"name": safe_name(skill.id), "description": f"{skill.when}: {skill.what}"}
        front |= {k: line[k] for k in ("id", "tag", "target", "words", "modalities", "regions", "status", "audit") if k in line}
        head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
        body = "\n\n".join(f"## {title}\n\n{getattr(skill, part)}" for title, part in _SECTIONS.items() if getattr(skill, part))
        write_text(folder / safe_name(skill.id) / FILE, f"---\n{head}\n---\n\n{body}\n")


def read_folder(folder: Path) -> list[Skill]:
    """Every <folder>/*/SKILL.md (or the one in the folder itself); BankError naming the file that cannot be used.

    Files of other tools are read too: a plain `description` becomes what to do, the title when it fits.
    """
    paths = sorted(folder.glob(f"*/{FILE}")) or sorted(folder.glob(FILE))
    if not paths:
        raise BankError(f"{folder} holds no {FILE}, neither itself nor in the folders within.")
    return [_read(path) for path in paths]


def _read(path: Path) -> Skill:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BankError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as fault:
        raise BankError(f"Cannot read {path}: {fault.strerror}.") from fault
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text.replace("\r\n", "\n"), re.DOTALL)
    if found is None:
        raise BankError(f"{path} has no front matter between two lines of three dashes. Write name and description there.")
    front: dict[str, Any] = {}
    for raw in found[1].split("\n"):
        key, colon, value = raw.partition(":")
        if colon and key.strip() and not raw[0].isspace():
            front[key.strip()] = _value(value.strip())
    parts = re.split(r"^## +(.+)$", found[2], flags=re.MULTILINE)
    said = {_SECTIONS[t.strip()]: " ".join(b.split()) for t, b in zip(parts[1::2], parts[2::2], strict=True) if t.strip() in _SECTIONS}
    line: dict[str, Any] = {k: front[k] for k in ("id", "tag", "target", "words", "modalities", "regions", "status", "audit") if k in front}
    line |= said
    line.setdefault("tag", "PROMPT_NORMALIZE")
    line.setdefault("when", str(front.get("name", path.parent.name)).replace("-", " "))
    line.setdefault("what", str(front.get("description", "")))
    return Skill.from_json(line, str(path))


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself, as plain YAML would have it."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("'\"")
