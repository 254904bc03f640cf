"""BrainMetShare: brain metastases on MR, Stanford AIMI.

Two releases exist. The first holds PNG slices: folder 0 is T1 gradient echo after contrast, 1 T1 spin echo before, 2 T1 spin echo
after, 3 T2 FLAIR, seg the mask (0, 255); voxels of 0.94 x 0.94 x 1 mm (seen in public code that reads it, among it the nnU-Net
conversion of MultiTalent). The second, BrainMetShare-3, holds NIfTI: bravo, t1_pre, t1_gd, flair, seg (seen in public code that
trains on it). In both the case folders are named Mets_NNN, one patient each, and the test set has no masks.

Not verified: that PNG slices are in radiological display order with slice numbers rising towards the head. A PNG says neither, so
they are written with laterality "assumed". The wording of the licence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np

from seerseg.errors import ImageError
from seerseg.volume import Volume, read_labels, read_volume, unplaced_source
from seerseg_data.converters.base import CaseContent, Converter, Labels, SourceCase, missing_layout

NIFTI_NAMES = ("bravo", "t1_pre", "t1_gd", "flair")
PNG_NAMES = ("0", "1", "2", "3")
PNG_SPACING_ZYX_MM = (1.0, 0.94, 0.94)


class BrainMetShare(Converter):
    """Four sequences, one label."""

    name = "brainmetshare"
    title = "BrainMetShare"
    dataset_name = "BrainMetShare"
    licence = "Stanford University Dataset Research Use Agreement (research only, no redistribution)"
    home = "https://aimi.stanford.edu/brainmetshare"
    layout = """
    SOURCE/                                         the release of PNG slices
        mets_stanford_releaseMask_train/Mets_005/{0,1,2,3,seg}/*.png
        mets_stanford_releaseMask_test/Mets_010/{0,1,2,3}/*.png
    SOURCE/                                         or BrainMetShare-3
        train/Mets_005/{bravo,t1_pre,t1_gd,flair,seg}.nii.gz
        test/Mets_010/{bravo,t1_pre,t1_gd,flair}.nii.gz
    """
    channels = ("T1 gradient echo contrast", "T1 spin echo", "T1 spin echo contrast", "T2 FLAIR")
    labels: ClassVar[Labels] = {"brain metastasis": 1}

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per folder Mets_NNN, at any depth."""
        folders = sorted(p for p in source.rglob("Mets_*") if p.is_dir())
        if not folders:
            raise missing_layout(self, source)
        for folder in folders:
            png = (folder / "0").is_dir()
            images = tuple(folder / n for n in PNG_NAMES) if png else tuple(folder / f"{n}.nii.gz" for n in NIFTI_NAMES)
            label = folder / ("seg" if png else "seg.nii.gz")
            test = not label.exists() and "test" in folder.parent.name.lower()
            yield SourceCase(folder.name, images, () if test else (label,), "Ts" if test else "Tr", subject=folder.name)

    def read(self, case: SourceCase) -> CaseContent:
        """Slices are stacked; any value above 0 is metastasis."""
        if case.images[0].is_dir():
            stacks = [_stack(folder) for folder in (*case.images, *case.labels)]
            if len({stack.shape for stack in stacks}) > 1:
                raise ImageError(f"Case {case.id}: its sequences have stacks of different sizes. Get the case again.")
            grid, place = unplaced_source(stacks[0].shape, PNG_SPACING_ZYX_MM)
            volumes = tuple(Volume(stack, grid, "MR", i, place, case.id) for i, stack in enumerate(stacks[: len(case.images)]))
            mask = (stacks[-1] > 0).astype(np.uint8) if case.labels else None
            return CaseContent(volumes, mask, notes=("slices say neither side nor position: laterality is assumed",))
        mask = None
        if case.labels:
            mask = (self.label_array(case.labels[0], case.images[0]) > 0).astype(np.uint8)
        return CaseContent(case.images, mask)


def _stack(folder: Path) -> np.ndarray:
    """PNG slices, ordered by the number they are named with, as canonical int16 (Z, Y, X)."""
    files = sorted((p for p in folder.glob("*.png") if p.stem.isdigit()), key=lambda p: int(p.stem))
    if not files:
        raise ImageError(f"{folder} holds no slices named 0.png, 1.png and so on. Complete the source or take the case away.")
    reader = read_labels if folder.name == "seg" else lambda path: (read_volume(path).array,)
    slices = [reader(path)[0][0] for path in files]
    if len({part.shape for part in slices}) > 1:
        raise ImageError(f"{folder} holds slices of different sizes. Get the case again.")
    return np.stack(slices).astype(np.int16)
