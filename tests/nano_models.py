"""What the tests of the nano models share: a small untrained network of the true architecture, the shipped one, and a chest phantom."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerseg.segmenters.nano import load
from seerseg.segmenters.nano.network import NanoConfig, NanoNetwork
from seerseg.segmenters.nano.segmenter import NanoSegmenter
from seerseg.volume import Grid, Volume
from seerseg_data.phantoms import Phantom, phantom
from seerseg_data.recipes.items import Item, phantom_items

SMALL = NanoConfig(channels=(8, 8, 16, 16, 24), text_width=16, char_width=16, gram_width=16, gram_buckets=128)


def untrained_segmenter(*names: str, **settings: Any) -> NanoSegmenter:
    """Its presence head says yes to everything and its masks are noise, but they are deterministic noise."""
    torch.manual_seed(3)
    network = NanoNetwork(SMALL)
    with torch.no_grad():
        network.presence[2].bias.fill_(30.0)
    return NanoSegmenter(network, {name: {} for name in names}, **settings)


@cache
def shipped_segmenter() -> NanoSegmenter:
    """With the weights of the package; one for all tests of a process, as it keeps nothing of a scan."""
    return load()


@cache
def chest_phantom() -> Phantom:
    """Of a seed that training never drew."""
    return phantom("chest", 7001, spacing_zyx_mm=(5.0, 4.0, 4.0))


def coarse_phantoms(folder: Path, first_seed: int = 900) -> list[Item]:
    """A chest and an abdomen as training items, from a cache of coarse drawings: a true one takes seconds."""
    for number, kind in enumerate(("chest", "abdomen")):
        drawn = phantom(kind, first_seed + number, spacing_zyx_mm=(9.0, 8.0, 8.0))  # type: ignore[arg-type]
        np.savez(folder / f"{kind}_{first_seed + number}.npz", image=drawn.array_zyx, labels=drawn.labels_zyx)
    return phantom_items(2, folder, first_seed)


def volume_of(drawing: Phantom) -> Volume:
    """As a CT."""
    z, y, x = drawing.array_zyx.shape
    return Volume(drawing.array_zyx, Grid((z, y, x), drawing.affine), "CT")


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """0 for an empty mask of a present target."""
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))
