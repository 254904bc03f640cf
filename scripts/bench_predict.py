"""Peak memory of prediction in bytes per voxel, and how much the overlap of its stages saves.

    python scripts/bench_predict.py                               300 x 512 x 512 int16, three prompts, segmenter `scripted`
    python scripts/bench_predict.py --segmenter nano --shape 150 256 256
    python scripts/bench_predict.py --part overlap --cases 8 --wait_s 0.5     a segmenter that takes half a second of another device

Peak memory is the high-water mark of resident memory during the run, less what is resident after a small scan was predicted
with the same model (so that code, weights and workspaces that do not grow with the scan are not counted).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from seerseg.prediction import Options, Predictor, predict_folder

PROMPTS = ("left lung", "right lung", "spine")


def synthetic(shape_zyx: tuple[int, int, int], path: Path, seed: int = 0) -> Path:
    """A CT-like scan: air, a body, two lungs, a spine, and noise, so that it packs as real ones do."""
    rng = np.random.default_rng(seed)
    z, y, x = shape_zyx
    array = np.full((z, y, x), -1000, np.int16)
    array[:, y // 6 : -y // 6, x // 8 : -x // 8] = 40
    array[:, y // 4 : -y // 3, x // 6 : 2 * x // 5] = -850
    array[:, y // 4 : -y // 3, -2 * x // 5 : -x // 6] = -850
    array[:, -y // 3 : -y // 4, x // 2 - x // 16 : x // 2 + x // 16] = 400
    for index in range(z):
        array[index] += rng.integers(-20, 20, (y, x), dtype=np.int16)
    affine = np.diag([0.8, 0.8, 1.5, 1.0])
    nib.Nifti1Image(array.T, affine).to_filename(path)
    return path


def predictor(name: str, device: str, wait_s: float = 0.0) -> Predictor:
    """The named segmenter; `scripted` thresholds the scan in place of a network, so that what is measured is the rest."""
    if name != "scripted":
        return Predictor(name, "verbatim", device=device)
    from seerseg.segmenters.scripted import ScriptedSegmenter

    half = {"left lung": slice(None, 0, -1), "right lung": slice(None)}

    def spine(volume: Any, prompt: Any) -> Any:
        time.sleep(wait_s)
        return volume.array > 300

    def lung(side: str) -> Any:
        def draw(volume: Any, prompt: Any) -> Any:
            mask = volume.array < -700
            middle = mask.shape[2] // 2
            mask[:, :, middle:] &= side == "right lung"
            mask[:, :, :middle] &= side == "left lung"
            return mask

        return draw

    script = {name: lung(name) for name in half}
    script["spine"] = spine
    return Predictor(ScriptedSegmenter(script, identity="bench"), "verbatim", device=device)


def resident() -> dict[str, int]:
    """Resident memory and its high-water mark, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = {"VmRSS": "now", "VmHWM": "peak"}
    return {wanted[name]: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if name in wanted}


def reset_peak() -> None:
    """Start the high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(shape_zyx: tuple[int, int, int], segmenter: str, device: str, folder: Path) -> dict[str, Any]:
    """Bytes per voxel above the baseline, of one scan with three prompts."""
    (folder / "small").mkdir()
    (folder / "large").mkdir()
    synthetic((24, 48, 48), folder / "small" / "a.nii.gz")
    synthetic(shape_zyx, folder / "large" / "a.nii.gz")
    model = predictor(segmenter, device)
    predict_folder(folder / "small", folder / "out_small", model, prompts=PROMPTS)
    reset_peak()
    before = resident()
    started = time.perf_counter()
    report = predict_folder(folder / "large", folder / "out_large", model, prompts=PROMPTS)
    seconds = time.perf_counter() - started
    peak = resident()["peak"]
    voxels = int(np.prod(shape_zyx))
    return {
        "segmenter": segmenter,
        "shape_zyx": list(shape_zyx),
        "status": {r["text"]: r["status"] for r in report.results[0].record["requests"]},
        "baseline_mb": round(before["now"] / 2**20),
        "peak_mb": round(peak / 2**20),
        "bytes_per_voxel": round((peak - before["now"]) / voxels, 2),
        "seconds": round(seconds, 2),
    }


def measure_overlap(
    shape_zyx: tuple[int, int, int], segmenter: str, device: str, cases: int, wait_s: float, folder: Path
) -> dict[str, Any]:
    """Seconds for several scans with and without overlap, the faster of two runs each."""
    (folder / "many").mkdir()
    for i in range(cases):
        synthetic(shape_zyx, folder / "many" / f"case{i}.nii.gz", seed=i)
    model = predictor(segmenter, device, wait_s)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(2):
        for overlap in (True, False):
            started = time.perf_counter()
            predict_folder(folder / "many", folder / f"out_{overlap}_{repeat}", model, prompts=PROMPTS, options=Options(overlap=overlap))
            seconds[overlap].append(time.perf_counter() - started)
    overlapped, serial = min(seconds[True]), min(seconds[False])
    return {
        "segmenter": segmenter,
        "shape_zyx": list(shape_zyx),
        "cases": cases,
        "wait_s": wait_s,
        "overlapped_s": round(overlapped, 2),
        "serial_s": round(serial, 2),
        "serial_over_overlapped": round(serial / overlapped, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "overlap", "both"), default="both")
    parser.add_argument("--segmenter", default="scripted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--overlap_shape", type=int, nargs=3, default=(100, 256, 256), metavar=("Z", "Y", "X"))
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--wait_s", type=float, default=0.0, help="seconds that the scripted segmenter waits, as for a GPU")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.part in ("memory", "both"):
            print(json.dumps(measure_memory(tuple(given.shape), given.segmenter, given.device, folder)))
        if given.part in ("overlap", "both"):
            print(json.dumps(measure_overlap(tuple(given.overlap_shape), given.segmenter, given.device, given.cases, given.wait_s, folder)))


if __name__ == "__main__":
    main()
