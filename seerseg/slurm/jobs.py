"""The folder of a job: its script, its logs, and the markers on disk by which alone its success is judged.

    JOBS/<name>/job.sh            the script; job.json: what it is made of and what was sent to Slurm
    JOBS/<name>/logs/             one file per part, all its starts in a row
    JOBS/<name>/state/<step>.begun, .ended      written whole, then renamed, by the script

Slurm is asked for progress and reasons; what it forgets or keeps no account of changes no outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seerseg.errors import EXIT_FAULT, EXIT_REQUEUE, EXIT_SOME_FAILED, OutputError, SchedulerError
from seerseg.paths import read_json, write_json, write_text
from seerseg.slurm.queue import Queued, fate, queued, sbatch
from seerseg.slurm.script import Job, step_name, write_script

SCHEMA = 1
_GRACE_S = 3.0  # a marker may reach this machine later than Slurm's word, over a network file system
_SILENCE_S = 1800.0
_SLOWEST_S = 20.0

_KINDS = ("begun", "ended", "requeued", "fruitless")

State = Literal["done", "failed", "stopped", "killed", "waiting", "running", "never"]


@dataclass(frozen=True)
class Standing:
    """How a step stands. state: "done" (code 0), "failed" (another code), "stopped" (by a signal, to be continued), "killed" (begun, then
    nothing), "never" (not begun, and Slurm has nothing more to start), "waiting", "running"; code: its exit code once it ended; why:
    what Slurm says."""

    name: str
    state: State
    code: int | None = None
    why: str = ""

    @property
    def over(self) -> bool:
        """Nothing more will come of it by itself."""
        return self.state not in ("waiting", "running")


@dataclass(frozen=True)
class Sent:
    """What was handed to Slurm. parts: numbers of the parts, () for a last step."""

    id: int
    step: str
    round: int
    parts: tuple[int, ...]


class JobFolder:
    """A job's folder; nothing is made before `prepare`."""

    def __init__(self, job: Job, jobs: Path) -> None:
        self.job, self.folder = job, jobs / job.name
        self.script, self.record, self.state = self.folder / "job.sh", self.folder / "job.json", self.folder / "state"

    # ------------------------------------------------------------------------------------------------------------ submitting

    def submit(self) -> list[Sent]:
        """Write the script and hand to Slurm what is not done: all parts the first time, later those without a marker of success, or all
        once more when none is left. SchedulerError when Slurm refuses; what it had taken before is recorded.
        """
        self._write()
        ended, every = self._markers("ended"), range(1, self.job.rounds + 1)
        open_rounds = [r for r in every if ended.get(self._final(r)) != 0]
        sent: list[Sent] = []
        before = ""
        for round_ in open_rounds or every:
            needed = [text if ":" in text else f"afterok:{text}" for text in (self.job.after, before) if text]
            missing = [p for p in range(self.job.parts) if ended.get(self._name("part", round_, p)) != 0] if open_rounds else []
            words = [str(round_)] if self.job.rounds > 1 else []
            sent.append(self._send("part", round_, missing or range(self.job.parts), needed, words))
            if self.job.last is not None:
                sent.append(self._send("last", round_, (), [f"afterany:{sent[-1].id}", *needed], words))
            before = str(sent[-1].id)
        return sent

    def active(self) -> list[Queued]:
        """What Slurm still has of this job."""
        return [q for q in queued(self.job.name) if q.state != "COMPLETING"]

    def _write(self) -> None:
        try:
            for name in ("logs", "state"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot make {self.folder}: {error.strerror}. Name another folder with --job_folder.") from error
        write_text(self.script, write_script(self.job, self.folder))
        self.script.chmod(0o755)

    def _send(self, step: str, round_: int, parts: Sequence[int], needed: Sequence[str], words: Sequence[str]) -> Sent:
        options = [f"--dependency={','.join(needed)}", "--kill-on-invalid-dep=yes"] if needed else []
        if self.job.parts > 1:
            limit = f"%{self.job.site.at_once}" if self.job.site.at_once else ""
            options.append(f"--array={ranges(parts)}{limit}" if step == "part" else "--array=0")
        if step == "last":
            options.append(f"--output={str(self.folder / 'logs').replace('%', '%%')}/last.%A.log")
        stale = [self.state / f"{self._name(step, round_, part)}.{kind}" for part in parts or (0,) for kind in _KINDS]
        kept = {path: path.read_text(encoding="utf-8") for path in stale if path.is_file()}
        for path in kept:  # before, not after: the job may begin at once
            path.unlink()
        try:
            number = sbatch(self.script, [step, *words] if words or step == "last" else [], options)
        except SchedulerError:
            for path, text in kept.items():
                write_text(path, text)
            raise
        sent = Sent(number, step, round_, tuple(parts))
        self._remember(sent)
        return sent

    def _remember(self, sent: Sent) -> None:
        said = {
            "schema": SCHEMA,
            "name": self.job.name,
            "command": list(self.job.command),
            "parts": self.job.parts,
            "rounds": self.job.rounds,
        }
        entry = {"id": sent.id, "step": sent.step, "round": sent.round, "parts": list(sent.parts), "time": round(time.time())}
        write_json(self.record, {**said, "sent": [*self._sent_lines(), entry]})

    def _sent_lines(self) -> list[dict[str, Any]]:
        return list(read_json(self.record, OutputError, SCHEMA)["sent"]) if self.record.is_file() else []

    # --------------------------------------------------------------------------------------------------------------- standing

    def standings(self, active: Sequence[Queued], *, reasons: bool = False) -> list[Standing]:
        """How every step stands, in the order of work. active: of `active()`; reasons: ask Slurm about those that left no marker."""
        begun, ended, again = self._markers("begun"), self._markers("ended"), self._markers("requeued")
        lines = {line["id"]: line for line in self._sent_lines()}
        sent = {name: line for line in lines.values() for name in self._names_of(line)}
        now = {name: q for q in active for name in self._names_in_queue(q, lines.get(q.job))}
        out = []
        for name in self._names():
            code, here = ended.get(name), now.get(name)
            if code is not None:
                state: State = "done" if code == 0 else "stopped" if code == EXIT_REQUEUE or code > 128 else "failed"
                out.append(Standing(name, state, code))
            elif here is not None:
                out.append(Standing(name, "running" if here.state == "RUNNING" else "waiting", why=here.reason if here.held else ""))
            else:
                why = ""
                if reasons and name in sent:
                    line = sent[name]
                    index = (int(name.rpartition("_")[2]) if line["step"] == "part" else 0) if self.job.parts > 1 else None
                    why = fate(int(line["id"]), index)
                out.append(Standing(name, "killed" if name in begun or name in again else "never", why=why))
        return out

    def wait(self, report: Callable[[Sequence[Standing]], None], *, first_s: float = 1.0) -> list[Standing]:
        """Ask ever more slowly until every step is over; the last standings, with reasons. A Slurm that is silent for a while (its
        controller restarts) is waited for; SchedulerError after half an hour of it."""
        pause, silent_since, empty_since = first_s, None, None
        while True:
            now = time.monotonic()
            try:
                active, silent_since = self.active(), None
            except SchedulerError:
                silent_since = silent_since or now
                if now - silent_since > _SILENCE_S:
                    raise
                time.sleep(pause)
                continue
            found = self.standings(active)
            report(found)
            if all(s.code is not None for s in found):
                return found
            if all(s.over for s in found):
                empty_since = empty_since or now
                if now - empty_since >= _GRACE_S:
                    return self.standings(self.active(), reasons=True)
                time.sleep(min(1.0, pause))
                continue
            empty_since = None
            time.sleep(pause)
            pause = min(pause * 1.2, _SLOWEST_S)

    def _names(self) -> list[str]:
        names = []
        for round_ in range(1, self.job.rounds + 1):
            names += [self._name("part", round_, part) for part in range(self.job.parts)]
            names += [self._name("last", round_, 0)] if self.job.last is not None else []
        return names

    def _names_of(self, line: Mapping[str, Any]) -> list[str]:
        return [self._name(line["step"], line["round"], part) for part in (line["parts"] if line["step"] == "part" else (0,))]

    def _names_in_queue(self, one: Queued, line: Mapping[str, Any] | None) -> list[str]:
        if line is None:  # sent by hand
            return [self._name("part", 1, one.index or 0)]
        return self._names_of(line) if one.index is None or line["step"] == "last" else [self._name("part", line["round"], one.index)]

    def _name(self, step: str, round_: int, part: int) -> str:
        return step_name(step, round_, part, self.job.rounds)

    def _final(self, round_: int) -> str:
        return self._name("part" if self.job.last is None else "last", round_, 0)

    def _markers(self, kind: str) -> dict[str, int]:
        """Name of a step -> its exit code; 0 where the marker names none."""
        found = {}
        for path in self.state.glob(f"[!.]*.{kind}") if self.state.is_dir() else ():
            try:
                first = path.read_text(encoding="utf-8").split(" ")[0]
            except OSError:
                continue
            code = first.removeprefix("code=")
            found[path.name.removesuffix(f".{kind}")] = int(code) if code.strip().isdigit() else 0
        return found


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as Slurm lists them: 0-3,7."""
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def judge(found: Sequence[Standing]) -> int:
    """The exit code of a whole job: that of the step that ends it, if it ended by itself; else 3 when anything was done, 1 when nothing
    was."""
    final = found[-1]
    if final.code is not None and final.state != "stopped":
        return final.code
    if final.state == "stopped" and len(found) == 1:
        return EXIT_REQUEUE
    return EXIT_SOME_FAILED if any(s.state == "done" or s.code == EXIT_SOME_FAILED for s in found) else EXIT_FAULT


def sentences(found: Sequence[Standing], logs: Path) -> list[str]:
    """One for each step that is not done: what became of it and where to look."""
    out = []
    for one in found:
        slurm = f" (Slurm says {one.why})" if one.why else ""
        said = {
            "failed": f"ended with code {one.code}",
            "stopped": f"was stopped with code {one.code} and not started again",
            "killed": f"was killed before it could say how it ended{slurm}",
            "never": f"never ran{slurm}",
        }.get(one.state)
        if said:
            out.append(f"{one.name} {said}; its log is in {logs}.")
    return out
