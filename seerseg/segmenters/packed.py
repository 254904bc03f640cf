"""Masks as bits of their box: what is kept of them, in memory (`cache`) and on disk (the evolution's masks)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PackedMask:
    """The voxels of a mask's bounding box [lo, lo + shape), eight a byte; nothing is set outside of it. An empty mask has no box."""

    lo: Triple
    shape: Triple
    bits: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if len(self.lo) != 3 or len(self.shape) != 3 or min(*self.lo, *self.shape) < 0:
            raise ValueError(f"no box: {self.lo}, {self.shape}")
        if self.bits.dtype != np.uint8 or self.bits.shape != (-(-int(np.prod(self.shape)) // 8),):
            raise ValueError(f"{self.bits.shape} bytes for {self.shape} voxels")

    @classmethod
    def of(cls, array: NDArray[np.bool_]) -> PackedMask:
        """array: (Z, Y, X)."""
        spans = [np.flatnonzero(array.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        if not spans[0].size:
            return cls((0, 0, 0), (0, 0, 0), np.zeros(0, np.uint8))
        lo = (int(spans[0][0]), int(spans[1][0]), int(spans[2][0]))
        hi = (int(spans[0][-1]) + 1, int(spans[1][-1]) + 1, int(spans[2][-1]) + 1)
        box = tuple(slice(start, stop) for start, stop in zip(lo, hi, strict=True))
        return cls(lo, (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]), np.packbits(array[box]))

    def unpacked(self, shape_zyx: Triple) -> NDArray[np.bool_]:
        """A fresh array of that shape; ValueError when the box does not lie in it."""
        if any(start + size > n for start, size, n in zip(self.lo, self.shape, shape_zyx, strict=True)):
            raise ValueError(f"the box {self.lo}, {self.shape} does not lie in {shape_zyx}")
        array = np.zeros(shape_zyx, dtype=np.bool_)
        voxels = np.unpackbits(self.bits, count=int(np.prod(self.shape))).view(np.bool_).reshape(self.shape)
        array[tuple(slice(start, start + size) for start, size in zip(self.lo, self.shape, strict=True))] = voxels
        return array
