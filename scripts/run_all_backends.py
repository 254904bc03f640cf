#!/usr/bin/env python
"""Every backend by name through seerseg_predict, end to end, with tiny random weights of the true architecture.

The output's grid must be the input's, exactly. What is drawn means nothing where weights are random; that it is drawn, where it lies
and what is said does.

    python scripts/run_all_backends.py OUT [--chest IMAGE LABELS] [--tumour IMAGE LABELS [FURTHER_CHANNEL]]

Without scans: the CT chest of slicerio (seerseg_sample ct_chest) and, where the development scans lie beside the project, the glioma.
nnunet needs the package nnunetv2, totalsegmentator and voxtell their own; where they are not installed they are left out, and that is
said. The tiny folders are those of the tests. Masks, records and pictures (<case>.png) lie in OUT/<scan>/<backend>, the table in
OUT/table.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PATCH = (32, 64, 64)


@dataclass(frozen=True)
class Scan:
    """images: the channels of one case; labels: values of its reference, or None; target: the name and value asked for by a box;
    words: what backends with words are asked."""

    name: str
    images: tuple[Path, ...]
    labels: Path
    modality: str
    target: tuple[str, tuple[int, ...]]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Backend:
    """name: as the table calls it; segmenter: as the command line takes it; boxes: it is given the true box in MedVol-R1's grammar, else
    words by the lexicon; channels: of the scan that it looks at."""

    name: str
    segmenter: str
    boxes: bool = False
    channels: int = 1
    words: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chest", nargs=2, type=Path, metavar=("IMAGE", "LABELS"))
    parser.add_argument("--tumour", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="BACKEND")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for scan in scans(given):
        for backend in backends(given.out / "weights", scan):
            if given.only is None or backend.name in given.only:
                rows.append(run(given.out, scan, backend))
                print(line(rows[-1]), flush=True)
    heads = ("scan", "backend", "exit", "requests", "voxels", "grid equal", "Dice with the reference", "s")
    (given.out / "table.md").write_text("\n".join([f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *map(line, rows)]) + "\n")
    sys.exit(0 if all(row["exact"] and row["exit"] == 0 for row in rows) else 1)


def scans(given: argparse.Namespace) -> Iterator[Scan]:
    """The chest and the tumour, where they are."""
    from seerseg_data.samples import KNOWN, make_sample

    if given.chest is None and importlib.util.find_spec("slicerio") is not None:
        folder = given.out / "raw" / KNOWN["ct_chest"].folder
        if not (folder / "dataset.json").exists():
            make_sample("ct_chest", given.out / "raw")
        given.chest = [folder / "imagesTr" / "chest_001_0000.nii.gz", folder / "labelsTr" / "chest_001.nii.gz"]
    if given.chest is not None:
        image, labels = given.chest
        yield Scan("chest", (image,), labels, "CT", ("left lung", (6,)), ("the left lung, please", "lungs"))
    glioma = ROOT.parent / "shared" / "data" / "mr_glioma"
    if given.tumour is None and glioma.is_dir():
        given.tumour = [glioma / "image.nii.gz", glioma / "label.nii.gz", glioma / "image_flair.nii.gz"]
    if given.tumour is not None:
        image, labels, *further = given.tumour
        yield Scan("tumour", (image, *further), labels, "MR", ("brain tumour", (1, 2, 3, 4)), ("brain tumour", "the tumuor in the brain"))


def backends(weights: Path, scan: Scan) -> Iterator[Backend]:
    """Those that can be run here, with their tiny weights; what is not installed is said."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_sams import sam2_model, sam_model, save

    weights.mkdir(parents=True, exist_ok=True)
    script = weights / f"scripted_{scan.name}.json"
    name, values = scan.target
    script.write_text(json.dumps({"kind": "scripted_segmenter", "names": {name: list(values)}, "cases": {"*": str(scan.labels.resolve())}}))
    yield Backend("nano", "nano")
    yield Backend("grow", "grow", boxes=True)
    yield Backend("scripted", f"scripted:{script}", words=(name,))
    for kind, make in (("medsam2", sam2_model), ("sam", sam_model)):
        folder = weights / f"{kind}-tiny-random".replace("medsam2", "sam2")
        yield Backend(kind, f"{kind}:{folder if folder.is_dir() else save(make(), folder)}", boxes=True)
    if importlib.util.find_spec("voxtell") is None:
        print("voxtell is left out: its package is not installed")
    else:
        import tiny_voxtell

        place = weights / "voxtell"
        yield Backend("voxtell", f"voxtell:{place if place.is_dir() else tiny_voxtell.folder(place)}", words=tiny_voxtell.LABELS[:2])
    if importlib.util.find_spec("nnunetv2") is None:
        print("nnunet is left out: the package nnunetv2 is not installed")
        return
    yield from nnunets(weights, scan)
    if importlib.util.find_spec("totalsegmentator") is None:
        print("totalsegmentator is left out: its package is not installed")
        return
    yield totalsegmentator(weights, scan)


def nnunets(weights: Path, scan: Scan) -> Iterator[Backend]:
    """A tiny model folder of one channel, and one of as many as the scan has."""
    import tiny_nnunet

    names = (
        {"background": 0, "lung_left": 1, "lung_right": 2} if scan.modality == "CT" else {"background": 0, "brain tumour": 1, "brain": 2}
    )
    for channels in dict.fromkeys((1, len(scan.images))):
        folder = weights / f"nnunet_{scan.name}_{channels}"
        if not folder.is_dir():
            tiny_nnunet.folder(folder, names, channels=(scan.modality,) * channels, patch=PATCH, reader="NibabelIOWithReorient")
        yield Backend("nnunet" if channels == 1 else f"nnunet, {channels} channels", f"nnunet:{folder}", channels=channels)


def totalsegmentator(weights: Path, scan: Scan) -> Backend:
    """The package itself, its 3 mm model replaced by a tiny one with all its classes."""
    import tiny_nnunet
    from totalsegmentator.libs import TASK_ID_WEIGHTS_CONFIGS
    from totalsegmentator.map_tasks_config import TASK_CONFIGS
    from totalsegmentator.map_to_binary import class_map

    os.environ["TOTALSEG_HOME_DIR"] = str(weights / "totalsegmentator")
    os.environ["TOTALSEG_WEIGHTS_PATH"] = str(weights / "totalsegmentator")
    task = "total" if scan.modality == "CT" else "total_mr"
    mode = TASK_CONFIGS[task]["sub_modes"]["fast"]
    number = mode["task_id"][0] if isinstance(mode["task_id"], list) else mode["task_id"]
    place = weights / "totalsegmentator" / TASK_ID_WEIGHTS_CONFIGS[number]["foldername"] / f"{mode['trainer']}__nnUNetPlans__3d_fullres"
    if not place.is_dir():
        labels = {"background": 0, **{name: value for value, name in class_map[task].items()}}
        tiny_nnunet.folder(place, labels, channels=(scan.modality,), patch=PATCH, reader="NibabelIOWithReorient")
    words = ("liver", "the left lung") if task == "total" else ("brain", "liver")
    return Backend("totalsegmentator", f"totalsegmentator:{task}?fast=on&subset=off", words=words)


def run(out: Path, scan: Scan, backend: Backend) -> dict[str, Any]:
    """One run of the command on one scan, and what it left."""
    from click.testing import CliRunner

    from seerseg.cli.predict import predict

    place = out / scan.name / backend.name.replace(", ", "_").replace(" ", "_")
    case = out / "cases" / f"{scan.name}_{backend.channels}"
    case.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(scan.images[: backend.channels]):
        link = case / f"{scan.name}_{number:04d}{''.join(image.suffixes[-2:])}"
        if not link.exists():
            link.symlink_to(image.resolve())
    words = backend.words or scan.words
    arguments = [
        "-i",
        str(case),
        "-o",
        str(place),
        "--segmenter",
        backend.segmenter,
        "--modality",
        scan.modality,
        "--overwrite",
        "--overlay",
    ]
    arguments += ["--per_request", "-device", "cpu", "--accept_license"]
    if backend.boxes:
        replies = out / "cases" / f"{scan.name}_replies.json"
        replies.write_text(json.dumps({"*": true_reply(scan)}))
        arguments += ["--protocol", "medvol-r1", "--reasoner", f"scripted:{replies}"]
        words = (scan.target[0],)
    for text in words:
        arguments += ["--prompt", text]
    began = time.time()
    done = CliRunner().invoke(predict, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        traceback.print_exception(done.exception)
    if done.exit_code:
        print(done.output)
    return {"scan": scan.name, "backend": backend.name, "exit": done.exit_code, "seconds": time.time() - began} | looked_at(place, scan)


def true_reply(scan: Scan) -> str:
    """The slice of the target's largest area and one box around it there, in MedVol-R1's grammar."""
    from seerseg.prompts import Box2D
    from seerseg.protocols import load_protocol
    from seerseg.protocols.base import KeySlice, Trace
    from seerseg.views import render
    from seerseg.volume import read_labels, read_volume

    protocol, volume = load_protocol("medvol-r1"), read_volume(scan.images[0], modality=scan.modality)
    mask = np.isin(read_labels(scan.labels, like=volume.grid)[0], scan.target[1])
    index = int(mask.sum(axis=(1, 2)).argmax())
    rows, columns = np.flatnonzero(mask[index].any(1)), np.flatnonzero(mask[index].any(0))
    box = Box2D(0, index, (int(rows[0]), int(columns[0])), (int(rows[-1]) + 1, int(columns[-1]) + 1))
    trace = Trace("", "As given.", scan.target[0], slices=(KeySlice(0, index, int(mask[index].sum()), (box,)),))
    return protocol.targets(trace, render(volume, protocol.view_spec))[0]


def looked_at(place: Path, scan: Scan) -> dict[str, Any]:
    """Statuses of the requests, voxels of each mask, whether shape and affine of every file are the image's, Dice of the masks that
    were asked for by the reference's name."""
    import nibabel

    image, reference = nibabel.load(scan.images[0]), nibabel.load(scan.labels)
    truth = np.isin(np.asarray(reference.dataobj), scan.target[1]) if reference.shape == image.shape else None
    record = json.loads((place / f"{scan.name}.json").read_text()) if (place / f"{scan.name}.json").exists() else {"requests": []}
    exact, voxels, scores = True, [], []
    files = sorted(place.glob(f"{scan.name}*.nii.gz"))
    for file in files:
        made = nibabel.load(file)
        exact &= made.shape == image.shape and bool((made.affine == image.affine).all())
    for request in record["requests"]:
        voxels.append(request.get("voxels"))
        file = place / f"{scan.name}__{request.get('id')}.nii.gz"
        if truth is not None and file.exists() and request.get("target_answered") in (scan.target[0], None):
            mask = np.asarray(nibabel.load(file).dataobj) > 0
            scores.append(2 * float((mask & truth).sum()) / max(1.0, float(mask.sum() + truth.sum())))
    statuses = [f"{r.get('target_answered') or '-'}: {r.get('status')}" for r in record["requests"]]
    return {"exact": exact and bool(files), "voxels": voxels, "requests": statuses, "dice": scores}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    dice = ", ".join(f"{score:.2f}" for score in row["dice"]) or "-"
    cells: Sequence[Any] = (
        row["scan"], row["backend"], row["exit"], "; ".join(row["requests"]), ", ".join(map(str, row["voxels"])),
        "yes" if row["exact"] else "NO", dice, f"{row['seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
