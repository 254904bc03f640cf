"""Learning by reward: TRL's GRPOTrainer over our own rollouts, top to bottom.

A training row is a paraphrase set; its K wordings times m replies share one advantage group. TRL keeps the loss (dr_grpo, no scaling by
the group's deviation), the reference model, the optimiser and the distribution. Ours are three methods: rollouts are dialogues
(`rollout`), rewards are shaped where whole groups are at hand (`stability`), and groups without spread are drawn anew from other sets.
What is drawn depends on seed, step and place in the batch alone, so neither the number of processes nor a restart changes it.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from transformers import TrainerCallback

from seerseg.errors import NothingToDoError
from seerseg.quiet import quiet
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, Source
from seerseg.rewards import RewardConfig, improving, preset
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.skills.base import EmptyBank, Retriever
from seerseg.skills.fence import LiveBank
from seerseg.training.callbacks import Metrics, Outside, PartTimer, Survival, in_words
from seerseg.training.credit import of_tokens, padded, turn_advantages
from seerseg.training.data import Cases, Ground, evenly, schedule
from seerseg.training.guards import GrpoSettings, check_arguments, check_batch, check_model, check_segmenter, check_trl
from seerseg.training.rollout import Job, ParaphraseSet, Rollout, Rollouts, StoredScenes, paraphrase_sets
from seerseg.training.runs import Checkpoint, RunFolder
from seerseg.training.settings import TrainSettings
from seerseg.training.sft import Ended, common_arguments, fitting_names, trl_classes
from seerseg.training.stability import Scores, flat_groups, group_rewards, spread_of
from seerseg.training.tuning import load_trainable
from seerseg.training.whole import SharedHead, check_gathers, whole

DEFAULT_REWARDS = {"medvol-r1": "medvol-r1/ctorg", "medreasoner": "medreasoner/soft", "medsam-agent": "medsam-agent"}
VALIDATED_WORDINGS = 8
_ROW = "set"


@dataclass(frozen=True, eq=False)
class TrainingSets(Sequence[ParaphraseSet]):
    """Paraphrase sets to learn on, and those to validate on."""

    train: tuple[ParaphraseSet, ...]
    val: tuple[ParaphraseSet, ...]

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, index: Any) -> Any:
        return self.train[index]


def training_sets(ground: Ground) -> TrainingSets:
    """Paraphrase sets of the fold: training cases in training language, validation cases in validation language (training language
    where they have no other). NothingToDoError when there is nothing to learn on."""
    from seerseg.store import stored_cases

    stored = set(stored_cases(ground.folder))
    known = [r for r in ground.dataset.requests if r.has_target and r.case in stored]
    train = [r for r in known if r.case in ground.fold.train and r.language_split in ("train", "")]
    held = [r for r in known if r.case in ground.fold.val]
    held = [r for r in held if r.language_split == "val"] or [r for r in held if r.language_split in ("train", "")]
    sets = TrainingSets(*(paraphrase_sets((r.case, r.target, r.text) for r in part) for part in (train, held)))
    if not sets.train:
        raise NothingToDoError(
            f"{ground.dataset.name} has no request in training language on a training case of fold {ground.number} that is preprocessed. "
            f"Make requests with seerseg_make_requests -d {ground.dataset.name} and preprocess the cases."
        )
    return sets


def shares(sets: Sequence[ParaphraseSet]) -> list[float]:
    """In which share of the passes a set takes part: 1 from the median number of wordings on, less in proportion below it. What is asked
    for seldom, as what is not there, is then drawn as seldom as it is asked for; drawn as often as all else it pays to give up."""
    usual = statistics.median(len(one.texts) for one in sets)
    return [min(1.0, len(one.texts) / usual) for one in sets]


def train_grpo(
    run: RunFolder,
    ground: Ground,
    sets: TrainingSets,
    settings: TrainSettings,
    source: Source,
    segmenter: Segmenter,
    *,
    resume_from: Checkpoint | None = None,
    outside: Outside | None = None,
    device: str = "cpu",
    reward: RewardConfig | None = None,
    bank: Retriever | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Ended:
    """Train, or go on training, to the last step, the end of the time, or a signal; checkpoints are in `run` afterwards.

    reward: that of the protocol (`reward_for`) when None; bank: a `LiveBank` is looked up anew at every step. TrainingError, OutputError:
    see `in_words`. PlanError, UsageError, ModelError: what cannot be trained so is refused before the first step.
    """
    check_trl()
    outside, parts = outside or Outside(), PartTimer()
    reward = reward or reward_for(ground.protocol.name, settings.lambda_)
    check_segmenter(segmenter, ground)
    loaded = load_trainable(source, settings)
    cases = Cases(ground, settings.cache_bytes // 4)
    scenes = StoredScenes(cases, settings.cache_bytes)
    cached = segmenter if isinstance(segmenter, CachedSegmenter) else CachedSegmenter(segmenter)
    rollouts = Rollouts(rollout_reasoner(loaded, settings), scenes, ground.protocol, cached, reward, bank=bank, parts=parts)
    live = bank if isinstance(bank, LiveBank) else None
    if live is not None:
        if resume_from is not None and resume_from.bank is not None:
            live.check_descends(resume_from.bank)
        live.say = outside.say
        outside.say(f"The bank {live.folder.folder} is at state {live.number}, version {live.version[:12]}")
    validates = settings.evaluate_steps > 0 and settings.validation_sets > 0 and bool(sets.val)
    survival = Survival(
        run, settings, outside=outside, score=score, validates=validates, bank=lambda: None if live is None else live.to_json()
    )
    with quiet():
        trainer = make_trainer(
            loaded,
            rollouts,
            sets.train,
            GrpoSettings(settings.paraphrases, settings.samples, settings.seed),
            arguments={**common_arguments(run, settings, device), "beta": settings.beta, "temperature": settings.temperature},
            val=sets.val[:: max(1, math.ceil(len(sets.val) / settings.validation_sets))] if settings.validation_sets else (),
            evaluate_steps=settings.evaluate_steps,
            max_new_tokens=settings.max_new_tokens,
            callbacks=[survival, Metrics(run, settings, parts, outside), *callbacks],
        )
        with in_words(trainer, survival):
            trainer.train(resume_from_checkpoint=str(resume_from.path) if resume_from is not None else None)
    return Ended(survival.stopped or "done", int(trainer.state.global_step), run.best)


def reward_for(protocol: str, lam: float) -> RewardConfig:
    """The published reward of a protocol, with the planned lambda where it has a stability penalty."""
    found = preset(DEFAULT_REWARDS.get(protocol, "seer"))
    return found if found.stability is None else replace(found, stability=replace(found.stability, lam=lam))


def score(metrics: Mapping[str, float]) -> float | None:
    """What checkpoints are chosen by: the mean Dice of validation answers plus that of the worst wording."""
    mean, worst = metrics.get("eval_dice_mean"), metrics.get("eval_dice_worst")
    return None if mean is None or worst is None else (mean + worst) / 2


def rollout_reasoner(loaded: Loaded, settings: TrainSettings) -> VlmReasoner:
    """The model that learns as a reasoner; adapters act within it."""
    model = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    decoding = Decoding(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, max_batch=max(32, settings.group))
    return VlmReasoner(replace(loaded, model=model), decoding)


def make_trainer(
    loaded: Loaded,
    rollouts: Rollouts,
    train: Sequence[ParaphraseSet],
    grpo: GrpoSettings,
    *,
    arguments: Mapping[str, Any],
    val: Sequence[ParaphraseSet] = (),
    evaluate_steps: int = 0,
    max_new_tokens: int = 256,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """The trainer. arguments: of TRL's GRPOConfig, with "max_steps"; those that our mathematics fixes are set here."""
    trainer_class, config_class = _classes()
    given = fitting_names({"activation_checkpointing": False, **arguments}, config_class)
    beta, adapted = float(given.get("beta", 0.0)), hasattr(loaded.model, "peft_config")
    if not adapted:
        given["beta"] = 0.0  # TRL would read the reference from the hub or a folder, which need not hold these weights
    accumulation = int(given.get("gradient_accumulation_steps", 1))
    check_batch(int(given["per_device_train_batch_size"]) * accumulation * int(os.environ.get("WORLD_SIZE", "1")), grpo)
    columns = _columns(rollouts.reward)
    evaluates = bool(evaluate_steps and val)
    config = config_class(
        **{
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "use_bias_correction_kl": True,  # the gradient is that of the reverse KL divergence
            "num_iterations": 1,
            "steps_per_generation": accumulation,
            "shuffle_dataset": False,
            "remove_unused_columns": False,
            "log_completions": False,
            "max_completion_length": max_new_tokens * rollouts.protocol.max_turns,
            "num_generations": grpo.group,
            "reward_weights": [rollouts.reward.terms.get(name, 1.0) for name in columns],
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": evaluate_steps if evaluates else None,
            "per_device_eval_batch_size": grpo.group,
            **given,
        }
    )
    check_arguments(config, grpo)
    check_model(rollouts)
    sets_per_update = config.generation_batch_size // grpo.group
    order = schedule(len(train), config.max_steps * sets_per_update, grpo.seed, shares(train))
    trainer = trainer_class(
        rollouts,
        train,
        val,
        grpo,
        model=loaded.model,
        reward_funcs=[_Column(name) for name in columns],
        args=config,
        train_dataset=_table(order),
        eval_dataset=_table(range(len(val))) if evaluates else None,
        processing_class=loaded.processor,
        callbacks=[SharedHead(), *callbacks],
    )
    _no_chatter(trainer)
    check_gathers(trainer)
    if beta and not adapted:
        trainer.keep_reference(beta)
    return trainer


# ---------------------------------------------------------------------------------------------------------------- trainer


class _Column:
    """A column of TRL's reward table: one term, as the rollout scored it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *, values: Sequence[Mapping[str, float]], **other: Any) -> list[float]:
        return [value.get(self.__name__, 0.0) for value in values]


def _columns(reward: RewardConfig) -> list[str]:
    """The terms, and last what is added to their weighted sum."""
    return [*reward.terms, *(["penalty"] if reward.stability is not None or reward.clip is not None else [])]


def _table(numbers: Sequence[int]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({_ROW: list(numbers), "prompt": [""] * len(numbers)})


def _no_chatter(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _Ready:
    """An image processor whose images are prepared already: it gives their tensors whatever it is shown."""

    def __init__(self, processor: Any, tensors: Mapping[str, Any]) -> None:
        self._processor, self._tensors = processor, tensors

    def __call__(self, **asked: Any) -> dict[str, Any]:
        return dict(self._tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


@cache
def _classes() -> tuple[Any, Any]:
    """The trainer's class and TRL's configuration class."""
    import torch
    from accelerate.utils import gather

    base, config = trl_classes("GRPOTrainer", "GRPOConfig")

    class PolicyTrainer(_Steps, base):  # type: ignore[misc, valid-type]
        """GRPO over dialogues."""

        @contextmanager
        def whole_model(self) -> Iterator[None]:
            """The model in one piece, for rollouts: no gradients, no dropout. All processes enter and leave."""
            training = self.model.training
            self.model.eval()  # no dropout, no checkpointing
            try:
                with torch.no_grad(), whole(self), self.accelerator.autocast():
                    yield
            finally:
                self.model.train(training)

        def together(self, values: Any) -> Any:
            """Of all processes, in order of their ranks."""
            return gather(values.to(self.accelerator.device)).cpu()

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            rollouts = self.roll(inputs)
            try:
                batch = super()._generate_and_score_completions([{"prompt": r.job.text, "values": r.values} for r in rollouts])
                return self.with_credit(batch)
            finally:
                self.tidy()

        def _generate(self, prompts: Any) -> Any:
            return self.hand_over()

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            table = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return self.with_penalty(table)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            # the model folder has the processor's files; transformers cannot write one without its video part
            held, self.processing_class = self.processing_class, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.processing_class = held

        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
            """Greedy answers to the validation sets instead of a loss."""
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validated().items()}
            training = self.model.training
            self.model.eval()  # the log is one of validation
            self.log(dict(metrics))
            self.model.train(training)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.rollouts.parts.part("step"):
                return super().training_step(*args, **kwargs)

    return PolicyTrainer, config


class _Steps:
    """What the trainer does in a step that is not TRL's; mixed into its class."""

    model: Any
    args: Any
    state: Any
    accelerator: Any
    processing_class: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    reward_weights: Any
    tools: Any
    whole_model: Callable[[], Any]
    together: Callable[[Any], Any]

    def __init__(
        self, rollouts: Rollouts, train: Sequence[ParaphraseSet], val: Sequence[ParaphraseSet], grpo: GrpoSettings, **given: Any
    ) -> None:
        self.rollouts, self.train_sets, self.val_sets, self.grpo = rollouts, train, val, grpo
        self._now: list[Rollout] = []
        self._rewards: Any = None
        self._image_processor: Any = None
        self._tools: Any = None
        super().__init__(**given)

    def keep_reference(self, beta: float) -> None:
        """Hold the model as it is now as what the divergence is measured from."""
        from trl.models.utils import prepare_deepspeed, prepare_fsdp
        from trl.trainer.utils import add_fused_lm_head

        whole = self.accelerator.unwrap_model(self.model)
        before = whole.__dict__.pop("forward", None)  # TRL's patch is bound to this model; the copy gets its own
        copied = copy.deepcopy(whole).requires_grad_(False).eval()
        if before is not None:
            whole.forward = before
        add_fused_lm_head(copied, temperature=self.args.temperature)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(copied, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(copied, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(copied, evaluation_mode=True)
        self.beta = beta

    # --- rollouts -------------------------------------------------------------------------------------------------------

    def roll(self, inputs: Sequence[Mapping[str, Any]]) -> list[Rollout]:
        """Rollouts of this process's part of the batch; groups without spread are drawn anew from other sets."""
        group, first = self.grpo.group, self.accelerator.process_index * len(inputs)
        before = self._counts()
        self._look_up_bank()
        numbers = {first + i: int(row[_ROW]) for i, row in enumerate(inputs)}
        with self.whole_model():
            with self.rollouts.parts.part("rollouts"):
                made = dict(zip(numbers, self.rollouts.run([self.job(place, n, 0) for place, n in numbers.items()]), strict=True))
            flat = self.flat([made[place] for place in numbers])
            share = float(flat.mean())
            for attempt in range(1, self.grpo.resamples + 1):
                if not flat.any():
                    break
                again = [place for place in numbers if flat[place // group]]
                jobs = [self.job(place, self.other_set(place // group, attempt), attempt) for place in again]
                with self.rollouts.parts.part("rollouts"):
                    made.update(zip(again, self.rollouts.run(jobs), strict=True))
                flat = self.flat([made[place] for place in numbers])
        self.note("zero_spread", share)
        self.note("zero_spread_left", float(flat.mean()))
        self._note_cache(before)
        self._now = [made[place] for place in numbers]
        self._note_skills(self._now)
        return self._now

    def job(self, place: int, number: int, attempt: int) -> Job:
        """The reply at a place of the whole batch."""
        step, (group, within) = int(self.state.global_step), divmod(place, self.grpo.group)
        row, wording = self.train_sets[number], within // self.grpo.samples
        text = row.wordings(self.grpo.paraphrases, [self.grpo.seed, step, group, attempt])[wording]
        return Job(row.case, row.target, text, f"{self.grpo.seed}|{step}|{place}|{attempt}")

    def other_set(self, group: int, attempt: int) -> int:
        """The set that takes the place of one that taught nothing."""
        generator = np.random.default_rng([self.grpo.seed, int(self.state.global_step), group, attempt, 1])
        return int(generator.integers(len(self.train_sets)))

    def flat(self, rollouts: Sequence[Rollout]) -> Any:
        """Which groups of the whole batch have no spread in their rewards."""
        import torch

        names = list(self.rollouts.reward.terms)
        values = torch.tensor([[r.values[name] for name in names] for r in rollouts], dtype=torch.float32)
        return flat_groups(group_rewards(self.rollouts.reward, self._grouped(self.together(values), names)))

    def hand_over(self) -> Any:
        """The rollouts as TRL's `_generate` returns them."""
        rollouts = self._now
        self._note_lengths(rollouts)
        images: Any = [r.images for r in rollouts] if any(r.images for r in rollouts) else None
        if images is not None:
            # TRL takes its branch of images within a dialogue only where there are tools; it prepares images and counts tokens alone
            self._tools, self.tools = self.tools, ["a mask shown back"]
            self._image_processor = self.processing_class.image_processor
            self.processing_class.image_processor = _Ready(self._image_processor, _joined([r.line.images for r in rollouts]))
        several = any(0 in r.own for r in rollouts)
        texts = [self.rollouts.reasoner.text([t for t, own in zip(r.reply, r.own, strict=True) if own]) for r in rollouts]
        return (
            [r.prompt.ids for r in rollouts],
            [r.reply for r in rollouts],
            [r.own for r in rollouts] if several else None,
            texts,
            None,
            {},
            images,
            images or [],
        )

    def tidy(self) -> None:
        """Back to how TRL was."""
        if self._image_processor is not None:
            self.processing_class.image_processor, self.tools = self._image_processor, self._tools
        self._image_processor, self._now = None, []

    # --- rewards --------------------------------------------------------------------------------------------------------

    def with_penalty(self, table: Any) -> Any:
        """TRL's table of all processes (replies, columns), the penalty in its last column; says how scores spread."""
        import torch

        reward = self.rollouts.reward
        names = list(reward.terms)
        values = self._grouped(table.cpu(), names)
        main = reward.stability.term if reward.stability is not None else "dice" if "dice" in values else names[0]
        spread = spread_of(values[main])
        for name in ("mean", "worst", "std", "variance"):
            self.note(f"{main}_{name}", getattr(spread, name))
        if "penalty" in _columns(reward):
            plain = sum(reward.terms[name] * values[name] for name in names)
            extra = (group_rewards(reward, values) - plain).reshape(-1)
            table[:, len(names)] = torch.as_tensor(extra, dtype=table.dtype, device=table.device)
        self._rewards = (table.cpu() * self.reward_weights.cpu()).sum(1)
        return table

    def with_credit(self, batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's batch, where turns are credited one by one with an advantage for each token instead of one for each reply."""
        import torch

        if self.rollouts.reward.turns is None:
            return batch
        before = self.together(torch.from_numpy(padded([r.before for r in self._now], self.rollouts.protocol.max_turns)))
        credited = turn_advantages(self._rewards.double().numpy(), before.numpy(), self.grpo.group)
        first = self.accelerator.process_index * len(self._now)
        tokens = of_tokens(credited[first : first + len(self._now)], [r.own for r in self._now], batch["completion_ids"].shape[1])
        return {**batch, "advantages": torch.as_tensor(tokens, dtype=batch["advantages"].dtype, device=batch["advantages"].device)}

    def _grouped(self, table: Any, names: Sequence[str]) -> dict[str, Scores]:
        shape = (-1, self.grpo.paraphrases, self.grpo.samples)
        return {name: table[:, i].double().numpy().reshape(shape) for i, name in enumerate(names)}

    # --- numbers --------------------------------------------------------------------------------------------------------

    def validated(self) -> dict[str, float]:
        """Greedy answers to the validation sets: every term's mean; over sets the mean of Dice's mean, worst and std over wordings."""
        self._look_up_bank()
        mine = range(self.accelerator.process_index, len(self.val_sets), self.accelerator.num_processes)
        found: list[tuple[int, dict[str, list[float]]]] = []
        with self.whole_model():
            for number in mine:
                row = self.val_sets[number]
                scored = self.rollouts.run([Job(row.case, row.target, text, None) for text in evenly(row.texts, VALIDATED_WORDINGS)])
                measured = {name: [r.values[name] for r in scored] for name in scored[0].values}
                found.append((number, measured | (_turns_of(scored) if self.rollouts.protocol.max_turns > 1 else {})))
        rows = [row for _, row in sorted(_all_of(found), key=lambda item: item[0])]
        if not rows:
            return {}
        metrics = {name: float(np.mean([np.mean(row[name]) for row in rows if row[name]] or [0.0])) for name in rows[0]}
        over: dict[str, Callable[..., Any]] = {"mean": np.mean, "worst": np.min, "std": np.std}
        return metrics | {f"dice_{name}": float(np.mean([f(row["dice"]) for row in rows])) for name, f in over.items()}

    def note(self, name: str, value: float) -> None:
        """A number of this step."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(float(value))  # type: ignore[attr-defined]

    def _look_up_bank(self) -> None:
        """Go to the newest state of a live bank that every process sees."""
        import torch

        bank = self.rollouts.bank
        if isinstance(bank, LiveBank):
            bank.refresh(int(self.together(torch.tensor([bank.newest()])).min()))

    def _note_skills(self, rollouts: Sequence[Rollout]) -> None:
        import torch

        bank = self.rollouts.bank
        if isinstance(bank, EmptyBank):
            return
        counts = [[len(r.dialogue.skills), bool(r.dialogue.answer and r.dialogue.answer.skills)] for r in rollouts]
        shown, named = self.together(torch.tensor(counts, dtype=torch.float64)).T
        self.note("skills_shown", float(shown.mean()))
        self.note("skills_named", float(named.mean()))
        if isinstance(bank, LiveBank):
            self.note("bank_state", bank.number)

    def _counts(self) -> tuple[int, int]:
        cached = self.rollouts.segmenter
        return (cached.statistics.hits, cached.statistics.misses) if isinstance(cached, CachedSegmenter) else (0, 0)

    def _note_cache(self, before: tuple[int, int]) -> None:
        import torch

        hits, misses = (now - then for now, then in zip(self._counts(), before, strict=True))
        hits, misses = self.together(torch.tensor([[hits, misses]])).sum(0).tolist()
        if hits + misses:
            self.note("cache_hit_rate", hits / (hits + misses))

    def _note_lengths(self, rollouts: Sequence[Rollout]) -> None:
        import torch

        mine = torch.tensor([[len(r.prompt.ids), sum(r.own), int(r.ended), len(r.dialogue.replies)] for r in rollouts])
        prompt, own, ended, turns = self.together(mine).T.double()
        self.state.num_input_tokens_seen += int(prompt.sum() + own.sum())
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]  # type: ignore[attr-defined]
        self.note("prompt_length", float(prompt.mean()))
        self.note("completions/mean_length", float(own.mean()))
        self.note("completions/max_length", float(own.max()))
        self.note("completions/clipped_ratio", float(1 - ended.mean()))
        self.note("turns", float(turns.mean()))
        if self.rollouts.protocol.max_turns > 1:
            share = torch.tensor([[np.mean(_turns_of([r])["idle_turns"] or [np.nan])] for r in rollouts], dtype=torch.float64)
            self.note("idle_turns", float(self.together(share).nanmean().nan_to_num(0.0)))


def _turns_of(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """Replies of each dialogue, and of each that drew something that is there the share of masks that were no better than one before."""
    drew = [r for r in rollouts if r.overlaps and r.job.target is not None]
    idle = [1 - float(np.mean(improving(r.overlaps))) for r in drew]
    return {"turns": [float(len(r.dialogue.replies)) for r in rollouts], "idle_turns": idle}


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Image tensors of dialogues, one after the other."""
    import torch

    names = list(dict.fromkeys(name for part in parts for name in part))
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def _all_of(found: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return list(gather_object(found))
