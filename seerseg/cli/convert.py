"""seerseg_convert: a public dataset in its own layout becomes a raw dataset."""

from __future__ import annotations

from typing import Any

import click

from seerseg.cli.options import Progress, command, folder_options, json_option, option, print_json


@command("seerseg_convert", epilog="Example: seerseg_convert kits23 -i kits23/dataset -d 23 -np 4")
@click.argument("name", required=False)
@option("-i", "--input", "source", metavar="DIR", help="The dataset as published, unpacked. Nothing is downloaded.")
@option("-d", "--dataset", metavar="ID_OR_NAME", help="Number or full name (Dataset023_KiTS23) of the raw dataset to be made.")
@option("-np", "--num_processes", type=click.IntRange(1), default=1, help="Cases at a time.")
@option("--list", "listing", is_flag=True, help="What each converter expects, its licence and its home.")
@folder_options("raw")
@json_option
def convert(
    name: str | None, source: str | None, dataset: str | None, num_processes: int, listing: bool, raw_folder: str | None, as_json: bool
) -> None:
    """Convert the published dataset NAME from its official folder layout to the raw layout.

    Run it again to continue a run that was stopped, or after the source changed: what is done is not done again.
    """
    from seerseg.errors import SomeCasesFailedError, UsageError
    from seerseg_data.converters import CONVERTERS, load_converter

    if listing or name is None:
        chosen = [load_converter(name)] if name else [made() for _, made in sorted(CONVERTERS.items())]
        _list(chosen, as_json)
        return
    converter = load_converter(name)
    if source is None or dataset is None:
        lacking = "-i, the folder of the dataset as published" if source is None else "-d, the number or name of the dataset to be made"
        raise UsageError(f"seerseg_convert {converter.name} needs {lacking}.")
    report = _run(converter, source, dataset, num_processes, raw_folder)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(
            f"{report.folder}: {len(report.done)} cases converted, {len(report.skipped)} were done before, {report.requests} requests."
        )
        if report.unresolved:
            click.echo(f"Not in the vocabulary, kept as named: {', '.join(report.unresolved)}.")
        kinds: dict[str, int] = {}
        for notes in report.notes.values():
            for note in notes:
                kinds[note] = kinds.get(note, 0) + 1
        for note, count in sorted(kinds.items(), key=lambda item: -item[1])[:10]:
            click.echo(f"Note ({count} case{'s' * (count > 1)}): {note}.")
    if report.failed:
        first = next(iter(report.failed))
        raise SomeCasesFailedError(
            f"{len(report.failed)} of {len(report.failed) + len(report.done) + len(report.skipped)} cases failed, the others are written. "
            f"The first: {report.failed[first]}"
        )


def _run(converter: Any, source: str, dataset: str, workers: int, raw: str | None) -> Any:
    from pathlib import Path

    from seerseg.errors import InterruptedRunError
    from seerseg.paths import raw_folder as find_raw
    from seerseg.prediction.stopping import StopOnSignals
    from seerseg_data.converters import Outcome
    from seerseg_data.converters import convert as run

    bar: list[Progress] = []
    with StopOnSignals() as stop:

        def progress(done: int, total: int, outcome: Outcome) -> None:
            if not bar:
                bar.append(Progress(total, converter.name).__enter__())
            if outcome.status == "failed":
                bar[0].note(outcome.message)
            bar[0].step()
            if stop() and done < total:
                raise InterruptedRunError(
                    f"Stopped by {stop.received} after {done} of {total} cases. Run the same command again to continue."
                )

        try:
            return run(converter, Path(source), dataset, find_raw(raw), workers=workers, progress=progress)
        finally:
            if bar:
                bar[0].__exit__(None, None, None)


def _list(converters: list[Any], as_json: bool) -> None:
    import textwrap

    if as_json:
        keys = ("title", "dataset_name", "licence", "home")
        print_json({c.name: {**{k: getattr(c, k) for k in keys}, "layout": textwrap.dedent(c.layout).strip()} for c in converters})
        return
    for c in converters:
        click.echo(f"{c.name}: {c.title}\n  licence: {c.licence}\n  home: {c.home}\n  expects:")
        click.echo(textwrap.indent(textwrap.dedent(c.layout).strip("\n").rstrip(), "    ") + "\n")
