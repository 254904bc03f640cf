"""seerseg_install: a packed model put into place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from seerseg.cli.options import command, folder_options, json_option, option, print_json


@command(
    "seerseg_install",
    epilog="Examples: seerseg_install Dataset004_Hippocampus__plans__seer__nano__nano__fold_0.zip | "
    "seerseg_install model.zip -o models/mine. Exit codes: 0 installed, or there already with the same files; 1 the zip is damaged or no "
    "model; 2 misuse, or something else is there.",
)
@click.argument("archive", metavar="FILE.zip")
@option("-o", "--output", metavar="DIR", help="The model folder to make. Default: where it belongs below the results folder.")
@option("--max_size", type=click.FloatRange(0, min_open=True), default=200.0, metavar="GB", help="The most that may be unpacked.")
@folder_options("results")
@json_option
def install(archive: str, **given: Any) -> None:
    """Check a model that seerseg_export packed, wholly and before anything is written, and put it into place; nothing in it is run."""
    import os

    from seerseg.exchange import install_model, look
    from seerseg.paths import RESULTS_VARIABLE, results_folder

    target = Path(given["output"]) if given["output"] else None
    told = given["results_folder"] or os.environ.get(RESULTS_VARIABLE, "").strip()
    results = results_folder(given["results_folder"]) if target is None and told else None
    made = install_model(Path(archive).expanduser(), results=results, target=target, most_bytes=int(given["max_size"] * 2**30))
    lacking = [part for part in look(made.folder) if part.state != "ok"]
    if given["as_json"]:
        needs = [{"name": p.name, "state": p.state, "value": p.value, "remedy": p.remedy} for p in lacking]
        print_json({"folder": str(made.folder), "already": made.already, "needs": needs, "record": made.record.to_json()})
        return
    was = "was installed before, file by file the same" if made.already else "is installed"
    click.echo(f"The model {was}: {made.folder}")
    for part in lacking:
        click.echo(f"{'Missing' if part.state == 'problem' else 'Note'}: {part.name}: {part.value}. {part.remedy}".rstrip())
    record = made.record
    by_name = target is None and record.dataset is not None
    which = f"-d {record.dataset} -f {record.fold}" if by_name else f"-m {made.folder}"
    click.echo(f"Predict with it: seerseg_predict {which} -i IMAGES -o OUTPUT --prompt TEXT")


if __name__ == "__main__":
    install()
