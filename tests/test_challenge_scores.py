"""The challenge's scores: numbers of its own program, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from challenge_cases import SHAPE_DHW, SPACING_WHD, command, grey, npz, scan, truth_dhw
from scipy import ndimage

from seerseg.challenge.npz import PromptSet
from seerseg.challenge.scores import evaluate_npz, score_classes, score_instances
from seerseg.errors import NothingToDoError, UsageError
from seerseg.metrics import dice

# What CVPR25_text_eval.py (with numpy's Inf spelled inf) gave for the pairs of `blobs`: DSC and NSD at 2 mm with this spacing as given
PUBLISHED = [(0.87267805, 0.98904612), (0.87212023, 0.96494839), (0.87836521, 0.95100321), (0.83493047, 0.97359445)]
# ... and for `instances`: F1 and DSC_TP
PUBLISHED_INSTANCES = [
    (0.170212766, 0.8541666667),
    (0.4444444444, 0.9066666667),
    (0.4888888889, 0.9363636364),
    (0.4489795918, 0.9363636364),
]


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two label maps with classes 1 and 4 that resemble each other, and a spacing as a file holds it."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(14, 26, 3))
    spacing = tuple(float(s) for s in np.round(rng.uniform(0.6, 3.0, 3), 2)) if seed else (1.0, 1.0, 1.0)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    other = field + 0.3 * ndimage.gaussian_filter(rng.normal(size=shape), 2)
    maps = [np.where(f > 0.03, 1, np.where(f < -0.05, 4, 0)).astype(np.uint8) for f in (field, other)]
    return maps[0], maps[1], (spacing[0], spacing[1], spacing[2])


def instances(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbered cubes, and a prediction that shifts, splits, misses and invents some."""
    rng = np.random.default_rng(seed)
    truth, drawn = np.zeros((2, 24, 30, 30), np.uint8)
    number = 0
    for z in range(0, 24, 8):
        for y in range(0, 30, 10):
            for x in range(0, 30, 10):
                size = int(rng.integers(3, 6))
                number += 1
                if rng.random() > 0.2:
                    truth[z : z + size, y : y + size, x : x + size] = number
                if rng.random() > 0.2:
                    shift = int(rng.integers(0, 3))
                    drawn[z : z + size, y + shift : y + shift + size, x : x + size] = 255 - number
                if rng.random() > 0.8:
                    drawn[z : z + 2] = np.where(drawn[z : z + 2] == 255 - number, number, drawn[z : z + 2])
    return truth, drawn


@pytest.mark.parametrize("seed", range(len(PUBLISHED)))
def test_classes_as_the_published_program(seed: int) -> None:
    truth, drawn, spacing = blobs(seed)
    scores = score_classes(drawn, truth, PromptSet({1: ("a",), 4: ("b",)}), spacing[::-1])
    found = [np.mean([getattr(s, name) for s in scores]) for name in ("dsc", "nsd")]
    assert np.allclose(found, PUBLISHED[seed], atol=1e-5)
    assert scores[0].dsc == dice(drawn == 1, truth == 1)
    if seed:
        assert abs(np.mean([s.nsd_mm for s in scores]) - found[1]) > 1e-4  # spacing that belongs to the axes


@pytest.mark.parametrize("seed", range(len(PUBLISHED_INSTANCES)))
def test_instances_as_the_published_program(seed: int) -> None:
    truth, drawn = instances(seed)
    scores = score_instances(drawn, truth)
    assert np.allclose((scores.f1, scores.dsc_tp), PUBLISHED_INSTANCES[seed], atol=1e-9)


def test_a_binary_answer_is_split_by_faces() -> None:
    truth = np.zeros((4, 4, 9), np.uint8)
    truth[1:3, 1:3, 1:3], truth[1:3, 1:3, 6:8] = 1, 2
    assert score_instances((truth > 0).astype(np.uint8) * 7, truth).f1 == 1.0
    half = np.where(truth == 1, 5, 0)
    assert score_instances(half, truth).f1 == pytest.approx(2 / 3)
    nothing = score_instances(np.zeros_like(truth), truth)
    assert (nothing.f1, nothing.dsc_tp, nothing.tp) == (0.0, 0.0, 0)
    third = truth.copy()
    third[1:3, 1:3, 2:4] = 1  # 8 of 12 voxels: 2/3
    assert score_instances(third, truth).f1 == 1.0
    third[1:3, 1:3, 2:6] = 1  # 8 of 20
    assert score_instances(third, truth).f1 == 0.5


def test_absent_classes_are_told_and_not_averaged(tmp_path: Path) -> None:
    prompts = {"1": "right thing", "2": "left thing", "5": "nothing", "6": "no thing", "instance_label": 0}
    scan(tmp_path / "scans" / "CT_a.npz", prompts=prompts)
    npz(tmp_path / "gt" / "CT_a.npz", gts=truth_dhw())
    drawn = truth_dhw()
    drawn[0, 0, :4] = 5
    npz(tmp_path / "out" / "CT_a.npz", segs=drawn)
    found = evaluate_npz(tmp_path / "out", tmp_path / "gt", tmp_path / "scans")
    assert found.means["dsc"] == found.means["nsd"] == found.means["nsd_mm"] == 1.0
    assert (found.means["absent_classes"], found.means["absent_classes_drawn"]) == (2, 1)
    assert found.means["absent_ml"] == pytest.approx(4 * np.prod(SPACING_WHD) / 1000)
    assert [(c.value, c.dsc) for c in found.scans[0].absent] == [(5, None), (6, None)]


def test_answers_that_are_missing_or_damaged_count_as_empty(tmp_path: Path) -> None:
    for name in ("CT_a", "CT_b", "CT_c", "CT_d"):
        scan(tmp_path / "gt" / f"{name}.npz", gts=truth_dhw())
    npz(tmp_path / "out" / "CT_a.npz", segs=truth_dhw())
    npz(tmp_path / "out" / "CT_b.npz", segs=truth_dhw()[:-1])
    (tmp_path / "out" / "CT_c.npz").write_bytes(b"x")
    npz(tmp_path / "gt" / "CT_e.npz", gts=truth_dhw())  # asks nothing
    found = evaluate_npz(tmp_path / "out", tmp_path / "gt")
    assert [s.dsc for s in found.scans] == [1.0, 0.0, 0.0, 0.0]
    assert found.means["dsc"] == 0.25
    assert len(found.faults) == 3
    assert "There is no answer" in found.faults[2]
    assert len(found.problems) == 1
    assert "CT_e" in found.problems[0]
    scan(tmp_path / "gt2" / "MR_a.npz", prompts={"1": "cells", "instance_label": 1}, gts=np.zeros(SHAPE_DHW, np.uint8))
    npz(tmp_path / "out" / "MR_a.npz", segs=truth_dhw())
    lone = evaluate_npz(tmp_path / "out", tmp_path / "gt2")
    assert lone.means["f1"] == 0.0
    assert lone.means["absent_classes_drawn"] == 1


def test_misuse_is_said(tmp_path: Path) -> None:
    (tmp_path / "gt").mkdir()
    with pytest.raises(NothingToDoError):
        evaluate_npz(tmp_path, tmp_path / "gt")
    with pytest.raises(UsageError, match="no folder"):
        evaluate_npz(tmp_path / "nowhere", tmp_path / "gt")


def test_the_command(tmp_path: Path) -> None:
    scan(tmp_path / "scans" / "CT_a.npz")
    npz(tmp_path / "gt" / "CT_a.npz", gts=truth_dhw(), imgs=grey())
    npz(tmp_path / "out" / "CT_a.npz", segs=np.where(truth_dhw() == 1, 1, 0).astype(np.uint8))
    words = ("evaluate", "-i", tmp_path / "out", "-gt", tmp_path / "gt", "--scans", tmp_path / "scans", "-o", tmp_path / "scores.json")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "mean over scans" in done.stdout
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["mean"]["dsc"] == 0.5
    assert [c["dsc"] for c in written["scans"][0]["classes"]] == [1.0, 0.0]
