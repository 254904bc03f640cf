"""seerseg_plan_and_preprocess against nnU-Net's, on the same dataset with the same number of workers, one after the other.

    python scripts/bench_preprocess.py --raw FOLDER --nnunet_python PYTHON [--workers 2] [--rounds 1]

FOLDER is a raw dataset in nnU-Net's layout; PYTHON the interpreter of an environment with nnunetv2. Prints wall time, CPU time of
all processes (those that the commands leave behind included), and peak memory summed over the processes: RSS, which counts
shared pages once per process, and PSS, which counts them once. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

NAME = "Dataset004_Bench"
PR_SET_CHILD_SUBREAPER = 36


class Memory(threading.Thread):
    """Peak RSS and PSS in MB over all descendants of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.rss_mb = self.pss_mb = 0.0

    def run(self) -> None:
        while not self.over.wait(0.25):
            rss = pss = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    info = process.memory_full_info()
                except psutil.Error:
                    continue
                rss, pss = rss + info.rss, pss + info.pss
            self.rss_mb, self.pss_mb = max(self.rss_mb, rss / 1e6), max(self.pss_mb, pss / 1e6)


def measure(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command; seconds of it and of every process it starts, however it was started."""
    memory = Memory()
    memory.start()
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
        cpu_s, code, wall_s = 0.0, None, 0.0
        while True:  # processes that outlive the command come to this one, which asked for orphans
            try:
                pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                break
            cpu_s += usage.ru_utime + usage.ru_stime
            if pid == process.pid:
                code, wall_s = os.waitstatus_to_exitcode(status), time.perf_counter() - began
                process.returncode = code
        memory.over.set()
        memory.join()
        if code != 0:
            log.seek(0)
            sys.exit(f"{' '.join(command)} ended with code {code}:\n{log.read()[-3000:]}")
    return {"wall s": wall_s, "CPU s": cpu_s, "peak RSS MB": memory.rss_mb, "peak PSS MB": memory.pss_mb}


def folder_size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--nnunet_python", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("This system cannot hand orphaned processes to this one, so their time would be missed.")
    count = str(options.workers)
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            (root / "raw" / NAME).mkdir(parents=True)
            for item in options.raw.iterdir():
                (root / "raw" / NAME / item.name).symlink_to(item.resolve())
            cases = json.loads((options.raw / "dataset.json").read_text())["numTraining"]
            folders = {part: str(root / part) for part in ("raw", "preprocessed", "results")}
            theirs = options.nnunet_python.parent / "nnUNetv2_plan_and_preprocess"
            nnunet = measure(
                [str(theirs), "-d", "4", "-c", "3d_fullres", "-np", count, "-npfp", count],
                {f"nnUNet_{part}": folder.replace("preprocessed", "nnunet") for part, folder in folders.items()},
            )
            ours = Path(sys.executable).parent / "seerseg_plan_and_preprocess"
            environment = {f"seerseg_{part}": folder for part, folder in folders.items()}
            seerseg = measure([str(ours), "-d", "4", "-np", count], environment)
            again = measure([str(ours), "-d", "4", "-np", count], environment)
            nnunet["on disk MB"] = folder_size_mb(root / "nnunet")
            seerseg["on disk MB"] = again["on disk MB"] = folder_size_mb(root / "preprocessed")
        print(f"{cases} cases, {count} workers, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
        print(f"{'':14s}{'nnU-Net':>10s}{'SeerSeg':>10s}{'ratio':>8s}{'SeerSeg again':>16s}")
        for what, value in nnunet.items():
            print(f"{what:14s}{value:10.1f}{seerseg[what]:10.1f}{value / seerseg[what]:8.1f}{again[what]:16.1f}", flush=True)


if __name__ == "__main__":
    main()
