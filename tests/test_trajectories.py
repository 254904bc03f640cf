"""The simulated expert on segmenters whose masks are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.errors import SegmenterError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Capabilities
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.volume import Grid, Volume, decode_runs
from seerseg_data.trajectories import Expert, deepest, demonstrate, error_points

PERFECT = Expert(jitter=0.0, imperfect=0.0, least_dice=0.0, least_gain=0.001)


def scene(shape=(8, 48, 48), spacing=3.0, bright=900) -> tuple[Volume, np.ndarray]:
    """A bright cuboid on noise."""
    array = np.random.default_rng(0).integers(0, 60, shape).astype(np.int16)
    target = np.zeros(shape, bool)
    target[(slice(2, 6) if shape[0] > 1 else slice(0, 1)), 12:30, 16:40] = True
    array[target] += bright
    return Volume(array, Grid(shape, np.diag([spacing, spacing, spacing, 1.0])), "MR"), target


@pytest.mark.parametrize("shape", [(8, 48, 48), (1, 48, 48)])
def test_box_first_then_clicks_then_a_stop(shape: tuple[int, int, int]) -> None:
    volume, target = scene(shape)
    shown = [0] if shape[0] == 1 else [1, 3, 5]
    made = demonstrate(volume, target, ScriptedSegmenter({}), axis=0, indices=shown, rng=np.random.default_rng(1), expert=PERFECT)
    first, *clicks, stop = made.turns
    assert first.prompt is not None
    assert first.prompt.boxes == (Box2D(0, shown[1] if shape[0] > 1 else 0, (12.0, 16.0), (30.0, 40.0)),)
    assert stop.prompt is None
    assert stop.dice == made.final
    assert len(made.turns) <= 5
    dice = [turn.dice for turn in made.turns]
    assert dice == sorted(dice)
    for turn in (first, *clicks):
        mask = decode_runs(turn.mask, target.shape)
        assert turn.dice == pytest.approx(2 * (mask & target).sum() / (mask.sum() + target.sum()), abs=1e-4)
    for turn in clicks:
        assert turn.prompt is not None
        (point,) = turn.prompt.points
        assert int(point.zyx[0]) in shown
    assert len(clicks) >= (1 if shape[0] > 1 else 0)
    assert made.kept


def test_the_same_seed_gives_the_same_trajectory_and_imperfect_starts_are_mended() -> None:
    volume, target = scene()
    bad = Expert(jitter=0.05, imperfect=1.0, least_dice=0.0, least_gain=0.001)
    runs = [demonstrate(volume, target, ScriptedSegmenter({}), axis=0, rng=np.random.default_rng(n), expert=bad) for n in (3, 3, 4)]
    assert [t.dice for t in runs[0].turns] == [t.dice for t in runs[1].turns]
    assert [t.prompt.to_json() for t in runs[0].turns[:-1] if t.prompt] == [t.prompt.to_json() for t in runs[1].turns[:-1] if t.prompt]
    assert all(run.imperfect and run.final > run.start for run in runs)
    assert [t.learn for t in runs[0].turns] == [False] + [True] * (len(runs[0].turns) - 1), "the bad box is not to be learned"
    assert runs[2].turns[0].prompt != runs[0].turns[0].prompt


def test_grow_is_shown_with_and_its_mask_is_good() -> None:
    volume, target = scene()
    made = demonstrate(volume, target, load_segmenter("grow"), axis=0, indices=[1, 3, 5], rng=np.random.default_rng(0))
    assert made.kept
    assert made.final > 0.8


def test_bad_ends_are_dropped_with_a_reason() -> None:
    volume, target = scene()
    none = ScriptedSegmenter({}, on_spatial=lambda volume, prompt: None)
    made = demonstrate(volume, target, none, axis=0, rng=np.random.default_rng(0))
    assert not made.kept
    assert "below 0.5" in made.fault
    unseen = demonstrate(volume, target, ScriptedSegmenter({}), axis=0, indices=[0, 7], rng=np.random.default_rng(0))
    assert unseen.turns == ()
    assert "none of the slices" in unseen.fault


def test_a_segmenter_without_sessions_is_refused() -> None:
    class Closed(ScriptedSegmenter):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(text="open")

    volume, target = scene()
    with pytest.raises(SegmenterError, match="cannot show trajectories"):
        demonstrate(volume, target, Closed({}), axis=0, rng=np.random.default_rng(0))


def test_the_largest_error_is_clicked_at_its_deepest_point_with_the_right_sign() -> None:
    target, mask = np.zeros((4, 30, 30), bool), np.zeros((4, 30, 30), bool)
    target[1, 2:9, 2:9] = True  # missed: 7 x 7
    mask[2, 10:21, 10:25] = True  # spilt: 11 x 15
    assert error_points(mask, target, (1, 1, 1), axis=0, indices=[1, 2], most=2) == [((2, 15, 15), False), ((1, 5, 5), True)]
    assert error_points(mask, target, (1, 1, 1), axis=0, indices=[1]) == [((1, 5, 5), True)]
    assert error_points(mask, mask, (1, 1, 1)) == []


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_clicks_lie_inside_errors(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    mask, target = (rng.random((depth, 9, 9)) < 0.5 for _ in range(2))
    for indices in (None, [0]):
        for zyx, positive in error_points(mask, target, (2.0, 1.0, 1.0), axis=0, indices=indices, most=3):
            assert mask[zyx] != target[zyx]
            assert target[zyx] == positive
            assert indices is None or zyx[0] == 0
    if mask.any():
        assert mask[deepest(mask, (2.0, 1.0, 1.0))]


def test_prompts_lie_on_the_grid() -> None:
    volume, target = scene()
    target[:] = False
    target[3, :5, :3] = True  # at the border
    wild = Expert(jitter=0.5, imperfect=1.0, least_dice=0.0)
    for seed in range(20):
        made = demonstrate(volume, target, ScriptedSegmenter({}), axis=0, indices=[3], rng=np.random.default_rng(seed), expert=wild)
        for turn in made.turns[:-1]:
            assert turn.prompt is not None
            turn.prompt.check(volume.grid)
            assert turn.prompt == Prompt(boxes=turn.prompt.boxes, points=turn.prompt.points) or turn.prompt.kinds <= {"box2d", "points"}
            assert all(isinstance(p, Point) for p in turn.prompt.points)
