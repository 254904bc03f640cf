#!/usr/bin/env python
"""The simulated expert with the nano segmenter: Dice after each of five turns, beside the text prompt's.

    python scripts/bench_nano_clicks.py hippocampus --data DATA/mr_hippocampus [--split test] [--weights FOLDER]
    python scripts/bench_nano_clicks.py chest --cache CACHE          CT chest of slicerio (bench_nano_segmenter.py fetch)
    python scripts/bench_nano_clicks.py torso --data DATA/ct_torso   learnt from: no test
    python scripts/bench_nano_clicks.py phantom                      seeds that training never drew

A run may be parted (`--part 0 --parts 3`, each with its `--rows FILE`); `--read FILE ...` prints the table of such files.

`box, clicks`: the target's box on its largest axial slice (--plane: another; edges jittered by 4 % of its side), then four clicks, each at
the deepest point of the largest error; every click is kept, whether it helped or not. `words, clicks`: the words first, then four clicks;
`words and box, clicks`: both at once, then four clicks. A row is one structure; intervals are 95 %, by bootstrap over subjects. `last less
words` is the last turn less the words alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from seerseg.metrics import bootstrap_interval, dice
from seerseg.prompts import Point, Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.volume import Grid, Volume, read_labels, read_segmentation_names, read_volume
from seerseg_data.trajectories import Expert, demonstrate, error_points

ROOT = Path(__file__).resolve().parents[1]
Bool = NDArray[np.bool_]
TURNS = 5
PLANES = ("axial", "coronal", "sagittal")
"""By the array axis that they lie across."""
Case = tuple[str, str, str, Volume, Bool]
"""Subject, case, words, scan, target."""


def hippocampus(options: argparse.Namespace) -> Iterator[Case]:
    """Both parts, of the split's cases."""
    split = json.loads((ROOT / "seerseg_data" / "splits" / "hippocampus.json").read_text())
    cases = split["test"] if options.split == "test" else split["folds"][0][options.split]
    for case in cases[: options.cases]:
        volume = read_volume(options.data / "imagesTr" / f"{case}_0000.nii.gz", modality="MR")
        labels, _ = read_labels(options.data / "labelsTr" / f"{case}.nii.gz", like=volume.grid)
        subject = str((int(case.rpartition("_")[2]) + 1) // 2)  # cases 2k - 1 and 2k are one person
        yield subject, case, "anterior hippocampus", volume, labels == 1
        yield subject, case, "posterior hippocampus", volume, labels == 2


def chest(options: argparse.Namespace) -> Iterator[Case]:
    """Structures of slicerio's CT chest."""
    folder = options.cache / "slicerio" / "slicerio" / "data"
    volume = read_volume(folder / "CTChest4.nrrd", modality="CT")
    labels, _ = read_labels(folder / "Segmentation.seg.nrrd", like=volume.grid)
    names = {name.lower(): value for value, name in read_segmentation_names(folder / "Segmentation.seg.nrrd").items()}
    for name in options.structures or ("left lung", "thoracic vertebral column"):
        yield "slicerio", "CTChest4", name, volume, labels == names[name]


def torso(options: argparse.Namespace) -> Iterator[Case]:
    """Some organs of the CT that training saw."""
    volume = read_volume(options.data / "image.nii.gz", modality="CT")
    labels, _ = read_labels(options.data / "label.nii.gz", like=volume.grid)
    table = json.loads((options.data / "labels.json").read_text())["labels"]
    values = {entry["name"].replace("_", " "): int(value) for value, entry in table.items()}
    for name in options.structures or ("liver", "aorta"):
        yield "torso", "torso", name, volume, labels == values[name]


def phantoms(options: argparse.Namespace) -> Iterator[Case]:
    """Chests and abdomens at 3 x 2 x 2 mm."""
    from seerseg_data.phantoms import phantom

    for kind, names in (("chest", ("heart", "left lung")), ("abdomen", ("liver", "left kidney"))):
        for seed in range(5000, 5000 + min(options.cases, 3)):
            drawn = phantom(kind, seed, spacing_zyx_mm=(3.0, 2.0, 2.0))
            volume = Volume(drawn.array_zyx, Grid(drawn.array_zyx.shape, drawn.affine), "CT")
            for name in options.structures or names:
                yield f"{kind} {seed}", f"{kind} {seed}", name, volume, drawn.mask(name)


Boxes = tuple[Any, ...]


def from_box(segmenter: Segmenter, volume: Volume, truth: Bool, seed: int, imperfect: float, axis: int) -> tuple[list[float], Boxes]:
    """Dice after each turn, and the box that was given; a user who is content stays so."""
    expert = Expert(imperfect=imperfect, most_prompts=TURNS, least_gain=-1.0, tries=1)
    shown = demonstrate(volume, truth, segmenter, axis=axis, rng=np.random.default_rng(seed), expert=expert)
    row = [turn.dice for turn in shown.turns if turn.prompt is not None]
    given = next((turn.prompt.boxes for turn in shown.turns if turn.prompt is not None), ())
    return [*row, *[row[-1]] * (TURNS - len(row))] if row else [0.0] * TURNS, given


def from_words(segmenter: Segmenter, volume: Volume, truth: Bool, words: str, turns: int = TURNS, boxes: Boxes = ()) -> list[float]:
    """The words, with boxes where there are any, then clicks up to so many turns, also where the words found nothing."""
    session = segmenter.session(volume)
    found = session.add(Prompt(text=words, boxes=boxes)).mask
    assert found is not None
    row = [dice(found.array, truth) or 0.0]
    while len(row) < turns:
        errors = error_points(found.array, truth, volume.grid.spacing_zyx)
        if not errors:
            break
        (z, y, x), positive = errors[0]
        made = session.add(Prompt(points=(Point((float(z), float(y), float(x)), positive),)))
        found = made.mask if made.mask is not None else found
        row.append(dice(found.array, truth) or 0.0)
    session.close()
    return [*row, *[row[-1]] * (turns - len(row))]


def summary(rows: dict[str, list[list[float]]]) -> list[str]:
    """Per column the mean over all rows with its interval, as text. rows: per subject."""
    table = np.concatenate([np.array(v) for v in rows.values()])
    cells = []
    for column in range(table.shape[1]):
        interval = bootstrap_interval({subject: [row[column] for row in values] for subject, values in rows.items()})
        mean = f"{table[:, column].mean():.3f}"
        cells.append(mean if interval is None else f"{mean} ({interval.lo:.3f} to {interval.hi:.3f})")
    return cells


@dataclass(frozen=True)
class Line:
    """One structure of one case: Dice after each turn, from a box, from the words, from both (None where words are not taken)."""

    subject: str
    case: str
    words: str
    boxed: list[float]
    worded: list[float] | None
    cpu_s: float
    """Of the five turns from a box, the expert's own work included."""
    both: list[float] | None = None


def measure(segmenter: Segmenter, cases: Iterator[Case], options: argparse.Namespace) -> Iterator[Line]:
    """One line per structure of every case of this part."""
    for number, (subject, case, words, volume, truth) in enumerate(cases):
        if number // 2 % options.parts != options.part:
            continue
        started = time.process_time()
        boxed, boxes = from_box(segmenter, volume, truth, number, options.imperfect, PLANES.index(options.plane))
        spent = time.process_time() - started
        able = segmenter.capabilities.text != "none" and not options.no_words
        line = Line(
            subject,
            case,
            words,
            boxed,
            from_words(segmenter, volume, truth, words, 1 if options.words_once else TURNS) if able else None,
            spent,
            from_words(segmenter, volume, truth, words, boxes=boxes) if able and boxes else None,
        )
        ways = {"box": line.boxed, "words": line.worded, "words and box": line.both}
        print(f"{case} {words}: " + "; ".join(f"{way} {shown(row)}" for way, row in ways.items() if row), flush=True)
        yield line


def shown(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def report(lines: list[Line]) -> None:
    """The table."""
    rows: dict[tuple[str, str], dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        first = line.worded[0] if line.worded else float("nan")
        rows[line.words, "box, clicks"][line.subject].append([*line.boxed, line.boxed[-1] - line.boxed[0], line.boxed[-1] - first])
        if line.worded and len(line.worded) == TURNS:
            rows[line.words, "words, clicks"][line.subject].append([*line.worded, line.worded[-1] - first, line.worded[-1] - first])
        if line.both:
            rows[line.words, "words and box, clicks"][line.subject].append(
                [*line.both, line.both[-1] - line.both[0], line.both[-1] - first]
            )
    heads = ["structure", "prompts", "n of subjects", *(f"turn {k + 1}" for k in range(TURNS)), "last less first", "last less words"]
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for (words, way), by_subject in sorted(rows.items()):
        count = sum(len(v) for v in by_subject.values())
        print(f"| {words} | {way} | {count} of {len(by_subject)} | " + " | ".join(summary(by_subject)) + " |")
    print(f"\n{sum(line.cpu_s for line in lines) / max(1, TURNS * len(lines)):.2f} s of CPU a turn (box, clicks)")


def main() -> None:
    """Measure, or read what was measured; then one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("hippocampus", "chest", "torso", "phantom"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--segmenter", default="nano", help="any with sessions, boxes and points; words only where it takes them")
    parser.add_argument("--weights", type=Path, help="a folder of nano weights")
    parser.add_argument("--split", choices=("train", "val", "bank", "test"), default="test")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--structures", nargs="*")
    parser.add_argument("--imperfect", type=float, default=0.0, help="share of deliberately bad first boxes")
    parser.add_argument("--plane", choices=PLANES, default="axial", help="of the first box")
    parser.add_argument("--no_words", action="store_true", help="from a box alone")
    parser.add_argument("--words_once", action="store_true", help="after words without a box no clicks")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="write what was measured there, a JSON object a line")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing; the table of such files")
    options = parser.parse_args()
    if options.read:
        report([Line(**json.loads(line)) for path in options.read for line in path.read_text().splitlines()])
        return
    torch.set_num_threads(1)
    segmenter = load_segmenter(f"{options.segmenter}:{options.weights}" if options.weights else options.segmenter)
    print(f"{segmenter.card.identity}; {options.set} {options.split if options.set == 'hippocampus' else ''}")
    source = {"hippocampus": hippocampus, "chest": chest, "torso": torso, "phantom": phantoms}[options.set]
    lines = []
    for line in measure(segmenter, source(options), options):
        lines.append(line)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(line)) + "\n")
    report(lines)


if __name__ == "__main__":
    main()
