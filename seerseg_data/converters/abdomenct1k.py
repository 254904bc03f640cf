"""AbdomenCT-1K: four organs on CT (Ma et al., TPAMI 2021).

Zenodo records 5903099, 5903846 and 5903769: three folders of images Case_NNNNN_0000.nii.gz (unpacking may nest them once more) and
one folder Mask with Case_NNNNN.nii.gz; 1 liver, 2 kidneys, 3 spleen, 4 pancreas (as public code reads it). The scans come from
LiTS, KiTS, the Decathlon and NIH Pancreas-CT: a case here may be a case of those datasets too. Masks are a mix of manual ones and
ones of models that were checked.

Not verified: the licence of the records.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from seerseg_data.converters.base import Converter, Labels, SourceCase, missing_layout


class AbdomenCT1K(Converter):
    """Four organs."""

    name = "abdomenct1k"
    title = "AbdomenCT-1K"
    dataset_name = "AbdomenCT1K"
    licence = "as the Zenodo records state; the scans keep the licences of their own sources"
    home = "https://github.com/JunMa11/AbdomenCT-1K"
    layout = """
    SOURCE/
        AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz      and ImagePart2, ImagePart3
        Mask/Case_00001.nii.gz
    """
    channels = ("CT",)
    labels: ClassVar[Labels] = {"liver": 1, "kidneys": 2, "spleen": 3, "pancreas": 4}

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per mask: a few images are published without."""
        images = {p.name.removesuffix("_0000.nii.gz"): p for p in sorted(source.rglob("Case_*_0000.nii.gz"))}
        masks = {p.name.removesuffix(".nii.gz"): p for p in sorted(source.rglob("Case_*.nii.gz")) if p.parent.name == "Mask"}
        if not images or not masks:
            raise missing_layout(self, source)
        for case, mask in masks.items():
            yield SourceCase(case, (images.get(case, source / f"{case}_0000.nii.gz"),), (mask,))
