"""seerseg_challenge: answer a challenge's scans, score answers as the challenge does, make the container it wants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg import __version__
from seerseg.cli.bank import Group
from seerseg.cli.options import (
    LateProgress,
    Progress,
    device_option,
    folder_options,
    json_option,
    licence_option,
    option,
    print_json,
    several,
)
from seerseg.errors import SomeCasesFailedError, UsageError

if TYPE_CHECKING:
    from seerseg.challenge import Answerer, ChallengeReport, JobOptions, ScanAnswer
    from seerseg.prediction import Predictor

CONVENTIONS = ("npz", "grand_challenge")
_FOLDERS = {"npz": ("/workspace/inputs", "/workspace/outputs"), "grand_challenge": ("/input", "/output")}
_EPILOG = (
    "Examples: seerseg_challenge predict -i 3D_val_npz -o answers | "
    "seerseg_challenge evaluate -i answers -gt 3D_val_gt --scans 3D_val_npz | "
    "seerseg_challenge dockerize -o context -m MODEL_FOLDER"
)


@click.group(
    "seerseg_challenge",
    cls=Group,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="SeerSeg")
def challenge() -> None:
    """Answer a challenge: CVPR 2025 text-guided segmentation (.npz files), or one job of the Grand-Challenge platform."""


def _model_options(function: Any) -> Any:
    """Which model answers, as in seerseg_predict."""
    for decorate in (
        option("--bank", metavar="DIR", help="Skill bank that is shown to the reasoner, or none. Default: the model's."),
        option("--protocol", metavar="NAME", help="Dialogue grammar. Default: the model's, else seer."),
        option("--reasoner", metavar="NAME", help="Name, name:source or folder. Default: the model's, else cascade."),
        option("--segmenter", metavar="NAME", help="Name, name:source or folder. Default: the model's, else nano."),
        option("-p", "--plans", metavar="NAME", help="Plans of the trained model, where there are several."),
        option("-f", "--fold", type=int, metavar="FOLD", help="Fold of the trained model. Default with -d: 0."),
        option("-d", "--dataset", metavar="ID", help="Dataset whose trained model is used, with -f."),
        option("-m", "--model_folder", metavar="DIR", help="A trained model."),
    ):
        function = decorate(function)
    return function


def _scan_options(function: Any) -> Any:
    """How scans are read."""
    for decorate in (
        option("--modality", metavar="NAME", help="grand_challenge: CT, MR, PET ..., which .mha files do not say."),
        option("--prompt_slug", metavar="SLUG", help="grand_challenge: the input that holds the text, where several do."),
        option("--image_slug", metavar="SLUG", help="grand_challenge: the input that is the scan, where there are several."),
        option(
            "--output_path", metavar="PATH", help="grand_challenge: where the answer goes under the output. Default: images/segmentation."
        ),
        option("--prompt", "prompts", multiple=True, metavar="[N=]TEXT", help="grand_challenge: asked of every scan, drawn with value N."),
        option(
            "--ct_window",
            nargs=2,
            type=float,
            metavar="CENTRE WIDTH",
            help="npz: window in HU that CT was cut to. Default: 40 400. WIDTH 0: unknown.",
        ),
    ):
        function = decorate(function)
    return function


@challenge.command(
    "predict",
    epilog="Exit codes: 0 done; 1 no answer can be written, or the model is unusable; 2 misuse; 3 some scans got an empty "
    "or partial answer (0 with --never_fail); 4 no scan; 75 stopped. Every scan gets an answer, an empty one where it cannot be used.",
)
@option("--convention", type=click.Choice(CONVENTIONS), default="npz", help="npz: CVPR 2025, a folder of scans. grand_challenge: one job.")
@option("-i", "--input", "source", metavar="DIR", help="The scans or the job. Default: /workspace/inputs, /input.")
@option("-o", "--output", metavar="DIR", help="Where the answers go. Default: /workspace/outputs, /output.")
@_model_options
@_scan_options
@option(
    "--never_fail", is_flag=True, help="For containers: write an empty answer first, replace it when there is one, exit 0 whatever a scan."
)
@option("--log", metavar="FILE.jsonl", help="What was asked, answered and drawn, a line for each scan.")
@option("--seed", type=int, default=0, help="Seed of the reasoner's replies.")
@option("--dtype", metavar="NAME", help="float32, bfloat16, float16. Default: what suits the device.")
@device_option
@option("--offline/--online", default=True, help="Never / if needed fetch models from a hub.")
@licence_option
@folder_options("results")
@json_option
def predict(**given: Any) -> None:
    """Answer every scan: .npz in, .npz of the same name out; or one Grand-Challenge job, .mha in and out."""
    from seerseg.challenge import Answerer, predict_npz
    from seerseg.prediction import StopOnSignals

    convention, shown = given["convention"], _Shown(given["log"])
    job = _job_options(given)
    _ = _ct_window(given)
    source, output = (Path(given[key] or default) for key, default in zip(("source", "output"), _FOLDERS[convention], strict=True))
    answerer = Answerer(lambda: _predictor(given), never_fail=given["never_fail"])
    with StopOnSignals() as stop, shown:
        if convention == "npz":
            report = predict_npz(source, output, answerer, ct_window=_ct_window(given), progress=shown.step, stopping=stop)
        else:
            report = _answer_one(source, output, answerer, job, shown)
    _print_report(report, as_json=given["as_json"])
    raise click.exceptions.Exit(report.exit_code)


def _job_options(given: dict[str, Any]) -> JobOptions:
    """Those of grand_challenge, checked; UsageError when they are given with npz, or those of npz with grand_challenge."""
    from seerseg.challenge import JobOptions

    own = ("prompts", "output_path", "image_slug", "prompt_slug", "modality")
    wrong = [name for name in own if given[name]] if given["convention"] == "npz" else ["ct_window"] if given["ct_window"] else []
    if wrong:
        raise UsageError(f"--{wrong[0].removesuffix('s')} does not belong to --convention {given['convention']}.")
    job = JobOptions(
        given["output_path"] or JobOptions.output_path,
        _texts(given["prompts"]),
        given["image_slug"],
        given["prompt_slug"],
        given["modality"],
    )
    _ = job.place
    return job


def _ct_window(given: dict[str, Any]) -> tuple[float, float] | None:
    from seerseg.challenge.npz import CT_WINDOW

    centre, width = given["ct_window"] or CT_WINDOW
    if not (abs(centre) < 1e5 and 0 <= width < 1e5):
        raise UsageError(f"--ct_window {centre:g} {width:g}: centre and width are Hounsfield units, the width from 0 up.")
    return (centre, width) if width else None


def _texts(prompts: tuple[str, ...]) -> dict[int, str] | None:
    """Value -> text of "2=left lung" or, numbered from 1, of "left lung"."""
    texts: dict[int, str] = {}
    for text in prompts:
        number, equals, words = text.partition("=")
        value, said = (int(number), words) if equals and number.strip().isdigit() else (max(texts, default=0) + 1, text)
        if value < 1 or value in texts or not said.strip():
            raise UsageError(f"--prompt {text!r}: give each text its own value from 1 up, as --prompt 2='left lung'.")
        texts[value] = said
    return texts or None


def _predictor(given: dict[str, Any]) -> Predictor:
    from seerseg.model import find_run
    from seerseg.paths import results_folder
    from seerseg.prediction import Predictor

    folder = Path(given["model_folder"]) if given["model_folder"] else None
    if folder is not None and given["dataset"]:
        raise UsageError("Give a model folder with -m, or a dataset with -d and a fold with -f, not both.")
    if given["dataset"]:
        hints = {part: given[part] for part in ("protocol", "reasoner", "segmenter")}
        folder = find_run(results_folder(given["results_folder"]), given["dataset"], given["fold"] or 0, plans=given["plans"], hints=hints)
    elif given["fold"] is not None or given["plans"]:
        raise UsageError("-f and -p choose among the trained models of a dataset; name it with -d.")
    return Predictor(
        given["segmenter"],
        given["reasoner"],
        protocol=given["protocol"],
        model_folder=folder,
        device=given["device"],
        dtype=given["dtype"],
        offline=given["offline"],
        accept_license=given["accept_license"],
        seed=given["seed"],
        bank=given["bank"],
    )


def _answer_one(source: Path, output: Path, answerer: Answerer, job: JobOptions, shown: _Shown) -> ChallengeReport:
    from seerseg.challenge import ChallengeReport, answer_job

    answer = answer_job(source, output, answerer, job)
    shown.step(answer, 1)
    return ChallengeReport(output, (answer,), never_fail=answerer.never_fail, seconds=answer.seconds, model=answerer.identity)


class _Shown(LateProgress):
    """A bar, or plain lines; reasons at once on stderr; a line for each scan in the log."""

    def __init__(self, log: str | None) -> None:
        super().__init__()
        self.log = Path(log) if log else None
        self.lines: list[str] = []

    def step(self, answer: ScanAnswer, total: int) -> None:
        """One more scan is answered."""
        import json

        from seerseg.paths import write_text

        self.begin(total, "Scans")
        if answer.status != "done":
            what = "an empty answer was written" if answer.status == "failed" else "answered in part"
            self.bar.note(f"{answer.case}: {what}. {answer.reason}")
        for note in answer.notes:
            self.bar.note(f"{answer.case}: {note}.")
        if answer.fault:
            self.bar.note(answer.fault)
        if self.log is not None:
            self.lines.append(json.dumps(answer.to_json(), ensure_ascii=False))
            write_text(self.log, "\n".join(self.lines) + "\n")
        self.bar.step()


def _print_report(report: ChallengeReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
    for answer in report.answers:
        for one in answer.classes:
            drawn = "all instances" if answer.instances else f"{one.voxels} voxels"
            told = f"  {one.message}" if one.message and one.status not in ("unsupported", "fault", "failed") else ""
            click.echo(f"{answer.case}  {one.value}  {one.text[:60]!r} -> {one.target or '-'}  {one.status}  {drawn}{told}", err=as_json)
    counts = {status: sum(a.status == status for a in report.answers) for status in ("done", "partial", "failed")}
    words = {"done": "answered", "partial": "in part", "failed": "with an empty answer"}
    said = ", ".join(f"{n} {words[status]}" for status, n in counts.items() if n) or "none begun"
    for name in report.ignored:
        click.echo(f"Ignored: {name}", err=as_json)
    click.echo(
        f"{len(report.answers) + len(report.not_started)} scans: {said}. {report.seconds:.1f} s. Answers are in {report.output}",
        err=as_json,
    )
    if report.not_started:
        click.echo(f"Stopped by a signal with {len(report.not_started)} scans left.", err=as_json)


@challenge.command(
    "evaluate",
    epilog="The CVPR 2025 scores: DSC and NSD at 2 mm for each class, F1 and DSC of instances at an overlap of 0.5. NSD is the published "
    "number, NSD mm the one with every axis in its own millimetres. "
    "Exit code 3 when an answer was missing or damaged: it counts as an empty one.",
)
@option("-i", "--input", "answers", required=True, metavar="DIR", help="The answers: .npz with segs.")
@option("-gt", "--ground_truth", required=True, metavar="DIR", help="The references: .npz with gts.")
@option("--scans", metavar="DIR", help="The scans, for spacing and text_prompts where the references lack them.")
@option("-o", "--output", metavar="FILE.json", help="Where the numbers go. Default: only shown.")
@json_option
def evaluate(answers: str, ground_truth: str, scans: str | None, output: str | None, as_json: bool) -> None:
    """Score answers to .npz scans as the CVPR 2025 challenge does, with false positives on absent classes besides."""
    from seerseg.challenge.scores import evaluate_npz, text_table
    from seerseg.paths import write_json

    bars: list[Progress] = []

    def progress(total: int) -> None:
        if not bars:
            bars.append(Progress(total, "Scored scans"))
            bars[0].__enter__()
        bars[0].step()

    try:
        found = evaluate_npz(Path(answers), Path(ground_truth), Path(scans) if scans else None, progress=progress)
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(text_table(found))
    if output:
        write_json(Path(output), found.to_json())
    problems = [*found.problems, *found.faults]
    if problems:
        raise SomeCasesFailedError(
            f"{len(found.problems)} references could not be scored, {len(found.faults)} answers counted as empty. First: {problems[0]}"
        )


@challenge.command(
    "dockerize",
    epilog="Then: docker build --tag team context, or apptainer build seerseg.sif seerseg.def in it. Options of predict that are given "
    "here become those of the entry points.",
)
@option("-o", "--output", required=True, metavar="DIR", help="The folder that is made.")
@_model_options
@_scan_options
@several("--packages", metavar="NAME==VERSION...", help="Further packages, installed without their dependencies.")
@option("--recipe_only", is_flag=True, help="Without the code, for building from a checkout.")
@option("--overwrite", is_flag=True, help="Make a folder anew that this command made.")
@folder_options("results")
def dockerize(**given: Any) -> None:
    """Make the folder that a container is built from: Dockerfile, Apptainer definition, entry points, pinned packages, code, model."""
    from seerseg.challenge.container import ContainerPlan, write_container
    from seerseg.challenge.grand_challenge import JobOptions

    _texts(given["prompts"])
    _ = JobOptions(given["output_path"] or JobOptions.output_path).place
    model = Path(given["model_folder"]) if given["model_folder"] else None
    if model is None and given["dataset"]:
        from seerseg.model import find_run
        from seerseg.paths import results_folder

        model = find_run(results_folder(given["results_folder"]), given["dataset"], given["fold"] or 0, plans=given["plans"])
    parts = {role: given[role] for role in ("segmenter", "reasoner", "bank") if given[role]}
    own = ("output_path", "image_slug", "prompt_slug", "modality")
    job = [word for name in own if given[name] for word in (f"--{name}", given[name])]
    job += [word for text in given["prompts"] for word in ("--prompt", text)]
    plan = ContainerPlan(
        model=model,
        parts=parts,
        arguments=("--protocol", given["protocol"]) if given["protocol"] else (),
        job_arguments=job,
        npz_arguments=("--ct_window", *(f"{number:g}" for number in given["ct_window"])) if given["ct_window"] else (),
        packages=given["packages"],
    )
    made = write_container(Path(given["output"]), plan, recipe_only=given["recipe_only"], overwrite=given["overwrite"])
    for path in made:
        click.echo(path)
    click.echo(
        f"Build it: docker build --tag team {given['output']}   or   cd {given['output']} && apptainer build seerseg.sif seerseg.def"
    )


if __name__ == "__main__":
    challenge(prog_name="seerseg_challenge")
