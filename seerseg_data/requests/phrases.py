"""Ways to say which one is meant: by its side, by what lies beside it, by what it is not, by what it does.

Patterns for noun phrases, put into the sentences of `templates` and `voices`, each with lines for train, val and test.
Written for the left side; `mirrored` makes the right one of it.
"""

from __future__ import annotations

import re

PLAIN_SIDE = "left {f}"
"""The plain way to say a side belongs to all splits, as canonical names do."""

SIDE = {
    "train": """
{f} left
L {f}
lt {f}
{f} (left)
{f} on the left
left-sided {f}
{f} on the left side
{f} L
""",
    "val": """
{f}, left
lt. {f}
{f} [left]
""",
    "test": """
{f} on the left-hand side
left-hand {f}
{f} of the left side
{f} - left
{f} (lt)
{f} / L
""",
}

SIDE_OF_DESCRIBED = {
    "train": """
left {f}
{f}, on the left
{f} (the left one)
{f}, left one
""",
    "val": """
{f}, left side
{f} - the one on the left
""",
    "test": """
{f}, on the left-hand side
{f}, namely the left
left-hand {f}
""",
}

PAIR = {
    "train": """
{f} on both sides
bilateral {f}
{f} (both sides)
left and right {f}
""",
    "val": """
{f}, both sides
{f} left and right
""",
    "test": """
{f} bilaterally
{f} on either side
{f} (bilateral)
""",
}

IMPLICIT = {
    "train": """
Please outline {t}.
Which structure is {t}? Please segment it.
Segment {t}, whatever it is called.
Can you mark {t}? I forgot its name.
I mean {t}. Please outline it.
The patient calls it {t}. Please contour it.
please segment {t}
Find {t} on this {m}.
Show the students {t}.
Explain it to the patient: mark {t}.
Outline {t}, please.
We want to see {t}.
i need {t} outlined
you know, {t}. outline it pls
the thing i want is {t}
Segment what anatomy books describe as {t}.
For the quiz: segment {t}.
Question {num}: outline {t}.
What I need is {t}, in 3D.
Please draw {t} on this {m}.
Where is {t}? Please mark it on all slices.
Mark {t} so that a lay person understands.
For the patient leaflet we need a picture of {t}.
please show me {t}
pls outline {t} (name escapes me)
Contour {t} for teaching.
Kids ask: where is {t}? Please colour it.
Let us look at {t}. Please contour it.
Segment {t} in this study.
Can you find {t} for me?
Mask of {t}, please.
Please give me {t}.
Do you see {t}? Outline it.
My student wants to see {t}.
It's about {t}. Please segment it.
Looking for {t}, please mark.
Task: outline {t}.
Please highlight {t}.
Try to segment {t}.
Target: {t}.
""",
    "val": """
Guess what I mean: {t}. Mark it, please.
Could you colour {t}?
Exercise {num}: mark {t}.
one thing pls: {t}
Point me to {t}, as a mask.
I would like a picture of {t}.
Tell me where {t} is by masking it.
Put a mask on {t}.
For the visit on {day}: picture of {t}.
please locate {t}
""",
    "test": """
Trace {t}, if you would.
Name it as you like, but trace {t}.
The relatives asked about {t}; could you pick it out?
Delineate {t} on this {m}.
im looking for {t}, trace it
Exam task no. {num}: delineate {t}.
In plain words: {t}. Please extract it.
What {dr} has in mind is {t}. Kindly delineate.
Where would one find {t}? Extract it.
Isolate {t} for the patient information evening.
For a lay audience, single out {t}.
its called... well, {t}. trace pls
My professor wants {t} traced.
I only remember that it is {t}. Trace it, please.
Riddle for the AI: delineate {t}.
Can your system pick out {t}?
Extract {t} and nothing more.
A volume rendering of {t} is wanted.
Which voxels belong to {t}? Extract them.
The school class would love to see {t} traced.
""",
}

NOT_SIDE = {
    "train": """
{f} that is not the right one
{f}, but not the right one
{f} which is not on the right
{f}, not the right one
{f} (not the right one)
{f} that isn't right-sided
""",
    "val": """
{f} that is not right-sided
{f}, just not the right
{f} that is not on the right side
""",
    "test": """
{f} other than the right one
non-right {f}
{f}, anything but the right one
{f}, excluding the right
{f} apart from the right one
""",
}

NOT_SIBLING = {
    "train": """
part of the {whole} that is not the {other}
{whole}, but not the {other}
part of the {whole} which isn't the {other}
{whole} without the {other}
{whole}, everything except the {other}
""",
    "val": """
{whole}, not counting the {other}
{whole} but without its {other}
what is not {other} in the {whole}
""",
    "test": """
{whole} minus the {other}
rest of the {whole} once the {other} is taken away
{whole}, leaving out the {other}
remainder of the {whole}, i.e. excluding the {other}
""",
}

NOT_OTHER = {
    "train": """
{f}, not the {other}
{f} and not the {other}
{f} (not the {other})
{f} (please ignore the {other})
{f} without the {other}
{f} (never mind the {other})
""",
    "val": """
{f} (skip the {other})
{f} but no {other}
{f} (no {other} needed)
""",
    "test": """
{f} instead of the {other}
{f} (leave the {other} alone)
{f} rather than the {other}
{f}, omitting the {other}
{f} as opposed to the {other}
""",
}

NOTHING_ELSE = {
    "train": """
{f} and nothing else
{f} (nothing else)
{f} but not what lies around it
{f} (not its surroundings)
""",
    "val": """
{f} (no surroundings)
{f} (not anything else)
""",
    "test": """
{f} and nothing beyond it
{f} (leave out all that adjoins it)
{f} excluding its neighbourhood
""",
}

NOT_ONE_OF_TWO = {
    "train": """
{f} (not only one of them)
{f} (not just the left one)
{f} (so not only the right one)
""",
    "val": """
{f} (not merely the left)
""",
    "test": """
{f} - never just one side
{f} (not the left one alone)
""",
}

SAME_SIDE = {
    "train": """
{f} on the side of the {mark}
{f} on the same side as the {mark}
{f} of the {mark} side
""",
    "val": """
{f} on the {mark} side
{f} ipsilateral with the {mark}
""",
    "test": """
{f} ipsilateral to the {mark}
{f} that shares its side with the {mark}
{f} in the half of the trunk that holds the {mark}
""",
}

OTHER_SIDE = {
    "train": """
{f} on the opposite side of the {mark}
{f} on the other side from the {mark}
{f} opposite to the {mark}
""",
    "val": """
{f} away from the {mark} side
{f} on the side without the {mark}
""",
    "test": """
{f} contralateral to the {mark}
{f} across the midline from the {mark}
{f} in the half of the trunk that lacks the {mark}
""",
}

MIRROR = {
    "train": """
{f} opposite the right one
{f} on the opposite side of the right one
counterpart of the right {f}
""",
    "val": """
mirror image of the right {f}
{f} facing the right one
""",
    "test": """
{f} contralateral to the right one
twin of the right {f}
{f} across the midline from the right one
""",
}

ALONG = {
    "train": {
        "anterior": "part of the {whole} in front of the {other}|part of the {whole} nearest to the nose",
        "posterior": "part of the {whole} behind the {other}|part of the {whole} nearest to the back",
        "upper": "part of the {whole} above the {other}|topmost part of the {whole}",
        "lower": "part of the {whole} below the {other}|bottom part of the {whole}",
    },
    "val": {
        "anterior": "portion of the {whole} before the {other}",
        "posterior": "portion of the {whole} after the {other}",
        "upper": "portion of the {whole} over the {other}",
        "lower": "portion of the {whole} under the {other}",
    },
    "test": {
        "anterior": "section of the {whole} that lies ahead of the {other}|face-side end of the {whole}",
        "posterior": "section of the {whole} that lies dorsal to the {other}|hind end of the {whole}",
        "upper": "section of the {whole} that lies on top of the {other}",
        "lower": "section of the {whole} that lies beneath the {other}",
    },
}
"""Where one part of a whole lies beside the other, by the word that tells the two apart."""

NEXT_IN_ROW = {
    "train": """
{kind} just below {before}
{kind} right under {before}
{kind} directly above {after}
{kind} between {before} and {after}
""",
    "val": """
{kind} following {before}
{kind} preceding {after}
""",
    "test": """
{kind} immediately caudal to {before}
{kind} immediately cranial to {after}
{kind} one level beneath {before}
""",
}
"""Vertebrae and ribs by their neighbours."""

_SWAPS = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
_SIDE_WORD = re.compile(r"\b(left|right|lt|rt|L|R|l|r)\b(?!')")


def lines(block: str) -> tuple[str, ...]:
    """The lines of a block of templates."""
    return tuple(line for line in block.split("\n") if line)


def mirrored(pattern: str) -> str:
    """A pattern with left and right exchanged; slots stay."""
    pieces = re.split(r"(\{\w+\})", pattern)
    return "".join(p if p.startswith("{") else _SIDE_WORD.sub(_swap, p) for p in pieces)


def _swap(found: re.Match[str]) -> str:
    word = found.group()
    other = _SWAPS[word.lower()]
    return other.upper() if word.isupper() else other
