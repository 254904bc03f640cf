"""seerseg_predict: scans and free text in, masks out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import LateProgress, command, device_option, folder_options, json_option, licence_option, option, print_json
from seerseg.cli.slurm_options import slurm_options

if TYPE_CHECKING:
    from pathlib import Path

    from seerseg.prediction import Predictor, RunReport

_SHOWN_ROWS = 60
_SHOWN_LINES = 8


@command(
    "seerseg_predict",
    epilog='Examples: seerseg_predict -i scan.nii.gz -o out --prompt "left lung" --prompt "rt lung" | '
    "seerseg_predict -i imagesTs -o out --requests requests.jsonl | seerseg_predict -i imagesTs -o out -d 4 -f 0",
)
@option("-i", "--input", "source", required=True, metavar="PATH", help="Folder of scans, one scan, DICOM folder(s), or a jobs file.")
@option("-o", "--output", required=True, metavar="DIR", help="Where masks, their JSON and the ledger go.")
@option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A request for every case; may be repeated.")
@option("--requests", metavar="FILE.jsonl", help="Requests by case. Default: <case>.json or .txt beside the image, else requests.jsonl.")
@option("--segmenter", metavar="NAME", help="Name, name:source or folder. Default: the model's, else nano.")
@option("--reasoner", metavar="NAME", help="Name, name:source, folder or hub id. Default: the model's, else cascade.")
@option("--protocol", metavar="NAME", help="Dialogue grammar. Default: the model's, else seer.")
@option("--bank", metavar="DIR", help="Skill bank that is shown to the reasoner, or none. Default: the model's.")
@option(
    "--bank_mode",
    type=click.Choice(["frozen", "online"]),
    default="frozen",
    help="online: words that the readings of --consensus agree on are used from then on, for this output alone.",
)
@option("--encoder", metavar="DIR", help="With --bank: the sentence encoder that it was evolved with, a transformers folder.")
@option("-m", "--model_folder", metavar="DIR", help="A trained model.")
@option("-d", "--dataset", metavar="ID", help="Dataset whose trained model is used, with -f.")
@option("-f", "--fold", type=int, metavar="FOLD", help="Fold of the trained model. Default with -d: 0.")
@option("-p", "--plans", metavar="NAME", help="Plans of the trained model, where there are several.")
@option("--channels", type=click.IntRange(1), metavar="N", help="Channels of a case. Default: as most cases have.")
@option("--channel", type=click.IntRange(0), default=0, metavar="N", help="The channel that is shown and segmented.")
@option("--modality", metavar="NAME", help="CT, MR, PET ... where the files do not say.")
@option("--resample_channels", is_flag=True, help="Resample channels of other grids to the first instead of failing the case.")
@option("--per_request", is_flag=True, help="Also write <case>__<request id>.nii.gz for each request.")
@option("--overlay", is_flag=True, help="Also write <case>.png, slices with the masks on them.")
@option("--report", "html", is_flag=True, help="Also write report.html: everything asked, answered and drawn, with the pictures.")
@option("--consensus", type=click.IntRange(1), default=1, metavar="N", help="Read each request N times; keep the mask most agree with.")
@option(
    "--decide",
    type=click.Choice(["likeliest", "expected_dice"]),
    default="likeliest",
    help="expected_dice: keep the mask that can be expected to fit best, pieces of one structure together where either may be meant.",
)
@option("--abstain_below", type=click.FloatRange(0, 1), default=0.0, help="Agreement (expected Dice) under which nothing is drawn.")
@option("--second_reading", is_flag=True, help="Where mask and answer disagree (--protocol seerseg), ask once more; keep what fits better.")
@option("--overwrite", is_flag=True, help="Do cases again that are done. Default: continue.")
@option("--continue_prediction", is_flag=True, help="The default; taken because nnU-Net's users type it.")
@option("--num_parts", type=click.IntRange(1), default=1, envvar="SEERSEG_NUM_PARTS", metavar="N", help="Share the cases among N runs ...")
@option(
    "--part_id", type=click.IntRange(0), default=0, envvar="SEERSEG_PART_ID", metavar="I", help="... of which this is number I, from 0."
)
@option("--merge_parts", type=click.IntRange(1), metavar="N", help="Predict nothing: join the ledgers of N parts, say what is missing.")
@option("-npp", "--readers", type=click.IntRange(0), default=1, metavar="N", help="Threads that read; 0: no overlap at all.")
@option("-nps", "--writers", type=click.IntRange(1), default=1, metavar="N", help="Threads that write.")
@option(
    "--max_memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    help="Scans in flight. Default: a quarter of what the reasoner leaves.",
)
@option("--seed", type=int, default=0, help="Seed of the reasoner's replies.")
@option("--dtype", metavar="NAME", help="float32, bfloat16, float16. Default: what suits the device.")
@device_option
@option("--offline/--online", default=True, help="Never / if needed fetch models from a hub.")
@licence_option
@folder_options("results")
@json_option
@click.option("--verbose", is_flag=True, help="List every ignored file and every row.")
@slurm_options("seerseg.cli.predict", last=("--merge_parts", "{parts}"), watched=lambda given: _watched(given), interrupts=False)
def predict(**given: Any) -> None:
    """Segment what the words ask for: one mask file per case, with a JSON record beside it."""
    from seerseg.errors import UsageError
    from seerseg.prediction import Options, StopOnSignals, predict_folder

    if given["merge_parts"]:
        _merge(given)
    if given["part_id"] >= given["num_parts"]:
        raise UsageError(f"--part_id {given['part_id']} does not exist: parts of --num_parts {given['num_parts']} count from 0.")
    options = Options(
        per_request=given["per_request"],
        overwrite=given["overwrite"],
        overlay=given["overlay"],
        resample_channels=given["resample_channels"],
        modality=given["modality"],
        channels=given["channels"],
        channel=given["channel"],
        readers=max(1, given["readers"]),
        writers=given["writers"],
        limit_bytes=int(given["max_memory"] * 2**30) if given["max_memory"] else None,
        overlap=given["readers"] > 0 and given["bank_mode"] == "frozen",  # online, a case is shown what those before it taught
    )
    with StopOnSignals() as stop:
        predictor = _predictor(given)
        shown = _Shown()
        with shown:
            report = predict_folder(
                given["source"],
                given["output"],
                predictor,
                prompts=given["prompts"],
                requests=given["requests"],
                options=options,
                num_parts=given["num_parts"],
                part_id=given["part_id"],
                progress=shown.step,
                stopping=stop,
            )
    _print_report(report, as_json=given["as_json"], verbose=given["verbose"], signal=stop.received)
    if given["html"] and report.results:
        from seerseg.report import write_run_report

        write_run_report(report.output / "report.html", report.output)
    raise click.exceptions.Exit(report.exit_code)


def _predictor(given: dict[str, Any]) -> Predictor:
    from pathlib import Path

    from seerseg.consensus import ConsensusSettings
    from seerseg.errors import UsageError
    from seerseg.model import find_run
    from seerseg.paths import results_folder
    from seerseg.prediction import Predictor

    folder = Path(given["model_folder"]) if given["model_folder"] else None
    if folder is not None and given["dataset"]:
        raise UsageError("Give a model folder with -m, or a dataset with -d and a fold with -f, not both.")
    if given["dataset"]:
        hints = {part: given[part] for part in ("protocol", "reasoner", "segmenter")}
        folder = find_run(results_folder(given["results_folder"]), given["dataset"], given["fold"] or 0, plans=given["plans"], hints=hints)
        given |= dict.fromkeys(hints)  # they chose among trained models; none of its parts is replaced by an untrained one of that name
    elif given["fold"] is not None or given["plans"]:
        raise UsageError("-f and -p choose among the trained models of a dataset; name it with -d.")
    made = Predictor(
        given["segmenter"],
        given["reasoner"],
        protocol=given["protocol"],
        model_folder=folder,
        device=given["device"],
        dtype=given["dtype"],
        offline=given["offline"],
        accept_license=given["accept_license"],
        seed=given["seed"],
        bank=_bank(given, folder),
        consensus=ConsensusSettings(given["consensus"], given["abstain_below"], given["decide"]),
        second_reading=given["second_reading"],
    )
    if given["bank_mode"] == "online":
        _go_online(made, given)
    return made


def _bank(given: dict[str, Any], folder: Path | None) -> Any:
    """The bank as named; with a sentence encoder it is opened here, then the model's own where none is named."""
    from pathlib import Path

    from seerseg.errors import UsageError

    if not given["encoder"]:
        return given["bank"]
    from seerseg.model import BANK, read_spec

    own = str(folder / BANK) if folder is not None and given["bank"] is None and read_spec(folder).bank != "none" else None
    named = given["bank"] or own
    if named in (None, "none"):
        raise UsageError("--encoder finds skills of a bank: name the bank with --bank.")
    from seerseg.skills.encoder import SentenceEncoder
    from seerseg.skills.retrieval import ENCODED, FrozenBank

    encoder = SentenceEncoder(Path(given["encoder"]))
    return FrozenBank.open(Path(str(named)).expanduser(), weights=ENCODED, encoder=encoder)


def _go_online(made: Predictor, given: dict[str, Any]) -> None:
    """Let the model's bank learn from agreement; what was learnt is kept in the output folder."""
    from pathlib import Path

    from seerseg.errors import UsageError
    from seerseg.evolution.online import FILE, READINGS, OnlineBank

    if given["consensus"] < READINGS:
        raise UsageError(f"--bank_mode online learns from readings that agree: add --consensus {READINGS} or more.")
    if made.model.bank.mode == "none":
        raise UsageError("--bank_mode online needs a bank to begin with: give it with --bank.")
    if given["num_parts"] > 1:
        raise UsageError("--bank_mode online learns from case to case, so its cases cannot be shared among parts.")
    path = Path(given["output"]) / FILE
    if given["overwrite"]:
        path.unlink(missing_ok=True)
    made.model.bank = OnlineBank(made.model.bank, path)


def _watched(given: dict[str, Any]) -> list[str]:
    """The ledger that a part writes."""
    from pathlib import Path

    from seerseg.errors import UsageError
    from seerseg.slurm import PART

    for name in ("source", "requests", "model_folder"):
        if given[name] and not Path(given[name]).expanduser().exists():
            raise UsageError(f"There is no {given[name]}, so nothing was handed to Slurm.")
    return [f"{given['output']}/ledger{'' if given['num_parts'] == 1 else '.' + PART}.jsonl"]


def _merge(given: dict[str, Any]) -> None:
    """Join the parts' ledgers, say how the cases stand, end with the code of the whole."""
    from seerseg.slurm import merge_parts

    found = merge_parts(
        given["source"],
        given["output"],
        given["merge_parts"],
        prompts=given["prompts"],
        requests=given["requests"],
        channels=given["channels"],
    )
    if given["as_json"]:
        print_json(found.to_json())

    def say(line: str) -> None:
        click.echo(line, err=given["as_json"])

    _listed(say, "Problem", found.problems, given["verbose"])
    _listed(say, "Never begun", [f"part {part}" for part in found.idle], given["verbose"])
    _listed(say, "Missing", [f"{case} (part {part})" for case, part in found.missing.items()], given["verbose"])
    _listed(say, "Failed", [f"{case}: {why}" for case, why in found.failed.items()], given["verbose"])
    say(f"{found.total} cases: {found.done} done, {len(found.failed)} failed, {len(found.missing)} missing. Masks are in {found.output}")
    raise click.exceptions.Exit(found.exit_code)


class _Shown(LateProgress):
    """Cases as they are done, with what went wrong."""

    def step(self, result: Any, total: int) -> None:
        """One more case is done."""
        self.begin(total, "Cases")
        if result.status in ("failed", "partial") and result.error:
            self.bar.note(f"{result.case}: {result.error}")
        if result.fault:
            self.bar.note(result.fault)
        self.bar.step()


def _print_report(report: RunReport, *, as_json: bool, verbose: bool, signal: str | None) -> None:
    def say(line: str) -> None:
        click.echo(line, err=as_json)

    if as_json:
        print_json(report.to_json())
    _listed(say, "Ignored", report.ignored, verbose)
    _listed(say, "Note", report.notes, verbose)
    # what was said when a case was done is not read again for thousands that were done before
    shown = report.results if verbose else [r for r in report.results if r.status != "skipped"]
    _table(say, report, verbose)
    _listed(say, "Warning", [f"{r.case}: {line}" for r in shown for line in r.record.get("warnings", [])], verbose)
    _listed(say, "Problem", [*report.problems, *_unanswered(report)], verbose)
    counts = ", ".join(f"{n} {word}" for word, n in _counts(report) if n)
    used = f"{report.seconds:.1f} s, peak memory {report.peak_rss_mb:.0f} MB"
    say(f"{report.total} cases: {counts or 'none begun'}. {used}. Masks are in {report.output}")
    if report.missing:
        listed = ", ".join(report.missing if verbose else report.missing[:_SHOWN_LINES])
        more = " ..." if len(report.missing) > _SHOWN_LINES and not verbose else ""
        say(f"Not done yet, over all parts ({len(report.missing)}): {listed}{more}")
    if report.interrupted:
        say(f"Stopped by {signal or 'a signal'} with {len(report.not_started)} cases left. Run the same command again to continue.")


def _unanswered(report: RunReport) -> list[str]:
    """A line for each request that failed in a case that did not fail as a whole."""
    return [
        f"{result.case}, request {request.get('id')}: {request.get('message')}"
        for result in report.results
        if result.status == "partial" or (result.status == "failed" and not result.error)
        for request in result.record.get("requests", [])
        if request.get("status") in ("failed", "fault", "unsupported")
    ]


def _counts(report: RunReport) -> list[tuple[str, int]]:
    words = {"done": "done", "skipped": "were done before", "partial": "done in part", "failed": "failed"}
    return [*((word, report.count(status)) for status, word in words.items()), ("not started", len(report.not_started))]


def _listed(say: Any, word: str, lines: Any, verbose: bool) -> None:
    shown = lines if verbose else lines[:_SHOWN_LINES]
    for line in shown:
        say(f"{word}: {line}")
    if len(lines) > len(shown):
        say(f"{word}: and {len(lines) - len(shown)} more (--verbose lists them)")


def _table(say: Any, report: RunReport, verbose: bool) -> None:
    """Case, request, answer, status, mL, file."""
    rows: list[tuple[str, ...]] = []
    looked = 0
    for result in report.results:
        if len(rows) >= _SHOWN_ROWS and not verbose:
            break
        looked += 1
        for request in result.record.get("requests", []):
            ml = request.get("volume_ml")
            rows.append(
                (
                    result.case,
                    _short(request.get("text", ""), 36),
                    _short(request.get("target_answered") or "-", 30),
                    request.get("status", ""),
                    "-" if ml is None else f"{ml:.2f}",
                    request.get("file") or "-",
                )
            )
    if not rows:
        return
    heads = ("case", "request", "answer", "status", "mL", "file")
    shown = rows if verbose else rows[:_SHOWN_ROWS]
    widths = [max(len(row[i]) for row in (heads, *shown)) for i in range(len(heads))]
    for row in (heads, *shown):
        cells = [cell.rjust(width) if i == 4 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        say("  ".join(cells).rstrip())
    cut = len(rows) - len(shown)
    unread = len(report.results) - looked
    if cut or unread:
        more = [f"{cut} more rows"] if cut else []
        more += [f"the rows of {unread} more cases"] if unread else []
        say(f"... and {' and '.join(more)} (--verbose lists them)")


def _short(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
