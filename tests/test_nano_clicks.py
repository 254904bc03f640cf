"""The click network of `nano`: an untrained one for shapes, crops and faults, the shipped weights for what it has learnt."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano_models import SMALL, chest_phantom, dice, shipped_segmenter, untrained_segmenter, volume_of
from segmenter_contract import SegmenterContract, blob, scene, spatial_prompts

from seerseg.errors import SegmenterError, WeightsError
from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.segmenters.base import Segmenter
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.segmenters.nano import load, refining
from seerseg.segmenters.nano.clicks import ClickConfig, ClickNetwork, encoder_digest, load_clicks, prompt_channels
from seerseg.segmenters.nano.inference import look
from seerseg.segmenters.nano.network import NanoNetwork
from seerseg.segmenters.nano.segmenter import SHIPPED_CLICKS, NanoSegmenter
from seerseg.volume import Grid, Mask, Volume, read_labels, read_volume
from seerseg_data.phantoms import Phantom
from seerseg_data.trajectories import Expert, demonstrate, error_points

SMALL_CLICKS = ClickConfig(channels=(8, 8, 16, 16), features=SMALL.channels[:4])
needs_weights = pytest.mark.skipif(
    not (SHIPPED_CLICKS / "model.safetensors").is_file(), reason="the shipped click weights are not in this checkout"
)


@pytest.fixture(scope="module")
def untrained() -> NanoSegmenter:
    return untrained_segmenter("liver", clicks=ClickNetwork(SMALL_CLICKS))


@pytest.fixture(scope="module")
def shipped() -> NanoSegmenter:
    return shipped_segmenter()


@pytest.fixture(scope="module")
def chest() -> Phantom:
    return chest_phantom()


class TestChannels:
    GRID = Grid((8, 10, 12), np.diag([2.0, 2.0, 2.0, 1.0]))

    def test_a_click_is_a_blob_of_height_one_on_its_own_channel(self) -> None:
        out = prompt_channels(
            self.GRID, self.GRID, boxes=(), points=(Point((2, 3, 4)), Point((5, 5, 5), positive=False)), before=None
        ).numpy()
        assert np.unravel_index(out[0].argmax(), out[0].shape) == (2, 3, 4)
        assert np.unravel_index(out[1].argmax(), out[1].shape) == (5, 5, 5)
        assert out[0].max() == out[1].max() == 1
        assert not out[2:].any()

    def test_a_box_speaks_of_its_slice_alone_and_a_3d_box_of_all(self) -> None:
        flat = prompt_channels(self.GRID, self.GRID, boxes=(Box2D(0, 3, (2, 4), (6, 9)),), points=(), before=None).numpy()[2]
        assert (flat[3, 2:6, 4:9] == 1).all()
        assert (flat[3] == 1).sum() == 20
        assert (flat[3] == -1).sum() == 100
        assert not np.delete(flat, 3, axis=0).any()
        deep = prompt_channels(self.GRID, self.GRID, boxes=(Box3D((1, 2, 3), (4, 5, 6)),), points=(), before=None).numpy()[2]
        assert (deep[1:4, 2:5, 3:6] == 1).all()
        assert (deep == 1).sum() == 27
        assert (deep == -1).sum() == deep.size - 27

    def test_boxes_and_clicks_keep_their_place_on_another_grid(self) -> None:
        """A slice of 6 mm covers three voxels of a crop at 2 mm; edges lie at lo - 1/2."""
        thick = Grid((4, 10, 12), np.array([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 6, 2], [0, 0, 0, 1]]))
        crop = Grid((12, 10, 12), np.diag([2.0, 2.0, 2.0, 1.0]))
        out = prompt_channels(crop, thick, boxes=(Box2D(0, 1, (2, 4), (6, 9)),), points=(Point((2, 3, 4)),), before=None).numpy()
        assert np.flatnonzero((out[2] == 1).any(axis=(1, 2))).tolist() == [3, 4, 5]
        assert (out[2][4, 2:6, 4:9] == 1).all()
        assert np.unravel_index(out[0].argmax(), out[0].shape) == (7, 3, 4)

    def test_a_box_smaller_than_a_voxel_of_the_crop_still_marks_one(self) -> None:
        fine = Grid((60, 60, 60), np.diag([0.5, 0.5, 0.5, 1.0]))
        coarse = Grid((8, 8, 8), np.diag([4.0, 4.0, 4.0, 1.0]))
        out = prompt_channels(
            coarse, fine, boxes=(Box2D(0, 21, (20, 20), (22, 22)), Box3D((9, 9, 9), (10, 10, 10))), points=(), before=None
        )
        assert (out[2] == 1).sum() >= 2

    def test_a_slice_halfway_between_voxels_of_the_crop_marks_both(self) -> None:
        step = 1.3810416666666665
        crop = Grid((32, 48, 32), np.array([[step, 0, 0, 0], [0, step, 0, 0], [0, 0, step, 20 - 15.5 * step], [0, 0, 0, 1]]))
        fine = Grid((40, 60, 40), np.eye(4))
        out = prompt_channels(crop, fine, boxes=(Box2D(0, 20, (10, 10), (30, 30)),), points=(), before=None).numpy()[2]
        assert np.flatnonzero((out == 1).any(axis=(1, 2))).tolist() == [15, 16]

    def test_the_mask_before_runs_from_minus_one_to_one(self) -> None:
        before = np.zeros(self.GRID.shape_zyx, np.float32)
        before[2] = 1
        out = prompt_channels(self.GRID, self.GRID, boxes=(), points=(), before=before)[3]
        assert sorted(np.unique(out.numpy())) == [-1, 1]


class TestCrops:
    @settings(max_examples=60)
    @given(
        st.tuples(*[st.integers(2, 60)] * 3),
        st.tuples(*[st.floats(0.4, 7.0)] * 3),
        st.tuples(*[st.floats(0, 0.9)] * 3),
        st.floats(0.02, 1.0),
    )
    def test_a_crop_holds_what_is_pointed_at(
        self, shape: tuple[int, int, int], spacing: tuple[float, float, float], start: tuple[float, float, float], share: float
    ) -> None:
        affine = np.diag([*spacing[::-1], 1.0])
        affine[:3, 3] = (-30, 12, 400)
        volume = Volume(np.zeros(shape, np.int16), Grid(shape, affine), "CT")
        size = np.array(shape) * spacing
        low = affine[:3, 3][::-1] + np.array(start) * size
        high = low + np.maximum(share * (1 - np.array(start)) * size, 0.1)
        step, grid = refining.crop_grid(look(volume), low, high)
        assert set(grid.shape_zyx) <= set(refining.SIDES)
        assert grid.spacing_zyx == pytest.approx((step, step, step))
        origin = grid.affine[:3, 3][::-1]
        assert (origin - step / 2 <= low + 1e-6).all()
        assert (origin + (np.array(grid.shape_zyx) - 0.5) * step >= high - 1e-6).all()

    def test_at_the_scan_s_own_spacing_voxels_coincide(self) -> None:
        grid = Grid((40, 40, 40), np.array([[1.0, 0, 0, -7.3], [0, 1.0, 0, 4.1], [0, 0, 1.0, 99.9], [0, 0, 0, 1]]))
        volume = Volume(np.zeros(grid.shape_zyx, np.int16), grid, "MR")
        _, crop = refining.crop_grid(look(volume), np.array([110.0, 10.0, 2.0]), np.array([125.0, 30.0, 12.0]))
        offset = grid.to_voxel(crop.to_world(np.zeros(3)))
        assert np.allclose(offset, np.round(offset), atol=1e-6)


class TestEdits:
    SPACING = (2.0, 1.0, 1.0)

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """What was drawn reaches farther than the mask before, along x and y."""
        before, drawn = np.zeros((2, 20, 60, 60), dtype=bool)
        before[5:15, 10:40, 10:20] = True
        drawn[5:15, 12:58, 10:50] = True
        return before, drawn

    def test_a_click_changes_its_surroundings_alone(self) -> None:
        before, drawn = self.masks()
        out = refining.edited(before, drawn, (Point((10, 20, 22)),), self.SPACING)
        assert out[10, 20, 20:28].all()
        assert not out[:, 40:].any()  # drawn there, but far from the click
        assert not out[:, :, 40:].any()

    def test_a_positive_click_takes_nothing_away_and_a_negative_one_adds_nothing(self) -> None:
        before, drawn = self.masks()
        more = refining.edited(before, drawn, (Point((10, 20, 22)),), self.SPACING)
        assert (more & before).sum() == before.sum()
        less = refining.edited(before, drawn, (Point((10, 11, 15), positive=False),), self.SPACING)
        assert not (less & ~before).any()
        assert not less[10, 11, 15]
        assert less.sum() < before.sum()

    def test_the_ball_up_to_the_edge_follows_the_click_whatever_is_drawn(self) -> None:
        before, _ = self.masks()
        more = refining.edited(before, before, (Point((10, 20, 23)),), self.SPACING)
        reach = int(4 * refining.BALL)  # x = 19 is the edge
        assert more[10, 20, 20 : 24 + reach].all()
        assert not more[10, 20, 24 + reach]
        assert more[10, 16, 23]
        less = refining.edited(before, before, (Point((10, 20, 12), positive=False),), self.SPACING)
        assert not less[10, 20, 10:16].any()
        assert less[10, 20, 16]

    def test_beside_a_box_a_click_adds_all_that_was_drawn_and_still_takes_nothing_away(self) -> None:
        before, drawn = self.masks()
        out = refining.edited(before, drawn, (Point((10, 20, 22)),), self.SPACING, everywhere=True)
        ball = out & ~(before | drawn)
        assert (out & (before | drawn)).sum() == (before | drawn).sum()
        assert not ball.any()  # the ball of this click lies within what was drawn
        less = refining.edited(before, drawn, (Point((10, 11, 15), positive=False),), self.SPACING, everywhere=True)
        assert not (less & ~drawn).any()
        assert (less <= before).all()

    def test_clicks_that_are_obeyed_already_leave_what_is_drawn(self) -> None:
        before, drawn = self.masks()
        assert refining.edited(before, drawn, (Point((10, 20, 15)), Point((1, 1, 1), positive=False)), self.SPACING) is drawn


class TestSeam:
    """What holds whatever the weights."""

    def test_it_takes_every_kind(self, untrained: NanoSegmenter) -> None:
        assert set(untrained.capabilities.kinds) == {"text", "class", "box2d", "box3d", "points", "mask"}
        assert untrained.capabilities.session

    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            (Prompt(), "empty|needs words"),
            (Prompt(boxes=(Box2D(0, 2, (5, 5), (5, 9)),)), "holds no voxel"),
            (Prompt(boxes=(Box3D((3, 3, 3), (3, 6, 6)),)), "holds no voxel"),
            (Prompt(boxes=(Box3D((6, 6, 6), (3, 3, 3)),)), "holds no voxel"),
            (Prompt(boxes=(Box2D(0, 99, (1, 1), (5, 5)),)), "slice 99"),
            (Prompt(points=(Point((0, 0, 40)),)), "outside the scan"),
            (Prompt(points=(Point((float("nan"), 0, 0)),)), "outside the scan"),
            (Prompt(text="liver", points=(Point((0, 0, 40)),)), "outside the scan"),
            (Prompt(points=(Point((1, 1, 1), positive=False),)), "Negative points alone"),
        ],
    )
    def test_bad_prompts_get_a_sentence(self, untrained: NanoSegmenter, prompt: Prompt, words: str) -> None:
        found = untrained.segment(scene(), [prompt])[0]
        assert found.status == "unsupported"
        assert found.mask is None
        assert found.message.endswith(".")
        assert re.search(words, found.message), found.message

    def test_an_empty_mask_and_one_on_another_grid_are_refused(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        empty = untrained.segment(volume, [Prompt(mask=Mask(np.zeros(volume.grid.shape_zyx, bool), volume.grid))])[0]
        assert empty.status == "unsupported"
        assert "mask is empty" in empty.message
        other = Grid(volume.grid.shape_zyx, np.diag([3.0, 3.0, 3.0, 1.0]))
        assert "another grid" in untrained.segment(volume, [Prompt(mask=Mask(blob(), other))])[0].message

    def test_clicks_are_obeyed_to_the_voxel(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        points = (Point((9, 16, 12)), Point((9, 17, 12), positive=False), Point((3.4, 30.4, 38.6)))
        found = untrained.segment(volume, [Prompt(points=points)])[0]
        assert found.mask is not None
        assert found.mask.array[9, 16, 12]
        assert not found.mask.array[9, 17, 12]
        assert found.mask.array[3, 30, 39]

    def test_a_single_slice_takes_boxes_but_no_words(self, untrained: NanoSegmenter) -> None:
        for shape, axis in (((1, 40, 44), 0), ((24, 1, 30), 1), ((24, 30, 1), 2)):
            volume = scene(shape=shape)
            box = Box2D(axis, 0, (5.0, 5.0), (15.0, 20.0))
            worded, boxed, both, clicked = untrained.segment(
                volume,
                [Prompt(text="liver"), Prompt(boxes=(box,)), Prompt(text="liver", boxes=(box,)), Prompt(points=(Point((0, 0, 0)),))],
            )
            assert worded.status == "unsupported"
            assert boxed.mask is not None
            assert boxed.mask.array.shape == shape
            assert both.mask is not None
            assert np.array_equal(boxed.mask.array, both.mask.array)
            assert "single slice" in both.message
            assert clicked.mask is not None
            assert clicked.mask.array[0, 0, 0]

    def test_words_with_a_box_start_from_what_the_words_find(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        box = Prompt(text="liver", boxes=(Box3D((2, 6, 3), (16, 26, 21)),))
        worded, refined = untrained.segment(volume, [Prompt(text="liver"), box])
        assert worded.status == "ok"
        assert worded.mask is not None
        by_hand = untrained.segment(volume, [replace(box, mask=worded.mask)])[0]
        assert refined.mask is not None
        assert by_hand.mask is not None
        assert np.array_equal(refined.mask.array, by_hand.mask.array)
        assert refined.presence == worded.presence
        assert by_hand.message == "", "the scan fits one view, so words count beside a mask"
        large = scene("anisotropic")
        mask = Mask(np.ascontiguousarray(worded.mask.array), large.grid)
        assert "words were not read" in untrained.segment(large, [replace(box, mask=mask)])[0].message

    def test_on_a_scan_that_fits_one_view_words_count_in_every_turn(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        session = untrained.session(volume)
        first = session.add(Prompt(text="liver"))
        assert first.mask is not None
        found = np.argwhere(first.mask.array)
        low, high = found.min(0), found.max(0) + 1
        click = Point(tuple(float(v) for v in np.argwhere(~first.mask.array)[200]))
        second = session.add(Prompt(boxes=(Box3D(tuple(map(float, low)), tuple(map(float, high))),), points=(click,)))
        assert second.prompt.text == "liver"
        assert second.prompt.mask is first.mask
        third = session.add(Prompt(points=(Point((1, 1, 1), positive=False),)))
        alone = untrained.segment(volume, [third.prompt])[0]
        without = untrained.segment(volume, [replace(third.prompt, text=None)])[0]
        assert third.mask is not None
        assert alone.mask is not None
        assert without.mask is not None
        assert dice(alone.mask.array, third.mask.array) > 0.9  # a session keeps its crop
        assert not np.array_equal(alone.mask.array, without.mask.array)

    def test_words_that_mean_something_else_than_is_pointed_at_do_not_count(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        worded = untrained.segment(volume, [Prompt(text="liver")])[0].mask
        assert worded is not None
        box = Box3D((2.0, 6.0, 3.0), (5.0, 9.0, 6.0))
        mask = np.zeros(volume.grid.shape_zyx, bool)
        mask[2:5, 6:9, 3:6] = True
        mask &= ~worded.array | (np.indices(mask.shape).sum(0) % 2 == 0)
        prompt = Prompt(text="liver", boxes=(box,), mask=Mask(mask, volume.grid))
        with_words, without = untrained.segment(volume, [prompt, replace(prompt, text=None)])
        assert with_words.mask is not None
        assert without.mask is not None
        assert np.array_equal(with_words.mask.array, without.mask.array)

    @pytest.mark.parametrize(
        ("words", "mirrored"),
        [("left lung", "right lung"), ("rt Kidney", "left kidney"), ("liver", "liver"), ("both lungs", "both lungs")],
    )
    def test_words_for_the_mirrored_scan_name_the_other_side(self, words: str, mirrored: str) -> None:
        assert refining._other_side(words) == mirrored

    def test_a_session_counts_all_clicks_and_forgets_what_is_undone(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        session = untrained.session(volume)
        first = session.add(Prompt(boxes=(Box2D(0, 9, (7, 4), (26, 21)),)))
        second = session.add(Prompt(points=(Point((9, 16, 12)),)))
        third = session.add(Prompt(points=(Point((1, 1, 1), positive=False),)))
        assert third.prompt.points == (Point((9, 16, 12)), Point((1, 1, 1), positive=False))
        assert third.prompt.boxes == first.prompt.boxes
        assert third.prompt.mask is second.mask
        refused = session.add(Prompt(points=(Point((99, 1, 1)),)))
        assert refused.status == "unsupported"
        assert session.undo() is second
        corrected = session.add(Prompt(points=(Point((9, 16, 12), positive=False),)))
        assert corrected.prompt.points == (Point((9, 16, 12), positive=False),)
        anew = session.add(Prompt(text="liver"))
        assert anew.prompt.points == ()
        session.close()
        with pytest.raises(SegmenterError, match="closed"):
            session.add(Prompt(text="liver"))

    def test_a_session_encodes_a_crop_that_still_fits_once(self, untrained: NanoSegmenter) -> None:
        volume = scene()
        with torch.no_grad():
            assert untrained._clicks is not None
            desk = refining.Desk(untrained._network, untrained._clicks, untrained._embedded_vocabulary()[1], volume, reuse=True)
            mask = np.zeros(volume.grid.shape_zyx, bool)
            mask[6:12, 12:20, 8:16] = True
            before = Mask(mask, volume.grid)
            scan = look(volume)
            crop = desk._crop(scan, np.array([310.0, 40, -30]), np.array([322.0, 52, -18]))
            assert desk._crop(scan, np.array([311.0, 41, -29]), np.array([321.0, 51, -19])) is crop
            assert desk._crop(scan, np.array([305.0, 30, -38]), np.array([335.0, 72, 10])) is not crop
            assert desk.draw(Prompt(mask=before)).shape == volume.grid.shape_zyx

    def test_without_click_weights_it_says_so(self) -> None:
        plain = NanoSegmenter(NanoNetwork(SMALL), {"liver": {}})
        assert plain.capabilities.kinds == ("text", "class")
        assert "text only" in plain.segment(scene(), [Prompt(points=(Point((1, 1, 1)),))])[0].message
        with pytest.raises(SegmenterError, match="text only"):
            plain.session(scene())


@needs_weights
class TestWeights:
    def test_they_are_small_and_documented(self) -> None:
        assert (SHIPPED_CLICKS / "model.safetensors").stat().st_size < 5_000_000
        card = (SHIPPED_CLICKS / "MODEL_CARD.md").read_text()
        assert all(word in card for word in ("licence", "Not for clinical use", "train_nano_clicks.py", "splits/hippocampus.json"))

    def test_other_text_weights_do_not_get_them(self, tmp_path: Path, shipped: NanoSegmenter) -> None:
        assert load_clicks(SHIPPED_CLICKS, encoder_digest(NanoNetwork(SMALL))) is None
        assert load_clicks(tmp_path, encoder_digest(shipped._network)) is None
        assert load_clicks(SHIPPED_CLICKS, encoder_digest(shipped._network)) is not None

    @pytest.mark.parametrize("damage", ["cut", "missing", "bad json", "schema", "field"])
    def test_damaged_weights_are_refused_with_a_sentence(self, tmp_path: Path, shipped: NanoSegmenter, damage: str) -> None:
        folder = tmp_path / "clicks"
        shutil.copytree(SHIPPED_CLICKS, folder)
        file, config = folder / "model.safetensors", folder / "config.json"
        data = json.loads(config.read_text())
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "missing":
            file.unlink()
        elif damage == "bad json":
            config.write_text("{")
        elif damage == "schema":
            config.write_text(json.dumps({**data, "schema": 99}))
        else:
            config.write_text(json.dumps({**data, "network": {"colour": [1]}}))
        with pytest.raises(WeightsError, match=r"[.]$"):
            load_clicks(folder, encoder_digest(shipped._network))


@needs_weights
class TestShippedContract(SegmenterContract):
    """Behind the cache; bare it is in test_segmenter_contract.py."""

    texts = ("the lft lung",)
    examples = 4

    @pytest.fixture(scope="class")
    @classmethod
    def segmenter(cls) -> Segmenter:
        return CachedSegmenter(load())


@needs_weights
class TestLearnt:
    @pytest.mark.parametrize("kind", ["plain", "oblique", "anisotropic", "sheared"])
    def test_boxes_find_the_ellipsoid_in_every_orientation(self, shipped: NanoSegmenter, kind: str) -> None:
        volume = scene(kind)
        for name, prompt in spatial_prompts(volume).items():
            found = shipped.segment(volume, [prompt])[0]
            assert found.mask is not None
            # one slice of 6 mm tells little of the rest, one click says where and not how large
            assert dice(found.mask.array, blob()) > {"mask": 0.5, "points": 0.6}.get(name, 0.95), name

    def test_the_same_scan_stored_another_way_gives_the_same_mask(self, shipped: NanoSegmenter) -> None:
        """Axes reversed in array and affine: the same patient, so the same mask in world space."""
        volume = scene()
        prompt = spatial_prompts(volume)["box2d"]
        one = shipped.segment(volume, [prompt])[0].mask
        affine = volume.grid.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (volume.grid.shape_zyx[2] - 1)
        affine[:3, 0] *= -1
        n = volume.grid.shape_zyx[2]
        box = prompt.boxes[0]
        assert isinstance(box, Box2D)
        stored = Volume(np.ascontiguousarray(volume.array[:, :, ::-1]), Grid(volume.grid.shape_zyx, affine), "CT")
        twin = Prompt(boxes=(Box2D(0, box.index, (box.lo[0], n - box.hi[1]), (box.hi[0], n - box.lo[1])),))
        other = shipped.segment(stored, [twin])[0].mask
        assert one is not None
        assert other is not None
        assert dice(one.array, other.array[:, :, ::-1]) > 0.97

    def test_a_box_on_the_left_lung_is_drawn_on_the_left(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        volume, truth = volume_of(chest), chest.mask("left lung")
        k = int(truth.sum(axis=(1, 2)).argmax())
        rows, columns = np.flatnonzero(truth[k].any(1)), np.flatnonzero(truth[k].any(0))
        box = Box2D(0, k, (float(rows[0]), float(columns[0])), (float(rows[-1] + 1), float(columns[-1] + 1)))
        found = shipped.segment(volume, [Prompt(boxes=(box,))])[0]
        assert found.mask is not None
        assert dice(found.mask.array, truth) > 0.8
        assert (found.mask.array & chest.mask("right lung")).sum() < 0.05 * found.mask.array.sum()

    def test_on_a_real_scan_words_box_and_clicks_are_better_than_words(self, shipped: NanoSegmenter) -> None:
        """A validation case; the simulated expert's first two clicks."""
        folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "mr_hippocampus"
        if not folder.is_dir():
            pytest.skip("the MSD hippocampus scans are not beside this checkout")
        volume = read_volume(folder / "imagesTr" / "hippocampus_161_0000.nii.gz", modality="MR")
        labels, _ = read_labels(folder / "labelsTr" / "hippocampus_161.nii.gz", like=volume.grid)
        for value, words in ((1, "anterior hippocampus"), (2, "posterior hippocampus")):
            truth = labels == value
            key = int(truth.sum((1, 2)).argmax())
            rows, columns = (np.flatnonzero(truth[key].any(axis)) for axis in (1, 0))
            box = Box2D(0, key, (float(rows[0]), float(columns[0])), (float(rows[-1] + 1), float(columns[-1] + 1)))
            session = shipped.session(volume)
            alone = session.add(Prompt(text=words)).mask
            found = session.add(Prompt(text=words, boxes=(box,))).mask
            assert alone is not None
            for _ in range(2):
                assert found is not None
                (at, positive), *_ = error_points(found.array, truth, volume.grid.spacing_zyx)
                found = session.add(Prompt(points=(Point(tuple(map(float, at)), positive),))).mask
            assert found is not None
            assert dice(found.array, truth) > dice(alone.array, truth), words

    def test_clicks_raise_dice_on_a_phantom(self, shipped: NanoSegmenter, chest: Phantom) -> None:
        """The simulated expert, every click kept whatever it does: five turns on two structures that are not seen in one look."""
        gains = []
        for name in ("heart", "liver"):
            shown = demonstrate(
                volume_of(chest),
                chest.mask(name),
                shipped,
                axis=0,
                rng=np.random.default_rng(0),
                expert=Expert(imperfect=0.0, most_prompts=5, least_gain=-1.0, tries=1),
            )
            gains.append(shown.turns[-1].dice - shown.start)
            assert shown.turns[-1].dice > 0.6, name
        assert np.mean(gains) > 0
