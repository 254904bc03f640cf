"""KiTS23: kidneys, kidney tumours and cysts on CT (Heller et al. 2023), with questions that name no label.

case_NNNNN/imaging.nii.gz and segmentation.nii.gz, with 1 kidney, 2 tumour, 3 cyst (github.com/neheller/kits23,
kits23/configuration/labels.py). Files are stored with the slice axis first; the position comes from the affine, as always.
One case is one patient.

Not verified on the images themselves: the order of their axes (tests use slices first: I, P, L). Nothing depends on it.

The published values say nothing of single lesions, and a question such as "the largest cyst" has no label there. So the label
map that is written numbers lesions anew: connected components (26 neighbours) of tumour and of cyst, each of at least 0.05 mL, by
falling volume. 1 stays kidney; 2, 3 and 4 are the largest, second and third largest tumour, 5 all further tumour; 6, 7, 8 and 9
the same of cysts. "kidney tumour" is 2 to 5, "kidney cyst" 6 to 9: their unions are the published masks, voxel by voxel.

A question is asked only where its answer is beyond doubt: largest and smallest where volumes differ by a tenth, highest and lowest
where centres and ends differ by 5 mm, a side where two separate kidneys lie 30 mm apart, right being greater world x. Sides without
a lesion are asked too, with an absent target. Every question comes in three wordings, one per language split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import Request
from seerseg.errors import DatasetError
from seerseg.volume import Grid, read_grid
from seerseg_data.converters.base import CaseContent, Converter, Labels, SourceCase, ask, missing_layout

SMALLEST_ML = 0.05
KINDS = (("kidney tumour", "tumour", 2, 2), ("kidney cyst", "cyst", 3, 6))
"""(label, word, published value, first value written)"""
RANKS = ("largest", "second largest", "third largest")
SPLITS = ("train", "val", "test")

WORDINGS: dict[str, tuple[str, str, str]] = {
    "largest": (
        "the largest {kind} of the kidneys",
        "which {kind} is the biggest? outline it",
        "renal {kind} of the greatest volume, please",
    ),
    "smallest": ("the smallest {kind} of the kidneys", "outline the tiniest {kind} you find", "renal {kind} of the least volume, please"),
    "highest": ("the {kind} nearest to the head", "the uppermost renal {kind}", "contour whichever {kind} lies most cranially"),
    "lowest": ("the {kind} nearest to the feet", "the lowermost renal {kind}", "contour whichever {kind} lies most caudally"),
    "left": ("every {kind} of the left kidney", "left-sided renal {kind}: all of it", "all that is {kind} on the patient's left"),
    "right": ("every {kind} of the right kidney", "right-sided renal {kind}: all of it", "all that is {kind} on the patient's right"),
    "all": ("everything in the kidneys that is not normal tissue", "any focal renal lesion", "mark all renal masses, solid or cystic"),
}
STYLES = {"largest": "implicit_size", "smallest": "implicit_size", "left": "implicit_side", "right": "implicit_side"}


@dataclass(frozen=True)
class Lesion:
    """One component. label: its own label, None among the "further" ones; z_mm: lowest, mean and highest; side: None if unsure."""

    label: str | None
    volume_ml: float
    z_mm: tuple[float, float, float]
    side: str | None


class KiTS23(Converter):
    """Kidneys, and lesions one by one."""

    name = "kits23"
    title = "KiTS23"
    dataset_name = "KiTS23"
    licence = "CC BY-NC-SA"
    home = "https://github.com/neheller/kits23"
    layout = """
    SOURCE/ (kits23/dataset)                        after kits23_download_data
        case_00000/imaging.nii.gz
        case_00000/segmentation.nii.gz
    """
    channels = ("CT",)
    labels: ClassVar[Labels] = {
        "kidneys": 1,
        **{label: tuple(range(first, first + 4)) for label, _, _, first in KINDS},
        **{f"{rank} {label}": first + i for label, _, _, first in KINDS for i, rank in enumerate(RANKS)},
        **{f"further {label}s": first + 3 for label, _, _, first in KINDS},
    }

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per folder case_NNNNN that holds an image."""
        folders = sorted(p.parent for p in source.rglob("imaging.nii.gz") if p.parent.name.startswith("case_"))
        if not folders:
            raise missing_layout(self, source)
        for folder in folders:
            yield SourceCase(folder.name, (folder / "imaging.nii.gz",), (folder / "segmentation.nii.gz",), subject=folder.name)

    def read(self, case: SourceCase) -> CaseContent:
        """Number the lesions and ask about them."""
        published = self.label_array(case.labels[0], case.images[0])
        odd = set(np.unique(published).tolist()) - {0, 1, 2, 3}
        if odd:
            raise DatasetError(
                f"Case {case.id}: the label holds the value {min(odd)}; KiTS23 has 1 kidney, 2 tumour, 3 cyst. Mend the label."
            )
        grid = read_grid(case.images[0])[0]
        label = (published == 1).astype(np.uint8)
        sides = _sides(published > 0, grid)
        requests: list[Request] = []
        found: list[Lesion] = []
        for name, word, value, first in KINDS:
            lesions = _number(published == value, grid, name, first, sides, label)
            found += lesions
            requests += self._questions(case.id, name, word, lesions, sides is not None)
        if found:
            targets = [name for name, *_ in KINDS if any(lesion.label and lesion.label.endswith(name) for lesion in found)]
            if targets and all(np.isin(label, self.labels[name]).any() == (name in targets) for name, *_ in KINDS):
                requests += [ask(self, case.id, f"all_{s}", text, targets, "implicit", s) for s, text in _texts("all", "")]
        return CaseContent(case.images, label, tuple(requests))

    def _questions(self, case: str, name: str, word: str, lesions: Sequence[Lesion], sided: bool) -> Iterator[Request]:
        named = [lesion for lesion in lesions if lesion.label]
        answers: dict[str, list[str] | None] = {}
        if named:
            by_volume = sorted(lesions, key=lambda lesion: -lesion.volume_ml)
            if len(lesions) > 1 and by_volume[0].volume_ml > 1.1 * by_volume[1].volume_ml:
                answers["largest"] = [str(by_volume[0].label)]
            if len(lesions) > 1 and by_volume[-1].label and 1.1 * by_volume[-1].volume_ml < by_volume[-2].volume_ml:
                answers["smallest"] = [by_volume[-1].label]
            for key, sign in (("highest", 1.0), ("lowest", -1.0)):
                top = _first(lesions, sign)
                if top is not None and top.label:
                    answers[key] = [top.label]
        for side in ("left", "right") if sided else ():
            there = [lesion for lesion in lesions if lesion.side == side]
            if all(lesion.side for lesion in lesions) and all(lesion.label for lesion in there):
                answers[side] = [str(lesion.label) for lesion in there] or None
        for key, target in answers.items():
            for split, text in _texts(key, word):
                style = (
                    "implicit_side" if key in ("left", "right") else "implicit_size" if key in ("largest", "smallest") else "implicit_place"
                )
                yield ask(self, case, f"{word}_{key}_{split}", text, target, style, split)


def _texts(key: str, word: str) -> list[tuple[str, str]]:
    return [(split, text.format(kind=word)) for split, text in zip(SPLITS, WORDINGS[key], strict=True)]


def _first(lesions: Sequence[Lesion], sign: float) -> Lesion | None:
    """The highest (sign 1) or lowest (-1) lesion where both its centre and its end lie 5 mm beyond the others'."""
    if len(lesions) < 2:
        return None
    end = 2 if sign > 0 else 0
    ordered = sorted(lesions, key=lambda lesion: -sign * lesion.z_mm[1])
    best, rest = ordered[0], ordered[1:]
    clear = all(sign * (best.z_mm[1] - o.z_mm[1]) > 5 and sign * (best.z_mm[end] - o.z_mm[end]) > 5 for o in rest)
    return best if clear else None


def _components(mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Components (26 neighbours) and how many voxels each has, from component 1 on."""
    from scipy import ndimage

    numbered, count = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=bool))
    return numbered, np.bincount(numbered.reshape(-1), minlength=count + 1)[1:]


def _sides(mask: NDArray[Any], grid: Grid) -> NDArray[Any] | None:
    """1 where a kidney with its lesions lies on the left, 2 on the right, 0 elsewhere; None where two cannot be told apart."""
    numbered, sizes = _components(mask)
    if len(sizes) < 2:
        return None
    first, second = (int(i) + 1 for i in np.argsort(-sizes, kind="stable")[:2])
    if sizes[second - 1] < 0.1 * sizes[first - 1]:
        return None
    x_mm = [float(grid.to_world(np.argwhere(numbered == n).mean(axis=0))[0]) for n in (first, second)]
    if abs(x_mm[0] - x_mm[1]) < 30:
        return None
    right = first if x_mm[0] > x_mm[1] else second
    table = np.zeros(len(sizes) + 1, dtype=np.uint8)
    table[[first, second]] = 1
    table[right] = 2
    return np.asarray(table[numbered])


def _number(mask: NDArray[Any], grid: Grid, name: str, first: int, sides: NDArray[Any] | None, label: NDArray[Any]) -> list[Lesion]:
    """Paint the lesions of one kind into `label`; those of at least SMALLEST_ML, largest first."""
    numbered, sizes = _components(mask)
    label[mask] = first + 3
    lesions: list[Lesion] = []
    for rank, index in enumerate(np.argsort(-sizes, kind="stable")):
        volume_ml = float(sizes[index]) * grid.voxel_volume_mm3 / 1000
        if volume_ml < SMALLEST_ML:
            break
        voxels = np.argwhere(numbered == index + 1)
        z_mm = grid.to_world(voxels)[:, 2]
        side = None
        if sides is not None:
            values = set(np.unique(sides[tuple(voxels.T)]).tolist())
            side = {1: "left", 2: "right"}.get(values.pop()) if len(values) == 1 else None
        own = f"{RANKS[rank]} {name}" if rank < len(RANKS) else None
        if own:
            label[tuple(voxels.T)] = first + rank
        lesions.append(Lesion(own, volume_ml, (float(z_mm.min()), float(z_mm.mean()), float(z_mm.max())), side))
    return lesions
