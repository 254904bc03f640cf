"""CT-ORG: six organs on CT (TCIA, Rister et al., Scientific Data 2020).

volume-N.nii.gz and labels-N.nii.gz, N from 0 to 139; 0 background, 1 liver, 2 urinary bladder, 3 lungs, 4 kidneys, 5 bones, 6
brain. 21 scans are the test set and 119 the training set (TCIA's page); both have labels.

Not verified: that the 21 are those numbered 0 to 20, as public code has it; the licence. Which scans are of one patient is not
published; most come from LiTS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from seerseg_data.converters.base import Converter, Labels, Part, SourceCase, missing_layout

TEST_SCANS = 21


class CTOrg(Converter):
    """Six organs."""

    name = "ct_org"
    title = "CT-ORG"
    dataset_name = "CTORG"
    licence = "as the collection's page states (CC BY 3.0; scans from LiTS keep theirs)"
    home = "https://www.cancerimagingarchive.net/collection/ct-org/"
    layout = """
    SOURCE/ (OrganSegmentations)                    any nesting
        volume-0.nii.gz ... volume-139.nii.gz       0 to 20 are the test set
        labels-0.nii.gz ... labels-139.nii.gz
    """
    channels = ("CT",)
    labels: ClassVar[Labels] = {"liver": 1, "urinary bladder": 2, "lungs": 3, "kidneys": 4, "bones": 5, "brain": 6}

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per volume-N.nii.gz, with its labels-N.nii.gz wherever that lies."""
        labels = {p.name: p for p in sorted(source.rglob("labels-*.nii.gz"))}
        found = False
        for image in sorted(source.rglob("volume-*.nii.gz")):
            matched = re.fullmatch(r"volume-(\d+)\.nii\.gz", image.name)
            if matched is None:
                continue
            found = True
            name = f"labels-{matched[1]}.nii.gz"
            part: Part = "Ts" if int(matched[1]) < TEST_SCANS else "Tr"
            yield SourceCase(f"ctorg_{int(matched[1]):03d}", (image,), (labels.get(name, image.with_name(name)),), part)
        if not found:
            raise missing_layout(self, source)
