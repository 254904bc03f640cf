"""Which turn of a dialogue earned what.

A dialogue has one reward R, but its turns do not share it alike: what happened before a turn is no merit and no fault of it. With V(t) the
weighted value of the credited term had the dialogue ended before turn t (V(0) = 0), turn t is judged by what was still to come,

    G(t) = R - V(t),    advantage A(t) = G(t) - mean of G(t) over the group's dialogues that have a turn t.

V(t) and the others' mean do not depend on what is said in turn t, so neither bends the expected gradient; a dialogue's own part in the mean
scales it by 1 - 1/n, as in TRL's baseline, and a turn that no other dialogue of the group has is not judged. For the first turn, and so for
protocols of one turn, A(0) is the advantage of the whole dialogue. "Stop here" has G = 0 but for what is left of other terms, so an action
that makes nothing better falls below it by what it costs, however good the mask was before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def turn_advantages(rewards: Floats, before: Floats, group: int) -> Floats:
    """A (replies, turns), 0 where a dialogue has no such turn. rewards: (replies,) in whole groups; before: V (replies, turns), NaN where
    a dialogue has no such turn."""
    to_go = (rewards[:, None] - before).reshape(-1, group, before.shape[1])
    there = ~np.isnan(to_go)
    mean = np.where(there, to_go, 0.0).sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    return np.where(there, to_go - mean, 0.0).reshape(before.shape)


def padded(values: Sequence[Sequence[float]], turns: int) -> Floats:
    """Rows of at most `turns` numbers as (rows, turns), NaN behind them."""
    table = np.full((len(values), turns), np.nan)
    for row, numbers in zip(table, values, strict=True):
        row[: len(numbers)] = numbers
    return table


def of_tokens(advantages: Floats, own: Sequence[Sequence[int]], width: int) -> Floats:
    """(replies, width): for each token after the prompt the advantage of its turn, 0 for what the model was shown. own: 1 for each token
    that the model chose; what it was shown between two turns parts them."""
    table = np.zeros((len(own), width))
    for row, numbers, mask in zip(table, advantages, own, strict=True):
        said = np.asarray(mask, dtype=bool)
        turn = np.cumsum(np.diff(said.astype(int), prepend=0) == 1) - 1
        row[: len(said)][said] = numbers[turn[said]]
    return table
