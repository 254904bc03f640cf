"""Small scans with known masks, and the doubles that answer for them: `scripted` (label maps) and `verbatim` (the words)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

NAMES = {"liver": 1, "spleen": 2, "left kidney": 3, "aorta": 4, "trunk": [1, 2]}
ORIENTATIONS = ("RAS", "LPS", "PIR", "ASL")


def make_scan(path: Path, *, seed: int = 0, shape_xyz: tuple[int, int, int] = (22, 26, 18), codes: str = "RAS") -> Path:
    """A scan stored with the given axes; `<stem>.labels.nii.gz` in the folder ../labels holds its masks (aorta left out)."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape_xyz, np.uint8)
    labels[2:8, 3:12, 4:10] = 1
    labels[10:15, 3 + seed % 4 : 9, 5:11] = 2
    labels[16:19, 15:20, 2 : 6 + seed % 5] = 3
    image = (rng.integers(-50, 50, shape_xyz) + 100 * labels).astype(np.int16)
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-20, -30, 10)
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    path.parent.mkdir(parents=True, exist_ok=True)
    for array, where in ((image, path), (labels, labels_of(path))):
        where.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(array, affine).as_reoriented(change).to_filename(where)
    return path


def labels_of(path: Path) -> Path:
    return path.parent.parent / "labels" / (path.name.removesuffix(".nii.gz").removesuffix("_0000") + ".labels.nii.gz")


def make_folder(root: Path, count: int = 4, **settings: Any) -> Path:
    """root/images with case0_0000.nii.gz ..., root/labels, and root/script.json for the scripted segmenter."""
    for i in range(count):
        make_scan(root / "images" / f"case{i}_0000.nii.gz", seed=i, codes=ORIENTATIONS[i % len(ORIENTATIONS)], **settings)
    write_script(root)
    return root / "images"


def write_script(root: Path) -> Path:
    cases = {p.name.removesuffix(".labels.nii.gz"): f"labels/{p.name}" for p in sorted((root / "labels").glob("*.labels.nii.gz"))}
    script = {"kind": "scripted_segmenter", "names": NAMES, "cases": cases}
    (root / "script.json").write_text(json.dumps(script))
    return root / "script.json"


def stored_mask(image: Path, name: str) -> np.ndarray:
    """The true mask as the scan is stored."""
    return np.isin(np.asanyarray(nib.load(labels_of(image)).dataobj), NAMES[name])


def command(source: Path, output: Path, script: Path, *more: str) -> list[str]:
    start = "from seerseg.cli.predict import predict; predict()"
    return [
        sys.executable, "-c", start, "-i", str(source), "-o", str(output), "--segmenter", f"scripted:{script}", "--reasoner", "verbatim",
        "-device", "cpu", *more,
    ]  # fmt: skip


def run_command(source: Path, output: Path, script: Path, *more: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(source, output, script, *more), capture_output=True, text=True, timeout=120, env=environment(), **settings
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every output file's bytes, without the ledgers (they hold times)."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("ledger")}
