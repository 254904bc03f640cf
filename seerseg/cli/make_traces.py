"""seerseg_make_traces: from labels and requests to evidence, rationale and answers that are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Progress, command, device_option, folder_options, json_option, licence_option, option, print_json, several
from seerseg.cli.slurm_options import slurm_options

if TYPE_CHECKING:
    from seerseg.dataset import RawDataset
    from seerseg.planning import Plans
    from seerseg_data.trace_checks import ExecutionCheck, ParseCheck
    from seerseg_data.traces import TraceReport

_SHOWN = 5
_EPILOG = (
    "Needs a preprocessed dataset (seerseg_plan_and_preprocess) with requests (seerseg_make_requests). Continues where it stopped. "
    "Exit code 3 when some cases or requests could not be used; the rest is in traces.jsonl."
)


def _count(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "all":
        return value
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number from 1 nor 'all'.", context, parameter)
    return int(value)


@command("seerseg_make_traces", epilog=_EPILOG)
@several("-d", "--dataset", "datasets", required=True, metavar="ID ...", help="Datasets, by number or full name: -d 4 5.")
@option("-p", "--plans_name", default="plans", metavar="NAME", help="Name of the plans file, without .json: it says what is shown.")
@option("--detail", type=click.Choice(["short", "full"]), help="Evidence in a few words, or all that is known. Default: the plan.")
@option("--trajectories", "shown_with", metavar="SEGMENTER", help="Also show how to refine a mask, with this segmenter in the loop (grow).")
@option("--per_target", type=click.IntRange(1), default=2, metavar="N", help="Different trajectories per target; requests take turns.")
@option("--check", callback=_count, metavar="N", help="Execute the answers of N traces (or all) again and report their Dice.")
@option("--segmenter", default="nano", metavar="NAME", help="The segmenter of --check.")
@option("--num_parts", type=click.IntRange(1), default=1, envvar="SEERSEG_NUM_PARTS", metavar="N", help="Share the cases among N runs ...")
@option(
    "--part_id", type=click.IntRange(0), default=0, envvar="SEERSEG_PART_ID", metavar="I", help="... of which this is number I, from 0."
)
@option("-np", "--num_processes", "processes", type=click.IntRange(1), metavar="N", help="Processes. Default: what the plan says.")
@option("--seed", type=int, default=1234, help="Seed of wordings, of the expert and of the sample checked.")
@option("--clean", is_flag=True, help="Make every case again, also those that are up to date.")
@device_option
@licence_option
@folder_options("raw", "preprocessed")
@json_option
@slurm_options("seerseg.cli.make_traces", last=(), watched=lambda given: _watched(given))
def make_traces(datasets: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Make traces of a dataset's requests: evidence from scan and label, rationale, answer: traces.jsonl."""
    from seerseg.errors import DatasetError, SomeCasesFailedError, UsageError
    from seerseg.paths import preprocessed_folder, raw_folder, resolve_dataset

    if given["part_id"] >= given["num_parts"]:
        raise UsageError(f"--part_id {given['part_id']} does not exist: parts of --num_parts {given['num_parts']} count from 0.")
    if given["shown_with"] or given["check"]:
        from seerseg.model import resolve_device

        given["device"] = resolve_device(given["device"])
    raw, target = raw_folder(given["raw_folder"]), preprocessed_folder(given["preprocessed_folder"])
    done, faults, made = [], [], 0
    for name in dict.fromkeys(resolve_dataset(identifier, raw) for identifier in datasets):
        dataset, problems = _open(raw / name)
        report, parsing, execution = _one(dataset, target / name, given)
        made += report.counts.get("rows", 0)
        faults += [*problems, *report.faults, *report.failed.values()]
        faults += [f"{check.protocol}: {check.faults[0]}" for check in parsing if check.faults]
        done.append(
            {
                "dataset": name,
                **report.to_json(),
                "problems": problems,
                "parsing": {check.protocol: check.to_json() for check in parsing},
                "execution": None if execution is None else execution.to_json(),
            }
        )
        if not as_json:
            click.echo(_summary(name, report, parsing, execution))
    if as_json:
        print_json({"schema": 1, "datasets": done})
    if faults:
        kind = SomeCasesFailedError if made else DatasetError
        raise kind(f"{len(faults)} could not be used or checked, the rest is written. First: {faults[0]}")


def _watched(given: dict[str, Any]) -> list[Path]:
    """The files of the cases."""
    from seerseg.paths import preprocessed_folder, raw_folder, resolve_dataset

    raw, target = raw_folder(given["raw_folder"]), preprocessed_folder(given["preprocessed_folder"])
    return [target / resolve_dataset(identifier, raw) / "traces" for identifier in given["datasets"]]


def _open(folder: Path) -> tuple[RawDataset, list[str]]:
    """The dataset, and sentences about lines of requests.jsonl that cannot be used; other faults of the whole dataset are raised."""
    from seerseg.dataset import open_dataset
    from seerseg.errors import DatasetError

    dataset = open_dataset(folder, strict=False)
    errors = [p for p in dataset.faults if p.severity == "error" and p.case is None]
    worse = next((p for p in errors if p.kind != "bad-request"), None)
    if worse is not None:
        raise DatasetError(f"{worse.message} {worse.remedy}")
    return dataset, [f"{p.message} {p.remedy}" for p in errors]


def _one(dataset: RawDataset, folder: Path, given: dict[str, Any]) -> tuple[TraceReport, list[ParseCheck], ExecutionCheck | None]:
    from seerseg_data.traces import Settings
    from seerseg_data.traces import make_traces as run

    plans = _plans(folder, given["plans_name"], dataset.name)
    settings = Settings(
        detail=given["detail"] or plans.value("traces.detail"),
        segmenter=given["shown_with"],
        trajectories=given["per_target"],
        device=given["device"],
        seed=given["seed"],
        accept_license=given["accept_license"],
    )
    channel = int(plans.value("views.channel"))
    part = (given["part_id"], given["num_parts"])
    total = len(range(part[0], len({r.case for r in dataset.requests}), part[1]))
    with Progress(total, f"{dataset.name}: traces") as progress:
        report = run(
            dataset,
            folder,
            spec=plans.view_spec(),
            channel=channel,
            hounsfield=bool(plans.value(f"channel.{channel}.hounsfield")),
            settings=settings,
            workers=given["processes"] or int(plans.value("workers.read")),
            part=part,
            clean=given["clean"],
            progress=lambda outcome: progress.step(),
        )
    parsing, execution = _check(dataset, folder, plans, report, given)
    return report, parsing, execution


def _check(
    dataset: RawDataset, folder: Path, plans: Plans, report: TraceReport, given: dict[str, Any]
) -> tuple[list[ParseCheck], ExecutionCheck | None]:
    if report.path is None or given["check"] is None:
        return [], None
    from seerseg.protocols.traces import read_traces
    from seerseg.segmenters import load_segmenter
    from seerseg_data.trace_checks import check_execution, check_parsing

    _, rows = read_traces(report.path)
    parsing = check_parsing(rows, folder, plans.view_spec())
    segmenter = load_segmenter(given["segmenter"], device=given["device"], accept_license=given["accept_license"])
    execution = check_execution(
        rows,
        dataset,
        folder,
        plans.view_spec(),
        segmenter,
        most=None if given["check"] == "all" else int(given["check"]),
        channel=int(plans.value("views.channel")),
        seed=given["seed"],
    )
    return parsing, execution


def _plans(folder: Path, name: str, dataset: str) -> Plans:
    from seerseg.errors import PlanError
    from seerseg.planning import load_plans

    path = folder / f"{name}.json"
    if not path.is_file():
        raise PlanError(f"There is no {path}. Run seerseg_plan_and_preprocess -d {dataset} first.")
    return load_plans(path)


def _summary(name: str, report: TraceReport, parsing: list[ParseCheck], execution: ExecutionCheck | None) -> str:
    counts = report.counts
    lines = [
        f"{name}: {counts.get('rows', 0)} traces of {counts.get('targets', 0)} targets, {counts.get('absent', 0)} of them absent, in "
        f"{report.seconds:.1f} s; {len(report.done)} cases done, {len(report.skipped)} were up to date, {len(report.failed)} failed"
    ]
    if report.path is not None:
        lines.append(f"  {report.path}")
    said = {
        "unseen": "of targets that are on none of the slices shown",
        "empty": "whose label has no voxel in their case: answered 'absent'",
        "unread": "that the lexicon reads otherwise: their rationale names the answer alone",
        "unknown": "requests whose truth is not stated: no trace",
        "dropped": "trajectories dropped",
        "shown": "trajectories kept",
    }
    lines += [f"  {counts[key]} {what}" for key, what in said.items() if counts.get(key)]
    lines += [f"  failed: {sentence}" for sentence in [*report.faults, *report.failed.values()][:_SHOWN]]
    for check in parsing:
        without = f", {check.without} without a trajectory" if check.without else ""
        lines.append(f"  {check.protocol}: {check.parsed} of {check.rows - check.without} parse{without}")
    if execution is not None:
        label = "" if execution.label is None else f"label prompt {execution.label:.4f}, "
        answers = ", ".join(f"{key} {value:.4f}" for key, value in execution.answers.items()) or "none that it can take"
        lines.append(f"  Dice of {execution.rows} answers by {execution.segmenter} ({execution.drawn} masks): {label}{answers}")
    return "\n".join(lines)
