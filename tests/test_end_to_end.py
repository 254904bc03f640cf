"""The main job through the command line: from raw scans and words to masks, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from seerseg.cli.evaluate import evaluate
from seerseg.cli.plan_and_preprocess import plan, plan_and_preprocess
from seerseg.cli.predict import predict
from seerseg.cli.sample import sample
from seerseg_data.phantoms import LABELS, phantom

NAMES = ("left cerebral hemisphere", "right cerebral hemisphere", "cerebellum", "skull")
TEXTS = {
    "left cerebral hemisphere": ("left cerebral hemisphere", "plz outline the lft cerebral hemispere"),
    "cerebellum": ("cerebellum", "the cerebelum"),
}


def run(command: click.Command, *arguments: str | Path, code: int = 0, env: dict[str, str] | None = None) -> Any:
    result = CliRunner().invoke(command, [str(a) for a in arguments], env=env, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def oblique(affine: np.ndarray) -> np.ndarray:
    a, b = np.deg2rad(12), np.deg2rad(-7)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = about_z @ about_x
    return out @ affine


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six heads of five subjects, oblique, every other one stored L-P-S; labels of one stored mirrored in array order."""
    root = tmp_path_factory.mktemp("heads")
    folder = root / "raw" / "Dataset007_Heads"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    lines = []
    for number in range(6):
        drawn = phantom("head", number, spacing_zyx_mm=(9.0, 6.0, 6.0))
        scan = nib.Nifti1Image(drawn.array_zyx.T, oblique(drawn.affine))
        labels = np.where(np.isin(drawn.labels_zyx, [LABELS[n] for n in NAMES]), drawn.labels_zyx, 0).astype(np.uint8)
        label = nib.Nifti1Image(labels.T, oblique(drawn.affine))
        if number % 2:
            scan = scan.as_reoriented([[0, -1], [1, -1], [2, 1]])
        if number == 2:
            label = label.as_reoriented([[0, -1], [1, 1], [2, 1]])
        case = f"head_{number:03d}"
        nib.save(scan, folder / "imagesTr" / f"{case}_0000.nii.gz")
        nib.save(label, folder / "labelsTr" / f"{case}.nii.gz")
        for target, texts in TEXTS.items():
            for k, text in enumerate(texts):
                style = "messy_or_misspelled" if k else "label_prompt"
                lines.append({"id": f"{case}-{target.split()[0]}-{k}", "case": case, "text": text, "target": target, "style": style})
        lines.append(
            {"id": f"{case}-absent", "case": case, "text": "outline the prostate", "target": None, "style": "out_of_region_reference"}
        )
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "subjects.json").write_text(json.dumps({"a": ["head_000", "head_001"], **{f"s{n}": [f"head_{n:03d}"] for n in range(2, 6)}}))
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, **{name: LABELS[name] for name in NAMES}},
                "numTraining": 6,
                "file_ending": ".nii.gz",
            }
        )
    )
    script = {
        "cases": {f"head_{n:03d}": f"raw/Dataset007_Heads/labelsTr/head_{n:03d}.nii.gz" for n in range(6)},
        "names": {n: LABELS[n] for n in NAMES},
    }
    (root / "script.json").write_text(json.dumps(script))
    return root


def test_from_raw_scans_to_a_table(heads: Path, tmp_path: Path) -> None:
    raw = heads / "raw"
    env = {"seerseg_raw": str(raw), "seerseg_preprocessed": str(tmp_path / "preprocessed")}
    said = run(plan_and_preprocess, "-d", "7", "--verify_dataset_integrity", "-np", "1", env=env).output
    assert "0 errors" in said
    run(plan_and_preprocess, "-d", "7", "-np", "1", env=env)
    assert "views.plane" in run(plan, "-d", "7", "--explain", env=env).output

    images, out = raw / "Dataset007_Heads" / "imagesTr", tmp_path / "out"
    line = ["-i", images, "-o", out, "--segmenter", f"scripted:{heads / 'script.json'}", "--modality", "CT", "--per_request", "--overlay"]
    run(predict, *line)
    for scan in images.iterdir():
        case = scan.name[: -len("_0000.nii.gz")]
        for mask in out.glob(f"{case}*.nii.gz"):
            before, after = nib.load(scan), nib.load(mask)
            assert before.shape == after.shape
            np.testing.assert_array_equal(before.affine, after.affine)
    record = json.loads((out / "head_000.json").read_text())
    assert {r["id"]: r["status"] for r in record["requests"]}["head_000-absent"] == "absent"

    shown = run(
        evaluate, "-d", "7", "-i", out, "--split", "all", "--overlay", tmp_path / "pictures", "-o", tmp_path / "summary.json", env=env
    )
    assert "left cerebral hemisphere" in shown.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [row for row in summary["rows"] if row["target"]]
    assert len(rows) == 24, "a request in the words of a label prompt counts once"
    assert all(row["dice"] == 1.0 and row["hd95_mm"] == 0.0 for row in rows if row["reference_ml"]), shown.output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6

    ledger = (out / "ledger.jsonl").read_bytes()
    run(predict, *line)
    assert (out / "ledger.jsonl").read_bytes() == ledger, "what is done is not done again"


def test_one_bad_case_does_not_end_the_run(heads: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in range(2):
        name = f"head_{number:03d}_0000.nii.gz"
        (scans / name).write_bytes((heads / "raw" / "Dataset007_Heads" / "imagesTr" / name).read_bytes())
    broken = scans / "head_002_0000.nii.gz"
    broken.write_bytes((heads / "raw" / "Dataset007_Heads" / "imagesTr" / "head_002_0000.nii.gz").read_bytes()[:900])
    line = ["-i", scans, "-o", tmp_path / "out", "--prompt", "cerebellum", "--segmenter", f"scripted:{heads / 'script.json'}"]
    said = run(predict, *line, code=3)
    assert "head_002" in said.output
    assert (tmp_path / "out" / "head_000.nii.gz").exists()
    assert (tmp_path / "out" / "head_001.nii.gz").exists()
    assert not (tmp_path / "out" / "head_002.nii.gz").exists()
    broken.write_bytes((heads / "raw" / "Dataset007_Heads" / "imagesTr" / "head_002_0000.nii.gz").read_bytes())
    run(predict, *line)
    assert (tmp_path / "out" / "head_002.nii.gz").exists(), "a mended scan is done"


def test_the_quickstart_reaches_its_bars(ct_chest: Path, tmp_path: Path) -> None:
    """The shipped defaults on a real CT that took no part in their making."""
    run(sample, "ct_chest", "-o", tmp_path / "raw")
    data, out = tmp_path / "raw" / "Dataset901_CTChest", tmp_path / "out"
    run(predict, "-i", data / "imagesTr", "-o", out, "--requests", data / "requests.jsonl", "--modality", "CT", "--per_request")
    run(evaluate, "-d", "901", "--raw_folder", tmp_path / "raw", "-i", out, "--split", "all", "-o", tmp_path / "summary.json")
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    lungs = [row for row in rows if row["target"] in ("left lung", "right lung")]
    assert len(lungs) == 8
    assert min(row["dice"] for row in lungs) >= 0.93
    drawn = [row["dice"] for row in rows if row["target"] in ("ribs", "vertebral column")]
    assert len(drawn) == 6
    assert min(drawn) > 0.3
    absent = [r for r in json.loads((out / "chest_001.json").read_text())["requests"] if r["id"].startswith("absent")]
    assert [r["status"] for r in absent] == ["absent", "absent"]
