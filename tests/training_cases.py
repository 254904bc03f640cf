"""A small dataset with requests and traces, preprocessed, a tiny reasoner and a segmenter that knows the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import raw_datasets as rd
import tiny_vlms
from click.testing import CliRunner

from seerseg.cli.plan_and_preprocess import plan_and_preprocess
from seerseg.protocols.base import Trace
from seerseg.protocols.traces import TraceRow, write_traces

NAME = "Dataset007_Toy"
LABELS = {"liver": 1, "spleen": 2}
WORDS = {
    "liver": {"train": ("outline the liver pls", "the livr"), "val": ("liver, please", "show me the lvier"), "test": ("hepar",)},
    "spleen": {"train": ("spleen", "where is the splen"), "val": ("the spleen here", "splee"), "test": ("lien",)},
    None: {"train": ("the prostate",), "val": ("outline the bladder",), "test": ("uterus",)},
}
SMALL = ("--set", "views.count=2", "--set", "views.size_px=64", "--set", "validation.sets=2", "--set", "validation.rows=4")
"""Plan values that make a step cheap."""


@dataclass(frozen=True)
class Toy:
    """Where everything lies."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        """The three variables."""
        return {f"seerseg_{part}": str(self.root / part) for part in ("raw", "preprocessed", "results")}

    @property
    def preprocessed(self) -> Path:
        """The dataset's preprocessed folder."""
        return self.root / "preprocessed" / NAME

    @property
    def segmenter(self) -> str:
        """The double that draws the true labels."""
        return f"scripted:{self.root / 'script.json'}"


def make(root: Path, cases: int = 8) -> Toy:
    """Raw dataset, plans, store, traces of every request."""
    folder = root / "raw" / NAME
    names = [f"case_{n}" for n in range(cases)]
    rd.make(folder, names, requests=[dict(line) for line in requests(names)])
    toy = Toy(root)
    done = CliRunner().invoke(plan_and_preprocess, ["-d", "7", "-np", "1"], env=toy.env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    write_traces(toy.preprocessed / "traces.jsonl", {"dataset": NAME, "made_by": "test"}, rows(names))
    for name in names:  # the double reads stored label maps by the case's name
        (root / "masks").mkdir(exist_ok=True)
        nib.save(nib.load(folder / "labelsTr" / f"{name}.nii.gz"), root / "masks" / f"{name}.nii.gz")
    script = {"kind": "scripted_segmenter", "names": LABELS, "cases": {name: f"masks/{name}.nii.gz" for name in names}}
    (root / "script.json").write_text(json.dumps(script))
    return toy


def requests(names: list[str]) -> list[Mapping[str, Any]]:
    return [
        {"id": f"{case}-{target}-{split}-{k}", "case": case, "text": text, "target": target, "style": "messy", "language_split": split}
        for case in names
        for target, splits in WORDS.items()
        for split, texts in splits.items()
        for k, text in enumerate(texts)
    ]


def rows(names: list[str]) -> list[TraceRow]:
    out = []
    for line in requests(names):
        answer = line["target"] or "absent"
        trace = Trace(f"{answer} seen", f"so {answer}", answer)
        out.append(
            TraceRow(
                line["id"],
                line["case"],
                line["text"],
                (line["target"],) if line["target"] else None,
                line["style"],
                line["language_split"],
                trace,
            )
        )
    return out


def tiny_reasoner(folder: Path, kind: str = "qwen3") -> Path:
    """A model folder."""
    if kind == "qwen3":
        return tiny_vlms.qwen(folder, "3")
    return {"idefics3": tiny_vlms.idefics3, "llava": tiny_vlms.llava, "gemma3": tiny_vlms.gemma3}[kind](folder)


def command(toy: Toy, reasoner: Path, *more: str) -> list[str]:
    """The arguments of a short run."""
    return [
        "7", "0", "--reasoner", str(reasoner), "--segmenter", toy.segmenter, "-device", "cpu", "--tuning", "full", *SMALL, *more,
    ]  # fmt: skip


def start(toy: Toy, arguments: list[str], launcher: tuple[str, ...] = (), **settings: Any) -> subprocess.Popen[str]:
    """seerseg_train as a process of its own."""
    env = {**os.environ, **toy.env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *launcher, "-m", "seerseg.cli.train", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **settings)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_folder(toy: Toy, reasoner: Path) -> Path:
    (found,) = (toy.root / "results" / NAME).glob(f"plans__seer__{reasoner.name}__*")
    return found / "fold_0"


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
