"""What this process may use: processors, memory, GPUs, time. Asked of the process's own limits, not of the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
_MEMORY_UNITS = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Gpu:
    """compute_capability: (major, minor), (0, 0) when unknown."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Hardware:
    """cpus, ram_bytes: what this process may use, and which limit said so; job_end: seconds since the epoch, when the
    Slurm job ends, None outside one."""

    cpus: int
    ram_bytes: int
    gpus: tuple[Gpu, ...] = ()
    cpus_from: str = ""
    ram_from: str = ""
    job_end: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def hardware(
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    affinity: int | None = None,
    ask_gpus: Callable[[], str] | None = None,
) -> Hardware:
    """The smallest of all limits that apply: CPU affinity, cgroup (v1 and v2), Slurm's variables, the machine.

    The arguments stand in for os.environ, the root of /proc and /sys, the affinity's size and nvidia-smi's answer.
    """
    environ = os.environ if environ is None else environ
    cpus, cpus_from = _cpus(environ, root, affinity)
    ram, ram_from = _ram(environ, root, cpus)
    end = environ.get("SLURM_JOB_END_TIME", "")
    return Hardware(
        cpus=cpus,
        ram_bytes=ram,
        gpus=_gpus((ask_gpus or _ask_nvidia_smi)(), environ),
        cpus_from=cpus_from,
        ram_from=ram_from,
        job_end=int(end) if end.isdigit() else None,
    )


def _cpus(environ: Mapping[str, str], root: Path, affinity: int | None) -> tuple[int, str]:
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [(float(affinity), "CPU affinity")]
    limits += [(quota, "cgroup CPU quota") for quota in _cgroup_cpus(root)]
    slurm = _slurm_cpus(environ)
    if slurm is not None:
        limits.append(slurm)
    count, origin = min(limits, key=lambda limit: limit[0])
    return max(1, int(count)), origin


def _slurm_cpus(environ: Mapping[str, str]) -> tuple[float, str] | None:
    """Per task where Slurm says so, else on this node ("16(x2),8" lists nodes in SLURM_JOB_CPUS_PER_NODE)."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE"):
        found = re.match(r"\s*(\d+)", environ.get(name, ""))
        if found and int(found[1]) > 0:
            return float(found[1]), name
    return None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup folder and its ancestors, nearest first: v2's, then v1's of `controller`.

    Inside a container the namespace hides the path's head, so the mount's own root is always looked at.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders: list[Path] = []
    for line in lines:
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        base = mount / controller if names else mount
        here = base / path.strip("/")
        while here != base and base in here.parents:
            folders.append(here)
            here = here.parent
    return [*folders, mount, mount / controller]


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _cgroup_cpus(root: Path) -> list[float]:
    limits = []
    for folder in _cgroup_folders(root, "cpu"):
        try:
            quota, period = (float(v) for v in (folder / "cpu.max").read_text(encoding="utf-8").split()[:2])  # v2; "max" is no number
        except (OSError, ValueError):
            quota, period = _number(folder / "cpu.cfs_quota_us") or -1.0, _number(folder / "cpu.cfs_period_us") or 0.0  # v1; -1 is none
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return limits


def _ram(environ: Mapping[str, str], root: Path, cpus: int) -> tuple[int, str]:
    limits: list[tuple[int, str]] = []
    try:
        meminfo = (root / "proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        meminfo = ""
    total = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
    if total:
        limits.append((int(total[1]) * 1024, "memory of the machine"))
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            value = _number(folder / name)
            if value is not None and 0 < value < 1 << 60:  # v1 writes "no limit" as nearly 2 ** 63
                limits.append((int(value), f"cgroup {name}"))
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    shares = {"SLURM_MEM_PER_NODE": 1, "SLURM_MEM_PER_CPU": cpus, "SLURM_MEM_PER_GPU": int(gpus) if gpus.isdigit() else 1}
    for name, count in shares.items():
        found = re.fullmatch(r"\s*(\d+)([KMGT]?)B?\s*", environ.get(name, ""), re.IGNORECASE)
        if found and int(found[1]) > 0:
            limits.append(((int(found[1]) << _MEMORY_UNITS[found[2].upper()]) * count, name))
    return min(limits) if limits else (4 << 30, "no limit found, 4 GiB assumed")


def _ask_nvidia_smi() -> str:
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return ""
    try:
        return subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpus(answer: str, environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """GPUs of nvidia-smi's answer ("name, MiB, major.minor" a line) that CUDA_VISIBLE_DEVICES lets through.

    Unlike CUDA, nvidia-smi knows nothing of that variable. UUIDs in it cannot be matched, so their number counts.
    """
    gpus = []
    for line in answer.splitlines():
        found = re.fullmatch(r"\s*(.+?)\s*,\s*(\d+)\s*(?:,\s*(\d+)\.(\d+))?.*", line)
        if found:
            gpus.append(Gpu(found[1], int(found[2]) << 20, (int(found[3] or 0), int(found[4] or 0))))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for number, name in enumerate(part.strip() for part in visible.split(",")):
        if name.isdigit() and int(name) < len(gpus):
            chosen.append(gpus[int(name)])
        elif name.startswith(("GPU-", "MIG-")) and number < len(gpus):
            chosen.append(gpus[number])
        else:
            break  # as CUDA does: an invalid entry hides itself and all that follow
    return tuple(chosen)
