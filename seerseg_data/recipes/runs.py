"""What the training loops of the recipes have in common; the loops themselves are in the scripts."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seerseg.errors import SeerSegError
from seerseg.paths import write_atomically


def journal(folder: Path) -> logging.Logger:
    """A logger whose lines go to standard output and, with the time of day (UTC), to the end of `folder`/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    made = logging.Logger(f"recipe {folder}", logging.INFO)
    made.addHandler(logging.StreamHandler(sys.stdout))
    kept = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    dated = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    dated.converter = time.gmtime
    kept.setFormatter(dated)
    made.addHandler(kept)
    return made


def save(path: Path, state: Mapping[str, Any]) -> None:
    """A checkpoint, whole or not at all; `torch.load(path, weights_only=True)` reads it."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights that training does not change."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def blend(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: float) -> None:
    """Move a moving average towards `weights` by `share`, in place; what is no floating point number is copied."""
    with torch.no_grad():
        for name, value in weights.items():
            if value.is_floating_point():
                average[name].lerp_(value, share)
            else:
                average[name].copy_(value)


def cosine(share: float, *, floor: float) -> float:
    """The factor on the learning rate after a share of the time: from 1 to `floor` by half a cosine."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def run(verb: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a verb of a script; a fault that its user can mend ends it with the sentence alone."""
    try:
        verb(arguments)
    except SeerSegError as error:
        raise SystemExit(str(error)) from None


def scan_arguments(parser: argparse.ArgumentParser, *, phantoms: int) -> None:
    """Where items come from: --cache, --data, --phantoms, and --seed."""
    parser.add_argument("--cache", type=Path, required=True, help="what `train_nano_segmenter.py fetch` made; phantoms are kept there too")
    parser.add_argument("--data", type=Path, help="folder of mr_hippocampus/, ct_torso/ and mr_glioma/, each optional")
    parser.add_argument("--phantoms", type=int, default=phantoms, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0)


def loop_arguments(parser: argparse.ArgumentParser, *, minutes: float, validate_minutes: float, start: str) -> None:
    """How long and how fast: --minutes, --validate_minutes, --lr, and --start with its help text."""
    parser.add_argument("--minutes", type=float, default=minutes, help="of wall clock")
    parser.add_argument("--validate_minutes", type=float, default=validate_minutes, help="between marks on validation")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help=start)
