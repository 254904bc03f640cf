"""Supervised fine-tuning on traces, top to bottom: TRL's SFTTrainer, one row per dialogue, loss on the replies alone.

TRL does the loss, the optimiser and the distribution (DDP, FSDP, DeepSpeed, as `accelerate launch` or torchrun say). Ours are the
rows and their tensors (`data`), the order of the data (fixed by the seed alone), what learns (`tuning`), and survival (`callbacks`).
Sequences are never cut and never packed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import TrainerCallback

from seerseg.errors import MissingExtraError, ModelError
from seerseg.quiet import quiet
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, Source
from seerseg.segmenters.base import Segmenter
from seerseg.training.callbacks import Metrics, Outside, PartTimer, Survival, barrier, in_words
from seerseg.training.data import Cases, Collator, Ground, Samples, evenly, schedule, validate, validation_sets
from seerseg.training.runs import Checkpoint, RunFolder
from seerseg.training.settings import TrainSettings
from seerseg.training.tuning import load_trainable, wake
from seerseg.training.whole import SharedHead, refusal, whole

LOSS_WEIGHT = 0.01
MOST_READ_FOR_WORDS = 2000
"""Samples whose replies say which tokens are to be learnt."""


@dataclass(frozen=True)
class Ended:
    """How a stage ended: "done" at its last step, "time" or "signal" before it. step: the last one made."""

    how: Literal["done", "time", "signal"]
    step: int
    best: Checkpoint | None


def train_sft(
    run: RunFolder,
    ground: Ground,
    samples: Samples,
    settings: TrainSettings,
    source: Source,
    segmenter: Segmenter | None,
    *,
    resume_from: Checkpoint | None = None,
    outside: Outside | None = None,
    device: str = "cpu",
    callbacks: Sequence[TrainerCallback] = (),
) -> Ended:
    """Train, or go on training, to the last step, the end of the time, or a signal; checkpoints are in `run` afterwards.

    segmenter: draws the answers of validation, None to validate by the loss alone. TrainingError, OutputError: see `in_words`.
    """
    trainer_class, config_class = trl_classes("SFTTrainer", "SFTConfig")
    outside, parts = outside or Outside(), PartTimer()
    for reason, count in samples.left_out.items():
        outside.say(f"Left out, {count} traces: {reason}")
    loaded = load_trainable(source, settings)
    reasoner = VlmReasoner(loaded)
    if settings.tuning == "full":
        said = {reply for sample in evenly(samples.train, MOST_READ_FOR_WORDS) for reply in sample.replies}
        woken = wake(loaded.model, (token for reply in sorted(said) for token in reasoner.encode_reply(reply)), settings.seed)
        if woken:
            outside.say(f"{woken} tokens of the replies were never learnt by this model: their embeddings are drawn anew.")
    check_length(reasoner, ground, samples, settings, outside)
    train = Collator(reasoner, ground, samples.train, settings.cache_bytes)
    held_out = tuple(evenly(samples.val, settings.validation_rows))
    evaluates = settings.evaluate_steps > 0 and bool(held_out)
    val = Collator(reasoner, ground, held_out, settings.cache_bytes // 4)
    survival = Survival(run, settings, outside=outside, score=score, validates=evaluates)
    kept: list[TrainerCallback] = [SharedHead(), survival, Metrics(run, settings, parts, outside), *callbacks]
    if evaluates and segmenter is not None and settings.validation_sets:
        kept.insert(0, Answers(ground, samples, settings, loaded, segmenter))
    order = schedule(len(samples.train), settings.steps * settings.batch, settings.seed)
    collate = _Collate(train, val, len(samples.train), parts)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # trl, peft and transformers deprecate each other's attributes
        trainer = trainer_class(
            model=loaded.model,
            args=config_class(
                **fitting_names(common_arguments(run, settings, device), config_class),
                max_length=None,
                eval_strategy="steps" if evaluates else "no",
                eval_steps=settings.evaluate_steps if evaluates else None,
                per_device_eval_batch_size=1,
                prediction_loss_only=True,
            ),
            train_dataset=_table(order),
            eval_dataset=_table([len(samples.train) + n for n in range(len(held_out))]) if evaluates else None,
            data_collator=collate,
            processing_class=loaded.processor,
            callbacks=kept,
        )
        prepare(trainer)
        # some architectures say they take no number of items; TRL's loss needs it, or an update would weigh samples by their micro batch
        trainer.model_accepts_loss_kwargs = True
        for callback in kept:
            if isinstance(callback, Answers):
                callback.trainer = trainer
        with in_words(trainer, survival):
            trainer.train(resume_from_checkpoint=str(resume_from.path) if resume_from is not None else None)
    return Ended(survival.stopped or "done", int(trainer.state.global_step), run.best)


def score(metrics: Mapping[str, float]) -> float | None:
    """What checkpoints are chosen by, higher is better: mean Dice of validation answers where they were drawn, with the loss to part
    near-equal ones, else the loss alone."""
    loss = metrics.get("eval_loss")
    drawn = metrics.get("eval_dice_mean")
    if loss is None:
        return drawn
    return -loss if drawn is None else drawn - LOSS_WEIGHT * loss


def common_arguments(run: RunFolder, settings: TrainSettings, device: str) -> dict[str, Any]:
    """What every stage tells a transformers trainer; checkpoints are `Survival`'s, logs `Metrics`'."""
    by_fsdp = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"  # as accelerate launch says it; both at once fail
    return {
        "output_dir": str(run.saving),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "use_cpu": device == "cpu",
        "activation_checkpointing": settings.checkpointing and not by_fsdp,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_timeout": 7200,
    }


def fitting_names(arguments: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """The arguments under the names that the installed versions have; TRL's own default would turn checkpointing on."""
    old, new = "gradient_checkpointing", "activation_checkpointing"
    known = config_class.__dataclass_fields__
    value = arguments[new]
    others = {name: item for name, item in arguments.items() if name != new}
    return {**others, new: value, **({old: value} if old in known else {})} if new in known else {**others, old: value}


def check_length(reasoner: VlmReasoner, ground: Ground, samples: Samples, settings: TrainSettings, outside: Outside) -> int:
    """Tokens of the longest of a few samples; ModelError when the model's context is shorter, a line when the plan allows fewer."""
    probe = Collator(reasoner, ground, samples.train, settings.cache_bytes // 4)
    longest = max((sample for sample in range(len(samples.train))), key=lambda n: _characters(samples, n))
    chosen = {longest, *evenly(range(len(samples.train)), 4)}
    tokens = max(len(prompt.ids) + len(reply) for prompt, reply, _ in (probe.encode(n) for n in sorted(chosen)))
    context = int(getattr(reasoner.model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    if context and tokens > context:
        raise ModelError(
            f"A sample has {tokens} tokens, but the model reads at most {context}. Show fewer or smaller slices (--set views.count=N, "
            "--set views.size_px=N), or take a model with a longer context."
        )
    if tokens > settings.max_tokens:
        outside.say(f"Samples have up to {tokens} tokens with this model, the plan allows for {settings.max_tokens}: more memory is used.")
    return tokens


class Answers(TrainerCallback):
    """At every validation the requests of a few validation paraphrase sets are answered and drawn; what comes of it joins the metrics.

    One process does it and tells the others. Left out where processes share weights that cannot be had in one piece (`refusal`).
    """

    def __init__(self, ground: Ground, samples: Samples, settings: TrainSettings, loaded: Loaded, segmenter: Segmenter) -> None:
        self.ground, self.settings, self.loaded, self.segmenter = ground, settings, loaded, segmenter
        self.sets = validation_sets(list({id(s.row): s.row for s in samples.val}.values()), settings.validation_sets)
        self.cases, self.bank = Cases(ground, settings.cache_bytes // 4), samples.bank
        self.trainer: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer, and add "eval_exact", "eval_faults", "eval_dice_..." to the metrics."""
        if not self.sets or refusal(self.trainer) is not None:
            return
        found: list[dict[str, float]] = [{}]
        with whole(self.trainer):
            if state.is_world_process_zero:
                found = [self._measure(kwargs["model"])]
        found = _tell(found)
        metrics = {f"eval_{name}": value for name, value in found[0].items()}
        kwargs["metrics"].update(metrics)
        self.trainer.log(dict(metrics))

    def _measure(self, model: Any) -> dict[str, float]:
        import torch

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        reasoner = VlmReasoner(replace(self.loaded, model=base), Decoding(max_new_tokens=self.settings.max_new_tokens))
        training = base.training
        base.eval()
        kind = getattr(torch, self.settings.dtype)
        try:
            with torch.autocast(base.device.type, dtype=kind, enabled=kind != torch.float32):
                return validate(self.sets, self.ground, self.cases, reasoner, self.segmenter, bank=self.bank)
        finally:
            base.train(training)


class _Collate:
    """Batches of training samples, and of validation samples behind them; counts the seconds."""

    def __init__(self, train: Collator, val: Collator, border: int, parts: PartTimer) -> None:
        self.train, self.val, self.border, self.parts = train, val, border, parts

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch is of one kind."""
        if examples[0]["sample"] >= self.border:
            return self.val([{"sample": example["sample"] - self.border} for example in examples])
        with self.parts.part("data"):
            return self.train(examples)


def _tell(found: list[dict[str, float]]) -> list[dict[str, float]]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        barrier()
        dist.broadcast_object_list(found, src=0)
    return found


def _characters(samples: Samples, number: int) -> int:
    sample = samples.train[number]
    skills = sum(len(skill.when) + len(skill.what) + 40 for skill in sample.skills)
    turns = len(sample.replies) if sample.turn is None else sample.turn + 1
    return len(sample.row.text) + skills + sum(map(len, sample.replies[:turns])) + 10_000 * turns


def _table(numbers: Sequence[int]) -> Any:
    """Rows that name samples. The empty column "images" has TRL leave the rows as they are."""
    from datasets import Dataset

    return Dataset.from_dict({"sample": list(numbers), "images": [""] * len(numbers)})


def trl_classes(*names: str) -> tuple[Any, ...]:
    """Classes of TRL by name, its telemetry off; importing it takes seconds. MissingExtraError where it is not installed."""
    try:
        import huggingface_hub.constants as hub

        hub.HF_HUB_DISABLE_TELEMETRY = True  # TRL would report each checkpoint
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trl

            return tuple(getattr(trl, name) for name in names)
    except ImportError as fault:
        raise MissingExtraError(f"Training needs more packages ({fault}): pip install 'seerseg[train]'.") from fault


def prepare(trainer: Any) -> None:
    """Without transformers' own printing of logs, and without its writing of processors: the model folder has the base's files."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.processing_class = None
