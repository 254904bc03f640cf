"""Credit for turns: by hand, and its expected gradient enumerated over all outcomes of a small game of two turns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from seerseg.errors import PlanError
from seerseg.rewards import Attempt, Overlap, RewardConfig, Truth, improving
from seerseg.training.credit import of_tokens, padded, turn_advantages
from seerseg.volume import Grid

NAN = np.nan


def test_by_hand() -> None:
    # three dialogues of one group: two turns, one turn, three turns; and a group of its own
    rewards = np.array([0.8, 0.5, 0.2, 1.0, 0.4, 0.4])
    before = padded([[0, 0.7], [0], [0, 0.4, 0.3], [0, 0.2], [0, 0.1], [0]], 3)
    found = turn_advantages(rewards, before, 3)
    assert found[0] == pytest.approx([0.3, 0.1 - (0.1 - 0.2) / 2, 0])
    assert found[1] == pytest.approx([0.0, 0, 0])
    assert found[2] == pytest.approx([-0.3, -0.2 - (0.1 - 0.2) / 2, 0]), "nobody else has a third turn"
    assert found[3] == pytest.approx([0.4, 0.8 - 0.55, 0])
    assert found[4] == pytest.approx([-0.2, 0.3 - 0.55, 0])


def test_tokens_take_their_turns_advantage() -> None:
    own = [[1, 1, 0, 0, 1, 0, 1, 1], [1], [1, 1, 0, 1]]
    advantages = np.array([[1.0, 2.0, 3.0], [4.0, 0, 0], [5.0, 6.0, 0]])
    table = of_tokens(advantages, own, 9)
    assert table.tolist() == [[1, 1, 0, 0, 2, 0, 3, 3, 0], [4, 0, 0, 0, 0, 0, 0, 0, 0], [5, 5, 0, 6, 0, 0, 0, 0, 0]]


def test_one_turn_is_the_advantage_of_the_whole_reply() -> None:
    rewards = np.random.default_rng(0).random(8)
    found = turn_advantages(rewards, np.zeros((8, 1)), 4)[:, 0].reshape(2, 4)
    assert np.allclose(found, rewards.reshape(2, 4) - rewards.reshape(2, 4).mean(1, keepdims=True))


# first action: 0 stops with a mask worth 0.5, the others go on from masks worth this; second action, by the first: the worth then
WORTH = np.array([0.5, 0.1, 0.9])
LAST = np.array([[NAN, NAN], [0.05, 0.2], [0.95, 0.85]])
FIRST_LOGITS, SECOND_LOGITS = np.array([0.1, -0.2, 0.3]), np.array([[0.0, 0.0], [0.4, -0.1], [-0.3, 0.2]])
PLAYS = [(0, None), *((a, b) for a in (1, 2) for b in (0, 1))]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits)
    return e / e.sum(-1, keepdims=True)


def probability(play: tuple[int, int | None], first: np.ndarray, second: np.ndarray) -> float:
    a, b = play
    return float(softmax(first)[a] * (1 if b is None else softmax(second[a])[b]))


def reward(play: tuple[int, int | None]) -> float:
    a, b = play
    return float(WORTH[a] if b is None else LAST[a, b] - 0.05)


def gradient(play: tuple[int, int | None], advantage: np.ndarray) -> np.ndarray:
    """Of the sum over turns of advantage * log p, as one vector of all logits."""
    a, b = play
    first, second = np.zeros(3), np.zeros((3, 2))
    first += advantage[0] * (np.eye(3)[a] - softmax(FIRST_LOGITS))
    if b is not None:
        second[a] += advantage[1] * (np.eye(2)[b] - softmax(SECOND_LOGITS[a]))
    return np.concatenate([first, second.ravel()])


def enumerated(turns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, over all outcomes of a group of two, of the group's mean gradient."""
    mean, square = np.zeros(9), np.zeros(9)
    for pair in itertools.product(PLAYS, repeat=2):
        weight = np.prod([probability(play, FIRST_LOGITS, SECOND_LOGITS) for play in pair])
        rewards = np.array([reward(play) for play in pair])
        before = padded([[0.0] if b is None else [0.0, WORTH[a] if turns else 0.0] for a, b in pair], 2)
        found = turn_advantages(rewards, before, 2)
        if not turns:
            found[:, 1] = found[:, 0]  # the whole dialogue's for every turn
        one = np.mean([gradient(play, row) for play, row in zip(pair, found, strict=True)], axis=0)
        mean, square = mean + weight * one, square + weight * one**2
    return mean, square - mean**2


def test_the_expected_gradient_is_that_of_the_reward() -> None:
    def objective(logits: np.ndarray) -> float:
        first, second = logits[:3], logits[3:].reshape(3, 2)
        return sum(probability(play, first, second) * reward(play) for play in PLAYS)

    logits = np.concatenate([FIRST_LOGITS, SECOND_LOGITS.ravel()])
    h = 1e-6
    true = np.array([(objective(logits + h * e) - objective(logits - h * e)) / (2 * h) for e in np.eye(9)])
    mean, variance = enumerated(turns=True)
    goes_on = 1 - softmax(FIRST_LOGITS)[0]
    assert np.allclose(mean[:3], true[:3] / 2, atol=1e-9), "a baseline of two with one's own reward in it halves"
    assert np.allclose(mean[3:], true[3:] / 2 * goes_on, atol=1e-9), "the second turn is judged where the other dialogue has one, too"
    whole_mean, whole = enumerated(turns=False)
    assert np.allclose(whole_mean, true / 2, atol=1e-9)
    # per unit of expected gradient, which is smaller where only one of two dialogues goes on
    assert (variance[5:] / goes_on**2 < 0.3 * whole[5:]).all(), "what happened before the turn no longer weighs"


def test_values_before_turns_follow_from_the_masks_so_far() -> None:
    config = RewardConfig.from_json("medsam-agent/turns")
    truth = Truth(Grid((2, 2, 2), np.eye(4)), np.ones((2, 2, 2), bool))
    masks = (Overlap(0.8, 0.7), Overlap(0.6, 0.4), Overlap(0.9, 0.8))
    attempt = Attempt(("a", "b", "c", "d"), (), truth.mask, masks, 1.0)
    found = config.before_turns(attempt, truth)
    after_two = (0.4 + 0.6) / 2 - (0.7 - 0.4) - 0.02
    after_three = (0.8 + 0.9) / 2 - 0.03 + 0.1 * 0.1
    assert found == pytest.approx([0, 0.8 * 0.75, 0.8 * after_two, 0.8 * after_three])
    assert config.total(config.values(attempt, truth)) == pytest.approx(0.8 * after_three), "a stop adds nothing"
    assert RewardConfig.from_json("medsam-agent/mended").before_turns(attempt, truth) == (0, 0, 0, 0)
    absent = Truth(truth.grid, None)
    assert config.before_turns(attempt, absent) == (0, 0, 0, 0), "what is not there earns nothing before it is said"
    assert improving(masks) == (True, False, True)
    assert improving([Overlap(0, 0), Overlap(0.1, 0.1), Overlap(0.1, 0.1)]) == (False, True, False)


@pytest.mark.parametrize(
    ("turns", "says"),
    [("format", "Turns cannot be credited by 'format'"), ("iou", "'iou', which has no weight"), (3, "cannot be credited")],
)
def test_turns_are_credited_by_what_masks_have(turns: object, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.1}, "turns": turns})


def test_a_preset_without_its_term_credits_no_turns() -> None:
    assert RewardConfig.from_json({"preset": "medsam-agent/turns", "terms": {"dice": 1.0}}).turns is None
    assert RewardConfig.from_json({"preset": "medsam-agent/turns", "turns": None}).turns is None
    assert RewardConfig.from_json({"terms": {"dice": 1.0}, "turns": "dice"}).to_json()["turns"] == "dice"
