"""What a target can be called in one scan, so that only it is meant: the vocabulary's words of one language split, with a side.

A form that by the vocabulary fits another structure of the dataset is left out.
"""

from __future__ import annotations

import random
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from seerseg.dataset import LabelDescription
from seerseg.reasoners.reading import Words
from seerseg.vocabulary import Entry, Surface, Vocabulary, fold, words
from seerseg_data.requests.phrases import PAIR, PLAIN_SIDE, SIDE, SIDE_OF_DESCRIBED, lines, mirrored
from seerseg_data.requests.slips import Guard
from seerseg_data.requests.styles import Context

_DESCRIBING = frozenset({"description", "lay", "relation"})
_PEOPLE = frozenset({"body", "brain", "heart", "chest", "patient", "head", "belly", "skull", "eye", "abdomen", "neck", "back"})
_BARE = re.compile(
    r"(where|what|everything|whatever|all|both|left and right|bilateral)\b.*|((?!following|preceding)\S+ ){0,2}[A-Za-z]{0,2}\d+",
    re.IGNORECASE,
)
_MANY = frozenset({"rib"})  # one side of these is many


@dataclass(frozen=True)
class Form:
    """A way to name a target. text: with its side; surface: as the vocabulary has it; pattern: how the side was said, "" when it
    needed no saying; kind: of the surface."""

    text: str
    surface: str
    kind: str
    pattern: str = ""

    @property
    def with_article(self) -> str:
        """ "the left lung"; without article where English has none."""
        return self.text if _bare(self.text) else f"the {self.text}"


def _bare(text: str) -> bool:
    if _BARE.fullmatch(text) or text.lower().startswith("the "):
        return True
    first = text.split(" ", 1)[0]
    return first.endswith("'s") and first[:-2].lower() not in _PEOPLE


@dataclass(frozen=True)
class Called:
    """A surface of the target, and whether a side must be added to it."""

    surface: Surface
    needs: str  # "", "left", "right", "both"; "never": it cannot be said of one side


class Names:
    """The names of one context, read with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, context: Context) -> None:
        unknown = {name: LabelDescription(name) for name in context.names if vocabulary.resolve(name) is None}
        self.vocabulary = vocabulary.extend(unknown) if unknown else vocabulary
        self.context = context
        self.entries: dict[str, Entry] = {}
        for name in context.names:
            entry = self.vocabulary.resolve(name)
            if entry is not None:
                self.entries[name] = entry
        self._called: dict[tuple[str, str], tuple[Called, ...]] = {}
        self._guards: dict[str, Guard] = {}

    def entry(self, target: str) -> Entry:
        """The structure that a target's name means; one of its own when the vocabulary does not know it."""
        found = self.entries.get(target) or self.vocabulary.resolve(target)
        return found if found is not None else self.vocabulary.extend({target: LabelDescription(target)})[target]

    def others(self, target: str) -> dict[str, Entry]:
        """The other structures of the context, by name."""
        own = self.entry(target).name
        return {entry.name: entry for entry in self.entries.values() if entry.name != own}

    def called(self, target: str, split: str) -> tuple[Called, ...]:
        """Every surface of the split by which only the target can be meant here, the canonical name first."""
        key = (target, split)
        if key not in self._called:
            entry = self.entry(target)
            own = Surface(target, "name", "train", self.vocabulary.key(target)[1])
            listed = [own, *(s for s in entry.surfaces if s.split == split and fold(s.text) != fold(target) and not _adjective(s))]
            made = [Called(s, self._needs(s, entry, target)) for s in dict.fromkeys(listed)]
            self._called[key] = tuple(c for c in made if c.surface is own or (c.needs != "never" and self._alone(c, entry, target)))
        return self._called[key]

    def _needs(self, surface: Surface, entry: Entry, target: str) -> str:
        if entry.side is None or surface.text == target:
            return ""
        says = self.vocabulary.key(surface.text)[1]
        if entry.side == "both":
            members_here = any(m in self.others(target) for m in entry.members)
            return "" if not members_here or says == "both" or _plural(surface.text) else "both"
        if self.context.unsided and self.vocabulary.key(target)[1] is None:
            return ""
        tells = surface.kind == "abbreviation" and surface.text not in self._pair_texts(entry)
        if says == "both" or (says is None and _plural(surface.text) and entry.base not in _MANY):
            return "never"
        return "" if says == entry.side or tells else entry.side

    def _pair_texts(self, entry: Entry) -> frozenset[str]:
        pair = self._pairs.get(entry.name)
        return frozenset(s.text for s in pair.surfaces) if pair is not None else frozenset()

    @cached_property
    def _pairs(self) -> dict[str, Entry]:
        return {member: entry for entry in self.vocabulary for member in entry.members}

    def _alone(self, called: Called, entry: Entry, target: str) -> bool:
        others = self.others(target)
        text, kind = called.surface.text, called.surface.kind
        kin = {entry.twin, *entry.members, *(n for n, e in others.items() if entry.name in e.members)} if called.needs else set()
        for name, other in others.items():
            if name not in kin and any(fold(s.text) == fold(text) for s in other.surfaces):
                return False
        if kind in ("description", "relation"):
            return True
        said = {"left": f"left {text}", "right": f"right {text}", "both": f"both {text}"}.get(called.needs, text)
        return not any(c.entry.name in others for c in self.vocabulary.lookup(said))

    def surfaces(self, target: str, split: str, kinds: tuple[str, ...], *, shared: bool = True) -> list[Called]:
        """Those of `called` of these kinds; shared: the canonical name may be among them."""
        return [c for n, c in enumerate(self.called(target, split)) if c.surface.kind in kinds and (n > 0 or (shared and "name" in kinds))]

    def say(self, called: Called, split: str, rng: random.Random) -> Form:
        """A surface with the side that it needs."""
        surface = called.surface
        if not called.needs:
            return Form(surface.text, surface.text, surface.kind)
        if called.needs == "both":
            table, family = PAIR, "pair"
        elif surface.kind in _DESCRIBING:
            table, family = SIDE_OF_DESCRIBED, "side_of_described"
        else:
            table, family = SIDE, "side"
        patterns = lines(table[split])
        fitting = [n for n, p in enumerate(patterns) if p.startswith("{f}") or "'s " not in surface.text]
        number = rng.choice([*fitting, -1, -1]) if family == "side" else rng.choice(fitting)
        pattern = patterns[number] if number >= 0 else PLAIN_SIDE
        if called.needs == "right":
            pattern = mirrored(pattern)
        name = f"{family}/{split}/{number}" if number >= 0 else ""
        return Form(pattern.format(f=surface.text), surface.text, surface.kind, name)

    def guard(self, target: str) -> Guard:
        """What slips in requests for this target must respect."""
        if target not in self._guards:
            own = {w for s in self.entry(target).surfaces for w in words(s.text)} | set(words(target))
            rivals = {w for e in self.others(target).values() for s in e.surfaces for w in words(s.text) if len(w) > 3} - own
            self._guards[target] = Guard(frozenset(own), tuple(sorted(rivals)), self._known)
        return self._guards[target]

    @property
    def _known(self) -> frozenset[str]:
        return _known_words(self.vocabulary)


def _adjective(surface: Surface) -> bool:
    """ "splenic" alone is read, but not said."""
    return surface.kind == "synonym" and " " not in surface.text and surface.text.lower().endswith(("ic", "iac"))


def _plural(text: str) -> bool:
    last = text.rsplit(" ", 1)[-1].lower()
    return len(last) > 3 and last.endswith(("s", "ae", "i")) and not last.endswith(("ss", "us", "is", "as"))


_KNOWN: OrderedDict[int, tuple[Vocabulary, frozenset[str]]] = OrderedDict()


def _known_words(vocabulary: Vocabulary) -> frozenset[str]:
    """Words that no slip may make: collected once per vocabulary, whatever the list of names."""
    if id(vocabulary) not in _KNOWN:
        found = Words(vocabulary).known | {w for e in vocabulary for s in e.surfaces for w in words(s.text)}
        _KNOWN[id(vocabulary)] = vocabulary, found  # the vocabulary is held, so that its id stays its own
        while len(_KNOWN) > 4:
            _KNOWN.popitem(last=False)
    return _KNOWN[id(vocabulary)][1]


_KEPT: OrderedDict[tuple[int, Context], tuple[Vocabulary, Names]] = OrderedDict()


def names_of(vocabulary: Vocabulary, context: Context) -> Names:
    """`Names` of a context; the last few are kept."""
    key = (id(vocabulary), context)
    found = _KEPT.get(key)
    if found is None or found[0] is not vocabulary:
        found = _KEPT[key] = (vocabulary, Names(vocabulary, context))
        while len(_KEPT) > 24:
            _KEPT.popitem(last=False)
    return found[1]
