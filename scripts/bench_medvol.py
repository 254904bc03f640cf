#!/usr/bin/env python
"""Answers with anchors: MedVol-R1's on real tumours, and what the combined protocol catches that its two parents cannot.

    python scripts/bench_medvol.py tumours OUT [--reasoner FOLDER_OF_A_TRAINED_MODEL ...]
        the two lung and two brain tumours of pyradiomics (seerseg_sample; --from PATH where the package lies elsewhere): the true key slice
        and boxes, written in MedVol-R1's grammar and read back by an episode, drawn by `grow`: Dice per tumour. Then what each given
        reasoner answers to the sample's requests.
    python scripts/bench_medvol.py combined OUT --raw DATASET --stored PREPROCESSED_DATASET --pair A B [--limit N]
        cases of the test split in which A and B are both labelled: scripted true and deliberately wrong replies, through SEER (a name),
        MedVol-R1 (boxes) and the combined protocol (both), with a backbone that takes words (nano) and one that takes boxes (grow).

Dice is against what was asked for. "Flagged": mask and anchor disagree, or the named side is not the anchor's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import load_splits, open_dataset
from seerseg.episode import Episode, Targets, solve
from seerseg.metrics.masks import dice
from seerseg.model import open_model
from seerseg.prompts import Box2D
from seerseg.protocols import load_protocol
from seerseg.protocols.base import KeySlice, Trace
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.store import open_case
from seerseg.views import CaseViews, render
from seerseg.volume import Mask, Volume, read_labels, read_volume

Bool = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tumours", "combined"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="given", type=Path, help="tumours: folder or package file that holds the scans")
    parser.add_argument(
        "--reasoner", action="append", default=[], help="tumours: folder of a model trained with medvol-r1; may be repeated"
    )
    parser.add_argument("--raw", type=Path, help="combined: raw dataset")
    parser.add_argument("--stored", type=Path, help="combined: its preprocessed folder")
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help="combined: two labels that could be taken for one another")
    parser.add_argument("--limit", type=int, help="combined: only so many cases")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (tumours if given.what == "tumours" else combined)(given)


def key_slice(mask: Bool, axis: int) -> KeySlice:
    """The slice of the largest area across an axis; a box for each part there (8 neighbours), the largest first."""
    from scipy.ndimage import find_objects, label

    index = int(mask.sum(axis=tuple(i for i in range(3) if i != axis)).argmax())
    plane = np.take(mask, index, axis)
    found, _ = label(plane, structure=np.ones((3, 3)))
    sizes = np.bincount(found.ravel())[1:]
    pieces = [find_objects(found)[number] for number in np.argsort(-sizes, kind="stable")]
    boxes = tuple(Box2D(axis, index, (rows.start, columns.start), (rows.stop, columns.stop)) for rows, columns in pieces)
    return KeySlice(axis, index, int(plane.sum()), boxes)


def reply(protocol: Any, views: CaseViews, name: str, slices: Sequence[KeySlice]) -> str:
    """The protocol's own words for a name and where it lies."""
    said: str = protocol.targets(Trace(evidence="As given.", rationale="As given.", answer=name, slices=tuple(slices)), views)[0]
    return said


# ------------------------------------------------------------------------------------------------------------------ tumours


def tumours(given: argparse.Namespace) -> None:
    """Prints and writes OUT/tumours.json."""
    protocol, grow = load_protocol("medvol-r1"), CachedSegmenter(load_segmenter("grow"))
    models = [open_model(Path(folder), segmenter=grow) for folder in given.reasoner]
    rows = []
    print("| tumour | mL | key slice | boxes | true answer: Dice | s |" + "".join(f" {Path(f).name} |" for f in given.reasoner))
    print("| --- " * (6 + len(models)) + "|")
    for case, volume, label, mask, requests in tumour_cases(given):
        views = render(volume, protocol.view_spec)
        key = key_slice(mask, protocol.view_spec.axis)
        began = time.time()
        told = ScriptedReasoner([reply(protocol, views, label, [key])])
        episode = solve(views, volume, [requests[0]], protocol=protocol, reasoner=told, segmenter=grow)[0]
        row: dict[str, Any] = {"case": case, "target": label, "ml": Mask(mask, volume.grid).volume_ml, "slice": key.index}
        row |= {"boxes": len(key.boxes), "dice": _dice(episode, mask), "seconds": round(time.time() - began, 1), "answers": {}}
        cells = []
        for folder, model in zip(given.reasoner, models, strict=True):
            shown = render(volume, model.view_spec)
            made = solve(shown, volume, requests, protocol=model.protocol, reasoner=model.reasoner, segmenter=grow, targets=model.targets)
            row["answers"][folder] = [answered(e, mask) for e in made]
            scores = [a["dice"] for a in row["answers"][folder]]
            read = sum(a["status"] != "fault" for a in row["answers"][folder])
            cells.append(f"Dice {np.mean(scores):.3f}, best {max(scores):.3f}, {read} of {len(scores)} read")
        rows.append(row)
        first = (case, f"{row['ml']:.1f}", str(key.index), str(len(key.boxes)), f"{row['dice']:.3f}", f"{row['seconds']:.1f}")
        print("| " + " | ".join((*first, *cells)) + " |", flush=True)
    (given.out / "tumours.json").write_text(json.dumps(rows, indent=1))
    print(f"Mean over {len(rows)} tumours with the true answer: {np.mean([r['dice'] for r in rows]):.3f}")


def tumour_cases(given: argparse.Namespace) -> Iterator[tuple[str, Volume, str, Bool, list[str]]]:
    """Case, scan, name of its tumour, mask, the texts that ask for it."""
    from seerseg_data.samples import KNOWN, make_sample

    for sample in ("lung_tumours", "brain_tumours"):
        folder = given.out / "raw" / KNOWN[sample].folder
        if not (folder / "dataset.json").exists():
            make_sample(sample, given.out / "raw", given=given.given)
        dataset = open_dataset(folder)
        for case in sorted({r.case for r in dataset.requests}):
            mine = [r for r in dataset.requests if r.case == case and r.target and len(r.target) == 1]
            label = next(name for r in mine for name in r.target or () if "tumour" in dataset.canonical(name))
            volume = read_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", modality="CT" if sample[:4] == "lung" else "MR", name=case)
            labels, _ = read_labels(folder / "labelsTr" / f"{case}.nii.gz", like=volume.grid)
            mask = np.isin(labels, dataset.labels[label])
            yield case, volume, dataset.canonical(label), mask, [r.text for r in mine if r.target == (label,)]


def answered(episode: Episode, mask: Bool) -> dict[str, Any]:
    """What a reasoner's answer came to: its slice and how its boxes overlap the tumour's on that slice."""
    boxes = [b for b in (episode.answer.prompt.boxes if episode.answer and episode.answer.prompt else ()) if isinstance(b, Box2D)]
    out = {"status": episode.status, "dice": _dice(episode, mask), "reply": episode.replies[-1] if episode.replies else ""}
    return out | {"slice": boxes[0].index if boxes else None, "touches": any(_touches(box, mask) for box in boxes)}


def _touches(box: Box2D, mask: Bool) -> bool:
    rows, columns = (slice(int(np.floor(a)), int(np.ceil(b))) for a, b in zip(box.lo, box.hi, strict=True))
    return bool(np.take(mask, box.index, box.axis)[rows, columns].any())


def _dice(episode: Episode, mask: Bool) -> float:
    return 0.0 if episode.mask is None else float(dice(episode.mask.array, mask) or 0.0)


# ----------------------------------------------------------------------------------------------------------------- combined


@dataclass(frozen=True)
class Said:
    """A reply about a request for A: the name that it says and what it boxes."""

    name: str
    names_a: bool
    boxes: str
    """ "a", "b", "moved" (A's, moved by its own width) or "slice" (A's, on a slice without A)"""


REPLIES = (
    Said("true", True, "a"),
    Said("name of the other, own boxes", False, "a"),
    Said("own name, boxes of the other", True, "b"),
    Said("name and boxes of the other", False, "b"),
    Said("own name, boxes moved by their width", True, "moved"),
    Said("own name, a slice without it", True, "slice"),
)


def combined(given: argparse.Namespace) -> None:
    """Prints and writes OUT/combined.md: for each way to answer, Dice and the share that is flagged."""
    dataset = open_dataset(given.raw)
    cases = list(load_splits(given.stored / "splits.json", dataset).test)[: given.limit]
    words, boxes = CachedSegmenter(load_segmenter("nano")), CachedSegmenter(load_segmenter("grow"))
    ways = {
        "seer, nano": (load_protocol("seer"), words),
        "medvol-r1, grow": (load_protocol("medvol-r1"), boxes),
        "seerseg, nano": (load_protocol("seerseg"), words),
        "seerseg, grow": (load_protocol("seerseg"), boxes),
    }
    names = {label: dataset.canonical(label) for label in given.pair}
    targets = Targets(tuple(dataset.canonical(label) for label in dataset.labels), closed=True)
    found: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    again: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        stored = open_case(given.stored, case)
        volume, held = stored.volume(0), stored.labels()
        if held is None:
            continue
        masks = {label: np.isin(held[0], dataset.labels[label]) for label in given.pair}
        if not all(mask.any() for mask in masks.values()):
            continue
        for a, b in (given.pair, given.pair[::-1]):
            for way, (protocol, segmenter) in ways.items():
                views = render(stored.channel(0), protocol.view_spec)
                replies = {said: written(said, protocol, views, (names[a], names[b]), (masks[a], masks[b])) for said in REPLIES}
                for said, text in replies.items():
                    ask = dict(protocol=protocol, segmenter=segmenter, targets=targets)
                    episode = solve(views, volume, [names[a]], reasoner=ScriptedReasoner([text]), **ask)[0]
                    found[way, said.name].append((_dice(episode, masks[a]), flagged(episode)))
                    if protocol.name != "seerseg":
                        continue
                    second = [text, replies[REPLIES[0]] if said is not REPLIES[0] else replies[REPLIES[3]]]
                    twice = solve(views, volume, [names[a]], reasoner=ScriptedReasoner(second), second_reading=True, **ask)[0]
                    again[f"{way}|{said.name}"].append((_dice(episode, masks[a]), _dice(twice, masks[a])))
    (given.out / "combined.md").write_text(table(found, again, ways, f"{dataset.name}, {' and '.join(given.pair)}"))
    print((given.out / "combined.md").read_text())


def written(said: Said, protocol: Any, views: CaseViews, names: tuple[str, str], masks: tuple[Bool, Bool]) -> str:
    """The reply in the protocol's own words."""
    axis = protocol.view_spec.axis
    key = key_slice(masks[said.boxes == "b"], axis)
    if said.boxes in ("moved", "slice"):
        key = elsewhere(key, masks[0], moved=said.boxes == "moved")
    return reply(protocol, views, names[not said.names_a], [key])


def elsewhere(key: KeySlice, mask: Bool, *, moved: bool) -> KeySlice:
    """The boxes moved by their width towards the farther edge of the slice, or on the slice nearest to theirs without the target (the
    farthest from it where it is on every slice)."""
    index = key.index
    if not moved:
        there = mask.any(axis=tuple(i for i in range(3) if i != key.axis))
        free = np.flatnonzero(~there)
        index = int(free[np.abs(free - index).argmin()]) if len(free) else (0 if index > len(there) // 2 else len(there) - 1)
    width = mask.shape[2 if key.axis != 2 else 1]
    boxes = []
    for box in key.boxes:
        step = box.hi[1] - box.lo[1] if moved else 0
        low = box.lo[1] + step if box.lo[1] + box.hi[1] < width else box.lo[1] - step
        low = min(max(low, 0), width - (box.hi[1] - box.lo[1]))
        boxes.append(Box2D(key.axis, index, (box.lo[0], low), (box.hi[0], low + box.hi[1] - box.lo[1])))
    return KeySlice(key.axis, index, key.area, tuple(boxes))


def flagged(episode: Episode) -> bool:
    """The episode says that something does not fit."""
    return episode.agreement is not None and episode.agreement.doubtful


def table(found: Any, again: Any, ways: Any, title: str) -> str:
    """Markdown: a row for each kind of reply, a column for each way; under it what a second reading gives."""
    count = len(next(iter(found.values())))
    lines = [f"{title}: {count} requests. Dice, and the share that is flagged.", "", "| reply | " + " | ".join(ways) + " |"]
    lines.append("| --- " * (1 + len(ways)) + "|")
    for said in REPLIES:
        cells = []
        for way in ways:
            rows = found[way, said.name]
            share = f", {np.mean([f for _, f in rows]):.2f} flagged" if way.startswith("seerseg") else ""
            cells.append(f"{np.mean([d for d, _ in rows]):.3f}{share}")
        lines.append(f"| {said.name} | " + " | ".join(cells) + " |")
    lines += ["", "Second reading (the first reply as named, the second true; where the first is true, the second is of the other):", ""]
    for key, pairs in again.items():
        way, _, name = key.partition("|")
        before, after = np.mean(pairs, axis=0)
        lines.append(f"- {way}, {name}: Dice {before:.3f} to {after:.3f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
