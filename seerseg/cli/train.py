"""seerseg_train: teach a reasoner, on traces (sft) or by reward (grpo)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seerseg.cli.options import command, device_option, folder_options, json_option, licence_option, option, print_json
from seerseg.cli.slurm_options import slurm_options

if TYPE_CHECKING:
    from seerseg.reasoners.vlm_loading import Source
    from seerseg.rewards import RewardConfig
    from seerseg.skills.fence import LiveBank
    from seerseg.skills.retrieval import FrozenBank
    from seerseg.training.callbacks import Outside
    from seerseg.training.data import Ground
    from seerseg.training.lessons import Lessons
    from seerseg.training.memory import Estimate
    from seerseg.training.runs import Checkpoint, RunFolder
    from seerseg.training.settings import TrainSettings

_EDITS = {  # option -> plan value; {stage} is filled in
    "epochs": "{stage}.epochs",
    "batch": "sft.batch",
    "lora_rank": "lora.rank",
    "seed": "training.seed",
    "paraphrases": "paraphrases.count",
    "samples": "grpo.samples",
    "weight_of_variance": "grpo.lambda",
}


@command(
    "seerseg_train",
    epilog="Examples: seerseg_train 4 0 --stage sft --reasoner Qwen/Qwen3-VL-4B-Instruct | seerseg_train 4 0 --stage grpo -c | "
    "several GPUs: torchrun --nproc_per_node 4 -m seerseg.cli.train 4 0 --stage sft. Exit code 75: stopped by a signal, go on with -c.",
)
@click.argument("dataset", metavar="DATASET")
@click.argument("fold", metavar="FOLD")
@option("--stage", type=click.Choice(["sft", "grpo"]), default="sft", help="sft: on traces. grpo: by reward, after sft.")
@option("-p", "--plans", default="plans", metavar="NAME", help="Plans of the dataset.")
@option("--protocol", default="seer", metavar="NAME", help="Dialogue grammar.")
@option("--reasoner", metavar="NAME", help="Vision-language model: name, folder or hub id. Default: nano.")
@option("--segmenter", default="nano", metavar="NAME", help="Frozen segmenter: name, name:source or folder.")
@option("--traces", metavar="FILE", help="Traces. Default: traces.jsonl beside the plans.")
@option("--bank", metavar="DIR", help="Skill bank: a share of the samples (sft), every request as the bank stands at each step (grpo).")
@option("--encoder", metavar="DIR", help="Sentence encoder: the bank's skills are found by meaning too, as in seerseg_evolve and predict.")
@option("--reward", metavar="NAME", help="Reward (grpo): a preset, or a JSON file of terms and weights. Default: the protocol's.")
@option("-c", "--c", "--continue", "resume", is_flag=True, help="Continue the run where its last checkpoint is; begin it if there is none.")
@option("--overwrite", is_flag=True, help="Begin anew; what the stage has made so far is lost.")
@option("--plan_only", is_flag=True, help="Say what would be done and how much memory it takes; do nothing.")
@option("--explain", is_flag=True, help="Print the plan's values with their rules before anything else.")
@option("--progress", is_flag=True, help="Draw progress.png of the run again, say where it stands, and do nothing else.")
@option("--max_minutes", type=click.FloatRange(0, min_open=True), metavar="M", help="Stop in order after M minutes; -c goes on later.")
@option("--steps", type=click.IntRange(1), metavar="N", help="Updates in all.")
@option("--epochs", type=click.FloatRange(0, min_open=True), metavar="N", help="Passes over the training data.")
@option("--lr", type=click.FloatRange(0), metavar="RATE", help="Peak learning rate.")
@option("--batch", type=click.IntRange(1), metavar="N", help="Samples per update (sft).")
@option("--micro_batch", type=click.IntRange(1), metavar="N", help="Samples at a time; changes speed and memory, not results.")
@option("--tuning", type=click.Choice(["lora", "full"]), help="Adapters, or the whole model.")
@option("--lora_rank", type=click.IntRange(1), metavar="R", help="Rank of the adapters.")
@option("--paraphrases", type=click.IntRange(1), metavar="K", help="Wordings in a group (grpo).")
@option("--samples", type=click.IntRange(1), metavar="M", help="Replies to each wording (grpo).")
@option("--lambda", "weight_of_variance", type=click.FloatRange(0, 0.5), metavar="L", help="Weight of the variance over wordings (grpo).")
@option("--max_new_tokens", type=click.IntRange(1), metavar="N", help="Longest reply.")
@option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Numbers of computation. Default: what suits the device.")
@option("--seed", type=click.IntRange(0), metavar="N", help="Seed of everything that is drawn.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Any value of the plan; may be repeated.")
@device_option
@option("--offline/--online", default=True, help="Never / if needed fetch models from a hub.")
@licence_option
@folder_options("raw", "preprocessed", "results")
@json_option
@slurm_options("seerseg.cli.train", again=("-c",), watched=lambda given: _watched(given), distributed=True, interrupts=False)
def train(**given: Any) -> None:
    """Teach a reasoner on one fold of a dataset; the run's folder is then a model for seerseg_predict."""
    job = _Job.of(given)
    if given["explain"] and not given["as_json"]:
        click.echo(job.plans.explain(_width()))
    if given["progress"]:
        _show_progress(job.run, as_json=given["as_json"])
        return
    settings, estimate, samples = job.settle(given)
    if given["plan_only"]:
        _show_plan(job, settings, estimate, samples, as_json=given["as_json"])
        return
    _train(job, settings, samples, given)


@dataclass(eq=False)
class _Job:
    """What a command line means."""

    plans: Any
    ground: Ground
    run: RunFolder
    source: Source
    reasoner: str
    segmenter: str
    device: str
    processes: int
    rank: int
    bank: FrozenBank | LiveBank | None = None
    reward: RewardConfig | None = None
    lessons: Lessons | None = None
    encoder: str | None = None

    @staticmethod
    def of(given: dict[str, Any]) -> _Job:
        """Find everything that is named; faults are told before anything heavy is loaded."""
        from seerseg.errors import UsageError
        from seerseg.paths import preprocessed_folder, raw_folder, resolve_dataset, results_folder
        from seerseg.protocols import load_protocol
        from seerseg.training.data import open_ground
        from seerseg.training.runs import open_run
        from seerseg.training.settings import plans_for

        if given["resume"] and given["overwrite"]:
            raise UsageError("-c continues a run and --overwrite begins it anew: give one of them.")
        fold = _fold(given["fold"])
        raw, results = raw_folder(given["raw_folder"]), results_folder(given["results_folder"])
        name = resolve_dataset(given["dataset"], raw)
        folder = preprocessed_folder(given["preprocessed_folder"]) / name
        protocol = load_protocol(given["protocol"])
        device = _device(given["device"])  # first: it decides which GPUs are seen
        plans = plans_for(folder, given["plans"], _edits(given))
        ground = open_ground(raw / name, folder, fold, plans, protocol, Path(given["traces"]) if given["traces"] else None)
        reasoner = _reasoner(given["reasoner"])
        run = open_run(
            results,
            name,
            fold,
            given["stage"],
            plans=given["plans"],
            protocol=protocol.name,
            reasoner=reasoner,
            segmenter=given["segmenter"],
        )
        source = _source(run, reasoner, offline=given["offline"])
        processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        job = _Job(plans, ground, run, source, reasoner, given["segmenter"], device, processes, rank)
        job.reward = _reward(given, ground.protocol.name)
        if given["encoder"] and not given["bank"]:
            raise UsageError("--encoder finds skills of a bank: name the bank with --bank.")
        if given["bank"]:
            job.take_bank(Path(given["bank"]).expanduser(), given["encoder"], resume=given["resume"])
        return job

    def take_bank(self, folder: Path, named: str | None, *, resume: bool) -> None:
        """Open the bank and check that it may be learnt from: frozen for sft, live for grpo. named: the folder of a sentence encoder."""
        from seerseg.paths import read_json
        from seerseg.training.lessons import Lessons, open_frozen, training_fence

        encoder = None
        if named is not None:
            from seerseg.skills.encoder import Remembered, SentenceEncoder

            encoder = Remembered(SentenceEncoder(Path(named)))
            self.encoder = str(encoder.identity)
        if self.run.stage == "grpo":
            from seerseg.skills.fence import LiveBank

            self.bank = LiveBank(folder, fence=training_fence(self.ground), encoder=encoder)
            return
        before = read_json(self.run.sources) if resume and self.run.latest is not None and self.run.sources.is_file() else {}
        version = before.get("bank") if before.get("bank") != "none" else None
        self.bank, skills = open_frozen(folder, self.ground, version=version, encoder=encoder)
        self.lessons = Lessons.planned(self.bank, skills, self.plans, self.ground.targets.names)

    @property
    def bank_source(self) -> str:
        """What a run that is continued must find the same: of a bank that is watched, where it began."""
        from seerseg.skills.fence import LiveBank

        return "none" if self.bank is None else f"live, begun as {self.bank.root}" if isinstance(self.bank, LiveBank) else self.bank.version

    def _samples(self, stage: str, *, brief: bool) -> Any:
        """What there is to learn on: `train` and `val`; brief: traces as small reasoners learn them."""
        if brief and self.ground.rows is not None:
            self.ground = replace(self.ground, rows=tuple(row.spoken(brief=True) for row in self.ground.rows))
        if brief and self.lessons is not None:
            self.lessons = replace(self.lessons, numbered=True)
        if stage == "sft":
            from seerseg.training.data import read_samples
            from seerseg.training.tuning import goes_on

            return read_samples(self.ground, self.lessons, whole=self.ground.protocol.max_turns > 1 and goes_on(self.source))
        from seerseg.training.grpo import training_sets

        return training_sets(self.ground)

    def settle(self, given: dict[str, Any]) -> tuple[TrainSettings, Estimate, Any]:
        """Settings for what there is to learn and for this machine's memory."""
        from seerseg.planning import hardware
        from seerseg.training.memory import estimate, fitting, shared_by
        from seerseg.training.settings import SMALL_PARAMETERS, settings_from
        from seerseg.training.tuning import shape_of

        shape = shape_of(self.source)
        stage = given["stage"]
        samples: Any = self._samples(stage, brief=shape.parameters < SMALL_PARAMETERS)
        settings = settings_from(
            self.plans,
            stage,
            parameters=shape.parameters,
            units=len(samples.train),
            processes=self.processes,
            tuning=given["tuning"] or ("lora" if self.source.adapter is not None else None),
            steps=given["steps"],
            max_new_tokens=given["max_new_tokens"],
            micro_batch=given["micro_batch"],
            learning_rate=given["lr"],
            dtype=given["dtype"] or ("float32" if self.device == "cpu" else None),
            protocol=self.ground.protocol,
        )
        shares = shared_by(self.processes)
        if not given["micro_batch"]:
            settings = fitting(settings, shape, self.ground.spec, _memory_bytes(self.device, hardware()), shares=shares)
        return settings, estimate(settings, shape, self.ground.spec, shares=shares), samples


def _train(job: _Job, settings: TrainSettings, samples: Any, given: dict[str, Any]) -> None:
    from seerseg.errors import InterruptedRunError
    from seerseg.prediction import StopOnSignals
    from seerseg.segmenters import load_segmenter
    from seerseg.segmenters.cache import CachedSegmenter
    from seerseg.training.tuning import export

    latest = _begin(job, settings, given)
    if job.run.finished and job.run.model.is_dir():
        click.echo(f"{job.run.folder} is done: {settings.steps} of {settings.steps} updates. The model is in {job.run.root}")
        return
    loaded = load_segmenter(job.segmenter, device=job.device, offline=given["offline"], accept_license=given["accept_license"])
    segmenter = CachedSegmenter(loaded)
    with StopOnSignals() as stop:
        outside = _outside(job, stop, given["max_minutes"])
        more = {"bank": job.bank, "reward": job.reward} if job.run.stage == "grpo" else {}
        ended = _stage(given["stage"])(
            job.run, job.ground, samples, settings, job.source, segmenter, resume_from=latest, outside=outside, device=job.device, **more
        )
    if job.rank:
        return
    if ended.best is not None:
        names = {"reasoner": job.reasoner, "segmenter": job.segmenter, "segmenter_identity": segmenter.card.identity}
        export(job.run, ended.best, job.source, job.ground, **names)
    step = f"step {ended.step} of {settings.steps}"
    if ended.how == "signal":
        raise InterruptedRunError(f"Stopped by {stop.received or 'a signal'} at {step}; everything is saved. Run the same command with -c.")
    outside.say(f"{'Done' if ended.how == 'done' else 'Out of time'} at {step}. The model is in {job.run.root}")
    outside.say(f"Predict with it: seerseg_predict -m {job.run.root} -i IMAGES -o OUTPUT --prompt TEXT")


def _reward(given: dict[str, Any], protocol: str) -> RewardConfig | None:
    """The reward that is named, with --lambda in its stability penalty; None for the protocol's own."""
    from dataclasses import replace

    from seerseg.errors import PlanError, UsageError
    from seerseg.paths import read_json
    from seerseg.rewards import RewardConfig

    name = given["reward"]
    if name is None:
        return None
    if given["stage"] != "grpo":
        raise UsageError("--reward belongs to --stage grpo: sft learns from traces.")
    path = Path(name).expanduser()
    made = RewardConfig.from_json(read_json(path, PlanError) if path.suffix == ".json" else name)
    weight = given["weight_of_variance"]
    if weight is None or made.stability is None:
        return made
    return replace(made, stability=replace(made.stability, lam=weight))


def _stage(name: str) -> Any:
    if name == "sft":
        from seerseg.training.sft import train_sft

        return train_sft
    from seerseg.training.grpo import train_grpo

    return train_grpo


def _begin(job: _Job, settings: TrainSettings, given: dict[str, Any]) -> Checkpoint | None:
    """Make the run's folder ready, once for all processes."""
    import hashlib
    import json

    from seerseg.reasoners.vlm_loading import identity

    data = job.ground.traces if job.run.stage == "sft" else job.ground.dataset.folder / "requests.jsonl"
    sources = {
        "plans": job.plans.identity,
        "protocol": job.ground.protocol.name,
        "base model": identity(job.source),
        "bank": job.bank_source,
        **({"encoder": job.encoder or "none"} if job.bank is not None else {}),
        **({"reward": json.dumps(job.reward.to_json(), sort_keys=True)} if job.reward is not None else {}),
        data.stem: hashlib.blake2b(data.read_bytes(), digest_size=16).hexdigest(),
    }
    if job.processes == 1:
        return job.run.begin(settings, sources, resume=given["resume"], overwrite=given["overwrite"])
    from accelerate import PartialState  # type: ignore[import-not-found,import-untyped,unused-ignore]

    state = PartialState(cpu=job.device == "cpu")
    if job.rank == 0:
        job.run.begin(settings, sources, resume=given["resume"], overwrite=given["overwrite"])
    state.wait_for_everyone()
    return job.run.latest


def _outside(job: _Job, stop: Any, max_minutes: float | None) -> Outside:
    import math

    from seerseg.report import plot_progress
    from seerseg.training.callbacks import Outside

    def say(line: str) -> None:
        if job.rank == 0:
            job.run.say(line)
            click.echo(line)

    return Outside(stop=stop, max_minutes=max_minutes or math.inf, say=say, draw=plot_progress)


def _watched(given: dict[str, Any]) -> list[Path]:
    """The checkpoints of the run."""
    from seerseg.paths import raw_folder, resolve_dataset, results_folder
    from seerseg.protocols import load_protocol
    from seerseg.training.runs import open_run

    run = open_run(
        results_folder(given["results_folder"]),
        resolve_dataset(given["dataset"], raw_folder(given["raw_folder"])),
        _fold(given["fold"]),
        given["stage"],
        plans=given["plans"],
        protocol=load_protocol(given["protocol"]).name,
        reasoner=_reasoner(given["reasoner"]),
        segmenter=given["segmenter"],
    )
    return [run.checkpoints]


def _edits(given: dict[str, Any]) -> dict[str, Any]:
    from seerseg.errors import UsageError
    from seerseg.training.settings import read_edits

    said = {}
    for text in given["sets"]:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {text!r} is no NAME=VALUE, as in --set views.count=4.")
        said[name.strip()] = value.strip()
    edits = read_edits(said)
    for name, value in _EDITS.items():
        if given[name] is not None:
            edits[value.format(stage=given["stage"])] = given[name]
    return edits


def _fold(text: str) -> int:
    from seerseg.errors import UsageError

    if not text.isdigit():
        raise UsageError(f"FOLD must be a number, not {text!r}. splits.json, beside the plans, lists the folds.")
    return int(text)


def _reasoner(name: str | None) -> str:
    from seerseg.errors import UsageError
    from seerseg.reasoners import available_reasoners

    if name is None and "nano" not in available_reasoners():
        raise UsageError("Say which reasoner to train with --reasoner: a folder, or a hub id such as Qwen/Qwen3-VL-4B-Instruct.")
    return name or "nano"


def _source(run: RunFolder, reasoner: str, *, offline: bool) -> Source:
    """What the stage begins with: the reasoner that is named, or for grpo what sft made of it in the same run."""
    from seerseg.training.runs import RunFolder
    from seerseg.training.tuning import source_of

    before = RunFolder(run.root, "sft").model
    return source_of(str(before) if run.stage == "grpo" and before.is_dir() else reasoner, offline=offline)


def _device(name: str) -> str:
    """The device, with one GPU visible where no launcher gave this process its own: stock trainers would take them all."""
    from seerseg.model import resolve_device

    kind, _, index = name.partition(":")
    if "LOCAL_RANK" in os.environ:
        return resolve_device("cpu" if kind == "cpu" else "auto").partition(":")[0]
    if kind in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = visible.split(",") if visible else None
        place = int(index or 0) if (index or "0").isdigit() else 0
        if listed is None or place < len(listed):
            os.environ["CUDA_VISIBLE_DEVICES"] = listed[place] if listed else str(place)
            name = kind
    return resolve_device(name)


def _memory_bytes(device: str, machine: Any) -> int:
    """What one process may use: its GPU's memory, or the machine's."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(machine.ram_bytes)


def _width() -> int:
    import shutil

    return max(80, shutil.get_terminal_size((110, 24)).columns)


def _show_plan(job: _Job, settings: TrainSettings, found: Estimate, samples: Any, *, as_json: bool) -> None:
    """What would be done, and what it takes."""
    from seerseg.planning import hardware

    available = _memory_bytes(job.device, hardware())
    if as_json:
        print_json(
            {
                "schema": 1,
                "run": str(job.run.folder),
                "settings": settings.to_json(),
                "memory": {"parts_bytes": found.parts, "total_bytes": found.total, "available_bytes": available},
                "tokens": found.tokens,
                "learning_parameters": found.learning,
            }
        )
        return
    for line in _described(job, settings, found, samples, available):
        click.echo(line)


def _described(job: _Job, settings: TrainSettings, found: Estimate, samples: Any, available: int) -> list[str]:
    from seerseg.skills.fence import LiveBank
    from seerseg.training.grpo import reward_for

    spec = job.ground.spec
    kind = f"adapters of rank {settings.lora_rank}" if settings.tuning == "lora" else "the whole model"
    cut = f"{settings.processes} process(es) x {settings.micro_batch} at a time x {settings.accumulation} passes"
    lines = [
        f"Run       {job.run.folder}",
        f"Reasoner  {job.source.name}: {kind}, {found.learning / 1e6:.2f} million parameters learn, {settings.dtype} on {job.device}",
        f"Shown     {spec.count} {spec.plane} slices of {spec.size_px} px: {found.image_tokens} image tokens of about {found.tokens}",
        f"Steps     {settings.steps} updates of {settings.batch} = {cut}; {settings.epochs:.2g} passes over the data",
        f"Rate      up to {settings.learning_rate:g} after {settings.warmup_steps} updates, then {settings.schedule}",
    ]
    if settings.stage == "sft":
        lines.append(f"Samples   {len(samples.train)} to learn, {len(samples.val)} to validate on")
        if samples.dealt:
            lines.append("Skills    " + ", ".join(f"{kind} {count}" for kind, count in samples.dealt.items()) + " of the training traces")
        lines += [f"Left out  {count} traces: {reason}" for reason, count in samples.left_out.items()]
    else:
        group = f"{settings.paraphrases} wordings x {settings.samples} replies"
        reward = job.reward or reward_for(job.ground.protocol.name, settings.lambda_)
        lam = 0.0 if reward.stability is None else reward.stability.lam
        lines.append(f"Groups    {group} to each of {len(samples.train)} sets; lambda {lam:g}")
        lines.append("Reward    " + " + ".join(f"{weight:g} {term}" for term, weight in reward.terms.items()))
        if isinstance(job.bank, LiveBank):
            lines.append(f"Bank      {job.bank.folder.folder}, live; now at state {job.bank.number}")
    every = f"every {settings.evaluate_steps} updates" if settings.evaluate_steps else "never"
    lines.append(f"Validate  {every}: loss of {settings.validation_rows} samples, answers and masks of {settings.validation_sets} sets")
    lines.append("Memory    " + ", ".join(f"{name} {_size(size)}" for name, size in found.parts.items() if size >= 1 << 20))
    fits = "fits" if found.total <= 0.9 * available else "does NOT fit: see documentation/training.md, Too little memory"
    return [*lines, f"          {_size(found.total)} of {_size(available)} per process: it {fits}"]


def _show_progress(run: RunFolder, *, as_json: bool) -> None:
    from seerseg.errors import NothingToDoError
    from seerseg.report import plot_progress
    from seerseg.training.settings import load_settings

    if not run.metrics.is_file():
        raise NothingToDoError(f"There is no run in {run.folder}.")
    plot_progress(run.metrics, run.picture)
    latest, best, steps = run.latest, run.best, load_settings(run.settings).steps
    if as_json:
        best_of = {"step": best.step, "score": best.score} if best else None
        print_json({"schema": 1, "run": str(run.folder), "steps": steps, "saved": latest.step if latest else 0, "best": best_of})
        return
    saved = f"saved at step {latest.step} of {steps}" if latest else f"nothing saved yet of {steps} steps"
    chosen = f", best at step {best.step} (score {best.score:.4f})" if best and best.score is not None else ""
    click.echo(f"{run.folder}: {saved}{chosen}. Picture: {run.picture}")


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    train()
