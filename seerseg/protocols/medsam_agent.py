"""MedSAM-Agent's grammar (arXiv 2602.03320): one tool call a turn, the mask shown back in green, at most five turns.

    <tool_call>{"name": "add_bbox", "arguments": {"bbox_2d": [x1, y1, x2, y2]}}</tool_call>
    <tool_call>{"name": "add_point", "arguments": {"point_2d": [x, y], "point_type": "positive"}}</tool_call>
    <tool_call>{"name": "stop_action", "arguments": {}}</tool_call>

Coordinates are integers 0..999 of the image. As in the released code: calls are found anywhere in the reply, what is no JSON is passed
over; a reply without a call, with an unknown tool, or with arguments that cannot be used ends the episode, and the mask so far stands;
of several calls the first is done, the others are not, except that a stop among them ends the episode. Nothing is asked
twice. A stop before anything was drawn says that the target is not there.

Ours: the first reply may say in <think>...</think>, before its call, what the request means (SFT targets do), so that a reasoner names
the target before it looks for it. On a volume, which the original has not, slices of three planes are shown with tags, calls carry
"view" and "slice" besides, and what is shown back are the three orthogonal slices through the middle of the mask. Images of earlier
turns stay as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from seerseg.errors import DatasetError
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols.base import Answer, Fault, Trace
from seerseg.protocols.messages import ImagePart, Message, Part, TextPart, text_message
from seerseg.protocols.spatial import (
    NOTHING,
    all_between,
    box_numbers,
    box_of,
    ending,
    first_between,
    in_range,
    is_absent,
    is_flat,
    numbers,
    parse_json,
    plane_of,
    point_numbers,
    point_of,
    proper_box,
    slice_number,
    tagged,
    thought,
    user,
    what_is_shown,
)
from seerseg.skills.base import Skill
from seerseg.views import PLANES, CaseViews, ViewSpec, overlay
from seerseg.volume import Mask

_THOUGHT = re.compile(r"^\s*<think>[^<]*</think>")
TOOLS = ("add_bbox", "add_point", "stop_action")
TOP = 999
SYSTEM = (
    "You annotate medical images with a segmentation tool. There is no mask yet: make one with a box or a point, look at it (it is shown "
    "to you in translucent green), and correct it until it covers the target and nothing else.\n"
    "Reply with one call and nothing else, written as\n"
    '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>\n'
    "Only before the first call say in <think>...</think> what the request means.\n"
    "Tools:\n"
    'add_bbox, arguments {"bbox_2d": [x1, y1, x2, y2]}: a box around the target, x1 < x2 and y1 < y2\n'
    'add_point, arguments {"point_2d": [x, y], "point_type": "positive" or "negative"}: a click on what to take in or to leave out\n'
    "stop_action, no arguments: the mask is right, or the target is not there\n"
    "Coordinates are integers from 0 to 999 over the image, x to the right, y down."
)
VOLUME_RULE = (
    'The arguments of add_bbox and add_point also say on which slice: "view": "axial", "coronal" or "sagittal", and "slice": the number in '
    "the tag <axial slice N>."
)
NEXT = "This is the mask after your last action. What is your next action? If the mask is right, call stop_action."
NO_MASK = "There is no mask after your last action. What is your next action?"


class MedSamAgentProtocol:
    """Up to five turns; each is a box, a click or the end."""

    name = "medsam-agent"
    max_turns = 5
    prompt_kinds = frozenset({"box2d", "points"})
    view_spec: ViewSpec = ViewSpec(count=5, size_px=512, also=("coronal", "sagittal"))

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """System and one user message: the image, or tagged slices of each plane; instruction, skills, request."""
        if is_flat(views):
            shown: list[Part] = [*(ImagePart(view.pixels, view.key) for view in views.views), TextPart(what_is_shown(views))]
        else:
            counts = [(plane, views.grid.shape_zyx[PLANES.index(plane)] - 1) for plane in views.spec.also]
            also = "".join(f" Then come {plane} ones of slices 0 to {last}." for plane, last in counts)
            told = TextPart(f"{what_is_shown(views)}{also} {VOLUME_RULE}")
            shown = [*tagged(views.views, planes=True), *tagged(views.others, planes=True), told]
        asked = TextPart("Segment what the request names. What is your first action?")
        return [text_message("system", SYSTEM), user([*shown, asked, *ending(request, skills)])]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """The first call, as in the module; a Fault ends the episode."""
        calls = _calls(reply)
        if not calls:
            return Fault("The reply has no tool call that can be read.")
        unknown = [name for name, _ in calls if name not in TOOLS]
        if unknown:
            return Fault(f"There is no tool {unknown[0][:40]!r}; there are {', '.join(TOOLS)}.")
        name, said = calls[0]
        stops = any(other == "stop_action" for other, _ in calls)
        think = (first_between(reply, "think") or "").strip()
        if name == "stop_action":
            return Answer(target=None, prompt=None, rationale=think)
        where = _where(said, views)
        if isinstance(where, str):
            return Fault(where)
        prompt = _box(said, views, *where) if name == "add_bbox" else _point(said, views, *where)
        return Fault(prompt) if isinstance(prompt, str) else Answer(target=None, prompt=prompt, rationale=think, done=stops)

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """One call for each turn of the trace's trajectory, at most max_turns of them, a stop at the end where there is room; a single
        stop when absent; before the first, what the request means. DatasetError when the trace has no trajectory, or a turn is not one
        box or one point on a slice."""
        think = f"<think>{thought(trace)}</think>"
        if is_absent(trace):
            return (think + _call("stop_action", {}),)
        if not trace.turns:
            raise DatasetError(
                f"The trace of {trace.answer!r} has no trajectory, which the protocol {self.name} needs. "
                "Make the traces again with seerseg_make_traces and a segmenter."
            )
        calls = [_action(turn.prompt, views) for turn in trace.turns]
        calls = (calls if trace.turns[-1].prompt is None else [*calls, _action(None, views)])[: self.max_turns]
        return (think + calls[0], *calls[1:])

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """The mask in green on the image, or on the three slices through its middle, and the question for the next action."""
        if mask is None or not mask.array.any():
            return text_message("user", NO_MASK)
        if is_flat(views):
            view = views.views[0]
            painted = overlay(view, np.take(mask.array, view.index, view.map.axis))
            return user([ImagePart(painted.pixels, painted.key), TextPart(NEXT)])
        planes = (views.spec.plane, *views.spec.also)
        shown = [views.at(axis, _middle(mask, axis)) for axis in map(PLANES.index, planes)]
        green = [overlay(view, np.take(mask.array, view.index, view.map.axis)) for view in shown]
        return user([*tagged(green, planes=True), TextPart(NEXT)])

    def wellformed(self, reply: str) -> float:
        """1 for one call that is well formed and nothing else but a thought before it; 0.75 with other text around it; 0.5 for several
        calls; 0.25 for a call of an unknown tool, of arguments that are wrong, or cut off; 0 without any. The published format term is
        one of whole episodes."""
        calls = _calls(reply)
        if not calls or not all(_proper(name, said) for name, said in calls):
            return 0.25 if "<tool_call>" in reply.lower() else 0.0
        if len(calls) > 1:
            return 0.5
        bare = _THOUGHT.sub("", reply.lower()).strip()
        return 1.0 if bare.startswith("<tool_call>") and bare.find("</tool_call>") == len(bare) - len("</tool_call>") else 0.75


def _calls(reply: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of every call that is a JSON object with a name."""
    found = []
    for text in all_between(reply, "tool_call"):
        value = parse_json(text, whole=True)
        if value is NOTHING or not isinstance(value, dict) or not isinstance(value.get("name"), str):
            continue
        arguments = value.get("arguments", {})
        found.append((value["name"], arguments if isinstance(arguments, dict) else {}))
    return found


def _proper(name: str, said: dict[str, Any]) -> bool:
    if name == "add_bbox":
        return proper_box(said.get("bbox_2d"), TOP)
    if name == "add_point":
        return in_range(said.get("point_2d"), 2, TOP) and said.get("point_type") in ("positive", "negative")
    return name == "stop_action"


def _where(said: dict[str, Any], views: CaseViews) -> tuple[int, int] | str:
    """Axis and index of the slice that a call is about, else why there is none."""
    if is_flat(views):
        return views.spec.axis, 0
    plane = said.get("view", views.spec.plane)
    if plane not in PLANES:
        return f"The call's view is {str(plane)[:40]!r}; it is axial, coronal or sagittal."
    axis = PLANES.index(plane)
    index = slice_number(said.get("slice"), views, axis)
    return index if isinstance(index, str) else (axis, index)


def _box(said: dict[str, Any], views: CaseViews, axis: int, index: int) -> Prompt | str:
    edges = numbers(said.get("bbox_2d"), 4)
    if edges is None:
        return "The call's bbox_2d is not four numbers."
    if not (edges[0] < edges[2] and edges[1] < edges[3]):
        return "The call's bbox_2d does not have x1 < x2 and y1 < y2."
    box = box_of(edges, views, axis, index)
    return "The call's bbox_2d lies outside of the slice." if box is None else Prompt(boxes=(box,))


def _point(said: dict[str, Any], views: CaseViews, axis: int, index: int) -> Prompt | str:
    at, kind = numbers(said.get("point_2d"), 2), said.get("point_type")
    if at is None or kind not in ("positive", "negative"):
        return "The call's point_2d is not two numbers, or its point_type is neither positive nor negative."
    point = point_of(at, views, axis, index, positive=kind == "positive")
    return "The call's point_2d lies outside of the slice." if point is None else Prompt(points=(point,))


def _action(prompt: Prompt | None, views: CaseViews) -> str:
    """The call that gives the segmenter this prompt."""
    if prompt is None:
        return _call("stop_action", {})
    parts = (*prompt.boxes, *prompt.points)
    if len(parts) != 1 or prompt.kinds - {"box2d", "points", "mask"}:
        raise DatasetError("A turn of the trajectory is not one box on a slice or one point, which is what medsam-agent can do in a turn.")
    part = parts[0]
    if isinstance(part, Box2D):
        return _call("add_bbox", {**_named(part.axis, part.index, views), "bbox_2d": box_numbers(part, views, TOP)})
    (point,) = prompt.points
    axis = views.spec.axis
    where = _named(axis, round(point.zyx[axis]), views)
    at = point_numbers(point.zyx, views, axis, TOP)
    return _call("add_point", {**where, "point_2d": at, "point_type": "positive" if point.positive else "negative"})


def _named(axis: int, index: int, views: CaseViews) -> dict[str, Any]:
    return {} if is_flat(views) else {"view": plane_of(axis), "slice": index}


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def _middle(mask: Mask, axis: int) -> int:
    """The slice along the axis that halves the mask; it holds some of it."""
    profile = np.cumsum(np.count_nonzero(mask.array, axis=tuple(i for i in range(3) if i != axis)))
    return int(np.searchsorted(profile, profile[-1] / 2))
