"""seerseg_evaluate: predictions against references."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Progress, command, folder_options, json_option, option, print_json, several
from seerseg.cli.slurm_options import slurm_options
from seerseg.errors import DatasetError, RequestError, SomeCasesFailedError, UsageError, did_you_mean

if TYPE_CHECKING:
    from seerseg.dataset import RawDataset
    from seerseg.evaluation import Evaluation, References
    from seerseg.evaluation.grounding import Grounding

_SPLITS = ("all", "test", "val", "bank", "train")
_LANGUAGES = ("all", "train", "val", "test")
_EPILOG = (
    "Two ways of use. What seerseg_predict wrote for the requests of a dataset: seerseg_evaluate -d 4 -i PREDICTIONS --split test. "
    "Label maps value by value, as nnU-Net: seerseg_evaluate GT_FOLDER PREDICTION_FOLDER -l 1 2 3. "
    "Exit code 3 when something could not be scored (the rest is), 4 when there was nothing to score."
)


@command("seerseg_evaluate", epilog=_EPILOG)
@click.argument("folders", nargs=-1, metavar="[GT_FOLDER PREDICTION_FOLDER]")
@option("-d", "--dataset", metavar="ID", help="Dataset: number, full name, or its folder.")
@option("-i", "--input", "predictions", metavar="DIR", help="The folder that seerseg_predict wrote.")
@option("-o", "--output", metavar="FILE", help="Where the numbers go as JSON. Default: summary.json beside the predictions.")
@option("-f", "--fold", type=click.IntRange(0), help="Fold whose val, bank or train cases are meant (0 when not given).")
@option("--split", type=click.Choice(_SPLITS), default="all", help="Which cases must be there and are scored.")
@several("--cases", metavar="ID...", help="Only these cases.")
@option("--requests", "requests_file", metavar="FILE", help="JSONL of requests instead of the dataset's own.")
@option("--language", type=click.Choice(_LANGUAGES), default="all", help="Only free text of this language split.")
@option("--label_maps", is_flag=True, help="With -d: compare label maps value by value, whatever requests there are.")
@several("-l", "--labels", type=int, metavar="N...", help="Label values to compare (GT_FOLDER form).")
@option("-djfile", "--dataset_json", metavar="FILE", help="dataset.json that names the labels (GT_FOLDER form).")
@option("-pfile", "--plans_file", hidden=True, help="Taken so that an nnU-Net line works as it is; not needed.")
@option("-il", "--ignore_label", type=int, metavar="N", help="Value in the references that counts neither way.")
@several("--tolerance_mm", metavar="MM...", help="NSD tolerance; one per target as NAME=MM. Default: 1.")
@option("--lesions", is_flag=True, help="Lesion-wise F1, precision, recall and detection rate too.")
@option("--grounding", is_flag=True, help="Boxes and points of the answers too, as MedReasoner: IoU, pDice, Dice on 840 pixels.")
@option("--least_voxels", type=click.IntRange(1), default=1, help="Leave out targets with fewer voxels in the reference.")
@option("--chill", is_flag=True, help="Leave out what was not predicted instead of stopping.")
@option("-np", "--workers", type=click.IntRange(1), default=1, help="Processes, one case each.")
@option("--csv", "csv_file", metavar="FILE", help="One line per request as CSV.")
@option("--overlay", metavar="DIR", help="One PNG per case: reference and prediction outlined on the scan (needs -d).")
@option("--report", "report_file", metavar="FILE", help="An HTML page with everything (needs the extra 'report').")
@folder_options("raw", "preprocessed")
@json_option
@slurm_options("seerseg.cli.evaluate")
def evaluate(folders: tuple[str, ...], as_json: bool, output: str | None, **given: Any) -> None:
    """Score masks: Dice, NSD and HD95 in mm, volumes; stability over paraphrases; what free text costs; absent targets."""
    if given["report_file"]:
        from seerseg.report.plots import require_matplotlib

        require_matplotlib()  # said before the scoring, not after
    predictions, dataset, references = _sources(folders, given)
    found = _score(predictions, dataset, references, given)
    grounding = _ground(found, predictions, references) if given["grounding"] else None
    # Shown first: a full disk must not cost the numbers.
    if as_json:
        print_json(_content(found, grounding))
    else:
        from seerseg.evaluation import text_table

        click.echo(text_table(found))
        if grounding is not None:
            click.echo(f"\n{grounding.text()}")
    _write(found, grounding, predictions, dataset, references, output, given)
    faults = [*found.faults, *(grounding.faults if grounding is not None else ())]
    if faults:
        raise SomeCasesFailedError(f"{len(faults)} could not be scored, the rest is above. First: {faults[0]}")


def _ground(found: Evaluation, predictions: Path, references: References) -> Grounding:
    from seerseg.evaluation.grounding import ground

    return ground(found.rows, predictions, references)


def _content(found: Evaluation, grounding: Grounding | None) -> dict[str, Any]:
    return {**found.to_json(), **({"grounding": grounding.to_json()} if grounding is not None else {})}


def _sources(folders: Sequence[str], given: dict[str, Any]) -> tuple[Path, RawDataset | None, References]:
    """The predictions, the dataset (None in the form with two folders), and the references."""
    from seerseg.evaluation import References

    if folders and (given["dataset"] or given["predictions"]):
        raise UsageError("Give either GT_FOLDER PREDICTION_FOLDER or -d DATASET -i PREDICTIONS, not both.")
    if len(folders) == 2:
        if given["split"] != "all" or given["overlay"] or given["label_maps"]:
            raise UsageError("--split, --overlay and --label_maps need a dataset (-d), not two folders.")
        labels, ignore = _label_values(given["labels"], given["dataset_json"])
        ignore = given["ignore_label"] if given["ignore_label"] is not None else ignore
        return Path(folders[1]), None, References.of_folder(Path(folders[0]), labels, ignore_label=ignore)
    if folders or not (given["dataset"] and given["predictions"]):
        raise UsageError("Give -d DATASET -i PREDICTIONS, or two folders: GT_FOLDER PREDICTION_FOLDER.")
    for name, spelled in (("labels", "-l"), ("dataset_json", "-djfile"), ("ignore_label", "-il")):
        if given[name] not in (None, ()):
            raise UsageError(f"{spelled} belongs to the form with two folders; with -d the labels are those of the dataset.")
    dataset = _dataset(given["dataset"], given["raw_folder"])
    return Path(given["predictions"]), dataset, References.of_dataset(dataset)


def _dataset(identifier: str, raw: str | None) -> RawDataset:
    from seerseg.dataset import open_dataset
    from seerseg.paths import raw_folder, resolve_dataset

    if (Path(identifier) / "dataset.json").is_file():
        return open_dataset(Path(identifier))
    root = raw_folder(raw)
    return open_dataset(root / resolve_dataset(identifier, root))


def _label_values(values: Sequence[int], file: str | None) -> tuple[dict[str, tuple[int, ...]], int | None]:
    from seerseg.dataset.raw import label_values
    from seerseg.paths import read_json

    if bool(values) == bool(file):
        raise UsageError("Say which labels to compare: either their values (-l 1 2 3) or a dataset.json (-djfile FILE).")
    if file is None:
        return {str(v): (v,) for v in values}, None
    meta = read_json(Path(file), DatasetError)
    if not isinstance(meta, dict):
        raise DatasetError(f"{file} is no dataset.json: it holds no JSON object.")
    return label_values(meta, Path(file))


def _score(predictions: Path, dataset: RawDataset | None, references: References, given: dict[str, Any]) -> Evaluation:
    from seerseg.dataset import label_prompts, read_requests
    from seerseg.evaluation import Scoring, evaluate_label_maps, holds_requests
    from seerseg.evaluation import evaluate as evaluate_requests

    default, tolerances = _tolerances(given["tolerance_mm"], references)
    cases = _cases(dataset, references, given)
    with ExitStack() as stack:
        bars: list[Progress] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, "Scored cases")))
            bars[0].step()

        settings: dict[str, Any] = {
            "cases": cases,
            "split": given["split"],
            "fold": (given["fold"] or 0) if given["split"] in ("val", "bank", "train") else None,
            "scoring": Scoring(default, tolerances or {}, given["lesions"], given["least_voxels"]),
            "chill": given["chill"],
            "workers": given["workers"],
            "progress": progress,
        }
        if given["requests_file"] is None and (dataset is None or given["label_maps"] or not holds_requests(predictions, references)):
            return evaluate_label_maps(predictions, references, **settings)
        requests = read_requests(Path(given["requests_file"])) if given["requests_file"] else dataset.requests if dataset else []
        if dataset is not None:
            unknown = sorted({r.case for r in requests} - set(dataset.cases) - set(dataset.test_cases))
            if unknown:
                raise RequestError(
                    f"The requests name case {unknown[0]!r}, which {references.name} does not hold."
                    f"{did_you_mean(unknown[0], dataset.cases)} Mend the file or choose another dataset."
                )
        if given["language"] != "all":
            # Requests that do not say their split, label prompts among them, belong to every one.
            requests = [r for r in requests if r.language_split in ("", given["language"])]
        prompts = label_prompts(dataset) if dataset is not None else []
        return evaluate_requests(predictions, references, requests, optional=prompts, **settings)


def _cases(dataset: RawDataset | None, references: References, given: dict[str, Any]) -> list[str] | None:
    """The cases of the split, cut to --cases; None for all."""
    chosen: list[str] | None = None
    if dataset is not None and given["split"] != "all":
        from seerseg.dataset import load_splits, make_splits
        from seerseg.paths import PREPROCESSED_VARIABLE, preprocessed_folder

        splits = None
        places = [dataset.folder]
        if given["preprocessed_folder"] or _is_set(PREPROCESSED_VARIABLE):
            places.insert(0, preprocessed_folder(given["preprocessed_folder"]) / dataset.name)
        for place in places:
            if splits is None and (place / "splits.json").is_file():
                splits = load_splits(place / "splits.json", dataset)
        # Without a file the rule gives what planning would write.
        splits = splits or make_splits(dataset.subjects)
        fold = given["fold"] or 0
        if fold >= len(splits.folds):
            raise UsageError(f"There is no fold {fold}: {dataset.name} has folds 0 to {len(splits.folds) - 1}.")
        chosen = list(splits.test if given["split"] == "test" else getattr(splits.folds[fold], given["split"]))
        if not chosen:
            raise UsageError(f"The split {given['split']!r} of {dataset.name} holds no case: there are too few subjects. Use --split all.")
    if given["cases"]:
        known = set(references.files) | (set(dataset.cases) | set(dataset.test_cases) if dataset is not None else set())
        for case in given["cases"]:
            if case not in known:
                raise UsageError(f"{references.name} holds no case {case!r}.{did_you_mean(case, known)}")
        chosen = [c for c in given["cases"] if chosen is None or c in chosen]
    return chosen


def _is_set(variable: str) -> bool:
    import os

    return bool(os.environ.get(variable, "").strip())


def _tolerances(given: Sequence[str], references: References) -> tuple[float, dict[str, float]]:
    """The default tolerance in mm, and those of single targets."""
    from seerseg.metrics import DEFAULT_TOLERANCE_MM

    default, own = DEFAULT_TOLERANCE_MM, {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            mm = float(number)
        except ValueError:
            mm = -1.0
        if not 0 <= mm < float("inf"):
            raise UsageError(f"--tolerance_mm takes millimetres from 0 up, or NAME=MM, not {text!r}.")
        if not equals:
            default = mm
        elif name not in references.labels and not all(part in references.labels for part in name.split(" + ")):
            raise UsageError(
                f"--tolerance_mm names {name!r}, which is no label of {references.name}.{did_you_mean(name, references.labels)}"
            )
        else:
            own[name] = mm
    return default, own


def _write(
    found: Evaluation,
    grounding: Grounding | None,
    predictions: Path,
    dataset: RawDataset | None,
    references: References,
    output: str | None,
    given: dict[str, Any],
) -> None:
    from seerseg.evaluation import write_csv
    from seerseg.paths import write_json

    if given["overlay"] or given["report_file"]:
        from seerseg.report import write_overlays, write_report

    target = Path(output) if output else predictions / "summary.json"
    write_json(target / "summary.json" if target.is_dir() else target, _content(found, grounding))
    if given["csv_file"]:
        write_csv(Path(given["csv_file"]), found.rows)
    pictures: dict[str, Path] = {}
    if given["overlay"]:
        images = {c.id: c.images for c in (*dataset.cases.values(), *dataset.test_cases.values())} if dataset is not None else {}
        pictures = write_overlays(Path(given["overlay"]), found, predictions, references, images)
    if given["report_file"]:
        write_report(Path(given["report_file"]), found, pictures)
