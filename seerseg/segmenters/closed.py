"""What segmenters with a fixed list of classes share: their names in our words, options after a folder, masks out of a label map.

An inference is not repeated while the same volume is asked about: its label maps are kept until another volume comes.
"""

from __future__ import annotations

import difflib
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import SegmenterError, UsageError, did_you_mean
from seerseg.prompts import Prompt
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, Session, answered, refusal
from seerseg.vocabulary import Entry, LabelDescription, Vocabulary, words
from seerseg.volume import Volume

KEPT_MAPS = 8
"""Label maps of the last volume that are kept; one is enough where a model draws all its classes at once."""
_TRUE, _FALSE = ("on", "true", "yes", "1"), ("off", "false", "no", "0")


def switch(value: str) -> bool:
    """ "on" or "off" (also true, false, yes, no, 1, 0); ValueError otherwise."""
    folded = value.casefold()
    if folded not in (*_TRUE, *_FALSE):
        raise ValueError("write on or off")
    return folded in _TRUE


def window_step(value: str) -> float:
    """How far a sliding window moves, in windows: above 0 and up to 1; ValueError otherwise."""
    step = float(value)
    if not 0 < step <= 1:
        raise ValueError("write a number above 0 and up to 1")
    return step


def split_source(source: str, readers: Mapping[str, Callable[[str], Any]], what: str) -> tuple[str, dict[str, Any]]:
    """ "FOLDER?name=value&name=value" as the folder and the read values; UsageError for a name or value that `readers` do not take.

    A reader turns a text into a value and raises ValueError, saying what it takes, when it cannot.
    """
    place, mark, rest = source.partition("?")
    values: dict[str, Any] = {}
    for item in filter(None, rest.split("&")) if mark else ():
        name, equals, value = item.partition("=")
        if name not in readers or not equals:
            raise UsageError(
                f"{what} has no option {item!r}.{did_you_mean(name, readers)} Options follow the source as "
                f"?name=value&name=value; they are: {', '.join(readers)}."
            )
        try:
            values[name] = readers[name](value.strip())
        except ValueError as fault:
            raise UsageError(f"The option {name} of {what} cannot be {value!r}: {fault}.") from None
    return place, values


@dataclass(frozen=True, eq=False)
class ClassNames:
    """Canonical name -> the classes, in the model's own spelling, whose union it is.

    single: one class each, in the model's order; unions: further names that several classes together answer. A pair whose two
    sides are names here ("lungs") needs no entry: `find` answers it by its members.
    """

    single: Mapping[str, tuple[str, ...]]
    unions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    descriptions: Mapping[str, LabelDescription] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        labels: Iterable[str],
        *,
        descriptions: Mapping[str, LabelDescription] | None = None,
        unions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> ClassNames:
        """Names for a model's labels. A label goes by its description, else by the one structure of the vocabulary that it can mean,
        else (unknown, ambiguous, or two labels meaning one thing) by its own spelling."""
        labels, described = list(labels), dict(descriptions or {})
        vocabulary = Vocabulary.load().only(("train",))
        meant = {label: described[label].canonical if label in described else _meaning(label, vocabulary) or label for label in labels}
        counted = list(meant.values())
        single = {name if counted.count(name) == 1 else label: (label,) for label, name in meant.items()}
        return cls(single, {name: parts for name, parts in (unions or {}).items() if name not in single}, described)

    @property
    def names(self) -> tuple[str, ...]:
        """Single classes, then unions."""
        return (*self.single, *self.unions)

    @cached_property
    def _spellings(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for name, parts in (*self.single.items(), *self.unions.items()):
            own = parts if name in self.single else ()
            said = [name, *own, *(s for label in own if label in self.descriptions for s in self.descriptions[label].synonyms)]
            for text in said:
                found.setdefault(" ".join(words(text)), (name, parts))
        return found

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.load().only(("train",)).extend(self.descriptions)

    def find(self, text: str) -> tuple[str, tuple[str, ...]] | None:
        """The name that a text means and the classes that make it up; None when it is unknown or could mean two of them.

        "kidney" without a side is the pair; with one kidney alone among the classes it is not answered.
        """
        spelt = self._spellings.get(" ".join(words(text)))
        if spelt is not None:
            return spelt
        answers = [answer for entry in self._vocabulary.meanings(text) if (answer := self._answer(entry)) is not None]
        return answers[0] if len(answers) == 1 else None

    def _answer(self, entry: Entry) -> tuple[str, tuple[str, ...]] | None:
        spelt = self._spellings.get(" ".join(words(entry.name)))
        if spelt is not None:
            return spelt
        parts = [self._spellings.get(" ".join(words(member))) for member in entry.members]
        if not parts or None in parts:
            return None
        return entry.name, tuple(dict.fromkeys(label for part in parts if part is not None for label in part[1]))

    def nearest(self, text: str, count: int = 3) -> tuple[str, ...]:
        """Names to offer instead: those of the same structure, then those spelt most like it."""
        bases = {entry.base for entry in self._vocabulary.meanings(text)}
        alike = [name for name in self.names if name in self._vocabulary and self._vocabulary[name].base in bases]
        spelt = difflib.get_close_matches(text.casefold(), [name.casefold() for name in self.names], n=count, cutoff=0.0)
        back = {name.casefold(): name for name in self.names}
        return tuple(dict.fromkeys([*alike, *(back[name] for name in spelt)]))[:count]


def _meaning(label: str, vocabulary: Vocabulary) -> str | None:
    found = vocabulary.lookup(label)
    if not found or found[0].surface.kind == "lay":
        return None
    meant = vocabulary.meanings(label)
    return meant[0].name if len(meant) == 1 else None


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Label values (Z, Y, X) on a volume's grid, and the values that each class of the model has in it."""

    array: NDArray[Any]
    values: Mapping[str, tuple[int, ...]]

    def mask(self, classes: Iterable[str]) -> NDArray[np.bool_]:
        """Where any of the classes is."""
        wanted = sorted({value for name in classes for value in self.values[name]})
        if len(wanted) == 1:
            return np.asarray(self.array == wanted[0])
        table = np.zeros(int(max(*wanted, int(self.array.max(initial=0)))) + 1, dtype=np.bool_)
        table[wanted] = True
        return np.asarray(table[self.array])


class ClosedSegmenter(ABC):
    """A segmenter that knows a list of classes and draws a group of them, or all, in one inference."""

    def __init__(self, classes: ClassNames, card: ModelCard, *, modalities: tuple[str, ...] = (), channels: int = 1) -> None:
        self.classes = classes
        self._card = card
        self._capabilities = Capabilities(text="closed", vocabulary=classes.names, modalities=modalities, channels=channels)
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple[str, ...], LabelMap] = OrderedDict()
        self._kept_of = ""

    @property
    def capabilities(self) -> Capabilities:
        """Closed text (and class names): the names of `classes`, and pairs of which both sides are among them."""
        return self._capabilities

    @property
    def card(self) -> ModelCard:
        """Where it comes from."""
        return self._card

    @abstractmethod
    def draw(self, volumes: Sequence[Volume], group: tuple[str, ...]) -> LabelMap:
        """The label map of a group of classes, on the grid of the volumes (one per channel)."""

    def group(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """The classes drawn in one inference when these are asked for. It may depend on nothing else, so that an answer is the same
        alone and among others."""
        return tuple(label for own in self.classes.single.values() for label in own)

    def unfit(self, volumes: Sequence[Volume]) -> str | None:
        """Why these volumes cannot be segmented at all, a sentence; None when they can."""
        return None

    def storage(self, volume: Volume) -> str:
        """What of a volume's storage matters beside its content (part of the key under which a label map is kept)."""
        return ""

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order, on `volume.grid`. A model of several channels looks at all of the volume's case."""
        return self.segment_channels(volume.together if self._capabilities.channels > 1 else (volume,), prompts)

    def segment_channels(self, volumes: Sequence[Volume], prompts: Sequence[Prompt]) -> list[Segmentation]:
        """As `segment`, for a case of several channels, given in the model's order and on one grid."""
        started = time.perf_counter()
        first = volumes[0]
        made: dict[int, Segmentation] = {}
        asked: dict[int, tuple[str, tuple[str, ...]]] = {}
        unfit = self.unfit(volumes)
        for index, prompt in enumerate(prompts):
            refused = refusal(self.card.name, self._capabilities, first, prompt)
            text = (prompt.class_name or prompt.text or "").strip()
            if refused is None and not text:
                refused = Segmentation(prompt, "unsupported", message=f"The segmenter {self.card.name} needs words.", nearest=("text",))
            found = self.classes.find(text) if refused is None else None
            if refused is not None:
                made[index] = refused
            elif found is None:
                made[index] = self._unknown(prompt, text)
            elif unfit is not None:
                made[index] = Segmentation(prompt, "unsupported", message=unfit)
            else:
                asked[index] = found
        if asked:
            masks = {index: self._labels(volumes, parts).mask(parts) for index, (_, parts) in asked.items()}
            seconds = (time.perf_counter() - started) / len(asked)
            for index, (name, _) in asked.items():
                drawn = answered(first, prompts[index], masks[index], seconds=seconds)
                made[index] = drawn if drawn.mask is None else replace(drawn, mask=replace(drawn.mask, name=name))
        return [made[index] for index in range(len(prompts))]

    def _unknown(self, prompt: Prompt, text: str) -> Segmentation:
        near = self.classes.nearest(text)
        listed = " or ".join([", ".join(near[:-1]), near[-1]] if len(near) > 1 else near)
        message = f"The segmenter {self.card.name} has no class for {text!r}; the nearest of its {len(self.classes.names)} are {listed}."
        return Segmentation(prompt, "unsupported", message=message, nearest=near)

    def _labels(self, volumes: Sequence[Volume], parts: tuple[str, ...]) -> LabelMap:
        key = "|".join(f"{volume.content_hash} {self.storage(volume)}" for volume in volumes)
        group = self.group(parts)
        with self._lock:
            if self._kept_of != key:
                self._kept.clear()
                self._kept_of = key
            if group not in self._kept:
                while len(self._kept) >= KEPT_MAPS:
                    self._kept.popitem(last=False)
                self._kept[group] = self.draw(volumes, group)
            self._kept.move_to_end(group)
            return self._kept[group]

    def forget(self) -> None:
        """Let the kept label maps go."""
        with self._lock:
            self._kept.clear()
            self._kept_of = ""

    def session(self, volume: Volume) -> Session:
        """Always SegmenterError: there is nothing to refine with."""
        raise SegmenterError(f"The segmenter {self.card.name} takes class names only, so it cannot refine a mask over several turns.")
