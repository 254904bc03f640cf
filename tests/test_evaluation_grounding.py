"""Boxes and points against the reference as MedReasoner scores them, by hand on a picture of 84 x 84: a voxel is 10 of 840 pixels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from seerseg.cli.evaluate import evaluate as command
from seerseg.dataset import Request, open_dataset, write_requests
from seerseg.errors import NothingToDoError
from seerseg.evaluation import References, evaluate
from seerseg.evaluation.grounding import MEDREASONER_PX, ground, on_pixels, published_dice
from seerseg.paths import write_json
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.rewards import key_slice
from seerseg.views import pixel_map
from seerseg.volume import Grid, read_labels

NAMES = ("exact", "moved", "crossed", "beside", "nothing", "broken")


def square(rows: tuple[int, int], cols: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((1, 84, 84), bool)
    mask[0, rows[0] : rows[1], cols[0] : cols[1]] = True
    return mask


TRUTH = square((20, 40), (20, 60))
MOVED = square((30, 50), (20, 60))


def save(path: Path, zyx: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(zyx.transpose(2, 1, 0).astype(np.uint8), np.eye(4)), path)


def box(rows: tuple[float, float], cols: tuple[float, float]) -> Box2D:
    return Box2D(0, 0, (rows[0], cols[0]), (rows[1], cols[1]))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    raw, out = tmp_path / "raw" / "Dataset011_Pictures", tmp_path / "out"
    save(raw / "imagesTr" / "a_0000.nii.gz", TRUTH * 100)
    save(raw / "labelsTr" / "a.nii.gz", TRUTH)
    labels, _ = read_labels(raw / "labelsTr" / "a.nii.gz")
    assert np.array_equal(labels > 0, TRUTH), "the stored axes are canonical"
    key = key_slice(TRUTH, 0, 0)
    assert key is not None
    first, second = (Point((float(z), float(y), float(x))) for z, y, x in key.points)
    requests = [Request(name, "a", f"the {name} one", ("spot",), "implicit", "test") for name in (*NAMES, "gone")]
    requests[-1] = Request("gone", "a", "what is not there", None, "implicit", "test")
    write_requests(raw / "requests.jsonl", requests)
    meta = {"channel_names": {"0": "picture"}, "labels": {"background": 0, "spot": 1}, "numTraining": 1, "file_ending": ".nii.gz"}
    write_json(raw / "dataset.json", meta)
    prompts: dict[str, Prompt | None] = {
        "exact": Prompt(boxes=(box((20, 40), (20, 60)),), points=(first, second)),
        "moved": Prompt(boxes=(box((30, 50), (20, 60)),), points=(Point((0, first.zyx[1] + 10, first.zyx[2])), second)),
        "crossed": Prompt(boxes=(box((20, 40), (20, 60)),), points=(second, first)),
        "beside": Prompt(boxes=(box((60, 80), (60, 80)),), points=(Point((0, 70, 70)), Point((0, 72, 72)))),
        "nothing": None,
        "broken": None,
    }
    entries: list[dict[str, Any]] = []
    for name, prompt in prompts.items():
        drawn = {"exact": TRUTH, "moved": MOVED, "crossed": TRUTH, "beside": square((60, 80), (60, 80))}.get(name)
        entry: dict[str, Any] = {"id": name, "text": f"the {name} one", "status": "fault", "prompt": prompt.to_json() if prompt else None}
        if drawn is not None:
            save(out / f"a__{name}.nii.gz", drawn)
            entry |= {"status": "ok", "file": f"a__{name}.nii.gz", "value": 1}
        entries.append(entry)
    entries[-1]["prompt"] = {"boxes": [{"axis": 0, "index": 7, "lo": [1, "x"], "hi": [2, 3]}], "points": 3}
    entries.append({"id": "gone", "text": "what is not there", "status": "absent", "prompt": None})
    write_json(out / "a.json", {"schema": 1, "case": "a", "model": {}, "legend": {}, "overlaps": [], "requests": entries})
    return raw, out


def test_by_hand(folders: tuple[Path, Path]) -> None:
    raw, out = folders
    dataset = open_dataset(raw)
    references = References.of_dataset(dataset)
    found = ground(evaluate(out, references, dataset.requests).rows, out, references)
    rows = {row.request: row for row in found.rows}
    assert set(rows) == set(NAMES), "what is absent has no box"
    assert rows["exact"].iou == pytest.approx(1.0)
    assert rows["exact"].pdice == pytest.approx(2.0, abs=1e-4), "as published it divides by the union"
    assert rows["exact"].pdice_mended == pytest.approx(1.0)
    assert (rows["exact"].dice, rows["exact"].dice_voxels) == pytest.approx((1.0, 1.0))
    assert rows["moved"].iou == pytest.approx(400 / 1200), "half of the box overlaps"
    assert rows["moved"].dice == pytest.approx(0.5)
    assert rows["moved"].dice_voxels == pytest.approx(0.5)
    key = key_slice(TRUTH, 0, 0)
    assert key is not None
    (_, y0, x0), (_, y1, x1) = key.points
    # circles on the pixels: ten times the voxels, but where they lie does not matter
    radius, moved = 5 * math.dist((y0, x0), (y1, x1)), 5 * math.dist((y0 + 10, x0), (y1, x1))
    apart = 50.0  # the centre moves by half of ten voxels
    angle = math.acos((apart**2 + radius**2 - moved**2) / (2 * apart * radius))
    other = math.acos((apart**2 + moved**2 - radius**2) / (2 * apart * moved))
    area = radius**2 * (angle - math.sin(2 * angle) / 2) + moved**2 * (other - math.sin(2 * other) / 2)
    both = math.pi * (radius**2 + moved**2)
    assert rows["moved"].pdice == pytest.approx(2 * area / (both - area), rel=1e-5)
    assert rows["moved"].pdice_mended == pytest.approx(2 * area / both, rel=1e-5)
    assert rows["crossed"].pdice_mended == pytest.approx(1.0), "the order of the points does not matter"
    assert (rows["beside"].iou, rows["beside"].pdice, rows["beside"].dice) == (0, 0, 0)
    for name in ("nothing", "broken"):
        assert not rows[name].readable
        assert (rows[name].iou, rows[name].pdice, rows[name].dice, rows[name].dice_voxels) == (0, 0, 0, 0)
    assert found.means()["iou"] == pytest.approx((1 + 1 / 3 + 1) / 6)
    assert found.interval("iou") is None, "one picture has no interval"


def test_published_points_count_where_requests_carry_them(folders: tuple[Path, Path]) -> None:
    raw, out = folders
    written = open_dataset(raw).requests
    points = ((0, 22, 25), (0, 36, 50))
    write_requests(raw / "requests.jsonl", [replace(r, points=points if r.id == "exact" else ()) for r in written])
    dataset = open_dataset(raw)
    assert next(r for r in dataset.requests if r.id == "exact").points == points
    references = References.of_dataset(dataset)
    rows = {row.request: row for row in ground(evaluate(out, references, dataset.requests).rows, out, references).rows}
    key = key_slice(TRUTH, 0, 0)
    assert key is not None
    (_, y0, x0), (_, y1, x1) = key.points
    answered, true = math.dist((y0, x0), (y1, x1)) / 2, math.dist((22, 25), (36, 50)) / 2
    apart = math.dist(((y0 + y1) / 2, (x0 + x1) / 2), (29, 37.5))
    assert apart <= abs(answered - true), "one circle in the other"
    small, large = sorted((answered, true))
    assert rows["exact"].pdice_mended == pytest.approx(2 * small**2 / (small**2 + large**2), rel=1e-6)
    assert rows["exact"].iou == pytest.approx(1.0), "the box stays that of the mask"


def test_the_grid_of_a_picture_that_is_not_square() -> None:
    mask = np.zeros((1, 42, 84), bool)
    mask[0, :21] = True
    where = pixel_map(Grid((1, 42, 84), np.eye(4)), 0, 0, MEDREASONER_PX)
    shown = on_pixels(mask, where)
    assert shown.shape == (840, 840)
    assert shown.sum() == 210 * 840, "half of the picture; the margins hold nothing"
    assert shown.any(axis=1).sum() == 210
    assert published_dice(shown, shown) == pytest.approx(1.0)
    assert published_dice(shown & False, shown & False) == 0.0


def test_the_command(folders: tuple[Path, Path]) -> None:
    raw, out = folders
    done = CliRunner().invoke(command, ["-d", str(raw), "-i", str(out), "--grounding"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "2 of 6 answers name neither a box nor two points" in done.output
    assert "pDice" in done.output
    said = json.loads((out / "summary.json").read_text())["grounding"]
    assert said["grid_px"] == 840
    assert said["requests"] == 6
    assert said["readable"] == 4
    assert said["categories"]["spot"]["iou"] == said["means"]["iou"]
    assert "grounding" not in json.loads(CliRunner().invoke(command, ["-d", str(raw), "-i", str(out), "--json"]).stdout)


def test_masks_alone_have_no_boxes(folders: tuple[Path, Path]) -> None:
    raw, out = folders
    dataset = open_dataset(raw)
    references = References.of_dataset(dataset)
    rows = evaluate(out, references, dataset.requests).rows
    (out / "a.json").unlink()
    with pytest.raises(NothingToDoError, match="says nothing of what was answered"):
        ground(rows, out, references)


def test_prompts_are_read_back() -> None:
    prompt = Prompt(text="spot", boxes=(box((1, 2), (3, 4)),), points=(Point((0, 1, 2), False),))
    again = Prompt.from_json(json.loads(json.dumps(prompt.to_json())))
    assert again is not None
    assert again.to_json() == prompt.to_json()
    for bad in (None, 3, {}, {"text": None, "class": None, "boxes": 3, "points": []}, {"boxes": [{"lo": [1], "hi": [2]}], "points": []}):
        assert Prompt.from_json(bad) is None
