"""What every segmenter must keep. Subclass `SegmenterContract`, give it a fixture `segmenter`, and pytest does the rest:

    class TestMine(SegmenterContract):
        @pytest.fixture(scope="class")
        @classmethod
        def segmenter(cls) -> Segmenter:
            return load_segmenter("mine:folder")

It needs nothing of this project's tests beyond this file. Kinds of prompts that a segmenter does not claim are asked for too: it
must say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seerseg.errors import SegmenterError
from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.segmenters.base import Capabilities, Segmentation, Segmenter
from seerseg.volume import Grid, Mask, Volume

SHAPE = (20, 34, 40)
CENTRE, RADII = (9.0, 16.0, 12.0), (6.0, 9.0, 8.0)


def _affine(kind: str) -> np.ndarray:
    """Canonical affines: plain, flipped origin, oblique (20 degrees), anisotropic, sheared."""
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    if kind == "anisotropic":
        affine = np.diag([0.8, 1.1, 6.0, 1.0])
    if kind == "oblique":
        turn = np.deg2rad(20)
        affine[:3, :3] = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ affine[:3, :3]
    if kind == "sheared":
        affine[0, 2] = 0.3
    affine[:3, 3] = (-40.0, 25.0, 300.0)
    return affine


def blob(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """An ellipsoid left of the middle, cut by the shape where it is small."""
    away = sum(
        ((i - min(c, (n - 1) / 2)) / r) ** 2 for i, c, r, n in zip(np.ogrid[tuple(map(slice, shape))], CENTRE, RADII, shape, strict=True)
    )
    return np.broadcast_to(away <= 1, shape)


def scene(kind: str = "plain", *, shape: tuple[int, int, int] = SHAPE, dtype: str = "int16", modality: str | None = "CT") -> Volume:
    """A bright ellipsoid in a darker, noisy body."""
    rng = np.random.default_rng(7)
    array = np.where(blob(shape), 180, 20) + rng.normal(0, 12, shape)
    return Volume(array.astype(dtype), Grid(shape, _affine(kind)), modality=modality, name=f"contract-{kind}")


def spatial_prompts(volume: Volume) -> dict[str, Prompt]:
    """One prompt of each spatial kind on the scene's ellipsoid."""
    truth = blob(volume.grid.shape_zyx)
    z, y, x = (np.flatnonzero(truth.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3))
    middle = int((z[0] + z[-1]) // 2)
    centre = (float(middle), float((y[0] + y[-1]) // 2), float((x[0] + x[-1]) // 2))
    key = np.zeros_like(truth)
    key[middle] = truth[middle]
    return {
        "box2d": Prompt(boxes=(Box2D(0, middle, (y[0], x[0]), (y[-1] + 1, x[-1] + 1)),)),
        "box3d": Prompt(boxes=(Box3D((z[0], y[0], x[0]), (z[-1] + 1, y[-1] + 1, x[-1] + 1)),)),
        "points": Prompt(points=(Point(centre),)),
        "mask": Prompt(mask=Mask(key, volume.grid)),
    }


def mirrored(volume: Volume, prompt: Prompt) -> tuple[Volume, Prompt]:
    """The scan and the prompt with left and right exchanged (array axis 2)."""
    n = volume.grid.shape_zyx[2]
    boxes: list[Box2D | Box3D] = []
    for box in prompt.boxes:
        lo, hi = (*box.lo[:-1], n - box.hi[-1]), (*box.hi[:-1], n - box.lo[-1])
        boxes.append(Box2D(box.axis, box.index, lo, hi) if isinstance(box, Box2D) else Box3D(lo, hi))
    points = tuple(Point((*p.zyx[:2], n - 1 - p.zyx[2]), p.positive) for p in prompt.points)
    mask = None if prompt.mask is None else Mask(prompt.mask.array[:, :, ::-1].copy(), volume.grid)
    return Volume(volume.array[:, :, ::-1].copy(), volume.grid, volume.modality, name=volume.name), Prompt(
        boxes=tuple(boxes), points=points, mask=mask
    )


def check_segmentation(found: Segmentation, volume: Volume, prompt: Prompt, capabilities: Capabilities) -> None:
    """Status, mask, message and presence agree with each other and with the seam's docstring."""
    assert found.prompt is prompt
    assert found.status in ("ok", "empty", "unsupported")
    assert found.seconds >= 0
    if found.status == "unsupported":
        assert found.mask is None
        assert found.message.strip().endswith((".", "?")), found.message
    else:
        assert found.mask is not None
        assert found.mask.array.dtype == np.bool_
        assert found.mask.array.shape == volume.grid.shape_zyx
        assert found.mask.grid.close_to(volume.grid, 1e-6)
        assert found.mask.array.any() == (found.status == "ok")
    if found.presence is not None:
        assert capabilities.presence
        assert 0 <= found.presence <= 1


def ask(segmenter: Segmenter, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation] | SegmenterError:
    """What came, checked; a SegmenterError must hold a sentence."""
    try:
        found = segmenter.segment(volume, prompts)
    except SegmenterError as fault:
        if not str(fault).strip().endswith((".", "?")):
            pytest.fail(f"not a sentence: {fault}")
        return fault
    assert len(found) == len(prompts)
    for one, prompt in zip(found, prompts, strict=True):
        check_segmentation(one, volume, prompt, segmenter.capabilities)
    return found


def refused(segmenter: Segmenter, volume: Volume, prompt: Prompt) -> str:
    """The sentence with which the prompt was refused."""
    found = ask(segmenter, volume, [prompt])
    if isinstance(found, SegmenterError):
        return str(found)
    assert found[0].status == "unsupported", f"{prompt} came back as {found[0].status}"
    return found[0].message


def _same(a: Segmentation, b: Segmentation) -> bool:
    if a.status != b.status or a.presence != b.presence or (a.mask is None) != (b.mask is None):
        return False
    return a.mask is None or b.mask is None or bool((a.mask.array == b.mask.array).all())


class SegmenterContract:
    """Each test is one promise of `seerseg.segmenters.base`."""

    texts: ClassVar[tuple[str, ...]] = ()
    """Texts to ask for beside the first two names of the vocabulary, where there is text at all."""
    mirror_dice: ClassVar[float] = 0.98
    """How nearly the mask of the mirrored scan must be the mirrored mask."""
    examples: ClassVar[int] = 25
    """Random prompts tried."""

    def prompts(self, segmenter: Segmenter, volume: Volume) -> list[Prompt]:
        """All that the segmenter says it can be asked for."""
        able = segmenter.capabilities
        names = [*able.vocabulary[:2], *self.texts] if able.text != "none" else []
        return [Prompt(text=name) for name in names] + [p for p in spatial_prompts(volume).values() if not able.missing(p)]

    def test_it_is_a_segmenter_and_says_where_it_comes_from(self, segmenter: Segmenter) -> None:
        assert isinstance(segmenter, Segmenter)
        assert segmenter.card.name
        assert segmenter.card.identity
        assert isinstance(segmenter.card.to_json(), dict)
        assert segmenter.capabilities.kinds
        assert segmenter.segment(scene(), []) == []

    @pytest.mark.parametrize("kind", ["plain", "oblique", "anisotropic", "sheared"])
    def test_masks_lie_on_the_volume_s_own_grid(self, segmenter: Segmenter, kind: str) -> None:
        volume = scene(kind)
        assert not isinstance(ask(segmenter, volume, self.prompts(segmenter, volume)), SegmenterError)

    @pytest.mark.parametrize("shape", [(1, 40, 44), (3, 40, 20), (24, 1, 30), (9, 40, 16)])
    @pytest.mark.parametrize("dtype", ["float32", "int16", "uint8"])
    def test_any_shape_and_type(self, segmenter: Segmenter, shape: tuple[int, int, int], dtype: str) -> None:
        volume = scene(shape=shape, dtype=dtype, modality=None)
        assert not isinstance(ask(segmenter, volume, self.prompts(segmenter, volume)), SegmenterError)

    def test_spatial_prompts_find_what_they_point_at(self, segmenter: Segmenter) -> None:
        volume = scene()
        for kind, prompt in spatial_prompts(volume).items():
            if not segmenter.capabilities.missing(prompt):
                found = segmenter.segment(volume, [prompt])[0]
                assert found.status == "ok", kind
                assert found.mask is not None
                assert (found.mask.array & blob()).sum() >= 0.4 * found.mask.array.sum(), kind

    def test_left_is_left(self, segmenter: Segmenter) -> None:
        volume = scene()
        for kind, prompt in spatial_prompts(volume).items():
            if segmenter.capabilities.missing(prompt):
                continue
            other, twin = mirrored(volume, prompt)
            a, b = segmenter.segment(volume, [prompt])[0].mask, segmenter.segment(other, [twin])[0].mask
            assert a is not None
            assert b is not None
            back = b.array[:, :, ::-1]
            assert 2 * (a.array & back).sum() >= self.mirror_dice * (a.array.sum() + back.sum()), kind

    def test_the_same_prompt_gives_the_same_mask_alone_or_among_others(self, segmenter: Segmenter) -> None:
        volume = scene()
        prompts = self.prompts(segmenter, volume)
        together = segmenter.segment(volume, prompts)
        backwards = segmenter.segment(volume, prompts[::-1])[::-1]
        alone = [segmenter.segment(volume, [prompt])[0] for prompt in prompts]
        assert all(_same(a, b) and _same(a, c) for a, b, c in zip(together, backwards, alone, strict=True))

    def test_the_volume_is_not_written_to(self, segmenter: Segmenter) -> None:
        volume = scene()
        volume.array.flags.writeable = False
        before = volume.array.copy()
        ask(segmenter, volume, self.prompts(segmenter, volume))
        assert (volume.array == before).all()

    def test_what_it_cannot_do_it_says(self, segmenter: Segmenter) -> None:
        volume = scene()
        able = segmenter.capabilities
        asked = {"text": Prompt(text="liver"), "class": Prompt(class_name="liver"), **spatial_prompts(volume)}
        for kind, prompt in asked.items():
            if able.missing(prompt):
                found = ask(segmenter, volume, [prompt])
                assert not isinstance(found, SegmenterError), kind
                assert found[0].status == "unsupported", kind
                assert found[0].nearest, kind
        if able.text == "closed":
            found = ask(segmenter, volume, [Prompt(text="qzx wvk 0815")])
            assert not isinstance(found, SegmenterError)
            assert found[0].status == "unsupported"
            assert found[0].nearest

    def test_empty_prompts_and_prompts_outside_are_refused(self, segmenter: Segmenter) -> None:
        volume = scene()
        far = Grid(volume.grid.shape_zyx, _affine("anisotropic"))
        for prompt in (
            Prompt(),
            Prompt(text="   "),
            Prompt(boxes=(Box2D(0, 99, (1, 1), (5, 5)),)),
            Prompt(boxes=(Box2D(3, 1, (1, 1), (5, 5)),)),
            Prompt(boxes=(Box2D(0, 2, (50, 50), (60, 60)),)),
            Prompt(boxes=(Box2D(0, 2, (5, 5), (5, 9)),)),
            Prompt(boxes=(Box3D((0, 0, float("nan")), (1, 1, 1)),)),
            Prompt(points=(Point((0, 0, 40)),)),
            Prompt(points=(Point((float("nan"), 0, 0)),)),
            Prompt(mask=Mask(blob(), far)),
        ):
            assert refused(segmenter, volume, prompt)

    @pytest.mark.parametrize("value", [float("nan"), 0.0, 7.0, float("inf")])
    def test_constant_scans_do_not_break_it(self, segmenter: Segmenter, value: float) -> None:
        volume = Volume(np.full(SHAPE, value, np.float32), Grid(SHAPE, _affine("plain")), modality="MR")
        ask(segmenter, volume, self.prompts(segmenter, volume))

    def test_some_nan_and_huge_voxels_do_not_break_it(self, segmenter: Segmenter) -> None:
        volume = scene(dtype="float32")
        volume.array[::5, ::3, ::4] = np.nan
        volume.array[1, 2, 3], volume.array[4, 5, 6] = np.inf, -3e38
        ask(segmenter, volume, self.prompts(segmenter, volume))

    def test_any_box_and_point_gives_a_segmentation_or_a_sentence(self, segmenter: Segmenter) -> None:
        volume = scene(shape=(7, 18, 15))
        number = st.one_of(st.integers(-3, 20).map(float), st.floats(-4, 22, width=32), st.sampled_from([float("nan"), float("inf"), 1e30]))
        box2d = st.builds(Box2D, st.integers(-1, 3), st.integers(-2, 19), st.tuples(number, number), st.tuples(number, number))
        box3d = st.builds(Box3D, st.tuples(number, number, number), st.tuples(number, number, number))
        inside = st.tuples(st.floats(-0.5, 6.4), st.floats(-0.5, 17.4), st.floats(-0.5, 14.4))
        spot = st.builds(Point, st.one_of(inside, st.tuples(number, number, number)), st.booleans())
        prompts = st.builds(
            Prompt, boxes=st.lists(st.one_of(box2d, box3d), max_size=2).map(tuple), points=st.lists(spot, max_size=3).map(tuple)
        )

        @settings(max_examples=self.examples)
        @given(prompts)
        def check(prompt: Prompt) -> None:
            found = ask(segmenter, volume, [prompt])
            if not isinstance(found, SegmenterError) and found[0].mask is not None:
                prompt.check(volume.grid)

        check()

    def test_a_session_refines_and_undoes(self, segmenter: Segmenter) -> None:
        volume = scene()
        if not segmenter.capabilities.session:
            with pytest.raises(SegmenterError, match=r"\w+ .*[.]"):
                segmenter.session(volume)
            return
        session = segmenter.session(volume)
        assert session.undo() is None
        first = session.add(self.prompts(segmenter, volume)[-1])
        check_segmentation(first, volume, first.prompt, segmenter.capabilities)
        assert first.status == "ok"
        if segmenter.capabilities.points:
            assert first.mask is not None
            z, y, x = (int(v) for v in np.argwhere(first.mask.array)[0])
            second = session.add(Prompt(points=(Point((z, y, x), positive=False),)))
            assert second.mask is not None
            assert not second.mask.array[z, y, x]
            third = session.add(Prompt(points=(Point((0, 33, 39)),)))
            assert third.mask is not None
            assert third.mask.array[0, 33, 39]
            session.undo()
            back = session.undo()
            assert back is not None
            assert _same(back, first)
        session.add(Prompt())
        session.close()
        session.close()
