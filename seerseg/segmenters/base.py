"""The segmenter seam: a frozen model that turns prompts into masks on the volume's own grid.

An implementation is a class with the attributes and methods of `Segmenter` and one entry-point line in the group
`seerseg.segmenters` (name -> "module:factory"). A factory has the signature of `SegmenterFactory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from seerseg.errors import ModelError, SegmenterError
from seerseg.prompts import Prompt
from seerseg.volume import Mask, Volume

Status = Literal["ok", "empty", "unsupported"]


@dataclass(frozen=True)
class Capabilities:
    """What a segmenter can be asked for.

    text: "none", "closed" (only names of its vocabulary) or "open"; vocabulary: canonical names it is known to handle, in
    its own spelling (empty when open and unlisted); presence: it scores whether the target is in the scan at all;
    probabilities: it can give them; session: `session()` refines a mask over several turns; modalities: those it was made
    for, empty when any; channels: how many channels of a case it looks at together (`Volume.together`).
    """

    text: Literal["none", "closed", "open"] = "none"
    vocabulary: tuple[str, ...] = ()
    box2d: bool = False
    box3d: bool = False
    points: bool = False
    previous_mask: bool = False
    session: bool = False
    presence: bool = False
    probabilities: bool = False
    modalities: tuple[str, ...] = ()
    channels: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The prompt kinds that this segmenter can take (see `Prompt.kinds`)."""
        able = {
            "text": self.text != "none",
            "class": self.text != "none",
            "box2d": self.box2d,
            "box3d": self.box3d,
            "points": self.points,
            "mask": self.previous_mask,
        }
        return tuple(kind for kind, can in able.items() if can)

    def missing(self, prompt: Prompt) -> tuple[str, ...]:
        """The kinds used by the prompt that this segmenter cannot take, sorted."""
        return tuple(sorted(prompt.kinds.difference(self.kinds)))


@dataclass(frozen=True)
class ModelCard:
    """Where a segmenter comes from. `identity` changes whenever its masks could (weights' hash, version)."""

    name: str
    identity: str
    code_licence: str = ""
    weights_licence: str = ""
    source: str = ""
    notes: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What came of one prompt.

    status "ok": `mask` has at least one voxel; "empty": the segmenter looked and found nothing, `mask` is all False;
    "unsupported": it cannot do what was asked, `mask` is None, `message` says why and `nearest` what it could do instead.
    presence: 0..1, how sure it is that the target is in the scan (None when it does not score that).
    """

    prompt: Prompt
    status: Status
    mask: Mask | None = None
    presence: float | None = None
    message: str = ""
    nearest: tuple[str, ...] = ()
    seconds: float = 0.0


KIND_WORDS = {
    "text": "text",
    "class": "class names",
    "box2d": "boxes on a slice",
    "box3d": "3D boxes",
    "points": "points",
    "mask": "a previous mask",
}


def refusal(name: str, capabilities: Capabilities, volume: Volume, prompt: Prompt) -> Segmentation | None:
    """The "unsupported" Segmentation for a prompt that is empty, lies outside the volume, or is of a kind that `capabilities`
    lacks (`nearest` then lists the kinds that it has); None when the prompt can be tried. For implementations to call first."""
    try:
        prompt.check(volume.grid)
    except SegmenterError as fault:
        return Segmentation(prompt, "unsupported", message=str(fault))
    missing = capabilities.missing(prompt)
    if not missing:
        return None
    able = capabilities.kinds
    can = ", ".join(KIND_WORDS[kind] for kind in able) or "nothing"
    message = f"The segmenter {name} cannot take {' or '.join(KIND_WORDS[kind] for kind in missing)}; it takes {can}."
    return Segmentation(prompt, "unsupported", message=message, nearest=able)


def answered(
    volume: Volume, prompt: Prompt, array: Any, *, presence: float | None = None, message: str = "", seconds: float = 0.0
) -> Segmentation:
    """The "ok" or "empty" Segmentation whose mask is the array (Z, Y, X) on the volume's grid, named after the prompt."""
    mask = Mask(np.ascontiguousarray(array, dtype=np.bool_), volume.grid, prompt.text or prompt.class_name or "")
    return Segmentation(prompt, "ok" if mask.array.any() else "empty", mask, presence, message, seconds=seconds)


def check_licence(what: str, licence: str, *, accepted: bool) -> None:
    """ModelError naming the licence, unless it was accepted. For loaders of weights that not everybody may use for everything, to
    call before anything is opened or fetched; acceptance is given anew for every run and kept only in its record."""
    if not accepted:
        raise ModelError(
            f"{what} are under {licence}: read it and, where it allows what you do, accept it for this run with --accept_license "
            "(in Python accept_license=True)."
        )


@runtime_checkable
class Session(Protocol):
    """A segmentation refined over several turns on one volume."""

    def add(self, prompt: Prompt) -> Segmentation:
        """Take further boxes, points or a mask into account and return the new mask."""
        ...

    def undo(self) -> Segmentation | None:
        """Forget the last `add`; the mask before it, None when there is none."""
        ...

    def close(self) -> None:
        """Release what is held for the volume."""
        ...


class Wrapping:
    """A segmenter around another, whose capabilities, card and sessions are its own; what differs is `segment`."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    @property
    def capabilities(self) -> Capabilities:
        """The other's."""
        return self._segmenter.capabilities

    @property
    def card(self) -> ModelCard:
        """The other's."""
        return self._segmenter.card

    def session(self, volume: Volume) -> Session:
        """The other's."""
        return self._segmenter.session(volume)


class RefiningSession:
    """A session for segmenters that take a previous mask: each turn starts from the mask before it. An unsupported turn
    changes nothing. keeps_empty: whether a turn that leaves nothing counts; words_start_anew: whether text or a class name begins
    again from nothing."""

    def __init__(self, segmenter: Segmenter, volume: Volume, *, keeps_empty: bool = True, words_start_anew: bool = False) -> None:
        self._segmenter = segmenter
        self._volume: Volume | None = volume
        self._turns: list[Segmentation] = []
        self._kept: tuple[Status, ...] = ("ok", "empty") if keeps_empty else ("ok",)
        self._words_start_anew = words_start_anew

    def add(self, prompt: Prompt) -> Segmentation:
        """The mask so far with the prompt taken into account; a prompt with a mask starts from that one."""
        if self._volume is None:
            raise SegmenterError("The segmentation session is closed; open a new one.")
        anew = prompt.mask is not None or not prompt.kinds or (self._words_start_anew and prompt.kinds & {"text", "class"})
        if self._turns and not anew:
            prompt = replace(prompt, mask=self._turns[-1].mask)
        made = self._segmenter.segment(self._volume, [prompt])[0]
        if made.status in self._kept:
            self._turns.append(made)
        return made

    def undo(self) -> Segmentation | None:
        """Forget the last turn that was kept."""
        if self._turns:
            self._turns.pop()
        return self._turns[-1] if self._turns else None

    def close(self) -> None:
        """Release the volume."""
        self._volume = None
        self._turns.clear()


@runtime_checkable
class Segmenter(Protocol):
    """A frozen model. Deterministic: the same volume and prompt give the same mask, alone or among others."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can be asked for."""
        ...

    @property
    def card(self) -> ModelCard:
        """Where it comes from."""
        ...

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order, on `volume.grid`. Prompts of one call share the image encoding."""
        ...

    def session(self, volume: Volume) -> Session:
        """SegmenterError when `capabilities.session` is False."""
        ...


class SegmenterFactory(Protocol):
    """Loads a segmenter. `source`: a folder, a file or a hub id, or None for its default; never the network when offline.

    A factory whose weights are under a licence that must be accepted also has `accept_license: bool = False` and calls `check_licence`.
    """

    def __call__(
        self, *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True
    ) -> Segmenter:
        """The loaded segmenter; ModelError or WeightsError when it cannot be."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """How weights are placed: device "cpu", "cuda", "cuda:1" or "mps"; dtype None for the default of that device."""

    device: str = "cpu"
    dtype: str | None = None
    offline: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
