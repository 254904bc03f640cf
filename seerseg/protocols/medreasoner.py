"""MedReasoner's grammar (arXiv 2508.08177): an image and an implicit question; thinking, one box and two points back.

    <think>...</think><answer>{'bbox': [x1, y1, x2, y2], 'points_1': [x, y], 'points_2': [x, y]}</answer>

Coordinates are integers 0..1000 of the image; single quotes count as double ones. Reading and the graded format score follow the
released code (the first answer counts). Ours: instruction texts, the request at the end; on a volume, which the original has not, tagged
slices are shown and the answer has a further key "slice"; `<answer>{}</answer>` for a target that is not there (the original always
answers). The two points are positive clicks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seerseg.errors import DatasetError
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols.base import Answer, Fault, KeySlice, Trace
from seerseg.protocols.messages import ImagePart, Message, Part, TextPart, text_message
from seerseg.protocols.spatial import (
    NOTHING,
    box_numbers,
    box_of,
    ending,
    first_between,
    is_absent,
    is_flat,
    key_slice,
    numbers,
    parse_json,
    point_numbers,
    point_of,
    slice_number,
    tagged,
    thought,
    user,
    what_is_shown,
)
from seerseg.skills.base import Skill
from seerseg.views import CaseViews, ViewSpec
from seerseg.volume import Mask

SYSTEM = (
    "You locate structures and findings on medical images. The question may only hint at the target: work out as a clinician would "
    "what is meant, look for it, and say where it lies, not what it means.\n"
    "Reply with exactly these two parts and nothing else:\n"
    "<think>your reasoning</think>"
    "<answer>{'bbox': [x1, y1, x2, y2], 'points_1': [x, y], 'points_2': [x, y]}</answer>\n"
    "bbox is the tightest box around the target, x1 < x2 and y1 < y2; points_1 and points_2 are two different points inside the target. "
    "Coordinates are integers from 0 to 1000 over the image, x to the right, y down. If it is not there, answer <answer>{}</answer>."
)
VOLUME_RULE = (
    "Choose the slice on which the target is seen best and put its number N, as in its tag <slice N>, under the further key 'slice'."
)
_KEYS = ("bbox", "points_1", "points_2")


class MedReasonerProtocol:
    """One turn; the answer is a box and two points."""

    name = "medreasoner"
    max_turns = 1
    prompt_kinds = frozenset({"box2d", "points"})
    view_spec: ViewSpec = ViewSpec(count=8, size_px=840)

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """System and one user message: the image, or tagged slices of a volume; instruction, skills, request."""
        asked = f"{what_is_shown(views)} Ground what the question is about."
        if is_flat(views):
            shown: list[Part] = [*(ImagePart(view.pixels, view.key) for view in views.views), TextPart(asked)]
        else:
            shown = [*tagged(views.views), TextPart(f"{asked} {VOLUME_RULE}")]
        return [text_message("system", SYSTEM), user([*shown, *ending(request, skills)])]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """The box and the points of the first answer. A box with corners in the wrong order is put right, one without area covers one
        unit, what lies outside is cut; a point outside of the slice is a Fault, as a click nowhere."""
        said = first_between(reply, "answer")
        if said is None:
            return Fault("The reply has no <answer>...</answer>.")
        value = parse_json(said, single_quotes=True)
        if not isinstance(value, dict):
            return Fault("The reply's answer is no JSON object.")
        think = (first_between(reply, "think") or "").strip()
        if not value:
            return Answer(target=None, prompt=None, rationale=think, absent=True)
        axis = views.spec.axis
        index = 0 if is_flat(views) else slice_number(value.get("slice"), views, axis)
        if isinstance(index, str):
            return Fault(index)
        edges = numbers(value.get("bbox"), 4)
        box = None if edges is None else box_of(edges, views, axis, index)
        if box is None:
            return Fault("The reply's bbox is not four numbers that lie on the slice.")
        points = []
        for key in _KEYS[1:]:
            at = numbers(value.get(key), 2)
            point = None if at is None else point_of(at, views, axis, index)
            if point is None:
                return Fault(f"The reply's {key} is not two numbers that lie on the slice.")
            points.append(point)
        return Answer(target=None, prompt=Prompt(boxes=(box,), points=tuple(points)), rationale=think)

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """The reply with the box around all parts on the key slice and two points inside (one twice where the trace has only one).
        DatasetError when the trace has no such slice or no point on it."""
        answer = "{}"
        if not is_absent(trace):
            key = key_slice(trace, views)
            if key is None or not key.points:
                raise DatasetError(
                    f"The trace of {trace.answer!r} has no {views.spec.plane} slice with boxes and points, which the protocol {self.name} "
                    "needs. Make the traces again with seerseg_make_traces."
                )
            points = [point_numbers(zyx, views, key.axis) for zyx in (key.points[0], key.points[min(1, len(key.points) - 1)])]
            where = {} if is_flat(views) else {"slice": key.index}
            answer = repr({**where, "bbox": box_numbers(_around(key), views), "points_1": points[0], "points_2": points[1]})
        return (f"<think>{thought(trace)}</think><answer>{answer}</answer>",)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """Nothing: there is one turn."""
        return None

    def wellformed(self, reply: str) -> float:
        """Half the sum of the two published format rewards: think (0 none, 0.2 empty, 1) and answer (0 none, 0.2 no JSON object, 0.4 keys
        missing or box and points both wrong, 0.6 one of them, 1). `{}`, our word for absent, counts 1."""
        think, said = first_between(reply, "think"), first_between(reply, "answer")
        return (_think_score(think) + _answer_score(said)) / 2


def _think_score(think: str | None) -> float:
    return 0.0 if think is None else 1.0 if think.strip() else 0.2


def _answer_score(said: str | None) -> float:
    if said is None:
        return 0.0
    value = parse_json(said, single_quotes=True, whole=True)
    if value is NOTHING or not isinstance(value, dict):
        return 0.2
    if not value:
        return 1.0
    if any(key not in value for key in _KEYS):
        return 0.4
    good = _plain(value["bbox"], 4) + all(_plain(value[key], 2) for key in _KEYS[1:])
    return (0.4, 0.6, 1.0)[good]


def _plain(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int | float) for v in value)


def _around(key: KeySlice) -> Box2D:
    lo, hi = zip(*((box.lo, box.hi) for box in key.boxes), strict=True)
    (v0, h0), (v1, h1) = (tuple(map(min, zip(*lo, strict=True))), tuple(map(max, zip(*hi, strict=True))))
    return Box2D(key.axis, key.index, (v0, h0), (v1, h1))
