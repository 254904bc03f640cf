"""The trace file: a header line, then one JSON object per request, in file order. Images are referred to, never copied.

    {"schema": 1, "kind": "seerseg_traces", "dataset": ..., "made_by": ..., ...}
    {"id", "case", "text", "target", "style", "language_split", "evidence", "rationale", "answer", "skill",
     "brief": [evidence, rationale],
     "slices": [{"axis", "index", "area", "boxes": [[lo, lo, hi, hi], ...], "points": [[z, y, x], ...]}, ...],
     "turns": [{"prompt": {...} | null, "dice", "mask", ["learn"]}, ...], "source": {...}}

Voxel numbers are of the case's canonical grid (Z, Y, X); boxes are half-open edges along the two axes of the slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seerseg.errors import DatasetError
from seerseg.paths import write_text
from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.protocols.base import KeySlice, Trace, Turn

SCHEMA = 1
KIND = "seerseg_traces"


@dataclass(frozen=True)
class TraceRow:
    """A request with its trace. target: label names whose union is meant, None when absent; source: hashes of what the trace was
    made from and by what."""

    id: str
    case: str
    text: str
    target: tuple[str, ...] | None
    style: str
    language_split: str
    trace: Trace
    source: Mapping[str, Any] = field(default_factory=dict)

    def spoken(self, *, brief: bool) -> TraceRow:
        """The row as a reasoner is to learn it (`Trace.spoken`)."""
        return replace(self, trace=self.trace.spoken(brief=brief))

    def to_json(self) -> dict[str, Any]:
        """One line of the file."""
        target = None if self.target is None else self.target[0] if len(self.target) == 1 else list(self.target)
        line: dict[str, Any] = {
            "id": self.id,
            "case": self.case,
            "text": self.text,
            "target": target,
            "style": self.style,
            "language_split": self.language_split,
            "evidence": self.trace.evidence,
            "rationale": self.trace.rationale,
            "answer": self.trace.answer,
            "skill": self.trace.skill,
        }
        if self.trace.brief is not None:
            line["brief"] = list(self.trace.brief)
        if self.trace.slices:
            line["slices"] = [
                {
                    "axis": s.axis,
                    "index": s.index,
                    "area": s.area,
                    "boxes": [[*b.lo, *b.hi] for b in s.boxes],
                    "points": [list(p) for p in s.points],
                }
                for s in self.trace.slices
            ]
        if self.trace.turns:
            line["turns"] = [
                {
                    "prompt": t.prompt.to_json() if t.prompt else None,
                    "dice": t.dice,
                    "mask": t.mask,
                    **({} if t.learn else {"learn": False}),
                }
                for t in self.trace.turns
            ]
        if self.source:
            line["source"] = dict(self.source)
        return line

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> TraceRow:
        """The row of a line; KeyError, TypeError or ValueError when it is none."""
        target = line["target"]
        slices = tuple(
            KeySlice(
                int(s["axis"]),
                int(s["index"]),
                int(s["area"]),
                tuple(Box2D(int(s["axis"]), int(s["index"]), (b[0], b[1]), (b[2], b[3])) for b in s["boxes"]),
                tuple((int(z), int(y), int(x)) for z, y, x in s["points"]),
            )
            for s in line.get("slices", ())
        )
        turns = tuple(
            Turn(_prompt(t["prompt"]), float(t["dice"]), str(t["mask"]), bool(t.get("learn", True))) for t in line.get("turns", ())
        )
        said = {key: line[key] for key in ("id", "case", "text", "style", "language_split", "evidence", "rationale", "answer")}
        if not all(isinstance(value, str) for value in said.values()) or not said["answer"]:
            raise ValueError("a text is missing")
        brief = line.get("brief")
        if brief is not None and not (isinstance(brief, list) and len(brief) == 2 and all(isinstance(t, str) and t for t in brief)):
            raise ValueError("'brief' must hold evidence and rationale")
        return TraceRow(
            said["id"],
            said["case"],
            said["text"],
            None if target is None else (target,) if isinstance(target, str) else tuple(target),
            said["style"],
            said["language_split"],
            Trace(
                said["evidence"],
                said["rationale"],
                said["answer"],
                line.get("skill"),
                slices,
                turns,
                None if brief is None else (brief[0], brief[1]),
            ),
            line.get("source", {}),
        )


def write_traces(path: Path, header: Mapping[str, Any], rows: Iterable[TraceRow]) -> None:
    """Write the file, atomically."""
    first = {"schema": SCHEMA, "kind": KIND, **header}
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (first, *(row.to_json() for row in rows))))


def read_traces(path: Path) -> tuple[dict[str, Any], list[TraceRow]]:
    """Header and rows; DatasetError naming file and line when the file is missing or is no trace file."""
    lines = _lines(path)
    number, first = next(lines, (1, None))
    if not isinstance(first, dict) or first.get("kind") != KIND:
        raise DatasetError(f"{path} is no trace file: its first line names no kind {KIND!r}. Make it with seerseg_make_traces.")
    if first.get("schema") != SCHEMA:
        raise DatasetError(
            f"{path} has trace schema {first.get('schema')!r}, this version reads {SCHEMA}. Make it again with seerseg_make_traces."
        )
    rows = []
    for number, line in lines:
        try:
            rows.append(TraceRow.from_json(line))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
            raise DatasetError(
                f"{path}:{number}: the line is no trace ({type(fault).__name__}: {fault}). Make the file again with seerseg_make_traces."
            ) from fault
    return first, rows


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"There are no traces at {path}. Make them with seerseg_make_traces.") from None
    except OSError as fault:
        raise DatasetError(f"Cannot read the traces {path}: {fault.strerror}.") from fault
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if raw.strip():
            try:
                yield number, json.loads(raw)
            except (ValueError, RecursionError):
                raise DatasetError(f"{path}:{number}: the line is not valid JSON. Make the file again with seerseg_make_traces.") from None


def _prompt(said: Mapping[str, Any] | None) -> Prompt | None:
    if said is None:
        return None
    boxes = tuple(
        Box2D(int(b["axis"]), int(b["index"]), tuple(b["lo"]), tuple(b["hi"])) if "axis" in b else Box3D(tuple(b["lo"]), tuple(b["hi"]))
        for b in said["boxes"]
    )
    points = tuple(Point(tuple(p["zyx"]), bool(p["positive"])) for p in said["points"])
    return Prompt(text=said["text"], class_name=said["class"], boxes=boxes, points=points)
