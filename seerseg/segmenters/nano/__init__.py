"""`nano`: a small text-promptable 3D segmenter whose weights lie in the package. A default to start from, not a clinical tool.

`load` is its factory. torch is imported when it is called, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seerseg.segmenters.nano.segmenter import NanoSegmenter

__all__ = ["load"]


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> NanoSegmenter:
    """The segmenter of a folder with model.safetensors and config.json, or the shipped one. WeightsError when it cannot be used."""
    from seerseg.segmenters.nano.segmenter import NanoSegmenter

    return NanoSegmenter.load(source=source, device=device, dtype=dtype)
