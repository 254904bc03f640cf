"""The stability objective J = E[D] - lambda * Var over a paraphrase set, as a reward that plain policy gradient can climb.

D is a score 0..1 of one reply, given to one of K equivalent requests, m replies each; all K m share a group. With the mean mu held fixed,

    total:    r = D - lambda (D - mu)^2                  has the gradient of  E[D] - lambda Var[D], over paraphrases and sampling
    between:  r = D (1 - 2 lambda (mu_q - mu))           has the gradient of  E[D] - lambda Var_q(E[D | q]), over paraphrases alone

Neither mean is known: each reply gets means over the other replies alone, every paraphrase counting equally. With m >= 2 the expected
gradient of the shaped rewards is then exactly that of J over the K paraphrases (tests enumerate it). With m = 1 the total form takes the
mean over the other paraphrases, which is exact where paraphrases are drawn independently; the between form cannot be had. Dividing
advantages by the group's standard deviation takes lambda back in part, and a baseline per paraphrase cancels what is to be learnt from the
spread: rewards are not scaled and the baseline is the group's. TRL's, the mean with the reply's own reward in it, bends the direction by
less than 0.3 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import PlanError
from seerseg.rewards import RewardConfig, Stability

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """What a batch of groups shows, each number the mean over groups: of the score, of the worst paraphrase's mean, of the standard
    deviation (ddof 0) and the variance of the paraphrases' means."""

    mean: float
    worst: float
    std: float
    variance: float


def shaped(scores: Scores, stability: Stability) -> Scores:
    """Scores (groups, K, m) with the penalty in them, same shape. PlanError for the between form with one sample per paraphrase."""
    _, paraphrases, samples = scores.shape
    if stability.variant == "between" and samples < 2:
        raise PlanError("The stability variant 'between' needs at least 2 samples per paraphrase (grpo.samples); use 'total' with one.")
    if paraphrases * samples < 2:
        return scores.copy()
    own = scores.mean(2, keepdims=True)
    total = own.sum(1, keepdims=True)
    if samples > 1:
        others_own = (own * samples - scores) / (samples - 1)
        others_all = (total - own + others_own) / paraphrases
    else:
        others_own = scores
        others_all = (total - own) / (paraphrases - 1)
    if stability.variant == "between":
        return np.asarray(scores * (1 - 2 * stability.lam * (others_own - others_all)))
    return np.asarray(scores - stability.lam * (scores - others_all) ** 2)


def group_rewards(config: RewardConfig, values: dict[str, Scores]) -> Scores:
    """Rewards (groups, K, m) from every term's values in that shape: weighted, clipped, and the stability penalty on its term."""
    total = np.zeros_like(next(iter(values.values())))
    for name, weight in config.terms.items():
        total = total + weight * values[name]
    if config.clip is not None:
        total = total.clip(*config.clip)
    if config.stability is not None and config.stability.lam:
        score = values[config.stability.term]
        total = total + config.terms[config.stability.term] * (shaped(score, config.stability) - score)
    return np.asarray(total)


def spread_of(scores: Scores) -> Spread:
    """How scores (groups, K, m) spread over paraphrases."""
    means = scores.mean(2)
    return Spread(float(means.mean()), float(means.min(1).mean()), float(means.std(1).mean()), float(means.var(1).mean()))


def flat_groups(rewards: Scores, tolerance: float = 1e-6) -> NDArray[np.bool_]:
    """Which groups (groups,) teach nothing: all rewards equal."""
    return np.asarray(np.ptp(rewards.reshape(len(rewards), -1), axis=1) <= tolerance)
