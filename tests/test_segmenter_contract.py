"""The contract on every segmenter that ships, bare and behind the cache; a case each for what is said beyond it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from segmenter_contract import SegmenterContract

from seerseg.errors import ModelError, SegmenterError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.segmenters import load_segmenter
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.volume import Grid, Mask, Volume, read_labels, read_volume


class TestScripted(SegmenterContract):
    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return ScriptedSegmenter(
            {"bright": lambda volume, prompt: volume.array > 100, "dark": lambda volume, prompt: None}, presence={"bright": 0.8}
        )


class TestCachedScripted(TestScripted):
    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return CachedSegmenter(ScriptedSegmenter({"bright": lambda volume, prompt: volume.array > 100}))


class TestGrow(SegmenterContract):
    examples = 60

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return load_segmenter("grow")


class TestNano(SegmenterContract):
    texts = ("the lft lung", "LV")
    examples = 4

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        try:
            return load_segmenter("nano")
        except (ImportError, ModelError) as fault:
            pytest.skip(f"the nano weights are not here: {fault}")


# ------------------------------------------------------------------------------------------------------------- beyond it


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def _two_balls(spacing: tuple[float, float, float] = (2.0, 1.5, 1.5)) -> tuple[Volume, np.ndarray, np.ndarray]:
    """Two balls of one brightness joined by a thin bridge, in a noisy background."""
    shape = (30, 40, 70)
    z, y, x = np.ogrid[:30, :40, :70]
    first, second = (((z - 15) * 2) ** 2 + ((y - 20) * 1.5) ** 2 + ((x - c) * 1.5) ** 2 <= 16**2 for c in (18, 50))
    bridge = (abs(z - 15) <= 1) & (abs(y - 20) <= 1) & (x > 18) & (x < 50)
    array = np.where(first | second | bridge, 100.0, 0.0) + np.random.default_rng(3).normal(0, 10, shape)
    return Volume(array.astype(np.float32), Grid(shape, np.diag([*spacing[::-1], 1.0])), modality="MR"), first, second


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grow_follows_a_box_across_any_axis_and_stops_at_its_ends(axis: int) -> None:
    volume, first, _ = _two_balls()
    index = (15, 20, 18)[axis]
    section = np.take(first, index, axis=axis)
    rows, columns = np.flatnonzero(section.any(1)), np.flatnonzero(section.any(0))
    box = Box2D(axis, index, (rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1))
    found = load_segmenter("grow").segment(volume, [Prompt(boxes=(box,))])[0]
    assert found.mask is not None
    assert _dice(found.mask.array, first) > 0.9


def test_grow_grows_each_box_by_itself_and_unites() -> None:
    volume, first, second = _two_balls()
    boxes = tuple(Box2D(0, 15, (10, c - 10), (31, c + 11)) for c in (18, 50))
    segmenter = load_segmenter("grow")
    both = segmenter.segment(volume, [Prompt(boxes=boxes)])[0].mask
    single = [segmenter.segment(volume, [Prompt(boxes=(box,))])[0].mask for box in boxes]
    assert both is not None
    assert single[0] is not None
    assert single[1] is not None
    assert (both.array == (single[0].array | single[1].array)).all()
    assert _dice(both.array, first | second) > 0.9


def test_grow_carves_what_a_negative_point_is_in_and_adds_what_a_positive_one_is_in() -> None:
    volume, first, second = _two_balls()
    segmenter = load_segmenter("grow")
    both = Mask(first | second, volume.grid)
    carved = segmenter.segment(volume, [Prompt(mask=both, points=(Point((15, 20, 50), positive=False),))])[0].mask
    assert carved is not None
    assert _dice(carved.array, first) > 0.9
    added = segmenter.segment(volume, [Prompt(mask=Mask(first, volume.grid), points=(Point((15, 20, 50)),))])[0].mask
    assert added is not None
    assert _dice(added.array, first | second) > 0.85


def test_grow_says_why_nothing_came() -> None:
    volume, _, _ = _two_balls()
    flat = Volume(np.zeros_like(volume.array), volume.grid)
    segmenter = load_segmenter("grow")
    found = segmenter.segment(flat, [Prompt(boxes=(Box2D(0, 15, (10, 10), (20, 20)),))])[0]
    assert found.status == "empty"
    assert "Nothing stands out" in found.message
    found = segmenter.segment(volume, [Prompt(points=(Point((1, 1, 1), positive=False),))])[0]
    assert found.status == "unsupported"
    assert "add a positive point" in found.message
    found = segmenter.segment(volume, [Prompt(mask=Mask(np.zeros_like(flat.array, dtype=bool), volume.grid))])[0]
    assert found.status == "unsupported"
    with pytest.raises(SegmenterError, match="takes no source"):
        load_segmenter("grow:weights")


def test_grow_does_not_depend_on_the_unit_of_intensity() -> None:
    volume, first, _ = _two_balls()
    prompt = Prompt(boxes=(Box2D(0, 15, (10, 8), (31, 29)),))
    for scale, shift in ((1.0, 0.0), (-1.0, 50.0), (1e-4, 0.0), (200.0, -1e4)):
        other = Volume(volume.array * np.float32(scale) + np.float32(shift), volume.grid)
        found = load_segmenter("grow").segment(other, [prompt])[0].mask
        assert found is not None
        assert _dice(found.array, first) > 0.9


@pytest.mark.parametrize("name", ["scripted", "grow"])
def test_a_scan_stored_lps_gives_the_same_mask_in_world_space(tmp_path: Path, name: str) -> None:
    import nibabel

    volume, first, _ = _two_balls()
    stored = nibabel.Nifti1Image(volume.array.transpose(2, 1, 0), volume.grid.affine)
    nibabel.save(stored, tmp_path / "ras.nii.gz")
    codes = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    nibabel.save(stored.as_reoriented(codes), tmp_path / "lps.nii.gz")
    segmenter = ScriptedSegmenter({"a": first}) if name == "scripted" else load_segmenter("grow")
    masks = []
    for path in ("ras.nii.gz", "lps.nii.gz"):
        scan = read_volume(tmp_path / path)
        masks.append(segmenter.segment(scan, [Prompt(boxes=(Box2D(0, 15, (10, 8), (31, 29)),))])[0].mask)
    assert masks[0] is not None
    assert masks[1] is not None
    assert (masks[0].array == masks[1].array).all()
    assert masks[0].grid.close_to(masks[1].grid)


def test_grow_on_a_real_ct(development_data: Path) -> None:
    folder = development_data / "ct_torso"
    volume = read_volume(folder / "image.nii.gz")
    labels, _ = read_labels(folder / "label.nii.gz", like=volume.grid)
    for value, least in ((1, 0.8), (3, 0.65), (4, 0.8)):  # spleen, left kidney, gallbladder
        truth = labels == value
        index = int(truth.sum((1, 2)).argmax())
        rows, columns = np.flatnonzero(truth[index].any(1)), np.flatnonzero(truth[index].any(0))
        box = Box2D(0, index, (rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1))
        found = load_segmenter("grow").segment(volume, [Prompt(boxes=(box,))])[0].mask
        assert found is not None
        assert _dice(found.array, truth) >= least
