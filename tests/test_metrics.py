"""Scores of masks against cases worked out by hand and against MONAI; lesions; stability; intervals."""

from __future__ import annotations

import time
import tracemalloc
from math import hypot, sqrt

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from seerseg.errors import GeometryError
from seerseg.metrics import (
    assd,
    bootstrap_interval,
    dice,
    hd95,
    iou,
    largest_extent,
    nsd,
    over_paraphrases,
    paired_bootstrap,
    score_lesions,
    score_masks,
    surface_voxels,
    volume_ml,
)
from seerseg.volume import Grid


def grid(shape=(10, 12, 14), spacing_zyx=(1.0, 1.0, 1.0), shear=0.0):
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    affine[0, 1] = shear  # each step in y also moves along x
    return Grid(shape, affine)


def oblique(shape, spacing_zyx, angle=0.5):
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ turn @ np.diag(spacing_zyx[::-1])
    affine[:3, 3] = (-31.5, 12.25, 400)
    return Grid(shape, affine)


def box(shape, lo, hi):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))] = True
    return mask


masks = arrays(bool, (4, 5, 6), elements=st.booleans())


class TestByHand:
    def test_two_boxes_that_half_overlap(self):
        a, b = box((10, 12, 14), (2, 2, 2), (6, 6, 6)), box((10, 12, 14), (2, 2, 4), (6, 6, 8))
        assert dice(a, b) == pytest.approx(0.5)
        assert iou(a, b) == pytest.approx(1 / 3)

    def test_single_voxels_apart_along_each_axis_and_across(self):
        g = grid(spacing_zyx=(3.0, 2.0, 0.5))
        here = box(g.shape_zyx, (2, 2, 2), (3, 3, 3))
        for step, mm in (((1, 0, 0), 3.0), ((0, 1, 0), 2.0), ((0, 0, 1), 0.5), ((1, 1, 0), hypot(3, 2)), ((2, 3, 4), sqrt(36 + 36 + 4))):
            lo = tuple(2 + s for s in step)
            there = box(g.shape_zyx, lo, tuple(v + 1 for v in lo))
            scores = score_masks(there, here, g, tolerance_mm=mm)
            assert scores.hd95_mm == pytest.approx(mm)
            assert scores.assd_mm == pytest.approx(mm)
            assert scores.nsd == 1.0
            assert score_masks(there, here, g, tolerance_mm=mm - 0.01).nsd == 0.0
            assert scores.dice == 0.0

    def test_sheared_grid_measures_in_the_world_and_volume_is_the_determinant(self):
        g = grid(spacing_zyx=(1.0, 2.0, 1.0), shear=1.5)
        here, there = box(g.shape_zyx, (2, 2, 2), (3, 3, 3)), box(g.shape_zyx, (2, 3, 2), (3, 4, 3))
        assert hd95(here, there, g) == pytest.approx(hypot(2.0, 1.5))
        assert volume_ml(here, g) == pytest.approx(2.0 / 1000)
        assert hd95(here, there, g) != pytest.approx(2.0)

    def test_a_shear_can_bring_together_what_the_array_holds_apart(self):
        # The step +y -x is short in the world: 1 mm up, 1.5 - 1 = 0.5 mm along x.
        g = grid(spacing_zyx=(1.0, 1.0, 1.0), shear=1.5)
        here, there = box(g.shape_zyx, (2, 2, 4), (3, 3, 5)), box(g.shape_zyx, (2, 3, 3), (3, 4, 4))
        assert hd95(here, there, g) == pytest.approx(hypot(1.0, 0.5))

    def test_hd95_is_the_larger_directed_percentile_not_that_of_the_pool(self):
        # A line of 100 voxels against the same line with 6 voxels more, 50 mm away: 6 of 106 directed distances are 50.
        g = grid((1 + 2, 120, 120))
        line = box(g.shape_zyx, (1, 10, 5), (2, 11, 105))
        more = line | box(g.shape_zyx, (1, 60, 5), (2, 61, 11))
        expected = np.percentile(np.r_[np.zeros(100), np.full(6, 50.0)], 95)
        assert hd95(more, line, g) == hd95(line, more, g) == pytest.approx(expected)
        pooled = np.percentile(np.r_[np.zeros(200), np.full(6, 50.0)], 95)
        assert expected > 0
        assert pooled == 0

    def test_a_plate_moved_along_its_normal_is_off_by_that_much(self):
        for step, spacing in ((1, 3.0), (3, 0.7), (4, 1.25)):
            g = grid((30, 20, 20), spacing_zyx=(spacing, 1.0, 1.0))
            here, there = box(g.shape_zyx, (8, 2, 2), (9, 18, 18)), box(g.shape_zyx, (8 + step, 2, 2), (9 + step, 18, 18))
            assert hd95(there, here, g) == pytest.approx(step * spacing)
            assert nsd(there, here, g, step * spacing) == 1.0
            assert nsd(there, here, g, 0.9 * step * spacing) == 0.0

    def test_mask_that_touches_the_border_has_its_surface_there(self):
        whole = np.ones((3, 3, 3), bool)
        assert np.count_nonzero(surface_voxels(whole)) == 26
        assert not surface_voxels(whole)[1, 1, 1]


class TestEmptyAndFlat:
    def test_empty_prediction_of_a_present_target_is_a_failure(self):
        g = grid(spacing_zyx=(2.0, 1.0, 1.0))
        scores = score_masks(np.zeros(g.shape_zyx, bool), box(g.shape_zyx, (1, 1, 1), (3, 3, 3)), g)
        assert (scores.dice, scores.iou, scores.nsd, scores.failed) == (0.0, 0.0, 0.0, True)
        assert scores.hd95_mm == scores.assd_mm == pytest.approx(sqrt(20**2 + 12**2 + 14**2))
        assert scores.reference_ml == pytest.approx(16 / 1000)

    def test_absent_target_is_no_failure_and_both_empty_has_no_score(self):
        g = grid()
        nothing = np.zeros(g.shape_zyx, bool)
        scores = score_masks(nothing, nothing, g)
        assert (scores.dice, scores.iou, scores.nsd, scores.hd95_mm, scores.assd_mm) == (None,) * 5
        assert not scores.failed
        drawn = score_masks(box(g.shape_zyx, (1, 1, 1), (3, 3, 3)), nothing, g)
        assert not drawn.failed
        assert not drawn.present
        assert drawn.prediction_ml == pytest.approx(8 / 1000)

    @pytest.mark.parametrize("shape", [(1, 20, 20), (20, 1, 20), (20, 20, 1)])
    def test_flat_images_have_no_millimetres(self, shape):
        g = grid(shape)
        mask = np.zeros(shape, bool)
        mask[tuple(slice(0, min(n, 5)) for n in shape)] = True
        scores = score_masks(mask, mask, g)
        assert scores.dice == 1.0
        assert (scores.nsd, scores.hd95_mm, scores.assd_mm, scores.reference_ml, scores.prediction_ml) == (None,) * 5
        assert volume_ml(mask, g) is None

    def test_what_cannot_be_compared_is_refused(self):
        g = grid()
        with pytest.raises(GeometryError, match="The prediction has shape"):
            score_masks(np.zeros((2, 2, 2), bool), np.zeros(g.shape_zyx, bool), g)
        for bad in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="tolerance"):
                score_masks(np.zeros(g.shape_zyx, bool), np.zeros(g.shape_zyx, bool), g, tolerance_mm=bad)


class TestProperties:
    @given(masks, masks)
    def test_symmetric_and_between_0_and_1(self, a, b):
        g = oblique(a.shape, (2.0, 1.0, 0.7))
        ab, ba = score_masks(a, b, g), score_masks(b, a, g)
        assert (ab.dice, ab.iou, ab.nsd) == (ba.dice, ba.iou, ba.nsd)
        assert ab.hd95_mm == ba.hd95_mm
        if a.any() or b.any():
            assert 0 <= ab.iou <= ab.dice <= 1
            assert 0 <= ab.nsd <= 1
            assert 0 <= ab.assd_mm <= g.diagonal_mm
            assert 0 <= ab.hd95_mm <= g.diagonal_mm

    @given(masks)
    def test_a_mask_agrees_with_itself(self, a):
        assume(a.any())
        scores = score_masks(a, a.copy(), oblique(a.shape, (2.0, 1.0, 0.7)), tolerance_mm=0.0)
        assert (scores.dice, scores.iou, scores.nsd, scores.hd95_mm, scores.assd_mm) == (1.0, 1.0, 1.0, 0.0, 0.0)

    @given(masks, masks, st.floats(0, 8), st.floats(0, 8))
    def test_nsd_grows_with_the_tolerance(self, a, b, one, other):
        assume(a.any() and b.any())
        g = oblique(a.shape, (2.0, 1.0, 0.7))
        assert nsd(a, b, g, min(one, other)) <= nsd(a, b, g, max(one, other))

    @given(masks, masks, st.sampled_from([(0, 1, 2), (2, 0, 1), (1, 0, 2)]), st.tuples(*[st.booleans()] * 3))
    def test_the_order_in_which_a_file_stores_its_axes_changes_nothing(self, a, b, order, flips):
        assume(a.any() or b.any())
        g = grid(a.shape, (2.0, 1.0, 0.7), shear=0.4)
        step = tuple(slice(None, None, -1 if f else 1) for f in flips)
        xyz = [2 - o for o in order[::-1]]
        affine = np.eye(4)
        affine[:3, :3] = g.affine[:3, xyz] * [-1 if f else 1 for f in flips[::-1]]
        moved = Grid(np.transpose(a, order).shape, affine)
        one = score_masks(a, b, g, tolerance_mm=1.1)
        two = score_masks(np.transpose(a, order)[step], np.transpose(b, order)[step], moved, tolerance_mm=1.1)
        assert one.dice == two.dice
        assert one.nsd == pytest.approx(two.nsd)
        assert one.hd95_mm == pytest.approx(two.hd95_mm)

    @given(masks, masks)
    def test_what_lies_around_changes_nothing(self, a, b):
        assume(a.any() and b.any())
        small, large = grid(a.shape, (2.0, 1.0, 0.7)), grid(tuple(n + 8 for n in a.shape), (2.0, 1.0, 0.7))
        one = score_masks(a, b, small)
        two = score_masks(np.pad(a, 4), np.pad(b, 4), large)
        assert (one.dice, one.nsd, one.hd95_mm, one.assd_mm) == (two.dice, two.nsd, two.hd95_mm, two.assd_mm)

    @given(masks, masks)
    def test_a_crop_that_holds_both_gives_the_same(self, a, b):
        g = oblique((9, 9, 9), (2.0, 1.0, 0.7))
        where = (slice(1, 5), slice(2, 7), slice(3, 9))
        whole_a, whole_b = np.zeros(g.shape_zyx, bool), np.zeros(g.shape_zyx, bool)
        whole_a[where], whole_b[where] = a, b
        crop, whole = score_masks(a, b, g, box=where), score_masks(whole_a, whole_b, g)
        assert crop.to_json() == pytest.approx(whole.to_json(), abs=1e-9)
        with pytest.raises(GeometryError, match="shape"):
            score_masks(a, b, g, box=(slice(0, 4), slice(0, 5), slice(0, 7)))

    @given(masks, masks)
    def test_extent_holds_all_and_no_more(self, a, b):
        found = largest_extent(a, b)
        points = np.argwhere(a | b)
        if not len(points):
            assert found is None
        else:
            assert [(s.start, s.stop) for s in found] == list(zip(points.min(0), points.max(0) + 1, strict=True))


@pytest.fixture(scope="module")
def monai_metrics():
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")

    def scores(a, b, spacing_zyx, tolerance):
        def one_hot(m):
            return torch.from_numpy(np.stack([~m, m])[None])

        p, r = one_hot(a), one_hot(b)
        return (
            float(metrics.compute_dice(p, r, include_background=False)),
            float(metrics.compute_surface_dice(p, r, [tolerance], include_background=False, spacing=spacing_zyx)),
            float(metrics.compute_hausdorff_distance(p, r, include_background=False, percentile=95, spacing=spacing_zyx)),
            float(metrics.compute_average_surface_distance(p, r, include_background=False, symmetric=True, spacing=spacing_zyx)),
        )

    return scores


class TestAgainstMonai:
    """The oracle: the same definition computed with distance maps."""

    @pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("kind", ["noise", "blobs"])
    def test_random_masks(self, monai_metrics, seed, kind):
        from scipy.ndimage import gaussian_filter

        rng = np.random.default_rng(seed)
        shape = tuple(int(n) for n in rng.integers(5, 30, 3))
        spacing = [float(s) for s in rng.choice([0.5, 0.75, 1.0, 1.5, 3.0], 3)]
        if kind == "noise":
            a, b = (rng.random(shape) < p for p in rng.uniform(0.02, 0.6, 2))
        else:
            a, b = (gaussian_filter(rng.standard_normal(shape), 2, mode="constant") > 0.02 for _ in range(2))
        a[tuple(rng.integers(0, n) for n in shape)] = b[tuple(rng.integers(0, n) for n in shape)] = True
        g = grid(shape, tuple(spacing))
        tolerance = float(rng.uniform(0.3, 3.1))
        expected = monai_metrics(a, b, spacing, tolerance)
        ours = score_masks(a, b, g, tolerance_mm=tolerance)
        assert (ours.dice, ours.nsd, ours.hd95_mm, ours.assd_mm) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_every_volume_pair_on_an_oblique_grid_equals_brute_force():
    rng = np.random.default_rng(1)
    g = oblique((9, 10, 11), (2.5, 1.0, 0.7))
    a, b = rng.random(g.shape_zyx) < 0.2, rng.random(g.shape_zyx) < 0.1
    p, r = g.to_world(np.argwhere(surface_voxels(a))), g.to_world(np.argwhere(surface_voxels(b)))
    table = np.linalg.norm(p[:, None] - r[None], axis=2)
    to_r, to_p = table.min(1), table.min(0)
    scores = score_masks(a, b, g, tolerance_mm=1.3)
    assert scores.hd95_mm == pytest.approx(max(np.percentile(to_r, 95), np.percentile(to_p, 95)))
    assert scores.assd_mm == pytest.approx(np.r_[to_r, to_p].mean())
    assert scores.nsd == pytest.approx((np.r_[to_r, to_p] <= 1.3).mean())
    assert assd(a, b, g) == scores.assd_mm


class TestLesions:
    shape = (20, 20, 20)

    def test_found_missed_and_invented(self):
        reference = (
            box(self.shape, (1, 1, 1), (4, 4, 4)) | box(self.shape, (10, 10, 10), (13, 13, 13)) | box(self.shape, (1, 15, 1), (3, 18, 3))
        )
        prediction = (
            box(self.shape, (1, 1, 1), (4, 4, 3)) | box(self.shape, (16, 1, 16), (18, 3, 18)) | box(self.shape, (12, 12, 12), (16, 16, 16))
        )
        scores = score_lesions(prediction, reference, grid(self.shape))
        assert (scores.tp, scores.fp, scores.fn) == (1, 2, 2)  # the second is touched by one voxel only: Dice 2/91
        assert scores.touched == 2
        assert scores.f1 == pytest.approx(1 / 3)
        assert scores.detection_rate == pytest.approx(2 / 3)
        assert scores.matched_dice == pytest.approx(36 / 45)

    def test_one_blob_over_two_lesions_finds_one(self):
        reference = box(self.shape, (5, 5, 2), (8, 8, 6)) | box(self.shape, (5, 5, 7), (8, 8, 11))
        prediction = box(self.shape, (5, 5, 2), (8, 8, 11))
        scores = score_lesions(prediction, reference, grid(self.shape))
        assert (scores.tp, scores.fp, scores.fn, scores.touched) == (1, 0, 1, 2)

    def test_pairs_are_chosen_together_not_greedily(self):
        # A line of lesions; the prediction's first part fits both, its second only the first.
        reference = box(self.shape, (1, 1, 0), (2, 2, 10)) | box(self.shape, (1, 1, 11), (2, 2, 15))
        prediction = box(self.shape, (1, 1, 5), (2, 2, 14)) | box(self.shape, (1, 1, 0), (2, 2, 4))
        scores = score_lesions(prediction, reference, grid(self.shape), overlap_dice=0.2)
        assert (scores.tp, scores.fp, scores.fn) == (2, 0, 0)

    def test_diagonal_neighbours_are_one_lesion_and_crumbs_are_none(self):
        two = box(self.shape, (1, 1, 1), (2, 2, 2)) | box(self.shape, (2, 2, 2), (3, 3, 3))
        assert score_lesions(two, two, grid(self.shape)).tp == 1
        assert score_lesions(two, two, grid(self.shape), smallest_mm3=3.0).tp == 0
        assert score_lesions(two, two, grid(self.shape, (2.0, 1.0, 1.0)), smallest_mm3=3.0).tp == 1

    def test_nothing_at_all(self):
        nothing = np.zeros(self.shape, bool)
        scores = score_lesions(nothing, nothing, grid(self.shape))
        assert (scores.f1, scores.precision, scores.recall, scores.detection_rate) == (None,) * 4
        missed = score_lesions(nothing, box(self.shape, (1, 1, 1), (3, 3, 3)), grid(self.shape))
        assert (missed.f1, missed.recall, missed.precision) == (0.0, 0.0, None)

    @given(masks, masks)
    def test_counts_add_up(self, a, b):
        ab, ba = score_lesions(a, b, grid(a.shape)), score_lesions(b, a, grid(a.shape))
        assert (ab.tp, ab.fp, ab.fn) == (ba.tp, ba.fn, ba.fp)
        assert ab.tp <= ab.touched <= ab.tp + ab.fn


class TestStatistics:
    def test_paraphrases_by_hand(self):
        scores = over_paraphrases([0.9, 0.7, 0.8, 0.8], ["formal", "lay", "lay", "typo"])
        assert (scores.mean, scores.worst, scores.count) == (pytest.approx(0.8), 0.7, 4)
        assert scores.std == pytest.approx(sqrt(0.02 / 4))
        assert scores.variance == pytest.approx(0.02 / 4)
        assert scores.styles == ("formal", "lay", "typo")
        assert over_paraphrases([1.0, 9.0], high_is_good=False).worst == 9.0
        assert over_paraphrases([0.1] * 7).variance == 0.0
        for bad in ([], [float("nan")]):
            with pytest.raises(ValueError, match="finite"):
                over_paraphrases(bad)

    def test_one_subject_has_no_interval(self):
        assert bootstrap_interval({"s": [0.1, 0.9]}) is None
        assert bootstrap_interval({"s": [0.1, 0.9], "t": []}) is None

    def test_interval_is_repeatable_and_blind_to_order(self):
        values = {f"s{i}": [i / 10, i / 9] for i in range(8)}
        one, two = bootstrap_interval(values), bootstrap_interval(dict(reversed(values.items())))
        assert one == two
        assert one.lo < np.mean([v for vs in values.values() for v in vs]) < one.hi
        assert one.subjects == 8
        assert bootstrap_interval(values, seed=1) != one

    def test_cases_of_one_subject_count_as_one_draw(self):
        rng = np.random.default_rng(0)
        subject_means = rng.normal(0.8, 0.1, 10)
        alike = {i: [m] * 20 for i, m in enumerate(subject_means)}
        as_if_apart = {(i, k): [m] for i, m in enumerate(subject_means) for k in range(20)}
        wide, narrow = bootstrap_interval(alike), bootstrap_interval(as_if_apart)
        assert wide.hi - wide.lo > 3 * (narrow.hi - narrow.lo)

    def test_interval_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(200):
            found = bootstrap_interval({i: [v] for i, v in enumerate(rng.normal(0.5, 0.1, 30))}, resamples=400)
            hits += found.lo <= 0.5 <= found.hi
        assert 0.88 <= hits / 200 <= 0.98

    def test_paired_difference_sees_what_two_intervals_hide(self):
        rng = np.random.default_rng(5)
        a = {(f"case{i}", "liver"): float(v) for i, v in enumerate(rng.uniform(0.3, 0.95, 20))}
        b = {k: v + 0.02 for k, v in a.items()} | {("other", "liver"): 0.0}
        found = paired_bootstrap(a, b, {k: k[0] for k in b})
        assert found.mean == pytest.approx(0.02)
        assert (found.cases, found.subjects, found.better) == (20, 20, 1.0)
        assert found.interval.lo > 0
        assert paired_bootstrap({"x": 0.1}, {"x": 0.2}, {"x": "s"}).interval is None
        with pytest.raises(ValueError, match="in common"):
            paired_bootstrap({"x": 0.1}, {"y": 0.2}, {"x": "s"})


@pytest.mark.slow
def test_a_liver_in_a_whole_torso_is_quick_and_small():
    shape = (300, 512, 512)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    liver = ((z - 150) / 90.0) ** 2 + ((y - 250) / 100.0) ** 2 + ((x - 300) / 125.0) ** 2 <= 1
    drawn = np.roll(liver, (2, 3), (0, 2))
    g = grid(shape, (1.5, 0.8, 0.8))
    tracemalloc.start()
    began = time.process_time()
    scores = score_masks(drawn, liver, g)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    crop = np.prod([s.stop - s.start for s in largest_extent(liver, drawn)])
    assert scores.hd95_mm == pytest.approx(3.0, abs=0.6)
    assert seconds < 6
    assert peak < 10 * crop
