"""What anatomical structures are called: canonical names, synonyms, abbreviations, lay words, descriptions, sides.

The built-in list is `seerseg/data/vocabulary.json`; a dataset adds to it with `label_descriptions.json`. An entry of the file may
stand for many structures: `sides` makes a left one, a right one and the pair; `each` numbers them (ribs, vertebrae).
Surface forms carry the language split that they may be used in ("train" unless marked), so that test language can be kept apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from seerseg.errors import DatasetError, ModelError, did_you_mean
from seerseg.paths import read_json

SCHEMA = 1
DEFAULT_FILE = Path(__file__).parent / "data" / "vocabulary.json"

Side = Literal["left", "right", "both"]
Kind = Literal["name", "synonym", "abbreviation", "lay", "description", "relation"]
Split = Literal["train", "val", "test"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_KIND_OF_FIELD: dict[str, Kind] = {
    "synonyms": "synonym",
    "abbreviations": "abbreviation",
    "lay": "lay",
    "descriptions": "description",
    "relations": "relation",
}
_FIELDS = {"name", "sides", "plural", "singular", "each", "part_of", "made_of", "lies", "regions", "modalities", "cues", *_KIND_OF_FIELD}
REGIONS = ("head", "neck", "chest", "abdomen", "pelvis", "spine", "upper limb", "lower limb", "whole body")
MODALITIES = ("CT", "MR")
CONTRASTS = ("CT", "CT contrast", "MR", "T1", "T1C", "T2", "FLAIR", "DWI")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth")
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII")
_RANK = {"name": 0, "synonym": 1, "abbreviation": 2, "lay": 3, "description": 4, "relation": 5}
_FORM_FIELDS = {"form", "split", "side"}
_MARK = re.compile(r"\{[^{}]*\}?")
_MARKS = {"{S}", "{n}", "{nth}", "{ordinal}", "{roman}"}
_TOKEN = re.compile(r"[^\W_]+")
_SPINE_LEVEL = re.compile(r"\b([ctl])[\s-]+spine\b")
_UNCHANGED = frozenset({"pons", "lens", "biceps", "triceps", "quadriceps", "caries", "corps", "gas", "cervix"})


@dataclass(frozen=True, slots=True)
class Surface:
    """One way to say it. `side` is what the words themselves say about side, None when they do not."""

    text: str
    kind: Kind
    split: Split = "train"
    side: Side | None = None


@dataclass(frozen=True)
class Entry:
    """A structure. name: canonical; base: the name without its side; side: None when it has no twin by construction;
    lies: the side of the body an unpaired structure lies on; twin: its mirror image; members: the two of a pair;
    part_of: canonical name of what it belongs to; made_of: structures whose union it is, () when none are known;
    regions: of REGIONS; modalities: those it is commonly seen in;
    cues: (contrast of CONTRASTS, what it looks like there); surfaces: every way to say it, the canonical name first."""

    name: str
    base: str
    side: Side | None = None
    lies: Literal["left", "right"] | None = None
    twin: str | None = None
    members: tuple[str, ...] = ()
    part_of: str | None = None
    made_of: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    surfaces: tuple[Surface, ...] = ()
    cues: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def appearance(self, contrast: str) -> tuple[str, ...]:
        """Short objective words for what it looks like in a contrast of CONTRASTS; () when none are known."""
        return next((told for name, told in self.cues if name == contrast), ())

    def texts(self, *, kinds: Iterable[Kind] | None = None, splits: Iterable[Split] = ("train",)) -> list[str]:
        """The surface forms of these kinds (all when None) and language splits, canonical name first, without repeats."""
        wanted_kinds, wanted_splits = None if kinds is None else set(kinds), set(splits)
        chosen = [s.text for s in self.surfaces if s.split in wanted_splits and (wanted_kinds is None or s.kind in wanted_kinds)]
        return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Candidate:
    """A structure that a surface form can mean. exact: the words are the same, not merely of the same roots."""

    entry: Entry
    surface: Surface
    exact: bool


@dataclass(frozen=True)
class LabelDescription:
    """What one label of a dataset is called, from `label_descriptions.json`. laterality: "left", "right", "both" or None."""

    canonical: str
    synonyms: tuple[str, ...] = ()
    region: str | None = None
    laterality: str | None = None


def fold(text: str) -> str:
    """Casefolded, accents dropped, compatibility forms resolved ("Ö" -> "o", "ﬁ" -> "fi")."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(c for c in plain if not unicodedata.combining(c)).replace("œ", "oe").replace("æ", "ae")


def words(text: str) -> list[str]:
    """The folded words of a text: runs of letters and digits; a possessive 's is dropped, "L-spine" is one word."""
    folded = fold(text)
    if "'" in folded or "\u2019" in folded:
        folded = re.sub(r"['\u2019]s\b", "", folded).replace("'", "").replace("\u2019", "")
    if "spine" in folded:
        folded = _SPINE_LEVEL.sub(r"\1spine", folded)
    return _TOKEN.findall(folded)


def singular(word: str) -> str:
    """A crude singular of an English or Latin plural; other words unchanged."""
    if len(word) < 4 or word in _UNCHANGED:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("ae"):
        return word[:-1]
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
        return word[:-1]
    return word


@dataclass(frozen=True)
class Vocabulary:
    """All entries by canonical name, in file order, and the words that language is read with.

    roots: word -> the word it is taken as ("renal" -> "kidney"); side_words: word -> side; ordinary: words of everyday and
    clinical language that are never taken for a misspelt structure.
    """

    entries: Mapping[str, Entry]
    roots: Mapping[str, str] = field(default_factory=dict)
    side_words: Mapping[str, Side] = field(default_factory=dict)
    ordinary: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path | None = None) -> Vocabulary:
        """Read the built-in vocabulary (read once, then shared) or a file of the same schema; ModelError when it breaks it."""
        return _builtin() if path is None else _from_json(read_json(path, ModelError, SCHEMA), path)

    @property
    def names(self) -> tuple[str, ...]:
        """All canonical names."""
        return tuple(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Entry:
        """The entry of a canonical name; ModelError with the nearest names when there is none."""
        try:
            return self.entries[name]
        except KeyError:
            raise ModelError(f"The vocabulary has no structure {name!r}.{did_you_mean(name, self.entries)}") from None

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def root(self, word: str) -> str:
        """The root that a folded word is compared by."""
        known = self.roots.get(word)
        if known is not None:
            return known
        single = singular(word)
        return self.roots.get(single, single)

    def split_side(self, tokens: Sequence[str]) -> tuple[tuple[str, ...], Side | None]:
        """Roots of the tokens without side words and without 'of', 'the', 'and', and the side that the words say."""
        rest: list[str] = []
        sides: list[Side] = []
        for token in tokens:
            side = self.side_words.get(token)
            if side is not None:
                sides.append(side)
            elif token not in _GLUE:
                rest.append(self.root(token))
        side_said = None if not sides else "both" if len(set(sides)) > 1 else sides[0]
        return (tuple(rest), side_said) if rest else (tuple(self.root(t) for t in tokens), None)

    def key(self, text: str) -> tuple[tuple[str, ...], Side | None]:
        """What a text is indexed by: its sorted roots and its side; word order and inflection do not matter."""
        roots, side = self.split_side(words(text))
        return tuple(sorted(set(roots))), side

    @cached_property
    def bags(self) -> dict[tuple[str, ...], list[tuple[Entry, Surface]]]:
        """Sorted roots without side -> the entries and surfaces that they can mean. Descriptions and relations are left out."""
        index: dict[tuple[str, ...], list[tuple[Entry, Surface]]] = {}
        for base, said, entry, surface in self._keyed():
            index.setdefault(base, []).append((entry, surface if surface.side == said else replace(surface, side=said)))
        return index

    def _keyed(self) -> Iterator[tuple[tuple[str, ...], Side | None, Entry, Surface]]:
        memo: dict[str, tuple[tuple[str, ...], Side | None]] = {}
        for entry in self:
            for surface in entry.surfaces:
                if surface.kind in ("description", "relation"):
                    continue
                found = memo.get(surface.text)
                if found is None:
                    found = memo[surface.text] = self.key(surface.text)
                yield found[0], surface.side or found[1], entry, surface

    def lookup(self, surface: str) -> list[Candidate]:
        """The structures that a surface form can mean, likeliest first; [] when unknown.

        Case, punctuation, underscores, word order, inflection and where the side stands do not matter ("kidney_left",
        "Left renal", "vertebrae_L1"). Without a side both sides and the pair come back, the pair first. No spelling repair.
        """
        key, side = self.key(surface)
        folded = " ".join(words(surface))
        found: dict[str, tuple[tuple[int, ...], Candidate]] = {}
        for entry, form in self.bags.get(key, ()):
            if side is not None and form.side is not None and form.side != side:
                continue
            if side is not None and form.side is None and side != entry.lies:
                continue
            exact = " ".join(words(form.text)) == folded
            rank = (int(not exact), _RANK[form.kind], {None: 0, "both": 1, "left": 2, "right": 3}[form.side])
            if entry.name not in found or rank < found[entry.name][0]:
                found[entry.name] = (rank, Candidate(entry, form, exact))
        return [candidate for _, candidate in sorted(found.values(), key=lambda pair: pair[0])]

    @cached_property
    def _described(self) -> dict[str, list[tuple[Entry, Surface]]]:
        index: dict[str, list[tuple[Entry, Surface]]] = {}
        for entry in self:
            for surface in entry.surfaces:
                if surface.kind in ("description", "relation"):
                    index.setdefault(" ".join(words(surface.text)), []).append((entry, surface))
        return index

    def meanings(self, text: str) -> tuple[Entry, ...]:
        """Every structure that the text can mean, likeliest first: a name, an abbreviation or the very words of a description.

        More than one entry is true ambiguity ("LV": the heart's left ventricle, the brain's left lateral ventricle). A side that
        the text leaves open is none: "kidney" means the pair, once.
        """
        found = [candidate.entry for candidate in self.lookup(text)]
        if not found:
            told = self._described.get(" ".join(words(text)), ())
            found = [entry for entry, _ in sorted(told, key=lambda pair: pair[0].side != "both")]
        by_base: dict[str, Entry] = {}
        for entry in found:
            by_base.setdefault(entry.base, entry)
        return tuple(by_base.values())

    def resolve(self, name: str) -> Entry | None:
        """The one structure that a target's name means, or None. "spine (vertebral column)" is tried whole and in pieces."""
        if name in self.entries:
            return self.entries[name]
        pieces = [name, *re.split(r"[()\[\]/,;]", name)]
        for piece in pieces:
            if piece.strip() and (found := self.lookup(piece)) and found[0].surface.kind != "lay":
                return found[0].entry
        return None

    def pieces(self, name: str, among: Collection[str]) -> tuple[str, ...]:
        """Of the names `among` those whose union is the structure: itself, else what it is made of, else its two sides, each of them
        taken apart further where need be. () when some of it is missing."""
        if name in among:
            return (name,)
        entry = self.entries.get(name)
        for parts in (entry.made_of, entry.members) if entry is not None else ():
            found = [self.pieces(part, among) for part in parts]
            if found and all(found):
                return tuple(dict.fromkeys(piece for one in found for piece in one))
        return ()

    def wholes(self, name: str) -> tuple[str, ...]:
        """Names of the structures that it is a piece or a side of, the nearest first."""
        out: list[str] = []
        waiting = [name]
        while waiting:
            above = [n for n in self._above.get(waiting.pop(0), ()) if n not in out]
            out += above
            waiting += above
        return tuple(out)

    @cached_property
    def _above(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        for entry in self:
            for part in (*entry.made_of, *entry.members):
                index.setdefault(part, []).append(entry.name)
        return index

    def only(self, splits: Iterable[Split]) -> Vocabulary:
        """The same structures with the surface forms of these language splits alone; canonical names always stay."""
        wanted = set(splits)
        unknown = wanted - set(_SPLITS)
        if unknown:
            raise ModelError(f"There is no language split {min(unknown)!r}; they are {', '.join(_SPLITS)}.")
        kept = {e.name: replace(e, surfaces=tuple(s for s in e.surfaces if s.kind == "name" or s.split in wanted)) for e in self}
        return replace(self, entries=kept)

    def extend(self, descriptions: Mapping[str, LabelDescription]) -> Vocabulary:
        """A vocabulary that also knows a dataset's labels: canonical names, synonyms and the label identifiers themselves.

        A canonical name that the vocabulary already knows (also by a synonym) gains the synonyms; another becomes an entry.
        """
        entries = dict(self.entries)
        for label, description in descriptions.items():
            canonical = description.canonical.strip() or label
            if description.laterality not in (None, "", "left", "right", "both"):
                raise DatasetError(
                    f"The label {label!r} has laterality {description.laterality!r} in label_descriptions.json; "
                    "it can be left, right, both or null."
                )
            known = entries.get(canonical)
            side: Side | None = description.laterality or self.key(canonical)[1]  # type: ignore[assignment]
            forms = [
                Surface(text.strip(), "synonym", "train", self.key(text)[1] or side)
                for text in (*description.synonyms, label)
                if text.strip()
            ]
            regions = (description.region,) if description.region else ()
            if known is None:
                like = self.resolve(canonical)
                twin = like.twin if like is not None else None
                own = Surface(canonical, "name", "train", side)
                inherited = tuple(replace(s, kind="synonym") if s.kind == "name" else s for s in like.surfaces) if like is not None else ()
                if like is not None and like.name != canonical:
                    entries.pop(like.name, None)
                known = Entry(
                    name=canonical,
                    base=" ".join(self.split_side(words(canonical))[0]),
                    side=side,
                    lies=like.lies if like else None,
                    twin=twin,
                    members=like.members if like else (),
                    part_of=like.part_of if like else None,
                    made_of=like.made_of if like else (),
                    regions=like.regions if like else regions,
                    modalities=like.modalities if like else (),
                    surfaces=(own, *inherited),
                    cues=like.cues if like else (),
                )
            entries[canonical] = replace(known, surfaces=tuple(dict.fromkeys((*known.surfaces, *forms))), regions=known.regions or regions)
        return replace(self, entries=entries)


_GLUE = frozenset({"of", "the", "and", "a", "an", "in", "side", "sided", "s", "part"})


@cache
def _builtin() -> Vocabulary:
    return _from_json(read_json(DEFAULT_FILE, ModelError, SCHEMA), DEFAULT_FILE)


def _from_json(data: dict[str, Any], path: Path) -> Vocabulary:
    entries: dict[str, Entry] = {}
    for raw in data.get("entries", ()):
        _check_raw(raw, path)
        for entry in _expand(raw):
            if entry.name in entries:
                raise ModelError(f"{path} holds two structures named {entry.name!r}.")
            entries[entry.name] = entry
    linked = {name: _linked(entry, entries) for name, entry in entries.items()}
    for entry in linked.values():
        if entry.part_of is not None and entry.part_of not in linked:
            raise ModelError(f"{path}: {entry.name!r} is part_of {entry.part_of!r}, which is no structure of it.")
        strange = next((part for part in entry.made_of if part not in linked or part == entry.name), None)
        if strange is not None:
            raise ModelError(f"{path}: {entry.name!r} is made_of {strange!r}, which is no other structure of it.")
    return Vocabulary(
        entries=linked,
        roots=data.get("roots", {}),
        side_words=data.get("side_words", {}),
        ordinary=frozenset(str(data.get("ordinary", "")).split()),
        sources=tuple(data.get("sources", ())),
    )


def _check_raw(raw: Any, path: Path) -> None:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str) or not raw["name"].strip():
        raise ModelError(f"{path}: an entry has no name: {str(raw)[:80]}")
    fault = _fault_of_fields(raw) or _fault_of_cues(raw.get("cues", {})) or _fault_of_forms(raw)
    if fault is not None:
        raise ModelError(f"{path}: entry {raw['name']!r} {fault}")


def _fault_of_fields(raw: Mapping[str, Any]) -> str | None:
    unknown = set(raw) - _FIELDS
    if unknown:
        return f"has the unknown field {min(unknown)!r}.{did_you_mean(min(unknown), _FIELDS)}"
    if raw.get("sides", True) is not True:
        return f"has sides = {raw['sides']!r}; it is true, or left out."
    if raw.get("lies") not in (None, "left", "right") or ("lies" in raw and "sides" in raw):
        return f"lies on {raw['lies']!r}; an unpaired structure may lie on the 'left' or the 'right', a paired one has no 'lies'."
    for name, needs, why in (("plural", True, "only a paired structure"), ("singular", False, "only an unpaired structure")):
        if name in raw and (bool(raw.get("sides")) is not needs or not isinstance(raw[name], str) or not raw[name].strip()):
            return f"has {name} = {raw[name]!r}; {why} has one, and it is a text."
    made_of = raw.get("made_of", {} if raw.get("sides") else [])
    by_side = made_of if isinstance(made_of, dict) else {"": made_of}
    named = all(isinstance(parts, list) and all(isinstance(part, str) for part in parts) for parts in by_side.values())
    if not named or set(by_side) - ({"left", "right", "both"} if raw.get("sides") else {""}):
        return f"has made_of = {str(made_of)[:80]}; it is a list of names, for a paired structure by left, right and both."
    each = raw.get("each", [1, 1])
    if not isinstance(each, list) or len(each) != 2 or not all(type(n) is int for n in each) or not 1 <= each[0] <= each[1] <= 12:
        return f"has each = {each!r}; it is the first and the last number, from 1 to 12."
    for name, allowed in (("regions", REGIONS), ("modalities", MODALITIES)):
        listed = raw.get(name, [])
        if not isinstance(listed, list) or (wrong := next((v for v in listed if v not in allowed), None)) is not None:
            return (
                f"has {name} = {listed!r}; they are a list of {', '.join(allowed)}."
                if not isinstance(listed, list)
                else (f"has {wrong!r} among its {name}; they are {', '.join(allowed)}.")
            )
    return None


def _fault_of_cues(cues: Any) -> str | None:
    if not isinstance(cues, dict):
        return f"has cues = {str(cues)[:80]}; they are lists of words by contrast."
    for contrast, told in cues.items():
        if contrast not in CONTRASTS:
            return f"has cues for {contrast!r}; the contrasts are {', '.join(CONTRASTS)}."
        if not isinstance(told, list) or not told or not all(isinstance(t, str) and t.strip() for t in told):
            return f"has cues {str(told)[:80]} for {contrast!r}; they are a list of texts."
    return None


def _fault_of_forms(raw: Mapping[str, Any]) -> str | None:
    sided, numbered = bool(raw.get("sides")), "each" in raw
    seen: set[tuple[str, str | None]] = set()
    for name in _KIND_OF_FIELD:
        if not isinstance(raw.get(name, []), list):
            return f"has {name} = {str(raw[name])[:80]}; they are a list."
        for form in raw.get(name, ()):
            read = {"form": form} if isinstance(form, str) else form if isinstance(form, dict) else {}
            text, side = read.get("form"), read.get("side")
            if not isinstance(text, str) or not text.strip() or read.get("split", "train") not in _SPLITS or set(read) - _FORM_FIELDS:
                return f"has in {name} {str(form)[:80]}, which is neither a text nor a form with its split (and side)."
            if side is not None and (side not in ("left", "right") or not sided):
                return f"has in {name} the form {text!r} of the side {side!r}; only a paired structure has forms of its left or right."
            if "{" in text:
                marks = set(_MARK.findall(text))
                if ("{S}" in marks and not sided) or (marks - {"{S}"} and not numbered) or marks - _MARKS:
                    return f"has in {name} the form {text!r}; {{S}} needs 'sides', {{n}}, {{nth}}, {{ordinal}} and {{roman}} need 'each'."
            if (text, side) in seen:
                return f"has the form {text!r} twice."
            seen.add((text, side))
    return None


def _expand(raw: Mapping[str, Any]) -> Iterator[Entry]:
    low, high = raw.get("each", (0, 0))
    sided = bool(raw.get("sides"))
    for number in range(low, high + 1):
        fill = _filler(number) if "each" in raw else str
        base = fill(raw["name"])
        forms = _forms(raw, fill)
        common: dict[str, Any] = {
            "part_of": raw.get("part_of"),
            "regions": tuple(raw.get("regions", ())),
            "modalities": tuple(raw.get("modalities", ())),
            "cues": tuple((contrast, tuple(told)) for contrast, told in raw.get("cues", {}).items()),
        }
        made_of = raw.get("made_of", ())
        if not sided:
            common["made_of"] = tuple(made_of)
            singular_form = [Surface(raw["singular"], "synonym")] if "singular" in raw else []
            plain = [Surface(base, "name"), *singular_form, *(f for f in forms if "{S}" not in f.text)]
            yield Entry(base, base, lies=raw.get("lies"), surfaces=tuple(plain), **common)
            continue
        plural = fill(raw.get("plural", f"{raw['name']} pair"))
        members = (f"left {base}", f"right {base}")
        for side, twin in (("left", "right"), ("right", "left")):
            own = [Surface(f"{side} {base}", "name", "train", side)]  # type: ignore[arg-type]
            own += [_sided(f, side) for f in [Surface(base, "synonym"), *forms] if f.side in (None, side)]
            common["made_of"] = tuple(made_of[side]) if side in made_of else ()
            yield Entry(f"{side} {base}", base, side, None, f"{twin} {base}", (), surfaces=tuple(own), **common)  # type: ignore[arg-type]
        both = [Surface(plural, "name", "train", "both"), Surface(base, "synonym", "train", "both")]
        both += [Surface(f.text, f.kind, f.split, "both") for f in forms if "{S}" not in f.text and f.side is None]
        common["made_of"] = tuple(made_of["both"]) if "both" in made_of else ()
        yield Entry(plural, base, "both", None, None, members, surfaces=tuple(both), **common)


def _forms(raw: Mapping[str, Any], fill: Any) -> list[Surface]:
    forms: list[Surface] = []
    for name, kind in _KIND_OF_FIELD.items():
        for form in raw.get(name, ()):
            if isinstance(form, str):
                forms.append(Surface(fill(form), kind))
            else:
                forms.append(Surface(fill(form["form"]), kind, form.get("split", "train"), form.get("side")))
    return forms


def _sided(form: Surface, side: str) -> Surface:
    return Surface(form.text.replace("{S}", side[0].upper()), form.kind, form.split, side)  # type: ignore[arg-type]


def _filler(number: int) -> Any:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
    values = {"n": str(number), "nth": f"{number}{suffix}", "ordinal": _ORDINALS[number - 1], "roman": _ROMAN[number - 1]}
    return lambda text: re.sub(r"\{(n|nth|ordinal|roman)\}", lambda match: values[match.group(1)], text)


def _linked(entry: Entry, entries: Mapping[str, Entry]) -> Entry:
    part = entry.part_of
    if part is not None and entry.side in ("left", "right") and f"{entry.side} {part}" in entries:
        part = f"{entry.side} {part}"
    elif part is not None and part not in entries and f"left {part}" in entries:
        pair = next((e.name for e in entries.values() if e.members and e.base == part), part)
        part = pair
    twin = entry.twin
    if twin is None:
        mirrored = re.sub(r"\b(left|right)\b", lambda m: "right" if m.group(1) == "left" else "left", entry.name)
        twin = mirrored if mirrored != entry.name and mirrored in entries else None
    return replace(entry, part_of=part, twin=twin)
