"""seerseg_evolve: rounds of SEER-Loop on a dataset and fold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import Progress, command, device_option, folder_options, json_option, licence_option, option, print_json
from seerseg.cli.slurm_options import slurm_options

if TYPE_CHECKING:
    from seerseg.dataset import RawDataset, Request, Splits
    from seerseg.evolution.loop import Round, SeerLoop
    from seerseg.evolution.writer import LessonWriter
    from seerseg.planning import Plans
    from seerseg.segmenters.base import Segmenter

MODES = ("frozen", "transductive")
ACCEPT_IN = ("val", "own")
MASKS = "masks"


@command("seerseg_evolve", epilog="Examples: seerseg_evolve 4 0 --rounds 3 | seerseg_evolve 4 0 -m MODEL | seerseg_predict ... --bank DIR")
@click.argument("dataset", metavar="DATASET")
@click.argument("fold", type=int, metavar="FOLD")
@option("-m", "--model_folder", metavar="DIR", help="A trained model; its bank is evolved, in DIR/bank, and used from then on.")
@option("--reasoner", metavar="NAME", help="Name, name:source or folder. Default: the model's, else cascade.")
@option("--segmenter", metavar="NAME", help="Name, name:source or folder. Default: the model's, else nano.")
@option("--protocol", metavar="NAME", help="Dialogue grammar. Default: the model's, else seer.")
@option("-o", "--bank", "folder", metavar="DIR", help="The bank. Default: in the model's folder, else in the results folder.")
@option("-p", "--plans_name", default="plans", metavar="NAME", help="Name of the plans file, without .json.")
@option("--rounds", type=click.IntRange(1), default=3, help="Rounds in all; those that the bank holds are not done again.")
@option("--per_round", type=click.IntRange(1), default=400, help="Training requests of a round, whole paraphrase sets.")
@option("--bench", type=click.IntRange(3), default=1000, help="Bank requests of a round that skills are judged on, spread over targets.")
@option("--candidates", type=click.IntRange(1), default=60, help="Skills that a round tests at most, those that promise most first.")
@option("--tests", type=click.IntRange(3), default=24, help="Bank requests that a skill is tried on at most.")
@option("--max_minutes", type=click.FloatRange(0, min_open=True), metavar="M", help="End with what is done by then. Default: no limit.")
@option(
    "--accept_in",
    type=click.Choice(ACCEPT_IN),
    default="val",
    help="Bank requests to try skills on: val: also in validation language, made where there are none; own: those of requests.jsonl.",
)
@option("--mode", type=click.Choice(MODES), default="frozen", help="transductive: SEER's released loop, on test cases with test labels.")
@option(
    "--vocabulary",
    "vocabulary_splits",
    type=click.Choice(["all", "train"]),
    default="all",
    help="Words that the lexicon knows: in experiments, train.",
)
@option("--writer", metavar="SOURCE", help="Language model that words the skills: transformers folder, .gguf file or URL of an endpoint.")
@option("--writer_model", metavar="NAME", help="With the URL of an endpoint: the model there. Its key is read from SEERSEG_WRITER_KEY.")
@option("--encoder", metavar="DIR", help="Sentence encoder for retrieval, a transformers folder. Default: words and subwords alone.")
@option("--seed", type=int, default=1234, help="Equal seeds give equal rounds.")
@option("--num_parts", type=click.IntRange(1), default=1, envvar="SEERSEG_NUM_PARTS", metavar="N", help="Share a round's episodes ...")
@option("--part_id", type=click.IntRange(0), default=0, envvar="SEERSEG_PART_ID", metavar="I", help="... only run part I of them, from 0.")
@device_option
@licence_option
@folder_options("raw", "preprocessed", "results")
@json_option
@slurm_options("seerseg.cli.evolve", last=(), rounds="rounds", watched=lambda given: _watched(given))
def evolve(**given: Any) -> None:
    """Evolve a skill bank: learn on training cases, accept on bank cases, never look at validation and test.

    Needs what seerseg_plan_and_preprocess and seerseg_make_requests made. With --num_parts the parts run the episodes of the next round
    side by side; run the command once more without it to finish the round.
    """
    from seerseg.errors import UsageError

    if given["part_id"] >= given["num_parts"]:
        raise UsageError(f"--part_id {given['part_id']} does not exist: parts of --num_parts {given['num_parts']} count from 0.")
    made, folder = _loop(given)
    if given["num_parts"] > 1:
        count = _run_part(made, given["num_parts"], given["part_id"])
        click.echo(f"Part {given['part_id']} of {given['num_parts']}: {count} episodes are kept in {folder}.", err=given["as_json"])
        return
    rounds = made.run(lambda r: _say(r, given["as_json"]))
    named = _name_in_manifest(folder, given)
    wording = _told(made)
    if wording:
        refused = ", ".join(f"{count} {why}" for why, count in wording["refused"].items())
        said = f"{wording['writer']} worded {wording['kept']} skills; the rule's words were kept for {refused or 'none'}."
        click.echo(said, err=given["as_json"])
    if given["as_json"]:
        more = {"wording": wording} if wording else {}
        print_json({"bank": str(folder), "mode": given["mode"], "rounds": [r.to_json() for r in rounds], **more})
    elif not rounds:
        click.echo(f"The bank {folder} already holds {given['rounds']} rounds; ask for more with --rounds.")
    elif named:
        found = f" --encoder {given['encoder']}" if given["encoder"] else ""
        click.echo(f"The bank is part of the model in {folder.parent}: seerseg_predict -m {folder.parent}{found} (without it: --bank none)")
    else:
        click.echo(f"The bank is in {folder}. Use it with seerseg_predict --bank {folder}")


def _name_in_manifest(folder: Path, given: dict[str, Any]) -> bool:
    """Have the model in whose folder the bank lies use it; not one that was evolved with other parts or in another mode."""
    from dataclasses import replace

    from seerseg.model import BANK, MANIFEST, read_spec, write_spec

    home, replaced = folder.parent, [given[part] for part in ("reasoner", "segmenter", "protocol") if given[part]]
    if given["mode"] != "frozen" or folder.name != BANK or replaced or not (home / MANIFEST).is_file():
        return False
    spec = read_spec(home)
    if spec.bank != given["mode"]:
        write_spec(home, replace(spec, bank=given["mode"]))
    return True


def _say(done: Round, as_json: bool) -> None:
    click.echo(
        f"Round {done.number}: {done.requests} requests, mean Dice {done.mean_plain:.3f} without and {done.mean_with:.3f} with the bank "
        f"({done.helped} helped, {done.hurt} hurt); {done.proposed} proposed, {done.tested} tested, {done.accepted} accepted, "
        f"{done.refused} refused, {done.left} not tested, {done.retired} retired; {done.skills} skills.",
        err=as_json,
    )


def _run_part(loop: SeerLoop, parts: int, part: int) -> int:
    """The episodes of the next round that are this part's: whole cases, by name."""
    from seerseg.skills.base import EmptyBank

    finished = sum(h.message.startswith("round ") for h in loop.bank.history())
    if finished >= loop.settings.rounds:
        return 0
    _, frozen, chosen = loop.prepare(finished + 1)
    cases = sorted({r.case for r in chosen})[part::parts]
    mine = [r for r in chosen if r.case in set(cases)]
    for bank in (EmptyBank(), frozen):
        loop.arena.run(mine, bank)
    return len(mine)


def _loop(given: dict[str, Any]) -> tuple[SeerLoop, Path]:
    from seerseg.dataset import open_dataset
    from seerseg.errors import RequestError
    from seerseg.evolution.arena import StoreArena
    from seerseg.evolution.loop import EvolveSettings, SeerLoop
    from seerseg.model import DEFAULT_PROTOCOL, Model, ModelSpec, read_spec
    from seerseg.paths import preprocessed_folder, raw_folder, resolve_dataset
    from seerseg.planning import load_plans
    from seerseg.protocols import load_protocol
    from seerseg.protocols.base import ABSENT
    from seerseg.reasoners import load_reasoner
    from seerseg.skills.fence import Fence
    from seerseg.skills.store import BankFolder
    from seerseg.training.settings import views_of
    from seerseg.vocabulary import Vocabulary

    raw, stored = raw_folder(given["raw_folder"]), preprocessed_folder(given["preprocessed_folder"])
    name = resolve_dataset(given["dataset"], raw)
    dataset = open_dataset(raw / name)
    if not dataset.requests:
        raise RequestError(f"{dataset.folder} holds no requests.jsonl. Make it with seerseg_make_requests -d {given['dataset']}.")
    splits = _splits(dataset, stored / name)
    training, testing, held = _parts(dataset, splits, given["fold"], given["mode"])
    plans = load_plans(stored / name / f"{given['plans_name']}.json")
    spec = (
        read_spec(Path(given["model_folder"]))
        if given["model_folder"]
        else ModelSpec(
            views=views_of(plans, load_protocol(given["protocol"] or DEFAULT_PROTOCOL)),
            targets=tuple(dataset.canonical(label) for label in dataset.labels),
            closed=True,
            descriptions=dataset.descriptions or None,
        )
    )
    vocabulary = Vocabulary.load().only(("train",)) if given["vocabulary_splits"] == "train" else Vocabulary.load()
    model = _model(spec, given)
    folder = _bank_folder(given, name, model.spec)
    BankFolder(folder).declare(given["mode"])
    progress = _Shown()
    memos = sorted(folder.glob("memo*.jsonl"))
    suffix = f"_part{given['part_id']}" if given["num_parts"] > 1 else ""
    model.segmenter = _keeping(model.segmenter, folder / MASKS)
    words = Model(model.spec, reasoner_given=load_reasoner("verbatim"), segmenter_given=model.segmenter)
    arena = StoreArena(dataset, stored / name, model, memo=folder / f"memo{suffix}.jsonl", read_also=memos, progress=progress.step)
    verbatim = StoreArena(dataset, stored / name, words, memo=folder / f"memo_raw{suffix}.jsonl", read_also=memos)

    def truth_of(request: Request) -> str:
        return ABSENT if request.target is None else " and ".join(dataset.canonical(label) for label in request.target)

    if given["mode"] == "frozen" and given["accept_in"] == "val":
        testing = [*testing, *_in_validation_language(dataset, splits, given["fold"], plans, testing)]
    everything = [*dataset.requests, *testing]
    unseen = _held_out_words(dataset) if given["vocabulary_splits"] == "train" else ()
    made = SeerLoop(
        arena=arena,
        raw=verbatim,
        training=training,
        testing=testing,
        bank=BankFolder(folder),
        vocabulary=vocabulary,
        truth_of=truth_of,
        modality_of=arena.modality,
        settings=EvolveSettings(
            **{name: given[name] for name in ("rounds", "per_round", "bench", "candidates", "tests", "seed")}, minutes=given["max_minutes"]
        ),
        fence=Fence.around(held, everything, everything, unseen) if given["mode"] == "frozen" else None,
        names=model.targets.names if model.targets.closed else (),
    )
    if given["writer"]:
        made.writer = _writer(given, model.targets.names, made.fence)
    if given["encoder"]:
        from seerseg.skills.encoder import SentenceEncoder

        made.encoder = SentenceEncoder(Path(given["encoder"]), device=model.device)
    return made, folder


def _keeping(segmenter: Segmenter, folder: Path) -> Segmenter:
    """The segmenter, whose masks are kept in memory and in a folder."""
    from seerseg.evolution.masks import KeptMasks
    from seerseg.segmenters.cache import CachedSegmenter

    return CachedSegmenter(KeptMasks(segmenter.wrapped if isinstance(segmenter, CachedSegmenter) else segmenter, folder))


def _in_validation_language(dataset: RawDataset, splits: Splits, fold: int, plans: Plans, own: list[Request]) -> list[Request]:
    """Requests of the bank cases in validation language, by the plan, for cases that `own` holds none of."""
    from dataclasses import replace

    from seerseg_data.requests.generate import Settings, make

    asked = {r.case for r in own if r.language_split == "val"}
    bank = tuple(case for case in splits.folds[fold].bank if case not in asked)
    if not bank:
        return []
    alone = replace(splits, test=(), folds=(replace(splits.folds[fold], train=(), val=(), bank=bank),))
    labelled = {case: files for case, files in dataset.cases.items() if case in bank}
    some = replace(dataset, cases=labelled, test_cases={})
    return make(some, splits=alone, settings=Settings.from_plans(plans, language="val")).requests


def _held_out_words(dataset: RawDataset) -> list[str]:
    """Words of validation and test language for the dataset's targets."""
    from seerseg.vocabulary import Vocabulary

    entries = [Vocabulary.load().resolve(dataset.canonical(label)) for label in dataset.labels]
    return [text for entry in entries if entry is not None for text in entry.texts(splits=("val", "test"))]


def _told(made: SeerLoop) -> dict[str, Any]:
    """What became of a language model's wordings."""
    from seerseg.evolution.writer import LessonWriter

    return made.writer.told() if isinstance(made.writer, LessonWriter) else {}


def _writer(given: dict[str, Any], names: tuple[str, ...], fence: Any) -> LessonWriter:
    """The language model that words candidates."""
    from seerseg.evolution.writer import ASK, LABEL, LessonWriter
    from seerseg_data.requests.writer import load_writer

    made = load_writer(given["writer"], model=given["writer_model"], ask=ASK, label=LABEL)
    return LessonWriter(made.name, made.rewrite, names, fence, given["seed"])


def _model(spec: Any, given: dict[str, Any]) -> Any:
    """The reasoner of the model; the lexicon, alone or as a member, with the vocabulary it may know."""
    from dataclasses import replace

    from seerseg.model import Model, resolve_device
    from seerseg.reasoners import has_rules, load_reasoner

    changes = {part: given[part] for part in ("reasoner", "segmenter", "protocol") if given[part]}
    spec = replace(spec, **changes, **({"segmenter_identity": None} if given["segmenter"] else {}))
    device = resolve_device(given["device"])
    settings: dict[str, Any] = {}
    if has_rules(spec.reasoner):
        settings = {"descriptions": spec.descriptions} if spec.descriptions else {}
        if given["vocabulary_splits"] == "train":
            settings["splits"] = ["train"]
    reasoner = load_reasoner(spec.reasoner, device=device, **settings)
    return Model(spec, device=device, accept_license=given["accept_license"], reasoner_given=reasoner)


def _splits(dataset: RawDataset, folder: Path) -> Splits:
    from seerseg.dataset import load_or_make_splits

    return load_or_make_splits(dataset, folder)


def _parts(dataset: RawDataset, splits: Splits, fold: int, mode: str) -> tuple[list[Request], list[Request], set[str]]:
    """Requests to learn from, requests to accept on, and cases that are held out."""
    from seerseg.errors import UsageError

    if not 0 <= fold < len(splits.folds):
        raise UsageError(f"There is no fold {fold}: the splits of {dataset.name} have folds 0 to {len(splits.folds) - 1}.")
    chosen = splits.folds[fold]
    if mode == "transductive":
        test = set(splits.test)
        both = [r for r in dataset.requests if r.case in test and r.has_target]
        return both, both, set()
    known = [r for r in dataset.requests if r.has_target]
    train, bank = set(chosen.train), set(chosen.bank)
    return [r for r in known if r.case in train], [r for r in known if r.case in bank], {*splits.test, *chosen.val, *bank}


def _watched(given: dict[str, Any]) -> list[Path]:
    """The files that keep episodes."""
    from dataclasses import replace

    from seerseg.model import ModelSpec
    from seerseg.paths import raw_folder, resolve_dataset
    from seerseg.slurm import PART

    spec = replace(ModelSpec(), **{part: given[part] for part in ("reasoner", "segmenter", "protocol") if given[part]})
    folder = _bank_folder(given, resolve_dataset(given["dataset"], raw_folder(given["raw_folder"])), spec)
    suffix = f"_part{PART}" if given["num_parts"] > 1 else ""
    return [folder / f"memo{suffix}.jsonl", folder / f"memo_raw{suffix}.jsonl"]


def _bank_folder(given: dict[str, Any], name: str, spec: Any) -> Path:
    from seerseg.model import BANK, run_name
    from seerseg.paths import results_folder

    last = BANK if given["mode"] == "frozen" else f"{BANK}_{given['mode']}"
    if given["folder"]:
        return Path(given["folder"]).expanduser()
    if given["model_folder"]:
        return Path(given["model_folder"]) / last
    run = run_name(given["plans_name"], spec.protocol, spec.reasoner, spec.segmenter)
    return results_folder(given["results_folder"]) / name / run / f"fold_{given['fold']}" / last


class _Shown:
    """Progress of each call of the arena."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def step(self, done: int, total: int) -> None:
        """So many of these requests are done."""
        if self._bar is None or self._bar.total != total:
            self._bar = Progress(total, "Requests")
        self._bar.step(max(0, done - self._bar.done))
