"""What the nano network is fed, the same in training and in use: intensity windows, body-box coordinates, conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CT, MR, UNKNOWN = "CT", "MR", "unknown"
AIR_HU = -1000.0


@dataclass(frozen=True)
class Intensities:
    """How one scan's intensities are scaled. CT: fixed Hounsfield windows. Else: 0.5 and 99.5 percentiles, mean and sd inside the body."""

    modality: str
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    sd: float = 1.0

    @classmethod
    def measure(cls, inside: Tensor, modality: str) -> Intensities:
        """inside: 1D, intensities of the body's voxels (a sample of them will do)."""
        if modality == CT:
            return cls(CT)
        values = inside.float().sort().values
        if len(values) == 0:
            return cls(modality)
        low, high = float(values[int(0.005 * (len(values) - 1))]), float(values[int(0.995 * (len(values) - 1))])
        kept = values.clamp(low, high)
        return cls(modality, low, max(high, low + 1e-6), float(kept.mean()), max(float(kept.std(unbiased=False)), 1e-6))

    @property
    def background(self) -> float:
        """The value outside the field of view."""
        return AIR_HU if self.modality == CT else self.low

    def channels(self, image: Tensor) -> Tensor:
        """(Z, Y, X) -> (2, Z, Y, X): a wide window and a narrow one, both about -1..1."""
        if self.modality == CT:
            return torch.stack([((image + 1000) / 1000 - 1).clamp(-1, 1.5), ((image - 40) / 160).clamp(-1.5, 1.5)])
        wide = (image - self.low) / (self.high - self.low) * 2 - 1
        return torch.stack([wide.clamp(-1.2, 1.5), ((image - self.mean) / (2 * self.sd)).clamp(-1.5, 1.5)])


def coordinates(
    shape_zyx: Sequence[int], origin_zyx_mm: Sequence[float], spacing_mm: float, box_lo_mm: Sequence[float], box_hi_mm: Sequence[float]
) -> Tensor:
    """(3, Z, Y, X): x, y, z of every voxel relative to the body box, -1 at its low face, 1 at its high one, clamped to +-1.5.

    All in mm on the scan's own axes (z up, y to the front, x to the right); box and origin are in one frame.
    """
    lines = []
    for axis in range(3):
        centre = (box_lo_mm[axis] + box_hi_mm[axis]) / 2
        half = max((box_hi_mm[axis] - box_lo_mm[axis]) / 2, 1.0)
        line = (origin_zyx_mm[axis] + spacing_mm * torch.arange(shape_zyx[axis], dtype=torch.float32) - centre) / half
        lines.append(line.clamp(-1.5, 1.5))
    z, y, x = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([x, y, z])


def conditions(spacing_mm: float, box_lo_mm: Sequence[float], box_hi_mm: Sequence[float], modality: str) -> Tensor:
    """(8,): log2 spacing, log2 extents of the body box (z, y, x) in units of 128 mm, one-hot CT / MR / unknown, 1."""
    extents = [math.log2(max(high - low, 1.0) / 128) for low, high in zip(box_lo_mm, box_hi_mm, strict=True)]
    flags = [float(modality == CT), float(modality == MR), float(modality not in (CT, MR))]
    return torch.tensor([math.log2(spacing_mm), *extents, *flags, 1.0])
