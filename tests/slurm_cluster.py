"""A private Slurm for tests, and small programs to run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "slurm"


@contextmanager
def cluster(cpus: int = 16) -> Iterator[Path]:
    """Its folder; SLURM_CONF is set while it runs. Skips, with Slurm's or the shell's own reason, where there can be none."""
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: a socket lies in it
    settings = {**os.environ, "CLUSTER_CPUS": str(cpus)}
    line = ["bash", str(SCRIPTS / "start.sh"), str(folder), str(os.getpid())]
    try:
        made = subprocess.run(line, capture_output=True, text=True, env=settings, timeout=60, check=False)
        if made.returncode:
            pytest.skip(f"no Slurm: {made.stderr.strip()[-300:] or made.returncode}")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        if (folder / "slurm.conf").exists():
            subprocess.run(["bash", str(SCRIPTS / "stop.sh"), str(folder), "--purge"], timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def restart(folder: Path) -> None:
    """Start again what of the cluster does not run."""
    subprocess.run(["bash", str(SCRIPTS / "start.sh"), str(folder)], capture_output=True, timeout=60, check=True)


def daemon(folder: Path, name: str) -> int:
    """The process number of slurmd, slurmctld or munged."""
    return int((folder / "run" / f"{name}.pid").read_text())


def program(folder: Path, text: str, name: str = "worker") -> Path:
    """A bash program of that name; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return folder
