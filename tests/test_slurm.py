"""Jobs on a real slurmctld and slurmd, started here on loopback: crashes, limits, cancelling, refusals, one bank for eight, two processes.

What waits for Slurm's clock is handed in at once and looked at afterwards, so that the waits go side by side.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from prediction_cases import make_folder, snapshot
from slurm_cluster import cluster, daemon, program, restart

from seerseg.cli.predict import predict
from seerseg.errors import OutputError, SchedulerError
from seerseg.prediction.ledger import read_ledger
from seerseg.skills.store import BankFolder
from seerseg.slurm import Job, JobFolder, Site, Standing, judge, sentences
from seerseg.slurm.queue import fate

BIN = Path(sys.executable).parent
SMALL = Site(memory="300M", time="5")

CRASH = """\
echo begun
[ "$SEERSEG_PART_ID" != 2 ] || [ -e crashed ] || { touch crashed; kill -9 $PPID $$; }
[ "$SEERSEG_PART_ID" != 3 ] || [ -e killed ] || { touch killed; kill -9 $$; }
echo "$SEERSEG_PART_ID" >>"out.$SEERSEG_PART_ID"
"""
LONG = """\
trap 'echo "stopped after $n"; exit 75' USR1 TERM
n=$(cat steps 2>/dev/null || echo 0)
while [ "$n" -lt 400 ]; do
  sleep 0.1
  n=$((n + 1)); echo "$n" >steps; echo x >>grown
  [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ "$n" -lt 20 ] || exit 0
done
"""
BANK = f"""\
exec {shlex.quote(str(BIN / "seerseg_bank"))} add bank --tag SIDE_RESOLVE --when "side $SEERSEG_PART_ID" --what "answer left lung" \\
  --word "phrase $SEERSEG_PART_ID" --target "left lung"
"""
LIMITS = f"""\
{shlex.quote(sys.executable)} -c 'from seerseg.planning import hardware; m = hardware(); print(m.cpus, m.ram_bytes >> 20)'
echo "threads $OMP_NUM_THREADS"
"""
RANKS = 'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK here, at $MASTER_ADDR:$MASTER_PORT, with $SLURM_CPUS_PER_TASK"\n'


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with cluster() as folder:
        yield folder


def make(folder: Path, text: str, **settings: object) -> JobFolder:
    """A job whose command is a bash program."""
    settings = {"site": SMALL, **settings}
    job = Job(("worker",), folder, path=program(folder / "bin", text), **settings)  # type: ignore[arg-type]
    return JobFolder(job, folder / "jobs")


def end(made: JobFolder, limit_s: float = 90) -> dict[str, Standing]:
    def watch(found: object) -> None:
        assert time.monotonic() < until, "the job does not end"

    until = time.monotonic() + limit_s
    return {s.name: s for s in made.wait(watch, first_s=0.3)}


def log(made: JobFolder) -> str:
    return "".join(p.read_text() for p in sorted((made.folder / "logs").iterdir()))


def until(true: Callable[[], bool], limit_s: float = 60) -> None:
    stop = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < stop, "it does not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def early(slurm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobFolder]:
    """Jobs that take as long as Slurm's clock does."""
    root = tmp_path_factory.mktemp("early")
    site = Site(memory="300M", time="1", warning_s=55)
    made = {
        "limit": make(root / "a limit", LONG, site=site, watched=("grown",)),
        "fruitless": make(root / "fruitless", "exit 75\n", site=Site(memory="300M", time="5", restarts=2)),
        "crash": make(root / "crash", CRASH, parts=4, last=("--last",), watched=("out.{part}",)),
    }
    for job in made.values():
        job.submit()
    return made


# ---------------------------------------------------------------------------------------------------------------------- refusals


def test_a_wrong_partition_is_told_with_those_that_are_there(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "exit 0\n", site=Site(partition="gpus"))
    with pytest.raises(SchedulerError) as told:
        made.submit()
    said = str(told.value)
    assert "Slurm refused the job: Invalid partition name specified. Did you mean gpu? There are: gpu, short." in said
    assert str(made.script) in said
    assert "\n" not in said
    assert made.script.exists()


@pytest.mark.parametrize(
    ("site", "parts", "words"),
    [
        (Site(memory="900G"), 1, "lower gpus, cpus or memory"),
        (Site(gpus=9), 1, "lower gpus"),
        (Site(), 5000, "fewer parts (--num_parts)"),
        (Site(sbatch=("--no-such-option",)), 1, "unrecognized option '--no-such-option'"),
    ],
)
def test_a_demand_that_cannot_be_met_is_told_at_once(slurm: Path, tmp_path: Path, site: Site, parts: int, words: str) -> None:
    with pytest.raises(SchedulerError) as told:
        make(tmp_path, "exit 0\n", site=site, parts=parts).submit()
    assert words in str(told.value)


def test_a_full_quota_of_jobs_is_told_and_nothing_is_lost(slurm: Path, tmp_path: Path) -> None:
    """A cluster with a limit, as its own accounting would enforce it, played by an sbatch that answers so."""
    made = make(tmp_path, "exit 0\n")
    refuses = 'echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; echo "sbatch: error: Batch job submission failed: Job violates ' \
        'accounting/QOS policy (job submit limit, user\'s size and/or time limits)" >&2; exit 1\n'  # fmt: skip
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{program(tmp_path / 'sbin', refuses, 'sbatch')}:{before}"
    try:
        with pytest.raises(SchedulerError, match=r"Job violates accounting/QOS policy.*wait for other jobs"):
            made.submit()
    finally:
        os.environ["PATH"] = before
    assert not made.record.exists()
    made.submit()
    assert {s.state for s in end(made).values()} == {"done"}
    os.environ["PATH"] = f"{tmp_path / 'sbin'}:{before}"
    try:
        with pytest.raises(SchedulerError):
            made.submit()
    finally:
        os.environ["PATH"] = before
    assert made.standings(())[0].state == "done"


def test_a_folder_that_cannot_be_written(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "exit 0\n")
    (tmp_path / "jobs").write_text("a file")
    with pytest.raises(OutputError, match=r"Cannot make .*: Not a directory. Name another folder with --job_folder"):
        made.submit()


def test_without_accounting_nothing_is_missed(slurm: Path) -> None:
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode == 1
    assert fate(999_999, None) == ""


# --------------------------------------------------------------------------------------------------------------- parts and what came


def test_prediction_in_parts_of_which_one_never_began(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As typed: two parts, the node fails one of them before it begins; the same line does that one alone."""
    make_folder(tmp_path, 5)
    monkeypatch.chdir(tmp_path)
    plain = ("-i", "images", "--segmenter", "scripted:script.json", "--reasoner", "verbatim", "-device", "cpu", "--prompt", "liver")
    fails = 'setup = ["[ \\"${SLURM_ARRAY_TASK_ID:-}${1:-}\\" != 1 ] || [ -e failed ] || { touch failed; kill -9 $$; }"]'
    (tmp_path / "site.toml").write_text(f'memory = "600M"\ntime = "10"\n{fails}\n')
    line = [*plain, "-o", "out", "--num_parts", "2", "--slurm", "--wait", "--site", "site.toml", "--json"]
    first = CliRunner().invoke(predict, line, catch_exceptions=False)
    assert first.exit_code == 3, first.output
    assert "part_1 never ran (Slurm says FAILED" in first.stderr
    steps = {s["step"]: (s["state"], s["code"]) for s in json.loads(first.stdout)["steps"]}
    assert steps == {"part_0": ("done", 0), "part_1": ("never", None), "last": ("failed", 3)}
    last = next((tmp_path / "seerseg_jobs").glob("*/logs/last.*.log")).read_text()
    assert "Never begun: part 1\nMissing: case1 (part 1)\nMissing: case3 (part 1)\n5 cases: 3 done, 0 failed, 2 missing." in last

    second = CliRunner().invoke(predict, line, catch_exceptions=False)
    assert second.exit_code == 0, second.output
    assert "1 of 2 parts" in second.stderr
    entries = [e.case for n in range(2) for e in read_ledger(tmp_path / "out" / f"ledger.{n}.jsonl")[0]]
    assert sorted(entries) == [f"case{n}" for n in range(5)]
    assert {e.case for e in read_ledger(tmp_path / "out" / "ledger.jsonl")[0]} == set(entries)
    undisturbed = CliRunner().invoke(predict, [*plain, "-o", "whole"], catch_exceptions=False)
    assert undisturbed.exit_code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_crash_in_one_part_is_found_and_that_part_alone_is_done_again(early: dict[str, JobFolder], tmp_path: Path) -> None:
    made = early["crash"]
    found = end(made)
    assert {n: s.state for n, s in found.items()} == {
        "part_0": "done", "part_1": "done", "part_2": "killed", "part_3": "done", "last": "done"
    }  # fmt: skip
    assert "part_2 was killed before it could say how it ended (Slurm says" in sentences(list(found.values()), tmp_path)[0]
    assert made.script.parent.joinpath("state", "part_3.ended").read_text().startswith("code=0")
    (made.state / "last.ended").write_text("code=3\n")  # as a last step that misses something ends
    sent = made.submit()
    assert [(s.step, s.parts) for s in sent] == [("part", (2,)), ("last", ())]
    assert {s.state for s in end(made).values()} == {"done"}
    folder = made.job.working_folder
    assert [(folder / f"out.{n}").read_text() for n in range(4)] == [f"{n}\n" for n in range(4)]


def test_eight_parts_write_one_bank(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, BANK, parts=8)
    made.submit()
    assert {s.state for s in end(made).values()} == {"done"}, log(made)
    bank = BankFolder(tmp_path / "bank")
    bank.fold()
    assert sorted(s.words[0] for s in bank.skills().values()) == [f"phrase {n}" for n in range(8)]


# --------------------------------------------------------------------------------------------------------- cancelled, never, refused


def test_a_cancelled_job_stops_in_order_and_stays_stopped(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, LONG, watched=("grown",))
    number = made.submit()[0].id
    until(lambda: (tmp_path / "grown").exists())
    assert [(q.job, q.state) for q in made.active()] == [(number, "RUNNING")]
    assert made.standings(made.active())[0].state == "running"
    subprocess.run(["scancel", str(number)], check=True)
    found = end(made)["part_0"]
    assert (found.state, found.code) == ("stopped", 75)
    assert "stopped after" in log(made)
    assert judge([found]) == 75


def test_what_waits_for_a_job_that_failed_never_runs(slurm: Path, tmp_path: Path) -> None:
    failing = make(tmp_path / "first", "exit 1\n")
    number = failing.submit()[0].id
    made = make(tmp_path / "second", "touch ran\n", after=str(number), parts=2, last=())
    made.submit()
    found = end(made)
    assert end(failing)["part_0"] == Standing("part_0", "failed", 1)
    assert {s.state for s in found.values()} == {"never"}
    assert "never ran (Slurm says CANCELLED" in sentences(list(found.values()), tmp_path)[0]
    assert judge(list(found.values())) == 1
    assert not (tmp_path / "second" / "ran").exists()


def test_a_second_hand_in_of_a_job_that_waits_is_seen(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "exit 0\n", site=Site(memory="300M", sbatch=("--hold",)))
    number = made.submit()[0].id
    (waiting,) = made.active()
    assert (waiting.job, waiting.held) == (number, True)
    assert made.standings([waiting])[0].why == waiting.reason
    subprocess.run(["scancel", str(number)], check=True)
    assert end(made)["part_0"].state == "never"


# ---------------------------------------------------------------------------------------------------------------- limits, processes


def test_the_limits_of_the_job_are_what_is_planned_with(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, LIMITS, site=Site(memory="700M", cpus=2))
    made.submit()
    assert end(made)["part_0"].state == "done", log(made)
    assert log(made) == f"{min(2, os.cpu_count() or 1)} 700\nthreads 2\n"


def test_processes_of_a_training_find_each_other(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, RANKS, site=Site(memory="300M", cpus=3, processes=2), distributed=True)
    number = made.submit()[0].id
    assert end(made)["part_0"].state == "done", log(made)
    lines = sorted(log(made).splitlines())
    node = subprocess.run(["sinfo", "-h", "-o", "%n"], capture_output=True, text=True, check=True).stdout.strip()
    assert lines == [f"{n} of 2, {n} here, at {node}:{20000 + number % 20000}, with 3" for n in range(2)]


# ------------------------------------------------------------------------------------------------------------------ what takes long


def test_a_time_limit_is_met_in_order_and_the_work_goes_on(early: dict[str, JobFolder]) -> None:
    made = early["limit"]
    assert end(made)["part_0"] == Standing("part_0", "done", 0), log(made)
    said = log(made)
    stopped = int(said.split("stopped after ")[1].split()[0])
    folder = made.job.working_folder
    assert 0 < stopped < 400
    assert int((folder / "steps").read_text()) == (folder / "grown").read_text().count("x") == max(20, stopped + 1)
    assert "restarts=1" in (made.state / "part_0.ended").read_text()


def test_starts_that_bring_nothing_come_to_an_end(early: dict[str, JobFolder]) -> None:
    made = early["fruitless"]
    assert end(made)["part_0"] == Standing("part_0", "stopped", 75)
    assert "restarts=1" in (made.state / "part_0.ended").read_text()


def test_a_controller_that_restarts_is_waited_for(slurm: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "sleep 2\n")
    made.submit()
    until(lambda: made.standings(made.active())[0].state == "running")
    time.sleep(1.0)  # the controller saves what it knows lazily
    os.kill(daemon(slurm, "slurmctld"), 9)
    restart(slurm)
    assert end(made)["part_0"].state == "done"
