"""Medical Segmentation Decathlon, any task (Antonelli et al. 2022): Task01_BrainTumour to Task10_Colon.

A task's dataset.json lists "modality" {"0": "FLAIR", ...}, "labels" {"0": "background", ...}, "training" [{"image", "label"}] and
"test"; images of several sequences are one 4D NIfTI file, which becomes one file per channel. Files that begin with "._" are
leftovers of macOS and no images. Layout as nnU-Net's own converter of the Decathlon takes it.

Subjects: in task 4, cases 2k-1 and 2k are the two hippocampi of one person. In the other tasks the files name none, so each
case is its own; task 1 holds several scans of some patients without saying which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seerseg.errors import DatasetError
from seerseg.paths import read_json
from seerseg.volume import read_channels
from seerseg_data.converters.base import CaseContent, Converter, Facts, SourceCase, missing_layout

CANONICAL: dict[int, dict[str, str]] = {
    1: {"edema": "peritumoural oedema", "non-enhancing tumor": "non-enhancing tumour core", "enhancing tumour": "enhancing tumour"},
    2: {"left atrium": "heart left atrium"},
    3: {"cancer": "liver tumour"},
    4: {"Anterior": "anterior hippocampus", "Posterior": "posterior hippocampus"},
    5: {"PZ": "prostate peripheral zone", "TZ": "prostate transition zone"},
    6: {"cancer": "lung tumour"},
    7: {"cancer": "pancreas tumour"},
    8: {"Vessel": "liver vessels", "Tumour": "liver tumour"},
    10: {"colon cancer primaries": "colon cancer"},
}
"""Task -> its label names, where they need a whole name of anatomy."""


class Decathlon(Converter):
    """The folder of one task."""

    name = "msd"
    title = "a task of the Medical Segmentation Decathlon"
    dataset_name = "Decathlon"
    licence = "CC BY-SA 4.0"
    home = "http://medicaldecathlon.com"
    layout = """
    SOURCE/ (Task03_Liver)                          the folder of one task
        dataset.json
        imagesTr/liver_0.nii.gz  labelsTr/liver_0.nii.gz  imagesTs/liver_132.nii.gz
    """

    def facts(self, source: Path) -> Facts:
        """Channels and labels as the task's dataset.json has them."""
        listed = self._listed(source)
        channels = [listed["modality"][key] for key in sorted(listed["modality"], key=int)]
        if len(channels) == 1 and channels[0].upper() == "MRI":
            channels = ["MR"]
        labels: dict[str, int | tuple[int, ...]] = {
            name: int(value) for value, name in sorted(listed["labels"].items(), key=lambda item: int(item[0])) if int(value)
        }
        task = re.match(r"Task(\d+)", source.resolve().name)
        canonical = CANONICAL.get(int(task[1]), {}) if task else {}
        return Facts(tuple(channels), labels, dict(canonical), {"description": str(listed.get("name", ""))})

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """As dataset.json lists them."""
        listed = self._listed(source)
        for entry in listed["training"]:
            image = source / entry["image"]
            name = image.name.removesuffix(".nii.gz")
            yield SourceCase(name, (image,), (source / entry["label"],), subject=_subject(name))
        for image in listed.get("test", ()):
            path = source / (image["image"] if isinstance(image, dict) else image)
            yield SourceCase(path.name.removesuffix(".nii.gz"), (path,), part="Ts")

    def read(self, case: SourceCase) -> CaseContent:
        """4D images are split; 3D ones stay as they are."""
        channels = read_channels(case.images[0])
        return CaseContent(case.images if len(channels) == 1 else tuple(channels), case.labels[0] if case.labels else None)

    def _listed(self, source: Path) -> dict[str, Any]:
        path = source / "dataset.json"
        if not path.is_file():
            raise missing_layout(self, source)
        listed = read_json(path, DatasetError)
        sound = isinstance(listed, dict) and all(isinstance(listed.get(key), dict) for key in ("modality", "labels"))
        if not sound or not isinstance(listed.get("training"), list):
            raise DatasetError(
                f"{path} is not a Decathlon task's: it lacks 'modality', 'labels' or 'training'. Give the task's own folder."
            )
        return dict(listed)


def _subject(case: str) -> str | None:
    matched = re.fullmatch(r"hippocampus_(\d+)", case)
    return f"hippocampus_person_{(int(matched[1]) + 1) // 2:03d}" if matched else None
