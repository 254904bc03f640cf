"""What planning remembers of one case: computed from arrays that somebody has decoded anyway, small enough for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.volume import Grid, SourceGeometry, Volume

_DENSE_LABELS = 4096


@dataclass(frozen=True)
class ChannelRecord:
    """One channel: file type after lossless reduction ("int16", "float32"), intensity percentiles as Volume has them."""

    dtype: str
    modality: str | None
    percentiles: dict[str, float]
    content_hash: str
    notes: tuple[str, ...] = ()

    @property
    def constant(self) -> bool:
        """Every voxel has the same value."""
        return self.percentiles["min"] == self.percentiles["max"]


@dataclass(frozen=True)
class ValueRecord:
    """One value of a label map: its voxel count and its half-open extent (z, y, x)."""

    voxels: int
    lo: tuple[int, int, int]
    hi: tuple[int, int, int]


@dataclass(frozen=True)
class CaseRecord:
    """One case: geometry of its canonical grid, how its file lay, its channels, the values of its label map.

    orientation: codes of the stored axes, first axis first ("LPI"); oblique_deg: largest angle between a grid axis and its
    world axis; values: None when the case has no label.
    """

    case: str
    shape_zyx: tuple[int, int, int]
    spacing_zyx: tuple[float, float, float]
    voxel_volume_mm3: float
    orientation: str
    oblique_deg: float
    sheared: bool
    laterality: str
    channels: tuple[ChannelRecord, ...]
    values: dict[int, ValueRecord] | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"values": None if self.values is None else {str(v): asdict(r) for v, r in self.values.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CaseRecord:
        """The inverse of `to_json`; KeyError or TypeError when it is not one."""
        channels = tuple(ChannelRecord(**{**c, "notes": tuple(c["notes"])}) for c in value["channels"])
        values = value["values"]
        if values is not None:
            values = {int(v): ValueRecord(r["voxels"], tuple(r["lo"]), tuple(r["hi"])) for v, r in values.items()}
        shape, spacing = tuple(value["shape_zyx"]), tuple(value["spacing_zyx"])
        return cls(**{**value, "shape_zyx": shape, "spacing_zyx": spacing, "channels": channels, "values": values})


def case_record(case: str, volumes: Sequence[Volume], labels: NDArray[Any] | None) -> CaseRecord:
    """The record of a decoded case. labels: integers (Z, Y, X) on the volumes' grid, or None.

    Reads each array about once more; makes no copy larger than one slice.
    """
    first = volumes[0]
    angle, sheared = _obliqueness(first.grid)
    channels = tuple(
        ChannelRecord(v.array.dtype.name, v.modality, dict(v.percentiles), v.content_hash, v.source.notes if v.source else ())
        for v in volumes
    )
    return CaseRecord(
        case=case,
        shape_zyx=first.grid.shape_zyx,
        spacing_zyx=tuple(round(s, 6) for s in first.grid.spacing_zyx),  # type: ignore[arg-type]
        voxel_volume_mm3=first.grid.voxel_volume_mm3,
        orientation=orientation_codes(first.source) if first.source else "RAS",
        oblique_deg=angle,
        sheared=sheared,
        laterality=first.source.laterality if first.source else "known",
        channels=channels,
        values=None if labels is None else label_values(labels),
    )


def orientation_codes(source: SourceGeometry) -> str:
    """Where the stored axes point, first axis first: "LPI" means that the first index rises to the patient's left.

    Named by the direction of increasing index, as nibabel does.
    """
    names = ("LR", "PA", "IS")
    return "".join(names[int(axis)][int(sign > 0)] for axis, sign in np.asarray(source.orientation))


def label_values(labels: NDArray[Any]) -> dict[int, ValueRecord]:
    """Voxel count and extent of every value but 0 in an integer array (Z, Y, X), in one sweep per axis."""
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    names = np.arange(highest + 1) if lowest >= 0 and highest < _DENSE_LABELS else np.unique(labels)
    dense = labels if lowest >= 0 and highest < _DENSE_LABELS else np.searchsorted(names, labels)
    profile = _profile(dense, 0, len(names))
    counts = profile.sum(axis=0)
    present = [int(i) for i in np.flatnonzero(counts) if names[i] != 0]
    if not present:
        return {}
    ends = [_ends(profile[:, present])]
    for axis in (1, 2):  # each sweep is spared what the one before found empty
        inner = dense[tuple(slice(int(low.min()), int(high.max())) for low, high in ends)]
        ends.append(_ends(_profile(inner, axis, len(names))[:, present]))
    return {
        int(names[i]): ValueRecord(int(counts[i]), *(tuple(int(e[side][k]) for e in ends) for side in (0, 1)))  # type: ignore[arg-type]
        for k, i in enumerate(present)
    }


def _profile(dense: NDArray[Any], axis: int, count: int) -> NDArray[np.int64]:
    """(slices along axis, count): voxels of each value in each slice."""
    planes = np.moveaxis(dense, axis, 0)
    return np.stack([np.bincount(plane.reshape(-1), minlength=count) for plane in planes])


def _ends(profile: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    touched = profile > 0
    return touched.argmax(axis=0), len(touched) - touched[::-1].argmax(axis=0)


def _obliqueness(grid: Grid) -> tuple[float, bool]:
    """Largest angle in degrees between a grid axis and its world axis; whether the axes are not at right angles."""
    axes = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    angle = math.degrees(math.acos(min(1.0, float(np.abs(np.diagonal(axes)).min()))))
    return round(angle, 3), bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4)
