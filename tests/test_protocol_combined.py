"""Name and anchor together: grammar, narrowing, what the anchor takes away, what is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_contract import trace_of, views_of, volume_of, words

from seerseg.model import Model, ModelSpec
from seerseg.prompts import Box2D, Box3D, Point, Prompt
from seerseg.protocols.base import Answer, Fault, Trace
from seerseg.protocols.combined import (
    AGREES_FROM,
    Agreement,
    Checked,
    CombinedProtocol,
    lacking_kinds,
    narrowed,
    select,
    side_of,
    side_seen,
    verify,
)
from seerseg.protocols.medvol_r1 import MedVolR1Protocol
from seerseg.protocols.seer import SeerProtocol
from seerseg.segmenters.base import Capabilities
from seerseg.segmenters.grow import GrowSegmenter
from seerseg.volume import Mask

protocol = CombinedProtocol()
VIEWS = views_of((10, 20, 20))
ANCHOR = '{"target": "left lung", "side": "left", "slice": 3, "boxes": [[500, 0, 1000, 500]]}'


def said(answer: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{answer}</answer>"


def read(answer: str) -> Answer:
    found = protocol.read(said(answer), VIEWS)
    assert isinstance(found, Answer), found
    return found


def test_name_and_anchor() -> None:
    answer = read(ANCHOR)
    assert answer.target == "left lung"
    assert answer.prompt is not None
    assert answer.prompt.kinds == {"text", "box2d"}
    assert answer.prompt.boxes == (Box2D(0, 3, (10.0, 0.0), (20.0, 10.0)),)
    assert (answer.evidence, answer.rationale) == ("e", "r")
    assert isinstance(protocol, Checked)
    assert not isinstance(SeerProtocol(), Checked)


@pytest.mark.parametrize("boxes", ["[]", "null", '"x"', "[[1,2,3]]", "[[2000,2000,3000,3000]]"])
def test_an_anchor_that_cannot_be_read_leaves_the_name(boxes: str) -> None:
    answer = read(f'{{"target": "left lung", "side": "left", "slice": 3, "boxes": {boxes}}}')
    assert answer.prompt is not None
    assert answer.prompt.kinds == {"text"}


def test_a_bare_name_is_a_name_and_the_last_answer_counts() -> None:
    assert read("left lung").target == "left lung"
    again = protocol.read(said("spleen") + said(ANCHOR), VIEWS)
    assert isinstance(again, Answer)
    assert again.target == "left lung"
    assert read('{"target": " Absent. "}').absent


@pytest.mark.parametrize(
    "answer", ["", "{}", "[1]", '{"target": 3}', '{"target": ""}', '{"target": "..."}', '{"target": "a<b"}', "{", "x" * 300]
)
def test_no_name_is_a_fault(answer: str) -> None:
    assert isinstance(protocol.read(said(answer), VIEWS), Fault)


@given(words, words, words.filter(lambda s: s.strip(" .,;:'\"!_")))
def test_any_name_reads_back(evidence: str, rationale: str, name: str) -> None:
    mask = np.zeros((10, 20, 20), bool)
    mask[3, 4:9, 11:17] = True
    trace = trace_of(mask, 0, name=name)
    trace = Trace(evidence, rationale, name, None, trace.slices)
    (reply,) = protocol.targets(trace, VIEWS)
    back = protocol.read(reply, VIEWS)
    assert isinstance(back, Answer)
    assert protocol.wellformed(reply) == 1.0
    assert back.absent or back.target == " ".join(name.split())


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (said(ANCHOR), 1.0),
        (said('{"target": "absent"}'), 1.0),
        (said(ANCHOR.replace('"side": "left"', '"side": "right"')), 0.5 * 7 / 8),
        (said(ANCHOR.replace("[[500, 0, 1000, 500]]", "[]")), 0.5 * 7 / 8),
        (said(ANCHOR.replace('"slice": 3', '"slice": -3')), 0.5 * 7 / 8),
        ("Well, " + said(ANCHOR), 0.5 * 7 / 8),
        (said("left lung"), 0.5 * 3 / 8),
        ("", 0.0),
    ],
)
def test_grammar(reply: str, score: float) -> None:
    assert protocol.wellformed(reply) == pytest.approx(score)


def test_sides() -> None:
    assert [side_of(name) for name in ("left lung", "Right_kidney", "liver", "left and right lungs", "leftover")] == [
        "left",
        "right",
        "none",
        "none",
        "none",
    ]
    grid = volume_of(np.zeros((10, 20, 20), np.int16)).grid
    mask = Mask(np.zeros((10, 20, 20), bool), grid)
    assert side_seen([Box2D(0, 3, (0, 12), (20, 20))], mask) == "right"  # the last axis runs to the patient's right
    assert side_seen([Box2D(1, 3, (0, 0), (10, 6))], mask) == "left"
    assert side_seen([Box2D(0, 3, (0, 0), (20, 20))], mask) == "none"
    assert side_seen([Box2D(2, 18, (0, 0), (9, 9))], mask) == "right"


# ------------------------------------------------------------------------------------------------------------ narrowing

BOTH = Prompt(text="left lung", boxes=(Box2D(0, 3, (0, 0), (5, 5)),))


def test_a_segmenter_is_given_what_it_takes() -> None:
    assert narrowed(BOTH, Capabilities(text="open")).kinds == {"text"}
    assert narrowed(BOTH, Capabilities(box2d=True, points=True)).kinds == {"box2d"}
    assert narrowed(BOTH, Capabilities(text="open", box2d=True)).kinds == {"text", "box2d"}
    assert narrowed(BOTH, Capabilities(text="closed", vocabulary=("Left_Lung",), box2d=True)).kinds == {"text", "box2d"}
    assert narrowed(BOTH, Capabilities(text="closed", vocabulary=("liver",), box2d=True)).kinds == {"box2d"}
    assert narrowed(BOTH, Capabilities(text="closed", vocabulary=("liver",))).kinds == {"text"}  # it says what it knows instead
    assert narrowed(BOTH, Capabilities(points=True)) is BOTH  # it says what it lacks
    more = Prompt(class_name="x", boxes=(Box3D((0, 0, 0), (1, 1, 1)), *BOTH.boxes), points=(Point((0, 0, 0)),))
    assert narrowed(more, Capabilities(box2d=True)).kinds == {"box2d"}
    assert narrowed(more, Capabilities(text="open", box3d=True, points=True)).kinds == {"class", "box3d", "points"}


def test_one_kind_will_do_for_the_combined_answer_and_for_no_other() -> None:
    text, box, points = Capabilities(text="open"), Capabilities(box2d=True), Capabilities(points=True)
    assert [lacking_kinds(protocol, able) for able in (text, box, points)] == [(), (), ("box2d", "text")]
    assert lacking_kinds(MedVolR1Protocol(), text) == ("box2d",)
    model = Model(ModelSpec(protocol="seerseg", segmenter="grow"), segmenter_given=GrowSegmenter())
    assert model.segmenter.card.name == "grow"


# --------------------------------------------------------------------------------------------------------- the anchor


def lungs() -> Mask:
    """Two parts that cross slice 3, and one above it."""
    array = np.zeros((10, 20, 20), bool)
    array[1:6, 5:15, 2:8] = True  # the patient's left
    array[1:6, 5:15, 12:18] = True
    array[8:9, 5:7, 12:14] = True
    return Mask(array, volume_of(array.astype(np.int16)).grid, "left lung")


LEFT, RIGHT = Box2D(0, 3, (5.0, 2.0), (15.0, 8.0)), Box2D(0, 3, (5.0, 12.0), (15.0, 18.0))
NOWHERE = Box2D(0, 3, (0.0, 9.0), (3.0, 11.0))


def test_parts_on_the_anchors_slice_that_no_box_touches_are_taken_away() -> None:
    mask = lungs()
    before = mask.array.copy()
    kept, counts = select(mask, [LEFT])
    assert counts == (1, 1, 300)
    assert not kept.array[1:6, :, 12:].any()
    assert kept.array[8].any()  # nobody looked there
    assert kept.array[:, :, :10].sum() == 300
    assert np.array_equal(mask.array, before)
    assert select(mask, [LEFT, RIGHT])[1] == (2, 0, 0)
    assert select(mask, [NOWHERE])[0] is mask  # disagreement takes nothing away
    assert select(mask, [Box2D(0, 9, (5.0, 2.0), (15.0, 8.0))])[1] == (0, 0, 0)
    sagittal, counts = select(mask, [Box2D(2, 13, (1.0, 5.0), (6.0, 15.0))])
    assert counts == (1, 1, 4)
    assert not sagittal.array[8].any()


def test_agreement_by_hand() -> None:
    mask = lungs()
    exact = verify(select(mask, [LEFT])[0], [LEFT])
    assert (exact.score, exact.inside) == (1.0, 1.0)
    assert exact.agrees
    assert exact.message == ""
    half = verify(mask, [LEFT])
    assert (half.score, half.inside) == (0.5, 0.5)
    small = verify(mask, [Box2D(0, 3, (5.0, 2.0), (10.0, 8.0))])
    assert small.score == pytest.approx(30 / 120)
    assert not small.agrees
    assert "0.25" in small.message
    assert verify(mask, [NOWHERE]).score == 0.0
    assert verify(mask, [Box2D(0, 7, (5.0, 2.0), (15.0, 8.0))]) == Agreement(0.0, 0.0)
    with pytest.raises(ValueError, match="no box"):
        verify(mask, [])
    assert 0 < AGREES_FROM < 1
    assert json.loads(json.dumps(small.to_json()))["agrees"] is False


def test_check_by_what_the_segmenter_was_given() -> None:
    answer = Answer(target="left lung", prompt=Prompt(text="left lung", boxes=(RIGHT,)))
    by_text, agreement = protocol.check(answer, Prompt(text="left lung"), lungs())
    assert agreement is not None
    assert (agreement.dropped, agreement.score) == (1, 1.0)
    assert "right half" in agreement.message
    assert "taken away" in agreement.message
    assert by_text.array[:6, :, 12:].any()
    mask = lungs()
    by_box, agreement = protocol.check(answer, Prompt(boxes=(RIGHT,)), mask)
    assert by_box is mask  # the segmenter has already used the boxes
    assert agreement is not None
    assert agreement.score == 0.5
    assert protocol.check(Answer(target="x", prompt=Prompt(text="x")), Prompt(text="x"), mask) == (mask, None)


@given(st.integers(0, 2**20))
def test_the_anchor_only_takes_away(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.random((5, 7, 6)) < 0.3
    mask = Mask(array, volume_of(array.astype(np.int16)).grid)
    axis = int(rng.integers(0, 3))
    sizes = [n for i, n in enumerate(array.shape) if i != axis]
    lo = [float(rng.integers(0, n)) for n in sizes]
    hi = [float(rng.integers(int(a) + 1, n + 1)) for a, n in zip(lo, sizes, strict=True)]
    box = Box2D(axis, int(rng.integers(0, array.shape[axis])), (lo[0], lo[1]), (hi[0], hi[1]))
    kept, (stay, dropped, gone) = select(mask, [box])
    assert not (kept.array & ~array).any()
    assert gone == int(array.sum() - kept.array.sum())
    assert (dropped == 0) == (gone == 0)
    assert stay >= 0
    assert 0 <= verify(kept, [box]).score <= 1
    assert 0 <= verify(kept, [box]).inside <= 1
