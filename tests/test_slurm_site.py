"""The site file, and scripts as text and as plain bash: no Slurm is needed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from slurm_cluster import program

from seerseg.cli.evaluate import evaluate
from seerseg.cli.predict import predict
from seerseg.errors import UsageError
from seerseg.slurm import Job, Site, Standing, judge, load_site, sentences, write_script
from seerseg.slurm.jobs import ranges
from seerseg.slurm.site import time_s

TOML = """\
partition = "gpu"
account = "radiology"
gpus = 1
memory = "32G"
time = "12:00:00"
setup = ["module load apptainer"]
sbatch = ["--constraint=a100"]

[train]
gpus = 4
time = "2-00:00:00"

[predict]
at_once = 4
"""


def write(folder: Path, text: str, name: str = "site.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


# -------------------------------------------------------------------------------------------------------------------- site file


def test_a_command_has_its_own_values(tmp_path: Path) -> None:
    path = write(tmp_path, TOML)
    trained, predicted = load_site(path, "train"), load_site(path, "predict", ["time=1:00:00", "setup=module load cuda"])
    assert (trained.gpus, trained.time_s, trained.partition, trained.at_once) == (4, 172800, "gpu", 0)
    assert (predicted.gpus, predicted.time_s, predicted.at_once) == (1, 3600, 4)
    assert predicted.setup == ("module load cuda",)
    assert predicted.sbatch == ("--constraint=a100",)


def test_json_and_the_variable(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"partition": "cpu", "evaluate": {"cpus": 8}}), "site.json")
    assert load_site(None, "evaluate", environ={"seerseg_site": str(path)}) == Site(partition="cpu", cpus=8)
    assert load_site(None, "evaluate", environ={}) == Site()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('partitoin = "gpu"', ("'partitoin'", "Did you mean partition")),
        ('[perdict]\ngpus = 1', ("[perdict]", "Did you mean predict")),
        ('gpus = "one"', ("gpus must be a whole number from 0 up", "'one'")),
        ("gpus = true", ("gpus must be a whole number",)),
        ("nodes = 0", ("nodes must be a whole number from 1 up",)),
        ('time = "two hours"', ("time must be a time as Slurm writes it",)),
        ('time = "0"', ("time must be",)),
        ('memory = "32 GB"', ("memory must be a number with K, M, G or T",)),
        ('memory = 32', ("memory must be text in quotation marks",)),
        ('setup = "module load x"', ("setup must be a list of lines",)),
        ('setup = ["a\\nb"]', ("setup must be a list of lines",)),
        ('partition = "a\\nb"', ("partition must be one line",)),
        ('sbatch = ["constraint=a100"]', ("sbatch must be a list of options",)),
        ('gpu_option = "--gres=gpu:1"', ("gpu_option must be an option of sbatch with {gpus}",)),
        ('time = "3"\nwarning_s = 180', ("The warning of 180 s leaves nothing of the time limit 3",)),
        ("partition = gpu", ("is no TOML",)),
    ],
)  # fmt: skip
def test_a_wrong_site_file_is_one_sentence(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as told:
        load_site(path, "predict")
    for word in (*words, "site.toml"):
        assert word in str(told.value)
    assert "\n" not in str(told.value)


def test_a_site_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read the site file"):
        load_site(tmp_path / "none.toml", "predict")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_site(tmp_path / "bytes.toml", "predict")
    with pytest.raises(UsageError, match="is no NAME=VALUE"):
        load_site(None, "predict", ["time"], {})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("2-01:00:05", 176405)],
)
def test_times_as_slurm_writes_them(text: str, seconds: int) -> None:
    assert time_s(text) == seconds


@given(st.sets(st.integers(0, 300), min_size=1))
def test_parts_are_listed_as_slurm_reads_them(numbers: set[int]) -> None:
    read: list[int] = []
    for piece in ranges(sorted(numbers)).split(","):
        first, _, last = piece.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


# ----------------------------------------------------------------------------------------------------------------------- script


def job(folder: Path, *command: str, **settings: object) -> Job:
    made = Job(command=command or ("worker", "left lung", "it's"), working_folder=folder, site=Site(), path=folder / "bin")
    return replace(made, **settings)  # type: ignore[arg-type]


SHAPES: list[dict[str, object]] = [
    {},
    {"parts": 8, "last": ("--merge_parts", "8"), "watched": ("out dir/ledger.{part}.jsonl",)},
    {"parts": 2, "last": (), "rounds": 3},
    {"distributed": True, "site": Site(gpus=4, cpus=6), "again": ("-c",)},
    {"distributed": True, "site": Site(gpus=4, nodes=2, launcher="torchrun --nproc_per_node {processes}"), "module": "seerseg.cli.train"},
    {"site": Site(container="/images/see rseg.sif", gpus=1, setup=("module load x",), sbatch=("--constraint=a100",), restarts=0)},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scripts_are_bash_that_shellcheck_likes(tmp_path: Path, shape: dict[str, object]) -> None:
    path = write(tmp_path, write_script(job(tmp_path / "a folder", **shape), tmp_path / "jobs"), "job.sh")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    assert len(path.read_text().splitlines()) < 90


def test_demands_stand_in_the_head(tmp_path: Path) -> None:
    site = Site(partition="gpu", account="me", qos="q", time="2:00:00", memory="8G", cpus=4, gpus=2, at_once=3, sbatch=("--nice=5",))
    text = write_script(job(Path("/data/my study"), site=site, parts=8, last=()), tmp_path)
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for demand in (
        "--partition=gpu", "--account=me", "--qos=q", "--time=2:00:00", "--mem=8G", "--cpus-per-task=4", "--gres=gpu:2", "--array=0-7%3",
        "--nice=5", '--chdir="/data/my study"', "--requeue", "--signal=B:USR1@180", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {demand}" in head
    with pytest.raises(UsageError, match="quotation mark"):
        write_script(job(Path('/data/my "study"')), tmp_path)


def start(tmp_path: Path, made: Job, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The script as plain bash, with a `scontrol` that only notes that it was asked, and a `squeue` that says $STATE."""
    program(tmp_path / "bin", f'echo "$@" >>{shlex.quote(str(tmp_path / "scontrol.log"))}; exit 1\n', "scontrol")
    program(tmp_path / "bin", "echo ${STATE:-RUNNING}\n", "squeue")
    path = write(tmp_path, write_script(made, tmp_path / "jobs"), "job.sh")
    environ = {**os.environ, "SLURM_JOB_ID": "77", **more}
    return subprocess.Popen(["bash", str(path), *arguments], env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True)


def marker(tmp_path: Path, name: str) -> str:
    path = tmp_path / "jobs" / "state" / name
    return path.read_text().split()[0] if path.exists() else ""


def test_a_part_gets_our_variables_and_the_last_step_its_words(tmp_path: Path) -> None:
    program(tmp_path / "bin", 'echo "$SEERSEG_PART_ID of $SEERSEG_NUM_PARTS:" "$@"; printf "<%s>" "$@"\n')
    made = job(tmp_path, parts=8, last=("--merge", "it's"), rounds=2)
    said, _ = start(tmp_path, made, "part", "2", SLURM_ARRAY_TASK_ID="5").communicate(timeout=20)
    assert said == "5 of 8: left lung it's --rounds 2\n<left lung><it's><--rounds><2>"
    assert marker(tmp_path, "round_2.part_5.ended") == "code=0"
    stale = {"SLURM_ARRAY_TASK_ID": "0", "SEERSEG_PART_ID": "9", "SEERSEG_NUM_PARTS": "9"}
    said, _ = start(tmp_path, made, "last", "2", **stale).communicate(timeout=20)
    assert said.startswith(" of : left lung it's --rounds 2 --merge it's\n")
    assert marker(tmp_path, "round_2.last.ended") == "code=0"


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_the_code_of_the_work_is_the_code_of_the_script(tmp_path: Path, code: int) -> None:
    program(tmp_path / "bin", f"exit {code}\n")
    process = start(tmp_path, job(tmp_path))
    process.communicate(timeout=20)
    assert process.returncode == code
    assert marker(tmp_path, "part_0.ended") == f"code={code}"
    assert not (tmp_path / "scontrol.log").exists()


def test_a_warning_reaches_the_work_and_it_is_asked_for_again(tmp_path: Path) -> None:
    program(tmp_path / "bin", 'trap "echo drained; exit 75" USR1\ntouch up\nwhile :; do sleep 0.05; done\n')
    process = start(tmp_path, job(tmp_path))
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=20)
    assert said == "drained\n"
    assert process.returncode == 75
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert marker(tmp_path, "part_0.requeued") == "code=75"
    assert marker(tmp_path, "part_0.ended") == "code=75"  # as this scontrol refused


def test_under_torchrun_the_processes_are_told_and_its_code_is_read(tmp_path: Path) -> None:
    work = 'trap "echo drained; exit 75" USR1; touch up; while :; do sleep 0.05; done'
    program(tmp_path / "bin", f"echo \"$@\"; bash -c '{work}' & wait $! || exit 1\n", "torchrun")
    site = Site(processes=2, launcher="torchrun --nproc_per_node {processes}")
    process = start(tmp_path, job(tmp_path, "worker", "4", site=site, distributed=True, module="pack.work", again=("-c",)))
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=20)
    assert said == "--nproc_per_node 2 -m pack.work 4 -c\ndrained\n"
    assert process.returncode == 75
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_a_job_that_is_being_cancelled_while_the_work_ends_by_itself(tmp_path: Path) -> None:
    program(tmp_path / "bin", "exit 75\n")
    start(tmp_path, job(tmp_path), STATE="COMPLETING").communicate(timeout=20)
    assert not (tmp_path / "scontrol.log").exists()
    start(tmp_path, job(tmp_path), SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3").communicate(timeout=20)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 70_3\n"


@pytest.mark.parametrize("leaves", ["exit 75", "trap - TERM; kill -TERM $$"], ids=["in order", "told twice"])
def test_a_cancelled_job_is_not_asked_for_again(tmp_path: Path, leaves: str) -> None:
    program(tmp_path / "bin", f"trap '{leaves}' TERM\ntouch up\nwhile :; do sleep 0.05; done\n")
    process = start(tmp_path, job(tmp_path))
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert not (tmp_path / "scontrol.log").exists()


def test_starts_that_bring_nothing_are_counted(tmp_path: Path) -> None:
    program(tmp_path / "bin", 'echo x >>"$1"; kill -9 $$\n')
    state = tmp_path / "jobs" / "state"
    idle = job(tmp_path, "worker", "elsewhere", watched=("out",), site=Site(restarts=2))
    busy = job(tmp_path, "worker", "out", watched=("out",), site=Site(restarts=2))
    for made, asked in ((busy, 1), (busy, 2), (idle, 3), (busy, 4), (idle, 5)):
        start(tmp_path, made).communicate(timeout=20)
        assert (tmp_path / "scontrol.log").read_text().count("requeue") == asked
        assert marker(tmp_path, "part_0.ended") == "code=137"
    (state / "part_0.fruitless").write_text("1\n")  # as it stands after one such start that Slurm repeated
    start(tmp_path, idle).communicate(timeout=20)
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 5


def test_a_container_stands_before_the_program(tmp_path: Path) -> None:
    program(tmp_path / "bin", 'echo "container: $*"; shift 3; exec "$@"\n', "apptainer")
    program(tmp_path / "bin", 'echo "work: $*"\n')
    made = job(tmp_path, site=Site(container="/images/x.sif", gpus=1))
    process = start(tmp_path, made, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    said, _ = process.communicate(timeout=20)
    assert said == "container: exec --nv /images/x.sif worker left lung it's\nwork: left lung it's\n"


# --------------------------------------------------------------------------------------------------------------------- judgement


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ("done:0 done:0 done:0", 0),
        ("done:0 failed:3 failed:3", 3),
        ("done:0 killed done:0", 0),  # the last step has the word: it looked at what is there
        ("done:0 killed never", 3),
        ("killed never never", 1),
        ("stopped:75 stopped:75 stopped:75", 1),
        ("stopped:75", 75),
        ("failed:1", 1),
        ("never", 1),
    ],
)
def test_how_a_job_is_judged(states: str, code: int) -> None:
    found = [
        Standing(f"part_{n}", s.partition(":")[0], int(s.partition(":")[2]) if ":" in s else None)  # type: ignore[arg-type]
        for n, s in enumerate(states.split())
    ]
    assert judge(found) == code
    assert len(sentences(found, Path("logs"))) == sum(not s.startswith("done") for s in states.split())


# ------------------------------------------------------------------------------------------------------------------ command line


def typed(*arguments: str, code: int, env: dict[str, str] | None = None, command: object = predict) -> str:
    done = CliRunner().invoke(command, [*arguments], env=env, catch_exceptions=False)  # type: ignore[arg-type]
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def test_a_dry_run_prints_the_script_and_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    line = ("-i", "scans", "-o", "out", "--prompt", "it's the --slurm option", "-device", "cpu", "--num-parts", "4", "--slurm", "--dry-run")
    said = typed(*line, "--json", "--slurm_set", "time=1:00:00", code=0, env={"seerseg_raw": "/data/raw set"})
    assert "work=(seerseg_predict -i scans -o out --prompt 'it'\"'\"'s the --slurm option' --device cpu)" in said
    assert "#SBATCH --array=0-3" in said
    assert "export seerseg_raw='/data/raw set'" in said
    assert "  work+=(--merge_parts 4)" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scans"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--wait",), "--wait belongs to --slurm"),
        (("--slurm_set", "time=1"), "--slurm_set belongs to --slurm"),
        (("--slurm", "--overwrite"), "--overwrite cannot go to Slurm"),
        (("--slurm", "--part_id", "1"), "--part_id is for one part"),
        (("--slurm", "--slurm_set", "tmie=1"), "Did you mean time?"),
        (("--slurm", "--requests", "none.jsonl"), "There is no none.jsonl, so nothing was handed to Slurm"),
    ],
)
def test_misuse_is_a_sentence(tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    assert words in typed("-i", str(tmp_path), "-o", str(tmp_path / "out"), "--prompt", "liver", *more, code=2)
    assert not (tmp_path / "out").exists()


def test_no_slurm_on_the_machine(tmp_path: Path) -> None:
    line = ("-i", str(tmp_path), "-o", str(tmp_path / "out"), "--prompt", "liver", "--slurm", "--job_folder", str(tmp_path / "jobs"))
    said = typed(*line, code=1, env={"PATH": str(tmp_path)})
    assert "There is no squeue on this machine" in said
    assert "--dry_run" in said
    said = typed(*line, "--dry_run", code=0, env={"PATH": str(tmp_path)})
    assert said.startswith("#!/bin/bash")
    assert "--num_parts" not in typed("--help", code=0, command=evaluate)
