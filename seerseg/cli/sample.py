"""seerseg_sample: a small dataset to try things on."""

from __future__ import annotations

import click

from seerseg.cli.options import command, folder_options, json_option, option, print_json


@command("seerseg_sample", epilog="Example: seerseg_sample ct_chest -o raw")
@click.argument("name", required=False)
@option("-o", "--output", metavar="DIR", help="Where the dataset folder is made. Default: the raw folder.")
@option("-n", "--count", type=click.IntRange(1), default=4, help="How many phantoms.")
@option("--seed", type=int, default=0, help="First seed of the phantoms.")
@folder_options("raw")
@json_option
def sample(name: str | None, output: str | None, count: int, seed: int, raw_folder: str | None, as_json: bool) -> None:
    """Make a small dataset in the raw layout: a real CT that a package carries, or phantoms. Without NAME, list them."""
    from pathlib import Path

    from seerseg.paths import raw_folder as find_raw
    from seerseg_data.samples import SAMPLES, make_sample

    if name is None:
        if as_json:
            print_json(SAMPLES)
        else:
            for known, what in SAMPLES.items():
                click.echo(f"{known:10} {what}")
        return
    made = make_sample(name, Path(output) if output else find_raw(raw_folder), count=count, seed=seed)
    if as_json:
        print_json({"dataset": str(made)})
    else:
        click.echo(f"Made {made}")
