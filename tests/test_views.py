"""Slices as doctors see them, and the way back to voxels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.protocols.messages import image_of
from seerseg.views import PLANES, SEER_VIEWS, ViewSpec, mask_pixels, montage, overlay, pixel_map, render, render_slice, slice_indices
from seerseg.volume import Grid, Volume

shapes = st.tuples(*[st.integers(1, 40)] * 3)
spacings = st.tuples(*[st.floats(0.3, 12.0)] * 3)


def grid_of(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    return Grid(shape, np.diag([*spacing, 1.0]))


@given(shapes, spacings, st.sampled_from(PLANES), st.integers(16, 512), st.data())
def test_pixels_and_voxels_are_inverse(shape, spacing, plane, size_px, data) -> None:
    grid = grid_of(shape, spacing)
    axis = PLANES.index(plane)
    voxel = tuple(float(data.draw(st.integers(0, n - 1))) for n in shape)
    where = pixel_map(grid, axis, int(voxel[axis]), size_px)
    row, col = where.to_pixel(voxel)
    assert where.to_voxel(row, col) == pytest.approx(voxel)
    assert -0.5 <= row < size_px
    assert -0.5 <= col < size_px


@given(shapes, spacings, st.sampled_from(PLANES), st.data())
def test_boxes_are_edges(shape, spacing, plane, data) -> None:
    grid, axis = grid_of(shape, spacing), PLANES.index(plane)
    where = pixel_map(grid, axis, 0, 448)
    lo = tuple(data.draw(st.integers(0, n - 1)) for n in where.voxels)
    hi = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(lo, where.voxels, strict=True))
    box = where.box_to_pixel(lo, hi)
    back = where.box_to_voxel(*box)
    assert back[0] == pytest.approx(lo)
    assert back[1] == pytest.approx(hi)
    # the whole slice is exactly the picture's inner rectangle
    row0, col0, row1, col1 = where.box_to_pixel((0, 0), where.voxels)
    assert row1 - row0 == pytest.approx(where.scale[0] * where.voxels[0])
    assert -1e-6 <= row0 <= row1 <= 448 + 1e-6
    assert -1e-6 <= col0 <= col1 <= 448 + 1e-6


@pytest.mark.parametrize("plane", PLANES)
def test_a_marked_voxel_is_shown_where_the_map_says(plane: str) -> None:
    grid = grid_of((12, 17, 23), (1.0, 2.0, 3.5))
    mask = np.zeros(grid.shape_zyx, bool)
    mask[3, 5, 7] = True
    axis = PLANES.index(plane)  # type: ignore[arg-type]
    index = (3, 5, 7)[axis]
    where = pixel_map(grid, axis, index, 230)
    rows, cols = np.nonzero(mask_pixels(np.take(mask, index, axis), where, 230))
    assert (rows.mean(), cols.mean()) == pytest.approx(where.to_pixel((3, 5, 7)), abs=0.5)


def test_display_is_radiological() -> None:
    array = np.zeros((9, 9, 9), np.int16)
    array[4, 4, 8] = 100  # the patient's right
    array[4, 8, 4] = 200  # anterior
    array[8, 4, 4] = 300  # superior
    volume = Volume(array, grid_of((9, 9, 9), (1.0, 1.0, 1.0)))

    axial = render_slice(volume, ViewSpec(size_px=9, window=(150, 300)), 4).pixels[..., 0]
    assert axial[4, 0] > axial[4, 8]  # the patient's right on the left
    assert axial[0, 4] > axial[8, 4]  # anterior on top
    for plane in ("coronal", "sagittal"):
        pixels = render_slice(volume, ViewSpec(plane=plane, size_px=9, window=(150, 300)), 4).pixels[..., 0]  # type: ignore[arg-type]
        assert pixels[0, 4] == 255  # superior on top
        assert pixels[8, 4] == 0
    sagittal = render_slice(volume, ViewSpec(plane="sagittal", size_px=9, window=(150, 300)), 4).pixels[..., 0]
    assert sagittal[4, 0] > sagittal[4, 8]  # anterior on the left


def test_the_seer_selection() -> None:
    assert slice_indices(8, 101, 0.1, 0.9) == [10, 21, 33, 44, 56, 67, 79, 90]
    assert slice_indices(8, 3, 0.1, 0.9) == [0, 1, 2]
    assert slice_indices(8, 1, 0.1, 0.9) == [0]
    views = render(Volume(np.random.default_rng(0).integers(0, 9, (30, 20, 10), np.int16), grid_of((30, 20, 10), (1, 1, 1))))
    assert len(views.views) == 8
    assert views.spec == SEER_VIEWS
    assert views.views[0].pixels.shape == (448, 448, 3)


@pytest.mark.parametrize("fill", [0, np.nan, np.inf])
def test_constant_and_non_finite_slices_are_shown_black_or_white_without_warning(fill: float) -> None:
    array = np.full((3, 4, 5), fill, np.float32)
    pixels = render(Volume(array, grid_of((3, 4, 5), (1, 1, 1)))).views[0].pixels
    assert pixels.dtype == np.uint8


def test_spec_round_trip_and_windows() -> None:
    for spec in (ViewSpec(window=(40.0, 400.0), plane="coronal"), ViewSpec(window="volume"), SEER_VIEWS):
        assert ViewSpec.from_json(spec.to_json()) == spec
    volume = Volume(np.array([[[-160, 40, 240]]], np.int16), grid_of((1, 1, 3), (1, 1, 1)))
    row = render_slice(volume, ViewSpec(size_px=3, window=(40.0, 400.0)), 0).pixels[1, :, 0]
    assert row.tolist() == [255, 128, 0]


def test_the_padding_of_a_ct_does_not_eat_the_window() -> None:
    array = np.full((1, 10, 10), -3024, np.int16)
    array[0, 2:8, 2:8] = np.linspace(-1000, 400, 36).reshape(6, 6)
    grid = grid_of(array.shape, (1, 1, 1))
    for window in ("slice", "volume"):
        spec = ViewSpec(size_px=10, window=window)  # type: ignore[arg-type]
        ct = render_slice(Volume(array, grid, modality="CT"), spec, 0).pixels[..., 0]
        other = render_slice(Volume(array, grid), spec, 0).pixels[..., 0]
        assert int(ct.max()) - int(ct[7, 7]) > 240
        assert int(other.max()) - int(other[7, 7]) < 130  # in another modality low values may be real


def test_overlay_and_montage() -> None:
    volume = Volume(np.zeros((2, 10, 10), np.int16), grid_of((2, 10, 10), (1, 1, 1)))
    view = render_slice(volume, ViewSpec(size_px=50, window=(0.0, 100.0)), 0)
    mask = np.zeros((10, 10), bool)
    mask[2:6, 2:6] = True
    filled = overlay(view, mask, (0, 200, 0), 0.5).pixels
    assert (filled[..., 1] == 164).sum() == 20 * 20  # half of 200, half of the window's middle grey
    lines = overlay(view, mask, outline=True).pixels
    assert 0 < (lines[..., 1] == 255).sum() < 20 * 20
    assert (view.pixels == view.pixels[0, 0, 0]).all()  # the view itself is untouched
    sheet = montage([view.pixels] * 3, columns=2, captions=("a", "b", "c"))
    assert sheet.shape == (102, 102, 3)


def test_later_views_are_drawn_when_they_are_looked_at_and_are_the_same() -> None:
    array = np.random.default_rng(0).integers(0, 500, (12, 20, 16)).astype(np.int16)
    volume = Volume(array, Grid(array.shape, np.diag([1.0, 1.0, 2.0, 1.0])), "CT")
    reads: list[tuple[int, int]] = []

    class Source:
        grid, modality, percentiles = volume.grid, volume.modality, {"0.5": 0.0, "99.5": 500.0}

        def read_slice(self, axis: int, index: int) -> np.ndarray:
            reads.append((axis, index))
            return volume.read_slice(axis, index)

    spec = replace(SEER_VIEWS, count=3, size_px=64, also=("coronal",))
    now, later = render(volume, spec), render(Source(), spec, later=True)
    assert [v.map for v in (*later.views, *later.others)] == [v.map for v in (*now.views, *now.others)]
    part = image_of(later.views[0])
    assert reads == [], "neither the views nor a message about them reads a slice"
    for made, wanted in zip((*later.views, *later.others), (*now.views, *now.others), strict=True):
        assert (made.pixels == wanted.pixels).all()
        assert (made.key, made.plane, made.index) == (wanted.key, wanted.plane, wanted.index)
    assert len(reads) == 6
    assert part.pixels is later.views[0].pixels
    assert part.key == now.views[0].key == image_of(now.views[0]).key
    assert len(reads) == 6, "drawn once"
