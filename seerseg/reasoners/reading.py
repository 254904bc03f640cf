"""Reading a request's words without a model: tokens, repaired spelling, sides, negation, and which structures they mention.

Everything is deterministic and works on the words alone. Matching ignores word order and inflection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from seerseg.reasoners.spelling import nearest
from seerseg.vocabulary import Entry, Side, Vocabulary, fold, words


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    return frozenset((first, second) for first, second in (pair.split() for pair in text.split(",")))


MAX_CHARS = 4000
MAX_REPEATS = 24
"""A word that is repeated more often says nothing more."""
_LONG, _HEARD = 8, 0.15
"""Letters of a word that may have been heard as two, and the cost of spelling for each of them that this may take."""
_CHUNK = re.compile(r"[^\s]+")
_SPACED = re.compile(r"(?<!\w)(?:[^\W\d_]\s){3,}[^\W\d_](?!\w)")
_LEET = str.maketrans({"0": "o", "1": "l", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "@": "a", "$": "s", "!": "i", "|": "l"})
_LEET_I = str.maketrans({"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "@": "a", "$": "s", "!": "i", "|": "i"})
_STOP = frozenset(
    """
    a about after all also around an and any are as at be been being both but by can could do does done for from had has have he her
    here hers him his how i if in into is it its just like me mine more most my need no nor not of off on one only onto or our out
    over per please plz pls shall she should so some such than that the their them then there these they thing this those through to
    too up us very via want was we were what when where which while who whom whose why will with within without would you your yours
    hey hi hello kindly thanks thank ok segment segmentation segmented outline outlined delineate delineation contour contours
    contoured mask masks show find mark highlight draw trace paint label give get patient patients scan scans image images slice
    slices study case structure region area target side sided exam ct mr mri x s t d m re ve ll part located lies lying found
    """.split()
)
_NEGATORS = frozenset(
    """
    not no never without except excluding exclude excludes ignore ignoring skip omit avoid isnt arent dont nor neither
    """.split()
)
_NEGATING_PAIRS = _pairs(
    """
    other than, rather than, instead of, leave out, opposite of, opposite to, opposite from, contralateral to, anything but, apart from,
    aside from, away from, far from, across from
    """
)
_NEGATION_ENDS = frozenset(
    """
    but instead just only please segment outline want need show mark delineate rather give take use
    """.split()
)
_ANCHORS = frozenset(
    """
    beside besides near behind below beneath under underneath above around between surrounding touching along into from against toward
    towards adjacent next closest nearest past over abutting bordering alongside opposite across contralateral like than atop protects
    protect protecting surrounds surround joins connects holds supports feeds drains covers via despite
    """.split()
)
_SIDE_OF = _pairs(
    """
    side of, side as, side with, level of, close to, next to, attached to, front of, anterior of, top of, part as, flank of, connected
    to, leads to, inferior to, superior to, posterior to, anterior to
    """
)
_CONTAINERS = frozenset({"of", "in", "within", "inside", "on", "at", "with", "chest", "through"})
_VERBS = frozenset(
    """
    segment segmenting segmentation outline outlining outlined delineate delineating delineation delineated contour contouring contours
    mask show mark highlight find extract want need trace draw isolate label annotate identify locate map get give paint detect depict
    select grab pick cut measure volume volumetry target request requested roi looking visualize visualise boundaries boundary called
    mean meant evaluate assess
    """.split()
)
_PICTURES = frozenset({"image", "picture", "screen", "monitor", "display", "viewer", "figure", "observer"})
_NOT_A_SIDE_AFTER_RIGHT = frozenset({"now", "away", "here", "there", "ok", "thanks", "please"})
_NOT_A_SIDE_AFTER_LEFT = frozenset({"over", "behind", "out"})
_DIRECTIONS = frozenset(
    """
    anterior posterior superior inferior medial lateral cranial caudal rostral dorsal ventral proximal distal apical basal central
    peripheral deep superficial internal external ipsilateral contralateral sagittal coronal axial
    """.split()
)
"""Words that are spelt right, whether a structure is named with them or not: "caudal" is no slip of "cauda"."""
_SKIPPED = frozenset({"the", "a", "an", "of", "this", "that", "his", "her", "their", "my", "patient", "patients", "s", "same", "any", "to"})


@dataclass(frozen=True, slots=True)
class Token:
    """A word of the request. options: what it may be, (word, cost), the likeliest first, cost 0 when as written;
    side: what it says about side; clause: number of the sentence-like piece it stands in; spellings: how it was written, capitals
    kept, none where the whole request is in capitals."""

    raw: str
    options: tuple[tuple[str, float], ...]
    clause: int
    side: Side | None = None
    spellings: frozenset[str] = frozenset()

    @property
    def word(self) -> str:
        """The likeliest reading."""
        return self.options[0][0]

    @property
    def repaired(self) -> bool:
        """Whether the likeliest reading is not what was written."""
        return self.options[0][1] > 0


@dataclass(frozen=True, slots=True)
class Sense:
    """One structure that a bag of roots can mean. tells_side: an abbreviation with the side in it ("LK")."""

    entry: Entry
    side: Side | None
    kind: str
    text: str
    tells_side: bool = False


@dataclass(frozen=True, slots=True)
class Mention:
    """Structures mentioned by the words at `positions`. score: how sure and how specific; anchor: named only to say where;
    negated: named to be left out."""

    positions: frozenset[int]
    senses: tuple[Sense, ...]
    score: float
    anchor: bool = False
    negated: bool = False
    described: bool = False


@dataclass
class Words:
    """The indexes that requests are read with, made once from a vocabulary."""

    vocabulary: Vocabulary
    inverted: dict[str, list[tuple[str, ...]]] = field(init=False, default_factory=dict)
    senses: dict[tuple[str, ...], tuple[Sense, ...]] = field(init=False, default_factory=dict)
    weight: dict[str, float] = field(init=False, default_factory=dict)
    descriptions: list[tuple[frozenset[str], tuple[Entry, ...], str]] = field(init=False, default_factory=list)
    stem_weight: dict[str, float] = field(init=False, default_factory=dict)
    by_stem: dict[str, list[int]] = field(init=False, default_factory=dict)
    content: list[str] = field(init=False)
    everyday: frozenset[str] = field(init=False)
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        vocabulary = self.vocabulary
        spelt: set[str] = set(vocabulary.roots) | {w for w in vocabulary.side_words if len(w) > 3}
        counts: dict[str, set[str]] = {}
        for bag, forms in vocabulary.bags.items():
            both = {s.text for _, s in forms if s.side == "both"}
            self.senses[bag] = tuple(
                dict.fromkeys(Sense(e, s.side, s.kind, s.text, s.kind == "abbreviation" and s.text not in both) for e, s in forms)
            )
            for root in bag:
                self.inverted.setdefault(root, []).append(bag)
                counts.setdefault(root, set()).update(e.base for e, _ in forms)
        for entry in vocabulary:
            for surface in entry.surfaces:
                if surface.kind not in ("abbreviation", "description", "relation"):
                    spelt.update(w for w in words(surface.text) if len(w) > 2)
        self.weight = {root: 1 / (1 + math.log(len(bases))) for root, bases in counts.items()}
        self._index_descriptions()
        described = {
            w for e in vocabulary for s in e.surfaces if s.kind in ("description", "relation") for w in words(s.text) if len(w) > 3
        }
        ordinary = vocabulary.ordinary | _STOP | _NEGATORS | _ANCHORS | _VERBS | _DIRECTIONS
        self.known = frozenset(spelt | described | ordinary | set(vocabulary.side_words) | {r for bag in self.senses for r in bag})
        self.everyday = frozenset(w for w in ordinary if w.isalpha())
        self.content = sorted({w for w in spelt | described if w not in _STOP})

    def _index_descriptions(self) -> None:
        found: dict[str, dict[str, Entry]] = {}
        for entry in self.vocabulary:
            for surface in entry.surfaces:
                if surface.kind in ("description", "relation", "lay"):
                    found.setdefault(surface.text, {})[entry.name] = entry
        for text, entries in found.items():
            stems = frozenset(stem(self.vocabulary.root(w)) for w in words(text) if w not in _STOP)
            if len(stems) > 1:
                self.descriptions.append((stems, tuple(entries.values()), text))
        for number, (stems, _, _) in enumerate(self.descriptions):
            for one in stems:
                self.by_stem.setdefault(one, []).append(number)
        total = len(self.descriptions) + 1
        self.stem_weight = {one: math.log(1 + total / len(numbers)) for one, numbers in self.by_stem.items()}


@lru_cache(maxsize=8192)
def stem(word: str) -> str:
    """A light stem, so that "filters", "filtering" and "filter" agree."""
    for ending in ("ings", "ing", "ers", "er", "ed", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def tokenise(text: str, index: Words) -> list[Token]:
    """The words of a request, repaired where they are no known word; run-together and spaced-out words are mended."""
    raw: list[tuple[str, int]] = []
    clause = 0
    folded = fold(text[:MAX_CHARS])
    for chunk in _CHUNK.findall(_SPACED.sub(lambda m: m.group().replace(" ", ""), folded)):
        bare = chunk.strip(".,;:!?()[]{}\"'`*_~#<>\u2039\u203a")
        raw.extend((word, clause) for word in _chunk_words(bare, index.known))
        if chunk[-1:] in ".;!?:" and len(bare) > 2:
            clause += 1
    raw = _joined(raw, index)
    written = re.findall(r"[^\W_]+", text[:MAX_CHARS])
    shouted = sum(w.isupper() for w in written) > 0.5 * len(written) and len(written) > 2
    spelt: dict[str, set[str]] = {}
    for one in () if shouted else written:
        spelt.setdefault(fold(one), set()).add(one)
    tokens = [Token(word, _options(word, index), clause, spellings=frozenset(spelt.get(word, ()))) for word, clause in raw]
    return _with_sides(tokens, index.vocabulary)


def _chunk_words(bare: str, known: frozenset[str]) -> Iterator[str]:
    if any(c in "0134578@$!|" for c in bare) and any(c.isalpha() for c in bare):
        plain = words(bare)
        if not all(w in known or w.isdigit() for w in plain):
            for table in (_LEET, _LEET_I) if sum(c.isalpha() for c in bare) > 2 else ():  # "3D" is no word
                mended = words(bare.translate(table))
                if mended and all(w in known for w in mended):
                    yield from mended
                    return
            for w in plain:
                yield from ((w,) if w in known else re.findall(r"\d+|[^\W\d_]+", w)) if len(re.sub(r"\D", "", w)) < 3 else (w,)
            return
    yield from words(bare)


def _joined(raw: list[tuple[str, int]], index: Words) -> list[tuple[str, int]]:
    out: list[tuple[str, int]] = []
    for word, clause in raw:
        if out and (word not in index.known or out[-1][0] not in index.known) and len(out[-1][0]) + len(word) > 4:
            joint = out[-1][0] + word
            if joint in index.known and out[-1][1] == clause:
                out[-1] = (joint, clause)
                continue
            if (
                word not in index.known
                and out[-1][0] not in index.known
                and out[-1][1] == clause
                and (meant := _heard(out[-1][0], word, index))
            ):
                out[-1] = (meant, clause)
                continue
        if word not in index.known and len(word) >= 7:
            parts = _parted(word, index.known)
            if parts:
                out.extend((part, clause) for part in parts)
                continue
        out.append((word, clause))
    return out


def _heard(first: str, second: str, index: Words) -> str | None:
    """The long word that two unknown ones are together, as dictation writes it: "hypo campal"."""
    joint = first + second
    if min(len(first), len(second)) < 3 or len(joint) < _LONG:
        return None
    found = nearest(joint, [word for word in index.content if len(word) >= _LONG], 1)
    return found[0][0] if found and found[0][1] <= _HEARD * len(joint) else None


def _parted(word: str, known: frozenset[str]) -> tuple[str, ...] | None:
    for cut in range(3, len(word) - 2):
        head, tail = word[:cut], word[cut:]
        if head in known and tail in known:
            return head, tail
    for cut in range(3, len(word) - 5):
        if word[:cut] in known:
            for second in range(cut + 3, len(word) - 2):
                if word[cut:second] in known and word[second:] in known:
                    return word[:cut], word[cut:second], word[second:]
    return None


def _options(word: str, index: Words) -> tuple[tuple[str, float], ...]:
    if word in index.known or len(word) < 3 or word.isdigit():
        return ((word, 0.0),)
    return nearest(word, index.content) or ((word, 0.0),)


def _with_sides(tokens: Sequence[Token], vocabulary: Vocabulary) -> list[Token]:
    out: list[Token] = []
    for number, token in enumerate(tokens):
        side = next((vocabulary.side_words[w] for w, _ in token.options[:1] if w in vocabulary.side_words), None)
        following = tokens[number + 1].word if number + 1 < len(tokens) else ""
        if (token.word == "right" and following in _NOT_A_SIDE_AFTER_RIGHT) or (
            token.word == "left" and following in _NOT_A_SIDE_AFTER_LEFT
        ):
            side = None
        if side in ("left", "right") and _of_the_picture(tokens, number):
            side = "right" if side == "left" else "left"
        out.append(replace(token, side=side))
    return out


def _of_the_picture(tokens: Sequence[Token], number: int) -> bool:
    """ "left side of the image", "image left", "viewer's left": radiological display, so the patient's other side."""
    before = tokens[number - 1].word if number else ""
    if before in _PICTURES:
        return True
    ahead = [t.word for t in tokens[number + 1 : number + 6]]
    for step, word in enumerate(ahead):
        if word in _PICTURES:
            return step > 0 and ahead[step - 1] in ("the", "of", "this") and any(w in ("of", "in", "on") for w in ahead[:step])
        if word not in ("side", "half", "hand", "part", "of", "the", "in", "on", "this"):
            return False
    return False


def negated_positions(tokens: Sequence[Token]) -> frozenset[int]:
    """Positions within the reach of a negation: from the negator to the end of its phrase."""
    out: set[int] = set()
    reach = 0
    clause = -1
    for number, token in enumerate(tokens):
        word = token.word
        pair = (word, tokens[number + 1].word if number + 1 < len(tokens) else "")
        if word in _NEGATION_ENDS or token.clause != clause:
            reach = 0
        clause = token.clause
        if word in _NEGATORS or pair in _NEGATING_PAIRS:
            if (word, pair[1]) == ("not", "only") or (word == "no" and pair[1].isdigit()):  # "request no. 3"
                continue
            reach = 7
            continue
        if reach > 0:
            out.add(number)
            reach -= 1
    return frozenset(out)


def find_mentions(tokens: Sequence[Token], index: Words) -> list[Mention]:
    """Every structure that the words name, maximal ones only, best first."""
    hits: dict[tuple[str, ...], dict[str, list[tuple[int, float, str]]]] = {}
    for number, token in enumerate(tokens):
        if token.side is not None:
            continue
        for word, paid in token.options:
            root = index.vocabulary.root(word)
            for bag in index.inverted.get(root, ()):
                places = hits.setdefault(bag, {}).setdefault(root, [])
                if len(places) < MAX_REPEATS:
                    places.append((number, paid, word))
    negated = negated_positions(tokens)
    found = [m for bag, places in hits.items() if len(places) == len(bag) for m in _placed(bag, places, tokens, index, negated)]
    kept: list[Mention] = []
    for mention in sorted(found, key=lambda m: (-len(m.positions), -m.score, min(m.positions))):
        if not any(mention.positions < other.positions and mention.score < other.score + 0.25 for other in kept):
            kept.append(mention)
    return sorted(_listed_anchors(tokens, kept), key=lambda m: (-m.score, min(m.positions)))


def _listed_anchors(tokens: Sequence[Token], mentions: Sequence[Mention]) -> list[Mention]:
    """ "around the lungs and heart": what is listed after an anchor is one too."""
    anchored = {max(m.positions) for m in mentions if m.anchor}
    out: list[Mention] = []
    for mention in sorted(mentions, key=lambda m: min(m.positions)):
        number = min(mention.positions) - 1
        while number >= 0 and (tokens[number].side is not None or tokens[number].word in _SKIPPED):
            number -= 1
        if number > 0 and tokens[number].word in ("and", "or") and number - 1 in anchored and not mention.anchor:
            mention = replace(mention, anchor=True)
            anchored.add(max(mention.positions))
        out.append(mention)
    return out


def _placed(
    bag: tuple[str, ...], places: Mapping[str, list[tuple[int, float, str]]], tokens: Sequence[Token], index: Words, negated: frozenset[int]
) -> Iterator[Mention]:
    rarest = min(bag, key=lambda root: len(places[root]))
    for start, _, _ in places[rarest]:
        chosen = [min(places[root], key=lambda place: (abs(place[0] - start) + 2 * place[1], place[1])) for root in bag]
        positions = frozenset(place[0] for place in chosen)
        if len(positions) < len(bag):
            continue
        low, high = min(positions), max(positions)
        between = [n for n in range(low, high + 1) if n not in positions and tokens[n].side is None and tokens[n].word not in _SKIPPED]
        if any(" and " in sense.text for sense in index.senses[bag]):
            between = [n for n in between if tokens[n].word != "and"]
        if (
            len(between) > 2
            or any(tokens[n].word in ("and", "or", "but") or tokens[n].word in _NEGATORS for n in between)
            or tokens[low].clause != tokens[high].clause
        ):
            continue
        quality = math.prod(max(0.2, 1 - 1.5 * paid / max(3, len(word))) for _, paid, word in chosen) * 0.85 ** len(between)
        senses = tuple(s for s in index.senses[bag] if s.kind != "abbreviation" or all(paid == 0 for _, paid, _ in chosen))
        if len(bag) == 1 and bag[0] in index.everyday and len(tokens) > 2:  # "put a mask on it": ON and PUT only where so written
            senses = tuple(s for s in senses if s.kind != "abbreviation" or s.text in tokens[low].spellings)
        if senses:
            specific = sum(index.weight[root] for root in bag)
            score = quality * (0.6 + 0.4 * min(2.0, specific)) * _factor(senses)
            yield Mention(
                positions, senses, score, _is_anchor(tokens, low) or _names_a_side(tokens, high), not negated.isdisjoint(positions)
            )


def _factor(senses: Iterable[Sense]) -> float:
    return max({"name": 1.0, "synonym": 0.97, "lay": 0.9, "abbreviation": 0.85}[sense.kind] for sense in senses)


def _names_a_side(tokens: Sequence[Token], high: int) -> bool:
    """ "liver side": the liver only says where."""
    return high + 1 < len(tokens) and tokens[high + 1].word == "side"


def _is_anchor(tokens: Sequence[Token], low: int) -> bool:
    """Whether what stands at `low` is introduced by words that only say where ("next to the", "on the side of the")."""
    number = low - 1
    while (
        number >= 0 and (tokens[number].side is not None or tokens[number].word in _SKIPPED) and tokens[number].clause == tokens[low].clause
    ):
        if tokens[number].word in ("of", "to", "as") and number > 0 and (tokens[number - 1].word, tokens[number].word) in _SIDE_OF:
            return True
        number -= 1
    if number < 0 or tokens[number].clause != tokens[low].clause:
        return False
    if number > 0 and (tokens[number - 1].word, tokens[number].word) in _SIDE_OF:
        return True
    return tokens[number].word in _ANCHORS


def contained(tokens: Sequence[Token], mention: Mention) -> bool:
    """Whether the mention follows "of", "in" or the like: perhaps only the container of what is meant."""
    number = min(mention.positions) - 1
    while number >= 0 and (tokens[number].side is not None or tokens[number].word in _SKIPPED - {"of", "to"}):
        number -= 1
    return number >= 0 and tokens[number].word in _CONTAINERS and not (number > 0 and tokens[number - 1].word in _VERBS)


def after_verb(tokens: Sequence[Token], mention: Mention) -> bool:
    """Whether a verb of asking stands before the mention in its clause."""
    low = min(mention.positions)
    return any(t.word in _VERBS and t.clause == tokens[low].clause for t in tokens[max(0, low - 10) : low])


def find_descriptions(tokens: Sequence[Token], index: Words) -> list[Mention]:
    """Structures that the words describe by what they do, look like or lie beside, best first; score 0..1."""
    said: dict[str, int] = {}
    sure: dict[str, float] = {}
    unexplained = 0.0
    for number, token in enumerate(tokens):
        if token.side is not None or token.word in _STOP or token.word in _VERBS:
            continue
        options = [(stem(index.vocabulary.root(word)), 1 - paid / max(3, len(word))) for word, paid in token.options]
        usable = [(one, quality) for one, quality in options if one in index.stem_weight]
        for one, quality in usable:
            if quality > sure.get(one, 0.0):
                said[one], sure[one] = number, quality
        if not usable:
            unexplained += 1.0 if token.word in index.vocabulary.ordinary else 2.0
    numbers = {n for one in said for n in index.by_stem[one]}
    negated = negated_positions(tokens)
    total = sum(index.stem_weight[one] for one in said) + unexplained
    found: list[Mention] = []
    for n in sorted(numbers):
        stems, entries, text = index.descriptions[n]
        shared = [one for one in stems if one in said]
        if len(shared) < 2:
            continue
        gained = sum(index.stem_weight[one] * sure[one] for one in shared)
        coverage = gained / sum(index.stem_weight[one] for one in stems)
        score = 0.7 * coverage + 0.3 * gained / total
        senses = tuple(Sense(e, e.side, "description", text) for e in entries)
        positions = frozenset(said[one] for one in shared)
        says_not = not _NEGATORS.isdisjoint(text.split())
        found.append(Mention(positions, senses, score, negated=not says_not and not negated.isdisjoint(positions), described=True))
    return sorted(found, key=lambda m: (-m.score, min(m.positions)))


def said_by_plural(tokens: Sequence[Token], mention: Mention) -> bool:
    """Whether the last word of the mention is a plural: "the kidneys" are both."""
    last = tokens[max(mention.positions)].word
    return len(last) > 3 and last.endswith(("s", "ae", "i")) and not last.endswith(("ss", "us", "is", "as"))
