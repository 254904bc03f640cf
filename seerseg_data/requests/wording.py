"""One request in one style, and sets of paraphrases: the vocabulary's forms put into sentences, with the slips of the style.

Everything follows from the random generator that is given, so equal seeds give equal words on any machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from seerseg.errors import UsageError, did_you_mean
from seerseg.vocabulary import Entry, Vocabulary, words
from seerseg_data.requests import phrases, templates, voices
from seerseg_data.requests.forms import Form, Names, names_of
from seerseg_data.requests.phrases import lines, mirrored
from seerseg_data.requests.slips import CASES, KINDS, POINTS, SHORT, SPEECH, join_words, slip_side, slip_words
from seerseg_data.requests.styles import FALLBACK_STYLES, PARAPHRASE_STYLES, SPLITS, STYLES, Context, Split, Wording

FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    name: {split: lines(table[split]) for split in SPLITS}
    for name, table in {
        "terse": templates.TERSE,
        "clinical": templates.CLINICAL,
        "casual": templates.CASUAL,
        "formal": templates.FORMAL,
        "order": templates.ORDER,
        "verbose": voices.VERBOSE,
        "report": voices.REPORT,
        "chat": voices.CHAT,
        "speech": voices.SPEECH,
        "implicit": phrases.IMPLICIT,
    }.items()
}
"""Family of sentences -> split -> templates."""
_NAMED = ("name", "synonym")
_DOCTORS = {
    "train": ("Dr Okafor", "Dr Lindqvist", "Dr Patel", "Dr Moreau", "Dr Keller", "Dr Romero"),
    "val": ("Dr Novak", "Dr Tanaka"),
    "test": ("Dr Haddad", "Dr Eriksen", "Dr Mwangi", "Dr Quispe"),
}
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_MODALITY = {"CT": ("CT", "CT", "CT scan"), "MR": ("MRI", "MR", "MR scan"), "PET": ("PET", "PET scan")}
_LANDMARKS = {"left": ("spleen", "stomach", "heart", "descending aorta"), "right": ("liver", "gallbladder", "appendix")}
_TRUNK = frozenset({"chest", "abdomen", "pelvis", "upper limb", "lower limb"})
_ROW = re.compile(r"(?:(left|right) )?(?:vertebra ([CTL])(\d+)|rib (\d+))")
_LAST = {"C": 7, "T": 12, "L": 5}
_OPPOSED = (("anterior", "posterior"), ("upper", "lower"), ("superior", "inferior"))


def write_request(target: str, *, style: str, split: Split, rng: random.Random, vocabulary: Vocabulary, context: Context) -> Wording | None:
    """One request in a style for a canonical name, in the language of one split; None where the style cannot apply to it (no
    abbreviation is known, nothing is described) or a form fits several structures of the context.

    For styles of absent targets `target` is the structure that is asked for and not there.
    """
    if style not in STYLES:
        raise UsageError(f"There is no style {style!r}.{did_you_mean(style, STYLES)} The styles are {', '.join(STYLES)}.")
    if split not in SPLITS:
        raise UsageError(f"There is no language split {split!r}; they are {', '.join(SPLITS)}.")
    return _Writer(target, style, split, rng, names_of(vocabulary, context)).write()


def paraphrase_set(
    target: str,
    *,
    split: Split,
    count: int,
    seed: int | str,
    vocabulary: Vocabulary,
    context: Context,
    styles: Sequence[str] | None = None,
) -> list[Wording]:
    """`count` distinct wordings for one target, their styles in the given order, begun again when it is used up (a label prompt
    comes once). Where a style cannot apply one of FALLBACK_STYLES takes its place. Deterministic; fewer than `count` only when the
    language of the split runs dry."""
    order = list(styles if styles is not None else PARAPHRASE_STYLES)
    rng = random.Random(f"{seed}|{target}|{split}")
    out: list[Wording] = []
    texts: set[str] = set()
    used: set[str] = set()
    further = [s for s in order if s != "label_prompt"] or ["label_prompt"]
    for place in range(count):
        style = order[place] if place < len(order) else further[(place - len(order)) % len(further)]
        for attempt in range(40):
            tried = style if attempt < 8 else _instead(style, attempt - 8, place)
            made = write_request(target, style=tried, split=split, rng=rng, vocabulary=vocabulary, context=context)
            if made is None or made.text.casefold() in texts or (made.template in used and attempt % 8 < 5 and made.template):
                continue
            texts.add(made.text.casefold())
            used.add(made.template)
            out.append(made)
            break
    return out


def _instead(style: str, attempt: int, place: int) -> str:
    if style == "ambiguous_abbreviation" and attempt < 4:
        return "abbr_or_short"
    return FALLBACK_STYLES[(place + attempt // 4) % len(FALLBACK_STYLES)]


class _Writer:
    """One request being written."""

    def __init__(self, target: str, style: str, split: Split, rng: random.Random, names: Names) -> None:
        self.target, self.style, self.split, self.rng, self.names = target, STYLES[style], split, rng, names
        self.context = names.context
        self.own = [w for w in words(target)]
        self.slips: tuple[str, ...] = ()

    def write(self) -> Wording | None:
        if self.style.name == "label_prompt":
            return self._wording(self.target, self.target, "")
        phrase = self._phrase()
        if phrase is None:
            return None
        family = self.rng.choice(self.style.families)
        text, template = self._sentence(family, phrase)
        return self._wording(self._damaged(text, phrase), phrase.surface, "+".join(p for p in (template, phrase.pattern) if p))

    def _phrase(self) -> Form | None:
        match self.style.name:
            case "abbr_or_short":
                return self._short()
            case "ambiguous_abbreviation":
                return self._ambiguous()
            case "implicit":
                return self._form(("description", "lay"), shared=False)
            case "relational":
                return self._relational()
            case "negated":
                return self._negated()
            case "chat":
                return self._form((*_NAMED, "lay"))
            case _:
                return self._absent() if self.style.absent else self._form(_NAMED)

    def _wording(self, text: str, surface: str, template: str) -> Wording:
        return Wording(" ".join(text.split()), self.style.name, self.split, surface, template, self.slips)

    def _sentence(self, family: str, phrase: Form) -> tuple[str, str]:
        listed = FAMILIES[family][self.split]
        number = self.rng.randrange(len(listed))
        text = listed[number].format(
            t=phrase.with_article,
            n=phrase.text,
            m=self.rng.choice(_MODALITY.get(self.context.modality or "", ("scan", "study"))),
            age=self.rng.randint(21, 88),
            day=self.rng.choice(_DAYS),
            dr=self.rng.choice(_DOCTORS[self.split]),
            num=self.rng.randint(2, 19),
        )
        text = re.sub(r"\b(scan|study) (scan|study|volume)\b", r"\1", text)
        return text[:1].upper() + text[1:] if family in _SENTENCES else text, f"{family}/{self.split}/{number}"

    # --- noun phrases ---------------------------------------------------------------------------------------------------

    def _form(self, kinds: tuple[str, ...], *, shared: bool = True) -> Form | None:
        found = self.names.surfaces(self.target, self.split, kinds, shared=shared)
        if not found:
            return None
        if shared and len(found) > 1 and self.rng.random() < 0.75:
            found = found[1:] if found[0].surface.text == self.target else found
        return self.names.say(self.rng.choice(found), self.split, self.rng)

    def _short(self) -> Form | None:
        abbreviations = self.names.surfaces(self.target, self.split, ("abbreviation",))
        if abbreviations and self.rng.random() < 0.8:
            return self.names.say(self.rng.choice(abbreviations), self.split, self.rng)
        brief = [c for c in self.names.surfaces(self.target, self.split, _NAMED) if len(c.surface.text.split()) < 3]
        return self._clipped(self.names.say(self.rng.choice(brief), self.split, self.rng)) if brief else None

    def _clipped(self, form: Form) -> Form:
        guard = self.names.guard(self.target)
        text, done = slip_words(form.text, self.split, self.rng, guard, count=1, table=SHORT, only=words(form.surface))
        self.slips += done
        return Form(text, form.surface, form.kind, form.pattern)

    def _ambiguous(self) -> Form | None:
        entry = self.names.entry(self.target)
        found = [
            c
            for c in self.names.surfaces(self.target, self.split, ("abbreviation",))
            if any(other.entry.base != entry.base for other in self.names.vocabulary.lookup(c.surface.text))
        ]
        return self.names.say(self.rng.choice(found), self.split, self.rng) if found else None

    def _absent(self) -> Form | None:
        kinds = self.rng.choice((_NAMED, _NAMED, ("abbreviation",), ("lay", "description")))
        form = self._form(kinds, shared=False) or self._form(_NAMED)
        if form is not None and form.kind == "abbreviation" and len(form.surface) < 3:
            return None  # two letters alone may mean anything, also something that is there
        if form is not None and any(c.entry.name in self.names.others(self.target) for c in self.names.vocabulary.lookup(form.text)):
            return None
        return form

    def _plain(self) -> Form | None:
        """A name of two structures of a pair, its side not yet said."""
        found = [c for c in self.names.surfaces(self.target, self.split, _NAMED, shared=False) if c.needs in ("left", "right")]
        if found:
            surface = self.rng.choice(found).surface
            return Form(surface.text, surface.text, surface.kind)
        base = self.names.entry(self.target).base
        return Form(base, self.target, "name")

    def _pattern(self, table: str, block: dict[str, str], side: str, **slots: str) -> tuple[str, str]:
        listed = lines(block[self.split])
        number = self.rng.randrange(len(listed))
        pattern = mirrored(listed[number]) if side == "right" else listed[number]
        return pattern.format(**slots), f"{table}/{self.split}/{number}"

    def _sided(self) -> Entry | None:
        """The target's entry when it is one of a pair whose sides may be said."""
        entry = self.names.entry(self.target)
        said = self.names.vocabulary.key(self.target)[1] in ("left", "right")
        return entry if entry.side in ("left", "right") and entry.twin and (said or not self.context.unsided) else None

    def _relational(self) -> Form | None:
        row = self._in_row()
        if row is not None:
            return row
        ways = [self._beside_landmark, self._along, self._stated]
        self.rng.shuffle(ways)
        return next((form for form in (way() for way in ways) if form is not None), None)

    def _stated(self) -> Form | None:
        return self._form(("relation",), shared=False)

    def _beside_landmark(self) -> Form | None:
        entry = self._sided()
        plain = self._plain() if entry is not None else None
        if entry is None or plain is None:
            return None
        side = entry.side or "left"
        if not _TRUNK.intersection(entry.regions) or "head" in entry.regions or self.rng.random() < 0.3:
            text, pattern = self._pattern("mirror", phrases.MIRROR, side, f=plain.text)
            return Form(text, plain.surface, plain.kind, pattern)
        near = self.rng.choice(("left", "right"))
        mark = self.rng.choice([m for m in _LANDMARKS[near] if m not in words(entry.base) and m not in (entry.part_of or "")] or [""])
        if not mark:
            return None
        table = ("same_side", phrases.SAME_SIDE) if near == side else ("other_side", phrases.OTHER_SIDE)
        text, pattern = self._pattern(*table, "left", f=plain.text, mark=mark)
        return Form(text, plain.surface, plain.kind, pattern)

    def _sibling(self) -> tuple[str, str] | None:
        """(whole, the one other part) when the dataset holds the two parts of a whole."""
        entry = self.names.entry(self.target)
        for whole in self.names.vocabulary:
            if entry.name in whole.made_of and len(whole.made_of) == 2:
                other = next(p for p in whole.made_of if p != entry.name)
                shown = next((n for n, e in self.names.entries.items() if e.name == other), None)
                return (whole.name, shown) if shown is not None else None
        return None

    def _along(self) -> Form | None:
        found = self._sibling()
        if found is None:
            return None
        whole, other = found
        for pair in _OPPOSED:
            for mine, its in (pair, pair[::-1]):
                if mine in words(self.target) and its in words(other):
                    key = {"superior": "upper", "inferior": "lower"}.get(mine, mine)
                    options = phrases.ALONG[self.split][key].split("|")
                    number = self.rng.randrange(len(options))
                    text = options[number].format(whole=whole, other=self._short_other(other))
                    return Form(text, self.target, "name", f"along/{self.split}/{key}{number}")
        return None

    def _short_other(self, other: str) -> str:
        spoken = self.names.surfaces(other, self.split, _NAMED)
        return self.names.say(self.rng.choice(spoken), self.split, self.rng).text if spoken else other

    def _in_row(self) -> Form | None:
        found = _ROW.fullmatch(self.names.entry(self.target).name)
        if found is None:
            return None
        side, level, number, rib = found.groups()
        if level:
            at, last = int(number), _LAST[level]
            below = f"{level}{at - 1}" if at > 1 else {"C": "", "T": "C7", "L": "T12"}[level]
            above = f"{level}{at + 1}" if at < last else {"C": "T1", "T": "L1", "L": ""}[level]
            kind, prefix = "vertebra", ""
        else:
            at = int(rib)
            below, above = (str(at - 1) if at > 1 else ""), (str(at + 1) if at < 12 else "")
            kind, prefix = (f"{side} rib" if side else "rib"), "rib "
        if not below or not above:
            return None
        text, pattern = self._pattern("next_in_row", phrases.NEXT_IN_ROW, "left", kind=kind, before=prefix + below, after=prefix + above)
        return Form(text, self.target, "name", pattern)

    def _negated(self) -> Form | None:
        entry = self._sided()
        if entry is not None:
            plain = self._plain()
            if plain is None:
                return None
            text, pattern = self._pattern("not_side", phrases.NOT_SIDE, entry.side or "left", f=plain.text)
            return Form(text, plain.surface, plain.kind, pattern)
        sibling = self._sibling()
        if sibling is not None and self.rng.random() < 0.6:
            text, pattern = self._pattern("not_sibling", phrases.NOT_SIBLING, "left", whole=sibling[0], other=self._short_other(sibling[1]))
            return Form(text, self.target, "name", pattern)
        form = self._form(_NAMED)
        if form is None:
            return None
        own = self.names.entry(self.target)
        if own.side == "both" and any(m in self.names.others(self.target) for m in own.members):
            text, pattern = self._pattern("not_one_of_two", phrases.NOT_ONE_OF_TWO, "left", f=form.text)
        else:
            apart = [n for n, e in self.names.entries.items() if e.name != own.name and not _kin(own, e)]
            if apart:
                text, pattern = self._pattern(
                    "not_other", phrases.NOT_OTHER, "left", f=form.text, other=self._short_other(self.rng.choice(apart))
                )
            else:
                text, pattern = self._pattern("nothing_else", phrases.NOTHING_ELSE, "left", f=form.text)
        return Form(text, form.surface, form.kind, "+".join(p for p in (pattern, form.pattern) if p))

    # --- slips -----------------------------------------------------------------------------------------------------------

    def _damaged(self, text: str, phrase: Form) -> str:
        style, rng, split = self.style.name, self.rng, self.split
        guard = self.names.guard(self.target)
        own = set(words(phrase.surface)) | set(self.own)
        if style == "messy_or_misspelled":
            return self._slipped(text, own, 1 + (rng.random() < 0.4), 1)
        if style == "keyboard_slips":
            return self._slipped(text, own, 1 + (rng.random() < 0.5), 2 + (rng.random() < 0.5))
        if style == "speech_to_text":
            text = re.sub(r"[.,;:!?()\[\]/\"]| - ", " ", text.lower())
            text, first = slip_words(text, split, rng, guard, count=2, table=SPEECH, only=own)
            text, second = slip_words(text, split, rng, guard, count=1, table=SPEECH, only=set(words(text)) - own)
            self.slips += first + second
            return text
        if style == "mixed_case":
            case = rng.choice(list(CASES[split]))
            text = CASES[split][case](text, rng)
            self.slips += (f"case_{case}:",)
            if rng.random() < 0.7:
                point = rng.choice(list(POINTS[split]))
                text = POINTS[split][point](text, rng)
                self.slips += (f"points_{point}:",)
        return text

    def _slipped(self, text: str, own: set[str], in_target: int, elsewhere: int) -> str:
        guard, rng, split = self.names.guard(self.target), self.rng, self.split
        if rng.random() < 0.6:
            text = text.lower() if not any(w.isupper() and len(w) > 1 for w in text.split()) else text
        text, first = slip_words(text, split, rng, guard, count=in_target, table=KINDS, only=own)
        touched = {w for done in first for w in words(done.split(">")[-1])}
        text, second = slip_words(text, split, rng, guard, count=elsewhere, table=KINDS, only=set(words(text)) - own - touched)
        self.slips += first + second
        if rng.random() < 0.25:
            text, third = slip_side(text, split, rng)
            self.slips += third
        if split == "train" and rng.random() < 0.2:
            text, third = join_words(text, rng, own)
            self.slips += third
        return text


_SENTENCES = frozenset({"clinical", "formal", "order", "verbose", "report", "implicit"})


def _kin(one: Entry, other: Entry) -> bool:
    return (
        other.part_of in (one.name, *one.members)
        or one.part_of in (other.name, *other.members)
        or other.name in one.members
        or (one.name in other.members)
    )
