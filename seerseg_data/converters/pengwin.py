"""PENGWIN task 1: pelvic bone fragments on CT (MICCAI 2024).

Layout and values as public code reads them and as the challenge states: images in two parts, one label folder, .mha; 1 to 10 are
fragments of the sacrum (1 the main one), 11 to 20 of the left hip bone, 21 to 30 of the right hip bone. The values are kept, so
fragments stay apart; the labels are the three bones. One scan per patient.

Not verified: the licence (a mirror of Zenodo record 10927452 says CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from seerseg_data.converters.base import Converter, Facts, Labels, SourceCase, missing_layout


class Pengwin(Converter):
    """Three bones, each of up to ten fragments."""

    name = "pengwin"
    title = "PENGWIN task 1 (CT)"
    dataset_name = "PENGWIN"
    licence = "CC BY 4.0 according to a mirror of Zenodo record 10927452; read the record"
    home = "https://pengwin.grand-challenge.org"
    layout = """
    SOURCE/
        PENGWIN_CT_train_images_part1/001.mha       and _part2, or both in PENGWIN_CT_train_images
        PENGWIN_CT_train_labels/001.mha
    """
    channels = ("CT",)
    labels: ClassVar[Labels] = {
        "sacrum": tuple(range(1, 11)),
        "left hip bone": tuple(range(11, 21)),
        "right hip bone": tuple(range(21, 31)),
    }

    def facts(self, source: Path) -> Facts:
        """Regions need an order for nnU-Net."""
        return Facts(self.channels, dict(self.labels), extra={"regions_class_order": [1, 11, 21]})

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per .mha in the image folders, at any depth."""
        images = sorted(p for p in source.rglob("*.mha") if p.parent.name.startswith("PENGWIN_CT_train_images") and p.name[0] != ".")
        if not images:
            raise missing_layout(self, source)
        for image in images:
            label = image.parent.parent / "PENGWIN_CT_train_labels" / image.name
            yield SourceCase(f"pengwin_{image.stem}", (image,), (label,), subject=image.stem)
