"""Finding skills by what is known at inference: the request's words, the scan's modality and region, the names that may be answered.

A skill's trigger is a few phrases. A request fits a phrase by how much of it it holds: the share, weighted by rarity, of the phrase's
words and letter trigrams that occur in the request (so a slip costs little). The cosine of hashed subword vectors stands beside it;
where the caller gives an encoder of sentences, a phrase that means the same is found too. What contradicts the scan or the closed list
of names is left out, whatever its score; so is what the request denies ("but without its tail"). Under the threshold nothing is shown,
nor where skills that lead to different names fit about as well: no skill is better than a wrong one. A skill that was tried and neither
helped nor hurt is never shown, but still says that its words mean something else (a rival).

The index is made once per version of the bank and kept beside it; skills are parsed when they are found, not when the bank is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import BankError
from seerseg.paths import read_json, write_atomically, write_json
from seerseg.skills.base import Query, Skill
from seerseg.skills.encoder import RETRIEVAL, Encoder, adapted, kept_vectors
from seerseg.skills.store import BankFolder, read_skills
from seerseg.vocabulary import Vocabulary, words

INDEX_SCHEMA = 2
RETRIEVAL_SCHEMA = 1
BUCKETS = 1 << 20  # hashed features; a collision adds a little noise to one weight
DIMENSIONS = 96
POSTINGS = 30_000  # rarest features are read first, until so many phrase rows were touched
CANDIDATES = 256
MEANT = 0.97  # what a phrase is worth that means the very same: words that were said count more
KEPT_SKILLS = 4096  # parsed skills that an index holds at most
MOST_READ = 24  # skills that are looked at for rivals of those that were found
_DENIED = re.compile(
    r"\b(?:not(?! only)|no|without|except(?: for)?|excluding|exclude|ignore|ignoring|skip|omit|other than|rather than|instead of|leave out|"
    r"apart from|aside from|anything but)\b(?:\s+(?!(?:but|just|only|please|instead)\b)[^\s,.;:!?()]+){0,7}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Weights:
    """How a fit is scored: lexical + cosine (of subwords) sum to 1; where an encoder is given and no phrase was said as it stands,
    MEANT - scale * (1 - cosine of sentences) takes the score's place when it is higher, so that a phrase is found by its meaning too. A
    skill that was tried gains or loses up to `trust`. threshold: the least score that is shown; `calibrate` sets it. margin: by how much
    the best skill must fit better than any that leads to another name; 0 shows both."""

    lexical: float = 0.75
    cosine: float = 0.25
    trust: float = 0.05
    threshold: float = 0.72
    scale: float = 1.0
    margin: float = 0.0


ENCODED = Weights(threshold=0.8, scale=0.28, margin=0.02)
"""With sentence embeddings: a skill is shown from a cosine of 0.4 where it is 0.07 over that of any other name, or from a stricter
threshold of words than without them; chosen for MiniLM on validation language, see documentation/skills.md."""


@dataclass(frozen=True)
class Found:
    """A skill with its score in 0..1 (plus or minus trust) and the phrase that fitted. gap: by how much it, or a better one that leads to
    the same name, fits better than any that leads to another (as `SkillIndex.contenders` finds it)."""

    skill: Skill
    score: float
    phrase: str
    gap: float = math.inf


class SkillIndex:
    """Phrases of the accepted skills of one version and of their rivals, with their features by row and by column."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], phrases: Sequence[str], lines: Sequence[str] | LineFile) -> None:
        self._a = arrays
        self._phrases, self._lines = phrases, lines
        self._parsed: dict[int, Skill] = {}
        self._row_weight = (
            np.add.reduceat(arrays["idf"][arrays["row_features"]], arrays["row_starts"][:-1]) if len(arrays["owner"]) else np.zeros(0)
        )

    @property
    def size(self) -> int:
        """Number of skills that may be shown."""
        return int(self._a["shown"].sum())

    @staticmethod
    def of(skills: Iterable[Skill], encoder: Encoder | None = None) -> SkillIndex:
        """The index of the accepted ones and the rivals among the skills, in memory."""
        kept = [s for s in skills if _counts(s)]
        arrays, phrases = _build(kept)
        made = SkillIndex(arrays, phrases, [json.dumps(s.to_json(), ensure_ascii=False) for s in kept])
        return made if encoder is None else made.embedded(encoder)

    def embedded(self, encoder: Encoder, bank: Path | None = None) -> SkillIndex:
        """The same index with an encoder's vectors of all phrases, which are then found by their meaning too. bank: the folder where
        vectors are kept."""
        if not self._phrases:
            return self
        vectors = np.asarray(encoder(list(self._phrases)), np.float32) if bank is None else kept_vectors(self._phrases, encoder, bank)
        return SkillIndex({**self._a, "meanings": _unit(vectors)}, self._phrases, self._lines)

    def skill(self, number: int) -> Skill:
        """The skill of that place in the index."""
        found = self._parsed.get(number)
        if found is None:
            if len(self._parsed) >= KEPT_SKILLS:
                self._parsed.clear()
            found = self._parsed[number] = Skill.from_json(json.loads(self._lines[int(self._a["line"][number])]), "The bank")
        return found

    def showing(self, shown: Container[str]) -> SkillIndex:
        """The same index, in which only the skills with these ids may be shown; all others are rivals."""
        ids = [self.skill(n).id for n in range(len(self._a["line"]))]
        return SkillIndex({**self._a, "shown": np.array([i in shown for i in ids], np.bool_)}, self._phrases, self._lines)

    def search(self, query: Query, weights: Weights, limit: int, encoder: Encoder | None = None) -> list[Found]:
        """At most `limit` skills over the threshold, best first, one per tag and target."""
        rows, score = self._scored(query, weights, encoder)
        return self._chosen(query, weights, limit, rows, score)

    def contenders(self, query: Query, weights: Weights, heeded: Container[str], encoder: Encoder | None = None) -> list[Found]:
        """Every skill that scores at least threshold - margin and that nothing known contradicts, best first, whether or not it may be
        shown, with its gap: the skills with the ids `heeded` count as rivals. Were a skill the only one that may be shown, it would be
        where its score is at least the threshold and its gap the margin (a margin of 0 heeds no rival)."""
        rows, score = self._scored(query, weights, encoder)
        floor = weights.threshold - weights.margin
        best: dict[int, tuple[float, int]] = {}
        for place in np.argsort(-score, kind="stable"):
            if score[place] < floor:
                break
            best.setdefault(int(self._a["owner"][rows[place]]), (float(score[place]), int(rows[place])))
        found = [(self.skill(number), value, row) for number, (value, row) in best.items()]
        found = [one for one in found if fits(one[0], query)]
        tops: dict[str, float] = {}
        for skill, value, _ in found:
            if skill.leads_to is not None and skill.id in heeded:
                tops[skill.leads_to] = max(value, tops.get(skill.leads_to, -math.inf))
        return [
            Found(skill, value, self._phrases[row], _gap(skill.leads_to, value, tops, floor) if skill.leads_to is not None else math.inf)
            for skill, value, row in found
        ]

    def _scored(self, query: Query, weights: Weights, encoder: Encoder | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows of phrases that may reach threshold - margin, and their scores."""
        nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
        text, least = asked(query.text), weights.threshold - weights.margin
        rows = self._candidates(text)
        meant = MEANT - weights.scale * (1 - self._meant(text, encoder))
        if len(meant):
            nearest = np.argpartition(-meant, CANDIDATES)[:CANDIDATES] if len(meant) > CANDIDATES else np.arange(len(meant))
            rows = np.union1d(rows, nearest[meant[nearest] + weights.trust >= least])
        if not len(rows):
            return nothing
        held = self._containment(rows, text)
        score = held * weights.lexical
        # the cosine is worth at most its weight, so a row that cannot reach the threshold is not looked at
        hopeful = score + weights.cosine + weights.trust >= least
        if len(meant):
            hopeful |= meant[rows] + weights.trust >= least
        rows, score, held = rows[hopeful], score[hopeful], held[hopeful]
        if not len(rows):
            return nothing
        vector = _unit(_subword([text]))[0]
        score += weights.cosine * np.clip(self._a["vectors"][rows].astype(np.float32) @ vector, 0, 1)
        if len(meant) and not ((held > 0.999) & (score >= weights.threshold)).any():  # where a phrase was said, nobody need guess
            score = np.maximum(score, meant[rows])
        owner = self._a["owner"][rows]
        score += weights.trust * self._a["trust"][owner]
        return rows, score

    def _chosen(self, query: Query, weights: Weights, limit: int, rows: NDArray[np.int64], score: NDArray[np.float32]) -> list[Found]:
        """Of the scored rows what is shown."""
        found: list[Found] = []
        seen: set[tuple[str, str | None]] = set()
        first: tuple[float, str] | None = None  # score and name of the best skill that leads to one
        read: dict[int, Skill] = {}
        for place in np.argsort(-score, kind="stable"):
            value, number = float(score[place]), int(self._a["owner"][rows[place]])
            enough = len(found) >= limit or value < weights.threshold
            if value < weights.threshold - weights.margin or (enough and not weights.margin):
                break
            if enough and first is not None and (value <= first[0] - weights.margin or len(read) >= MOST_READ):
                break
            if number in read or (not weights.margin and not self._a["shown"][number]):
                continue
            skill = read[number] = self.skill(number)
            name = skill.leads_to
            if not fits(skill, query):
                continue
            if weights.margin and name is not None:
                if first is None:
                    first = value, name
                elif name != first[1]:
                    if value > first[0] - weights.margin:
                        return [f for f in found if f.skill.leads_to is None]
                    continue
            if enough or (skill.tag, skill.target) in seen or not self._a["shown"][number]:
                continue
            seen.add((skill.tag, skill.target))
            found.append(Found(skill, value, self._phrases[int(rows[place])]))
        return found

    def _meant(self, text: str, encoder: Encoder | None) -> NDArray[np.float32]:
        """The cosine of every phrase with the text by the encoder, the mean of that of the whole text and of its telling words; empty
        without an encoder."""
        if encoder is None or "meanings" not in self._a or not text.strip():
            return np.zeros(0, np.float32)
        found = _unit(np.asarray(encoder([text, telling(text) or text]), np.float32))
        return np.asarray(self._a["meanings"] @ found.mean(0), np.float32)

    def _candidates(self, text: str) -> NDArray[np.int64]:
        """Rows that share the rarest features with the text, most shared weight first."""
        starts, members, idf = self._a["column_starts"], self._a["column_rows"], self._a["idf"]
        place = self._column_of(_features(text))
        if not len(place):
            return np.zeros(0, np.int64)
        place = place[np.argsort(starts[place + 1] - starts[place], kind="stable")]
        touched, chosen, weight = 0, [], []
        for column in place:
            length = int(starts[column + 1] - starts[column])
            if touched and touched + length > POSTINGS:
                break
            touched += length
            chosen.append(members[starts[column] : starts[column + 1]])
            weight.append(np.full(length, idf[column], np.float32))
        shared = np.bincount(np.concatenate(chosen), np.concatenate(weight), minlength=len(self._row_weight))
        rows = np.flatnonzero(shared)
        # by the share of a row's weight, not its sum: short phrases are not buried under long ones
        share = shared[rows] / self._row_weight[rows]
        if len(rows) > CANDIDATES:
            keep = np.sort(np.argpartition(-share, CANDIDATES)[:CANDIDATES])
            rows = rows[keep]
        return rows.astype(np.int64)

    def _containment(self, rows: NDArray[np.int64], text: str) -> NDArray[np.float32]:
        """The weighted share of each row's features that the text has."""
        starts, features, idf = self._a["row_starts"], self._a["row_features"], self._a["idf"]
        have = np.zeros(len(idf), np.bool_)
        have[self._column_of(_features(text))] = True
        lengths = starts[rows + 1] - starts[rows]
        ends = np.cumsum(lengths)
        flat = np.arange(ends[-1]) + np.repeat(starts[rows] - (ends - lengths), lengths)
        own = features[flat]
        held = np.add.reduceat(np.where(have[own], idf[own], 0.0), ends - lengths)
        return (held / np.maximum(self._row_weight[rows], 1e-9)).astype(np.float32)

    def _column_of(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        known = self._a["buckets"]
        place = np.searchsorted(known, buckets)
        inside = place < len(known)
        return place[inside][known[place[inside]] == buckets[inside]]


class LineFile:
    """Lines of a bank file by their byte offsets; a line is read when asked for."""

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        self._path, self._offsets = path, offsets

    def __getitem__(self, number: int) -> str:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            return file.readline().decode("utf-8")

    def __len__(self) -> int:
        return len(self._offsets)


class FrozenBank:
    """Retrieval from one version of a bank, which never changes meanwhile. mode: what results are marked with."""

    def __init__(
        self, index: SkillIndex, identity: str, *, weights: Weights | None = None, encoder: Encoder | None = None, mode: str = "frozen"
    ) -> None:
        self.index, self.weights, self.mode = index, weights or Weights(), mode
        self._encoder, self._version = encoder, identity

    @property
    def version(self) -> str:
        """The hash of the state's content."""
        return self._version

    @property
    def identity(self) -> str:
        """The version and everything that retrieval depends on."""
        w = self.weights
        return f"{self.mode}-{self._version}-{w.lexical:g}-{w.cosine:g}-{w.trust:g}-{w.threshold:g}-{w.margin:g}-{self._meaning}"

    @staticmethod
    def of(skills: Iterable[Skill], *, weights: Weights | None = None, mode: str = "frozen", encoder: Encoder | None = None) -> FrozenBank:
        """A bank of skills in memory."""
        kept = list(skills)
        digest = hashlib.blake2b("".join(sorted(json.dumps(s.to_json(), sort_keys=True) for s in kept)).encode(), digest_size=8).hexdigest()
        return FrozenBank(SkillIndex.of(kept, encoder), digest, weights=weights, encoder=encoder, mode=mode)

    @staticmethod
    def open(folder: Path, *, number: int | None = None, weights: Weights | None = None, encoder: Encoder | None = None) -> FrozenBank:
        """The newest (or a given) state of the bank in `folder`; BankError when there is none. With an encoder that the bank was evolved
        with, its own metric and threshold and margin take the place of ENCODED's."""
        bank = BankFolder(folder)
        head = bank.head() if number is None else bank.head_at(number)
        if head is None:
            raise BankError(f"There is no skill bank in {folder}. Make one with seerseg_evolve or seerseg_bank add.")
        index = open_index(bank.version_path(head.version), head.version)
        if encoder is not None:
            weights = kept_weights(folder, encoder, head.number) or ENCODED if weights in (None, ENCODED) else weights
            encoder = adapted(encoder, folder)
            index = index.embedded(encoder, folder)
        return FrozenBank(index, head.version, weights=weights, encoder=encoder, mode=bank.mode)

    @property
    def _meaning(self) -> str:
        named = str(getattr(self._encoder, "identity", "own"))
        return "subword" if self._encoder is None else f"{named}-{self.weights.scale:g}"

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """The skills that fit, best first."""
        return [found.skill for found in self.search(query, limit)]

    def search(self, query: Query, limit: int) -> list[Found]:
        """The same with scores."""
        return self.index.search(query, self.weights, limit, self._encoder)


def asked(text: str) -> str:
    """What a request asks for: its words without those that it denies, up to seven after "without", "not" and the like."""
    return _DENIED.sub(" ", text)


def telling(text: str) -> str:
    """The words of a text that are no everyday words."""
    ordinary = Vocabulary.load().ordinary
    return " ".join(w for w in words(text) if len(w) > 1 and w not in ordinary and not w.isdigit())


def fits(skill: Skill, query: Query) -> bool:
    """Whether nothing known of the request contradicts the skill: its modality, its region, its target on a closed list."""
    if skill.modalities and query.modality and query.modality not in skill.modalities:
        return False
    if skill.regions and query.regions and not set(skill.regions) & set(query.regions):
        return False
    return not (skill.target is not None and query.targets and skill.target not in query.targets and skill.target != "absent")


def open_index(path: Path, version: str) -> SkillIndex:
    """The index of a bank file, from `<file>.index.npz` beside it, made (and kept where it can be) when there is none."""
    kept = path.with_suffix(".index.npz")
    loaded = _load(kept, version)
    if loaded is None:
        arrays, phrases = _build_file(path, version)
        data = {
            **arrays,
            "phrases": np.frombuffer("\n".join(phrases).encode(), np.uint8),
            "version": np.frombuffer(version.encode(), np.uint8),
        }
        try:
            write_atomically(kept, lambda temporary: _save(temporary, data))
        except Exception as fault:  # a read-only bank is still a bank
            if not _is_output(fault):
                raise
        loaded = arrays, phrases
    arrays, phrases = loaded
    return SkillIndex(arrays, phrases, LineFile(path, arrays["offsets"]))


def keep_weights(weights: Weights, encoder: Encoder, bank: Path, state: int, told: Mapping[str, Any]) -> None:
    """Keep in a bank from which threshold and margin on its skills are shown with one encoder, from a state on. told: how they were
    found."""
    path = _weights_path(encoder, bank)
    before = _kept(path) if path.is_file() else []
    entry = {"state": state, "threshold": weights.threshold, "margin": weights.margin, "scale": weights.scale, "found": told}
    write_json(path, {"schema": RETRIEVAL_SCHEMA, "fitted": [*(e for e in before if e["state"] < state), entry]})


def kept_weights(bank: Path, encoder: Encoder, state: int) -> Weights | None:
    """Those that the bank keeps for an encoder in a state; None where it keeps none."""
    path = _weights_path(encoder, bank)
    if getattr(encoder, "identity", None) is None or not path.is_file():
        return None
    known = [entry for entry in _kept(path) if entry["state"] <= state]
    return replace(ENCODED, **{name: known[-1][name] for name in ("threshold", "margin", "scale")}) if known else None


def _kept(path: Path) -> list[dict[str, Any]]:
    said = read_json(path, BankError, RETRIEVAL_SCHEMA)
    try:
        numbers = ("threshold", "margin", "scale")
        return [{**e, "state": int(e["state"]), **{name: float(e[name]) for name in numbers}} for e in said["fitted"]]
    except (KeyError, TypeError, ValueError):
        raise BankError(f"{path} must list the state, threshold, margin and scale of each fit. Remove it for the shipped values.") from None


def _weights_path(encoder: Encoder, bank: Path) -> Path:
    return bank / RETRIEVAL / f"{getattr(encoder, 'identity', None)}.json"


def calibrate(
    index: SkillIndex,
    examples: Iterable[tuple[Query, frozenset[str]]],
    weights: Weights | None = None,
    beta: float = 0.5,
    encoder: Encoder | None = None,
) -> Weights:
    """Weights whose threshold maximises F-beta (beta < 1 weighs precision) of the first skill found over examples: a query and the ids that
    would help (none: nothing should be shown). The higher threshold among equals."""
    chosen = weights or Weights()
    open_ended = replace(chosen, threshold=0.0)
    scored: list[tuple[float, bool]] = []
    helpful = 0
    for query, ids in examples:
        helpful += bool(ids)
        if first := index.search(query, open_ended, 1, encoder):
            scored.append((first[0].score, first[0].skill.id in ids))
    best, threshold = -1.0, chosen.threshold
    for cut in sorted({math.floor(1e4 * score) / 1e4 for score, _ in scored}):  # not above the score itself
        shown = [right for score, right in scored if score >= cut]
        precision, recall = sum(shown) / len(shown), sum(shown) / max(1, helpful)
        value = (1 + beta**2) * precision * recall / max(1e-9, beta**2 * precision + recall)
        if value >= best and value > 0:
            best, threshold = value, cut
    return replace(chosen, threshold=threshold)


# ------------------------------------------------------------------------------------------------------------------ features


@lru_cache(maxsize=200_000)
def _word_features(word: str) -> tuple[int, ...]:
    marked = f"^{word}$"
    grams = [marked[i : i + 3] for i in range(len(marked) - 2)]
    return tuple(zlib.crc32(g.encode()) % BUCKETS for g in (f"w:{word}", *grams))


def _features(text: str) -> NDArray[np.int64]:
    """Sorted buckets of the words and letter trigrams of a text."""
    return np.array(sorted({f for word in words(text) for f in _word_features(word)}), np.int64)


def _subword(texts: Sequence[str]) -> NDArray[np.float32]:
    """(n, DIMENSIONS): every feature gives a fixed random sign to a few dimensions (a sparse random projection)."""
    return _project([_features(text) for text in texts])


def _project(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    if not rows:
        return np.zeros((0, DIMENSIONS), np.float32)
    place = np.repeat(np.arange(len(rows), dtype=np.int64), [len(r) for r in rows]) * DIMENSIONS
    mixed = np.concatenate(rows).astype(np.uint64)
    out = np.zeros(len(rows) * DIMENSIONS)
    for _ in range(4):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)  # wraps: a linear congruence
        high = mixed >> np.uint64(33)
        sign = np.where((high >> np.uint64(20)) & np.uint64(1), 1.0, -1.0)
        out += np.bincount(place + (high % np.uint64(DIMENSIONS)).astype(np.int64), sign, minlength=len(out))
    return out.reshape(len(rows), DIMENSIONS).astype(np.float32)


def _gap(name: str, value: float, tops: Mapping[str, float], floor: float) -> float:
    """From the best score of those that lead to `name` to that of any other name, which is no higher than `floor` where none was found."""
    return max(value, tops.get(name, -math.inf)) - max((top for other, top in tops.items() if other != name), default=floor)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _counts(skill: Skill) -> bool:
    """Whether retrieval heeds a skill: one in use, or a rival."""
    return skill.status == "accepted" or skill.rival


def _triggers(skill: Skill) -> tuple[str, ...]:
    """The phrases that a skill is found by: its words, else what it says of when it fits."""
    return skill.words or (skill.when,)


def _trust(skill: Skill) -> float:
    """-1..1 from what it did: the mean difference of its trials, shrunk towards 0 by four trials of nothing."""
    audit = skill.audit
    return math.tanh(8 * (audit.gain - audit.drop) / (audit.uses + 4))


def _build(skills: Sequence[Skill], lines: Sequence[int] | None = None) -> tuple[dict[str, NDArray[Any]], list[str]]:
    owner: list[int] = []
    phrases: list[str] = []
    rows: list[NDArray[np.int64]] = []
    for number, skill in enumerate(skills):
        for phrase in dict.fromkeys(" ".join(t.split()) for t in _triggers(skill)):
            features = _features(phrase)
            if len(features):
                owner.append(number)
                phrases.append(phrase)
                rows.append(features)
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    buckets, columns = np.unique(flat, return_inverse=True)
    counts = np.bincount(columns, minlength=len(buckets))
    order = np.argsort(columns, kind="stable")
    vectors = _unit(_project(rows))
    arrays: dict[str, NDArray[Any]] = {
        "owner": np.array(owner, np.int32),
        "row_starts": starts,
        "row_features": columns.astype(np.int32),
        "column_starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "column_rows": np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(starts))[order],
        "buckets": buckets.astype(np.int64),
        "idf": np.log1p(len(rows) / np.maximum(counts, 1)).astype(np.float32),
        "vectors": vectors.astype(np.float16),
        "trust": np.array([_trust(s) for s in skills], np.float32),
        "shown": np.array([s.status == "accepted" for s in skills], np.bool_),
        "line": np.array(lines if lines is not None else range(len(skills)), np.int64),
    }
    return arrays, phrases


def _build_file(path: Path, version: str) -> tuple[dict[str, NDArray[Any]], list[str]]:
    skills = read_skills(path, expected=version)
    data = path.read_bytes()
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    offsets = np.concatenate([[0], ends[:-1] + 1])[1:]  # the first line is the header
    kept = [i for i, skill in enumerate(skills) if _counts(skill)]
    arrays, phrases = _build([skills[i] for i in kept], kept)
    return {**arrays, "offsets": offsets.astype(np.int64)}, phrases


def _save(path: Path, data: Mapping[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, schema=np.array(INDEX_SCHEMA), **data)


def _load(path: Path, version: str) -> tuple[dict[str, NDArray[Any]], list[str]] | None:
    """The kept index, None when there is none, or it is damaged, of another schema or of another version."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if int(stored["schema"]) != INDEX_SCHEMA or stored["version"].tobytes().decode() != version:
                return None
            arrays = {name: stored[name] for name in stored.files if name not in ("schema", "version", "phrases")}
            return arrays, stored["phrases"].tobytes().decode().split("\n")
    except (OSError, ValueError, KeyError, EOFError, zlib.error):
        return None
    except Exception as fault:  # numpy raises zipfile's own kind for a torn file
        if type(fault).__name__ == "BadZipFile":
            return None
        raise


def _is_output(fault: Exception) -> bool:
    from seerseg.errors import OutputError

    return isinstance(fault, OutputError | OSError)
