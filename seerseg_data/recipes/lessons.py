"""What the reasoners learn: groups of requests with their replies, drawn from pictures, vocabulary and sentences of training language.

A group is what prediction sends for one case: slices, and the names that may be answered. The replies are in SEER's grammar.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seerseg.protocols.base import ABSENT
from seerseg.protocols.seer import inert, normalise_name
from seerseg.skills.base import DEFAULT_TAG, TAG_OF_STYLE, Skill
from seerseg.vocabulary import Entry, Vocabulary
from seerseg_data.nano_vocabulary import CANONICAL
from seerseg_data.recipes.pictures import Picture
from seerseg_data.requests import PARAPHRASE_STYLES, Context, write_request
from seerseg_data.thesaurus import Thesaurus

Names = tuple[str, ...]

HIPPOCAMPUS = ("anterior hippocampus", "posterior hippocampus")
CT_CHEST = (
    "ribs", "cervical vertebral column", "thoracic vertebral column", "lumbar vertebral column", "right lung", "left lung", "tissue",
    "vertebral column", "lungs",
)  # fmt: skip
"""The names that the CT chest of slicerio has labels for."""
KINDS = {"hippocampus": 0.34, "full": 0.12, "scan": 0.24, "any": 0.22, "open": 0.04, "made_up": 0.04}
"""Shares of the lists of names: the two parts of a crop, all canonical names, those of a scan with some others, structures that go
together, none, and words that mean nothing."""
FIRST_KINDS = {"hippocampus": 0.10, "full": 0.02, "scan": 0.26, "any": 0.26, "open": 0.06, "made_up": 0.30}
FIRST_STYLES = ("label_prompt", "abbr_or_short", "messy_or_misspelled", "clinical_request", "formal_task")
"""At first: short requests, and names that can only be copied."""
SKILLED = 0.15
"""Share of requests that come with skills, and of these the shares with the fitting one and with a word that only a skill explains."""
FITTING, ONLY_SKILL = 0.65, 0.3
_LONGEST = 280
REWORDED = 0.35
"""Share of requests of which a word is replaced by another of general language, where a dictionary is given."""
_NONSENSE = (
    "hello", "thanks", "table", "banana", "river", "car keys", "the dog", "coffee", "my appointment", "invoice", "window", "shoe",
    "bicycle", "patient name", "the report", "guitar", "sandwich", "yesterday", "something", "stuff", "asdf", "test", "xyz",
    "what is this", "help",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """What a request is about. picture: None where no slice is shown; modality: as told; names: that may be answered, () for any."""

    picture: Picture | None
    modality: str | None
    names: Names


@dataclass(frozen=True)
class Sample:
    """A request and its reply. answer: a name of the list, or "absent"."""

    text: str
    reply: str
    answer: str
    style: str
    skills: tuple[Skill, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Requests on one case."""

    picture: Picture | None
    modality: str | None
    names: Names
    samples: tuple[Sample, ...]
    kind: str


def reply_of(evidence: str, rationale: str, answer: str) -> str:
    """In SEER's grammar."""
    return "".join(f"<{p}>{inert(t)}</{p}>" for p, t in (("evidence", evidence), ("rationale", rationale), ("answer", answer)))


class Relatives:
    """The vocabulary's structures and what is near each of them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.names = tuple(vocabulary.names)
        self.by_region: dict[str, list[str]] = defaultdict(list)
        for entry in vocabulary:
            for region in entry.regions:
                self.by_region[region].append(entry.name)
        self._whole = {member: entry.name for entry in vocabulary for member in entry.members}
        self._entries: dict[str, Entry] = {}
        self._siblings: dict[str, Names] = {}

    def entry(self, name: str) -> Entry:
        """The structure of a name of any list; one without surfaces where the vocabulary knows none."""
        if name not in self._entries:
            self._entries[name] = self.vocabulary.resolve(name) or Entry(name, name)
        return self._entries[name]

    def wholes_and_parts(self, entry: Entry) -> list[str]:
        """What it is a part of, and its parts."""
        return [name for name in (entry.part_of, self._whole.get(entry.name), *entry.members) if name]

    def siblings(self, entry: Entry) -> Names:
        """Other parts of the same whole."""
        if entry.name not in self._siblings:
            same = (e.name for e in self.vocabulary if entry.part_of and e.part_of == entry.part_of and e.name != entry.name)
            self._siblings[entry.name] = tuple(same)
        return self._siblings[entry.name]

    def close(self, entry: Entry) -> list[str]:
        """Twin, whole, parts and siblings: those that a reader mixes up."""
        return [n for n in (entry.twin, entry.part_of, *entry.members, *self.siblings(entry)) if n and n != entry.name]


class Maker:
    """Draws groups in training language.

    first: draw as in the first time of training. skilled: share of requests that come with skills.
    """

    def __init__(self, pictures: Sequence[Picture], vocabulary: Vocabulary, thesaurus: Thesaurus | None = None) -> None:
        self.vocabulary, self.thesaurus, self.relatives = vocabulary, thesaurus, Relatives(vocabulary)
        self.hippocampus = [p for p in pictures if p.kind == "hippocampus"]
        self.others = [p for p in pictures if p.kind != "hippocampus"]
        self.core = tuple(CANONICAL)
        self.first, self.skilled = False, SKILLED
        self._lists: dict[str, Callable[[random.Random], tuple[Picture | None, Names]]] = {
            "hippocampus": self._hippocampus,
            "full": self._full,
            "scan": self._scan,
            "any": self._any,
            "open": self._open,
            "made_up": self._made_up,
        }
        self._kept: list[Names] = []
        self._kept_scans: list[tuple[Picture, Names]] = []
        self._never: dict[str, frozenset[str]] = {}

    def group(self, rng: random.Random, kind: str | None = None) -> Group:
        """18 requests or fewer (kind full: 24) on one case; it may happen that there are none. kind: of KINDS, drawn without one."""
        shares = FIRST_KINDS if self.first else KINDS
        kind = kind or rng.choices(tuple(shares), tuple(shares.values()))[0]
        picture, names = self._lists[kind](rng)
        modality = picture.modality if picture else rng.choice(("CT", "MR", "MR", None))
        if modality is not None and rng.random() < 0.05:
            modality = None
        case = Case(picture, modality, names)
        drawn = [self.sample(rng, case) for _ in range(24 if kind == "full" else 18)]
        return Group(picture, modality, names, tuple(sample for sample in drawn if sample is not None), kind)

    def sample(self, rng: random.Random, case: Case) -> Sample | None:
        """One request; None when no sentence was found for what was drawn."""
        drawn = rng.random()
        if drawn < 0.03:
            text = rng.choice(_NONSENSE) if rng.random() < 0.6 else " ".join(rng.sample(_NONSENSE, 2))
            return Sample(text, reply_of(_evidence(case), "names no structure", ABSENT), ABSENT, "nonsense")
        listed = case.names or self._open_names(rng, case.picture)
        in_sight = [n for n in listed if case.picture is None or case.picture.shows(self.relatives.entry(n), n)]
        out_of_sight = [n for n in listed if n not in in_sight]
        if drawn < 0.13 and case.names:
            return self._unlisted(rng, case)
        if (drawn < 0.25 and out_of_sight) or not in_sight:
            return self._asked(rng, case, rng.choice(out_of_sight), ABSENT, "not in this scan")
        name = rng.choice(in_sight)
        return self._asked(rng, case, name, name, "")

    # ---------------------------------------------------------------------------------------------------- pictures and lists

    def _hippocampus(self, rng: random.Random) -> tuple[Picture, Names]:
        names = list(HIPPOCAMPUS)
        if rng.random() < 0.25:
            names.append("hippocampus")
        if rng.random() < 0.5:
            rng.shuffle(names)
        return rng.choice(self.hippocampus), tuple(names)

    def _full(self, rng: random.Random) -> tuple[Picture | None, Names]:
        picture = rng.choice(self.hippocampus) if rng.random() < 0.35 else rng.choice(self.others)
        names = list(self.core)
        if rng.random() < 0.4:
            names = rng.sample(names, rng.randint(50, len(names)))
        return (None if rng.random() < 0.1 else picture), tuple(names)

    def _scan(self, rng: random.Random) -> tuple[Picture, Names]:
        if len(self._kept_scans) >= 8 and rng.random() < 0.6:  # sentences for a known list are made faster
            return rng.choice(self._kept_scans)
        picture = rng.choice(self.others)
        if "lungs" in picture.seen and rng.random() < 0.35:
            return picture, CT_CHEST
        size = rng.randint(3, 30)
        names = rng.sample(picture.seen, min(len(picture.seen), size))
        names += [n for n in rng.sample(self.core, rng.randint(2, 6)) if n not in names]
        rng.shuffle(names)
        self._kept_scans = [*self._kept_scans[-9:], (picture, tuple(names))]
        return picture, tuple(names)

    def _any(self, rng: random.Random) -> tuple[Picture | None, Names]:
        picture = None if rng.random() < 0.6 else rng.choice(self.others + self.hippocampus)
        if len(self._kept) >= 8 and rng.random() < 0.6:
            names = list(rng.choice(self._kept))
            rng.shuffle(names)
            return picture, tuple(names)
        self._kept = [*self._kept[-7:], self._related(rng)]
        return picture, self._kept[-1]

    def _related(self, rng: random.Random) -> Names:
        """A list such as a dataset has: structures of a region with their twins, wholes and parts."""
        size = rng.randint(2, 24)
        by_region, every = self.relatives.by_region, self.relatives.names
        pool = by_region[rng.choice(tuple(by_region))]
        names: list[str] = []
        while len(names) < size:
            name = rng.choice(pool) if rng.random() < 0.6 else rng.choice(self.core) if rng.random() < 0.6 else rng.choice(every)
            entry = self.relatives.entry(name)
            kin = [*([entry.twin] if entry.twin else []), *self.relatives.wholes_and_parts(entry)]
            names += [name, *(n for n in kin if rng.random() < 0.45)]
        names = list(dict.fromkeys(names))[:size]
        rng.shuffle(names)
        return tuple(names)

    def _open(self, rng: random.Random) -> tuple[Picture | None, Names]:
        return (None if rng.random() < 0.5 else rng.choice(self.others + self.hippocampus)), ()

    def _made_up(self, rng: random.Random) -> tuple[None, Names]:
        names = (" ".join(_made_up_word(rng, 4) for _ in range(rng.choice((1, 1, 2)))) for _ in range(rng.randint(2, 10)))
        return None, tuple(dict.fromkeys(names))

    def _open_names(self, rng: random.Random, picture: Picture | None) -> Names:
        """What may be meant where no list is given."""
        seen = picture.seen if picture is not None and rng.random() < 0.5 else ()
        pool = seen or (self.core if rng.random() < 0.6 else self.relatives.names)
        return tuple(rng.sample(pool, min(len(pool), 3)))

    # --------------------------------------------------------------------------------------------------------------- sentences

    def _unlisted(self, rng: random.Random, case: Case) -> Sample | None:
        """A structure that is neither listed nor a whole or part of what is."""
        listed = [self.relatives.entry(name) for name in case.names]
        known = {entry.name for entry in listed}
        for _ in range(8):
            pool: Sequence[str] = self.core if rng.random() < 0.5 else self.relatives.names
            if rng.random() < 0.3:
                pool = [entry.twin for entry in listed if entry.twin] or pool
            entry = self.relatives.entry(rng.choice(pool))
            kin = set(self.relatives.wholes_and_parts(entry))
            if entry.name in known or kin & known or any(other.part_of == entry.name for other in listed[:40]):
                continue
            return self._asked(rng, case, entry.name, ABSENT, "not among the names")
        return None

    def _asked(self, rng: random.Random, case: Case, name: str, answer: str, why: str) -> Sample | None:
        """A sentence that asks for `name`; why: what the rationale says when the answer is absent."""
        if name in case.names and self.relatives.entry(name).surfaces == ():
            return self._copied(rng, case, name)
        near = tuple(sorted(case.names)) if len(case.names) < 90 else ()
        modality = case.picture.modality if case.picture else case.modality
        context = Context(modality=modality, names=near, unsided=case.picture is not None and case.picture.kind == "hippocampus")
        styles: Sequence[str] = FIRST_STYLES if self.first else PARAPHRASE_STYLES
        styles = (*styles, "out_of_region_reference", "absent") if answer == ABSENT else styles
        for _ in range(6):
            style = rng.choice(styles)
            made = write_request(name, style=style, split="train", rng=rng, vocabulary=self.vocabulary, context=context)
            if made is not None and len(made.text) < _LONGEST:
                text, surface = self._reworded(rng, made.text, made.surface, name)
                return self._replied(rng, case, text, surface, name, answer=answer, why=why, style=style)
        return None

    def _reworded(self, rng: random.Random, text: str, surface: str, name: str) -> tuple[str, str]:
        """Text and surface with another word of general language in the surface, some of the time."""
        own = self.relatives.entry(name)
        short = any(s.kind == "abbreviation" and s.text == surface for s in own.surfaces)
        if self.thesaurus is None or not surface or short or text.count(surface) != 1 or rng.random() > REWORDED:
            return text, surface
        if own.name not in self._never:  # words that tell relatives apart from it may not come in
            kin = [self.relatives.entry(name) for name in self.relatives.close(own)]
            self._never[own.name] = frozenset({w for entry in kin for w in _words(entry)} - set(_words(own)))
        other = self.thesaurus.reworded(surface, rng.choice, never=self._never[own.name])
        found = self.vocabulary.resolve(other)
        if found is not None and found.name != own.name:
            return text, surface
        return text.replace(surface, other), other

    def _copied(self, rng: random.Random, case: Case, name: str) -> Sample | None:
        """A request for a name that means nothing, in the words of one for a structure."""
        context = Context(modality="MR")
        for _ in range(6):
            style = rng.choice(("clinical_request", "abbr_or_short", "formal_task", "order_form", "chat"))
            made = write_request(rng.choice(self.core), style=style, split="train", rng=rng, vocabulary=self.vocabulary, context=context)
            if made is not None and made.surface in made.text and len(made.text) < _LONGEST:
                text = made.text.replace(made.surface, name)
                return self._replied(rng, Case(None, case.modality, case.names), text, "", name, answer=name, why="", style=style)
        return None

    def _replied(self, rng: random.Random, case: Case, text: str, surface: str, name: str, *, answer: str, why: str, style: str) -> Sample:
        """The request with its reply, and some of the time with skills. surface: the words in it that mean the structure, or ""."""
        skills: tuple[Skill, ...] = ()
        used = ""
        if not self.first and surface and rng.random() < self.skilled:
            if answer != ABSENT and text.count(surface) == 1 and rng.random() < ONLY_SKILL:
                word = _made_up_word(rng, 3)
                text, surface = text.replace(surface, word), word
                fitting, near = True, False
            else:
                fitting, near = rng.random() < FITTING, True
            others = self._other_skills(rng, surface, name, case.modality, rng.choice((0, 1, 1, 2)) if fitting else rng.choice((1, 1, 2)))
            skills = tuple(others)
            if fitting:
                right = _skill(rng, self._fitting_words(rng, surface, name, near=near), answer, case.modality, style)
                mixed = [*others, right]
                rng.shuffle(mixed)
                skills, used = tuple(mixed), f"[{mixed.index(right) + 1}] "
        means = f"{surface}: {name}" if surface and normalise_name(surface) != normalise_name(name) and len(surface.split()) <= 5 else name
        return Sample(text, reply_of(_evidence(case), used + (f"{means}, {why}" if why else means), answer), answer, style, skills)

    # ------------------------------------------------------------------------------------------------------------------ skills

    def _other_skills(self, rng: random.Random, surface: str, name: str, modality: str | None, count: int) -> list[Skill]:
        """Skills as SEER-Loop writes them, for other words than `surface`, mostly of relatives of the structure; up to `count`."""
        own = self.relatives.entry(name)
        kin = self.relatives.close(own)
        made = []
        for _ in range(count):
            other = self.relatives.entry(rng.choice(kin) if kin and rng.random() < 0.6 else rng.choice(self.core))
            texts = [t for t in other.texts(splits=("train",)) if t.casefold() != surface.casefold()]
            if texts and other.name != own.name:
                words = tuple(rng.sample(texts, min(len(texts), rng.randint(1, 3))))
                made.append(_skill(rng, words, other.name, modality))
        return made

    def _fitting_words(self, rng: random.Random, surface: str, name: str, *, near: bool) -> Names:
        """What the fitting skill is for. near: half of the time other words for the same, as a bank finds them for words that it never
        met."""
        more = [t for t in self.relatives.entry(name).texts(splits=("train",)) if t != surface]
        words = rng.sample(more, min(len(more), rng.randint(1, 3)))
        if not words or not near or rng.random() < 0.5:
            words = [surface, *words[:2]]
        rng.shuffle(words)
        return tuple(words)


def _words(entry: Entry) -> list[str]:
    """Of all that training language calls it."""
    return [word for text in entry.texts(splits=("train",)) for word in text.casefold().split()]


def _evidence(case: Case) -> str:
    if case.picture:
        return f"{case.modality or 'scan'} of the {case.picture.said}"
    return f"{case.modality} scan" if case.modality else "scan"


def _made_up_word(rng: random.Random, most: int) -> str:
    """A word of 2 to `most` syllables that no vocabulary holds."""
    syllables = [rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, most))]
    return "".join(syllables) + rng.choice(("", "n", "s", "m"))


def _skill(rng: random.Random, words: Names, answer: str, modality: str | None, style: str | None = None) -> Skill:
    tag = TAG_OF_STYLE.get(style, DEFAULT_TAG) if style else rng.choice((*sorted(set(TAG_OF_STYLE.values())), DEFAULT_TAG))
    listed = ", ".join(f"'{w}'" for w in words)
    where = f" on {modality}" if modality and rng.random() < 0.7 else ""
    return Skill("", tag, f"the request says {listed}{where}", f"answer {answer}", words=words)
