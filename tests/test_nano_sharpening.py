"""Where the intensities change, the boundary follows them; where they do not, the network's boundary stays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from seerseg.segmenters.nano.sharpening import Slab, sharpened

SHAPE = (24, 40, 40)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    z, y, x = np.indices(SHAPE)
    return np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) - radius


def slabs_of(truth: np.ndarray, contrast: float, seed: int = 0) -> list[Slab]:
    """A soft prior that is two voxels off and one too large, on an image of noise 20 with this contrast."""
    off = ball((12, 22, 20), 9.0)
    prior = (1 / (1 + np.exp(np.clip(off, -20, 20) / 1.5))).astype(np.float32)
    image = (np.where(truth, contrast, 0.0) + np.random.default_rng(seed).normal(0, 20, SHAPE)).astype(np.float32)
    band = off < 5
    return [Slab(prior[z : z + 8], image[z : z + 8], band[z : z + 8]) for z in range(0, SHAPE[0], 8)]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def drawn(slabs: list[Slab]) -> np.ndarray:
    def again() -> Iterator[Slab]:
        return iter(slabs)

    posterior = sharpened(again)
    return np.concatenate([posterior(slab) for slab in slabs]) > 0.5


@pytest.mark.parametrize("contrast", [-200.0, 200.0])
def test_a_clear_edge_is_found(contrast: float) -> None:
    truth = ball((12, 20, 20), 8.0) < 0
    slabs = slabs_of(truth, contrast)
    before = dice(np.concatenate([s.prior for s in slabs]) > 0.5, truth)
    after = dice(drawn(slabs), truth)
    assert before < 0.85
    assert after > 0.97


def test_without_contrast_the_prior_stays() -> None:
    slabs = slabs_of(ball((12, 20, 20), 8.0) < 0, 0.0)
    before = np.concatenate([s.prior for s in slabs]) > 0.5
    assert dice(drawn(slabs), before) > 0.97


def test_outside_the_band_nothing_changes() -> None:
    truth = ball((12, 20, 20), 8.0) < 0
    slabs = [Slab(s.prior, s.image, np.zeros_like(s.band)) for s in slabs_of(truth, 200.0)]
    np.testing.assert_array_equal(drawn(slabs), np.concatenate([s.prior for s in slabs]) > 0.5)


@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_a_constant_or_tiny_region_is_left_alone(fill: float) -> None:
    prior = np.full((2, 8, 8), 0.7, np.float32)
    slab = Slab(prior, np.full((2, 8, 8), fill, np.float32), np.ones((2, 8, 8), bool))
    assert (sharpened(lambda: iter([slab]))(slab) == prior).all()


def test_slabs_make_no_difference() -> None:
    truth = ball((12, 20, 20), 8.0) < 0
    thin = slabs_of(truth, 150.0)
    whole = [Slab(*(np.concatenate([getattr(s, name) for s in thin]) for name in ("prior", "image", "band")))]
    np.testing.assert_array_equal(drawn(thin), drawn(whole))
