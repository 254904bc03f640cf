"""What the commands share: options taken as nnU-Net's users type them, faults as sentences with exit codes, progress.

nnU-Net's habits that stock click breaks on: several values after one option (`-d 4 5`, `-f 0 1 2`), long names with one
dash (`-device cuda`, `-np 2`), `_` and `-` alike (`--num_parts`, `--num-parts`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeVar

import click

from seerseg import __version__
from seerseg.errors import EXIT_REQUEUE, SeerSegError

Function = TypeVar("Function", bound=Callable[..., Any])


class Fault(click.ClickException):
    """A SeerSegError on its way to the terminal."""

    def __init__(self, error: SeerSegError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares it on the class


class Several(click.Option):
    """An option that takes one or more values after one name: `-d 4 5`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})


class Command(click.Command):
    """A command that reads nnU-Net's spelling and turns faults into sentences and exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite the arguments into click's own spelling, then parse."""
        typed = normalise(self.get_params(ctx), args, ctx)
        ctx.meta["seerseg.arguments"] = tuple(typed)  # for commands that hand their own line on
        return super().parse_args(ctx, typed)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; a SeerSegError becomes its sentence and its exit code, an interrupt the code of a run to be continued."""
        try:
            return super().invoke(ctx)
        except SeerSegError as error:
            raise Fault(error) from error
        except KeyboardInterrupt:
            click.echo("Interrupted. Run the same command again to continue.", err=True)
            raise click.exceptions.Exit(EXIT_REQUEUE) from None


def normalise(params: Iterable[click.Parameter], args: Sequence[str], ctx: click.Context | None = None) -> list[str]:
    """The arguments with every option in its first declared long spelling and every value of a `Several` named singly.

    click.NoSuchOption, with the nearest names, for an option that is not there.
    """
    options = [p for p in params if isinstance(p, click.Option)]
    by_name = {_key(name): (option, name) for option in options for name in (*option.opts, *option.secondary_opts)}
    shown = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    out: list[str] = []
    position = 0
    while position < len(args):
        token = args[position]
        position += 1
        if token == "--":
            out.extend(args[position - 1 :])
            break
        if not _is_option(token):
            out.append(token)
            continue
        spelled, equals, value = token.partition("=")
        found = by_name.get(_key(spelled))
        if found is None:
            raise click.NoSuchOption(spelled, possibilities=_near(spelled, shown), ctx=ctx)
        option, name = found
        if option.is_flag or option.count:
            out.append(name + equals + value)
        elif equals:
            out.extend((name, value))
        elif isinstance(option, Several):
            start = position
            while position < len(args) and not _is_option(args[position]):
                position += 1
            if position == start:
                raise click.BadOptionUsage(name, f"Option {name!r} requires at least one value.", ctx=ctx)
            for one in args[start:position]:
                out.extend((name, one))
        else:
            out.append(name)
            out.extend(args[position : position + option.nargs])
            position += option.nargs
    return out


def _is_option(token: str) -> bool:
    return len(token) > 1 and token.startswith("-") and not token[1].isdigit() and token != "-"


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _near(spelled: str, shown: Sequence[str]) -> list[str]:
    import difflib

    keys = {_key(name): name for name in shown}
    return [keys[k] for k in difflib.get_close_matches(_key(spelled), keys, n=3, cutoff=0.5)]


def command(name: str, *, epilog: str = "") -> Callable[[Callable[..., Any]], Command]:
    """A click command of our class, with --version and a wide help page."""

    def wrap(function: Callable[..., Any]) -> Command:
        made = click.command(
            name, cls=Command, epilog=epilog or None, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
        )(function)
        return click.version_option(__version__, prog_name="SeerSeg")(made)

    return wrap


def option(*names: str, **settings: Any) -> Callable[[Function], Function]:
    """click.option with the default shown in the help where there is one."""
    settings.setdefault("show_default", settings.get("default") not in (None, False, ()))
    return click.option(*names, **settings)


def several(*names: str, **settings: Any) -> Callable[[Function], Function]:
    """An option with one or more values after its name."""
    return click.option(*names, cls=Several, **settings)


def folder_options(*names: str) -> Callable[[Function], Function]:
    """--raw_folder, --preprocessed_folder, --results_folder (those named), each overriding its variable."""

    def wrap(function: Function) -> Function:
        for name in reversed(names):
            function = option(f"--{name}_folder", metavar="DIR", help=f"Instead of the environment variable seerseg_{name}.")(function)
        return function

    return wrap


def device_option(function: Function) -> Function:
    """-device, as nnU-Net has it."""
    return option(
        "-device", "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps. auto: the first GPU if any."
    )(function)


def licence_option(function: Function) -> Function:
    """--accept_license, wherever a segmenter is loaded; nothing remembers it but the record of the run."""
    return option("--accept_license", is_flag=True, help="You read the licence of the segmenter's weights, and it allows this use.")(
        function
    )


def json_option(function: Function) -> Function:
    """--json: one JSON document on stdout, everything else on stderr."""
    return option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, for machines.")(function)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str))


class Progress:
    """Long work shown on stderr: a bar on a terminal, otherwise a plain line at most every `every_s` seconds."""

    def __init__(self, total: int, label: str, *, every_s: float = 10.0) -> None:
        self.total, self.label, self.every_s = total, label, every_s
        self.done = 0
        self._last = time.monotonic()
        self._bar: Any = None
        if total and sys.stderr.isatty():
            self._bar = click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True, width=30)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def step(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= self.every_s or self.done == self.total:
            self._last = now
            click.echo(f"{self.label}: {self.done} of {self.total}", err=True)

    def note(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            click.echo("\r\033[K" + line, err=True)
            self._bar.render_progress()
        else:
            click.echo(line, err=True)


class LateProgress:
    """A `Progress` whose total is known with the first thing that is done: begin(total, label), then `bar`."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    @property
    def bar(self) -> Progress:
        """What was begun."""
        if self._bar is None:
            raise RuntimeError("begin() comes before the bar is used")
        return self._bar

    def begin(self, total: int, label: str) -> None:
        """Show it, the first time."""
        if self._bar is None:
            self._bar = Progress(total, label)
            self._bar.__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*exc)
