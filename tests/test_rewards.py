"""Reward terms and presets, against values worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.episode import Dialogue, Targets, conclude, solve
from seerseg.errors import PlanError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.protocols.base import Answer, Fault, KeySlice
from seerseg.protocols.seer import SeerProtocol
from seerseg.reasoners.scripted import ScriptedReasoner
from seerseg.rewards import PRESETS, TERMS, Attempt, Overlap, RewardConfig, Stability, Truth, attempt_of, key_slice
from seerseg.rewards import formulas as f
from seerseg.segmenters.scripted import ScriptedSegmenter
from seerseg.views import ViewSpec, render
from seerseg.volume import Grid, Volume

GRID = Grid((20, 21, 21), np.eye(4))
VOLUME = Volume(np.zeros(GRID.shape_zyx, np.int16), GRID, modality="CT")
VIEWS = render(VOLUME, ViewSpec(size_px=32, count=4))


def ball_of_boxes() -> np.ndarray:
    """Slices 4..12: a 4 x 6 box, and on slice 8 a second box of 8 x 8, on slice 16 a lone voxel."""
    mask = np.zeros(GRID.shape_zyx, bool)
    mask[4:13, 2:6, 2:8] = True
    mask[8, 10:18, 10:18] = True
    mask[16, 0, 0] = True
    return mask


TRUTH = Truth(GRID, ball_of_boxes(), ("liver",))
ABSENT = Truth(GRID, None)


def attempt(
    *,
    answer: Answer | Fault | None = None,
    mask: np.ndarray | None = None,
    replies: Sequence[str] = ("",),
    overlaps: Sequence[Overlap] = (),
) -> Attempt:
    absent = isinstance(answer, Answer) and answer.absent
    return Attempt(tuple(replies), () if answer is None else (answer,), mask, tuple(overlaps), 0.5, absent)


def pointing(*boxes: Box2D, points: Sequence[tuple[float, float, float]] = ()) -> Answer:
    return Answer(target="liver", prompt=Prompt(boxes=boxes, points=tuple(Point(p) for p in points)))


SAYS_ABSENT = Answer(target=None, prompt=None, absent=True)


# ---------------------------------------------------------------------------------------------------------------- truth


def test_key_slices_are_found_in_the_mask_and_a_traces_own_come_first() -> None:
    assert TRUTH.areas(0)[8] == 24 + 64
    assert TRUTH.key_index(0) == 8
    there = TRUTH.on_slice(0, 8)
    assert there is not None
    assert [(b.lo, b.hi) for b in there.boxes] == [((10, 10), (18, 18)), ((2, 2), (6, 8))], "largest component first"
    assert all(TRUTH.mask is not None and TRUTH.mask[p] for p in there.points)
    assert there.points[0] != there.points[1]
    lone = TRUTH.on_slice(0, 16)
    assert lone is not None
    assert lone.points == ((16, 0, 0), (16, 0, 0))
    assert TRUTH.on_slice(0, 0) is None
    assert TRUTH.on_slice(0, 99) is None
    given_slice = KeySlice(0, 5, 24, (Box2D(0, 5, (2, 2), (6, 8)),), ((5, 3, 3), (5, 4, 4)))
    traced = Truth(GRID, TRUTH.mask, slices=(given_slice,))
    assert traced.key_index(0) == 5
    assert traced.on_slice(0, 5) is given_slice
    assert traced.key_index(2) is not None


@given(st.integers(0, 2), st.integers(0, 2**16 - 1))
def test_deep_points_lie_inside_on_any_slice(axis: int, bits: int) -> None:
    mask = np.zeros((4, 4, 4), bool)
    plane = np.array([bits >> i & 1 for i in range(16)], bool).reshape(4, 4)
    mask[tuple(1 if a == axis else slice(None) for a in range(3))] = plane
    found = key_slice(mask, axis, 1)
    if not plane.any():
        assert found is None
        return
    assert found is not None
    assert all(mask[p] for p in found.points)
    assert (found.points[0] != found.points[1]) == (found.area > 1)


def test_overlap() -> None:
    mask = np.zeros(GRID.shape_zyx, bool)
    mask[4:13, 2:6, 2:5] = True  # half of the long box
    assert TRUTH.mask is not None
    true = int(TRUTH.mask.sum())
    assert TRUTH.overlap(mask) == Overlap(2 * 108 / (108 + true), 108 / true)
    assert TRUTH.overlap(np.zeros_like(mask)) == TRUTH.overlap(None) == Overlap(0, 0)
    assert ABSENT.overlap(np.zeros_like(mask)) == Overlap(1, 1)
    assert ABSENT.overlap(mask) == Overlap(0, 0)


# ------------------------------------------------------------------------------------------------------------- formulas


def test_medvol_format() -> None:
    boxes = '[{"slice": 3, "bbox_2d_list": [[0, 0, 10, 10], [5, 5, 2, 9]]}]'
    assert f.medvol_format(f"<think>a</think> <answer>{boxes}</answer>") == (1 + 1 + 1 + 0.5) / 4
    assert f.medvol_format(f"so <think> </think><answer>{boxes}</answer>") == (0 + 0 + 1 + 0.5) / 4
    assert f.medvol_format("<think>a</think><answer>[{</answer>") == (1 + 1 + 0 + 0) / 4
    assert f.medvol_format("<think>a</think><answer>[]</answer>") == 1.0
    assert f.medvol_format('<think>a</think><answer>{"bbox_2d_list": 3}</answer>') == 0.75
    assert f.medvol_format("") == 0.0


def test_medvol_axial_is_local_and_its_mended_form_is_not() -> None:
    areas = [0, 10, 40, 20, 0, 0, 0, 0, 0, 0, 5, 2]
    assert f.medvol_axial(areas, 3) == 0.5
    assert f.medvol_axial(areas, 10) == 1.0, "the defect: a slice of 5 voxels is as good as the one of 40"
    assert f.axial_global(areas, 10) == 5 / 40
    assert f.medvol_axial([0] * 20, 9) == f.medvol_axial(areas, -1) == f.medvol_axial(areas, 12) == 0.0


def test_medvol_spatial_matches_one_to_one() -> None:
    a, b, far = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)
    assert f.medvol_spatial([b, a], [a, b]) == 1.0
    assert f.medvol_spatial([(0, 0, 10, 5)], [a, b]) == 0.5 / 2
    assert f.medvol_spatial([a, a, far], [a]) == 1 / 3
    assert f.medvol_spatial([], [a]) == f.medvol_spatial([a], []) == 0.0
    # inclusive pixels 0..9 and 5..14: 5 x 5 shared of 175
    assert f.box_iou((0, 0, 10, 10), (5, 5, 15, 15)) == 25 / 175


def test_medreasoner_formats() -> None:
    good = "<answer>{'bbox':[1,2,3,4], 'points_1':[1,2], 'points_2':[3,4]}</answer>"
    assert [f.medreasoner_think(t) for t in ("x", "<think> </think>", "<think>a</think>")] == [0, 0.2, 1]
    table = {
        "nothing": 0.0,
        "<answer>words</answer>": 0.2,
        "<answer>[1]</answer>": 0.2,
        "<answer>{'bbox':[1,2,3,4]}</answer>": 0.4,
        good.replace("4]", "'x']"): 0.4,
        good.replace("[3,4]", "[3]"): 0.6,
        good: 1.0,
    }
    assert {text: f.medreasoner_answer(text) for text in table} == table


def test_medreasoner_smoothing_and_penalty() -> None:
    assert f.smooth_log(0) == 0.1
    assert f.smooth_log(1) == 1.0
    assert f.smooth_log(1 / 3) == pytest.approx(0.9 * 0.5 + 0.1)  # ln 2 / ln 4
    assert f.smooth_log_mended(0) == 0.0
    assert f.smooth_exp(0, c=1.0) == 1.0
    assert f.smooth_exp(2, c=1.0) == pytest.approx(0.1)
    assert f.smooth_exp(1, c=1.0) == pytest.approx(0.55), "symmetric about c = 1"
    assert f.penalised(0.8, 1.0, 0.5) == pytest.approx(0.8 * (0.7 + 0.3 * 0.75))
    assert f.penalised(1.9, 1, 1) == 1.0, "the clip hides a Dice of up to 2"


def test_medreasoner_boxes() -> None:
    true, shifted = (0.0, 0.0, 30.0, 40.0), (0.0, 10.0, 30.0, 50.0)
    assert f.box_checks(shifted, true, [(5, 5), (20, 20)]) == (0.5, 1.0)
    assert f.box_checks((0, 0, 10, 10), true, [(50, 50), (60, 60)]) == (0.25, 0.5)
    assert f.box_align(shifted, true) == pytest.approx(f.smooth_exp(5 / 50, c=1.0), abs=1e-6)  # mean edge difference 5, diagonal 50
    assert f.box_scale(shifted, true) == 1.0
    doubled = (0.0, 0.0, 30.0, 80.0)  # area and aspect both doubled: sqrt 2 ln 2 = 0.98
    assert f.box_scale(doubled, true) == pytest.approx(f.smooth_exp(math.sqrt(2) * math.log(2), c=0.5))
    assert f.box_scale((0, 0, 0, 9), true) == 0.0


def test_medreasoner_points() -> None:
    true = [(0.0, 0.0), (0.0, 20.0)]
    assert f.point_checks([(0, 0), (0, 8)], (0, 0, 10, 10)) == (1.0, 0.5)
    assert f.points_dice(true, true) == pytest.approx(2.0), "the defect: 2 I / U of equal circles is 2"
    assert f.points_dice_mended(true, true) == pytest.approx(1.0)
    inside = [(0.0, 5.0), (0.0, 15.0)]  # radius 5 within radius 10
    assert f.points_dice(inside, true) == pytest.approx(0.5, abs=1e-5)
    assert f.points_dice_mended(inside, true) == pytest.approx(2 * 25 / 125, abs=1e-5)
    assert f.points_dice([(0, 50), (0, 60)], true) == 0.0
    # two circles of radius 10, centres 10 apart: lens (2 pi / 3 - sqrt 3 / 2) r^2
    lens = (2 * math.pi / 3 - math.sqrt(3) / 2) * 100
    assert f.circles_overlap(true, [(0.0, 10.0), (0.0, 30.0)])[0] == pytest.approx(lens, rel=1e-4)
    box = (0.0, 0.0, 30.0, 40.0)
    assert f.points_align(list(reversed(true)), true, box) == 1.0, "order does not matter"
    # both points 10 to the right: each L1 mean 5, summed 10, halved 5, diagonal 50
    assert f.points_align([(0, 10), (0, 30)], true, box) == pytest.approx(f.smooth_exp(0.1, c=1.0), abs=1e-6)
    assert f.points_angle([(0, 0), (5, 0)], true) == pytest.approx(0.1)
    assert f.points_angle([(9, 9), (9, 3)], true) == pytest.approx(1.0)


def test_medsam_agent() -> None:
    box, stop = '<tool_call>{"name": "add_bbox", "arguments": {}}</tool_call>', '<tool_call>{"name": "stop_action"}</tool_call>'
    assert [f.agent_format(r) for r in ([box, stop], [box], [stop], ["words"], [stop, box])] == [1, 0.5, 0.5, 0, 0.5]
    assert f.agent_quality([0.5], 0.7) == pytest.approx(0.6), "one turn: no cost, no bonus"
    # three turns: 0.5 * (0.6 + 0.75) - (0.7 - 0.6) - 0.03 + 0.1 * 0.3
    assert f.agent_quality([0.4, 0.7, 0.6], 0.75) == pytest.approx(0.675 - 0.1 - 0.03 + 0.03)
    assert f.agent_quality([], 0.0) == 0.0


def test_the_oscillation_bonus_pays_in_the_published_form_only() -> None:
    straight, oscillating = [0.2, 0.6], [0.2, 0.6, 0.1, 0.6, 0.1, 0.6]
    assert f.agent_quality(oscillating, 0.7) > f.agent_quality(straight, 0.7)
    assert f.agent_quality(oscillating, 0.7, running=True) < f.agent_quality(straight, 0.7, running=True)


# --------------------------------------------------------------------------------------------------------------- presets


def test_medvol_presets_and_the_mis_scored_slice() -> None:
    right_on_5 = attempt(
        answer=pointing(Box2D(0, 5, (2, 2), (6, 8))),
        mask=TRUTH.mask,
        replies=['<think>a</think><answer>[{"slice": 5, "bbox_2d_list": [[1, 2, 3, 4]]}]</answer>'],
        overlaps=[Overlap(1, 1)],
    )
    published, mended = (RewardConfig.from_json(f"medvol-r1/ctorg{end}") for end in ("", "/mended"))
    values = published.values(right_on_5, TRUTH)
    assert values["medvol/format"] == 1.0
    assert values["medvol/axial"] == 24 / 88  # slices 0..10 hold at most 88 voxels
    assert values["medvol/spatial"] == pytest.approx(0.5), "the defect: scored against slice 8, whose largest box is missed"
    assert values["medvol/consistency"] == 1.0
    assert published.total(values) == pytest.approx(0.25 * (1 + 24 / 88 + 0.5 + 1))
    assert mended.values(right_on_5, TRUTH)["medvol/spatial_own_slice"] == 1.0
    kits = RewardConfig.from_json("medvol-r1/kits23")
    assert kits.total(kits.values(right_on_5, TRUTH)) == pytest.approx(0.30 + 0.35 * 24 / 88 + 0.35 * 0.5)
    lone = attempt(answer=pointing(Box2D(0, 16, (0, 0), (1, 1))), mask=np.zeros(GRID.shape_zyx, bool))
    assert TERMS["medvol/axial"](lone, TRUTH) == 1 / 24  # slices 11 and 12 are within reach
    assert TERMS["medvol/axial_global"](lone, TRUTH) == 1 / 88
    assert TERMS["medvol/consistency"](lone, TRUTH) == 0.0


def test_consistency_counts_its_window_alone() -> None:
    drawn = ball_of_boxes()
    drawn[16:] = True  # wrong, but outside slices 3..13
    said = attempt(answer=pointing(Box2D(0, 8, (2, 2), (6, 8))), mask=drawn, overlaps=[TRUTH.overlap(drawn)])
    assert TERMS["medvol/consistency"](said, TRUTH) == 1.0
    assert TERMS["dice"](said, TRUTH) < 0.6


def test_medreasoner_presets() -> None:
    there = TRUTH.on_slice(0, 5)
    assert there is not None
    good = "<think>a</think><answer>{'bbox':[1,2,3,4], 'points_1':[1,2], 'points_2':[3,4]}</answer>"
    perfect = attempt(answer=pointing(*there.boxes, points=there.points), replies=[good], overlaps=[Overlap(1, 1)])
    soft, hard = RewardConfig.from_json("medreasoner/soft"), RewardConfig.from_json("medreasoner/hard")
    values = hard.values(perfect, TRUTH)
    assert values == pytest.approx(dict.fromkeys(values, 1.0), abs=1e-6)
    assert soft.total(soft.values(perfect, TRUTH)) == pytest.approx(4.0)
    assert hard.total(values) == pytest.approx(8.0)
    # the box one voxel too high of four: IoU 18 of 30 voxels; both true points still inside or not decides v1
    shifted = Box2D(0, 5, (3, 2), (7, 8))
    inside = [3 <= p[1] < 7 for p in there.points]
    v1 = math.prod(1.0 if i else 0.5 for i in inside)
    expected = (0.9 * math.log(3 * 18 / 30 + 1) / math.log(4) + 0.1) * (0.7 + 0.3 * (v1 + 1) / 2)
    said = attempt(answer=pointing(shifted, points=there.points), replies=[good], overlaps=[Overlap(1, 1)])
    assert TERMS["medreasoner/box_iou"](said, TRUTH) == pytest.approx(expected)
    elsewhere = attempt(answer=pointing(Box2D(0, 5, (15, 15), (19, 19)), points=[(5, 18, 18), (5, 19, 19)]), overlaps=[Overlap(0, 0)])
    assert TERMS["medreasoner/box_iou"](elsewhere, TRUTH) > 0.05, "the defect: no overlap at all still earns"
    assert TERMS["medreasoner/box_iou_mended"](elsewhere, TRUTH) == 0.0
    assert TERMS["medreasoner/points_dice_mended"](elsewhere, TRUTH) == 0.0
    assert TERMS["medreasoner/points_dice"](attempt(answer=pointing(points=there.points), overlaps=[Overlap(1, 1)]), TRUTH) == 1.0
    nowhere = attempt(answer=pointing(points=[(1, 2, 3), (4, 5, 6)]), overlaps=[Overlap(0, 0)])
    assert TERMS["medreasoner/points_dice"](nowhere, TRUTH) == 0.0


def test_medsam_agent_preset() -> None:
    calls = ['<tool_call>{"name": "add_point"}</tool_call>', '<tool_call>{"name": "stop_action"}</tool_call>']
    done = attempt(
        answer=Answer(target="liver", prompt=None), mask=TRUTH.mask, replies=calls, overlaps=[Overlap(0.5, 0.4), Overlap(0.8, 0.7)]
    )
    preset = RewardConfig.from_json("medsam-agent")
    assert preset.total(preset.values(done, TRUTH)) == pytest.approx(0.2 + 0.8 * (0.75 - 0.02 + 0.03))


def test_absent_targets_and_faults() -> None:
    nothing, everything = np.zeros(GRID.shape_zyx, bool), np.ones(GRID.shape_zyx, bool)
    cases = {
        "right absent": (attempt(answer=SAYS_ABSENT, mask=nothing, overlaps=[Overlap(1, 1)]), ABSENT, 1.0),
        "wrong absent": (attempt(answer=SAYS_ABSENT, mask=nothing, overlaps=[Overlap(0, 0)]), TRUTH, 0.0),
        "drawn though absent": (attempt(answer=pointing(), mask=everything, overlaps=[Overlap(0, 0)]), ABSENT, 0.0),
        "fault": (attempt(answer=Fault("no")), TRUTH, 0.0),
        "fault on an absent one": (attempt(answer=Fault("no")), ABSENT, 0.0),
        "no reply": (attempt(), TRUTH, 0.0),
        "unsupported": (attempt(answer=pointing(), mask=None), ABSENT, 0.0),
    }
    formats = ("format", "medvol/format", "medreasoner/think", "medreasoner/answer", "agent/format")
    for what, (said, truth, expected) in cases.items():
        for name in TERMS.keys() - {*formats, "presence"}:
            assert TERMS[name](said, truth) == expected, (what, name)
    found_nothing = attempt(answer=pointing(), mask=nothing, overlaps=[Overlap(1, 1)])
    assert TERMS["dice"](found_nothing, ABSENT) == 1.0
    assert TERMS["medvol/spatial"](found_nothing, ABSENT) == 0.0
    assert TERMS["presence"](cases["right absent"][0], ABSENT) == TERMS["presence"](found_nothing, TRUTH) == 1.0
    assert TERMS["agent/format"](cases["right absent"][0], ABSENT) == TERMS["medreasoner/answer"](cases["right absent"][0], ABSENT) == 1.0


@given(
    st.sampled_from(sorted(TERMS)),
    st.text(max_size=40),
    st.one_of(
        st.none(),
        st.just(SAYS_ABSENT),
        st.builds(
            lambda i, a, lo, n, ps: pointing(Box2D(a, i, lo, (lo[0] + n, lo[1] + n)), points=ps),
            st.integers(0, 19), st.integers(0, 2), st.tuples(st.floats(-3, 25), st.floats(-3, 25)), st.floats(0.1, 30),
            st.lists(st.tuples(*[st.floats(0, 19)] * 3), max_size=3),
        ),
    ),
    st.booleans(),
)  # fmt: skip
def test_every_term_is_a_number_from_0_to_1(name: str, reply: str, answer: Answer | None, there: bool) -> None:
    said = attempt(answer=answer, replies=[reply], mask=TRUTH.mask, overlaps=[Overlap(0.5, 0.3)])
    assert 0.0 <= TERMS[name](said, TRUTH if there else ABSENT) <= 1.0


# ------------------------------------------------------------------------------------------- dialogues, episodes, config


def said(answer: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{answer}</answer>"


def test_dialogues_and_episodes_are_scored_alike() -> None:
    half = np.array(TRUTH.mask)
    half[:8] = False
    segmenter = ScriptedSegmenter({"liver": TRUTH.mask, "spleen": half})
    replies = {"a": said("liver"), "b": said("spleen"), "c": said("absent"), "d": "liver", "e": said("heart"), "f": said("kidney")}
    targets = Targets(("liver", "spleen", "kidney"), closed=True)
    episodes = solve(
        VIEWS, VOLUME, list(replies), protocol=SeerProtocol(), reasoner=ScriptedReasoner(replies), segmenter=segmenter, targets=targets
    )
    config = RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.1, "name": 0}})
    found = {}
    for request, reply, episode in zip(replies, replies.values(), episodes, strict=True):
        dialogue = Dialogue(VIEWS, request, SeerProtocol(), targets=targets)
        dialogue.step(reply)
        if dialogue.pending is not None:
            dialogue.observe(segmenter.segment(VOLUME, [dialogue.pending])[0])
        assert conclude(dialogue, VOLUME).status == episode.status
        values = config.values(attempt_of(dialogue, TRUTH), TRUTH)
        again = config.values(attempt_of(episode, TRUTH, protocol=SeerProtocol(), views=VIEWS), TRUTH)
        assert values == pytest.approx(again)
        found[request] = values
    assert found["a"] == {"dice": 1.0, "format": 1.0, "name": 1.0}
    assert 0 < found["b"]["dice"] < 1
    assert found["b"]["name"] == 0.0
    assert [found[r]["dice"] for r in "cdef"] == [0, 0, 0, 0]
    assert [found[r]["format"] for r in "cdef"] == [1, 0, 1, 1]
    with pytest.raises(TypeError, match="protocol and views"):
        attempt_of(episodes[0], TRUTH)


def test_a_config_is_composed_saved_and_read_back() -> None:
    config = RewardConfig.from_json({"preset": "seer", "terms": {"dice": 2, "format": 0.2, "presence": 0.1}})
    assert config.stability == Stability(0.5, "total", "dice")
    assert config.total({"dice": 0.5, "format": 1.0, "presence": 1.0}) == pytest.approx(1.3)
    for one in (config, *PRESETS.values()):
        assert RewardConfig.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert RewardConfig.from_json({"preset": "seer", "stability": None}).stability is None
    assert RewardConfig.from_json({"preset": "seer", "terms": {"iou": 1}}).stability is None
    between = RewardConfig.from_json(
        {"terms": {"iou": 1}, "stability": {"lambda": 0.1, "variant": "between", "term": "iou"}, "clip": [0, 1]}
    )
    assert between.stability == Stability(0.1, "between", "iou")
    assert between.total({"iou": 3.0}) == 1.0


@dataclass(frozen=True)
class Bad:
    value: object
    says: str
    id: str = field(default="")


BAD = [
    Bad("sear", "Did you mean seer"),
    Bad(3, "name of a preset or an object"),
    Bad({"term": {}}, "Did you mean terms"),
    Bad({"terms": {}}, "no term"),
    Bad({"terms": {"dise": 1}}, "Did you mean dice"),
    Bad({"terms": {"dice": "x"}}, "must be a number"),
    Bad({"terms": {"dice": float("nan")}}, "must be a number"),
    Bad({"terms": ["dice"]}, "must be an object"),
    Bad({"preset": "seer", "stability": {"lambda": 0.6}}, "0 to 0.5"),
    Bad({"preset": "seer", "stability": {"lambda": "much"}}, "0 to 0.5"),
    Bad({"preset": "seer", "stability": {"lamda": 0.5}}, "Did you mean lambda"),
    Bad({"preset": "seer", "stability": {"variant": "both"}}, "total or between"),
    Bad({"preset": "seer", "stability": {"term": "dcie"}}, "no reward term"),
    Bad({"preset": "seer", "stability": {"term": "iou"}}, "no weight in this reward"),
    Bad({"preset": "seer", "stability": 3}, "null or an object"),
    Bad({"preset": "seer", "clip": [1, 0]}, "no range"),
    Bad({"preset": "seer", "clip": 1}, r"null or \[low, high\]"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.says)
def test_a_bad_config_is_one_sentence(bad: Bad) -> None:
    with pytest.raises(PlanError, match=bad.says):
        RewardConfig.from_json(bad.value)
