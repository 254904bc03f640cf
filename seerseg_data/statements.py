"""Evidence in words: the sentences that a measurement is said in. See `seerseg_data.evidence`."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from seerseg_data.evidence import Evidence, Scene

Detail = Literal["short", "full"]

SHORT_TOKENS = 32
"""Words and marks in a short trace."""

HOUNSFIELD = ((-500.0, "air"), (-150.0, "air mixed with tissue"), (-30.0, "fat"), (15.0, "fluid"), (100.0, "soft tissue"),
              (250.0, "enhanced or calcified tissue"), (math.inf, "bone or dense contrast"))  # fmt: skip
"""Upper ends in HU and what has such values."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokens(text: str) -> int:
    """Words and marks: what a short trace is held to."""
    return len(_TOKEN.findall(text))


def numbers(found: Sequence[int], joint: str = "-") -> str:
    """[3, 4, 5, 8] -> "3-5, 8"."""
    runs: list[list[int]] = []
    for n in found:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}{joint}{b}" for a, b in runs)


def sentences(evidence: Evidence, rng: random.Random, detail: Detail = "short") -> str:
    """The evidence in words; `rng` chooses among wordings and, when short, which of the lesser facts are said. Short: at most
    SHORT_TOKENS words and marks, what can be seen first; full: everything that is known."""
    return _short(evidence, rng) if detail == "short" else _full(evidence, rng)


def scene_sentences(scene: Scene, rng: random.Random, detail: Detail = "short") -> str:
    """What a scan shows instead, for a target that is not in it: modality, region, what is labelled. No word about the target."""
    what = _scan(scene.volume.modality, scene.regions)
    names = [part.name for part in scene.named]
    most = 4 if detail == "short" else 12
    if len(names) > most:
        names = [names[i] for i in sorted(rng.sample(range(len(names)), most))]
    more = len(scene.named) - len(names)
    listed = ", ".join(names) + (f" and {more} more" if more else "")
    if detail == "short":
        shows = rng.choice(["shows", "seen:", "there are"])
        text = f"{what}. {shows} {listed}" if names else f"{what}, nothing of what was looked for"
        while tokens(text) > SHORT_TOKENS and len(names) > 1:
            names = names[:-1]
            text = f"{what}. {shows} {', '.join(names)} and {len(scene.named) - len(names)} more"
        return text
    count = len(scene.shown)
    first = f"{count} {scene.spec.plane} slice{'s' * (count != 1)} of {_a(what)} {'are' if count != 1 else 'is'} shown."
    first = f"One image of {_a(what)} is shown." if scene.grid.shape_zyx[scene.spec.axis] == 1 else first
    return f"{first} " + (f"The scan shows {listed}." if names else "None of the structures that were looked for is in it.")


def brief_sentence(modality: str | None, regions: Sequence[str]) -> str:
    """What scan it is, and nothing of a target."""
    return _scan(modality, regions)


def _scan(modality: str | None, regions: Sequence[str]) -> str:
    named = {"CT": "CT", "MR": "MR", "PET": "PET", "US": "ultrasound", "XR": "radiograph"}.get(modality or "", modality or "scan")
    if not regions or len(regions) > 3:
        return named
    plain = [r for r in regions if r != "whole body"]
    return f"{named} of the {_listed(plain)}" if plain else named


def _listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(", ".join(words).rsplit(", ", 1))


def _a(noun: str) -> str:
    return f"{'an' if noun[:2] in ('MR', 'ul') else 'a'} {noun}"


def _place(thirds: Sequence[str | None]) -> str:
    """("upper", "front", None) -> "upper front"; a middle is said only when nothing else is."""
    said = [t for t in thirds if t and t != "middle"]
    return " ".join(said) if said else "middle" if any(thirds) else ""


def _short(e: Evidence, rng: random.Random) -> str:
    scan = _scan(e.modality, e.regions if rng.random() < 0.5 else ())
    if not e.shown:
        first = f"on none of the {e.shown_of} slices"
    elif e.shown_of == 1:
        first = "on the image" if e.slices_of == 1 else "on the slice shown"
    else:
        first = f"slice{'s' * (len(e.shown) > 1)} {numbers(e.shown)} of {e.shown_of}"
    around = rng.choice(["around", "its surroundings"])
    parts = [first]
    if e.contrast is not None:
        parts.append(f"as bright as {around}" if e.contrast == "similar" else f"{e.contrast} than {around}")
    if e.side is not None:
        parts.append({"both": "on both sides", "midline": "in the midline"}.get(e.side, f"{e.side} of midline"))
    lesser: list[str] = []
    relation = next((r for r in e.relations if r.where), None)
    if relation is not None:
        lesser.append(f"{relation.where} the {relation.other}")
    touched = next((r for r in e.relations if r.touches and r is not relation), None)
    if touched is not None:
        lesser.append(f"touches the {touched.other}")
    place = _place(e.thirds if e.side is None else (*e.thirds[:2], None))
    if place and place != "middle":
        lesser.append(f"{place} third" if " " not in place else place)
    if e.pieces > 1 and e.main_piece < 0.95:
        lesser.append(f"{e.pieces} pieces")
    if e.edges:
        lesser.append(f"reaches the {rng.choice(e.edges)} edge")
    rng.shuffle(lesser)
    text = f"{scan}. {', '.join(parts)}"
    for more in lesser:
        if tokens(f"{text}, {more}") <= SHORT_TOKENS:
            text = f"{text}, {more}"
    return text


def _full(e: Evidence, rng: random.Random) -> str:
    what = _a(_scan(e.modality, e.regions))
    out = [f"{e.shown_of} {e.plane} slice{'s' * (e.shown_of != 1)} of {what} {'are' if e.shown_of != 1 else 'is'} shown."]
    if e.slices_of == 1:
        out = [f"One image of {what} is shown."]
    out.append(_on_slices(e))
    middle = [*_where(e, rng), *_looks(e, rng), *_size(e)]
    rng.shuffle(middle)
    return " ".join([*out, *middle])


def _on_slices(e: Evidence) -> str:
    if e.slices_of == 1:
        return "The structure is on it."
    share = f"{e.slices_with} of the {e.slices_of} {e.plane} slices ({100 * e.slices_with / e.slices_of:.0f} %)"
    if not e.shown:
        return f"The structure is on none of them; in the whole scan it covers {share}."
    where = f"The structure is on slice{'s' * (len(e.shown) > 1)} {numbers(e.shown, ' to ')}"
    largest = f", largest on slice {e.shown_largest}" if len(e.shown) > 1 else ""
    return f"{where}{largest}; in the whole scan it covers {share}."


def _where(e: Evidence, rng: random.Random) -> list[str]:
    out = []
    if e.side is not None and e.side.endswith(("left", "right")):
        picture = "" if e.plane == "sagittal" else f", on the {'right' if e.side.endswith('left') else 'left'} of the picture"
        out.append(f"It lies {e.side} of the midline{picture}.")
    elif e.side is not None:
        out.append("It lies on both sides of the midline." if e.side == "both" else "It lies in the midline.")
    thirds = [t for t in e.thirds if t]
    if thirds:
        ways = ("", "in height", "in width") if e.picture else ("in height", "in depth", "in width")
        named = _listed([f"{t} third {way}" for t, way in zip(e.thirds, ways, strict=True) if t])
        out.append(f"Its centre is in the {named} of {'the picture' if e.picture else 'what is imaged of the body'}.")
    for relation in e.relations[:3]:
        if relation.where is None:
            out.append(f"It touches the {relation.other}.")
        else:
            also = rng.choice([" and touches it", ", which it touches"]) if relation.touches else ""
            out.append(f"It lies {relation.where} the {relation.other}{also}.")
    if e.edges:
        out.append(f"It reaches the {_listed(e.edges)} edge{'s' * (len(e.edges) > 1)} of the {'picture' if e.picture else 'scan'}.")
    return out


def _looks(e: Evidence, rng: random.Random) -> list[str]:
    out = []
    if e.contrast is not None:
        around = rng.choice(["what surrounds it", "its surroundings"])
        out.append(f"It is as bright as {around}." if e.contrast == "similar" else f"It is {e.contrast} than {around}.")
    if e.hounsfield is not None:
        out.append(f"Its median is {e.hounsfield:.0f} HU, in the range of {hounsfield_word(e.hounsfield)}.")
    return out


def _size(e: Evidence) -> list[str]:
    z, y, x = e.extent_mm
    if e.volume_ml is None:  # a picture has no millimetres
        size = []
    else:
        digits = 1 if e.volume_ml >= 1 else 2
        size = [f"It measures {z:.0f} mm in height, {y:.0f} mm in depth and {x:.0f} mm in width, {e.volume_ml:.{digits}f} mL."]
    if e.pieces == 1:
        return [*size, "It is one connected piece."]
    nearly = ", nearly all of it in one" if e.main_piece >= 0.95 else ""
    return [*size, f"It consists of {e.pieces} separate pieces{nearly}."]


def hounsfield_word(value: float) -> str:
    """What has such a CT value."""
    return next(word for top, word in HOUNSFIELD if value < top)
