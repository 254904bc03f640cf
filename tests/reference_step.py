"""GRPO in plain torch, without TRL: what a step of our training must come to. dr_grpo, one update per batch, no scaling of advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from seerseg.training.rollout import Rollout


def log_probabilities(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Of every token after the prompt, by one unpadded forward pass of one dialogue."""
    ids = torch.tensor([rollout.prompt.ids + rollout.reply])
    kinds = {}
    if "image_grid_thw" in rollout.line.images:  # positions of Qwen's models follow from it
        image = model.config.image_token_id
        kinds["mm_token_type_ids"] = (ids == image).long()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **rollout.line.images, use_cache=False).logits[0, :-1]
    chosen = torch.log_softmax(logits.float() / temperature, -1).gather(-1, ids[0, 1:, None])[:, 0]
    return chosen[len(rollout.prompt.ids) - 1 :]


def loss_of(
    model: Any,
    reference: Any,
    rollouts: Sequence[Rollout],
    rewards: torch.Tensor,
    *,
    group: int,
    longest: int,
    beta: float,
    credit: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean over replies of likelihood ratio (1 in value) times (beta times the divergence minus the advantage), summed over own tokens and
    divided by the constant length; the divergence is exp(d) - d - 1 with d = log reference - log model. The ratio before it makes its
    gradient that of the reverse KL divergence (arXiv 2512.02556). credit: for each reply the advantages of its tokens, where they are not
    all the reply's."""
    grouped = rewards.reshape(-1, group)
    advantages = (grouped - grouped.mean(1, keepdim=True)).reshape(-1)
    total = torch.zeros(())
    for rollout, advantage in zip(rollouts, advantages if credit is None else credit, strict=True):
        own = torch.tensor(rollout.own, dtype=torch.float32)
        now = log_probabilities(model, rollout)
        ratio = torch.exp(now - now.detach())
        term = -advantage * ratio
        if beta:
            with torch.no_grad():
                then = log_probabilities(reference, rollout)
            term = term + beta * ratio * (torch.exp(then - now) - (then - now) - 1)
        total = total + (term * own).sum()
    return total / (len(rollouts) * longest)


def step(model: Any, reference: Any, rollouts: Sequence[Rollout], rewards: torch.Tensor, *, rate: float, **settings: Any) -> float:
    """One update by gradient descent; gives the loss before it."""
    model.zero_grad()
    loss = loss_of(model, reference, rollouts, rewards, **settings)
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= rate * weight.grad
    return float(loss.detach())
