"""The stability objective against its exact gradient, enumerated over all outcomes of a small softmax policy."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.errors import PlanError
from seerseg.rewards import RewardConfig, Stability, Variant
from seerseg.training.stability import flat_groups, group_rewards, shaped, spread_of

ANSWERS = 3
SCORES = np.array([[0.9, 0.3, 0.0], [0.2, 0.8, 0.1]])  # of each answer to each of two paraphrases
LOGITS = np.array([[0.4, -0.3, 0.1], [-0.2, 0.5, 0.0]])
Advantage = Callable[[np.ndarray], np.ndarray]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def objective(logits: np.ndarray, lam: float, variant: str) -> float:
    """J over the paraphrases given, each counting equally."""
    p = softmax(logits)
    means = (p * SCORES).sum(1)
    within = 0.0 if variant == "between" else float(((p * SCORES**2).sum(1) - means**2).mean())
    return float(means.mean() - lam * (within + means.var()))


def true_gradient(lam: float, variant: str) -> np.ndarray:
    grad, h = np.zeros_like(LOGITS), 1e-6
    for place in np.ndindex(LOGITS.shape):
        up, down = LOGITS.copy(), LOGITS.copy()
        up[place] += h
        down[place] -= h
        grad[place] = (objective(up, lam, variant) - objective(down, lam, variant)) / (2 * h)
    return grad


def expected_gradient(advantage: Advantage, samples: int) -> np.ndarray:
    """E[mean over replies of advantage * grad log p], over every outcome of K x m replies; advantage maps scores (K, m) alike."""
    p = softmax(LOGITS)
    paraphrases = len(LOGITS)
    grad = np.zeros_like(LOGITS)
    for flat in itertools.product(range(ANSWERS), repeat=paraphrases * samples):
        chosen = np.array(flat).reshape(paraphrases, samples)
        scores = np.take_along_axis(SCORES, chosen, 1)
        weight = np.take_along_axis(p, chosen, 1).prod()
        worth = advantage(scores)
        for q, s in np.ndindex(chosen.shape):
            grad[q] += weight * worth[q, s] * (np.eye(ANSWERS)[chosen[q, s]] - p[q]) / chosen.size
    return grad


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def rewards(lam: float, variant: Variant) -> Advantage:
    return lambda scores: shaped(scores[None], Stability(lam, variant))[0]


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("lam", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("variant", ["total", "between"])
def test_shaped_rewards_have_the_gradient_of_the_objective(variant: Variant, lam: float, samples: int) -> None:
    assert expected_gradient(rewards(lam, variant), samples) == pytest.approx(true_gradient(lam, variant), abs=1e-9)


def test_with_one_sample_each_the_total_form_is_exact_for_independent_paraphrases() -> None:
    lam = 0.5
    p = softmax(LOGITS)
    grad = np.zeros_like(LOGITS)
    for qs in itertools.product(range(2), repeat=3):  # three paraphrases drawn independently from the two
        for answers in itertools.product(range(ANSWERS), repeat=3):
            scores = np.array([[SCORES[q, a]] for q, a in zip(qs, answers, strict=True)])
            weight = np.prod([p[q, a] for q, a in zip(qs, answers, strict=True)]) / 2**3
            worth = shaped(scores[None], Stability(lam))[0, :, 0]
            for i, (q, a) in enumerate(zip(qs, answers, strict=True)):
                grad[q] += weight * worth[i] * (np.eye(ANSWERS)[a] - p[q]) / 3
    assert grad == pytest.approx(true_gradient(lam, "total"), abs=1e-9)


@pytest.mark.parametrize("variant", ["total", "between"])
def test_the_groups_mean_as_baseline_hardly_bends_it(variant: Variant) -> None:
    """TRL's advantage: reward minus the mean of the group, the reply's own in it, which shortens the step by 1 - 1 / G."""
    give = rewards(0.5, variant)
    found = expected_gradient(lambda s: give(s) - give(s).mean(), 2)
    true = true_gradient(0.5, variant)
    assert cosine(found, true) > 0.997
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(true) * (1 - 1 / 4), rel=0.05)


def test_dividing_by_the_groups_deviation_takes_part_of_the_penalty_back() -> None:
    give = rewards(0.5, "total")
    true = true_gradient(0.5, "total")
    plain = expected_gradient(lambda s: give(s) - give(s).mean(), 2)
    scaled = expected_gradient(lambda s: (give(s) - give(s).mean()) / (give(s).std(ddof=1) + 1e-4), 2)
    assert 1 - cosine(scaled, true) > 10 * (1 - cosine(plain, true))


def test_a_baseline_per_paraphrase_or_means_with_the_reply_itself_are_biased() -> None:
    lam, true = 0.5, true_gradient(0.5, "between")

    def own_baseline(s: np.ndarray) -> np.ndarray:
        r = rewards(lam, "between")(s)
        return r - r.mean(1, keepdims=True)

    def with_itself(s: np.ndarray) -> np.ndarray:
        return np.asarray(s * (1 - 2 * lam * (s.mean(1, keepdims=True) - s.mean())))

    right = expected_gradient(rewards(lam, "between"), 2)
    assert np.abs(right - true).max() < 1e-9
    assert np.abs(expected_gradient(own_baseline, 2) * 2 - true).max() > 1e-3  # times 2: m / (m - 1)
    assert np.abs(expected_gradient(with_itself, 2) - true).max() > 1e-3


@given(st.floats(0, 0.5), st.integers(2, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_better_mask_is_never_punished(lam: float, paraphrases: int, samples: int, seed: int) -> None:
    """dr/dD = 1 - 2 lambda (D - mu) >= 0 for lambda <= 1/2: why a larger one is refused."""
    scores = np.random.default_rng(seed).random((1, paraphrases, samples))
    better = scores.copy()
    better[0, 0, 0] = scores[0, 0, 0] + (1 - scores[0, 0, 0]) / 2
    assert shaped(better, Stability(lam))[0, 0, 0] >= shaped(scores, Stability(lam))[0, 0, 0] - 1e-12


def test_lambda_is_bounded_and_between_needs_two_samples() -> None:
    with pytest.raises(PlanError, match=r"0 to 0\.5"):
        Stability(0.51)
    with pytest.raises(PlanError, match="at least 2 samples"):
        shaped(np.zeros((1, 3, 1)), Stability(0.5, "between"))
    assert shaped(np.full((2, 1, 1), 0.3), Stability(0.5)).tolist() == [[[0.3]], [[0.3]]]


def test_rewards_of_groups_by_hand() -> None:
    config = RewardConfig.from_json({"terms": {"dice": 2.0, "format": 0.5}, "stability": {"lambda": 0.5}})
    values = {"dice": np.array([[[1.0, 0.0], [0.5, 0.5]]]), "format": np.array([[[1.0, 1.0], [0.0, 1.0]]])}
    # other replies' means: for the 1.0: (0 + 0.5) / 2 = 0.25; the 0.0: (1 + 0.5) / 2 = 0.75; each 0.5: (0.5 + 0.5) / 2 = 0.5
    expected = [[2 * (1 - 0.5 * 0.75**2) + 0.5, 2 * (0 - 0.5 * 0.75**2) + 0.5], [1.0, 1.5]]
    assert group_rewards(config, values)[0] == pytest.approx(np.array(expected))
    clipped = RewardConfig.from_json({"terms": {"dice": 2.0, "format": 0.5}, "clip": [0, 1]})
    assert group_rewards(clipped, values).tolist() == [[[1.0, 0.5], [1.0, 1.0]]]


def test_spread_and_flat_groups() -> None:
    scores = np.array([[[1.0, 0.0], [0.2, 0.2]], [[0.6, 0.6], [0.6, 0.6]]])
    spread = spread_of(scores)
    assert (spread.mean, spread.worst, spread.std) == pytest.approx((0.475, 0.4, 0.075))
    assert spread.variance == pytest.approx(0.15**2 / 2)
    assert flat_groups(scores).tolist() == [False, True]
