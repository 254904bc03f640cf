"""SeerSeg's `voxtell` against VoxTell's own command, on the same folder and scans: are the masks the same, and what does each take?

    python scripts/bench_voxtell.py                                   a tiny folder of the true architecture, made here; phantoms
    python scripts/bench_voxtell.py --scans scan.nii.gz ...           the same on scans of yours
    python scripts/bench_voxtell.py --model FOLDER --bank FILE.npz --prompts liver spleen --scans ...    real weights

Every run is a process of its own, from start to written masks, and the two take turns, so that a busy machine is busy for both. Seconds are
wall time; CPU seconds (all threads, with children) are what to look at where others use the machine. `in one process` leaves imports and
loading out: one scan, asked again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
TEXTS = ("liver", "left kidney", "right kidney", "spleen", "tumor in the left lung")
THEIRS = "import sys; sys.path.insert(0, {tests!r}); import tiny_voxtell; sys.exit(tiny_voxtell.run_command(sys.argv[1:]))"
THEIRS_REAL = (
    "import sys; from voxtell.inference.predict_from_raw_data import main; sys.argv = ['voxtell-predict', *sys.argv[1:]]; sys.exit(main())"
)
OURS = "from seerseg.cli.predict import predict; predict()"


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def run(code: str, arguments: Sequence[str]) -> Cost:
    """A process; RuntimeError with its output when it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, after.ru_maxrss / 1024)


def ours(model: Path, bank: Path, scans: Sequence[Path], texts: Sequence[str], out: Path, device: str) -> Cost:
    folder = out.with_name("scans_" + out.name)
    folder.mkdir()
    for scan in scans:
        (folder / scan.name).symlink_to(scan.resolve())
    given = ["-i", folder, "-o", out, "--segmenter", f"voxtell:{model}?bank={bank}&encoder=off", "--reasoner", "verbatim", "--per_request"]
    prompts = [word for text in texts for word in ("--prompt", text)]
    return run(OURS, [*map(str, given), "--accept_license", "-device", device, *prompts])


def theirs(model: Path, bank: Path, scans: Sequence[Path], texts: Sequence[str], out: Path, device: str, *, tiny: bool) -> Cost:
    arguments = ["-i", *map(str, scans), "-o", str(out), "-m", str(model), "--embeddings", str(bank), "-p", *texts]
    if tiny:
        return run(THEIRS.format(tests=str(TESTS)), arguments)
    return run(THEIRS_REAL, ["--device", device, *arguments])


def differing(scans: Sequence[Path], texts: Sequence[str], ours_at: Path, theirs_at: Path) -> tuple[int, int]:
    """Voxels in which the two differ, and voxels in the masks, over all scans and prompts."""
    import nibabel

    wrong = drawn = 0
    for scan in scans:
        case = scan.name.removesuffix(".nii.gz").removesuffix(".nii")
        record = json.loads((ours_at / f"{case}.json").read_text())
        ids = {request["text"]: request["id"] for request in record["requests"]}
        for text in texts:
            own = ours_at / f"{case}__{ids[text]}.nii.gz"
            a = np.asarray(nibabel.load(own).dataobj) > 0
            b = np.asarray(nibabel.load(theirs_at / f"{case}_{text.replace(' ', '_')}.nii.gz").dataobj) > 0
            wrong, drawn = wrong + int((a != b).sum()), drawn + int(b.sum())
    return wrong, drawn


def in_one_process(model: Path, bank: Path, scan: Path, texts: Sequence[str], repeats: int) -> tuple[float, float]:
    """Least CPU seconds of ours and of theirs for one scan that is read already."""
    sys.path.insert(0, str(TESTS))
    import tiny_voxtell

    from seerseg.prompts import Prompt
    from seerseg.segmenters import load_segmenter
    from seerseg.volume import read_volume

    volume = read_volume(scan)
    mine = load_segmenter(f"voxtell:{model}?bank={bank}&encoder=off", accept_license=True)
    own = tiny_voxtell.their_predictor(model, bank=bank)
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for which, call in enumerate(
            (
                lambda: mine.segment(volume, [Prompt(text=text) for text in texts]),
                lambda: own.predict_single_image(volume.array, list(texts)),
            )
        ):
            began = time.process_time()
            call()
            best[which] = min(best[which], time.process_time() - began)
    return best[0], best[1]


def phantoms(folder: Path, count: int) -> list[Path]:
    """Scans of 40 x 60 x 70 voxels with an ellipsoid, in a frame of zeros."""
    import nibabel

    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        x, y, z = np.ogrid[:70, :60, :40]
        inside = ((x - 25 - number) / 14) ** 2 + ((y - 30) / 12) ** 2 + ((z - 20) / 9) ** 2 <= 1
        array = np.where(inside, 180, 20) + rng.normal(0, 12, inside.shape)
        array[:4] = 0
        path = folder / f"phantom_{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), np.diag([-1.5, -1.5, 2.0, 1.0])), path)
        made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--scans", type=Path, nargs="+")
    parser.add_argument("--prompts", nargs="+", default=list(TEXTS[:4]))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as kept:
        work = Path(kept)
        tiny = given.model is None
        model: Path = given.model
        if tiny:
            sys.path.insert(0, str(TESTS))
            import tiny_voxtell

            model = tiny_voxtell.folder(work / "model", labels=TEXTS)
        bank = given.bank or model / "text_embeddings.npz"
        scans = given.scans or phantoms(work, 3)
        plan: list[tuple[str, list[Path], list[str]]] = [
            ("1 scan, 1 prompt", scans[:1], given.prompts[:1]),
            (f"1 scan, {len(given.prompts)} prompts", scans[:1], given.prompts),
            (f"{len(scans)} scans, {len(given.prompts)} prompts", scans, given.prompts),
        ]
        print("| run | ours: wall, CPU, peak | VoxTell's own: wall, CPU, peak | wall ratio | CPU ratio | differing voxels |")
        print("| --- | --- | --- | --- | --- | --- |")
        for number, (name, some, texts) in enumerate(plan):
            costs: list[list[Cost]] = [[], []]
            for again in range(given.repeats):
                places = [work / f"ours_{number}_{again}", work / f"theirs_{number}_{again}"]
                costs[0].append(ours(model, bank, some, texts, places[0], given.device))
                costs[1].append(theirs(model, bank, some, texts, places[1], given.device, tiny=tiny))
                wrong, drawn = differing(some, texts, *places)
            best: list[Any] = [Cost(*(min(getattr(c, f) for c in one) for f in ("wall_s", "cpu_s", "peak_mb"))) for one in costs]
            told = " | ".join(f"{c.wall_s:.1f} s, {c.cpu_s:.1f} s, {c.peak_mb:.0f} MB" for c in best)
            ratios = f"{best[0].wall_s / best[1].wall_s:.2f} | {best[0].cpu_s / best[1].cpu_s:.2f}"
            print(f"| {name} | {told} | {ratios} | {wrong} of {drawn} |", flush=True)
        if tiny:
            for texts in (given.prompts[:1], given.prompts):
                mine, own = in_one_process(model, bank, scans[0], texts, given.repeats + 1)
                print(
                    f"| in one process, {len(texts)} prompts | {mine:.2f} s CPU | {own:.2f} s CPU | - | {mine / own:.2f} | - |", flush=True
                )


if __name__ == "__main__":
    main()
