"""What the parts of a prediction have done together: one ledger, and what is missing by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.dataset import find_inputs
from seerseg.errors import EXIT_DONE, EXIT_FAULT, EXIT_SOME_FAILED, NothingToDoError, OutputError
from seerseg.paths import write_text
from seerseg.prediction.ledger import Entry, Ledger, ledger_name, read_ledger
from seerseg.prediction.questions import gather


@dataclass(frozen=True)
class Merged:
    """All cases of the input. done: how many have their files; failed: case -> why, wholly or in part; missing: case -> the part whose it
    is, as no ledger has a line for it or its files are gone; idle: parts that wrote no ledger; problems: sentences about requests that
    belong to no case, and about lines that are none."""

    output: Path
    total: int
    done: int
    failed: dict[str, str]
    missing: dict[str, int]
    idle: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0, 3 when some cases failed or are missing, 1 when none is done."""
        if not (self.failed or self.missing or self.problems):
            return EXIT_DONE
        return EXIT_SOME_FAILED if self.done or self.failed else EXIT_FAULT

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "output": str(self.output),
            "exit_code": self.exit_code,
            "total": self.total,
            "done": self.done,
            "failed": self.failed,
            "missing": self.missing,
            "idle_parts": list(self.idle),
            "problems": list(self.problems),
        }


def merge_parts(
    source: str | Path,
    output: str | Path,
    num_parts: int,
    *,
    prompts: Sequence[str] = (),
    requests: str | Path | None = None,
    channels: int | None = None,
) -> Merged:
    """Put the newest line of every case into ledger.jsonl of `output` and say how the cases of `source` stand. Nothing is computed and no
    image is read; the parts' own ledgers stay. UsageError while a run without parts is writing there; NothingToDoError without a case.
    """
    folder = Path(output).expanduser()
    if not folder.is_dir():
        raise OutputError(f"There is no output folder {folder}, so no part has written anything. Run the parts first.")
    inputs = find_inputs(source, channels=channels)
    questions = gather(inputs, prompts=prompts, requests=Path(requests).expanduser() if requests is not None else None)
    files = {case.id for case in inputs.cases}
    cases = sorted({case for case in questions.by_case if case in files} | set(inputs.faults))  # as prediction shares them
    if not cases:
        raise NothingToDoError(f"{source} holds no case that is asked for anything.")
    newest: dict[str, Entry] = {}
    problems = list(questions.problems)
    with Ledger(folder):  # holds ledger.jsonl, so that nobody appends to it meanwhile
        for path in sorted(folder.glob("ledger*.jsonl")):
            entries, faults = read_ledger(path)
            problems += faults
            for entry in entries:
                if entry.case not in newest or newest[entry.case].time <= entry.time:
                    newest[entry.case] = entry
        lines = [json.dumps(newest[case].to_json(), ensure_ascii=False, separators=(",", ":")) for case in sorted(newest)]
        write_text(folder / ledger_name(1, 0), "".join(line + "\n" for line in lines))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    failed: dict[str, str] = {}
    missing: dict[str, int] = {}
    for number, case in enumerate(cases):
        last = newest.get(case)
        if last is None or any(sizes.get(file.name) != file.size for file in last.files):
            missing[case] = number % num_parts
        elif last.status != "done":
            failed[case] = last.error or f"Not all of its requests could be answered; see {case}.json."
    idle = tuple(p for p in range(min(num_parts, len(cases))) if not (folder / ledger_name(num_parts, p)).is_file())
    return Merged(
        folder, len(cases), len(cases) - len(failed) - len(missing), failed, missing, idle if num_parts > 1 else (), tuple(problems)
    )
