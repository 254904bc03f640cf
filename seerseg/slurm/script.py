"""One job as one plain sbatch script: for Slurm to run, and for people to read and edit."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seerseg import __version__
from seerseg.errors import UsageError
from seerseg.slurm.site import Site

PART = "{part}"
"""Stands in `Job.watched` for the number of the part."""


@dataclass(frozen=True)
class Job:
    """What is to be run.

    command: program and arguments, without shares of work; parts: 1, or how many the work is shared among; last: arguments added for the
    step that follows the parts, None when there is no such step; rounds: how often parts and last step follow each other (both are then
    given --rounds); again: arguments of every start, such as "-c"; watched: files and folders that grow as work is done; working_folder:
    where the command is run; path: folder of the program, None when it is in a container; distributed: whether several processes train
    together; module: of the program, for launchers that start modules; after: a job's number, or a dependency as sbatch has it.
    """

    command: tuple[str, ...]
    working_folder: Path
    site: Site
    parts: int = 1
    last: tuple[str, ...] | None = None
    rounds: int = 1
    again: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    distributed: bool = False
    module: str = ""
    after: str = ""

    @property
    def name(self) -> str:
        """Name for Slurm and for the folder: the command's, and a digest of what it does and where. The same line is the same job."""
        said = json.dumps([str(self.working_folder), self.command, self.parts])
        return f"{self.command[0].removeprefix('seerseg_')}-{hashlib.blake2b(said.encode(), digest_size=4).hexdigest()}"

    @property
    def processes(self) -> int:
        """Of one training: as said, else one for each GPU; 1 for everything else."""
        return (self.site.processes or max(1, self.site.gpus) * self.site.nodes) if self.distributed else 1


def write_script(job: Job, folder: Path) -> str:
    """The script whose logs and markers go to `folder`. UsageError for a demand that sbatch cannot be told in a script."""
    script = folder / "job.sh"
    return "\n".join(
        [
            "#!/bin/bash",
            *_title(job, script),
            *(f"#SBATCH {option}" for option in _options(job, folder)),
            "",
            *_setup(job),
            *_work(job),
            _RUN.format(state=shlex.quote(str(folder / "state")), restarts=job.site.restarts, pass_on=_pass_on(job), lost=_lost(job)),
        ]
    )


def step_name(step: str, round_: int, part: int, rounds: int) -> str:
    """What the markers of a step are called: "part_3", "last"; with several rounds "round_2.part_3"."""
    name = f"part_{part}" if step == "part" else "last"
    return f"round_{round_}.{name}" if rounds > 1 else name


def _title(job: Job, script: Path) -> list[str]:
    what = f"{job.command[0]} by SeerSeg {__version__}"
    lines = [f"# {what}{f', in {job.parts} parts' if job.parts > 1 else ''}. Yours to edit; send it again with"]
    quoted, round_ = shlex.quote(str(script)), " part ROUND" if job.rounds > 1 else ""
    lines.append(f"#   sbatch {quoted}{round_}")
    if job.parts > 1:
        lines[-1] += "    (all parts; --array=1 before the name: that one)"
    if job.last is not None:
        last = f"{quoted} last{' ROUND' if job.rounds > 1 else ''}"
        lines.append(f"#   sbatch --array=0 --dependency=afterany:JOB {last}    (what follows the parts)")
    return lines


def _options(job: Job, folder: Path) -> list[str]:
    site, log = job.site, str(folder / "logs").replace("%", "%%")
    asked = {
        "--job-name": job.name,
        "--partition": site.partition,
        "--account": site.account,
        "--qos": site.qos,
        "--array": "" if job.parts == 1 else f"0-{job.parts - 1}" + (f"%{site.at_once}" if site.at_once else ""),
        "--nodes": str(site.nodes) if site.nodes > 1 else "",
        "--ntasks": str(job.processes) if job.processes > 1 else "1",
        "--cpus-per-task": str(site.cpus or ""),
        "--mem": site.memory,
        "--time": site.time,
        "--signal": f"B:USR1@{site.warning_s}",
        "--chdir": str(job.working_folder),
        "--output": f"{log}/part_%a.%A.log" if job.parts > 1 else f"{log}/part_0.%j.log",
    }
    lines = [f"{name}={_value(value)}" for name, value in asked.items() if value]
    lines += [site.gpu_option.format(gpus=site.gpus)] if site.gpus else []
    return [*lines, "--requeue", "--open-mode=append", *site.sbatch]


def _value(text: str) -> str:
    """A value of an #SBATCH line; sbatch takes quotation marks there, but nothing within them is masked."""
    if "\n" in text or '"' in text:
        raise UsageError(
            f"sbatch cannot be told of {text!r} in a script: it holds a quotation mark or a line break. Choose another folder."
        )
    return text if shlex.quote(text) == text or not set(text) & set(" '#\\") else f'"{text}"'


def _setup(job: Job) -> list[str]:
    lines = ["# The site: what its file says under setup, and where data and programs are."]
    lines += [*job.site.setup, "export PYTHONUNBUFFERED=1"]
    if job.site.cpus:
        lines.append('export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.environ.items())]
    if job.path is not None and not job.site.container:
        lines.append(f"export PATH={shlex.quote(str(job.path))}:$PATH")
    return [*lines, ""]


def _work(job: Job) -> list[str]:
    """The array `work` and what goes with the step: its markers' name, its share, the files that grow."""
    lines = ["# The work."]
    if job.parts > 1:
        lines = ["# The work: one part of it, or the last step that follows all parts.", "step=${1:-part} part=${SLURM_ARRAY_TASK_ID:-0}"]
    if job.rounds > 1:
        lines.append("round=${2:-1}")
    if job.distributed and job.processes > 1:
        lines += _launcher(job)
        lines.append(f"work=({_inside(job, lead=True)}{shlex.join([*job.command[1:], *job.again])})")
    else:
        lines.append(f"work=({_inside(job)}{shlex.join([*job.command, *job.again])})")
    lines.append(f"watched=({' '.join(_watched(path) for path in job.watched) or '/dev/null'})")
    if job.parts == 1:
        return [*lines, "name=part_0", "unset SEERSEG_NUM_PARTS SEERSEG_PART_ID", ""]
    prefix = ""
    if job.rounds > 1:
        prefix = "round_$round."
        lines.append('work+=(--rounds "$round")')
    last = shlex.join(job.last or ())
    return [
        *lines,
        'if [ "$step" = part ]; then',
        f"  name={prefix}part_$part",
        f"  export SEERSEG_NUM_PARTS={job.parts} SEERSEG_PART_ID=$part",
        "else",
        f"  name={prefix}last",
        "  unset SEERSEG_NUM_PARTS SEERSEG_PART_ID",
        *([f"  work+=({last})"] if last else []),
        "fi",
        "",
    ]


def _inside(job: Job, *, lead: bool = False) -> str:
    """What comes before program and arguments: the launcher of several processes and the container."""
    container = ""
    if job.site.container:
        run = job.site.container_run or ("apptainer exec --nv" if job.site.gpus else "apptainer exec")
        container = f"{run} {shlex.quote(job.site.container)} "
    if not lead:
        return container
    if job.site.launcher == "srun":
        return f'"${{launch[@]}}" {container}{job.command[0]} '
    return f'{container}"${{launch[@]}}" -m {job.module} '


def _launcher(job: Job) -> list[str]:
    """The array `launch`: processes that find each other."""
    if job.site.launcher != "srun":
        return [f"launch=({job.site.launcher.format(processes=job.processes // job.site.nodes, nodes=job.site.nodes)})"]
    return [
        "# Every process learns its number; the first node is where they meet. srun does not take --cpus-per-task over by itself.",
        "export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'launch=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}',
        "  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec \"$@\"' seerseg)",
    ]


def _pass_on(job: Job) -> str:
    """How a signal reaches the work: srun passes it on; torchrun and accelerate do not, so their processes are told."""
    if job.processes > 1 and job.site.launcher != "srun":
        return 'pkill -"$1" -P "$child"'
    return 'kill -"$1" "$child"'


def _lost(job: Job) -> str:
    """Codes, with the marks of signals behind them, that stand for 75: bash's -1 and 127; 143, as Slurm tells TERM to the work as well, and
    the second of two can meet a program that is about to leave; 1 of torchrun, whatever its processes say."""
    return "-* | 1271* | 1431*" + (" | 11 | 111" if job.processes > 1 and job.site.launcher != "srun" else "")


def _watched(path: str) -> str:
    """A shell word of a path in which PART stands for the part's number."""
    return '"$part"'.join(shlex.quote(piece) if piece else "" for piece in path.split(PART))


_RUN = """\
# Markers say how it stands: NAME.begun, NAME.ended with the exit code. They are written whole, then renamed.
state={state}
mkdir -p "$state"
mark() {{
  echo "$2 job=${{SLURM_JOB_ID:-}} host=$(hostname) restarts=${{SLURM_RESTART_COUNT:-0}} time=$(date +%s)" >"$state/.$name.$$" &&
    mv -f "$state/.$name.$$" "$state/$name.$1"
}}
progress() {{ # changes when something was done
  find "${{watched[@]}}" -type f ! -name '.tmp-*' -printf '%p %s\\n' 2>/dev/null | sort | cksum
}}
rm -f "$state/$name.ended" "$state/$name.requeued"
mark begun "start" || exit 1
before=$(progress)

# Run it. USR1 comes before the time limit: stop in order and be started again. TERM: cancelled or preempted, Slurm knows what follows.
child='' warned='' stopped='' heard=''
tell() {{ heard=1; [ -z "$child" ] || {pass_on} 2>/dev/null; }}
trap 'warned=1; tell USR1' USR1
trap 'stopped=1; tell TERM' TERM
"${{work[@]}}" &
child=$!
[ -z "$warned$stopped" ] || tell TERM
code=''
while [ -z "$code" ]; do # a signal ends the waiting, not the work
  heard=''
  wait "$child"
  code=$?
  [ -z "$heard" ] || code=''
done
case "$code$warned$stopped" in {lost}) code=75 ;; esac # ended in the moment of a signal: then its code can be lost

# Stopped (75) or killed (over 128) while the job itself goes on (it is not being cancelled): start again, unless that has brought nothing
# {restarts} times in a row. A task of an array is named, as the number of one task is that of the whole array and would start all again.
own=${{SLURM_JOB_ID:-}}
[ -z "${{SLURM_ARRAY_JOB_ID:-}}" ] || own=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if {{ [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; }} && [ -z "$stopped" ] && [ "$(squeue -h -j "$own" -o %T)" = RUNNING ]; then
  fruitless=0
  if [ "$(progress)" = "$before" ]; then
    fruitless=$(($(cat "$state/$name.fruitless" 2>/dev/null || echo 0) + 1))
  fi
  echo "$fruitless" >"$state/$name.fruitless"
  if [ "$fruitless" -lt {restarts} ]; then
    mark requeued "code=$code"
    scontrol requeue "$own" && exit "$code"
  fi
fi
mark ended "code=$code" && rm -f "$state/$name.fruitless"
exit "$code"
"""
