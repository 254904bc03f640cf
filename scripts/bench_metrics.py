"""Time and memory of our Dice, NSD and HD95 beside MONAI's, on a liver-sized mask in a 300x512x512 CT grid.

Run: python scripts/bench_metrics.py [--shape 300 512 512] [--skip_monai]. Each side runs in a process of its own, so that
peak memory is its own. MONAI also crops to the box around both masks; the ratio is
what its distance maps cost over our k-d trees.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time

import numpy as np


def masks(shape: tuple[int, int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two bool masks: an ellipsoid of a liver's size and the same moved by 3 mm, or one of another size inside it."""
    y, x = np.ogrid[: shape[1], : shape[2]]
    c, r = [n / 2 for n in shape], [0.3 * shape[0], 0.2 * shape[1], 0.25 * shape[2]]

    def ellipsoid(scale: float, shift: int) -> np.ndarray:
        mask = np.zeros(shape, dtype=bool)
        flat = ((y - c[1]) / r[1] / scale) ** 2 + ((x - c[2]) / r[2] / scale) ** 2
        for z in range(shape[0]):  # slice by slice, so that making them is not the peak that is measured
            mask[z] = flat + ((z - c[0] - shift) / r[0] / scale) ** 2 <= 1
        return mask

    return ellipsoid(1.0, 0), ellipsoid(1.0, 2) if kind == "near" else ellipsoid(0.6, 0)


def by_us(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]) -> list[float]:
    """Dice, NSD, HD95 by seerseg.metrics."""
    from seerseg.metrics import score_masks
    from seerseg.volume import Grid

    found = score_masks(prediction, reference, Grid(prediction.shape, np.diag([*spacing[::-1], 1.0])), tolerance_mm=2.0)
    return [found.dice or 0.0, found.nsd or 0.0, found.hd95_mm or 0.0]


def by_monai(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]) -> list[float]:
    """Dice, NSD, HD95 by monai.metrics."""
    import torch
    from monai import metrics

    p, r = (torch.from_numpy(m[None, None]) for m in (prediction, reference))
    return [
        float(metrics.compute_dice(p, r)),
        float(metrics.compute_surface_dice(p, r, [2.0], include_background=True, spacing=spacing)),
        float(metrics.compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=spacing)),
    ]


def measure(side: str, kind: str, shape: tuple[int, int, int]) -> dict[str, object]:
    """One side in this process: seconds (imports not counted), peak above the masks in bytes per voxel of the box, scores."""
    importlib.import_module("scipy.spatial")

    if side == "monai":
        importlib.import_module("monai.metrics")

    prediction, reference = masks(shape, kind)
    from seerseg.metrics import largest_extent

    box = largest_extent(prediction, reference)
    voxels = int(np.prod([s.stop - s.start for s in box])) if box else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    scores = (by_us if side == "ours" else by_monai)(prediction, reference, (1.5, 0.8, 0.8))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"wall_s": wall, "cpu_s": cpu, "bytes_per_box_voxel": peak / voxels, "box_voxels": voxels, "scores": scores}


def main() -> None:
    """Print one line of JSON per side and kind, then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--skip_monai", action="store_true")
    parser.add_argument("--side", choices=["ours", "monai"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["near", "inside"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.kind, tuple(arguments.shape))))
        return
    for kind in ("near", "inside"):
        found = {}
        for side in ("ours",) if arguments.skip_monai else ("ours", "monai"):
            command = [sys.executable, __file__, "--side", side, "--kind", kind, "--shape", *map(str, arguments.shape)]
            found[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(kind, side, json.dumps(found[side]))
        if "monai" in found:
            ratios = {k: found["monai"][k] / found["ours"][k] for k in ("wall_s", "cpu_s", "bytes_per_box_voxel")}
            print(kind, "monai / ours", json.dumps({k: round(v, 1) for k, v in ratios.items()}))


if __name__ == "__main__":
    main()
