"""What keyboards, haste, ears, scanners and caps lock do to words. Each kind of slip belongs to one language split.

A slip never makes one structure's word out of another's, and never leaves in doubt which side was said: `Guard` sees to it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from seerseg.reasoners.spelling import cost, nearest
from seerseg.vocabulary import fold

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_VOWELS = "aeiouy"
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_KEPT = frozenset(
    """
    left right both bilateral bilaterally either side sides not isnt nothing except without never minus only excluding exclude other
    rather instead apart omitting opposed anything ipsilateral contralateral opposite above below behind between front under beneath
    mirror twin counterpart leaving non skip ignore just
    """.split()
)
"""Words on whose spelling the meaning hangs: no slip touches them (sides have their own table)."""

SIDE_SLIPS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"left": ("lft", "leftt"), "right": ("rght", "rigt")},
    "val": {"left": ("lefft",), "right": ("riight",)},
    "test": {"left": ("lfet", "letf"), "right": ("rigth", "rihgt")},
}

SOUNDS = {
    "train": (("ph", "f"), ("ae", "e"), ("oe", "e"), ("yst", "ist"), ("ca", "ka"), ("co", "ko"), ("cu", "ku")),
    "val": (("ch", "k"), ("qu", "kw"), ("ough", "uff"), ("ia", "ea"), ("ur", "er")),
    "test": (("x", "ks"), ("tion", "shun"), ("our", "er"), ("eu", "oo"), ("ea", "ee"), ("v", "w"), ("um", "umb")),
}
"""What is heard alike and written otherwise."""

HEARD: dict[str, tuple[str, str, str]] = {
    "hippocampus": ("hippo campus", "hypo campus", "hip o campus"),
    "hippocampal": ("hippo campal", "hypo campal", "hip o campal"),
    "anterior": ("an terior", "antearier", "and tier ear"),
    "posterior": ("post erior", "posteerier", "pasta rear"),
    "superior": ("super ear", "superier", "soup erior"),
    "kidney": ("kid ney", "kitney", "kidnee"),
    "kidneys": ("kid neys", "kitneys", "kidnees"),
    "liver": ("livver", "liverr", "livah"),
    "spleen": ("splean", "spliin", "sp lean"),
    "stomach": ("stomack", "stummick", "stomick"),
    "pancreas": ("pan creas", "pankreus", "pan crease"),
    "gallbladder": ("gall bladder", "goal bladder", "gold bladder"),
    "bladder": ("bladda", "blatter", "bladr"),
    "oesophagus": ("a sophagus", "easofagus", "esoff a guess"),
    "esophagus": ("a sophagus", "easofagus", "esoff a guess"),
    "aorta": ("a orta", "ayorta", "a order"),
    "trachea": ("trakia", "tracker", "tray key a"),
    "ventricle": ("ventrical", "ventrickle", "vent trickle"),
    "ventricles": ("ventricals", "ventrickles", "vent trickles"),
    "atrium": ("atriumm", "aetrium", "a tree um"),
    "vertebra": ("verter bra", "vertibra", "vert a bra"),
    "vertebrae": ("verter bray", "vertibray", "vert a bray"),
    "lumbar": ("lumber", "lumba", "lum bar"),
    "thoracic": ("thor acid", "thorasik", "the racic"),
    "cervical": ("serve ical", "servikal", "sir vical"),
    "sacrum": ("say crumb", "sakrum", "sack rum"),
    "femur": ("fee mur", "feemer", "feamer"),
    "sternum": ("stir num", "sternam", "stern um"),
    "clavicle": ("clavical", "klavicle", "clav ickle"),
    "scapula": ("scap ula", "skapula", "scapular"),
    "pelvis": ("pelvice", "pelvus", "pel vis"),
    "cerebellum": ("sera bellum", "serebelum", "sarah bell um"),
    "thalamus": ("thalam us", "thalimus", "talla mus"),
    "putamen": ("put amen", "pewtamen", "pute a men"),
    "amygdala": ("a migdala", "amigdola", "a mig dollar"),
    "caudate": ("cord ate", "kaudate", "core date"),
    "tumour": ("two more", "tumer", "tuma"),
    "tumor": ("two more", "tumer", "tuma"),
    "oedema": ("a dema", "edeema", "uh dema"),
    "edema": ("a dema", "edeema", "uh dema"),
    "lesion": ("leshun", "leesion", "lee jun"),
    "metastasis": ("meta stasis", "metastisis", "met a stay sis"),
    "metastases": ("meta stases", "metastisees", "met a stay seas"),
    "adrenal": ("a drenal", "adreenal", "add renal"),
    "duodenum": ("duo denum", "duodeenum", "dew o dean um"),
    "colon": ("koelon", "collen", "coal on"),
    "prostate": ("pros state", "prostait", "prosstate"),
    "myocardium": ("myo cardium", "miocardium", "my o cardium"),
    "artery": ("artry", "arterie", "arter e"),
    "vein": ("vane", "veign", "vain"),
    "hemisphere": ("hemi sphere", "hemisfere", "hemmy sphere"),
    "cortex": ("cor tex", "kortex", "core tex"),
    "gyrus": ("jy rus", "jyrus", "giro us"),
    "please": ("pleas", "pleese", "plees"),
    "segment": ("seg ment", "segmant", "sigment"),
    "outline": ("out line", "outlyne", "out lyne"),
    "contour": ("con tour", "kontour", "con tore"),
    "delineate": ("de lineate", "delinniate", "the lineate"),
    "trace": ("trayce", "treyce", "trays"),
    "extract": ("ex tract", "ekstract", "extra ct"),
    "volumetry": ("volume tree", "volumetrie", "volume a tree"),
    "structure": ("struck sure", "strukture", "stricture"),
}
"""word -> what a recogniser hears, for train, val and test language."""


@dataclass
class Guard:
    """Keeps slips harmless. own: words of the target; rivals: words of what else may be meant, nearest ones decide; known: words that
    exist, which no slip may arrive at."""

    own: frozenset[str]
    rivals: tuple[str, ...]
    known: frozenset[str]
    _memo: dict[tuple[str, str], bool] = field(default_factory=dict)

    def allows(self, word: str, slipped: str) -> bool:
        """Whether `slipped` is no word itself, and nearer to `word` than to a word of another structure."""
        before, after = fold(word), fold(slipped)
        found = self._memo.get((before, after))
        if found is None:
            found = self._memo[before, after] = self._judge(before, after)
        return found

    def _judge(self, before: str, after: str) -> bool:
        if before == after or not after:
            return before == after and bool(after)
        pieces = after.split()
        if any(p in self.rivals_set or p in ("left", "right", "l", "r", "lt", "rt") for p in pieces):
            return False
        if len(pieces) == 1 and after in self.known:
            return False
        joined = "".join(pieces)
        near = nearest(joined, self.rivals)
        return not near or cost(joined, before) < near[0][1]

    @property
    def rivals_set(self) -> frozenset[str]:
        """The rivals, for looking up."""
        return frozenset(self.rivals)


Slip = Callable[[str, random.Random], str | None]


def _neighbours(letter: str) -> str:
    for number, row in enumerate(_ROWS):
        at = row.find(letter)
        if at >= 0:
            beside = [row[i] for i in (at - 1, at + 1) if 0 <= i < len(row)]
            over = [_ROWS[r][i] for r in (number - 1, number + 1) if 0 <= r < 3 for i in (at - 1, at) if 0 <= i < len(_ROWS[r])]
            return "".join(beside + over[:2])
    return ""


def _place(word: str, rng: random.Random) -> int:
    return rng.randrange(1, len(word) - 1) if len(word) > 2 else 1


def _adjacent(word: str, rng: random.Random) -> str | None:
    at = _place(word, rng)
    near = [c for c in _neighbours(word[at].lower()) if c != word[at]]
    return word[:at] + rng.choice(near) + word[at + 1 :] if near else None


def _dropped(word: str, rng: random.Random) -> str | None:
    at = _place(word, rng)
    return word[:at] + word[at + 1 :] if len(word) > 4 else None


def _doubled(word: str, rng: random.Random) -> str | None:
    at = _place(word, rng)
    return None if word[at] in word[at - 1 : at] + word[at + 1 : at + 2] else word[: at + 1] + word[at:]


def _swapped(word: str, rng: random.Random) -> str | None:
    places = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return None
    at = rng.choice(places)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _inserted(word: str, rng: random.Random) -> str | None:
    at = _place(word, rng)
    near = [c for c in _neighbours(word[at].lower()) if c not in word[at - 1 : at + 2].lower()]
    return word[: at + 1] + rng.choice(near) + word[at + 1 :] if near else None


def _vowel(word: str, rng: random.Random) -> str | None:
    places = [i for i in range(1, len(word)) if word[i] in "aeiou"]
    if not places:
        return None
    at = rng.choice(places)
    near = _neighbours(word[at])
    choices = [v for v in "aeiou" if v != word[at] and v not in near]
    return word[:at] + rng.choice(choices) + word[at + 1 :]


def _stray(word: str, rng: random.Random) -> str | None:
    at = _place(word, rng)
    return word[: at + 1] + rng.choice(",;.'") + word[at + 1 :] if len(word) > 4 else None


def _split(word: str, rng: random.Random) -> str | None:
    return None if len(word) < 7 else (lambda at: word[:at] + " " + word[at:])(rng.randrange(3, len(word) - 2))


def _scanned(word: str, rng: random.Random) -> str | None:
    table = {"o": "0", "l": "1", "O": "0", "i": "1", "S": "5"}
    places = [i for i, c in enumerate(word) if c in table]
    if not places or len(word) < 4:
        return None
    at = rng.choice(places)
    return word[:at] + table[word[at]] + word[at + 1 :]


def _accented(word: str, rng: random.Random) -> str | None:
    table = {"o": "ö", "u": "ü", "a": "ä", "e": "é"}
    places = [i for i, c in enumerate(word) if c in table]
    if not places:
        return None
    at = rng.choice(places)
    return word[:at] + table[word[at]] + word[at + 1 :]


def _sounded(split: str) -> Slip:
    def apply(word: str, rng: random.Random) -> str | None:
        fitting = [(a, b) for a, b in SOUNDS[split] if a in word[1:] or (a == "ph" and word.startswith("ph"))]
        if not fitting:
            return None
        heard, written = rng.choice(fitting)
        at = word.find(heard, 0 if heard == "ph" else 1)
        return word[:at] + written + word[at + len(heard) :]

    return apply


def _heard(number: int) -> Slip:
    def apply(word: str, rng: random.Random) -> str | None:
        found = HEARD.get(word.lower())
        return found[number] if found is not None else None

    return apply


def _cut(word: str, rng: random.Random) -> str | None:
    return word[:4] if len(word) >= 8 else None


def _cut_dotted(word: str, rng: random.Random) -> str | None:
    return word[:5] + "." if len(word) >= 8 else None


def _consonants(word: str, rng: random.Random) -> str | None:
    if len(word) < 8:
        return None
    kept = word[0] + re.sub(r"(.)\1", r"\1", "".join(c for c in word[1:] if c.lower() not in _VOWELS))
    return kept if len(kept) >= 4 else None


KINDS: dict[str, dict[str, Slip]] = {
    "train": {"adjacent": _adjacent, "dropped": _dropped, "doubled": _doubled, "sound_a": _sounded("train")},
    "val": {"vowel": _vowel, "stray": _stray, "sound_b": _sounded("val")},
    "test": {
        "swapped": _swapped,
        "inserted": _inserted,
        "split": _split,
        "scanned": _scanned,
        "accented": _accented,
        "sound_c": _sounded("test"),
    },
}
"""Slips of single words."""
SPEECH: dict[str, dict[str, Slip]] = {
    "train": {"heard_a": _heard(0)},
    "val": {"heard_b": _heard(1)},
    "test": {"heard_c": _heard(2)},
}
SHORT: dict[str, dict[str, Slip]] = {"train": {"cut": _cut}, "val": {"cut_dotted": _cut_dotted}, "test": {"consonants": _consonants}}
"""Words clipped by whoever writes notes."""


def slip_words(
    text: str,
    split: str,
    rng: random.Random,
    guard: Guard,
    *,
    count: int,
    table: dict[str, dict[str, Slip]],
    only: Iterable[str] | None = None,
) -> tuple[str, tuple[str, ...]]:
    """Up to `count` words of the text slipped, and what was done. only: folded words that may be touched; None: any of four letters
    or more. Words with digits or inner capitals (abbreviations) are left alone."""
    allowed = None if only is None else set(only)
    kinds = table[split]
    done: list[str] = []
    places = [m for m in _WORD.finditer(text) if _may_slip(text, m, allowed)]
    rng.shuffle(places)
    edits: list[tuple[int, int, str]] = []
    for found in places:
        if len(done) >= count:
            break
        word = found.group()
        names = list(kinds)
        rng.shuffle(names)
        for name in names:
            slipped = kinds[name](word, rng)
            if slipped is not None and slipped != word and (fold(slipped) == fold(word) or guard.allows(word, slipped)):
                edits.append((found.start(), found.end(), slipped))
                done.append(f"{name}:{word.lower()}>{slipped.lower()}")
                break
    for start, end, slipped in sorted(edits, reverse=True):
        text = text[:start] + slipped + text[end:]
    return text, tuple(done)


def _may_slip(text: str, found: re.Match[str], allowed: set[str] | None) -> bool:
    word = found.group()
    if len(word) < 4 or fold(word).replace("'", "") in _KEPT or any(c.isupper() for c in word[1:]):
        return False
    around = text[max(0, found.start() - 1) : found.start()] + text[found.end() : found.end() + 1]
    return not any(c.isdigit() or c == "@" for c in around) and (allowed is None or fold(word) in allowed)


def slip_side(text: str, split: str, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """One side word of the text misspelt as the split's table has it."""
    places = list(re.finditer(r"\b(left|right)\b(?!-)", text))
    if not places:
        return text, ()
    found = rng.choice(places)
    slipped = rng.choice(SIDE_SLIPS[split][found.group()])
    return text[: found.start()] + slipped + text[found.end() :], (f"side:{found.group()}>{slipped}",)


def join_words(text: str, rng: random.Random, own: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The blank before or after a word of the target is forgotten (train language)."""
    wanted = set(own)
    places = [
        m
        for m in re.finditer(r"(?<![\w-])([^\W\d_]{3,}) ([^\W\d_]{4,})(?![\w-])", text)
        if fold(m[2]) in wanted and fold(m[1]) not in _KEPT | {"left", "right"} and m[1].islower() and m[2].islower()
    ]
    if not places:
        return text, ()
    found = rng.choice(places)
    return text[: found.end(1)] + text[found.start(2) :], (f"joined:{found[1]}{found[2]}",)


CASES: dict[str, dict[str, Callable[[str, random.Random], str]]] = {
    "train": {
        "upper": lambda text, rng: text.upper(),
        "lower": lambda text, rng: text.lower(),
        "shouted_words": lambda text, rng: " ".join(w.upper() if rng.random() < 0.4 else w for w in text.split(" ")),
    },
    "val": {"titled": lambda text, rng: " ".join(w[:1].upper() + w[1:].lower() for w in text.split(" "))},
    "test": {
        "scattered": lambda text, rng: "".join(c.upper() if rng.random() < 0.4 else c.lower() for c in text),
        "capslock": lambda text, rng: " ".join(w[:1].lower() + w[1:].upper() for w in text.split(" ")),
        "late_shift": lambda text, rng: " ".join(w[:2].upper() + w[2:].lower() if len(w) > 3 else w.lower() for w in text.split(" ")),
    },
}
POINTS: dict[str, dict[str, Callable[[str, random.Random], str]]] = {
    "train": {
        "exclaimed": lambda text, rng: text.rstrip(" .?!") + "!" * rng.randint(2, 4),
        "dots": lambda text, rng: text.rstrip(" .?!") + "...",
        "quoted": lambda text, rng: f'"{text}"',
    },
    "val": {"semicolons": lambda text, rng: re.sub(r"[.,]? ", " ; ", text, count=1), "starred": lambda text, rng: f"*** {text}"},
    "test": {
        "dashes": lambda text, rng: "-- " + text.rstrip(" .?!") + " --",
        "asked": lambda text, rng: text.rstrip(" .?!") + "??" + "?" * rng.randint(0, 2),
        "tilde": lambda text, rng: text.rstrip(" .?!") + " ~~",
        "slashes": lambda text, rng: text.rstrip(" .?!").replace(", ", " / ") + " //",
    },
}
"""Punctuation gone astray."""
