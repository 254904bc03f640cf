"""SeerSeg's own grammar: name and anchor together, so that each can check the other.

    <evidence>...</evidence><rationale>...</rationale>
    <answer>{"target": "left lung", "side": "left", "slice": N, "boxes": [[x1, y1, x2, y2], ...]}</answer>

"side" is "left", "right" or "none"; coordinates are integers 0..1000 of the view; {"target": "absent"} when it is not in the scan.
The prompt carries text and boxes; a segmenter is given what it can take (`narrowed`), and what it draws is checked against the
anchor (`verify`):

- A segmenter that took words alone: of the parts of its mask that cross the anchor's slice, those that touch no box are taken away, as the
  reasoner looked at that slice and boxed what belongs to the target. Parts elsewhere were not looked at and stay. Where no part
  touches a box nothing is taken away: the two disagree, and that is said.
- A segmenter that took boxes alone: the name was checked against the names that may be answered, and names the mask.
- Always: agreement is the IoU of the boxes with the boxes of the mask's parts on that slice. Below AGREES_FROM the episode says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, runtime_checkable
from typing import Protocol as TypingProtocol

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError
from seerseg.prompts import Box2D, Prompt, box_voxels
from seerseg.protocols.base import ABSENT, Answer, Fault, Protocol, Trace
from seerseg.protocols.messages import Message, TextPart, text_message
from seerseg.protocols.seer import MAX_ANSWER_CHARS, inert, last_between, normalise_name
from seerseg.protocols.spatial import (
    MOST_BOXES,
    box_numbers,
    boxes_of,
    ending,
    is_absent,
    key_slice,
    parse_json,
    proper_box,
    slice_number,
    tagged,
    user,
    what_is_shown,
)
from seerseg.segmenters.base import Capabilities
from seerseg.skills.base import Skill
from seerseg.views import CaseViews, ViewSpec
from seerseg.volume import Mask

Bool = NDArray[np.bool_]
Side = Literal["left", "right", "none"]
AGREES_FROM: Final = 0.3
"""Agreement (box IoU) below this is reported as disagreement: a box that overlaps less marks another structure or another part."""
MIDDLE: Final = 0.05
"""Of the scan's width to either side of its middle: no side is seen there."""
SYSTEM = (
    "You turn a clinician's free-text request about a 3D scan into a name and an anchor that segmentation models can execute. Look at the "
    "slices first: what is shown, which region, which side. Repair spelling, resolve abbreviations by what the scan shows, keep the side "
    "exactly as meant, drop everything that is not the target. Then choose the slice on which the target is seen best and box every "
    f"part of it there. If the target is not in this scan, the target is {ABSENT}.\n"
    "Reply with exactly these three parts, in this order, and nothing else:\n"
    "<evidence>what the slices and the words show</evidence><rationale>how the request leads to the answer</rationale>"
    '<answer>{"target": NAME, "side": "left", "right" or "none", "slice": N, "boxes": [[x1, y1, x2, y2], ...]}</answer>\n'
    "N is the number in the tag <slice N>. Coordinates are integers from 0 to 1000 over the image, x to the right, y down, x1 < x2, "
    f'y1 < y2. For a target that is not there: <answer>{{"target": "{ABSENT}"}}</answer>.'
)
_PARTS = ("evidence", "rationale", "answer")
_WHOLE = re.compile(r"\s*<evidence>[^<]+</evidence>\s*<rationale>[^<]+</rationale>\s*<answer>[^<]+</answer>\s*")
_SIDES = ("left", "right", "none")


@dataclass(frozen=True)
class Agreement:
    """How mask and anchor fit.

    score: IoU on the anchor's slice of the boxes with the boxes of the mask's parts, 0 when the mask has nothing there; inside: share
    of the mask on that slice that lies in the boxes; kept: parts of the mask seen on that slice that stay; dropped: parts in 3D
    that were taken away; dropped_voxels: how much that was; side_said: by the answer; side_seen: half of the scan in which the
    anchor lies.
    """

    score: float
    inside: float
    kept: int = 0
    dropped: int = 0
    dropped_voxels: int = 0
    side_said: Side = "none"
    side_seen: Side = "none"

    @property
    def agrees(self) -> bool:
        """The mask is what was boxed."""
        return self.score >= AGREES_FROM

    @property
    def conflicting_sides(self) -> bool:
        """The answer says one side, its anchor lies in the other half of the scan."""
        return "none" not in (self.side_said, self.side_seen) and self.side_said != self.side_seen

    @property
    def doubtful(self) -> bool:
        """The answer contradicts itself or what was drawn from it."""
        return not self.agrees or self.conflicting_sides

    @property
    def message(self) -> str:
        """What a person should know, "" when all fits."""
        said = []
        if not self.agrees:
            said.append(f"Mask and anchor disagree (box overlap {self.score:.2f}, {self.inside:.0%} of the mask on that slice is inside).")
        if self.dropped:
            said.append(f"{self.dropped} part(s) of the mask outside of the anchor's boxes were taken away ({self.dropped_voxels} voxels).")
        if self.conflicting_sides:
            said.append(f"The answer says {self.side_said}, but its anchor lies in the {self.side_seen} half of the scan.")
        return " ".join(said)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "score": round(self.score, 4), "inside": round(self.inside, 4), "agrees": self.agrees}


@runtime_checkable
class Checked(TypingProtocol):
    """What a protocol has besides when its answers say one thing in several ways: a segmenter needs to take only one of its
    `prompt_kinds`, and what was drawn is checked against the answer."""

    def check(self, answer: Answer, given: Prompt, mask: Mask) -> tuple[Mask, Agreement | None]:
        """The mask as the answer lets it stand, and how the two fit; None when the answer has nothing to compare with. given: what
        the segmenter was given."""
        ...


def lacking_kinds(protocol: Protocol, able: Capabilities) -> tuple[str, ...]:
    """The kinds of prompt that keep a segmenter from drawing this protocol's answers, sorted; of a `Checked` one any one will do."""
    lacking = protocol.prompt_kinds.difference(able.kinds)
    return () if isinstance(protocol, Checked) and lacking != protocol.prompt_kinds else tuple(sorted(lacking))


def narrowed(prompt: Prompt, able: Capabilities) -> Prompt:
    """The prompt without what the segmenter cannot take: kinds that it lacks, and words outside of a closed vocabulary when there is
    an anchor instead. A prompt of which nothing would be left stays as it is, so that the segmenter says what it lacks."""
    spatial = {"box2d", "box3d", "points", "mask"} & prompt.kinds & set(able.kinds)
    known = able.text != "closed" or normalise_name(prompt.text or "") in {normalise_name(name) for name in able.vocabulary}
    left = Prompt(
        text=prompt.text if "text" in able.kinds and (known or not spatial) else None,
        class_name=prompt.class_name if "class" in able.kinds else None,
        boxes=tuple(b for b in prompt.boxes if (able.box2d if isinstance(b, Box2D) else able.box3d)),
        points=prompt.points if able.points else (),
        mask=prompt.mask if able.previous_mask else None,
    )
    return left if left.kinds else prompt


class CombinedProtocol:
    """One turn; the answer is text and a key slice with boxes."""

    name = "seerseg"
    max_turns = 1
    prompt_kinds = frozenset({"text", "box2d"})
    view_spec: ViewSpec = ViewSpec(count=16)

    def opening(self, views: CaseViews, request: str, skills: Sequence[Skill], targets: Sequence[str]) -> list[Message]:
        """System and one user message: tagged slices, instruction, names, skills, request."""
        parts = [*tagged(views.views), TextPart(f"{what_is_shown(views)} Name and box the structure that the request asks for.")]
        if targets:
            parts.append(TextPart(f"<targets>{'; '.join((*targets, ABSENT))}</targets>"))
        return [text_message("system", SYSTEM), user([*parts, *ending(request, skills)])]

    def read(self, reply: str, views: CaseViews) -> Answer | Fault:
        """The last answer. The name is needed; an anchor that cannot be read is left out, and the episode says that there was none
        (a segmenter without words then refuses). A bare name instead of JSON is read as a name without anchor."""
        evidence, rationale, said = ((last_between(reply, part) or "").strip() for part in _PARTS)
        if not said:
            return Fault("The reply has no <answer>...</answer>, or it is empty.")
        value = parse_json(said)
        if not isinstance(value, dict):
            value = {"target": said} if not set("{}[]<>").intersection(said) else {}
        target = value.get("target")
        name = " ".join(target.split()) if isinstance(target, str) else ""
        if not normalise_name(name) or len(name) > MAX_ANSWER_CHARS or "<" in name or ">" in name:
            return Fault("The reply's answer names no target.")
        if normalise_name(name) == ABSENT:
            return Answer(target=None, prompt=None, evidence=evidence, rationale=rationale, absent=True)
        index = slice_number(value.get("slice"), views, views.spec.axis)
        boxes = "" if isinstance(index, str) else boxes_of(value.get("boxes"), views, views.spec.axis, index)
        prompt = Prompt(text=name, boxes=() if isinstance(boxes, str) else boxes)
        return Answer(target=name, prompt=prompt, evidence=evidence, rationale=rationale)

    def targets(self, trace: Trace, views: CaseViews) -> tuple[str, ...]:
        """The reply with name, side and anchor. DatasetError when the trace has no slice along the viewed axis."""
        answer: dict[str, Any] = {"target": ABSENT}
        if not is_absent(trace):
            key = key_slice(trace, views)
            if key is None:
                raise DatasetError(
                    f"The trace of {trace.answer!r} has no {views.spec.plane} slice with boxes, which the protocol {self.name} needs. "
                    "Make the traces again with seerseg_make_traces."
                )
            boxes = [box_numbers(box, views) for box in key.boxes[:MOST_BOXES]]
            answer = {"target": inert(trace.answer), "side": side_of(trace.answer), "slice": key.index, "boxes": boxes}
        said = {"evidence": inert(trace.evidence), "rationale": inert(trace.rationale), "answer": json.dumps(answer, ensure_ascii=False)}
        return ("".join(f"<{part}>{said[part]}</{part}>" for part in _PARTS),)

    def observe(self, mask: Mask | None, views: CaseViews) -> Message | None:
        """Nothing: there is one turn."""
        return None

    def wellformed(self, reply: str) -> float:
        """1 for the three parts in order, none empty, whose answer is an object with a name, a side that is the name's, a slice and proper
        boxes (or absent alone); otherwise half the share, in eighths, of evidence, rationale, answer's object, name, side, slice,
        boxes, and nothing beside the three parts."""
        bare = _WHOLE.fullmatch(reply) is not None
        evidence, rationale, said = ((last_between(reply, part) or "").strip() for part in _PARTS)
        value = parse_json(said, whole=True) if said else None
        fields = value if isinstance(value, dict) else {}
        target = fields.get("target")
        name = normalise_name(target) if isinstance(target, str) else ""
        boxes, index = fields.get("boxes"), fields.get("slice")
        absent = fields == {"target": target} and name == ABSENT
        marks = [
            bool(evidence),
            bool(rationale),
            isinstance(value, dict),
            bool(name),
            absent or (bool(name) and fields.get("side") == side_of(name)),
            absent or (isinstance(index, int) and not isinstance(index, bool) and index >= 0),
            absent or (isinstance(boxes, list) and bool(boxes) and all(map(proper_box, boxes))),
            bare,
        ]
        return 1.0 if all(marks) else 0.5 * sum(marks) / len(marks)

    def check(self, answer: Answer, given: Prompt, mask: Mask) -> tuple[Mask, Agreement | None]:
        """See the module."""
        boxes = tuple(box for box in (answer.prompt.boxes if answer.prompt else ()) if isinstance(box, Box2D))
        if not boxes:
            return mask, None
        kept, parts = (mask, None) if given.boxes else select(mask, boxes)
        agreement = verify(kept, boxes)
        if parts is not None:
            agreement = replace(agreement, kept=parts[0], dropped=parts[1], dropped_voxels=parts[2])
        seen = side_seen(boxes, mask)
        return kept, replace(agreement, side_said=side_of(answer.target or ""), side_seen=seen)


def side_of(name: str) -> Side:
    """The side that a name says, "none" when it says none or both."""
    found = {word for word in re.findall(r"[a-z]+", name.replace("_", " ").casefold()) if word in ("left", "right")}
    return "left" if found == {"left"} else "right" if found == {"right"} else "none"


def side_seen(boxes: Sequence[Box2D], mask: Mask) -> Side:
    """The half of the scan, by world x (which runs to the patient's right), in which the boxes' middle lies; "none" near the middle."""
    centres = []
    for box in boxes:
        zyx = [(a + b) / 2 - 0.5 for a, b in zip(box.lo, box.hi, strict=True)]
        zyx.insert(box.axis, float(box.index))
        centres.append(mask.grid.to_world(zyx)[0])
    corners_x = mask.grid.corners_mm[:, 0]
    low, high = corners_x.min(), corners_x.max()
    place = (float(np.mean(centres)) - low) / max(high - low, 1e-9) - 0.5
    return "none" if abs(place) <= MIDDLE else "right" if place > 0 else "left"


def verify(mask: Mask, boxes: Sequence[Box2D]) -> Agreement:
    """How a mask and boxes on one slice fit. Pure; ValueError without boxes."""
    if not boxes:
        raise ValueError("There is no box to compare with.")
    axis, index = boxes[0].axis, boxes[0].index
    drawn = np.take(mask.array, index, axis)
    anchor = _filled(boxes, drawn.shape)
    found = int(np.count_nonzero(drawn))
    if not found:
        return Agreement(0.0, 0.0)
    own = np.zeros_like(anchor)
    for span in _parts(drawn)[1]:
        own[span] = True
    both, either = int(np.count_nonzero(own & anchor)), int(np.count_nonzero(own | anchor))
    return Agreement(both / either, int(np.count_nonzero(drawn & anchor)) / found)


def select(mask: Mask, boxes: Sequence[Box2D]) -> tuple[Mask, tuple[int, int, int]]:
    """The mask without those of its parts (face neighbours) that cross the boxes' slice and touch none of them; how many parts stay
    on that slice, how many are taken away in 3D, and their voxels. Nothing is taken away where no part touches a box. The given
    mask is left as it is."""
    axis, index = boxes[0].axis, boxes[0].index
    crossing = np.take(mask.array, index, axis)
    if not crossing.any():
        return mask, (0, 0, 0)
    anchor = _filled(boxes, crossing.shape)
    seen, seen_spans = _parts(crossing)
    touched = set(np.unique(seen[anchor]).tolist()) - {0}
    if len(touched) in (0, len(seen_spans)):  # decided on the slice, without looking at the whole mask
        return mask, (len(seen_spans), 0, 0)
    crop = _bounds(mask.array)
    labels, spans = _parts(mask.array[crop])
    in_plane = tuple(span for i, span in enumerate(crop) if i != axis)
    on_slice = np.take(labels, index - crop[axis].start, axis)
    dropped = sorted(set(np.unique(on_slice).tolist()) - set(np.unique(on_slice[anchor[in_plane]]).tolist()) - {0})
    if not dropped:  # parts that are apart on the slice hang together elsewhere
        return mask, (len(seen_spans), 0, 0)
    stays = np.ones(len(spans) + 1, dtype=np.bool_)
    stays[[0, *dropped]] = False
    kept = np.zeros_like(mask.array)
    kept[crop] = stays[labels]
    gone = int(np.count_nonzero(labels)) - int(np.count_nonzero(kept[crop]))
    return Mask(kept, mask.grid, mask.name), (len(_parts(np.take(kept, index, axis))[1]), len(dropped), gone)


def _bounds(array: Bool) -> tuple[slice, ...]:
    """The smallest box that holds every voxel of an array that is not empty."""
    lines = [np.flatnonzero(array.any(axis=tuple(i for i in range(array.ndim) if i != axis))) for axis in range(array.ndim)]
    return tuple(slice(int(line[0]), int(line[-1]) + 1) for line in lines)


def _parts(array: Bool) -> tuple[NDArray[np.int32], list[tuple[slice, ...]]]:
    """Labels of the connected parts (face neighbours) and their boxes."""
    from scipy import ndimage

    labels, _ = ndimage.label(array)
    return labels, [span for span in ndimage.find_objects(labels) if span is not None]


def _filled(boxes: Sequence[Box2D], sizes: Sequence[int]) -> Bool:
    """The voxels of a slice that lie in a box."""
    out = np.zeros(tuple(sizes), dtype=np.bool_)
    for box in boxes:
        out[box_voxels(box.lo, box.hi, sizes)] = True
    return out
