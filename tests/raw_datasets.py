"""Small raw datasets made on the spot, written with nibabel so that nothing of ours is needed to make them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

SHAPE_XYZ = (12, 14, 10)


def scan(seed: int, shape: tuple[int, ...] = SHAPE_XYZ, *, ct: bool = False) -> NDArray[Any]:
    """An int16 scan (x, y, z): noise, in HU with air around when `ct`."""
    noise = np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)
    if ct:
        noise[:3] = -1000
    return noise


def label(shape: tuple[int, ...] = SHAPE_XYZ) -> NDArray[Any]:
    """Value 1 in a box, value 2 in another, not symmetric in any axis."""
    out = np.zeros(shape, np.uint8)
    out[1:5, 2:6, 1:4] = 1
    out[5:9, 3:10, 4:9] = 2
    return out


def write(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None, *, codes: tuple[int, int] = (1, 1)) -> None:
    """A NIfTI file; codes: (sform, qform)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image.header.set_sform(affine, codes[0])
    image.header.set_qform(affine, codes[1])
    if not any(codes):  # an image that has an affine would put its codes back
        image = nib.Nifti1Image(array, None, image.header)
    nib.save(image, path)


def make(
    folder: Path,
    cases: Sequence[str] = ("case_1", "case_2", "case_3"),
    *,
    channels: Sequence[str] = ("MRI",),
    labels: Mapping[str, Any] | None = None,
    requests: Sequence[Mapping[str, Any]] = (),
    affine: NDArray[Any] | None = None,
) -> Path:
    """A whole dataset: every case with `label()`, `scan(i)` per channel."""
    ct = channels[0] == "CT"
    for number, case in enumerate(cases):
        for channel in range(len(channels)):
            write(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", scan(100 * number + channel, ct=ct), affine)
        write(folder / "labelsTr" / f"{case}.nii.gz", label(), affine)
    describe(folder, channels, labels or {"background": 0, "liver": 1, "spleen": 2}, len(cases))
    if requests:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        (folder / "requests.jsonl").write_text(lines, encoding="utf-8")
    return folder


def describe(folder: Path, channels: Sequence[str], labels: Mapping[str, Any], count: int, **more: Any) -> None:
    """dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": dict(labels), "numTraining": count}
    (folder / "dataset.json").write_text(json.dumps({**meta, "file_ending": ".nii.gz", **more}), encoding="utf-8")
