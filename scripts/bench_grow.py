"""How well and how fast `grow` draws from true prompts: one Dice per structure and kind of prompt, on a labelled scan.

    python scripts/bench_grow.py torso --data FOLDER          FOLDER: image.nii.gz, label.nii.gz, labels.json
    python scripts/bench_grow.py hippocampus --data FOLDER    FOLDER: nnU-Net raw layout; the first --cases cases
    python scripts/bench_grow.py phantom                      seerseg_data.phantoms; nothing to download

Prompts are made from the reference: a tight box on the slice of largest area across each axis (z, y, x); a tight 3D box; a click at
the deepest point of the largest axial slice; the true mask of that slice. So this is an upper bound for a reasoner's boxes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.segmenters import load_segmenter
from seerseg.volume import Grid, Mask, Volume, read_labels, read_volume

Bool = NDArray[np.bool_]
KINDS = ("box z", "box y", "box x", "box 3D", "click", "mask z")
LEAST_VOXELS = 500


def true_prompts(truth: Bool, grid: Grid) -> list[Prompt]:
    """In the order of KINDS."""
    prompts = []
    for axis in range(3):
        areas = truth.sum(axis=tuple(i for i in range(3) if i != axis))
        index = int(areas.argmax())
        section = np.take(truth, index, axis=axis)
        rows, columns = np.flatnonzero(section.any(1)), np.flatnonzero(section.any(0))
        prompts.append(Prompt(boxes=(Box2D(axis, index, (rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1)),)))
    where = np.argwhere(truth)
    prompts.append(Prompt(boxes=(Box3D(tuple(where.min(0)), tuple(where.max(0) + 1)),)))
    z = int(truth.sum((1, 2)).argmax())
    depth = distance_transform_edt(np.pad(truth[z], 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    prompts.append(Prompt(points=(Point((z, int(y), int(x))),)))
    key = np.zeros_like(truth)
    key[z] = truth[z]
    prompts.append(Prompt(mask=Mask(key, grid)))
    return prompts


def torso(folder: Path) -> Iterator[tuple[str, Volume, Bool]]:
    """Every label with at least LEAST_VOXELS."""
    volume = read_volume(folder / "image.nii.gz", modality="CT")
    labels, _ = read_labels(folder / "label.nii.gz", like=volume.grid)
    for value, entry in json.loads((folder / "labels.json").read_text())["labels"].items():
        yield entry["name"], volume, labels == int(value)


def hippocampus(folder: Path, cases: int) -> Iterator[tuple[str, Volume, Bool]]:
    """Both parts and the whole."""
    for path in sorted((folder / "labelsTr").glob("*.nii.gz"))[:cases]:
        volume = read_volume(folder / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"), modality="MR")
        labels, _ = read_labels(path, like=volume.grid)
        yield from (("anterior", volume, labels == 1), ("posterior", volume, labels == 2), ("whole", volume, labels > 0))


def phantoms(seeds: int) -> Iterator[tuple[str, Volume, Bool]]:
    """Structures of torso phantoms at 3 mm."""
    from seerseg_data.phantoms import phantom

    for seed in range(1000, 1000 + seeds):
        drawn = phantom("torso", seed, spacing_zyx_mm=(3.0, 3.0, 3.0))
        volume = Volume(drawn.array_zyx, Grid(drawn.array_zyx.shape, drawn.affine), modality="CT")
        for value, name in drawn.names.items():
            yield name, volume, drawn.labels_zyx == value


def main() -> None:
    """Print one row per structure and the mean over structures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("torso", "hippocampus", "phantom"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", type=int, default=20, help="cases of the hippocampus set, or phantoms")
    options = parser.parse_args()
    if options.set != "phantom" and options.data is None:
        parser.error(f"--data FOLDER is needed for {options.set}")
    source = {
        "torso": lambda: torso(options.data),
        "hippocampus": lambda: hippocampus(options.data, options.cases),
        "phantom": lambda: phantoms(options.cases),
    }[options.set]()
    segmenter = load_segmenter("grow")
    rows: dict[str, list[list[float]]] = {}
    seconds: list[list[float]] = []
    for name, volume, truth in source:
        if truth.sum() < LEAST_VOXELS:
            continue
        found = segmenter.segment(volume, true_prompts(truth, volume.grid))
        masks = [one.mask.array for one in found if one.mask is not None]
        rows.setdefault(name, []).append([2.0 * float((m & truth).sum()) / float(m.sum() + truth.sum()) for m in masks])
        seconds.append([one.seconds for one in found])
    print(f"| structure (at least {LEAST_VOXELS} voxels) | n | " + " | ".join(KINDS) + " |\n|---|---|" + "---|" * len(KINDS))
    for name, dices in rows.items():
        print(f"| {name} | {len(dices)} | " + " | ".join(f"{d:.2f}" for d in np.mean(dices, axis=0)) + " |")
    means = np.mean([np.mean(dices, axis=0) for dices in rows.values()], axis=0)
    print(f"| **mean over {len(rows)} structures** | {len(seconds)} | " + " | ".join(f"{d:.3f}" for d in means) + " |")
    print("| seconds, median | | " + " | ".join(f"{s:.2f}" for s in np.median(seconds, axis=0)) + " |")
    print("| seconds, most | | " + " | ".join(f"{s:.2f}" for s in np.max(seconds, axis=0)) + " |")


if __name__ == "__main__":
    main()
