"""MedVol-R1's grammar (arXiv 2605.26621): many axial slices with their numbers; thinking, one key slice and its boxes back.

    <think>...</think><answer>[{"slice": N, "bbox_2d_list": [[x1, y1, x2, y2], ...]}]</answer>

N is the index in the scan, coordinates are integers 0..1000 of the view. Each box is propagated by itself and the masks are united (the
segmenter's part). Format score and reading follow the released code: the first answer and its first entry count, corners in the wrong
order are put right, a box without area covers one unit, what lies outside is cut. Ours: instruction texts, the request at the end so
that images are encoded once, any slice of the scan may be named (the published data holds shown ones only), and
`<answer>[]</answer>` for a target that is not in the scan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from seerseg.errors import DatasetError
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer, Fault, Trace
from seerseg.protocols.messages import Message, TextPart, text_message
from seerseg.protocols.spatial import (
    MOST_BOXES,
    NOTHING,
    box_numbers,
    boxes_of,
    ending,
    first_between,
    is_absent,
    key_slice,
    only_think_and_answer,
    parse_json,
    proper_box,
    slice_number,
    tagged,
    thought,
    user,
    what_is_shown,
)
from seerseg.skills.base import Skill
from seerseg.views import MEDVOL_R1_VIEWS, CaseViews, ViewSpec
from seerseg.volume import Mask

SYSTEM = (
    "You read volumetric scans. You are given slices of one scan, each after its tag <slice N>, and a request that refers to one "
    "structure or finding. Think about where it is, choose the one slice on which it is seen best, and box every part of it there.\n"
    "Reply with exactly these two parts and nothing else:\n"
    "<think>your reasoning</think>"
    '<answer>[{"slice": N, "bbox_2d_list": [[x1, y1, x2, y2], ...]}]</answer>\n'
    "N is the slice's number. Coordinates are integers from 0 to 1000 over the image, x to the right, y down, x1 < x2, y1 < y2. "
    "If it is not in this scan, answer <answer>[]</answer>."
)


class MedVolR1Protocol:
    """One turn; the answer is a key slice with boxes."""

    name = "medvol-r1"
    max_turns = 1
    prompt_kinds = frozenset({"box2d"})
    view_spec: ViewSpec = MEDVOL_R1_VIEWS

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """System and one user message: tagged slices, instruction, skills, request. Names play no part: none is answered."""
        asked = TextPart(f"{what_is_shown(views)} Give the key slice and the boxes of what the request refers to.")
        return [text_message("system", SYSTEM), user([*tagged(views.views), asked, *ending(request, skills)])]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """The boxes of the first entry of the first answer; see the module for what is mended."""
        said = first_between(reply, "answer")
        if said is None:
            return Fault("The reply has no <answer>...</answer>.")
        entries = _entries(said)
        if entries is None:
            return Fault("The reply's answer is no JSON list or object.")
        think = (first_between(reply, "think") or "").strip()
        if not entries:
            return Answer(target=None, prompt=None, rationale=think, absent=True)
        first = entries[0]
        if not isinstance(first, dict):
            return Fault("The reply's answer holds no object with a slice and boxes.")
        index = slice_number(first.get("slice"), views, views.spec.axis)
        if isinstance(index, str):
            return Fault(index)
        boxes = boxes_of(first.get("bbox_2d_list"), views, views.spec.axis, index)
        return Fault(boxes) if isinstance(boxes, str) else Answer(target=None, prompt=Prompt(boxes=boxes), rationale=think)

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """The reply with the key slice's boxes, at most MOST_BOXES, the largest first. DatasetError when the trace has no slice along
        the viewed axis."""
        answer: list[dict[str, Any]] = []
        if not is_absent(trace):
            key = key_slice(trace, views)
            if key is None:
                raise DatasetError(
                    f"The trace of {trace.answer!r} has no {views.spec.plane} slice with boxes, which the protocol {self.name} needs. "
                    "Make the traces again with seerseg_make_traces."
                )
            answer = [{"slice": key.index, "bbox_2d_list": [box_numbers(box, views) for box in key.boxes[:MOST_BOXES]]}]
        return (f"<think>{thought(trace)}</think><answer>{json.dumps(answer)}</answer>",)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """Nothing: there is one turn."""
        return None

    def wellformed(self, reply: str) -> float:
        """The published format reward, the mean of four: the two parts and nothing else; a think that is not empty; an answer whose
        JSON is a list or object that is not empty; the share of its boxes that are proper. The empty list, our word for absent,
        counts as an answer without a wrong box."""
        said = first_between(reply, "answer")
        entries = None if said is None else _entries(said)
        scores = [float(only_think_and_answer(reply)), float(bool((first_between(reply, "think") or "").strip())), 0.0, 0.0]
        if entries is not None and (entries or parse_json(said or "") == []):
            scores[2] = 1.0
            first = entries[0] if entries and isinstance(entries[0], dict) else {}
            boxes = first.get("bbox_2d_list")
            listed = boxes if isinstance(boxes, list) else []
            scores[3] = 1.0 if not entries else sum(map(proper_box, listed)) / len(listed) if listed else 0.0
        return sum(scores) / 4


def _entries(said: str) -> list[Any] | None:
    """The entries of an answer: a list, the list under "entities", or an object alone; None when it is none of these."""
    value = parse_json(said)
    if value is NOTHING:
        return None
    if isinstance(value, dict):
        inner = value.get("entities")
        return inner if isinstance(inner, list) else [value]
    return value if isinstance(value, list) else None
