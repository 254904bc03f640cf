"""seerseg_export: a trained model as one zip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from seerseg.cli.options import command, folder_options, json_option, option, print_json


@command(
    "seerseg_export",
    epilog="Examples: seerseg_export -d 4 -f 0 | seerseg_export -m results/my_model -o my_model.zip --include_base. "
    "Exit codes: 0 written, or there already with the same bytes; 1 no whole model, or a base that may not be passed on; 2 misuse.",
)
@option("-d", "--dataset", metavar="ID", help="Dataset whose trained model is packed, with -f.")
@option("-f", "--fold", type=int, metavar="FOLD", help="Fold of the trained model. Default with -d: 0.")
@option("-m", "--model_folder", metavar="DIR", help="A model folder.")
@option("-p", "--plans", metavar="NAME", help="Plans of the trained model, where there are several.")
@option("--protocol", metavar="NAME", help="Its protocol, where there are several.")
@option("--reasoner", metavar="NAME", help="Its reasoner, where there are several.")
@option("--segmenter", metavar="NAME", help="Its segmenter, where there are several.")
@option("-o", "--output", metavar="FILE.zip", help="What to write. Default: named after dataset, run and fold, here.")
@option("--include_base", is_flag=True, help="Pack the models that it stands on, where their licence lets anybody pass them on.")
@option("--may_pass_on", is_flag=True, help="With --include_base: you may pass on models of other or unknown licences, and say so.")
@option("--overwrite", is_flag=True, help="Write over another file of that name.")
@folder_options("results")
@json_option
def export(**given: Any) -> None:
    """Pack a trained model with its hashes, versions and licences, to be installed on another machine with seerseg_install."""
    from seerseg.errors import UsageError
    from seerseg.exchange import export_model, export_name

    if given["may_pass_on"] and not given["include_base"]:
        raise UsageError("--may_pass_on says that base models may be packed; it goes with --include_base.")
    folder = model_folder(given)
    made = export_model(
        folder,
        Path(given["output"] or export_name(folder)).expanduser(),
        include_base=given["include_base"],
        may_pass_on=given["may_pass_on"],
        overwrite=given["overwrite"],
    )
    if given["as_json"]:
        print_json({"path": str(made.path), "size": made.size, "left_out": made.left_out, "already": made.already, **made.record.to_json()})
        return
    for line in made.left_out:
        click.echo(f"Left out: {line}", err=True)
    count = len(made.record.files)
    was = "is there already, the same byte for byte" if made.already else "is written"
    click.echo(f"{made.path} {was}: {count} files, {made.size / 2**20:.1f} MiB.")
    for base in made.record.bases:
        click.echo(f"  {base.role} {base.name}: {_said(base)}")
    click.echo(f"Install it on another machine with: seerseg_install {made.path.name}")


def model_folder(given: dict[str, Any]) -> Path:
    """The folder that -m, or -d and -f, mean."""
    from seerseg.errors import UsageError
    from seerseg.model import find_run
    from seerseg.paths import results_folder

    if bool(given["model_folder"]) == bool(given["dataset"]):
        raise UsageError("Give a model folder with -m, or a dataset with -d and a fold with -f.")
    if given["model_folder"]:
        return Path(given["model_folder"]).expanduser()
    hints = {part: given.get(part) for part in ("protocol", "reasoner", "segmenter")}
    return find_run(results_folder(given["results_folder"]), given["dataset"], given["fold"] or 0, plans=given["plans"], hints=hints)


def _said(base: Any) -> str:
    licence = f"licence {base.licence}" if base.licence else "of no stated licence"
    if base.state == "shipped":
        return f"comes with SeerSeg ({licence})"
    if base.state == "rules":
        return "has no weights"
    if base.state == "package":
        return "comes with a package of its own"
    if base.included or base.state == "own":
        return f"packed ({licence})"
    return f"not packed ({licence}); where it is needed, copy it to {base.place} in the installed model"


if __name__ == "__main__":
    export()
