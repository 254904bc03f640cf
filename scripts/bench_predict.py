"""Peak memory of prediction in bytes per voxel, how much the overlap of its stages saves, and what it costs beside the models.

    python scripts/bench_predict.py                               300 x 512 x 512 int16, three prompts, segmenter `scripted`
    python scripts/bench_predict.py --segmenter nano --shape 150 256 256
    python scripts/bench_predict.py --part overlap --cases 8 --wait_s 0.5     a segmenter that takes half a second of another device
    python scripts/bench_predict.py --part overhead               30 small scans: wall time over the models' own time
    python scripts/bench_predict.py --part overhead --images ../shared/data/mr_hippocampus/imagesTr --prompt "anterior hippocampus"

Overhead: the same scans and requests are done twice in turn, several times, in one process: by `predict_folder` (files read, masks written
and synced, ledger and all), and by the bare models in one thread on volumes that are in memory already, with only the calls of the
reasoner's `reply` and the segmenter's `segment` counted. The ratio is that of the fastest of each. Seconds of the processor are given
besides, as they depend less on what else the machine does.

Peak memory is the high-water mark of resident memory during the run, less what is resident after a small scan was predicted
with the same model (so that code, weights and workspaces that do not grow with the scan are not counted).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
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


class Timed:
    """A reasoner or segmenter whose `reply` or `segment` is timed; all else is its own."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.wall_s = self.cpu_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def _timed(self, work: Any, *given: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return work(*given, **named)
        finally:
            self.wall_s += time.perf_counter() - wall
            self.cpu_s += time.process_time() - cpu

    def reply(self, *given: Any, **named: Any) -> Any:
        return self._timed(self.wrapped.reply, *given, **named)

    def segment(self, *given: Any, **named: Any) -> Any:
        return self._timed(self.wrapped.segment, *given, **named)

    @property
    def card(self) -> Any:
        return self.wrapped.card

    @property
    def capabilities(self) -> Any:
        return self.wrapped.capabilities

    def session(self, volume: Any) -> Any:
        return self.wrapped.session(volume)

    def start(self) -> None:
        self.wall_s = self.cpu_s = 0.0


def measure_overhead(
    images: Path | None,
    prompts: tuple[str, ...],
    shape_zyx: tuple[int, int, int],
    names: tuple[str, str],
    device: str,
    cases: int,
    repeats: int,
    folder: Path,
) -> dict[str, Any]:
    """Seconds of `predict_folder` over those of the models alone; see the module. names: segmenter, reasoner."""
    from seerseg.dataset import find_cases
    from seerseg.reasoners import load_reasoner
    from seerseg.segmenters import load_segmenter
    from seerseg.volume import read_case

    (folder / "small").mkdir()
    found = sorted(images.glob("*_0000.nii.gz")) if images is not None else []
    for number in range(cases):
        place = folder / "small" / f"case{number:03d}_0000.nii.gz"
        if found:
            shutil.copyfile(found[number % len(found)], place)
        else:
            synthetic(shape_zyx, place, seed=number)
    segmenter, reasoner = Timed(load_segmenter(names[0], device=device)), Timed(load_reasoner(names[1], device=device))
    model = Predictor(segmenter, reasoner, device=device)
    model.load()
    volumes = [read_case(case.images)[0] for case in find_cases(folder / "small")[0]]
    model.predict(volumes[0], list(prompts))  # what is made at the first call belongs to neither
    alone: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []
    inside: list[float] = []
    for repeat in range(repeats):
        segmenter.start(), reasoner.start()
        for volume in volumes:
            model.predict(volume, list(prompts))
        alone.append((segmenter.wall_s + reasoner.wall_s, segmenter.cpu_s + reasoner.cpu_s))
        segmenter.start(), reasoner.start()
        wall, cpu = time.perf_counter(), time.process_time()
        report = predict_folder(folder / "small", folder / f"out_{repeat}", model, prompts=prompts)
        whole.append((time.perf_counter() - wall, time.process_time() - cpu))
        inside.append(segmenter.wall_s + reasoner.wall_s)
    bare, done = min(a for a, _ in alone), min(w for w, _ in whole)
    return {
        "segmenter": names[0],
        "reasoner": names[1],
        "images": str(images.name) if images is not None else "synthetic",
        "cases": cases,
        "requests": len(prompts),
        "status": dict(Counter(r["status"] for result in report.results for r in result.record["requests"])),
        "models_alone_s": [round(a, 2) for a, _ in alone],
        "predict_folder_s": [round(w, 2) for w, _ in whole],
        "models_inside_s": [round(i, 2) for i in inside],
        "wall_ratio": round(done / bare, 3),
        "processor_ratio": round(min(c for _, c in whole) / min(c for _, c in alone), 3),
    }


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
    parser.add_argument("--part", choices=("memory", "overlap", "overhead", "both"), default="both")
    parser.add_argument("--segmenter", help="default: scripted; for overhead: nano")
    parser.add_argument("--reasoner", default="lexicon", help="for overhead")
    parser.add_argument("--images", type=Path, help="for overhead: a folder of *_0000.nii.gz instead of made-up scans")
    parser.add_argument("--prompt", action="append", help="for overhead; may be repeated")
    parser.add_argument("--small_shape", type=int, nargs=3, default=(40, 64, 64), metavar=("Z", "Y", "X"))
    parser.add_argument("--repeats", type=int, default=3, help="for overhead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--overlap_shape", type=int, nargs=3, default=(100, 256, 256), metavar=("Z", "Y", "X"))
    parser.add_argument("--cases", type=int, help="default: 6; for overhead: 30")
    parser.add_argument("--wait_s", type=float, default=0.0, help="seconds that the scripted segmenter waits, as for a GPU")
    given = parser.parse_args()
    given.segmenter = given.segmenter or ("nano" if given.part == "overhead" else "scripted")
    given.cases = given.cases or (30 if given.part == "overhead" else 6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.part == "overhead":
            names, prompts = (given.segmenter, given.reasoner), tuple(given.prompt or PROMPTS)
            shape = tuple(given.small_shape)
            print(
                json.dumps(
                    measure_overhead(given.images, prompts, shape, names, given.device, given.cases, given.repeats, folder)  # type: ignore[arg-type]
                )
            )
        if given.part in ("memory", "both"):
            print(json.dumps(measure_memory(tuple(given.shape), given.segmenter, given.device, folder)))
        if given.part in ("overlap", "both"):
            print(json.dumps(measure_overlap(tuple(given.overlap_shape), given.segmenter, given.device, given.cases, given.wait_s, folder)))


if __name__ == "__main__":
    main()
