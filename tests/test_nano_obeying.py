"""Logits that are bent to clicks: every click gets its side, as little as possible is changed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.prompts import Box2D, Box3D, Point
from seerseg.segmenters.nano.obeying import MARGIN, MOST, WIDTH_MM, implied, obeying
from seerseg.volume import Grid

GRID = Grid((20, 24, 28), np.diag([2.0, 2.0, 2.0, 1.0]))


def slope() -> np.ndarray:
    """Inside at low y: logits from 5 to -6.5, one half a voxel."""
    line = 5 - 0.5 * np.arange(24, dtype=np.float32)
    return np.broadcast_to(line[None, :, None], GRID.shape_zyx).copy()


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_every_click_gets_its_side(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, GRID.shape_zyx).astype(np.float32)
    cells = rng.choice(5 * 6 * 7, count, replace=False)  # four voxels apart: 8 mm
    voxels = [tuple(int(v) * 4 + 1 for v in np.unravel_index(cell, (5, 6, 7))) for cell in cells]
    signs = rng.random(count) < 0.5
    points = tuple(Point((float(z), float(y), float(x)), bool(sign)) for (z, y, x), sign in zip(voxels, signs, strict=True))
    out = obeying(logits, GRID, GRID, points)
    assert out.dtype == np.float32
    for voxel, sign in zip(voxels, signs, strict=True):
        assert (out[voxel] if sign else -out[voxel]) >= MARGIN - 0.02


def test_one_click_adds_a_gaussian_of_what_it_lacks() -> None:
    logits = slope()
    out = obeying(logits, GRID, GRID, (Point((10, 14, 14)),))
    need = MARGIN - logits[10, 14, 14]
    assert need == pytest.approx(3.0)
    assert out[10, 14, 14] == pytest.approx(MARGIN, abs=1e-4)
    assert (out - logits)[10, 14, 16] == pytest.approx(need * np.exp(-((4 / WIDTH_MM) ** 2) / 2), rel=1e-3)
    assert (out >= logits).all()
    assert abs((out - logits)[:, 0, 0]).max() < 1e-3


def test_clicks_that_are_obeyed_already_change_nothing() -> None:
    logits = slope()
    assert obeying(logits, GRID, GRID, ()) is logits
    assert obeying(logits, GRID, GRID, (Point((10, 2, 14)), Point((3, 20, 3), positive=False))) is logits
    assert obeying(logits, GRID, GRID, (Point((99, 2, 14)),)) is logits, "outside the grid"


def test_an_obeyed_click_keeps_its_side_beside_one_that_is_not() -> None:
    logits = slope()
    kept = Point((10, 13, 14), positive=False)
    alone = obeying(logits, GRID, GRID, (Point((10, 12, 12)),))
    both = obeying(logits, GRID, GRID, (Point((10, 12, 12)), kept))
    assert alone[10, 13, 14] > -MARGIN
    assert both[10, 13, 14] <= -MARGIN + 0.02
    assert both[10, 12, 12] >= MARGIN - 0.02


def test_the_newest_click_on_a_voxel_counts_and_neighbours_that_contradict_stay_finite() -> None:
    logits = slope()
    last = obeying(logits, GRID, GRID, (Point((10, 14, 14), positive=False), Point((10.2, 14.3, 14))))
    assert last[10, 14, 14] == pytest.approx(MARGIN, abs=1e-4)
    fine = Grid(GRID.shape_zyx, np.diag([0.2, 0.2, 0.2, 1.0]))
    quarrel = obeying(logits, fine, fine, (Point((10, 14, 14)), Point((10, 14, 15), positive=False)))
    assert np.isfinite(quarrel).all()
    assert abs(quarrel - logits).max() <= MOST + 1e-4


def test_clicks_keep_their_place_and_the_field_its_width_on_another_grid() -> None:
    source = Grid((10, 48, 56), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 4, 1], [0, 0, 0, 1]]))
    logits = slope()
    out = obeying(logits, GRID, source, (Point((5, 28, 28)),))  # at (21, 28, 28) mm: halfway between z 10 and 11
    assert out[11, 14, 14] == pytest.approx(MARGIN, abs=1e-4)
    assert np.unravel_index((out - logits).argmax(), out.shape) == (11, 14, 14)


def block(z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
    """Logit 3 inside, -3 outside."""
    out = np.full(GRID.shape_zyx, -3.0, np.float32)
    out[slice(*z), slice(*y), slice(*x)] = 3
    return out


class TestBoxes:
    def test_a_box_that_fits_says_nothing(self) -> None:
        logits = block((5, 12), (6, 16), (8, 20))
        assert implied(logits, GRID, GRID, (Box2D(0, 8, (6, 8), (16, 20)),)) == ()
        assert implied(logits, GRID, GRID, (Box3D((5, 6, 8), (12, 16, 20)),)) == ()
        assert implied(logits, GRID, GRID, ()) == ()

    def test_half_a_voxel_too_far_is_borne(self) -> None:
        logits = block((5, 12), (6, 16), (8, 20))
        assert implied(logits, GRID, GRID, (Box2D(0, 8, (6.4, 8.4), (15.6, 19.6)),)) == ()

    def test_what_is_drawn_beyond_an_edge_is_denied_on_the_slice_of_the_box(self) -> None:
        logits = block((5, 12), (6, 20), (8, 20))
        logits[8, 18, 10] = 5
        clicks = implied(logits, GRID, GRID, (Box2D(0, 8, (6, 8), (16, 20)),))
        assert {point.positive for point in clicks} == {False}
        assert clicks[0].zyx == (8.0, 18.0, 10.0)
        assert clicks[1].zyx[:2] == (8.0, 17.0), "a voxel whose centre is half a voxel beyond is borne"
        out = obeying(logits, GRID, GRID, clicks)
        assert out[8, 18, 10] < 0
        assert (out <= logits).all()

    def test_an_edge_that_nothing_comes_near_is_drawn_to(self) -> None:
        logits = block((5, 12), (6, 12), (8, 20))
        logits[8, 15, 11] = -1
        logits[9, 15, 11] = 0.5
        assert implied(logits, GRID, GRID, (Box2D(0, 8, (6, 8), (16, 20)),)) == (Point((8.0, 15.0, 11.0)),)
        logits[9, 15, 11] = -3
        (deep,) = implied(logits, GRID, GRID, (Box3D((5, 6, 8), (12, 16, 20)),))
        assert deep == Point((8.0, 15.0, 11.0))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_every_plane_alike(self, axis: int) -> None:
        logits = block((5, 12), (6, 14), (8, 17))
        spans = [(a, b) for k, (a, b) in enumerate(((5.0, 12.0), (6.0, 14.0), (8.0, 17.0))) if k != axis]
        (first_lo, first_hi), (second_lo, second_hi) = spans
        smaller = Box2D(axis, 10, (first_lo, second_lo), (first_hi - 2, second_hi))
        clicks = implied(logits, GRID, GRID, (smaller,))
        assert [point.positive for point in clicks] == [False, False]
        assert all(point.zyx[axis] == 10 for point in clicks)

    def test_on_another_grid_clicks_are_in_the_box_s_coordinates(self) -> None:
        source = Grid((40, 48, 56), np.eye(4))
        logits = block((5, 12), (6, 12), (8, 20))
        (click,) = implied(logits, GRID, source, (Box2D(0, 16, (11.0, 15.0), (33.0, 40.0)),))
        assert click.positive
        assert 29 <= click.zyx[1] <= 32
        assert obeying(logits, GRID, source, (click,))[8, int(click.zyx[1] / 2), int(click.zyx[2] / 2)] > 0
