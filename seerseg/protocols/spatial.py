"""What protocols with coordinates share: numbers of a view and voxels, JSON and tags in any string, slices with their tags.

A coordinate runs from 0 to UNITS over the whole square view as it is displayed (x to the right, y down), black margins
included: it is an edge, as box edges are; the centre of pixel p lies at (p + 1/2) / size_px * UNITS. Going back adds the display flips
through `PixelMap`, so a box drawn on what is seen comes back to the voxels that are seen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from seerseg.prompts import Box2D, Point
from seerseg.protocols.base import ABSENT, KeySlice, Trace
from seerseg.protocols.messages import Message, Part, TextPart, image_of
from seerseg.protocols.seer import SKILL_RULE, inert, normalise_name
from seerseg.skills.base import Skill
from seerseg.views import PLANES, CaseViews, PixelMap, Plane, View, pixel_map

UNITS: Final = 1000
"""Of a view's side; MedVol-R1 and MedReasoner use 0..1000, MedSAM-Agent 0..999."""
MOST_BOXES: Final = 16
"""Written into one reply, the largest first: a longer list does not fit the replies' length."""
MOST_BOXES_READ: Final = 64
"""Of one reply; every box is propagated by itself, so an endless list is a fault."""
NOTHING: Final = object()
"""What `parse_json` gives for text that is no JSON; None is JSON."""
_DIGITS: Final = 6  # of voxel coordinates: equal answers are equal prompts, whatever the arithmetic leaves behind
_STARTS = re.compile(r"[\[{]")


# ----------------------------------------------------------------------------------------------------- numbers and voxels


def frame(views: CaseViews, axis: int, index: int) -> PixelMap:
    """How that slice is laid into a view, whether it is shown or not."""
    return pixel_map(views.grid, axis, index, views.spec.size_px)


def is_flat(views: CaseViews) -> bool:
    """The case is one image, so that no slice has to be named."""
    return views.grid.shape_zyx[views.spec.axis] == 1


def number(value: Any) -> float | None:
    """A finite number, given as one or as its digits; None for anything else (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def numbers(value: Any, count: int) -> list[float] | None:
    """A list of exactly `count` finite numbers, else None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    found = [number(v) for v in value]
    return None if None in found else [v for v in found if v is not None]


def slice_number(value: Any, views: CaseViews, axis: int) -> int | str:
    """The index of a slice of the scan along that axis (it need not be one of those shown), else why it is none."""
    found = number(value)
    count = views.grid.shape_zyx[axis]
    if found is None or found != math.floor(found):
        return f"The reply names no slice: {_short(value)} is no whole number."
    if not 0 <= found < count:
        return f"The reply names slice {_short(value)}, but the scan has slices 0 to {count - 1} there."
    return int(found)


def box_of(said: Sequence[float], views: CaseViews, axis: int, index: int) -> Box2D | None:
    """The box [x1, y1, x2, y2] in voxels of that slice, cut to it; None when it lies outside of the slice.

    As MedVol-R1's code: corners in the wrong order are put right, a box without area covers one unit.
    """
    where = frame(views, axis, index)
    x, y = sorted((said[0], said[2])), sorted((said[1], said[3]))
    for pair in (x, y):
        if pair[0] == pair[1]:
            pair[0], pair[1] = pair[0] - 0.5, pair[1] + 0.5
    limit = 10.0 * UNITS  # farther out is the same, and stays a number that can be calculated with
    row0, row1, col0, col1 = (min(max(v, -limit), limit) / UNITS * views.spec.size_px for v in (*y, *x))
    lo, hi = where.box_to_voxel(row0, col0, row1, col1)
    clipped = ((max(a, 0.0), min(b, float(n))) for a, b, n in zip(lo, hi, where.voxels, strict=True))
    (v0, v1), (h0, h1) = ((round(a, _DIGITS), round(b, _DIGITS)) for a, b in clipped)
    return Box2D(axis, index, (v0, h0), (v1, h1)) if v0 < v1 and h0 < h1 else None


def box_numbers(box: Box2D, views: CaseViews, top: int = UNITS) -> list[int]:
    """[x1, y1, x2, y2], integers 0..top with x1 < x2 and y1 < y2: the nearest to the box's edges, at least one unit wide."""
    row0, col0, row1, col1 = frame(views, box.axis, box.index).box_to_pixel(box.lo, box.hi)
    edges = []
    for low, high in ((col0, col1), (row0, row1)):
        a, b = (v / views.spec.size_px * UNITS for v in (low, high))
        first, last = round(a), round(b)
        if first >= last:
            first, last = math.floor(a), math.floor(a) + 1
        last = min(max(last, 1), top)
        edges.append((min(max(first, 0), last - 1), last))
    (x1, x2), (y1, y2) = edges
    return [x1, y1, x2, y2]


def point_of(said: Sequence[float], views: CaseViews, axis: int, index: int, *, positive: bool = True) -> Point | None:
    """The point [x, y] in voxels of that slice; None when it lies more than a unit outside of the slice."""
    where = frame(views, axis, index)
    unit = views.spec.size_px / UNITS
    limit = 10.0 * UNITS
    col, row = (min(max(v, -limit), limit) * unit - 0.5 for v in said)
    zyx = list(where.to_voxel(row, col))
    in_plane = [i for i in range(3) if i != axis]
    for i, n, scale in zip(in_plane, where.voxels, where.scale, strict=True):
        reach = unit / scale
        if not -0.5 - reach <= zyx[i] <= n - 0.5 + reach:
            return None
        zyx[i] = round(min(max(zyx[i], -0.5), n - 0.5 - 10**-_DIGITS), _DIGITS)
    return Point((zyx[0], zyx[1], zyx[2]), positive)


def point_numbers(zyx: Sequence[float], views: CaseViews, axis: int, top: int = UNITS) -> list[int]:
    """[x, y], integers 0..top: the nearest to the voxel's centre."""
    row, col = frame(views, axis, round(zyx[axis])).to_pixel(zyx)
    x, y = (min(max(round((v + 0.5) / views.spec.size_px * UNITS), 0), top) for v in (col, row))
    return [x, y]


def boxes_of(said: Any, views: CaseViews, axis: int, index: int) -> tuple[Box2D, ...] | str:
    """The boxes of a list, those that lie on the slice; why not, when the list is none or none of it can be used."""
    if not isinstance(said, list):
        return f"The reply's boxes are no list: {_short(said)}."
    if len(said) > MOST_BOXES_READ:
        return f"The reply lists {len(said)} boxes; at most {MOST_BOXES_READ} are read."
    found = []
    for one in said:
        edges = numbers(one, 4)
        box = None if edges is None else box_of(edges, views, axis, index)
        if box is not None:
            found.append(box)
    return tuple(found) if found else f"None of the reply's {len(said)} boxes is four numbers that lie on the slice."


def in_range(value: Any, count: int, top: int = UNITS) -> bool:
    """`count` numbers, each from 0 to top as an integer."""
    found = numbers(value, count)
    return found is not None and all(0 <= round(v) <= top for v in found)


def proper_box(value: Any, top: int = UNITS) -> bool:
    """Four numbers 0..top with x1 < x2 and y1 < y2 (after rounding)."""
    if not in_range(value, 4, top):
        return False
    x1, y1, x2, y2 = (round(v) for v in numbers(value, 4) or ())
    return x1 < x2 and y1 < y2


# ---------------------------------------------------------------------------------------------------------- tags and JSON


def first_between(reply: str, tag: str, start: int = 0) -> str | None:
    """The text of the first complete <tag>...</tag> from `start` on, case ignored."""
    return next(all_between(reply[start:], tag), None)


def all_between(reply: str, tag: str) -> Iterator[str]:
    """The texts of all complete <tag>...</tag>, case ignored; none is read twice."""
    opening, closing = re.compile(f"<{tag}>", re.IGNORECASE), re.compile(f"</{tag}>", re.IGNORECASE)
    at = 0
    while (begin := opening.search(reply, at)) and (end := closing.search(reply, begin.end())):
        yield reply[begin.end() : end.start()]
        at = end.end()


def only_think_and_answer(reply: str) -> bool:
    """Nothing but <think>...</think> and then <answer>...</answer>, as MedVol-R1's strict check."""
    text = reply.strip().lower()
    middle = re.search(r"</think>\s*<answer>", text)
    return text.startswith("<think>") and text.endswith("</answer>") and middle is not None and middle.end() <= len(text) - len("</answer>")


def parse_json(text: str, *, single_quotes: bool = False, whole: bool = False) -> Any:
    """The JSON of a text, or else, unless `whole`, the first JSON list or object in it; NOTHING when there is none.
    single_quotes: ' may stand for ". Blanks at the ends of names and words do not count (`trimmed`)."""
    tries = [text.strip()]
    if single_quotes:
        tries.append(tries[0].replace("'", '"'))
    for one in tries:
        try:
            return trimmed(json.loads(one))
        except (ValueError, RecursionError):
            start = None if whole else _STARTS.search(one)
        if start is not None:
            try:
                return trimmed(json.JSONDecoder().raw_decode(one, start.start())[0])
            except (ValueError, RecursionError):
                continue
    return NOTHING


def trimmed(value: Any) -> Any:
    """JSON with blanks at the ends of names and words taken off: tokenisers that begin every word with a blank, as nano's does, write
    {" name ": " add_point "}."""
    if isinstance(value, dict):
        return {key.strip(): trimmed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [trimmed(item) for item in value]
    return value.strip() if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------------- what is shown


def tagged(views: Sequence[View], *, planes: bool = False) -> list[Part]:
    """Each image after its tag <slice N>, or <axial slice N>; N is its index in the scan."""
    parts: list[Part] = []
    for view in views:
        plane = f"{view.plane} " if planes else ""
        parts += [TextPart(f"<{plane}slice {view.index}>"), image_of(view)]
    return parts


def ending(request: str, skills: Sequence[Skill]) -> list[Part]:
    """Skills, where there are some, and the request, as every protocol ends."""
    parts: list[Part] = []
    if skills:
        listed = "\n".join(f"[{i}] {s.id} ({s.tag}) when: {inert(s.when)} do: {inert(s.what)}" for i, s in enumerate(skills, start=1))
        parts.append(TextPart(f"{SKILL_RULE}\n<skill_bank>\n{listed}\n</skill_bank>"))
    return [*parts, TextPart(f"<raw_prompt>{inert(request)}</raw_prompt>")]


def what_is_shown(views: CaseViews) -> str:
    """One sentence on what the images are."""
    what = f"{views.modality} scan" if views.modality else "scan of unknown modality"
    if is_flat(views):
        return f"This is one image: a {what}."
    ways = {"axial": "from inferior to superior", "coronal": "from posterior to anterior", "sagittal": "from left to right"}
    way = ways[views.spec.plane]
    side = "" if views.spec.plane == "sagittal" else ", the patient's right on the left of the image"
    last = views.grid.shape_zyx[views.spec.axis] - 1
    return f"These are {len(views.views)} {views.spec.plane} slices of one {what} with slices 0 to {last}, {way}{side}."


def plane_of(axis: int) -> Plane:
    """The plane that the array axis runs through."""
    return PLANES[axis]


# ------------------------------------------------------------------------------------------------------------- traces


def is_absent(trace: Trace) -> bool:
    """The trace says that the target is not in the scan."""
    return normalise_name(trace.answer) == ABSENT


def thought(trace: Trace) -> str:
    """Evidence and rationale as one text that no tag ends."""
    return " ".join(inert(part.strip()) for part in (trace.evidence, trace.rationale) if part.strip()) or "The slices were looked at."


def key_slice(trace: Trace, views: CaseViews) -> KeySlice | None:
    """The slice to answer: of those along the viewed axis the one of the largest area among the slices shown, as MedVol-R1 trains
    on slices that were shown only; where none is shown, of all. None when the trace has none along this axis."""
    along = [s for s in trace.slices if s.axis == views.spec.axis and s.boxes]
    shown = {view.index for view in views.views}
    return max([s for s in along if s.index in shown] or along, key=lambda s: s.area, default=None)


def user(parts: Sequence[Part]) -> Message:
    """A user message."""
    return Message("user", tuple(parts))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
