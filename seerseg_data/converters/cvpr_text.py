"""CVPR 2025 challenge on text-guided 3D biomedical segmentation (hub set junma/CVPR-BiomedSegFM): .npz files with prompts.

A file holds imgs (D, H, W) 0 to 255, gts (D, H, W) and spacing; validation files hold text_prompts, a 0-d object array of a dict
{"1": sentence, ..., "instance_label": 0 or 1}, and their gts lie in files of the same name elsewhere. Training prompts are in
CVPR25_TextSegFMData_with_class.json: dataset -> {"1": [sentences], ..., "instance_label"}, the dataset being the name of the folder
that holds the files or the beginning of the file names (public code that trains on it). spacing is SimpleITK's GetSpacing(), so
(x, y, z), as the challenge's own preprocessing writes it (pre_CT_MR.py of MedSAM and its successors).

An .npz says neither side nor position. The arrays were read by SimpleITK, in most scans with x to the patient's left, y to the back
and z up: that is assumed and recorded as laterality "assumed". Intensities were windowed to 0..255, so the channel is called
"rescale_to_0_1" and not CT: no one may take it for Hounsfield units.

The pickle inside text_prompts is read by an unpickler that knows numpy arrays and plain containers and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.challenge.npz import modality_of, npz_names, parse_prompts, read_npz
from seerseg.errors import DatasetError, ImageError, UsageError
from seerseg.paths import read_json
from seerseg.volume import Volume, unplaced_source
from seerseg_data.converters.base import CaseContent, Converter, Facts, Part, SourceCase, ask, missing_layout

PROMPTS = "CVPR25_TextSegFMData_with_class.json"


class CVPRText(Converter):
    """One folder of .npz files of one modality; labels are the prompts' structures."""

    name = "cvpr_text"
    title = "data of the CVPR 2025 text-guided segmentation challenge"
    dataset_name = "CVPRText"
    licence = "CC BY-NC-SA 4.0 (the set); each part keeps its own licence"
    home = "https://huggingface.co/datasets/junma/CVPR-BiomedSegFM"
    layout = f"""
    SOURCE/                                         files of one modality, any nesting
        {PROMPTS}                                   here or in a folder above; not needed where files hold text_prompts
        CT/CT_AMOS/CT_AMOS_amos_0001.npz            imgs, gts, spacing
        3D_val_npz/CT_*.npz                         imgs, spacing, text_prompts
        3D_val_gt/3D_val_gt_text/CT_*.npz           gts
    """
    channels = ("rescale_to_0_1",)

    def facts(self, source: Path) -> Facts:
        """A label for every structure that a prompt of these files names."""
        labels: dict[str, int | tuple[int, ...]] = {}
        modalities = set()
        for case in self.cases(source):
            modalities.add(modality_of(case.images[0].name))
            for name, _ in case.note[0].values():
                labels.setdefault(name, len(labels) + 1)
        if not labels:
            raise UsageError(f"No file under {source} has prompts. Put {PROMPTS} into it, or give files that hold text_prompts.")
        if len(modalities) > 1:
            raise UsageError(f"{source} holds files of {', '.join(sorted(modalities))}. Give the folder of one modality.")
        return Facts(self.channels, labels, {}, {"modality": modalities.pop() if modalities else ""})

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """Every .npz with imgs; its gts from the file itself or from the file of the same name without imgs."""
        files = sorted(p for p in source.rglob("*.npz") if not p.name.startswith("."))
        members = {path: npz_names(path) for path in files}
        truths = {path.name: path for path in files if "gts" in members[path] and "imgs" not in members[path]}
        scans = [path for path in files if "imgs" in members[path] or not members[path]]
        if not scans:
            raise missing_layout(self, source)
        table = _prompt_table(source)
        values = _label_values(scans, members, table)
        for path in scans:
            prompts, instances = _prompts(path, members[path], table)
            note = ({value: (name, sentences) for value, (name, sentences) in prompts.items()}, instances, values)
            labels = (path,) if "gts" in members[path] else (truths[path.name],) if path.name in truths else ()
            part: Part = "Tr" if labels or not members[path] else "Ts"
            yield SourceCase(path.name.removesuffix(".npz"), (path,), labels or ((path,) if part == "Tr" else ()), part, note=note)

    def read(self, case: SourceCase) -> CaseContent:
        """Arrays turned from (x left, y back, z up) to canonical; prompts of structures that are there become requests."""
        prompts, instances, values = case.note
        if "text_prompts" in npz_names(case.images[0]):
            read_npz(case.images[0], ("text_prompts",))
        if not prompts:
            raise DatasetError(
                f"{case.images[0]} holds no text_prompts, and no {PROMPTS} names its dataset. Put that file beside the data."
            )
        data = read_npz(case.images[0], ("imgs", "spacing"))
        images, spacing = data["imgs"], data["spacing"].reshape(-1).astype(np.float64)
        if images.ndim != 3 or images.dtype.kind not in "iuf":
            raise ImageError(f"{case.images[0]}: imgs has the shape {images.shape}; a scan of one number per voxel (D, H, W) is needed.")
        if spacing.shape != (3,) or not (np.isfinite(spacing).all() and spacing.min() > 0):
            raise ImageError(f"{case.images[0]}: spacing is {spacing.tolist()}; three positive numbers are needed. Get the file again.")
        grid, place = unplaced_source(images.shape, (float(spacing[2]), float(spacing[1]), float(spacing[0])))
        array = np.ascontiguousarray(images[:, ::-1, ::-1])
        volume = Volume(array.astype(np.int16 if array.dtype.kind in "iu" else np.float32), grid, None, 0, place, case.id)
        notes = ("the file says neither side nor position: laterality is assumed",)
        if not case.labels:
            return CaseContent((volume,), None, notes=notes)
        truth = read_npz(case.labels[0], ("gts",))["gts"]
        if truth.shape != images.shape:
            raise ImageError(f"{case.labels[0]}: gts has the shape {truth.shape}, imgs {images.shape}. Get the files again.")
        label = np.zeros(truth.shape, dtype=np.uint8 if max(values.values()) < 256 else np.uint16)
        requests = []
        for value, (name, sentences) in prompts.items():
            there = truth > 0 if instances else truth == value
            if there.any():
                label[there] = values[name]
                requests += [ask(self, case.id, f"{value}_{i}", text, [name], "challenge_prompt") for i, text in enumerate(sentences)]
        return CaseContent((volume,), np.ascontiguousarray(label[:, ::-1, ::-1]), tuple(requests), notes)


def _prompt_table(source: Path) -> Mapping[str, Any]:
    for folder in (source, *source.resolve().parents[:3]):
        if (folder / PROMPTS).is_file():
            value = read_json(folder / PROMPTS, DatasetError)
            if not isinstance(value, dict):
                raise DatasetError(f"{folder / PROMPTS} does not map datasets to prompts. Get the file again.")
            return value
    found = sorted(source.rglob(PROMPTS))
    return read_json(found[0], DatasetError) if found else {}


def _prompts(path: Path, members: frozenset[str], table: Mapping[str, Any]) -> tuple[dict[int, tuple[str, tuple[str, ...]]], bool]:
    """Value -> (label name, sentences) for one file, and whether its values are instances."""
    if "text_prompts" in members:
        try:
            given = read_npz(path, ("text_prompts",))["text_prompts"]
            prompts = given.item() if given.shape == () else None
        except ImageError:
            return {}, False  # reading the case will say what is wrong
    else:
        fitting = [key for key in table if key == path.parent.name or path.name.startswith(key + "_")]
        prompts = table[max(fitting, key=len)] if fitting else None
    read = parse_prompts(prompts)
    if read is None:
        return {}, False
    return {value: (_name(sentences), sentences) for value, sentences in read.texts.items()}, read.instances


@lru_cache(maxsize=4096)
def _resolved(sentence: str) -> str | None:
    from seerseg.vocabulary import Vocabulary

    short = re.split(r"\b(?:in|on|from|within|for|of an?|visible|seen|using|with)\b", sentence.strip(" ."), maxsplit=1)[0]
    short = re.sub(r"^(?:the|segmentation of|please segment|segment|outline|delineate)\s+", "", short.strip(), flags=re.IGNORECASE)
    entry = Vocabulary.load().resolve(short) if short.strip() else None
    return entry.name if entry else None


def _name(sentences: Sequence[str]) -> str:
    """The structure that the first understood sentence names, else the first sentence itself."""
    return next((name for s in sentences if (name := _resolved(s))), sentences[0].strip().rstrip("."))


def _label_values(scans: Iterable[Path], members: Mapping[Path, frozenset[str]], table: Mapping[str, Any]) -> dict[str, int]:
    names: dict[str, int] = {}
    for path in scans:
        for name, _ in _prompts(path, members[path], table)[0].values():
            names.setdefault(name, len(names) + 1)
    return names
