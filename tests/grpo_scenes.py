"""A small world for training by reward: phantom volumes with two boxes to name, a scripted segmenter, a tiny Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_vlms

from seerseg.episode import Targets
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer, Fault
from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, find, load
from seerseg.rewards import RewardConfig, Truth
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.skills.base import Skill
from seerseg.training.grpo import make_trainer
from seerseg.training.guards import GrpoSettings
from seerseg.training.rollout import ParaphraseSet, Rollouts
from seerseg.views import CaseViews, ViewSpec, overlay, render
from seerseg.volume import Grid, Mask, Volume

GRID = Grid((6, 8, 8), np.eye(4))
SPEC = ViewSpec(size_px=32, count=2)
SETS = (
    ParaphraseSet("a", ("left lung",), ("left lung", "outline the left lung", "the lung, left")),
    ParaphraseSet("a", ("right lung",), ("right lung", "right lung please")),
    ParaphraseSet("b", ("ribs",), ("ribs", "the ribs please", "outline ribs")),
    ParaphraseSet("b", None, ("vertebral column", "column")),
)


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros(GRID.shape_zyx, bool)
    mask[:, number : number + 3, 1:6] = True
    return mask


MASKS = {"left lung": mask_of(0), "right lung": mask_of(2), "ribs": mask_of(4)}


class Scenes:
    """Two cases in memory."""

    targets = Targets(tuple(MASKS), closed=False)

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(0, 200, (2, *GRID.shape_zyx)).astype(np.int16)
        self._volumes = {case: Volume(noise[i], GRID, modality="CT", name=case) for i, case in enumerate("ab")}
        self._views = {case: render(volume, SPEC) for case, volume in self._volumes.items()}

    def views(self, case: str) -> CaseViews:
        return self._views[case]

    def volume(self, case: str) -> Volume:
        return self._volumes[case]

    def truth(self, case: str, target: tuple[str, ...] | None) -> Truth:
        return Truth(GRID, None if target is None else MASKS[target[0]], target or ())


class Letters:
    """One turn; any reply is an answer: its first letter chooses the mask. Random models get rewards that vary."""

    name = "letters"
    max_turns = 1
    prompt_kinds = frozenset({"text"})
    view_spec = SPEC

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        images = [ImagePart(view.pixels, view.key) for view in views.views]
        known = "".join(f"<{skill.id}>" for skill in skills)
        return [
            text_message("system", "You turn a request into a name."),
            Message("user", (*images, TextPart(f"Name it. {known}{request}"))),
        ]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        if not reply:
            return Fault("It is empty.")
        name = ("left lung", "right lung", "ribs")[ord(reply[0]) % 3]
        return Answer(target=None, prompt=None, absent=True) if len(reply) % 5 == 0 else Answer(target=name, prompt=Prompt(text=name))

    def targets(self, trace: Any, views: CaseViews) -> tuple[str, ...]:
        return ("",)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        return None

    def wellformed(self, reply: str) -> float:
        return min(1.0, len(reply) / 20)


class Turns(Letters):
    """Three turns at most; the mask is shown back, painted on a slice."""

    name = "turns"
    max_turns = 3

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        read = super().read(reply, views)
        return replace(read, done=len(reply) % 3 == 0) if isinstance(read, Answer) and not read.absent else read

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        painted = overlay(views.views[0], MASKS["ribs"][views.views[0].index] if mask is None else mask.array[views.views[0].index])
        return Message("user", (ImagePart(painted.pixels, painted.key), TextPart("Go on.")))


def model_folder(folder: Path) -> Path:
    return tiny_vlms.qwen(folder, "3")


def loaded_model(folder: Path, *, lora: bool = False) -> Loaded:
    loaded = load(find(folder, offline=True), device="cpu", dtype="float32")
    model = loaded.model.requires_grad_(True)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model.requires_grad_(False), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return replace(loaded, model=model.train())


def rollouts_of(
    loaded: Loaded, protocol: Any = None, reward: RewardConfig | None = None, *, tokens: int = 8, segmenter: Any = None, **more: Any
) -> Rollouts:
    base = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    reasoner = VlmReasoner(replace(loaded, model=base), Decoding(max_new_tokens=tokens, max_batch=64))
    reward = reward or RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.5}, "stability": {"lambda": 0.5}})
    return Rollouts(reasoner, Scenes(), protocol or Letters(), segmenter or CachedSegmenter(ScriptedSegmenter(MASKS)), reward, **more)


def trainer_of(
    loaded: Loaded, out: Path, rollouts: Rollouts | None = None, *, sets: Sequence[ParaphraseSet] = SETS, steps: int = 2,
    paraphrases: int = 2, samples: int = 2, micro: int = 4, accumulation: int = 2, resamples: int = 1, beta: float = 0.0,
    callbacks: Sequence[Any] = (), val: Sequence[ParaphraseSet] = (), evaluate_steps: int = 0, **arguments: Any,
) -> Any:  # fmt: skip
    rollouts = rollouts or rollouts_of(loaded)
    return make_trainer(
        loaded,
        rollouts,
        sets,
        GrpoSettings(paraphrases, samples, seed=5, resamples=resamples),
        arguments={
            "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "seed": 5, "use_cpu": True, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "beta": beta,
            "optim": "sgd", "bf16": False, **arguments,
        },
        callbacks=callbacks,
        val=val,
        evaluate_steps=evaluate_steps,
        max_new_tokens=rollouts.reasoner.decoding.max_new_tokens,
    )  # fmt: skip
