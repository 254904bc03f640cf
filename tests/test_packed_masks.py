"""Masks as bits of their box: what goes in comes out, and what is damaged is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from seerseg.segmenters.packed import PackedMask


@given(arrays.arrays(np.bool_, st.tuples(*[st.integers(1, 9)] * 3)))
def test_what_is_packed_comes_out_again_in_the_smallest_box(array: np.ndarray) -> None:
    packed = PackedMask.of(array)
    out = packed.unpacked(array.shape)
    assert out.dtype == bool
    assert (out == array).all()
    out[:] = True
    assert (packed.unpacked(array.shape) == array).all(), "a fresh array each time"
    places = np.argwhere(array)
    if len(places):
        assert packed.lo == tuple(places.min(0))
        assert packed.shape == tuple(places.max(0) - places.min(0) + 1)
    assert len(packed.bits) == -(-int(np.prod(packed.shape)) // 8)


@pytest.mark.parametrize(
    ("lo", "shape", "bits"),
    [((0, 0, 0), (2, 2, 2), np.zeros(2, np.uint8)), ((0, 0, -1), (2, 2, 2), np.zeros(1, np.uint8)), ((0, 0), (8, 1), np.zeros(1, np.uint8)),
     ((0, 0, 0), (2, 2, 2), np.zeros(1))],
)  # fmt: skip
def test_what_is_no_packed_mask(lo: tuple[int, ...], shape: tuple[int, ...], bits: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"box|bytes"):
        PackedMask(lo, shape, bits)  # type: ignore[arg-type]


def test_a_box_outside_of_the_grid() -> None:
    packed = PackedMask.of(np.ones((3, 3, 3), bool))
    with pytest.raises(ValueError, match="does not lie in"):
        packed.unpacked((3, 3, 2))
