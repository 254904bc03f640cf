"""The reasoner without a model: spelling repair, abbreviations, synonyms, sides and descriptions by rule.

The honest control that a trained reasoner must beat, and the first of the default cascade. It reads the words of the dialogue
alone (the request, the names that may be answered, the modality) and never the images. It answers "absent" when the request
means something that is not among the names, and when it means nothing that the vocabulary knows (`Decision.doubt` tells which).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from seerseg.protocols.base import ABSENT
from seerseg.protocols.messages import Message
from seerseg.reasoners.base import ReasonerCard, Weighed
from seerseg.reasoners.reading import (
    Mention,
    Sense,
    Words,
    after_verb,
    contained,
    find_descriptions,
    find_mentions,
    negated_positions,
    said_by_plural,
    tokenise,
)
from seerseg.vocabulary import DEFAULT_FILE, Entry, LabelDescription, Side, Split, Vocabulary

VERSION = 3
ACCEPT = 0.5  # a mention below this is no answer; set on the tuning half of the request set in the tests
ACCEPT_DESCRIBED = 0.5
_GENERIC = frozenset("tumour|lesion|cyst|bones|tissue|skin|body|skeletal muscle|face|torso|body extremities|vertebra".split("|"))
_KINDS = frozenset("area body bone bones gland muscle organ region tissue vessel".split())
"""Words that may stand beside a name without making it another: "hepatic tissue"."""
_FAR = frozenset({"opposite", "other", "away", "far", "across", "contralateral", "furthest", "farthest"})
_BESIDE = _FAR | frozenset(
    "side next adjacent beside near nearest close closest under underneath beneath below behind above level attached flank".split()
)
_REGION_CUES = {
    "chest": "chest thorax thoracic cardiac heart echo echocardiography pulmonary pumping chamber ejection myocardial",
    "abdomen": "abdomen abdominal belly",
    "pelvis": "pelvis pelvic",
    "head": "head brain cerebral neuro intracranial csf hydrocephalus skull",
    "spine": "spine spinal disc",
    "neck": "neck",
    "lower limb": "leg",
    "upper limb": "arm",
}
_REGION_WORDS = {word: region for region, cues in _REGION_CUES.items() for word in cues.split()}
_REQUEST = re.compile(r"<raw_prompt>(.*?)</raw_prompt>", re.DOTALL)
_TARGETS = re.compile(r"<targets>(.*?)</targets>", re.DOTALL)
_SKILL = re.compile(r"^\[\d+\] (\S+) \((\w+)\)", re.MULTILINE)
_SKILL_ANSWER = re.compile(r"^\[\d+\] (\S+) \(\w+\) when: .* do: answer (.+)$", re.MULTILINE)
_POLITE = re.compile(
    r"^\s*(?:(?:hey|hi|hello|please|pls|plz|kindly|can you|could you|would you|i want(?: you)? to|i need(?: you)? to|"
    r"i would like(?: you)? to|go ahead and|just|segment|outline|delineate|contour|mask|show(?: me)?|mark|highlight|find|draw|"
    r"trace|extract|label|get|give me|i want|i need|the|a|an)\b[\s,:]*)+",
    re.IGNORECASE,
)


Doubt = Literal["unknown", "landmark", "described", "general", "unexplained", "misspelt"]
"""Why an "absent" may be a misreading: no word means a structure; what was found only says where ("above the sacrum"); it was known by a
description; it is a kind of structure ("muscle"); a word beside it says something that is not understood; its spelling was repaired."""


@dataclass(frozen=True)
class Decision:
    """What a request is taken to mean. answer: a name or "absent"; tags: the kinds of skill that were used; pieces: the listed names that
    are together the answer, where it is none of them.

    doubt: set where nothing that may be answered was found, but perhaps only for want of words. None beside a name means that it was read,
    beside "absent" that the request names a structure in full that is not among the names, or excludes one that is.
    """

    answer: str
    evidence: str
    rationale: str
    tags: tuple[str, ...] = ()
    doubt: Doubt | None = None
    pieces: tuple[str, ...] = ()

    @property
    def reply(self) -> str:
        """In SEER's grammar."""
        parts = (("evidence", self.evidence), ("rationale", self.rationale), ("answer", self.answer))
        return "".join(f"<{tag}>{_inert(text)}</{tag}>" for tag, text in parts)


@dataclass(frozen=True)
class _Ranked:
    mention: Mention
    sense: Sense | None
    entry: Entry
    listed: str | None
    rank: float


class _Listed:
    """The names that may be answered, each with its entry; the vocabulary is extended by those it does not know."""

    def __init__(self, names: Sequence[str], words: Words) -> None:
        vocabulary = words.vocabulary
        by_entry: dict[str, str] = {}
        unknown: dict[str, LabelDescription] = {}
        for name in names:
            entry = vocabulary.resolve(name)
            if entry is None or entry.name in by_entry:
                unknown[name] = LabelDescription(name)
            else:
                by_entry[entry.name] = name
        if unknown:
            vocabulary = vocabulary.extend(unknown)
            words = Words(vocabulary)
            by_entry |= {name: name for name in unknown}
        self.names, self.words, self.by_entry = tuple(names), words, by_entry
        self._remainders: dict[str, dict[tuple[str, ...], set[str]]] = {}

    @cached_property
    def shared(self) -> frozenset[str]:
        """Roots that every name has: what goes without saying ("hippocampus" of anterior and posterior hippocampus)."""
        bags = [set(self.words.vocabulary.key(name)[0]) for name in self.names]
        return frozenset(set.intersection(*bags)) if len(bags) > 1 else frozenset()

    def parts(self, whole: Entry) -> tuple[str, ...]:
        """Listed entries that are parts of a structure (of either side of it, for a pair)."""
        entries = self.words.vocabulary.entries
        return tuple(n for n in self.by_entry if n in entries and entries[n].part_of in (whole.name, *whole.members))

    def remainders(self, whole: Entry | None) -> dict[tuple[str, ...], set[str]]:
        """What is left of each way to say a part without the words of the whole -> the names it can mean. None: of any name
        without the roots that all share."""
        key = whole.name if whole is not None else ""
        if key not in self._remainders:
            shared = frozenset(self.words.vocabulary.key(whole.base)[0]) if whole is not None else self.shared
            names = set(self.parts(whole)) if whole is not None else set(self.by_entry)
            out: dict[tuple[str, ...], set[str]] = {}
            for bag, senses in self.words.senses.items() if shared else ():
                rest = tuple(root for root in bag if root not in shared)
                for sense in senses:
                    if sense.entry.name in names and rest and len(rest) < len(bag):
                        out.setdefault(rest, set()).add(self.by_entry[sense.entry.name])
            self._remainders[key] = out
        return self._remainders[key]


class LexiconReasoner:
    """Answers in SEER's grammar; deterministic, so all samples are alike. `descriptions` adds a dataset's own names."""

    def __init__(self, *, vocabulary: Vocabulary | None = None, descriptions: Mapping[str, LabelDescription] | None = None) -> None:
        chosen = vocabulary or Vocabulary.load()
        self._vocabulary = chosen.extend(descriptions) if descriptions else chosen
        self._lists: dict[tuple[str, ...], _Listed] = {}
        self._plain = vocabulary is None and not descriptions

    @cached_property
    def card(self) -> ReasonerCard:
        """Identity: rules and vocabulary."""
        return ReasonerCard(
            name="lexicon",
            identity=f"lexicon-{VERSION}-{self._digest}",
            licence="Apache-2.0",
            source="seerseg",
            sees_images=False,
            notes="Rules over words; sees no image.",
        )

    @cached_property
    def _digest(self) -> str:
        if self._plain:
            return hashlib.sha256(DEFAULT_FILE.read_bytes()).hexdigest()[:16]
        said = repr([(e.name, e.side, e.surfaces) for e in self._vocabulary])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @cached_property
    def _words(self) -> Words:
        return Words(self._vocabulary)

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """One reply per dialogue, repeated `samples` times; `seed` changes nothing."""
        return [[self._read(dialogue).reply] * samples for dialogue in dialogues]

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        """Its answer, of which it is sure; where that is the whole of listed names, any of them may be meant as well as the whole;
        nothing for an "absent" that may be a misreading (`Decision.doubt`)."""
        out = []
        for decision in map(self._read, dialogues):
            meant = [decision, *(replace(decision, answer=name) for name in decision.pieces)] if decision.doubt is None else []
            out.append([Weighed(one.reply, 1 / len(meant)) for one in meant])
        return out

    def _read(self, dialogue: Sequence[Message]) -> Decision:
        text = next((m.text for m in dialogue if m.role == "user" and "<raw_prompt>" in m.text), None)
        if text is None:
            text = next((m.text for m in reversed(dialogue) if m.role == "user"), "")
        requests = _REQUEST.findall(text)
        listed = _TARGETS.findall(text[: text.rfind("<raw_prompt>")] if requests else text)
        names = [n.strip() for n in listed[0].split(";")] if listed else []
        modality = next((m for m in ("CT", "MR", "PET") if re.search(rf"\b{m} scan\b", text)), None)
        decision = self.decide(requests[-1] if requests else text, [n for n in names if n and n != ABSENT], modality=modality)
        shown = text[: text.rfind("<raw_prompt>")] if requests else ""
        told = self._told(shown, requests[-1] if requests else "", names)
        if told is not None:
            why = f"{decision.rationale} By skill {told[0]} it means {told[1]}."
            return replace(decision, answer=told[1], rationale=why, doubt=None)
        used = [skill for skill, tag in _SKILL.findall(shown) if tag in decision.tags][:1]
        if used:
            decision = replace(decision, rationale=f"{decision.rationale} Skill: {used[0]}.")
        return decision

    def _told(self, shown: str, request: str, names: Sequence[str]) -> tuple[str, str] | None:
        """Id and answer of the first skill that says outright what to answer, where it may be answered; not for a request that is a
        listed name itself."""
        listed = {n.casefold(): n for n in names}
        if request.strip().casefold() in listed:
            return None
        for skill, answer in _SKILL_ANSWER.findall(shown):
            name = answer.strip()
            if not names or name.casefold() in listed or name == ABSENT:
                return skill, listed.get(name.casefold(), name)
        return None

    def decide(self, request: str, targets: Sequence[str] = (), *, modality: str | None = None) -> Decision:
        """What the request means. targets: names that may be answered, empty when any may; modality: "CT", "MR" or None."""
        key = tuple(targets)
        listed = self._lists.get(key)
        if listed is None:
            if len(self._lists) > 64:
                self._lists.clear()
            listed = self._lists[key] = _Listed(key, self._words)
        return _Reader(request, listed, modality).decide()


class _Reader:
    """One request being read."""

    def __init__(self, request: str, listed: _Listed, modality: str | None) -> None:
        self.request, self.listed, self.modality = request, listed, modality
        self.tokens = tokenise(request, listed.words)
        self.negated = negated_positions(self.tokens)
        self.mentions = find_mentions(self.tokens, listed.words)
        self.notes: list[str] = []
        self.tags: list[str] = []

    def decide(self) -> Decision:
        ranked = self._ranked()
        best = ranked[0] if ranked and ranked[0].rank >= ACCEPT else None
        answer = self._implied(best) if self.listed.names else None
        doubt: Doubt | None = None
        if answer is None:
            answer = self._named(best) if best is not None else self._nothing()
            doubt = None if self._excludes() else "unknown" if best is None else self._doubt(best) if answer == ABSENT else None
        return replace(self._decision(answer, best), doubt=doubt)

    # --- choosing ---------------------------------------------------------------------------------------------------

    def _ranked(self) -> list[_Ranked]:
        described = [m for m in find_descriptions(self.tokens, self.listed.words) if m.score >= ACCEPT_DESCRIBED]
        covering = [m.positions for m in described if m.score >= 0.6 and not m.negated and self._may_be_answered(m)]
        named = [m for m in self.mentions if not any(m.positions < positions for positions in covering)]
        out: list[_Ranked] = []
        for mention in (*named, *described[:8]):
            chosen = self._choose(mention)
            if chosen is not None:
                out.append(chosen)
        return sorted(out, key=lambda r: (-round(r.rank, 6), min(r.mention.positions), r.entry.name))

    def _may_be_answered(self, mention: Mention) -> bool:
        """Words that describe what is not listed do not hide listed names among them: "the lung on the side of the heart"."""
        return not self.listed.names or any(sense.entry.name in self.listed.by_entry for sense in mention.senses)

    def _choose(self, mention: Mention) -> _Ranked | None:
        side = self._side(mention)
        fitting = [(fit, sense) for sense in mention.senses if (fit := _side_fit(sense, side, self._open_side(sense))) > 0]
        if not fitting:
            return None
        votes = self._region_votes(mention)
        scored = []
        for order, (fit, sense) in enumerate(fitting):
            listed = self.listed.by_entry.get(sense.entry.name)
            context = 0.15 * sum(region in votes for region in sense.entry.regions)
            odd = 0.1 if self.modality and sense.entry.modalities and self.modality not in sense.entry.modalities else 0.0
            kind = {"name": 0.06, "synonym": 0.05, "lay": 0.02}.get(sense.kind, 0.0)
            scored.append((fit + (1.0 if listed else 0.0) + context + kind - odd, -order, sense, listed))
        _, _, sense, listed = max(scored, key=lambda s: (s[0], s[1]))
        rank = mention.score * (1.25 if listed or not self.listed.names else 1.0)
        rank *= 0.5 if mention.anchor else 1.3 if after_verb(self.tokens, mention) else 1.0
        if not mention.anchor and not mention.described and len(self.mentions) > 1 and contained(self.tokens, mention):
            rank *= 0.75
        if mention.negated:
            rank *= 0.6 if side in ("left", "right") and sense.entry.side == side and self._only_sides_negated(mention) else 0.2
        rank *= 0.7 if sense.entry.name in _GENERIC else 1.0
        if mention.described and any(mention.positions <= named.positions for named in self.mentions):
            rank *= 0.7  # these words are a name already
        return _Ranked(mention, sense, sense.entry, listed, rank * 0.995 ** min(mention.positions))

    def _open_side(self, sense: Sense) -> bool:
        """Whether a one-sided sense may stand for a request without side: only one of the twins can be answered."""
        entry, by_entry = sense.entry, self.listed.by_entry
        return entry.name in by_entry and entry.twin is not None and entry.twin not in by_entry

    def _excludes(self) -> bool:
        """Whether a listed name is said to be left out: who reads less of these words would answer just that."""
        by_entry = self.listed.by_entry
        return any(m.negated and any(sense.entry.name in by_entry for sense in m.senses) for m in self.mentions)

    def _doubt(self, best: _Ranked) -> Doubt | None:
        """Why the structure that was found may not be what is meant."""
        mention, tokens, words = best.mention, self.tokens, self.listed.words
        if mention.anchor:
            return "landmark"
        if mention.described:
            return "described"
        if best.entry.name in _GENERIC:
            return "general"
        low, high = min(mention.positions), max(mention.positions)
        beside = [
            t for n, t in enumerate(tokens[: high + 3]) if n >= low - 2 and n not in mention.positions and t.clause == tokens[low].clause
        ]
        if any(t.side is None and not t.raw.isdigit() and t.word not in words.everyday | _KINDS for t in beside):
            return "unexplained"
        return "misspelt" if any(tokens[n].repaired for n in mention.positions) else None

    def _region_votes(self, mention: Mention) -> set[str]:
        votes = {_REGION_WORDS[t.word] for n, t in enumerate(self.tokens) if n not in mention.positions and t.word in _REGION_WORDS}
        for other in self.mentions:
            if other.positions.isdisjoint(mention.positions):
                votes.update(region for sense in other.senses[:1] for region in sense.entry.regions)
        return votes

    # --- side -------------------------------------------------------------------------------------------------------

    def _side(self, mention: Mention) -> Side | None:
        low, high = min(mention.positions), max(mention.positions)
        near: list[tuple[int, Side, bool]] = []
        for n, token in enumerate(self.tokens):
            if token.side is not None:
                gap = low - n if n < low else n - high if n > high else 0
                same = token.clause == self.tokens[low].clause
                near.append((gap + (0 if same else 4), token.side, n in self.negated))
        near.sort(key=lambda item: item[0])
        wanted = [(gap, side) for gap, side, negated in near if not negated]
        if wanted:
            closest = {side for gap, side in wanted if gap <= wanted[0][0] + 2}
            return "both" if len(closest) > 1 or "both" in closest else next(iter(closest))
        unwanted = {side for _, side, negated in near if negated} - {"both"}
        if len(unwanted) == 1:
            return "right" if unwanted == {"left"} else "left"
        return self._landmark_side(mention) or ("both" if said_by_plural(self.tokens, mention) else None)

    def _only_sides_negated(self, mention: Mention) -> bool:
        """ "not the left lung": the side is refused, not the lung."""
        return any(t.side is not None and n in self.negated and abs(n - min(mention.positions)) <= 3 for n, t in enumerate(self.tokens))

    def _landmark_side(self, mention: Mention) -> Side | None:
        for other in self.mentions:
            lies = next((s.entry.lies for s in other.senses if s.entry.lies is not None), None)
            if lies is None or not other.anchor or not other.positions.isdisjoint(mention.positions):
                continue
            low = min(other.positions)
            about = {t.word for t in self.tokens[max(0, low - 5) : max(other.positions) + 2]}
            if about.isdisjoint(_BESIDE):
                continue
            far = any(t.word in _FAR for t in self.tokens[max(0, low - 6) : low])
            opposite: Side = "right" if lies == "left" else "left"
            self.notes.append(f"the {self._said(other)} lies on the {lies}")
            return opposite if far else lies
        return None

    # --- what follows from the list -----------------------------------------------------------------------------------

    def _implied(self, best: _Ranked | None) -> str | None:
        """An answer that only the list of names makes plain: "the front part", "not the head", "the left one"."""
        if best is None:
            return self._by_remainder(None, self.listed.names) or self._one_sided()
        if best.mention.negated:
            return self._by_remainder(None, self.listed.names)
        parts = tuple(self.listed.by_entry[n] for n in self.listed.parts(best.entry))
        return self._by_remainder(best.entry, parts, only_excluded=best.listed is not None) if parts else None

    def _by_remainder(self, whole: Entry | None, names: Sequence[str], *, only_excluded: bool = False) -> str | None:
        wanted: set[str] = set()
        unwanted: set[str] = set()
        places: dict[str, int] = {}
        for n, token in enumerate(self.tokens):
            if not token.repaired or len(token.raw) > 5:  # a short repaired word is too little to go by
                places.setdefault(self.listed.words.vocabulary.root(token.word), n)
        for rest, meant in self.listed.remainders(whole).items():
            if len(meant) == 1 and all(root in places for root in rest):
                (unwanted if any(places[root] in self.negated for root in rest) else wanted).update(meant)
        wanted -= unwanted
        if len(wanted) == 1 and not only_excluded:
            self.notes.append("the names that may be answered differ by this word")
            return wanted.pop()
        left = [name for name in names if name not in unwanted]
        if unwanted and len(left) == 1:
            self.notes.append("the other one was excluded")
            return left[0]
        return None

    def _one_sided(self) -> str | None:
        """ "the left one", when one name has that side and nothing else was said."""
        sides = {t.side for n, t in enumerate(self.tokens) if t.side is not None and n not in self.negated}
        excluded = {t.side for n, t in enumerate(self.tokens) if t.side is not None and n in self.negated} - {"both"}
        if not sides and len(excluded) == 1:
            sides = {"right" if excluded == {"left"} else "left"}
        rest = [t for t in self.tokens if t.side is None and t.word not in self.listed.words.vocabulary.ordinary]
        entries = self.listed.words.vocabulary.entries
        fitting = [shown for name, shown in self.listed.by_entry.items() if name in entries and entries[name].side in sides]
        return fitting[0] if len(sides) == 1 and not rest and len(fitting) == 1 else None

    def _named(self, best: _Ranked) -> str:
        if best.listed is not None or not self.listed.names:
            return best.listed or best.entry.name
        entries = self.listed.words.vocabulary.entries
        members = [self.listed.by_entry[m] for m in best.entry.members if m in self.listed.by_entry]
        side = self._side(best.mention)
        sided = [n for n in self.listed.parts(best.entry) if n in entries and entries[n].side == side] if side in ("left", "right") else []
        if len(sided) == 1:
            self.notes.append(f"of what is listed, only {sided[0]} is its {side} part")
            return self.listed.by_entry[sided[0]]
        if len(members) == 2 or len(self.listed.parts(best.entry)) > 1:
            self.notes.append("this is the whole of several listed names")
            return best.entry.name
        if best.entry.side in ("left", "right") and self._side(best.mention) is None:
            pair = next((e.name for e in entries.values() if best.entry.name in e.members), None)
            if pair in self.listed.by_entry:
                return self.listed.by_entry[pair]
        self.notes.append(f"{best.entry.name} is not among the names that may be answered")
        self.tags.append("OUT_OF_REGION_REJECT")
        return ABSENT

    def _nothing(self) -> str:
        if self.listed.names:
            self.notes.append("nothing that may be answered is meant by these words")
            self.tags.append("OUT_OF_REGION_REJECT")
            return ABSENT
        cleaned = _POLITE.sub("", " ".join(self.request.split())).strip(" .,;:!?\"'")
        self.notes.append("the vocabulary knows none of these words, so they are passed on")
        return _inert(cleaned[:120].strip()) or ABSENT

    # --- saying it ----------------------------------------------------------------------------------------------------

    def _said(self, mention: Mention) -> str:
        return " ".join(self.tokens[n].word for n in sorted(mention.positions))

    def _decision(self, answer: str, best: _Ranked | None) -> Decision:
        repairs = [f"{t.raw} -> {t.word}" for t in self.tokens if t.repaired and t.raw != t.word][:6]
        reasons: list[str] = []
        if repairs:
            reasons.append(f"Spelling repaired: {', '.join(repairs)}.")
            self.tags.append("MESSY_INPUT_REPAIR")
        if best is not None and best.sense is not None:
            said = self._said(best.mention)
            if best.mention.described:
                reasons.append(f"Described as {best.sense.text!r}: {best.entry.name}.")
            elif best.sense.kind == "abbreviation":
                others = list(dict.fromkeys(s.entry.base for s in best.mention.senses if s.entry.base != best.entry.base))[:3]
                reasons.append(f"{said!r} is short for {best.entry.name}" + (f", not {', '.join(others)}." if others else "."))
                self.tags.append("ABBR_DISAMBIGUATE")
            else:
                reasons.append(f"{said!r} means {best.entry.name}.")
        reasons.extend(f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(self.notes))
        if len(self.tokens) > 14:
            self.tags.append("VERBOSE_PRUNE")
        self.tags.append("PROMPT_NORMALIZE")
        named = self._said(best.mention) if best is not None else "no known structure is named"
        evidence = f"Words only, no image was read: {named}."
        why = " ".join(reasons) or "Taken as it stands."
        tags = tuple(dict.fromkeys(self.tags))
        return Decision(answer, evidence, why, tags, pieces=self._pieces(answer))

    def _pieces(self, answer: str) -> tuple[str, ...]:
        by_entry = self.listed.by_entry
        if answer in by_entry or answer in by_entry.values():
            return ()
        return tuple(by_entry[name] for name in self.listed.words.vocabulary.pieces(answer, by_entry))


def _side_fit(sense: Sense, side: Side | None, open_side: bool) -> float:
    """How well a sense keeps the side that was asked for; 0 when it contradicts it."""
    own = sense.side
    if own is None or own == side:
        return 1.0
    if side is None:
        if sense.tells_side:
            return 1.0
        return 0.95 if own == "both" or open_side else 0.4
    return 0.0


def _inert(text: str) -> str:
    return text.replace("<", "\u2039").replace(">", "\u203a")


def load(
    *,
    source: str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = True,
    vocabulary: Vocabulary | None = None,
    descriptions: Mapping[str, LabelDescription] | None = None,
    splits: Sequence[Split] | None = None,
) -> LexiconReasoner:
    """The lexicon; `source` may name a vocabulary file of the built-in one's schema. splits: the language splits whose words
    it may know (experiments: "train" alone); None for all."""
    chosen = vocabulary if source is None else Vocabulary.load(Path(source))
    if splits is not None:
        chosen = (chosen or Vocabulary.load()).only(splits)
    return LexiconReasoner(vocabulary=chosen, descriptions=descriptions)
