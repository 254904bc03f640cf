"""What a training run does, number by number: from plans.json, changed by the command line, cut up for this machine.

The first part decides results and is the same on every machine; the second says how one machine computes them: replies and
samples per pass times passes times processes is always the planned batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from seerseg.errors import PlanError, UsageError
from seerseg.paths import read_json
from seerseg.planning import FINGERPRINT_FILE, Hardware, Plans, hardware, load_fingerprint, load_plans, make_plans
from seerseg.planning.rules import PIXELS_PER_TOKEN
from seerseg.protocols.base import Protocol
from seerseg.views import ViewSpec, agreed_views

Stage = Literal["sft", "grpo"]
Tuning = Literal["lora", "full"]
STAGES: tuple[Stage, ...] = ("sft", "grpo")
SETTINGS_SCHEMA = 1
_PLACES = frozenset({"box2d", "box3d", "points"})
SMALL_PARAMETERS = 100_000_000  # below this a whole model takes the rate "small" and learns the brief form of traces
_COMPUTING = ("micro_batch", "accumulation", "processes", "dtype", "quantize", "checkpointing", "checkpoint_minutes", "cache_bytes")


@dataclass(frozen=True)
class TrainSettings:
    """One training run. batch: SFT samples or GRPO replies per update, over all processes; learning_rate is the peak;
    warmup_steps rise to it. steps: updates in all. max_tokens: what planning allows a sample, never a cut: longer ones are
    reported. paraphrases (K) times samples (m) is one advantage group. evaluate_steps: updates between validations, 0 for none.

    micro_batch * accumulation * processes == batch. dtype: of computation; adapters and whole models that are trained are held in
    float32. quantize: "none" or "4bit" (frozen weights under adapters). checkpoint_minutes: between checkpoints by the clock.
    """

    stage: Stage
    tuning: Tuning
    lora_rank: int
    lora_alpha: int
    lora_targets: str
    train_vision: bool
    max_tokens: int
    max_new_tokens: int
    batch: int
    paraphrases: int
    samples: int
    learning_rate: float
    warmup_steps: int
    steps: int
    epochs: float
    weight_decay: float
    max_grad_norm: float
    lambda_: float
    beta: float
    temperature: float
    evaluate_steps: int
    validation_rows: int
    validation_sets: int
    seed: int
    micro_batch: int = 1
    accumulation: int = 1
    processes: int = 1
    dtype: str = "float32"
    quantize: str = "none"
    checkpointing: bool = False
    checkpoint_minutes: float = 15.0
    cache_bytes: int = 1 << 28

    @property
    def group(self) -> int:
        """Replies that share a baseline."""
        return self.paraphrases * self.samples

    @property
    def schedule(self) -> str:
        """transformers' name of what the rate does after the warm-up: SFT falls as a cosine, GRPO stays."""
        return "cosine" if self.stage == "sft" else "constant_with_warmup"

    @property
    def identity(self) -> str:
        """Hex digest of everything that results depend on: a run is continued only under the same one."""
        said = {name: value for name, value in asdict(self).items() if name not in _COMPUTING}
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()

    def differences(self, other: TrainSettings) -> list[str]:
        """ "name (mine, not theirs)" of every value that results depend on and that differs."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name not in _COMPUTING]
        return [f"{name.rstrip('_')} ({mine}, not {theirs})" for name, mine, theirs in pairs if mine != theirs]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": SETTINGS_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> TrainSettings:
        """The inverse of `to_json`; PlanError naming `where` when it is none."""
        try:
            return cls(**{key: item for key, item in value.items() if key != "schema"})
        except (TypeError, AttributeError) as error:
            raise PlanError(f"{where} is damaged or of another version ({error}). Start the stage anew with --overwrite.") from None


def load_settings(path: Path) -> TrainSettings:
    """Read a run's settings.json."""
    return TrainSettings.from_json(read_json(path, PlanError, SETTINGS_SCHEMA), str(path))


def plans_for(folder: Path, name: str, edits: Mapping[str, Any] | None = None, machine: Hardware | None = None) -> Plans:
    """The plans `name` of a dataset's preprocessed folder, for this machine, with `edits` (plan name -> value) followed up.

    PlanError when the plans are missing, damaged, or an edit is not allowed.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise PlanError(f"There is no {path}. Run seerseg_plan_and_preprocess -d {folder.name} first, or name other plans with -p.")
    plans = load_plans(path)
    machine = machine or hardware()
    if not edits:
        return plans.on(machine)
    return make_plans(load_fingerprint(folder / FINGERPRINT_FILE), machine, plans.name, plans.edited(edits))


def settings_from(plans: Plans, stage: Stage, *, parameters: int, units: int, processes: int = 1, tuning: Tuning | None = None,
                  steps: int | None = None, max_new_tokens: int | None = None, micro_batch: int | None = None,
                  learning_rate: float | None = None, dtype: str | None = None,
                  protocol: Protocol | None = None) -> TrainSettings:  # fmt: skip
    """The settings of a stage. parameters: of the whole reasoner; units: training samples (sft) or paraphrase sets (grpo);
    processes: that share the batch; protocol: whose views and turns the budget of tokens is for, None for the planned views and one turn.
    The rest takes the place of what the plan says.

    A small model that is to answer places learns to see them, whatever the plan's rule for the vision tower says (unless a person
    changed it): a tower that was only ever asked what is shown does not tell where.

    UsageError when the batch cannot be shared so.
    """
    value = plans.value
    chosen: Tuning = tuning or ("lora" if parameters >= value("lora.from_parameters") else "full")
    kind = "lora" if chosen == "lora" else "full" if parameters >= SMALL_PARAMETERS else "small"
    batch = int(value(f"{stage}.batch"))
    per_update = batch if stage == "sft" else int(value("grpo.sets_per_update"))
    epochs = float(value(f"{stage}.epochs"))
    total = steps if steps is not None else max(1, math.ceil(epochs * units / per_update))
    evaluations = int(value(f"{stage}.evaluations"))
    micro = _micro_batch(batch, processes, micro_batch or int(value(f"{stage}.micro_batch")))
    precision = dtype or str(value("device.precision"))
    vision = value("lora.vision") == "trained"
    if protocol is not None and kind == "small" and _PLACES & protocol.prompt_kinds and not plans.values["lora.vision"].edited:
        vision = True
    return TrainSettings(
        stage=stage,
        tuning=chosen,
        lora_rank=int(value("lora.rank")),
        lora_alpha=int(value("lora.alpha")),
        lora_targets=str(value("lora.targets")),
        train_vision=vision,
        max_tokens=dialogue_tokens(plans, protocol),
        max_new_tokens=max_new_tokens or int(value("tokens.completion")),
        batch=batch,
        paraphrases=int(value("paraphrases.count")),
        samples=int(value("grpo.samples")),
        learning_rate=learning_rate if learning_rate is not None else float(value(f"{stage}.learning_rate_{kind}")),
        warmup_steps=round(float(value(f"{stage}.warmup")) * total),
        steps=total,
        epochs=total * per_update / max(1, units),
        weight_decay=float(value("training.weight_decay")),
        max_grad_norm=float(value("training.max_grad_norm")),
        lambda_=float(value("grpo.lambda")),
        beta=float(value("grpo.beta")),
        temperature=float(value("grpo.temperature")),
        evaluate_steps=max(1, total // evaluations) if evaluations else 0,
        validation_rows=int(value("validation.rows")),
        validation_sets=int(value("validation.sets")),
        seed=int(value("training.seed")),
        micro_batch=micro,
        accumulation=batch // (processes * micro),
        processes=processes,
        dtype=precision,
        quantize=str(value("device.quantize")) if chosen == "lora" else "none",
        checkpointing=bool(value("device.checkpointing")),
        checkpoint_minutes=float(value("checkpoint.minutes")),
        cache_bytes=int(value("queue.bytes")),
    )


def dialogue_tokens(plans: Plans, protocol: Protocol | None) -> int:
    """Tokens that planning allows a whole dialogue: the plan's budget, for a protocol with views or turns of its own that budget with its
    images, and for every further turn a reply and the planes shown after the one before it, each with 64 tokens of words."""
    budget = int(plans.value("tokens.budget"))
    if protocol is None:
        return budget
    spec, planned = views_of(plans, protocol), plans.view_spec()
    if protocol.max_turns == 1 and spec == planned:
        return budget
    planes = 1 + len(spec.also)
    image = math.ceil(spec.size_px / PIXELS_PER_TOKEN) ** 2
    opening = budget - int(plans.value("tokens.images")) + image * spec.count * planes
    further = int(plans.value("tokens.completion")) + (image + 64) * planes
    return 64 * math.ceil((opening + (protocol.max_turns - 1) * further) / 64)


def fit_to_memory(settings: TrainSettings, needed_bytes: Mapping[int, int], available_bytes: int) -> TrainSettings:
    """The same run in smaller passes where the planned ones need more than nine tenths of the memory.

    needed_bytes: bytes by micro batch, for every divisor of the share of a process. The smallest passes when even they are too much.
    """
    fitting = [m for m, need in needed_bytes.items() if m <= settings.micro_batch and need <= 0.9 * available_bytes]
    micro = max(fitting, default=min(needed_bytes))
    return replace(settings, micro_batch=micro, accumulation=settings.batch // (settings.processes * micro))


def views_of(plans: Plans, protocol: Protocol) -> ViewSpec:
    """What the reasoner is shown: the plan's views; for a protocol that was published with views of its own those, in the
    planned plane and window."""
    return agreed_views(plans.view_spec(), protocol.view_spec)


def read_edits(said: Mapping[str, str]) -> dict[str, Any]:
    """Plan values as typed after --set NAME=VALUE: JSON where it is JSON, else text."""
    edits: dict[str, Any] = {}
    for name, text in said.items():
        try:
            edits[name] = json.loads(text)
        except ValueError:
            edits[name] = text
    return edits


def _micro_batch(batch: int, processes: int, wanted: int) -> int:
    """The largest number up to `wanted` that divides the share of one process."""
    if batch % processes:
        able = [n for n in range(1, batch + 1) if batch % n == 0]
        raise UsageError(
            f"{processes} processes cannot share a batch of {batch} evenly. Start {', '.join(map(str, able[:-1]))} or {able[-1]} "
            "of them, or plan another batch."
        )
    share = batch // processes
    return max(n for n in range(1, min(wanted, share) + 1) if share % n == 0)
