"""What the text and the click network learn from: views with questions, crops with a simulated user; on small phantoms."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nano_models import coarse_phantoms

from seerseg.prompts import Box2D, Box3D
from seerseg.segmenters.nano.network import side_of
from seerseg_data.nano_vocabulary import CANONICAL
from seerseg_data.recipes import clicking, items, text_views


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[items.Item]:
    return coarse_phantoms(tmp_path_factory.mktemp("phantoms"))


def crop_item() -> items.Item:
    """Two touching ellipsoids, as the parts of a hippocampus crop."""
    z, y, x = np.indices((36, 50, 36))
    labels = np.zeros((36, 50, 36), np.uint8)
    labels[((z - 18) / 7) ** 2 + ((y - 20) / 9) ** 2 + ((x - 18) / 6) ** 2 < 1] = 2
    labels[((z - 18) / 7) ** 2 + ((y - 34) / 7) ** 2 + ((x - 18) / 6) ** 2 < 1] = 1
    image = (100 + 200 * (labels > 0) + np.random.default_rng(0).normal(0, 20, labels.shape)).astype(np.int16)
    structures = {"anterior hippocampus": (1,), "posterior hippocampus": (2,), "hippocampus": (1, 2)}
    return items.make_item(
        "crop", image, labels, np.ones(3), modality="MR", group="hippocampus", structures=structures, absent=("chest",), mirror=0.5
    )


class TestTextViews:
    @pytest.mark.parametrize("kind", ["fine", "coarse", "hippocampus"])
    def test_shapes_and_what_is_asked(self, phantoms: list[items.Item], kind: str) -> None:
        item = crop_item() if kind == "hippocampus" else phantoms[0]
        rng = random.Random(0)
        for _ in range(4):
            view = text_views.make_view(item, kind, rng)
            shape = view.image.shape[1:]
            assert view.image.shape[0] == 5
            assert all(n % 16 == 0 and 32 <= n <= 80 for n in shape)
            assert view.conditions.shape == (8,)
            assert view.truth.shape == (len(view.texts), *shape)
            assert torch.isfinite(view.image).all()
            filled = view.truth.flatten(1).sum(1)
            assert ((filled >= 25) == (view.presence == 1)).all(), "present: 25 voxels at least; absent: none"
            assert (filled[view.presence == 0] == 0).all()
            assert view.half_truth.shape == (len(view.half_texts), *(n // 2 for n in shape))
            assert view.half_truth.max() <= 8

    def test_a_mirrored_scan_is_asked_with_sides_exchanged(self) -> None:
        """All of the left half is the left lung; mirrored, it is on the right of the picture, and still called right."""
        labels = np.zeros((32, 32, 32), np.uint8)
        labels[:, :, :16] = 1  # low x: the patient's left
        image = np.where(labels > 0, -800, 40).astype(np.int16)
        item = items.make_item(
            "half", image, labels, np.full(3, 4.0), modality="CT", group="torso", structures={"left lung": (1,)}, absent=(), mirror=1.0
        )
        view = text_views.make_view(item, "coarse", random.Random(1))
        named = [text for text, there in zip(view.texts, view.presence, strict=True) if there]
        assert [side_of(text) for text in named] == [2]
        x = np.argwhere(view.truth[0].numpy())[:, 2].mean()
        assert x > view.truth.shape[3] / 2

    def test_a_plain_view_is_the_whole_body_with_its_labels(self, phantoms: list[items.Item]) -> None:
        view, labels = text_views.plain_view(phantoms[0])
        assert view.image.shape[1:] == labels.shape
        assert set(np.unique(labels)) <= set(np.unique(phantoms[0].levels[0].labels))
        assert (labels > 0).float().mean() > 0.1
        assert not view.texts

    def test_a_stream_repeats_itself_and_keeps_the_chances(self, phantoms: list[items.Item]) -> None:
        chances = {"fine": 1.0, "coarse": 0.0, "hippocampus": 3.0}
        scans = [*phantoms, crop_item()]
        one, two = (list(islice(text_views.Stream(scans, seed=3, chances=chances, plain=0.5), 5)) for _ in range(2))
        kinds = [kind for kind, _ in one]
        assert "coarse" not in kinds
        assert kinds.count("hippocampus") > 1
        for (_, a), (_, b) in zip(one, two, strict=True):
            assert len(a) == 2
            assert all(torch.equal(x.image, y.image) and x.texts == y.texts for x, y in zip(a, b, strict=True))

    def test_without_crops_no_crops_are_asked_for(self, phantoms: list[items.Item]) -> None:
        chances = {"coarse": 0.2, "hippocampus": 0.8}
        assert {kind for kind, _ in islice(text_views.Stream(phantoms, seed=0, chances=chances, plain=0.0), 2)} == {"coarse"}

    def test_text_batches(self) -> None:
        texts, classes = text_views.text_batch(200, random.Random(0))
        assert len(texts) == len(classes) == 200
        assert 0 <= int(classes.min())
        assert int(classes.max()) == len(CANONICAL), "words without meaning are a class of their own"


class TestCrops:
    def test_every_crop_holds_its_target(self, phantoms: list[items.Item]) -> None:
        pools = {"hippocampus": [crop_item()], "torso": phantoms}
        rng = random.Random(0)
        for _ in range(6):
            pair = clicking.draw_pair(pools, rng)
            assert pair[0].image.shape == pair[1].image.shape
            for crop in pair:
                assert crop.image.shape == (5, *crop.target.shape)
                assert tuple(sorted(crop.target.shape, reverse=True)) in clicking.SHAPES
                assert crop.target.sum() >= clicking.LEAST_VOXELS
                assert torch.isfinite(crop.image).all()

    def test_a_plain_crop_is_the_whole_structure_along_its_longest_axis(self) -> None:
        item = replace(crop_item(), structures={"hippocampus": (1, 2)})
        crop = clicking.draw_crop(item, (48, 32, 32), random.Random(2), plain=True)
        assert crop is not None
        assert crop.target.shape == (32, 48, 32)
        assert not crop.target[[0, -1]].any()
        assert not crop.target[:, [0, -1]].any()
        again = clicking.draw_crop(item, (48, 32, 32), random.Random(2), plain=True)
        assert again is not None
        assert torch.equal(crop.image, again.image)

    def test_a_structure_of_few_voxels_gives_no_crop(self) -> None:
        labels = np.zeros((30, 30, 30), np.uint8)
        labels[4, 4, 4:8] = 1
        item = items.make_item(
            "speck", labels * 100, labels, np.ones(3), modality="MR", group="brain", structures={"brain tumour": (1,)}, absent=()
        )
        assert clicking.draw_crop(item, (32, 32, 32), random.Random(0)) is None


def ball(radius: float = 7) -> np.ndarray:
    z, y, x = np.indices((32, 32, 32))
    return (z - 16) ** 2 + (y - 15) ** 2 + (x - 17) ** 2 < radius**2


class TestUsers:
    @given(st.integers(0, 10_000), st.sampled_from(sorted(clicking.FIRST)))
    def test_every_first_prompt_says_something(self, seed: int, kind: str) -> None:
        target = ball()
        user = clicking.new_user(target, random.Random(seed), kind)
        assert user.boxes or user.points or user.before is not None
        channels = user.channels()
        assert channels.shape == (4, *target.shape)
        assert torch.isfinite(channels).all()
        assert channels.any()

    def test_first_prompts_are_of_their_kind(self) -> None:
        target = ball()
        rng = random.Random(1)
        assert isinstance(clicking.new_user(target, rng, "box2d").boxes[0], Box2D)
        (deep,) = clicking.new_user(target, rng, "box3d").boxes
        assert isinstance(deep, Box3D)
        assert np.allclose(deep.lo, (10, 9, 11), atol=2.5)
        (point,) = clicking.new_user(target, rng, "point").points
        assert target[tuple(int(v) for v in point.zyx)]
        sliced = clicking.new_user(target, rng, "slice")
        (box,) = sliced.boxes
        assert isinstance(box, Box2D)
        assert sliced.before is not None
        assert np.array_equal(np.moveaxis(sliced.before, box.axis, 0)[box.index] > 0, np.moveaxis(target, box.axis, 0)[box.index])
        assert np.flatnonzero(np.moveaxis(sliced.before, box.axis, 0).any(axis=(1, 2))).tolist() == [box.index]

    def test_a_careful_user_clicks_into_the_largest_error(self) -> None:
        target = ball()
        user = clicking.new_user(target, random.Random(0), "box3d")
        found = target.copy()
        found[:16] = False
        user.click(found, None)
        (point,) = user.points
        assert point.positive
        assert (target & ~found)[tuple(int(v) for v in point.zyx)]
        assert user.before is not None
        assert (user.before > 0).sum() == found.sum()
        user.click(target, None)
        assert len(user.points) == 1, "nothing is wrong any more"

    def test_who_forgets_tells_the_newest_click_alone(self) -> None:
        user = clicking.new_user(ball(), random.Random(0), "box3d")
        user.click(np.zeros(user.target.shape, bool), None)
        user.click(user.target & (np.indices(user.target.shape)[0] < 15), None)
        assert len(user.points) == 2
        whole = user.channels()
        user.forget = True
        assert (user.channels()[2] == 0).all()
        assert (whole[2] != 0).any()

    def test_damaged_masks_differ_from_the_target(self) -> None:
        target = ball()
        made = [clicking.damage(target, random.Random(seed)) for seed in range(30)]
        assert all(mask.shape == target.shape and mask.dtype == bool for mask in made)
        assert sum(not np.array_equal(mask, target) for mask in made) > 25

    def test_users_as_a_batch(self) -> None:
        users = [clicking.new_user(ball(r), random.Random(r)) for r in (5, 6)]
        assert clicking.channels_of(users).shape == (2, 4, 32, 32, 32)
        assert clicking.truth_of(users).sum((1, 2, 3)).tolist() == [int(u.target.sum()) for u in users]
