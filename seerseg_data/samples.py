"""Small datasets in the raw layout that anyone can have: a real CT from a package, and phantoms drawn from a seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seerseg.dataset import Request, write_requests
from seerseg.errors import MissingExtraError, UsageError, did_you_mean
from seerseg.paths import write_json
from seerseg.volume import Grid, Volume, read_labels, read_volume, source_of, write_labels, write_volume

SAMPLES = {
    "ct_chest": "one real CT of a chest with 7 labelled structures, from the package slicerio 1.4.0 (MIT)",
    "phantoms": "drawn CT phantoms of torsos with 50 labelled structures, from a seed",
}


@dataclass(frozen=True)
class _Said:
    id: str
    text: str
    target: str | None
    style: str


CT_CHEST_LABELS = {
    "ribs": 1,
    "cervical vertebral column": 2,
    "thoracic vertebral column": 3,
    "lumbar vertebral column": 4,
    "right lung": 5,
    "left lung": 6,
    "tissue": 7,
    "vertebral column": [2, 3, 4],
    "lungs": [5, 6],
}

CT_CHEST_REQUESTS = (
    _Said("left-lung-label", "left lung", "left lung", "label_prompt"),
    _Said("right-lung-label", "right lung", "right lung", "label_prompt"),
    _Said("ribs-label", "ribs", "ribs", "label_prompt"),
    _Said("spine-label", "vertebral column", "vertebral column", "label_prompt"),
    _Said("left-lung-typo", "plz segmnt the lft lnug", "left lung", "messy_or_misspelled"),
    _Said(
        "left-lung-wordy",
        "Thank you for seeing this patient. Before the planned operation, could you please kindly outline for us the whole of "
        "the left lung, so that its volume can be measured?",
        "left lung",
        "verbose_request",
    ),
    _Said("left-lung-not", "the lung that is not the right one", "left lung", "negated"),
    _Said("right-lung-abbreviated", "R lung seg", "right lung", "abbr_or_short"),
    _Said("right-lung-lay", "the breathing organ on the patient's right side", "right lung", "lay"),
    _Said("right-lung-report", "Volumetry requested. Target: pulmo dexter.", "right lung", "report_style"),
    _Said("ribs-typo", "all teh ribz pls", "ribs", "messy_or_misspelled"),
    _Said("ribs-lay", "the bones that form the cage of the chest", "ribs", "lay"),
    _Said("spine-lay", "the backbone", "vertebral column", "lay"),
    _Said("spine-abbreviated", "whole C/T/L spine", "vertebral column", "ambiguous_abbreviation"),
    _Said("absent-brain", "outline the left hippocampus", None, "out_of_region_reference"),
    _Said("absent-pelvis", "please contour the prostate", None, "out_of_region_reference"),
)


def make_sample(name: str, folder: Path, *, count: int = 4, seed: int = 0) -> Path:
    """Write the dataset folder of a sample under `folder` and return its path.

    count and seed apply to phantoms. UsageError for an unknown name, MissingExtraError when the carrying package is not here.
    """
    if name == "ct_chest":
        return _ct_chest(folder / "Dataset901_CTChest")
    if name == "phantoms":
        return _phantoms(folder / "Dataset902_Phantoms", count, seed)
    raise UsageError(f"There is no sample {name!r}.{did_you_mean(name, SAMPLES)} Known: {', '.join(SAMPLES)}.")


def _ct_chest(folder: Path) -> Path:
    package = importlib.util.find_spec("slicerio")
    places = list(package.submodule_search_locations or ()) if package else []
    if not places:
        raise MissingExtraError("The CT chest comes with the package slicerio, which is not installed: pip install slicerio==1.4.0")
    data = Path(places[0]) / "data"
    scan = read_volume(data / "CTChest4.nrrd", modality="CT", name="chest_001")
    labels, grid = read_labels(data / "Segmentation.seg.nrrd", like=scan.grid)
    assert scan.source is not None
    write_volume(scan, folder / "imagesTr" / "chest_001_0000.nii.gz", as_source=True)
    write_labels(labels, grid, scan.source, folder / "labelsTr" / "chest_001.nii.gz")
    requests = [
        Request(id=s.id, case="chest_001", text=s.text, target=(s.target,) if s.target else None, style=s.style) for s in CT_CHEST_REQUESTS
    ]
    kind = "as shipped with the scan; how they were made is not documented; its ribs include scapulae and clavicles"
    _describe(folder, "CT", {"background": 0, **CT_CHEST_LABELS}, 1, "MIT (package slicerio 1.4.0)", requests, kind)
    return folder


def _phantoms(folder: Path, count: int, seed: int) -> Path:
    from seerseg_data.phantoms import LABELS, phantom

    requests: list[Request] = []
    for number in range(count):
        case = f"phantom_{seed + number:03d}"
        drawn = phantom("torso", seed + number, spacing_zyx_mm=(5.0, 3.0, 3.0))
        grid = Grid(drawn.array_zyx.shape, drawn.affine)
        write_volume(Volume(drawn.array_zyx, grid, "CT", source=source_of(grid)), folder / "imagesTr" / f"{case}_0000.nii.gz")
        write_labels(drawn.labels_zyx, grid, source_of(grid), folder / "labelsTr" / f"{case}.nii.gz")
        for value, name in drawn.names.items():
            if np.count_nonzero(drawn.labels_zyx == value) >= 50:
                requests.append(Request(id=f"{case}-{value:02d}", case=case, text=name, target=(name,), style="label_prompt"))
    _describe(folder, "CT", {"background": 0, **LABELS}, count, "Apache-2.0 (drawn)", requests, "drawn, exact")
    return folder


def _describe(
    folder: Path, channel: str, labels: dict[str, object], count: int, licence: str, requests: Sequence[Request], label_kind: str
) -> None:
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": channel},
            "labels": labels,
            "numTraining": count,
            "file_ending": ".nii.gz",
            "licence": licence,
            "label_kind": label_kind,
        },
    )
    write_requests(folder / "requests.jsonl", requests)
