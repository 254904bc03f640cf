"""Reference and prediction outlined on the scan, one PNG per case, in radiological display order.

One row per target, worst Dice first: the axial, coronal and sagittal slice in which the reference is largest (the prediction
where there is no reference), zoomed to both masks. Of several requests for a target the one with the worst Dice is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SeerSegError
from seerseg.evaluation import Evaluation, References, Row
from seerseg.metrics import largest_extent
from seerseg.paths import safe_name, write_atomically
from seerseg.views import PLANES, ViewSpec, mask_pixels, montage, render_slice
from seerseg.volume import Volume, read_labels, read_volume

Pixels = NDArray[np.uint8]
REFERENCE_COLOUR = (64, 220, 120)
PREDICTION_COLOUR = (255, 80, 200)
BOTH_COLOUR = (255, 240, 120)
_TILE_PX = 336
_MARGIN_MM = 20.0
_MARGIN_SHARE = 0.35
_AIR_HU, _LUNG_BELOW_HU, _BONE_ABOVE_HU = -500.0, -300.0, 180.0
_LUNG_WINDOW, _SOFT_WINDOW, _BONE_WINDOW = (-600.0, 1500.0), (40.0, 400.0), (400.0, 1800.0)


def write_overlays(
    folder: Path,
    evaluation: Evaluation,
    predictions: Path,
    references: References,
    images: Mapping[str, Sequence[Path]],
    *,
    most_targets: int = 6,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Path]:
    """Write `<case>.png` for every case that has an image; returns case -> file. What cannot be read is skipped.

    images: case -> its channels, the first of which is shown. Green: reference; magenta: prediction; yellow: both.
    """
    by_case: dict[str, list[Row]] = {}
    for row in evaluation.rows:
        by_case.setdefault(row.case, []).append(row)
    out: dict[str, Path] = {}
    for done, (case, rows) in enumerate(by_case.items(), start=1):
        if images.get(case):
            try:
                sheet = _sheet(case, _worst_per_target(rows)[:most_targets], predictions, references, images[case][0])
            except SeerSegError:
                sheet = None  # the evaluation has said already what is wrong with this file
            if sheet is not None:
                out[case] = folder / f"{safe_name(case, 200)}.png"
                write_atomically(out[case], lambda temporary, pixels=sheet: _save(temporary, pixels))  # type: ignore[misc]
        progress(done, len(by_case))
    return out


def _worst_per_target(rows: Sequence[Row]) -> list[Row]:
    """One row per target, free text before label prompts, the lowest Dice; absent targets only when something was drawn."""
    shown: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: (r.kind == "label prompt", _dice(r), -r.drawn_voxels)):
        if row.truth == "present" or row.drawn_voxels:
            shown.setdefault(row.target, row)
    return sorted(shown.values(), key=_dice)


def _dice(row: Row) -> float:
    return row.scores.dice if row.scores is not None and row.scores.dice is not None else 0.0


def _sheet(case: str, rows: Sequence[Row], predictions: Path, references: References, image: Path) -> Pixels | None:
    if not rows:
        return None
    volume = read_volume(image, name=case)
    reference = read_labels(references.files[case], volume.grid)[0] if case in references.files else None
    tiles: list[Pixels] = []
    captions: list[str] = []
    for row in rows:
        truth = np.isin(reference, references.values(row.target)) if reference is not None else np.zeros(volume.grid.shape_zyx, bool)
        drawn = np.zeros(volume.grid.shape_zyx, bool)
        if row.file:
            labels = read_labels(predictions / row.file, volume.grid)[0]
            drawn = np.isin(labels, row.file_values) if row.file_values is not None else labels > 0
        tiles += _planes(volume, truth, drawn)
        captions += _captions(row)
    return montage(tiles, columns=3, gap_px=4, captions=captions)


def _captions(row: Row) -> list[str]:
    if row.scores is None:
        score = "no score"
    elif row.truth == "absent":
        score = "absent, but drawn"
    else:
        score = f"Dice {_dice(row):.3f}" + (" (nothing drawn)" if row.failed else "")
    words = f'"{row.text}"' if row.text and row.kind == "free text" else row.kind
    return [_cut(row.target or "absent target"), _cut(words), score]


def _cut(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _planes(volume: Volume, truth: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> list[Pixels]:
    """Three tiles: axial, coronal, sagittal."""
    window = _window(volume, truth | drawn)
    volume, truth, drawn = _zoomed(volume, truth, drawn)
    tiles = []
    for axis, plane in enumerate(PLANES):
        counted = truth if truth.any() else drawn
        areas = counted.sum(axis=tuple(a for a in range(3) if a != axis))
        index = int(areas.argmax()) if areas.any() else counted.shape[axis] // 2
        view = render_slice(volume, ViewSpec(plane=plane, size_px=_TILE_PX, window=window), index)
        pixels = view.pixels.copy()
        edges = [_outline(mask_pixels(np.take(m, index, axis=axis), view.map, _TILE_PX)) for m in (truth, drawn)]
        pixels[edges[0]] = REFERENCE_COLOUR
        pixels[edges[1]] = PREDICTION_COLOUR
        pixels[edges[0] & edges[1]] = BOTH_COLOUR
        tiles.append(pixels)
    return tiles


def _window(volume: Volume, shown: NDArray[np.bool_]) -> Literal["volume"] | tuple[float, float]:
    """For what looks like Hounsfield units the lung or the soft-tissue window, by what is inside the masks; else percentiles."""
    if volume.modality not in (None, "CT") or volume.percentiles["min"] > _AIR_HU:
        return "volume"
    inside = float(np.median(volume.array[shown])) if shown.any() else 0.0
    return _LUNG_WINDOW if inside < _LUNG_BELOW_HU else _BONE_WINDOW if inside > _BONE_ABOVE_HU else _SOFT_WINDOW


def _zoomed(volume: Volume, truth: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> tuple[Volume, NDArray[np.bool_], NDArray[np.bool_]]:
    """The part of the scan around both masks, with a margin in mm; all of it when both are empty."""
    box = largest_extent(truth, drawn)
    if box is None:
        return volume, truth, drawn
    lo, hi = [], []
    longest_mm = max((s.stop - s.start) * mm for s, mm in zip(box, volume.grid.spacing_zyx, strict=True))
    for s, mm, n in zip(box, volume.grid.spacing_zyx, volume.grid.shape_zyx, strict=True):
        margin = round(max(_MARGIN_MM, _MARGIN_SHARE * longest_mm) / mm)
        lo.append(max(0, s.start - margin))
        hi.append(min(n, s.stop + margin))
    cut = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
    grid = volume.grid.crop((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]))
    return replace(volume, array=volume.array[cut], grid=grid), truth[cut], drawn[cut]


def _outline(shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A line of two pixels just inside the border of a 2D mask."""
    padded = np.pad(shown, 2)
    inner = shown.copy()
    for rows, columns in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 2), (3, 2), (2, 1), (2, 3)):
        inner &= padded[rows : rows + shown.shape[0], columns : columns + shown.shape[1]]
    return shown & ~inner


def _save(path: Path, pixels: Any) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG", optimize=True)
