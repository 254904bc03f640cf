"""seerseg_convert_weights: an original MedSAM2 checkpoint becomes a folder of safetensors that the medsam2 segmenter opens by itself."""

from __future__ import annotations

import click

from seerseg.cli.options import command, json_option, option, print_json


@command("seerseg_convert_weights", epilog="Example: seerseg_convert_weights MedSAM2_latest.pt -o models/medsam2")
@click.argument("checkpoint", required=True)
@option("-o", "--output", metavar="DIR", required=True, help="Folder to be made; give it to --segmenter afterwards.")
@option("--config", metavar="FILE", help="config.json of transformers' Sam2VideoModel, for a checkpoint that is not MedSAM2's.")
@json_option
def convert_weights(checkpoint: str, output: str, config: str | None, as_json: bool) -> None:
    """Convert CHECKPOINT, an original SAM2 or MedSAM2 .pt file, to a transformers folder.

    Nothing in the file is run and nothing is downloaded; every tensor must be known and of the right shape.
    """
    from seerseg.segmenters.sam2_weights import convert_checkpoint

    folder = convert_checkpoint(checkpoint, output, config=config)
    if as_json:
        print_json({"folder": str(folder), "kind": "medsam2_segmenter"})
    else:
        click.echo(f"{folder}: written. Use it with --segmenter {folder}.")
