"""Miniature challenge files with known answers, and doubles that draw them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.challenge import Answerer
from seerseg.prediction import Predictor
from seerseg.prompts import Prompt
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.volume import Grid, Volume, source_of, write_labels

SHAPE_DHW = (6, 8, 10)
SPACING_WHD = (0.5, 0.75, 3.0)


def truth_dhw() -> np.ndarray:
    """1: a block at low W (the patient's right, by what is taken for an .npz), 2: one at high W, high and to the front."""
    label = np.zeros(SHAPE_DHW, np.uint8)
    label[1:4, 2:6, 1:4] = 1
    label[3:6, 0:3, 6:9] = 2
    return label


def grey() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 40, SHAPE_DHW) + 90 * truth_dhw()).astype(np.uint8)


def npz(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def scan(path: Path, prompts: Any = None, **more: Any) -> Path:
    asked = {"1": "right thing", "2": "left thing", "instance_label": 0} if prompts is None else prompts
    return npz(path, **{"imgs": grey(), "spacing": np.array(SPACING_WHD), "text_prompts": asked, **more})


def side(volume: Volume, prompt: Prompt) -> np.ndarray:
    """What is bright on the side that the words name, sides decided by world x about the middle of the volume."""
    low, high = float(volume.array.min()), float(volume.array.max())
    bright = volume.array > low + 0.3 * (high - low)
    middle = volume.grid.corners_mm[:, 0].mean()
    z, y, x = np.indices(volume.array.shape)
    right = volume.grid.to_world(np.stack([z, y, x], axis=-1))[..., 0] > middle
    return bright & (right if "right" in (prompt.text or "") else ~right)


class Noted(ScriptedSegmenter):
    """Keeps the volumes that it is given."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.volumes: list[Volume] = []

    def segment(self, volume: Volume, prompts: Any) -> Any:
        self.volumes.append(volume)
        return super().segment(volume, prompts)


def segmenter(**masks: Any) -> Noted:
    return Noted({"right thing": side, "left thing": side, **{name.replace("_", " "): mask for name, mask in masks.items()}})


def answerer(double: Any = None, *, never_fail: bool = False) -> Answerer:
    return Answerer(lambda: Predictor(double or segmenter(), "verbatim", device="cpu"), never_fail=never_fail)


def command(*words: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`seerseg_challenge` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **settings.pop("env", {})}
    start = "from seerseg.cli.challenge import challenge; challenge(prog_name='seerseg_challenge')"
    line = [sys.executable, "-c", start, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=180, env=environment, **settings)


def script(folder: Path, labels_zyx: np.ndarray, grid: Grid) -> str:
    """`--segmenter` for a script that draws this canonical label map in every scan on its grid."""
    folder.mkdir(parents=True, exist_ok=True)
    write_labels(labels_zyx, grid, source_of(grid), folder / "labels.nii.gz")
    names = {"right thing": 1, "left thing": 2}
    (folder / "script.json").write_text(json.dumps({"kind": "scripted_segmenter", "names": names, "cases": {"*": "labels.nii.gz"}}))
    return f"scripted:{folder / 'script.json'}"
