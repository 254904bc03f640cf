"""What training by reward refuses before its first step: each would go wrong silently, or late.

Found by running TRL 1.16; every guard has a test that sees it refuse.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from seerseg.errors import MissingExtraError, ModelError, PlanError, UsageError
from seerseg.segmenters.base import Segmenter
from seerseg.training.data import Ground
from seerseg.training.rollout import Rollouts

TESTED_TRL = ((1, 16), (1, 17))
"""From the first version up to, not including, the second: three private methods of its trainer are overridden."""
RESAMPLES = 1


@dataclass(frozen=True)
class GrpoSettings:
    """What the trainer needs beside TRL's arguments: K wordings, m replies to each, how often flat groups are drawn anew."""

    paraphrases: int
    samples: int
    seed: int = 0
    resamples: int = RESAMPLES

    @property
    def group(self) -> int:
        """Replies that share a baseline."""
        return self.paraphrases * self.samples


def check_trl(installed: str | None = None) -> None:
    """ModelError for a TRL outside the tested range, MissingExtraError when there is none."""
    try:
        version = installed or importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("Training by reward needs TRL: pip install 'seerseg[train]'.") from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED_TRL[0] <= numbers < TESTED_TRL[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED_TRL)
        raise ModelError(
            f"TRL {version} is installed; training by reward overrides private methods of it and was tested from {low} to below {high}. "
            f"Install one of those: pip install 'trl>={low},<{high}'."
        )


def check_batch(replies: int, grpo: GrpoSettings) -> None:
    """PlanError for a batch that does not hold whole groups, and for groups of one."""
    if grpo.group < 2:
        raise PlanError("A group needs at least 2 replies: raise paraphrases.count or grpo.samples.")
    if replies % grpo.group:
        raise PlanError(f"The batch of {replies} replies does not hold whole groups of {grpo.group}; plan a multiple of it.")


def check_arguments(config: Any, grpo: GrpoSettings) -> None:
    """Refuse what TRL would do silently otherwise than our mathematics needs."""
    if config.use_vllm and config.vllm_mode == "server":
        raise UsageError(
            "vLLM's server mode gives the first wording's replies to all wordings of a group: TRL sends it one prompt per group. "
            "Leave use_vllm off; rollouts then use our own decode loop, which shares prefixes."
        )
    if config.use_vllm or config.use_transformers_continuous_batching:
        raise UsageError(
            "Rollouts use our own decode loop, whose replies follow from seed, step and place; turn use_vllm and "
            "use_transformers_continuous_batching off."
        )
    if config.num_generations != grpo.group:
        raise PlanError(
            f"num_generations is {config.num_generations}, but {grpo.paraphrases} wordings times {grpo.samples} replies share a group."
        )
    if config.steps_per_generation != config.gradient_accumulation_steps or config.num_iterations != 1:
        raise PlanError(
            "Replies are drawn once per update and used once: steps_per_generation must equal gradient_accumulation_steps, and "
            "num_iterations must be 1."
        )
    if config.scale_rewards not in ("none", False):
        raise PlanError(
            f"scale_rewards is {config.scale_rewards!r}: dividing by the group's deviation takes part of the stability penalty back. "
            "Set it to 'none'."
        )
    if config.loss_type != "dr_grpo":
        raise PlanError(
            f"loss_type is {config.loss_type!r}: losses that divide by a reply's length climb another objective. Set it to 'dr_grpo'."
        )
    if (config.top_p, config.top_k or 0, config.min_p or 0, config.repetition_penalty) != (1.0, 0, 0, 1.0):
        raise PlanError(
            "Replies must be drawn as the model gives them (top_p 1, no top_k, min_p or repetition_penalty): the gradient is of that."
        )


def check_model(rollouts: Rollouts) -> None:
    """ModelError for models whose rollouts could not be learnt from, PlanError for a penalty that cannot be had."""
    reasoner = rollouts.reasoner
    decoder, config = reasoner.decoder, reasoner.model.config
    if not decoder.mrope and rollouts.protocol.max_turns > 1:
        raise ModelError(
            f"Dialogues of the protocol {rollouts.protocol.name} show masks back, and models of type {config.model_type!r} cannot be shown "
            "further images while they are trained. Choose a protocol of one turn, or a model of Qwen's vision-language kinds."
        )
    image_tokens = [config.to_dict().get(f"{kind}_token_id") for kind in ("image", "video")]
    loose = [token for token in image_tokens if isinstance(token, int) and token not in decoder.suppressed]
    if loose:
        raise ModelError(
            f"The model may write the image tokens {loose}, after which a reply has no positions: they end a reply or lie outside its "
            "vocabulary. Its tokenizer or config is damaged."
        )
    if reasoner.decoding.top_p != 1.0:
        raise ModelError("Rollouts with top_p below 1 have another gradient than the policy's. Use top_p 1.")


def check_segmenter(segmenter: Segmenter, ground: Ground) -> None:
    """UsageError when the segmenter cannot take any of what the protocol's answers give it."""
    able = set(segmenter.capabilities.kinds)
    if not able & ground.protocol.prompt_kinds:
        raise UsageError(
            f"Answers of the protocol {ground.protocol.name} are {', '.join(sorted(ground.protocol.prompt_kinds))}, but the segmenter "
            f"{segmenter.card.name} takes {', '.join(sorted(able)) or 'nothing'}. Choose another segmenter or protocol."
        )
