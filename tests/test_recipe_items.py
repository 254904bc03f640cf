"""Items, chests labelled by rule, and cuts: on phantoms and small arrays."""

from __future__ import annotations

import importlib.util
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nano_models import coarse_phantoms

from seerseg.segmenters.nano import inputs
from seerseg_data.phantoms import LABELS, phantom
from seerseg_data.recipes import chest_rule, cuts, items
from seerseg_data.recipes.cuts import Cut

SPACING_MM = np.array([2.0, 1.0, 1.5])


def ramp_item(group: str = "torso", modality: str = "CT") -> items.Item:
    """A bright box with a ramp along x in it, and one label in its right half."""
    image = np.full((24, 40, 36), -1000, np.int16)
    image[4:20, 6:34, 5:31] = 20 * np.arange(26)
    labels = np.zeros(image.shape, np.uint8)
    labels[6:18, 10:30, 18:28] = 3
    return items.make_item(
        "box", image, labels, SPACING_MM, modality=modality, group=group, structures={"liver": (3,), "spleen": (9,)}, absent=("head",)
    )


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[items.Item]:
    return coarse_phantoms(tmp_path_factory.mktemp("phantoms"))


class TestItems:
    def test_the_body_box_is_in_mm_from_the_corner(self) -> None:
        item = ramp_item()
        assert item.box_mm.tolist() == [[8, 6, 7.5], [40, 34, 46.5]]
        assert item.full_mm.tolist() == [48, 40, 54]
        crop = ramp_item("hippocampus", "MR")
        assert crop.box_mm.tolist() == [[0, 0, 0], crop.full_mm.tolist()]

    def test_a_scan_of_air_has_its_whole_field_as_box(self) -> None:
        air, nothing = np.full((4, 5, 6), -1000, np.int16), np.zeros((4, 5, 6), np.uint8)
        item = items.make_item("air", air, nothing, SPACING_MM, modality="CT", group="torso", structures={}, absent=())
        assert item.box_mm.tolist() == [[0, 0, 0], [8, 5, 9]]

    def test_levels_halve_the_finer_axes_and_keep_labels(self) -> None:
        first, *others = ramp_item().levels
        assert first.image.dtype == torch.float16
        assert first.labels.shape == first.image.shape == (24, 40, 36)
        assert len(others) == 1  # an axis has fewer than 24 voxels then
        assert others[0].spacing_mm.tolist() == [4, 2, 3]
        assert others[0].image.shape == others[0].labels.shape == (12, 20, 18)
        assert torch.equal(others[0].labels, first.labels[::2, ::2, ::2])
        assert others[0].image[6, 10, 9] == first.image[12:14, 20:22, 18:20].float().mean()

    def test_unions_are_of_both_sides_and_of_the_vocabulary(self) -> None:
        made = items.with_unions({"left lung": (1,), "right lung": (2,), "left kidney": (3,), "no such thing": (4,)})
        assert made == {"left lung": (1,), "right lung": (2,), "left kidney": (3,), "lungs": (1, 2)}

    def test_bounds(self) -> None:
        mask = np.zeros((5, 6), bool)
        mask[2:4, 1:5] = True
        low, high = items.bounds(mask)
        assert (low.tolist(), high.tolist()) == ([2, 1], [4, 5])

    def test_a_phantom_in_the_cache_is_not_drawn_again(self, tmp_path: Path, phantoms: list[items.Item]) -> None:
        coarse_phantoms(tmp_path)
        changed = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert set(changed) == {"chest_900.npz", "abdomen_901.npz"}
        again = items.phantom_items(2, tmp_path, first_seed=900)
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == changed
        assert all(torch.equal(a.levels[0].image, b.levels[0].image) for a, b in zip(again, phantoms, strict=True))

    def test_every_structure_of_a_phantom_is_labelled(self, phantoms: list[items.Item]) -> None:
        assert [i.name for i in phantoms] == ["chest phantom 0", "abdomen phantom 1"]
        chest = phantoms[0].structures
        assert chest["left lung"] == (LABELS["left lung"],)
        assert set(chest["lungs"]) == {LABELS["left lung"], LABELS["right lung"]}
        assert LABELS["thoracic vertebral column"] in chest["vertebral column"]

    def test_a_folder_in_raw_layout_is_read_upright(self, tmp_path: Path) -> None:
        """Stored with x and y the other way: the item is RAS+ all the same."""
        image = np.random.default_rng(0).integers(0, 900, (10, 12, 14)).astype(np.int16)  # x, y, z
        labels = np.zeros(image.shape, np.uint8)
        labels[2:5, 3:8, 4:9] = 2
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        for name, array in (("imagesTr/a_0000", image), ("labelsTr/a", labels)):
            path = tmp_path / f"{name}.nii.gz"
            path.parent.mkdir()
            nib.save(nib.Nifti1Image(array, affine), path)
        (item,) = items.hippocampus_items(tmp_path, ["a"])
        assert np.array_equal(item.levels[0].image.numpy(), image[::-1, ::-1].transpose(2, 1, 0))
        assert np.array_equal(item.levels[0].labels.numpy(), labels[::-1, ::-1].transpose(2, 1, 0))
        assert item.structures["hippocampus"] == (1, 2)

    def test_training_and_validation_never_share_a_case(self) -> None:
        training, held = set(items.hippocampus_cases("train")), set(items.hippocampus_cases("val"))
        assert training
        assert held
        assert not training & held

    def test_without_any_data_there_are_phantoms(self, tmp_path: Path) -> None:
        (tmp_path / "phantoms").mkdir()
        coarse_phantoms(tmp_path / "phantoms", 1000)
        assert [item.name for item in items.training_items(tmp_path, None, 2)] == ["chest phantom 0", "abdomen phantom 1"]


def test_a_package_is_unpacked_and_not_installed(tmp_path: Path) -> None:
    """From a folder of wheels, by the ordinary pip; what is unpacked already is left alone."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    shelf, cache = tmp_path / "shelf", tmp_path / "cache"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tinyscans-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinyscans/scan.txt", "a scan")
        wheel.writestr("tinyscans-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyscans\nVersion: 1.2\n")
        wheel.writestr("tinyscans-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinyscans-1.2.dist-info/RECORD", "")
    items.download(cache, "tinyscans", "1.2", "--no-index", "--find-links", str(shelf))
    assert (cache / "tinyscans" / "tinyscans" / "scan.txt").read_text() == "a scan"
    assert importlib.util.find_spec("tinyscans") is None
    items.download(cache, "tinyscans", "1.2", "--no-index")  # would find nothing


def test_the_chest_rule_finds_lungs_and_spine_of_a_phantom() -> None:
    drawn = phantom("chest", 7002, spacing_zyx_mm=(6.0, 3.5, 3.5))
    found = chest_rule.chest_rule(drawn.array_zyx, np.array([6.0, 3.5, 3.5]))
    for value, name, least in ((chest_rule.RIGHT_LUNG, "right lung", 0.8), (chest_rule.LEFT_LUNG, "left lung", 0.8)):
        mask, truth = found == value, drawn.mask(name)
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > least, name
    spine = found == chest_rule.SPINE
    assert (spine & drawn.mask("thoracic vertebral column")).sum() > 0.5 * spine.sum()
    assert (found == chest_rule.RIBS).any()


class TestCuts:
    def test_at_the_scan_s_own_spacing_an_undeformed_cut_is_the_scan(self) -> None:
        image = np.random.default_rng(1).integers(-900, 900, (20, 20, 20)).astype(np.int16)
        item = items.make_item(
            "cube", image, np.zeros(image.shape, np.uint8), np.ones(3), modality="CT", group="torso", structures={}, absent=()
        )
        picked, labels = cuts.undeformed(item, Cut(np.array([10.0, 10.0, 11.0]), 1.0, (8, 8, 8)))
        assert torch.allclose(picked, torch.from_numpy(image[6:14, 6:14, 7:15].astype(np.float32)), atol=0.5)  # float16 is kept
        assert labels.dtype == torch.int64

    def test_outside_the_field_of_view_there_is_background(self) -> None:
        item = ramp_item()
        cut = Cut(item.full_mm / 2, 2.0, (40, 40, 40))
        for image, labels in (cuts.undeformed(item, cut), deform(item, cut, seed=2)):
            assert image[0, 0, 0] == inputs.AIR_HU
            assert labels[0, 0, 0] == 0
            assert (labels == 3).any()

    def test_the_field_of_view_can_be_a_part(self) -> None:
        item = ramp_item()
        cut = Cut(item.full_mm / 2, 2.0, (24, 24, 24))
        high = item.full_mm.copy()
        high[0] = 24.0
        npr, rng = np.random.default_rng(3), random.Random(3)
        image, labels = cuts.deformed(item, cut, low_mm=np.zeros(3), high_mm=high, mirrored=False, npr=npr, rng=rng)
        assert (image[20:] == inputs.AIR_HU).all()
        assert not labels[20:].any()

    def test_a_mirrored_cut_shows_the_other_side(self) -> None:
        """The label lies on the right of the box; mirrored, on the left of the cut about the same place."""
        item = ramp_item()
        centre = np.array([24.0, 20.0, 27.0])
        for mirrored in (False, True):
            _, labels = deform(item, Cut(centre, 2.0, (20, 20, 24)), seed=4, mirrored=mirrored)
            x = np.argwhere(labels.numpy() == 3)[:, 2].mean()
            assert (x < 11.5) == mirrored

    def test_frames_of_a_mirrored_scan(self) -> None:
        full = np.array([48.0, 40.0, 54.0])
        assert Cut(np.array([1.0, 2.0, 3.0]), 1.0, (4, 4, 4)).mirrored(full).centre_mm.tolist() == [1, 2, 51]
        low, high = cuts.mirrored_box(np.array([0.0, 0, 10]), np.array([5.0, 5, 20]), full)
        assert (low.tolist(), high.tolist()) == ([0, 0, 34], [5, 5, 44])

    @pytest.mark.parametrize(("modality", "group"), [("CT", "torso"), ("MR", "brain"), ("MR", "hippocampus")])
    def test_degraded_images_are_finite_and_of_their_shape(self, modality: str, group: str) -> None:
        item = ramp_item(group, modality)
        image, _ = cuts.undeformed(item, Cut(item.full_mm / 2, 2.0, (24, 20, 28)))
        told = set()
        for seed in range(40):
            out, scaling, says = cuts.degraded(image, item, 2.0, np.random.default_rng(seed), random.Random(seed))
            assert out.shape == image.shape
            assert torch.isfinite(scaling.channels(out)).all()
            told.add(says)
        assert told == ({"CT", "MR", "unknown"} if modality == "CT" else {"MR", "unknown"})

    def test_the_same_seed_is_the_same_cut(self) -> None:
        item = ramp_item()
        cut = Cut(item.full_mm / 2, 1.7, (16, 24, 16))
        one, two, other = deform(item, cut, seed=5), deform(item, cut, seed=5), deform(item, cut, seed=6)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0], other[0])

    def test_important_structures_are_chosen_more_often(self) -> None:
        rng = random.Random(0)
        drawn = [cuts.choose(["left lung", "duodenum"], rng) for _ in range(400)]
        assert 0.7 < drawn.count("left lung") / 400 < 0.9

    def test_what_the_network_takes(self) -> None:
        item = ramp_item()
        cut = Cut(item.full_mm / 2, 2.0, (24, 20, 28))
        image, _ = cuts.undeformed(item, cut)
        stacked, conditions = cuts.network_input(image, item.scaling, "CT", cut, *item.box_mm)
        assert stacked.shape == (5, 24, 20, 28)
        assert conditions.shape == (8,)
        _, other = cuts.network_input(image, item.scaling, "unknown", cut, *item.box_mm)
        assert conditions.tolist() != other.tolist()


def deform(item: items.Item, cut: Cut, *, seed: int, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    npr, rng = np.random.default_rng(seed), random.Random(seed)
    return cuts.deformed(item, cut, low_mm=np.zeros(3), high_mm=item.full_mm, mirrored=mirrored, npr=npr, rng=rng)


def test_items_do_not_change() -> None:
    item = ramp_item()
    with pytest.raises(AttributeError):
        item.weight = 2.0  # type: ignore[misc]
    assert replace(item, weight=2.0).levels is item.levels
