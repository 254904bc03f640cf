"""Boundaries where the intensities change: the network's probability as prior, the scan's own voxels as evidence.

The network works on a grid coarser than most scans, so its boundary is soft. Inside a band around what it found, every voxel is asked how
likely its intensity is inside and outside (histograms of this very scan, taken on both sides), and Bayes' rule joins that with the prior:
posterior = p L_in / (p L_in + (1 - p) L_out). Where both sides look alike the ratio is near 1 and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
BINS = 64
ROUNDS = 2
"""The first histograms are of the prior's own sides, the next of the posterior's."""
LARGEST_RATIO = 30.0
FEWEST_VOXELS = 200
"""With fewer voxels on a side its histogram says nothing."""


@dataclass(frozen=True, eq=False)
class Slab:
    """A part of the scan: prior probability, intensities and whether a voxel lies in the band, all float32 or bool (z, Y, X)."""

    prior: Float32
    image: Float32
    band: NDArray[np.bool_]


def sharpened(slabs: Callable[[], Iterator[Slab]], trust: float = 1.0) -> Callable[[Slab], Float32]:
    """The posterior of a slab, learnt from all of them. slabs: gives them afresh each time it is called; trust: exponent of the ratio."""
    low, high = _range(slabs)
    ratio: Float32 | None = None

    def posterior(slab: Slab) -> Float32:
        if ratio is None:
            return slab.prior
        weight = ratio[_bins(slab.image, low, high)]
        joined = slab.prior * weight
        return np.where(slab.band, joined / (joined + (1 - slab.prior)), slab.prior).astype(np.float32, copy=False)

    if not low < high:
        return posterior
    for _ in range(ROUNDS):
        counts = np.zeros((2, BINS))
        for slab in slabs():
            inside = posterior(slab)[slab.band] > 0.5
            bins = _bins(slab.image[slab.band], low, high)
            counts[0] += np.bincount(bins[inside], minlength=BINS)
            counts[1] += np.bincount(bins[~inside], minlength=BINS)
        if counts.sum(axis=1).min() < FEWEST_VOXELS:
            break
        ratio = _ratio(counts) ** np.float32(trust)
    return posterior


def _ratio(counts: NDArray[np.float64]) -> Float32:
    kernel = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    shares = []
    for row in counts:
        smooth = np.convolve(np.pad(row, 2, mode="edge"), kernel, mode="valid")
        shares.append((smooth + 0.5) / (smooth + 0.5).sum())
    return np.clip(shares[0] / shares[1], 1 / LARGEST_RATIO, LARGEST_RATIO).astype(np.float32)


def _range(slabs: Callable[[], Iterator[Slab]]) -> tuple[float, float]:
    """0.5 and 99.5 percentiles of the band's intensities, from at most about a million of them."""
    samples = []
    for slab in slabs():
        values = slab.image[slab.band]
        samples.append(values[:: max(1, values.size // 200_000)])
    joined = np.concatenate(samples) if samples else np.zeros(0, np.float32)
    if joined.size < 2 * FEWEST_VOXELS:
        return 0.0, 0.0
    low, high = np.percentile(joined, (0.5, 99.5))
    return float(low), float(high)


def _bins(values: Float32, low: float, high: float) -> NDArray[np.intp]:
    return np.clip((values - low) * (BINS / (high - low)), 0, BINS - 1).astype(np.intp)
