"""seerseg_make_requests: clinician-like wordings for every target of raw datasets, beside their dataset.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Progress, command, folder_options, json_option, option, print_json, several

if TYPE_CHECKING:
    from seerseg_data.requests.files import Written

_SHOWN = 5


@command("seerseg_make_requests", epilog="Exit code 3 when some cases have no usable label map; the rest is written.")
@several("-d", "--dataset", "datasets", required=True, metavar="ID ...", help="Datasets, by number or full name: -d 4 5.")
@option("--per_target", type=click.IntRange(1, 500), metavar="K", help="Wordings of each target of each case. Default: the plan, else 16.")
@several("--styles", metavar="STYLE ...", help="Styles of a paraphrase set, in order. Default: the plan, else all of them.")
@option("--absent_per_case", type=click.IntRange(0, 100), metavar="N", help="Requests for what is not in the scan. Default: 4.")
@option("--unions", is_flag=True, help="Also ask for wholes of several labels: both lungs, the whole hippocampus.")
@several(
    "-f", "--folds", type=click.IntRange(0), metavar="FOLD ...", help="Folds whose validation cases get validation language. Default: 0."
)
@option("--language", type=click.Choice(["train", "val", "test"]), help="One language for all cases, instead of that of their split.")
@option("--seed", type=int, default=0, help="Equal seeds give equal requests.")
@option("--writer", metavar="MODEL", help="Have a language model rewrite them: a folder, a .gguf file, or the URL of an endpoint.")
@option("--writer_model", metavar="NAME", help="The model's name at the endpoint.")
@option("--writer_key_variable", default="SEERSEG_WRITER_KEY", metavar="NAME", help="Environment variable that holds the endpoint's key.")
@option("--writer_share", type=click.FloatRange(0, 1), default=0.5, help="Share of the requests that are offered to the writer.")
@option("-p", "--plans_name", default="plans", metavar="NAME", help="Name of the plans file, without .json.")
@option(
    "-np", "--num_processes", "processes", type=click.IntRange(1), metavar="N", help="Processes that read label maps. Default: all CPUs."
)
@option("--overwrite", is_flag=True, help="Replace a requests.jsonl that was written or edited by hand; it is kept as .bak.")
@folder_options("raw", "preprocessed")
@json_option
def make_requests(
    datasets: tuple[str, ...],
    per_target: int | None,
    styles: tuple[str, ...],
    absent_per_case: int | None,
    unions: bool,
    folds: tuple[int, ...],
    language: str | None,
    seed: int,
    writer: str | None,
    writer_model: str | None,
    writer_key_variable: str,
    writer_share: float,
    plans_name: str,
    processes: int | None,
    overwrite: bool,
    raw_folder: str | None,
    preprocessed_folder: str | None,
    as_json: bool,
) -> None:
    """Make requests.jsonl for raw datasets: many wordings for every target of every case, in many styles.

    Training and bank cases are asked in training language, validation and test cases in their own: templates, synonyms and
    misspellings of one never occur in another. requests_card.md tells what was made.
    """
    from seerseg import __version__
    from seerseg.paths import raw_folder as raw_root
    from seerseg.paths import resolve_dataset
    from seerseg_data.requests.card import write_card
    from seerseg_data.requests.files import open_labelled, plans_of, splits_of, write_dataset_requests
    from seerseg_data.requests.generate import Settings

    root = raw_root(raw_folder)
    names = list(dict.fromkeys(resolve_dataset(identifier, root) for identifier in datasets))
    rewriter = _rewriter(writer, writer_model, writer_key_variable, writer_share, seed) if writer else None
    done: list[dict[str, Any]] = []
    results: list[Written] = []
    for name in names:
        dataset = open_labelled(root / name)
        planned = _preprocessed(preprocessed_folder, name)
        settings = Settings.from_plans(
            plans_of(planned, plans_name),
            per_target=per_target,
            styles=styles or None,
            absent_per_case=absent_per_case,
            unions=unions,
            folds=folds or None,
            language=language,
        )
        splits = splits_of(dataset, planned)
        with Progress(len(dataset.cases) + len(dataset.test_cases), f"{name}: reading label maps") as progress:
            written = write_dataset_requests(
                dataset,
                splits=splits,
                settings=settings,
                seed=seed,
                overwrite=overwrite,
                workers=processes or _cpus(),
                progress=progress.step,
                rewrite=rewriter.rewrite if rewriter is not None else None,
            )
        card = write_card(written, made_by=f"SeerSeg {__version__}", rewriting=rewriter.told() if rewriter is not None else None)
        results.append(written)
        done.append({"dataset": name, "path": str(written.path), "card": card})
        if not as_json:
            _tell(name, written, card)
    if as_json:
        print_json({"schema": 1, "datasets": done})
    _end(results)


def _preprocessed(override: str | None, name: str) -> Path | None:
    from seerseg.errors import FolderError
    from seerseg.paths import preprocessed_folder

    try:
        return preprocessed_folder(override) / name
    except FolderError:
        return None  # nothing is planned yet: the splits are those that planning will make


def _cpus() -> int:
    from seerseg.planning import hardware

    return max(1, hardware().cpus)


def _rewriter(source: str, model: str | None, key_variable: str, share: float, seed: int) -> Any:
    from seerseg_data.requests.writer import Rewriter, load_writer

    return Rewriter(load_writer(source, model=model, key_variable=key_variable), share=share, seed=seed)


def _tell(name: str, written: Written, card: dict[str, Any]) -> None:
    counts = card["counts"]
    languages = ", ".join(f"{n} in {split} language" for split, n in counts["by_language"].items())
    click.echo(
        f"{name}: {counts['requests']} requests for {counts['cases']} cases ({languages}); {counts['absent']} for what is not there. "
        f"Written to {written.path}"
    )
    if written.backup is not None:
        click.echo(f"  The file that was there is kept as {written.backup}", err=True)
    if card["rewriting"]:
        told = card["rewriting"]
        click.echo(f"  Rewritten by {told['writer']}: {told['kept']} kept, {told['refused']} refused.")
    for note in written.report.notes:
        click.echo(f"  {note}", err=True)


def _end(results: list[Written]) -> None:
    from seerseg.errors import SomeCasesFailedError

    faults = [sentence for written in results for sentence in written.report.faults.values()]
    if faults:
        more = f" ({len(faults) - 1} more cases failed.)" if len(faults) > 1 else ""
        raise SomeCasesFailedError(f"{faults[0]}{more} The requests of the other cases are written.")
