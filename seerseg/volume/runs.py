"""A mask as a short string, for JSON Lines: run lengths in C order, compressed."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError


def encode_runs(mask: NDArray[np.bool_]) -> str:
    """Base64 of the deflated little-endian uint32 lengths of runs, the first of them False (0 when the mask begins True)."""
    flat = np.ascontiguousarray(mask, dtype=np.bool_).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    lengths = np.diff(bounds).astype("<u4")
    if flat.size and flat[0]:
        lengths = np.concatenate([np.zeros(1, "<u4"), lengths])
    return base64.b64encode(zlib.compress(lengths.tobytes(), 6)).decode("ascii")


def decode_runs(text: str, shape: Sequence[int]) -> NDArray[np.bool_]:
    """The mask of that shape; DatasetError when the string holds none of that size."""
    size = int(np.prod(shape, dtype=np.int64))
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), 4 * (size + 2))
        if inflate.unconsumed_tail or len(data) % 4:
            raise ValueError
    except (ValueError, binascii.Error, zlib.error):
        raise DatasetError("A stored mask is damaged: it holds no run lengths.") from None
    lengths = np.frombuffer(data, "<u4").astype(np.int64)
    if lengths.sum() != size:
        raise DatasetError(f"A stored mask has {int(lengths.sum())} voxels, but the scan has {size}.")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(tuple(shape))
