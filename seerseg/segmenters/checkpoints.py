"""Checkpoints as nnU-Net's trainer writes them, opened without running anything in them; scans as float32 that a network can take."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import WeightsError

OWN_PACKAGES = ("torch.nn.", "dynamic_network_architectures.")
"""Where the classes that a plans.json names may come from: a model folder cannot name other code to run."""
_LARGEST = 1e12  # intensities beyond are clipped: their squares overflow float32 in a z-score


def _safe_types() -> list[Any]:
    """What nnU-Net's own checkpoints hold beside tensors and plain values: numpy numbers in their logs."""
    from numpy._core import multiarray

    dtypes = [type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")]
    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    old = [(scalar, "numpy.core.multiarray.scalar"), (reconstruct, "numpy.core.multiarray._reconstruct")]
    return [scalar, reconstruct, np.ndarray, np.dtype, *dtypes, *old]


def open_checkpoint(path: Path, whose: str) -> dict[str, Any]:
    """A checkpoint's content, tensors still on the file; nothing but tensors, plain values and numpy numbers is ever made of it.

    whose: as in "it is not nnU-Net v2's". WeightsError for a file that is damaged, holds code or has no "network_weights".
    """
    import torch

    try:
        with torch.serialization.safe_globals(_safe_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as fault:
        named = re.search(r"GLOBAL (\S+)", str(fault))
        what = f" ({named.group(1)})" if named else ""
        raise WeightsError(
            f"The checkpoint {path} holds objects or code beside weights{what}, so it was not opened. Where you trust it, save it anew "
            "with weights and plain values only (documentation/segmenters.md says how)."
        ) from fault
    except MemoryError as fault:
        raise WeightsError(f"The memory does not hold the checkpoint {path}.") from fault
    except Exception as fault:  # what torch raises for a damaged file depends on where it is damaged
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]
        raise WeightsError(
            f"The checkpoint {path} is damaged, cut short or no checkpoint ({reason.rstrip('.')}); copy it again."
        ) from fault
    if not isinstance(held, dict) or not isinstance(held.get("network_weights"), dict):
        raise WeightsError(f"The checkpoint {path} holds no 'network_weights', so it is not {whose}.")
    return held


def network_weights(held: Mapping[str, Any], path: Path, advice: str) -> dict[str, Any]:
    """Name -> tensor of an opened checkpoint, copied off the file (once where several names share one tensor); all finite.

    advice: what to do where they are not, the end of a sentence. WeightsError.
    """
    import torch

    weights = held["network_weights"]
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise WeightsError(f"The checkpoint {path} holds something other than tensors among its weights; copy it again.")
    copies: dict[tuple[Any, ...], Any] = {}
    copied: dict[str, Any] = {}
    for name, value in weights.items():
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in copies:
            copies[key] = value.clone()
        copied[str(name).removeprefix("module.").removeprefix("_orig_mod.")] = copies[key]
    if not all(torch.isfinite(value).all() for value in copies.values() if value.is_floating_point()):
        raise WeightsError(f"The checkpoint {path} holds weights that are not finite; {advice}.")
    return copied


def finite(array: NDArray[Any]) -> NDArray[np.float32]:
    """A float32 copy; values that are not finite become the least finite one (0 where there is none)."""
    given = array.astype(np.float32)
    if array.dtype.kind != "f":
        return given
    fine = np.isfinite(given)
    if not fine.all():
        given[~fine] = given[fine].min() if fine.any() else 0.0
    return np.clip(given, -_LARGEST, _LARGEST, out=given)
