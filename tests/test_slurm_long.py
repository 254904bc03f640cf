"""Long work on a real Slurm: 64 cases through kills and a reboot, two processes that train, evolution and preprocessing in parts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training_cases as tc
from click.testing import CliRunner, Result
from prediction_cases import make_folder, run_command, snapshot
from slurm_cluster import cluster, daemon, restart

from seerseg.cli.evolve import evolve
from seerseg.cli.plan_and_preprocess import plan_and_preprocess
from seerseg.cli.predict import predict
from seerseg.cli.train import train
from seerseg.prediction.ledger import read_ledger
from seerseg.skills.store import BankFolder
from seerseg.training.runs import RunFolder

pytestmark = pytest.mark.slow
PROMPTS = ("--prompt", "liver", "--prompt", "left kidney")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with cluster() as folder:
        yield folder


def typed(command: Any, line: list[str], env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(command, line, env=env, catch_exceptions=False)


def works(*, batch: bool = False) -> list[int]:
    """Processes of parts: the work itself, or the batch scripts above it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"SLURM_JOB_ID=" in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes()
                if b"slurm_script" in line if batch else b"seerseg_predict" in line:
                    found.append(int(entry.name))
    return found


def running(*, batch: bool = False) -> list[int]:
    """As `works`, once there are some: one part may have just ended while the next begins."""
    stop = time.monotonic() + 300
    while not (found := works(batch=batch)):
        assert time.monotonic() < stop
        time.sleep(0.02)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reboot(folder: Path) -> int:
    """What a power cut does to a node: its daemon and every process of every job are gone. Then it comes back."""
    lost = works()
    steps = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/comm") if _is_step(p)]
    os.kill(daemon(folder, "slurmd"), signal.SIGKILL)
    kill([*steps, *works(batch=True), *works()])
    time.sleep(1.0)
    restart(folder)
    return len(lost)


def _is_step(comm: Path) -> bool:
    try:
        return comm.read_text().startswith("slurmstepd")
    except OSError:
        return False


def lines_of(output: Path, parts: int) -> list[str]:
    return [e.case for n in range(parts) if (output / f"ledger.{n}.jsonl").exists() for e in read_ledger(output / f"ledger.{n}.jsonl")[0]]


@pytest.mark.timeout(1800)
def test_64_cases_through_three_kills_and_a_reboot(slurm: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, 64, shape_xyz=(72, 64, 60))
    began = time.monotonic()
    whole = run_command(tmp_path / "images", tmp_path / "undisturbed", tmp_path / "script.json", *PROMPTS)
    assert whole.returncode == 0, whole.stderr
    alone_s = time.monotonic() - began
    rng = random.Random(int(os.environ.get("REACH_SEED", "7")))
    (tmp_path / "site.toml").write_text(f'memory = "600M"\ntime = "30"\njobs = "{tmp_path / "jobs"}"\n')
    line = [
        "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out"), "--segmenter", f"scripted:{tmp_path / 'script.json'}", "--reasoner",
        "verbatim", "-device", "cpu", *PROMPTS, "--num_parts", "8", "--slurm", "--site", str(tmp_path / "site.toml"),
    ]  # fmt: skip
    began = time.monotonic()
    assert typed(predict, line).exit_code == 0
    moments: list[tuple[str, int]] = []  # what was killed; how many cases were done then, or how many tasks it hit

    def after(cases: int) -> None:
        stop = time.monotonic() + 300
        while len(lines_of(tmp_path / "out", 8)) < cases or not works():
            assert time.monotonic() < stop
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))

    for what, cases in (("work", rng.randrange(2, 8)), ("job", rng.randrange(9, 16)), ("reboot", rng.randrange(18, 28)), ("work", 32)):
        after(cases)
        moments.append((what, len(lines_of(tmp_path / "out", 8))))
        if what == "reboot":
            moments.append(("lost by it", reboot(slurm)))
        elif what == "job":
            kill([rng.choice(running(batch=True))])
        else:
            kill([rng.choice(running())])
    codes = []
    for _ in range(4):
        done = typed(predict, [*line, "--wait"])
        codes.append(done.exit_code)
        if done.exit_code == 0:
            break
    total_s = time.monotonic() - began
    lines = Counter(lines_of(tmp_path / "out", 8))
    report = {"moments": moments, "codes": codes, "cases": len(lines), "lines": sum(lines.values())}
    report |= {"undisturbed_s": round(alone_s, 1), "disturbed_s": round(total_s, 1)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert codes[-1] == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")
    assert len(lines) == 64
    assert sum(lines.values()) == 64


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    return tc.make(tmp_path_factory.mktemp("toy"))


def site(folder: Path, **values: Any) -> Path:
    path = folder / "site.json"
    path.write_text(json.dumps({"time": "20", "jobs": str(folder / "jobs"), **values}))
    return path


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("launcher", ["srun", "torchrun --nproc_per_node {processes} --master_port 29411"])
def test_a_training_of_two_processes_is_warned_and_goes_on(slurm: Path, toy: tc.Toy, tmp_path: Path, launcher: str) -> None:
    tiny = tc.tiny_reasoner(toy.root / f"tiny_{launcher.split()[0]}")
    more = ("--steps", "12", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=1", "--lr", "1e-3", "--micro_batch", "1")
    path = site(tmp_path, processes=2, launcher=launcher, memory="6G", cpus=1)
    env = {**toy.env, "PYTHONWARNINGS": "ignore"}
    sent = typed(train, [*tc.command(toy, tiny, *more), "--slurm", "--site", str(path)], env)
    assert sent.exit_code == 0, sent.output
    stop = time.monotonic() + 600
    while not any(p.read_text().count("\n") > 1 for p in (toy.root / "results").glob(f"*/*__{tiny.name}__*/fold_0/sft/metrics.jsonl")):
        assert time.monotonic() < stop, "".join(p.read_text()[-3000:] for p in (tmp_path / "jobs").glob("*/logs/*"))
        time.sleep(0.3)
    number = sent.stdout.strip()
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)  # what comes before a time limit
    done = typed(train, [*tc.command(toy, tiny, *more), "--slurm", "--site", str(path), "--wait"], env)
    log = next((tmp_path / "jobs").glob("*/logs/*")).read_text()
    assert done.exit_code == 0, log[-3000:]
    assert "Stopped by SIGUSR1 at step" in log
    assert "Done at step 12 of 12" in log
    assert "restarts=1" in next((tmp_path / "jobs").glob("*/state/part_0.ended")).read_text()
    settings = json.loads(RunFolder(tc.run_folder(toy, tiny), "sft").settings.read_text())
    assert settings["processes"] == 2


def test_two_rounds_of_evolution_in_parts(slurm: Path, toy: tc.Toy, tmp_path: Path) -> None:
    plain = ["7", "0", "--segmenter", toy.segmenter, "--rounds", "2", "--per_round", "12", "-device", "cpu"]
    line = [*plain, "-o", str(tmp_path / "bank"), "--num_parts", "2", "--slurm", "--wait", "--site", str(site(tmp_path, memory="1500M"))]
    done = typed(evolve, line, toy.env)
    assert done.exit_code == 0, done.output
    assert typed(evolve, [*plain, "-o", str(tmp_path / "alone")], toy.env).exit_code == 0
    parts, alone = BankFolder(tmp_path / "bank"), BankFolder(tmp_path / "alone")
    assert [h.message for h in parts.history()] == ["round 1", "round 2"]
    assert parts.skills().keys() == alone.skills().keys()
    assert (tmp_path / "bank" / "memo_part1.jsonl").stat().st_size > 0


def test_preprocessing_in_parts_comes_to_the_same(slurm: Path, toy: tc.Toy, tmp_path: Path) -> None:
    env = {**toy.env, "seerseg_preprocessed": str(tmp_path / "parts")}
    line = ["-d", "7", "-np", "1", "--num_parts", "3", "--slurm", "--wait", "--site", str(site(tmp_path, memory="1G"))]
    done = typed(plan_and_preprocess, line, env)
    assert done.exit_code == 0, done.output
    made, before = tmp_path / "parts" / tc.NAME, toy.preprocessed
    for name in ("fingerprint.json", "splits.json"):  # plans.json also holds what the job may use
        assert (made / name).read_bytes() == (before / name).read_bytes()
    assert sorted(p.name for p in (made / "cases").iterdir()) == sorted(p.name for p in (before / "cases").iterdir())
    last = next((tmp_path / "jobs").glob("*/logs/last.*")).read_text()
    assert "0 cases preprocessed, 8 were up to date, 0 failed" in last
