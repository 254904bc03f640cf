"""Slurm's own commands, asked so that a missing, silent or refusing Slurm is one sentence."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seerseg.errors import SchedulerError, did_you_mean

_TIMEOUT_S = 120
_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were transmitted")
_HINTS = {
    "Invalid account": "Set account (and partition) to what sacctmgr or your site's pages name for you.",
    "accounting/QOS policy": "Your limit of jobs, processors or time is reached: wait for other jobs, or ask for less.",
    "array specification": "The cluster allows no arrays of that length: share the work among fewer parts (--num_parts).",
    "time limit": "Lower time, or choose a partition that allows more.",
    "node configuration": "No node has as much: lower gpus, cpus or memory, or choose another partition.",
    "Memory": "Lower memory, or choose another partition.",
    "generic resource": "Lower gpus, or say with gpu_option how this cluster wants GPUs asked for.",
    "Invalid qos": "Set qos to one that you may use.",
    "dependency": "A job named with --after is not known to Slurm any more.",
}


@dataclass(frozen=True)
class Queued:
    """A job or array task that Slurm has not ended yet. job: number of the job or of its array; index: of the array task, None where
    there is no array; state: PENDING, RUNNING ...; reason: why it waits."""

    job: int
    index: int | None
    state: str
    reason: str

    @property
    def held(self) -> bool:
        """Nobody but a person will start it."""
        return self.state == "PENDING" and ("held" in self.reason.lower() or "DependencyNeverSatisfied" in self.reason)


def sbatch(script: Path, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> int:
    """Submit; the job's number. SchedulerError when there is no Slurm, it does not answer or it refuses."""
    # of a job that submits another only the address of Slurm may reach the other: its memory or processors would contradict the script's
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "SEERSEG_")) or n == "SLURM_CONF"}
    done = _ask(["sbatch", "--parsable", *options, str(script), *arguments], kept)
    found = re.match(r"(\d+)", done.stdout)
    if done.returncode == 0 and found:
        return int(found[1])
    raise SchedulerError(_refusal(done.stderr, script))


def queued(name: str) -> list[Queued]:
    """This user's jobs of that name that have not ended. SchedulerError when Slurm cannot be asked."""
    done = _ask(["squeue", "-h", "-r", "-u", str(os.getuid()), "-n", name, "-o", "%F|%K|%T|%r"])
    if done.returncode:
        raise SchedulerError(_refusal(done.stderr, None))
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") >= 3]
    return [Queued(int(job), int(index) if index.isdigit() else None, state, reason) for job, index, state, reason, *_ in rows]


def fate(job: int, index: int | None) -> str:
    """What Slurm says became of an ended job or array task, such as "CANCELLED" or "FAILED, reason NonZeroExitCode"; "" when it does not
    know any more. scontrol is asked first, sacct only where that has forgotten, and its silence means nothing."""
    named = str(job) if index is None else f"{job}_{index}"
    try:
        said = _ask(["scontrol", "show", "job", "-o", named]).stdout
        state = re.search(r"JobState=(\S+)", said)
        reason = re.search(r"Reason=(\S+)", said)
        if state:
            return state[1] + (f", reason {reason[1]}" if reason and reason[1] not in ("None", "(null)") else "")
        told = _ask(["sacct", "-n", "-X", "-P", "-j", named, "-o", "State"])
        return told.stdout.split("\n")[0].strip() if told.returncode == 0 else ""
    except SchedulerError:
        return ""


def _ask(line: Sequence[str], environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environ)
    except FileNotFoundError:
        raise SchedulerError(
            f"There is no {line[0]} on this machine, so nothing can be sent to Slurm from here. Type the same line where Slurm is (a "
            "login node), run it without --slurm, or look at the script with --dry_run."
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"Slurm's {line[0]} did not answer within {_TIMEOUT_S} s. Try the same line again later.") from None


def _refusal(stderr: str, script: Path | None) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines() if line.strip() and "--help" not in line]
    said = next((line for line in reversed(lines) if "failed:" in line), lines[-1] if lines else "no reason is given").rstrip(".")
    said = said.partition("failed:")[2].strip() or said
    where = f" The script is {script}." if script is not None else ""
    if any(words in stderr for words in _UNREACHABLE):
        return f"Slurm does not answer ({said}). Nothing is lost; try the same line again later.{where}"
    if script is None:
        return f"Slurm cannot be asked: {said}. Nothing is lost; mend that, or try the same line again later."
    if "artition" in said:
        return f"Slurm refused the job: {said}.{_partitions(stderr)} Set partition in the site file or with --slurm_set.{where}"
    hint = next((f" {text}" for words, text in _HINTS.items() if words.lower() in stderr.lower()), "")
    return f"Slurm refused the job: {said}.{hint}{where}"


def _partitions(stderr: str) -> str:
    asked = re.search(r"invalid partition specified: (\S+)", stderr)
    try:
        there = sorted(set(_ask(["sinfo", "-h", "-o", "%R"]).stdout.split()))
    except SchedulerError:
        there = []
    near = did_you_mean(asked[1], there) if asked else ""
    return near + (f" There are: {', '.join(there[:12])}." if there else "")
