"""seerseg_fingerprint, seerseg_plan, seerseg_preprocess, and seerseg_plan_and_preprocess, which does all three."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Function, Progress, command, folder_options, json_option, option, print_json, several
from seerseg.cli.slurm_options import slurm_options

if TYPE_CHECKING:
    from seerseg.dataset import IntegrityReport, RawDataset
    from seerseg.planning import Fingerprint, Hardware, Plans
    from seerseg.store import PreprocessReport

_SHOWN = 5


def _datasets(function: Function) -> Function:
    return several("-d", "--dataset", "datasets", required=True, metavar="ID ...", help="Datasets, by number or full name: -d 4 5.")(
        function
    )


def _plans_name(function: Function) -> Function:
    return option("-p", "--plans_name", default="plans", metavar="NAME", callback=_checked, help="Name of the plans file, without .json.")(
        function
    )


def _checked(context: click.Context, parameter: click.Parameter, name: str) -> str:
    from seerseg.paths import safe_name

    if safe_name(name) != name or name in ("fingerprint", "splits"):
        raise click.BadParameter(f"{name!r} cannot name a plans file; use letters, digits, '.', '_' and '-'.", context, parameter)
    return name


def _workers(function: Function) -> Function:
    return option(
        "-np", "--num_processes", "processes", type=click.IntRange(1), metavar="N", help="Processes. Default: what the plan says."
    )(function)


def _parts(function: Function) -> Function:
    """--num_parts, --part_id: the storing of cases shared among several runs."""
    which = option(
        "--part_id", type=click.IntRange(0), default=0, envvar="SEERSEG_PART_ID", metavar="I", help="... only store those of run I, from 0."
    )
    count = option(
        "--num_parts", type=click.IntRange(1), default=1, envvar="SEERSEG_NUM_PARTS", metavar="N", help="Share the cases among N runs ..."
    )
    return count(which(function))


def _part(num_parts: int, part_id: int) -> tuple[int, int]:
    from seerseg.errors import UsageError

    if part_id >= num_parts:
        raise UsageError(f"--part_id {part_id} does not exist: parts of --num_parts {num_parts} count from 0.")
    return part_id, num_parts


def _watched(given: dict[str, Any]) -> list[Path]:
    """The stored cases."""
    places = _places(given["datasets"], given["raw_folder"], given["preprocessed_folder"])
    return [place.folder / "cases" for place in places]


@dataclass(frozen=True)
class _Place:
    """One dataset and where its preprocessed files go."""

    raw: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.raw.name


def _places(datasets: Sequence[str], raw: str | None, preprocessed: str | None) -> list[_Place]:
    from seerseg.paths import preprocessed_folder, raw_folder, resolve_dataset

    root, target = raw_folder(raw), preprocessed_folder(preprocessed)
    names = dict.fromkeys(resolve_dataset(identifier, root) for identifier in datasets)
    return [_Place(root / name, target / name) for name in names]


@command("seerseg_fingerprint")
@_datasets
@_workers
@folder_options("raw", "preprocessed")
@json_option
def fingerprint(
    datasets: tuple[str, ...], processes: int | None, raw_folder: str | None, preprocessed_folder: str | None, as_json: bool
) -> None:
    """Measure images, targets and requests of datasets: fingerprint.json."""
    done = []
    for place in _places(datasets, raw_folder, preprocessed_folder):
        made = _fingerprint(place, _open(place), processes)
        done.append({"dataset": place.name, "fingerprint": made.to_json()})
        if not as_json:
            click.echo(_describe(made))
    if as_json:
        print_json({"schema": 1, "datasets": done})


@command("seerseg_plan")
@_datasets
@_plans_name
@option("--explain", is_flag=True, help="Print every value with its rule and inputs.")
@folder_options("raw", "preprocessed")
@json_option
def plan(
    datasets: tuple[str, ...], plans_name: str, explain: bool, raw_folder: str | None, preprocessed_folder: str | None, as_json: bool
) -> None:
    """Plan from the fingerprint: plans.json and splits.json. What you edited in plans.json is kept."""
    from seerseg.errors import PlanError
    from seerseg.planning import FINGERPRINT_FILE, hardware, load_fingerprint

    done = []
    for place in _places(datasets, raw_folder, preprocessed_folder):
        path = place.folder / FINGERPRINT_FILE
        if not path.is_file():
            raise PlanError(f"There is no {path}. Run seerseg_fingerprint -d {place.name} first, or seerseg_plan_and_preprocess.")
        plans = _plan(place, load_fingerprint(path), hardware(), plans_name)
        splits = _splits(place, _open(place), quiet=as_json)
        done.append({"dataset": place.name, "plans": plans.to_json(), "splits": splits})
        if explain and not as_json:
            click.echo(plans.explain(_width()))
    if as_json:
        print_json({"schema": 1, "datasets": done})


@command("seerseg_preprocess")
@_datasets
@_plans_name
@_workers
@option("--clean", is_flag=True, help="Preprocess every case again, also those that are up to date.")
@option("--resample_channels", is_flag=True, help="Resample channels that lie on another grid to the first channel's.")
@_parts
@folder_options("raw", "preprocessed")
@json_option
@slurm_options("seerseg.cli.plan_and_preprocess", last=(), watched=_watched)
def preprocess(
    datasets: tuple[str, ...],
    plans_name: str,
    processes: int | None,
    clean: bool,
    resample_channels: bool,
    num_parts: int,
    part_id: int,
    raw_folder: str | None,
    preprocessed_folder: str | None,
    as_json: bool,
) -> None:
    """Store every case of planned datasets so that slices and patches are read fast. Continues where it stopped."""
    from seerseg.errors import PlanError
    from seerseg.planning import hardware, load_plans

    done, reports = [], {}
    part = _part(num_parts, part_id)
    for place in _places(datasets, raw_folder, preprocessed_folder):
        path = place.folder / f"{plans_name}.json"
        if not path.is_file():
            raise PlanError(f"There is no {path}. Run seerseg_plan -d {place.name} first, or seerseg_plan_and_preprocess.")
        plans = load_plans(path).on(hardware())
        workers = processes or int(plans.value("workers.read"))
        reports[place.name] = _store(
            place, _open(place), plans.store_layout, workers, clean=clean, resample_channels=resample_channels, part=part
        )
        done.append({"dataset": place.name, "preprocessed": _report(reports[place.name])})
        if not as_json:
            click.echo(_summary(place, reports[place.name]))
    if as_json:
        print_json({"schema": 1, "datasets": done})
    _end(reports)


@command("seerseg_plan_and_preprocess", epilog="Exit code 3 when some cases could not be read; the rest is there.")
@_datasets
@_plans_name
@_workers
@option("-npfp", "--num_processes_fingerprint", "npfp", type=click.IntRange(1), metavar="N", help="As -np, used with --no_pp.")
@option("--verify_dataset_integrity", "verify", is_flag=True, help="Look for everything that may be wrong first, and stop at errors.")
@option("--no_pp", is_flag=True, help="Only measure and plan; store nothing.")
@option("--clean", is_flag=True, help="Preprocess every case again, also those that are up to date.")
@option("--resample_channels", is_flag=True, help="Resample channels that lie on another grid to the first channel's.")
@_parts
@folder_options("raw", "preprocessed")
@json_option
@slurm_options("seerseg.cli.plan_and_preprocess", last=(), watched=_watched)
def plan_and_preprocess(
    datasets: tuple[str, ...],
    plans_name: str,
    processes: int | None,
    npfp: int | None,
    verify: bool,
    no_pp: bool,
    clean: bool,
    resample_channels: bool,
    num_parts: int,
    part_id: int,
    raw_folder: str | None,
    preprocessed_folder: str | None,
    as_json: bool,
) -> None:
    """Measure, plan, split and preprocess datasets, decoding each file once. Continues where it stopped.

    With --num_parts the parts store their cases side by side; the same line once more without it measures and plans.
    """
    from seerseg.planning import hardware, summarise

    part = _part(num_parts, part_id)
    done: list[dict[str, Any]] = []
    reports: dict[str, PreprocessReport] = {}
    for place in _places(datasets, raw_folder, preprocessed_folder):
        entry: dict[str, Any] = {"dataset": place.name}
        done.append(entry)
        if verify:
            checked = _verify(place, processes)
            entry["integrity"] = checked.to_json()
            if as_json and not checked.ok:
                print_json({"schema": 1, "datasets": done})
            elif not as_json:
                click.echo(checked.explain())
            _stop_at_errors(checked)
        dataset, machine = _open(place), hardware()
        if no_pp:
            found = _fingerprint(place, dataset, npfp or processes)
        else:
            layout, planned = _layout(place, dataset, machine, plans_name)
            report = _store(place, dataset, layout, processes or planned, clean=clean, resample_channels=resample_channels, part=part)
            reports[place.name] = report
            entry["preprocessed"] = _report(report)
            if part[1] > 1:
                click.echo(_summary(place, report), err=as_json)
                continue
            found = summarise(dataset, list(report.records.values()), report.failed)
            _save(place, found)
            if not as_json:
                click.echo(_summary(place, report))
        plans = _plan(place, found, machine, plans_name)
        entry |= {"fingerprint": found.to_json(), "plans": plans.to_json(), "splits": _splits(place, dataset, quiet=as_json)}
        if not as_json:
            click.echo(
                f"{_describe(found)}\nPlans: {place.folder / (plans_name + '.json')} (seerseg_plan -d {place.name} --explain says why)"
            )
    if as_json:
        print_json({"schema": 1, "datasets": done})
    _end(reports)


def _open(place: _Place) -> RawDataset:
    from seerseg.dataset import open_dataset

    return open_dataset(place.raw)


def _verify(place: _Place, processes: int | None) -> IntegrityReport:
    from seerseg.dataset import open_dataset, verify_dataset
    from seerseg.planning import hardware, plan_workers, scan_headers

    dataset = open_dataset(place.raw, strict=False)
    scan = scan_headers(dataset)
    workers = processes or plan_workers(hardware(), scan.cases, scan.voxels_p95, scan.channels)[0]
    with _progress(len(dataset.cases) + len(dataset.test_cases), f"{place.name}: checking") as step:
        return verify_dataset(dataset, workers, step)


def _stop_at_errors(report: IntegrityReport) -> None:
    from seerseg.errors import DatasetError

    errors = [p for p in report.problems if p.severity == "error"]
    if errors:
        raise DatasetError(
            f"{report.dataset} has {len(errors)} error{'s' * (len(errors) > 1)}, the first: {errors[0].message} "
            "Mend what is listed, or run without --verify_dataset_integrity."
        )


def _fingerprint(place: _Place, dataset: RawDataset, processes: int | None) -> Fingerprint:
    from seerseg.planning import fingerprint, hardware, plan_workers, scan_headers

    scan = scan_headers(dataset)
    workers = processes or plan_workers(hardware(), scan.cases, scan.voxels_p95, scan.channels)[0]
    with _progress(len(dataset.cases), f"{place.name}: measuring") as step:
        found = fingerprint(dataset, workers, step)
    _save(place, found)
    return found


def _save(place: _Place, found: Fingerprint) -> None:
    from seerseg.planning import FINGERPRINT_FILE, save_fingerprint

    save_fingerprint(found, place.folder / FINGERPRINT_FILE)


def _plan(place: _Place, found: Fingerprint, machine: Hardware, plans_name: str) -> Plans:
    from seerseg.planning import make_plans, save_plans

    plans = make_plans(found, machine, plans_name, _previous(place, plans_name))
    save_plans(plans, place.folder)
    return plans


def _previous(place: _Place, plans_name: str) -> Plans | None:
    """Plans that are there already, whose edits are to be kept."""
    from seerseg.planning import load_plans

    path = place.folder / f"{plans_name}.json"
    return load_plans(path, complete=False) if path.is_file() else None


def _layout(place: _Place, dataset: RawDataset, machine: Hardware, plans_name: str) -> tuple[Any, int]:
    """The store layout that the plan will hold, and the number of workers: from headers and from what a person edited."""
    from seerseg.planning import layout_of, plan_workers, scan_headers

    scan, previous = scan_headers(dataset), _previous(place, plans_name)
    return layout_of(scan, previous), plan_workers(machine, scan.cases, scan.voxels_p95, scan.channels)[0]


def _store(
    place: _Place, dataset: RawDataset, layout: dict[str, int], workers: int, *, clean: bool, resample_channels: bool, part: tuple[int, int]
) -> PreprocessReport:
    from seerseg.store import PreprocessReport, StoreLayout, preprocess

    mine = sorted(dataset.cases)[part[0] :: part[1]] if part[1] > 1 else list(dataset.cases)
    if dataset.cases and not mine:
        return PreprocessReport((), (), {}, {}, 0.0)
    with _progress(len(mine), f"{place.name}: preprocessing") as step:
        return preprocess(
            dataset,
            place.folder,
            layout=StoreLayout(**layout),
            workers=workers,
            cases=mine,
            clean=clean,
            resample_channels=resample_channels,
            progress=lambda outcome: step(),
        )


def _splits(place: _Place, dataset: RawDataset, *, quiet: bool) -> dict[str, Any]:
    from seerseg.dataset import load_or_make_splits

    splits = load_or_make_splits(dataset, place.folder)
    left_out = sorted(set(dataset.cases) - splits.cases)
    if not quiet:
        first = splits.folds[0]
        click.echo(
            f"{place.name}: {_count(len(splits.test), 'test case')}, {len(splits.folds)} folds; the first has "
            f"{len(first.train)} training, {len(first.val)} validation and {len(first.bank)} bank cases."
        )
        if not splits.test:
            click.echo(f"{place.name} has too few subjects to set any apart: every case trains and validates, none tests.", err=True)
        if left_out:
            shown = ", ".join(left_out[:_SHOWN]) + (" ..." if len(left_out) > _SHOWN else "")
            click.echo(
                f"{place.folder / 'splits.json'} gives no place to {shown}: it was made before they came. "
                "They are not used; remove the file to deal anew.",
                err=True,
            )
    return {"test": len(splits.test), "folds": len(splits.folds), "left_out": left_out}


def _describe(found: Fingerprint) -> str:
    shape = " x ".join(f"{s.median:g}" for s in found.shape_zyx)
    spacing = " x ".join(f"{s.median:.3g}" for s in found.spacing_zyx)
    lines = [
        f"{found.dataset}: {_count(found.cases, 'case')} of {_count(found.subjects, 'subject')}, {found.labelled} labelled, median {shape} "
        f"voxels of {spacing} mm (z, y, x), {_count(len(found.targets), 'target')}, {_count(found.requests.count, 'request')}."
    ]
    for channel in found.channels:
        lines += [f"  {channel.name}, {_count(n, 'case')}: {reason}." for reason, n in channel.hu_faults.items()]
    for count, what in ((found.laterality_assumed, "nothing says which side is left"), (found.sheared, "the grid is sheared")):
        lines += [f"  {_count(count, 'case')}: {what}."] if count else []
    return "\n".join(lines)


def _summary(place: _Place, report: PreprocessReport) -> str:
    done = _count(len(report.done), "case")
    lines = [
        f"{place.name}: {done} preprocessed, {len(report.skipped)} were up to date, {len(report.failed)} failed, "
        f"in {report.seconds:.1f} s, to {place.folder}"
    ]
    lines += [f"  failed: {sentence}" for sentence in list(report.failed.values())[:_SHOWN]]
    return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _report(report: PreprocessReport) -> dict[str, Any]:
    return {"done": len(report.done), "skipped": len(report.skipped), "failed": report.failed, "seconds": round(report.seconds, 3)}


def _end(reports: dict[str, PreprocessReport]) -> None:
    from seerseg.errors import DatasetError, SomeCasesFailedError

    failed = sum(len(report.failed) for report in reports.values())
    if not failed:
        return
    stored = sum(len(report.records) for report in reports.values())
    names = [case for report in reports.values() for case in report.failed]
    shown = ", ".join(names[:_SHOWN]) + (" ..." if failed > _SHOWN else "")
    kind = SomeCasesFailedError if stored else DatasetError
    raise kind(
        f"{failed} of {_count(failed + stored, 'case')} could not be preprocessed ({shown}). "
        "Mend them and run the same command again; --verify_dataset_integrity says what is wrong with each."
    )


@contextmanager
def _progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    with Progress(total, label) as progress:
        yield lambda: progress.step()


def _width() -> int:
    import shutil

    return min(140, max(80, shutil.get_terminal_size((100, 24)).columns))
