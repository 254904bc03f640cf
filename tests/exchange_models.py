"""Trained-model folders that are small, whole, and predict something."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from seerseg.model import ModelSpec, run_name, write_spec
from seerseg.reasoners.nano import SHIPPED
from seerseg.segmenters.nano.segmenter import SHIPPED as SEGMENTER
from seerseg.skills.base import Skill
from seerseg.skills.store import BankFolder

DATASET = "Dataset007_Toy"
RUN = run_name("plans", "seer", "nano", "nano")
TARGETS = ("left lung", "right lung", "ribs")
PROMPTS = ("the lft lung", "ribs pls")


def fold_folder(results: Path, run: str = RUN) -> Path:
    return results / DATASET / run / "fold_0"


def trained(results: Path) -> Path:
    """What training from nano leaves: weights (the shipped ones), plans, a bank, and much that is no part of the model."""
    folder = fold_folder(results)
    model = folder / "sft" / "model"
    model.mkdir(parents=True)
    for path in SHIPPED.iterdir():
        shutil.copyfile(path, model / path.name)
    (model / "seerseg_base.json").write_text(json.dumps({"schema": 1, "name": "nano", "identity": "x"}))
    (model / "training_args.bin").write_bytes(b"\x80\x04.")
    junk = folder / "sft" / "checkpoints" / "checkpoint-1"
    junk.mkdir(parents=True)
    (junk / "optimizer.pt").write_bytes(b"PK\x03\x04")
    (folder / "plans.json").write_text('{"schema": 1}')
    skill = Skill("", "ABBR_DISAMBIGUATE", "the request says L-lung", "answer left lung", words=("L-lung",), target="left lung")
    BankFolder(folder / "bank").change(lambda skills: {**skills, skill.id: skill}, "by hand")
    (folder / "bank" / "memo.jsonl").write_text('{"asked": "of a patient"}\n')
    write_spec(folder, spec(reasoner=f"nano:{model.resolve()}", bank="frozen"))
    return folder


def spec(**changes: Any) -> ModelSpec:
    from seerseg.segmenters import load_segmenter

    given: dict[str, Any] = {
        "segmenter_identity": load_segmenter("nano").card.identity,
        "targets": TARGETS,
        "closed": True,
        "label_values": {name: (number,) for number, name in enumerate(TARGETS, 1)},
        "dataset": DATASET,
        "fold": 0,
    }
    return ModelSpec(**{**given, **changes})


def adapter_on(base: Path, folder: Path) -> Path:
    """A model folder whose reasoner is a peft adapter on the transformers folder `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from seerseg.reasoners.vlm_loading import weights_identity

    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base, local_files_only=True)
    part = folder / "sft" / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers deprecate each other's attributes
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)
    config = json.loads((part / "adapter_config.json").read_text())
    (part / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    (part / "seerseg_base.json").write_text(json.dumps({"schema": 1, "name": str(base), "identity": weights_identity(base)}))
    write_spec(folder, spec(reasoner=str(part.resolve())))
    return folder


def segmenter_elsewhere(folder: Path, licence: str | None) -> Path:
    """The nano segmenter as a folder of the user's own; licence: as its card says it, None for no card."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        os.link(SEGMENTER / name, folder / name)
    if licence is not None:
        (folder / "README.md").write_text(f"---\ntags: [x]\nlicense: {licence}\n---\n# A segmenter\n")
    return folder


def chest(folder: Path) -> Path:
    """A folder with one small CT of a chest."""
    from seerseg_data.phantoms import phantom

    drawn = phantom("chest", 7001, spacing_zyx_mm=(8.0, 5.0, 5.0))
    folder.mkdir(parents=True)
    middle = np.ascontiguousarray(drawn.array_zyx[10:32].T)  # enough to draw on, and half the work
    nib.Nifti1Image(middle, drawn.affine).to_filename(folder / "scan_0000.nii.gz")
    return folder


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None], **info: Any) -> Path:
    """The zip with its files (and export.json as "export.json") changed by `change`; info: attributes of every entry."""
    with zipfile.ZipFile(source) as packed:
        files = {i.filename: packed.read(i) for i in packed.infolist()}
    change(files)
    with zipfile.ZipFile(target, "w") as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in info.items():
                setattr(entry, key, value)
            packed.writestr(entry, content)
    return target
