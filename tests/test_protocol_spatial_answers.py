"""What each spatial grammar takes, mends and refuses, and its published format score."""

from __future__ import annotations

import json

import numpy as np
import pytest
from protocol_contract import trace_of, views_of

from seerseg.prompts import Box2D
from seerseg.protocols.base import Answer, Fault, KeySlice, Trace
from seerseg.protocols.medreasoner import MedReasonerProtocol
from seerseg.protocols.medsam_agent import NO_MASK, MedSamAgentProtocol
from seerseg.protocols.medvol_r1 import MedVolR1Protocol
from seerseg.protocols.spatial import MOST_BOXES, box_numbers, box_of, key_slice, number, point_of
from seerseg.views import CaseViews, ViewSpec, render, render_slice
from seerseg.volume import Mask

medvol, medreasoner, agent = MedVolR1Protocol(), MedReasonerProtocol(), MedSamAgentProtocol()
SQUARE = views_of((10, 20, 20))
WIDE = views_of((10, 10, 20))  # half of the picture is black, above and below
FLAT = views_of((1, 20, 20))


def boxed(text: str, views: CaseViews = SQUARE) -> list[tuple[float, ...]]:
    """Edges of the boxes that medvol-r1 reads in an answer."""
    read = medvol.read(f"<think>t</think><answer>{text}</answer>", views)
    assert isinstance(read, Answer), read
    assert read.prompt is not None
    return [(*b.lo, *b.hi) for b in read.prompt.boxes]


def reason(reply: str, views: CaseViews = SQUARE, protocol: object = medvol) -> str:
    read = protocol.read(reply, views)  # type: ignore[attr-defined]
    assert isinstance(read, Fault), read
    return read.reason


def one(box: object, index: object = 3) -> str:
    return json.dumps([{"slice": index, "bbox_2d_list": [box]}])


# --------------------------------------------------------------------------------------------------------------- boxes


def test_x_runs_to_the_patients_left_and_y_to_the_back() -> None:
    """The upper left quarter of an axial picture is anterior right: the high halves of the canonical y and x axes."""
    assert boxed(one([0, 0, 500, 500])) == [(10, 10, 20, 20)]
    assert boxed(one([500, 0, 1000, 500])) == [(10, 0, 20, 10)]
    assert boxed(one([0, 500, 500, 1000])) == [(0, 10, 10, 20)]


def test_swapped_corners_are_mended_and_what_lies_outside_is_cut() -> None:
    assert boxed(one([500, 500, 0, 0])) == boxed(one([0, 0, 500, 500]))
    assert boxed(one([-400, -400, 500, 500])) == boxed(one([0, 0, 500, 500]))
    assert boxed(one([0, 0, 10**300, 10**300])) == [(0, 0, 20, 20)]
    assert boxed(one([0, 0, 1000, 1000]), WIDE) == [(0, 0, 10, 20)]  # the black margins hold no voxel


def test_a_box_without_area_covers_one_unit() -> None:
    ((v0, h0, v1, h1),) = boxed(one([300, 300, 300, 300]))
    assert (v1 - v0, h1 - h0) == pytest.approx((0.02, 0.02))
    assert (v0 + v1) / 2 == pytest.approx(14.0)


@pytest.mark.parametrize("box", [[1100, 1100, 1200, 1200], [1, 2, 3], "x", None, [1, 2, 3, None], [1, 2, 3, float("nan")], {"a": 1}])
def test_boxes_that_cannot_be_used_are_left_out_and_a_fault_when_none_is_left(box: object) -> None:
    assert "four numbers" in reason(f"<think>t</think><answer>{one(box)}</answer>")
    both = json.dumps([{"slice": 3, "bbox_2d_list": [box, [0, 0, 500, 500]]}])
    assert boxed(both) == [(10, 10, 20, 20)]


def test_a_box_in_the_black_margin_is_a_fault() -> None:
    assert "lie on the slice" in reason(f"<answer>{one([0, 0, 1000, 200])}</answer>", WIDE)


def test_what_else_the_released_code_takes() -> None:
    assert boxed('{"slice": "3", "bbox_2d_list": [["0", "0", "500", "500"]]}') == [(10, 10, 20, 20)]
    assert boxed('{"entities": [{"slice": 3, "bbox_2d_list": [[0, 0, 500, 500]]}]}') == [(10, 10, 20, 20)]
    assert boxed(f"It is here: {one([0, 0, 500, 500])} as asked") == [(10, 10, 20, 20)]
    first = f"<answer>{one([0, 0, 500, 500])}</answer> no, <answer>{one([0, 0, 1, 1])}</answer>"
    read = medvol.read(first, SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert read.prompt.boxes[0].hi == (20, 20)  # the first answer counts


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("", "<answer>"),
        ("<answer>[{", "<answer>"),
        ("<answer>the liver</answer>", "JSON"),
        ("<answer>3</answer>", "list"),
        ("<answer>[3]</answer>", "object"),
        ('<answer>[{"slice": 3}]</answer>', "no list"),
        (f'<answer>[{{"slice": 3, "bbox_2d_list": {json.dumps([[0, 0, 9, 9]] * 65)}}}]</answer>', "65 boxes"),
        ("<answer>" + "[" * 100_000 + "</answer>", "JSON"),
    ],
)
def test_faults_of_medvol(reply: str, word: str) -> None:
    assert word in reason(reply)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (f"<think>t</think><answer>{one([1, 2, 3, 4])}</answer>", 1.0),
        (f"<think> </think><answer>{one([1, 2, 3, 4])}</answer>", 0.75),
        (f"Sure. <think>t</think><answer>{one([1, 2, 3, 4])}</answer>", 0.75),
        (f"<answer>{one([1, 2, 3, 4])}</answer>", 0.5),
        (f"<think>t</think><answer>{one([3, 2, 1, 4])}</answer>", 0.75),  # x1 < x2 does not hold
        (f"<think>t</think><answer>{one([1, 2, 3, 1001])}</answer>", 0.75),
        ('<think>t</think><answer>[{"slice": 3, "bbox_2d_list": [[1, 2, 3, 4], [9, 9, 9, 9]]}]</answer>', 0.875),
        ("<think>t</think><answer>nothing</answer>", 0.5),
        ("<think>t</think><answer>[3]</answer>", 0.75),
        ("<think>t</think><answer>[]</answer>", 1.0),  # ours: absent
        ("<think>t</think><answer>{}</answer>", 0.75),
        ("<think>t</think>", 0.25),
        ("liver", 0.0),
    ],
)
def test_the_published_format_reward_of_medvol(reply: str, score: float) -> None:
    assert medvol.wellformed(reply) == pytest.approx(score)


def test_at_most_sixteen_boxes_are_written_the_largest_first() -> None:
    boxes = tuple(Box2D(0, 3, (float(i), 0.0), (i + 1.0, 20.0 - i)) for i in range(19))
    (reply,) = medvol.targets(Trace("e", "r", "ribs", slices=(KeySlice(0, 3, 99, boxes),)), SQUARE)
    read = medvol.read(reply, SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert len(read.prompt.boxes) == MOST_BOXES
    assert read.prompt.boxes[0].hi == pytest.approx((1.0, 20.0))  # type: ignore[union-attr]


def test_the_key_slice_is_a_shown_one_where_there_is_one() -> None:
    shown = SQUARE.views[1].index
    box = (Box2D(0, 0, (0.0, 0.0), (1.0, 1.0)),)
    largest, visible = KeySlice(0, 0, 100, box), KeySlice(0, shown, 60, box)
    other = KeySlice(1, 0, 500, box)
    assert key_slice(Trace("", "", "x", slices=(largest, other, visible)), SQUARE) == visible
    assert key_slice(Trace("", "", "x", slices=(largest, other)), SQUARE) == largest
    assert key_slice(Trace("", "", "x", slices=(other,)), SQUARE) is None


def test_numbers() -> None:
    assert [number(v) for v in (3, 2.5, "7", True, None, "x", float("inf"), 10**400, [1])] == [3.0, 2.5, 7.0, *[None] * 6]


def test_a_voxel_smaller_than_a_unit_still_has_a_box_around_it() -> None:
    views = views_of((1, 4, 3000))
    box = Box2D(0, 0, (1.0, 1234.0), (2.0, 1235.0))
    x1, y1, x2, y2 = box_numbers(box, views)
    assert x1 < x2
    assert y1 < y2
    back = box_of([x1, y1, x2, y2], views, 0, 0)
    assert back is not None
    assert back.lo[1] <= 1234.5 <= back.hi[1]
    top = box_numbers(Box2D(0, 0, (0.0, 0.0), (4.0, 1.0)), views, top=999)
    assert top[2] == 999
    assert top[0] < 999


# --------------------------------------------------------------------------------------------------------- medreasoner


def located(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def test_the_published_form_on_an_image() -> None:
    read = medreasoner.read(located("{'bbox': [0, 0, 500, 500], 'points_1': [250, 250], 'points_2': [100, 400]}"), FLAT)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert read.prompt.boxes == (Box2D(0, 0, (10.0, 10.0), (20.0, 20.0)),)
    assert [p.zyx for p in read.prompt.points] == [pytest.approx((0, 14.5, 14.5)), pytest.approx((0, 11.5, 17.5))]
    assert all(p.positive for p in read.prompt.points)
    assert read.rationale == "t"


def test_a_volume_needs_the_slice_and_an_image_has_none() -> None:
    said = "'bbox': [0, 0, 500, 500], 'points_1': [250, 250], 'points_2': [100, 400]}"
    assert "slice" in reason(located("{" + said), SQUARE, medreasoner)
    read = medreasoner.read(located("{'slice': 7, " + said), SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert read.prompt.points[0].zyx[0] == 7
    trace = trace_of(np.ones((1, 20, 20), bool), 0)
    assert "slice" not in medreasoner.targets(trace, FLAT)[0].split("<answer>")[1]


@pytest.mark.parametrize("key", ["points_1", "points_2"])
@pytest.mark.parametrize("at", [[1200, 5], [5], "x", [-20, 5], None])
def test_a_point_nowhere_is_a_fault(key: str, at: object) -> None:
    value = {"bbox": [0, 0, 500, 500], "points_1": [1, 1], "points_2": [1, 1], key: at}
    assert key in reason(located(json.dumps(value)), FLAT, medreasoner)


def test_a_point_on_the_rim_is_on_the_slice_and_one_in_the_margin_is_not() -> None:
    for at in ([0, 0], [1000, 1000], [0, 1000]):
        assert point_of(at, SQUARE, 0, 0) is not None
    assert point_of([500, 100], WIDE, 0, 0) is None


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (located("{'bbox':[1,2,3,4],'points_1':[1,2],'points_2':[3,4]}"), 1.0),
        (located('{"bbox":[1,2,3,4],"points_1":[1,2],"points_2":[3,4]}'), 1.0),
        (located("{'bbox':[1,2,3],'points_1':[1,2],'points_2':[3,4]}"), 0.8),
        (located("{'bbox':[1,2,3,4],'points_1':[1],'points_2':[3,4]}"), 0.8),
        (located("{'bbox':'x','points_1':[1],'points_2':[3,4]}"), 0.7),
        (located("{'bbox':[1,2,3,4]}"), 0.7),
        (located("here"), 0.6),
        (located("[1]"), 0.6),
        ("<think> </think><answer>{'bbox':[1,2,3,4],'points_1':[1,2],'points_2':[3,4]}</answer>", 0.6),
        ("<think>t</think>", 0.5),
        ("<answer>{}</answer>", 0.5),  # ours: absent is an answer, but there is no think
        ("", 0.0),
    ],
)
def test_the_published_format_rewards_of_medreasoner(reply: str, score: float) -> None:
    assert medreasoner.wellformed(reply) == pytest.approx(score)


def test_the_target_boxes_all_parts() -> None:
    mask = np.zeros((10, 20, 20), bool)
    mask[4, 2:5, 3:6] = mask[4, 12:18, 9:14] = True
    (reply,) = medreasoner.targets(trace_of(mask, 0), SQUARE)
    read = medreasoner.read(reply, SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    (box,) = read.prompt.boxes
    assert (*box.lo, *box.hi) == pytest.approx((2, 3, 18, 14), abs=0.05)
    for point in read.prompt.points:
        assert mask[tuple(round(v) for v in point.zyx)]


# --------------------------------------------------------------------------------------------------------------- agent


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


BOX = call("add_bbox", bbox_2d=[0, 0, 500, 500], view="axial", slice=3)
CLICK = call("add_point", point_2d=[250, 250], point_type="negative", view="coronal", slice=3)
STOP = call("stop_action")


def test_the_three_tools() -> None:
    read = agent.read(BOX, SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert read.prompt.boxes == (Box2D(0, 3, (10.0, 10.0), (20.0, 20.0)),)
    assert not read.done
    read = agent.read(CLICK, SQUARE)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    (point,) = read.prompt.points
    assert point.zyx[1] == 3
    assert not point.positive
    read = agent.read(STOP, SQUARE)
    assert isinstance(read, Answer)
    assert read.done
    assert read.prompt is None
    assert not read.absent


def test_an_image_needs_neither_view_nor_slice() -> None:
    read = agent.read(call("add_point", point_2d=[0, 999], point_type="positive"), FLAT)
    assert isinstance(read, Answer)
    assert read.prompt is not None
    assert read.prompt.points[0].zyx == pytest.approx((0, -0.48, 19.49), abs=0.02)


def test_several_calls_as_published() -> None:
    """The first is done; a stop among the others ends the episode."""
    two, with_stop, stop_first = (agent.read(reply, SQUARE) for reply in (BOX + CLICK, f"{BOX} then {STOP}", STOP + BOX))
    assert isinstance(two, Answer)
    assert two.prompt is not None
    assert two.prompt.kinds == {"box2d"}
    assert not two.done
    assert isinstance(with_stop, Answer)
    assert with_stop.prompt is not None
    assert with_stop.done
    assert isinstance(stop_first, Answer)
    assert stop_first.prompt is None


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("I would put a box round the liver.", "no tool call"),
        ("<tool_call>{broken</tool_call>", "no tool call"),
        ('<tool_call>{"name": "add_bbox", "arguments": {"bbox_2d": [1,2', "no tool call"),
        (call("segment"), "no tool 'segment'"),
        (BOX + call("segment"), "no tool 'segment'"),
        (call("add_bbox", view="axial", slice=3), "bbox_2d"),
        (call("add_bbox", bbox_2d=[500, 500, 0, 0], view="axial", slice=3), "x1 < x2"),
        (call("add_bbox", bbox_2d=[5, 5, 5, 9], view="axial", slice=3), "x1 < x2"),
        (call("add_bbox", bbox_2d=[1500, 1500, 1600, 1600], view="axial", slice=3), "outside"),
        (call("add_point", point_2d=[5, 5], point_type="both", view="axial", slice=3), "point_type"),
        (call("add_point", point_2d=[5, 5], view="axial", slice=3), "point_type"),
        (call("add_point", point_2d=[5000, 5], point_type="positive", view="axial", slice=3), "outside"),
        (call("add_point", point_2d=[5, 5], point_type="positive", view="oblique", slice=3), "view"),
        (call("add_point", point_2d=[5, 5], point_type="positive", view=["axial"], slice=3), "view"),
        (call("add_point", point_2d=[5, 5], point_type="positive", view="axial", slice=10), "slices 0 to 9"),
        (call("add_bbox", bbox_2d=[1, 2, 3, 4]), "slice"),
        ('<tool_call>{"name": "add_bbox", "arguments": "x"}</tool_call>', "slice"),
    ],
)
def test_what_ends_an_episode(reply: str, word: str) -> None:
    assert word in reason(reply, SQUARE, agent)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (BOX, 1.0),
        (f" {STOP}\n", 1.0),
        (f"Here: {BOX}", 0.75),
        (BOX + STOP, 0.5),
        (call("segment"), 0.25),
        ("<tool_call>{", 0.25),
        ("x", 0.0),
    ],
)
def test_the_grammar_of_a_turn(reply: str, score: float) -> None:
    assert agent.wellformed(reply) == score


def test_the_mask_is_shown_back_in_green() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 12:18, 2:8] = True
    message = agent.observe(Mask(mask, FLAT.grid), FLAT)
    assert message is not None
    assert message.role == "user"
    (image,) = message.images
    green = (image.pixels[..., 1] > 100) & (image.pixels[..., 0] < 90)
    rows, cols = np.nonzero(green)
    assert rows.max() < 16 < cols.min()  # anterior is up, the patient's left on the right
    for empty in (None, Mask(np.zeros((1, 20, 20), bool), FLAT.grid)):
        told = agent.observe(empty, FLAT)
        assert told is not None
        assert told.text == NO_MASK


def test_three_planes_through_the_middle_of_the_mask_are_shown_back() -> None:
    views = views_of((10, 20, 20), also=("coronal", "sagittal"), count=3)
    assert [view.plane for view in views.others] == ["coronal"] * 3 + ["sagittal"] * 3
    mask = np.zeros((10, 20, 20), bool)
    mask[1:4, 3:12, 9:12] = True
    message = agent.observe(Mask(mask, views.grid), views)
    assert message is not None
    assert [p.text for p in message.parts[:6:2]] == ["<axial slice 2>", "<coronal slice 7>", "<sagittal slice 10>"]  # type: ignore[union-attr]
    assert all((image.pixels[..., 1] > image.pixels[..., 0]).any() for image in message.images)
    alone = views_of((10, 20, 20), count=3)  # planned views of one plane: the nearest shown slice
    message = agent.observe(Mask(mask, alone.grid), alone)
    assert message is not None
    assert len(message.images) == 1


def test_further_planes_are_rendered_when_asked_for_and_an_image_has_only_its_own() -> None:
    views = views_of((10, 20, 20), also=("sagittal",), count=2)
    shown = views.at(2, views.others[0].index)
    assert shown is views.others[0]
    assert views.at(2, 0).map.index == 0
    assert np.array_equal(views.at(0, 5).pixels, render_slice(views.source, views.spec, 5).pixels)  # type: ignore[arg-type]
    for shape, plane in (((1, 9, 9), "axial"), ((9, 1, 9), "coronal"), ((9, 9, 1), "sagittal")):
        flat = views_of(shape, also=("coronal", "sagittal"))
        assert flat.spec.plane == plane
        assert flat.others == ()
        assert len(flat.views) == 1
        read = agent.read(call("add_bbox", bbox_2d=[0, 0, 999, 999]), flat)
        assert isinstance(read, Answer)
    assert render(views.source, views.spec).spec == views.spec  # type: ignore[arg-type]


def test_a_spec_of_one_plane_is_written_as_it_always_was() -> None:
    assert "also" not in ViewSpec().to_json()
    several = ViewSpec(also=("coronal", "sagittal"))
    assert ViewSpec.from_json(json.loads(json.dumps(several.to_json()))) == several
