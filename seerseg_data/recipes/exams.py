"""Requests with known answers on pictures that training never saw, and how a reasoner is marked on them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seerseg.protocols.base import ABSENT
from seerseg.protocols.seer import SeerProtocol, normalise_name
from seerseg.reasoners.base import Reasoner
from seerseg.vocabulary import Split, Vocabulary
from seerseg_data.phantoms import LABELS
from seerseg_data.recipes.lessons import CT_CHEST, HIPPOCAMPUS, Maker, Names
from seerseg_data.recipes.pictures import Picture, as_views
from seerseg_data.requests import Context, paraphrase_set

PROTOCOL = SeerProtocol()
_STYLES = (
    "abbr_or_short", "messy_or_misspelled", "keyboard_slips", "negated", "relational", "implicit", "report_style", "clinical_request",
)  # fmt: skip
_ABSENT_STYLES = ("out_of_region_reference", "absent", "clinical_request")
_MOST_CHEST = 96


@dataclass(frozen=True, eq=False)
class Row:
    """One request. answer: a name, or "absent"."""

    picture: Picture
    names: Names
    text: str
    answer: str
    style: str


@dataclass(frozen=True, eq=False)
class Exam:
    """Requests of one kind."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Mark:
    """n requests; exact: share with the right answer; wellformed: mean of the protocol's 0..1; styles: exact by style.

    wrong: (style, request, right answer, reply) of the others.
    """

    n: int
    exact: float
    wellformed: float
    styles: dict[str, float]
    wrong: list[tuple[str, str, str, str]]


def make_exams(held: Sequence[Picture], vocabulary: Vocabulary, split: Split = "val") -> list[Exam]:
    """Always the same for the same pictures; those without rows are left out.

    hippocampus: every style on the two parts; full list: the same against all names; phantoms: structures of each; chest: the names of
    the CT chest; absent, and absent, full list: out of region and out of the list.
    """
    maker = Maker(held, vocabulary)
    crops, phantoms = maker.hippocampus, maker.others
    rng = random.Random(5)
    exams: dict[str, list[Row]] = defaultdict(list)

    def add(exam: str, picture: Picture, names: Names, target: str, answer: str, count: int, styles: Names | None) -> None:
        near = names if len(names) < 90 else ()
        context = Context(modality=picture.modality, names=near, unsided=picture.kind == "hippocampus")
        seed = f"{split}|{exam}|{len(exams[exam])}"
        for made in paraphrase_set(target, split=split, count=count, seed=seed, vocabulary=vocabulary, context=context, styles=styles):
            exams[exam].append(Row(picture, names, made.text, answer, made.style))

    for picture in crops[:5]:
        for target in HIPPOCAMPUS:
            add("hippocampus", picture, HIPPOCAMPUS, target, target, 16, None)
        for target in HIPPOCAMPUS:
            add("full list", picture, maker.core, target, target, 8, None)
    for picture in phantoms:
        seen = tuple(name for name in picture.seen if name in LABELS)
        for target in rng.sample(seen, 2):
            add("phantoms", picture, seen, target, target, 8, _STYLES)
        if "lungs" in picture.seen and len(exams["chest"]) < _MOST_CHEST:
            for target in ("left lung", "right lung", "ribs", "vertebral column"):
                add("chest", picture, CT_CHEST, target, target, 8, _STYLES)
    for picture in (*crops[:2], *phantoms[:4]):
        names = HIPPOCAMPUS if picture.kind == "hippocampus" else tuple(name for name in picture.seen if name in LABELS)
        regions = {name: maker.relatives.entry(name).regions for name in maker.core}
        for target in rng.sample([name for name in maker.core if regions[name] and picture.absent.issuperset(regions[name])], 4):
            add("absent", picture, names, target, ABSENT, 3, _ABSENT_STYLES)
            add("absent, full list", picture, maker.core, target, ABSENT, 3, _ABSENT_STYLES)
    return [Exam(name, tuple(rows)) for name, rows in exams.items() if rows]


def mark(exams: Sequence[Exam], reasoner: Reasoner) -> dict[str, Mark]:
    """Ask all requests of one picture and list together, without skills; by exam."""
    return {exam.name: _mark(exam, reasoner) for exam in exams}


def _mark(exam: Exam, reasoner: Reasoner) -> Mark:
    right: dict[str, list[bool]] = defaultdict(list)
    formed, wrong = [], []
    by_case: dict[tuple[int, Names], list[Row]] = defaultdict(list)
    for row in exam.rows:
        by_case[id(row.picture), row.names].append(row)
    for rows in by_case.values():
        views = as_views(rows[0].picture, rows[0].picture.modality)
        asked = [PROTOCOL.opening(views, row.text, (), row.names) for row in rows]
        for row, (reply, *_) in zip(rows, reasoner.reply(asked), strict=True):
            read = PROTOCOL.read(reply, views)
            said = ABSENT if getattr(read, "absent", False) else getattr(read, "target", None) or ""
            right[row.style].append(normalise_name(said) == normalise_name(row.answer))
            formed.append(PROTOCOL.wellformed(reply))
            if not right[row.style][-1]:
                wrong.append((row.style, row.text, row.answer, reply))
    every = [one for results in right.values() for one in results]
    styles = {style: round(float(np.mean(results)), 3) for style, results in right.items()}
    return Mark(len(every), float(np.mean(every)), float(np.mean(formed)), styles, wrong)


def score(marks: dict[str, Mark]) -> float:
    """What chooses a checkpoint: the mean over exams of the exact share."""
    return float(np.mean([found.exact for found in marks.values()]))
