"""TotalSegmentator's dataset: CT (v2, 117 structures) and MR (50 structures), one mask file per structure.

Zenodo 10047292 (CT v2.0.1), 11367005 and 14710732 (MR): sNNNN/ct.nii.gz or mri.nii.gz, sNNNN/segmentations/<structure>.nii.gz,
meta.csv (semicolons, UTF-8 with a byte order mark, columns image_id and split among others); seen in public code that reads
them. The structure's file name is its label. One folder is one subject.

Masks are binary and made to exclude each other, yet some overlap by voxels. Rule: where two meet, the structure with fewer voxels
in that scan has the voxel, as SeerSeg's own label maps have it; how many voxels that were is noted with the case.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seerseg.volume import read_grid
from seerseg_data.converters.base import CaseContent, Converter, Facts, SourceCase, missing_layout


class TotalSegmentator(Converter):
    """As many labels as there are structure names in the source, numbered in alphabetical order."""

    name = "totalsegmentator"
    title = "the TotalSegmentator dataset"
    dataset_name = "TotalSegmentator"
    licence = "CC BY 4.0 (CT); the MR records state CC BY-NC-SA 2.0 or CC BY 4.0, by version"
    home = "https://github.com/wasserth/TotalSegmentator"
    layout = """
    SOURCE/                                         Totalsegmentator_dataset_v201 or TotalsegmentatorMRI_dataset_v200
        meta.csv                                    image_id;...;split;...
        s0000/ct.nii.gz  or  s0000/mri.nii.gz
        s0000/segmentations/spleen.nii.gz  kidney_left.nii.gz  ...
    """

    def facts(self, source: Path) -> Facts:
        """Labels from the file names; one modality."""
        scans = _scans(source)
        names = sorted({p.name.removesuffix(".nii.gz") for scan in scans for p in _masks(scan)})
        modalities = {scan.name for scan in scans}
        if not names or len(modalities) != 1:
            raise missing_layout(self, source)
        labels: dict[str, int | tuple[int, ...]] = {name: value for value, name in enumerate(names, start=1)}
        return Facts(("CT",) if modalities == {"ct.nii.gz"} else ("MR",), labels)

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per folder sNNNN; those that meta.csv calls test become imagesTs."""
        splits = _splits(source / "meta.csv")
        numbers = self.facts(source).labels
        for scan in _scans(source):
            name = scan.parent.name
            masks = tuple(_masks(scan)) or (scan.parent / "segmentations" / "*.nii.gz",)
            values = tuple(numbers.get(p.name.removesuffix(".nii.gz"), 0) for p in masks)
            yield SourceCase(name, (scan,), masks, "Ts" if splits.get(name) == "test" else "Tr", subject=name, note=values)

    def read(self, case: SourceCase) -> CaseContent:
        """Largest structures are painted first, so that the smaller one stays where two meet."""
        from scipy import ndimage

        found: list[tuple[int, int, tuple[slice, ...], NDArray[np.bool_]]] = []
        shape = read_grid(case.images[0])[0].shape_zyx
        for path, value in zip(case.labels, case.note, strict=True):
            mask = self.label_array(path, case.images[0]) > 0
            boxes = ndimage.find_objects(mask.view(np.uint8))
            if boxes:  # only what lies in its box is kept: a hundred whole masks would not fit into memory
                found.append((int(np.count_nonzero(mask)), value, boxes[0], mask[boxes[0]].copy()))
        label = np.zeros(shape, dtype=np.uint8 if max(case.note) < 256 else np.uint16)
        overlap = 0
        for _, value, box, mask in sorted(found, key=lambda item: (-item[0], item[1])):
            overlap += int(np.count_nonzero(label[box][mask]))
            label[box][mask] = value
        notes = (f"{overlap} voxels were of two structures and were given to the smaller one",) if overlap else ()
        return CaseContent(case.images, label, notes=notes)


def _scans(source: Path) -> list[Path]:
    return sorted(p for name in ("ct.nii.gz", "mri.nii.gz") for p in source.glob(f"s[0-9]*/{name}"))


def _masks(scan: Path) -> list[Path]:
    return sorted(p for p in (scan.parent / "segmentations").glob("*.nii.gz") if not p.name.startswith("."))


def _splits(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        return {row.get("image_id", "").strip(): row.get("split", "").strip() for row in csv.DictReader(file, delimiter=";")}
