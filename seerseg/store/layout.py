"""How a stored array is cut into chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class StoreLayout:
    """Chunks for two kinds of reading: slices across `axis` (0 z, 1 y, 2 x) and patches, both from one file.

    slab: slices per chunk along `axis`; chunk_bytes: what a chunk may hold decoded. A chunk is one blosc2 block, decoded as
    a whole: with 128 KiB it stays in an L2 cache of 512 KiB together with its compressed bytes, and smaller ones cost more
    calls than they save voxels. A slab of 2 reads a slice in two thirds of the time of one of 4, and patches as fast
    (scripts/bench_store.py --layouts).
    """

    axis: int = 0
    slab: int = 2
    chunk_bytes: int = 1 << 17

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2) or self.slab < 1 or self.chunk_bytes < 1024:
            raise ValueError(f"Not a store layout: {self}.")

    def chunk_zyx(self, shape_zyx: tuple[int, int, int], dtype: DTypeLike) -> tuple[int, int, int]:
        """Chunk shape (z, y, x) for an array of this shape and type, never larger than the array.

        In the plane the chunk is near square, by powers of two; where whole planes are small the slab becomes thicker.
        """
        voxels = self.chunk_bytes // np.dtype(dtype).itemsize
        chunk: list[int] = list(shape_zyx)
        chunk[self.axis] = min(self.slab, shape_zyx[self.axis])
        plane = [axis for axis in (0, 1, 2) if axis != self.axis]
        while math.prod(chunk) > voxels and max(chunk[axis] for axis in plane) > 1:
            longest = max(plane, key=lambda axis: chunk[axis])
            chunk[longest] = 1 << (chunk[longest] - 1).bit_length() - 1
        if all(chunk[axis] == shape_zyx[axis] for axis in plane):
            chunk[self.axis] = max(chunk[self.axis], min(shape_zyx[self.axis], voxels // math.prod(chunk[axis] for axis in plane)))
        return chunk[0], chunk[1], chunk[2]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"axis": self.axis, "slab": self.slab, "chunk_bytes": self.chunk_bytes}
