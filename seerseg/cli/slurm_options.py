"""--slurm and what belongs to it: the same command line, handed to Slurm instead of being run here."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Function, Progress, option, print_json

if TYPE_CHECKING:
    from seerseg.slurm import Job, JobFolder, Standing

_EXPORTED = ("seerseg_raw", "seerseg_preprocessed", "seerseg_results", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE")
_OWN = ("slurm", "dry_run", "wait", "site", "slurm_sets", "after", "job_folder")
_SHARES = ("num_parts", "part_id")


def slurm_options(
    module: str,
    *,
    last: Sequence[str] | None = None,
    rounds: str | None = None,
    again: Sequence[str] = (),
    refused: Sequence[str] = ("overwrite", "clean"),
    watched: Callable[[dict[str, Any]], Sequence[str | Path]] = lambda given: (),
    distributed: bool = False,
    interrupts: bool = True,
) -> Callable[[Function], Function]:
    """The options, and what --slurm does. To stand next to the function, under all other options.

    module: that holds the command; last: arguments of the step that follows the parts; rounds: the option that counts rounds of parts
    and last step; again: arguments of every start; refused: flags that would begin anew at every start; watched: files that grow as work
    is done (`seerseg.slurm.PART` for the part); distributed: several processes may work together; interrupts: SIGTERM and SIGUSR1 are to
    act as Ctrl-C does, as the function has no way of its own to stop in order.
    """

    settings = {"last": last, "rounds": rounds, "again": again, "refused": refused, "distributed": distributed, "module": module}

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            own = {name: given.pop(name) for name in _OWN}
            if own["slurm"]:
                return _to_slurm(own, given, watched, settings)
            _check_alone(own)
            with _stopping() if interrupts else contextlib.nullcontext():
                return function(*args, **given)

        made: Any = run
        shares = last is not None
        for decorate in reversed(
            _options("hand this line to Slurm; --num_parts N becomes an array of N." if shares else "hand this line to Slurm.")
        ):
            made = decorate(made)
        return made

    return wrap


def _options(what: str) -> list[Callable[[Function], Function]]:
    return [
        option("--slurm", is_flag=True, help=f"Slurm: {what}"),
        option("--dry_run", is_flag=True, help="Slurm: print the script, hand in nothing."),
        option("--wait", is_flag=True, help="Slurm: stay until the job has ended, with its exit code."),
        option("--site", metavar="FILE", help="Slurm: partition, memory, time ... Default: the file named by seerseg_site."),
        click.option("--slurm_set", "slurm_sets", multiple=True, metavar="NAME=VALUE", help="Slurm: a value of the site file; repeatable."),
        option("--after", metavar="JOB", help="Slurm: begin when that job has ended well (afterany:JOB: however it ended)."),
        option(
            "--job_folder",
            metavar="DIR",
            help="Slurm: where scripts, logs and markers go. Default: the site's, else seerseg_jobs.",
        ),
    ]


def _check_alone(own: dict[str, Any]) -> None:
    from seerseg.errors import UsageError

    for name, value in own.items():
        if value not in (None, False, ()):
            spelled = "slurm_set" if name == "slurm_sets" else name
            raise UsageError(f"--{spelled} belongs to --slurm. Add --slurm to hand the work to Slurm, or leave --{spelled} out.")


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGUSR1 interrupt, as Ctrl-C does: exit code 75."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_slurm(
    own: dict[str, Any], given: dict[str, Any], watched: Callable[[dict[str, Any]], Sequence[str | Path]], settings: dict[str, Any]
) -> None:
    from seerseg.errors import SchedulerError, UsageError
    from seerseg.slurm import JobFolder, write_script

    for name in settings["refused"]:
        if given.get(name):
            raise UsageError(
                f"--{name} cannot go to Slurm: a job that is started again would begin anew each time. Remove what is there first, then "
                f"type the line without --{name}."
            )
    job = _job(own, given, watched(given), settings)
    jobs = Path(own["job_folder"] or job.site.jobs).expanduser().absolute()
    made = JobFolder(job, jobs)
    if own["dry_run"]:
        click.echo(write_script(job, made.folder), nl=False)
        return
    active = made.active()
    if active:
        click.echo(f"{job.name} is with Slurm already (job {active[0].job}); nothing was handed in.", err=True)
        number = active[-1].job
    else:
        sent = made.submit()
        number = sent[-1].id
        for one in sent:
            what = "the last step" if one.step == "last" else f"{len(one.parts)} of {job.parts} parts" if job.parts > 1 else "all of it"
            click.echo(f"Job {one.id}: {what}{f', round {one.round}' if job.rounds > 1 else ''}", err=True)
        click.echo(f"Script, logs and markers: {made.folder}", err=True)
    if not own["wait"]:
        _say(made, given, number)
        return
    try:
        found = _wait(made)
    except SchedulerError as error:
        raise SchedulerError(f"{error} The job goes on without this command; the same line looks after it again.") from None
    _end(made, given, number, found)


def _job(own: dict[str, Any], given: dict[str, Any], watched: Sequence[str | Path], settings: dict[str, Any]) -> Job:
    from seerseg.errors import UsageError
    from seerseg.slurm import Job, load_site

    context = click.get_current_context()
    if "part_id" in given and context.get_parameter_source("part_id") is click.core.ParameterSource.COMMANDLINE:
        raise UsageError("--part_id is for one part run here; --slurm hands in all parts, and later those of them that are missing.")
    name = str(context.command.name)
    parts = given.get("num_parts", 1)
    count = int(given[settings["rounds"]]) if settings["rounds"] and parts > 1 else 1
    left_out = {*_OWN, *_SHARES, "as_json", *([settings["rounds"]] if count > 1 else [])}
    site = load_site(own["site"], name.removeprefix("seerseg_"), own["slurm_sets"])
    return Job(
        command=(name, *_without(context, left_out)),
        working_folder=Path.cwd(),
        site=site,
        parts=parts,
        last=tuple(word.format(parts=parts) for word in settings["last"]) if settings["last"] is not None and parts > 1 else None,
        rounds=count,
        again=tuple(word for word in settings["again"] if not given.get("resume")),
        watched=tuple(str(path) for path in watched),
        environ={variable: os.environ[variable] for variable in _EXPORTED if os.environ.get(variable)},
        path=None if site.container else _program_folder(name),
        distributed=settings["distributed"],
        module=settings["module"],
        after=own["after"] or "",
    )


def _program_folder(name: str) -> Path:
    """Where the program of that name lies: beside this Python, else where the shell finds it."""
    from seerseg.errors import UsageError

    beside = Path(sys.executable).parent
    if os.access(beside / name, os.X_OK):
        return beside
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is not installed beside {sys.executable}, so no job could start it. Install it, or name a container.")
    return Path(found).parent.absolute()


def _without(context: click.Context, left_out: set[str]) -> list[str]:
    """The arguments as they were typed, in the spelling of `normalise`, without some options."""
    options = {n: p for p in context.command.params if isinstance(p, click.Option) for n in (*p.opts, *p.secondary_opts)}
    typed: list[str] = list(context.meta["seerseg.arguments"])
    kept: list[str] = []
    while typed:
        token = typed.pop(0)
        if token == "--":
            return [*kept, token, *typed]
        found = options.get(token.partition("=")[0])
        words = [token, *(typed.pop(0) for _ in range(0 if found is None or found.is_flag else found.nargs))]
        if found is None or found.name not in left_out:
            kept += words
    return kept


def _wait(made: JobFolder) -> list[Standing]:
    steps = made.standings(())
    held: set[str] = set()
    with Progress(len(steps), "Steps ended") as bar:

        def report(found: Sequence[Standing]) -> None:
            ended = sum(s.code is not None for s in found)
            if ended > bar.done:
                bar.step(ended - bar.done)
            for one in found:
                if one.state == "waiting" and one.why and one.name not in held:
                    held.add(one.name)
                    bar.note(f"{one.name} waits for a person: {one.why}. scontrol release or scancel ends that.")

        return made.wait(report)


def _say(made: JobFolder, given: dict[str, Any], number: int) -> None:
    """The number that another job's --after takes, alone on stdout."""
    if given.get("as_json"):
        print_json({"schema": 1, "job": number, "name": made.job.name, "folder": str(made.folder), "script": str(made.script)})
    else:
        click.echo(str(number))


def _end(made: JobFolder, given: dict[str, Any], number: int, found: Sequence[Standing]) -> None:
    from seerseg.slurm import judge, sentences

    code = judge(found)
    said = sentences(found, made.folder / "logs")
    for line in said:
        click.echo(line, err=True)
    if code:
        click.echo(f"{made.job.name} ended with code {code}. The same line hands in again what is missing.", err=True)
    if given.get("as_json"):
        steps = [{"step": s.name, "state": s.state, "code": s.code, "slurm": s.why} for s in found]
        print_json({"schema": 1, "job": number, "name": made.job.name, "folder": str(made.folder), "exit_code": code, "steps": steps})
    elif not code:
        click.echo(f"{made.job.name} is done: {len(found)} step{'s' * (len(found) > 1)}.", err=True)
    raise click.exceptions.Exit(code)
