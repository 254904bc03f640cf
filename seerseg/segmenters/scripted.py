"""The public double of the segmenter seam: answers text from a table, edits masks by boxes and points, and records what it was asked.

It is a real segmenter: every prompt kind does something definite, so that pipelines, protocols and command lines can be tested
without weights.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import ModelError, SegmenterError, did_you_mean
from seerseg.paths import read_json
from seerseg.prompts import Box2D, Box3D, Point, Prompt, box_voxels
from seerseg.segmenters.base import Capabilities, ModelCard, RefiningSession, Segmentation, answered, refusal
from seerseg.volume import Mask, Volume

Bool = NDArray[np.bool_]
Scripted = Mask | NDArray[Any] | Callable[[Volume, Prompt], "NDArray[Any] | None"]
CLICK_MM = 4.0
_made = itertools.count()


@dataclass(frozen=True, eq=False)
class Call:
    """One `segment` call as it came in."""

    volume_name: str
    volume_hash: str
    prompts: tuple[Prompt, ...]


class ScriptedSegmenter:
    """Text and class names are looked up (case and outer space ignored) in `masks`: name -> Mask, array (Z, Y, X), or callable(volume,
    prompt) -> array or None (None: not in this scan). A prompt without words starts from its mask, else from nothing.

    Then the boxes and points act: with words or a mask, voxels outside all boxes are cleared; without, the boxes themselves are
    filled (a Box2D on its slice alone); each positive click adds and each negative one removes a ball of CLICK_MM, at least one voxel.
    `on_spatial(volume, prompt) -> array or None` replaces that rule for prompts without words. `presence`: name -> score 0..1.
    `identity` must change when a callable's answers do; it defaults to one of the masks' bits and, with callables, of this object.
    Callables see the volume they get; do not put a CachedSegmenter before one that answers by anything but content and prompt.
    """

    def __init__(
        self,
        masks: Mapping[str, Scripted],
        *,
        presence: Mapping[str, float] | None = None,
        on_spatial: Callable[[Volume, Prompt], NDArray[Any] | None] | None = None,
        identity: str | None = None,
    ) -> None:
        self._names = tuple(masks)
        self._masks = {_fold(name): mask for name, mask in masks.items()}
        self._presence = {_fold(name): float(score) for name, score in (presence or {}).items()}
        self._on_spatial = on_spatial
        self._identity = identity or _identity(self._masks, self._presence, on_spatial)
        self.calls: list[Call] = []

    @property
    def capabilities(self) -> Capabilities:
        """A closed vocabulary and every spatial kind."""
        return Capabilities(
            text="closed" if self._names else "none",
            vocabulary=self._names,
            box2d=True,
            box3d=True,
            points=True,
            previous_mask=True,
            session=True,
            presence=bool(self._presence),
        )

    @property
    def card(self) -> ModelCard:
        """Named "scripted"."""
        return ModelCard("scripted", self._identity, "Apache-2.0", "none", notes="A double for tests: it looks at no voxel.")

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, by the rules of the class; unknown words are "unsupported" with the nearest known names."""
        self.calls.append(Call(volume.name, volume.content_hash, tuple(prompts)))
        return [self._answer(volume, prompt) for prompt in prompts]

    def session(self, volume: Volume) -> RefiningSession:
        """A session whose prompts edit one mask in turn."""
        return RefiningSession(self, volume, words_start_anew=True)

    def _answer(self, volume: Volume, prompt: Prompt) -> Segmentation:
        start = time.perf_counter()
        refused = refusal(self.card.name, self.capabilities, volume, prompt)
        if refused is not None:
            return refused
        words = _words(prompt)
        presence: float | None = None
        if words is not None:
            key = _fold(words)
            if key not in self._masks:
                return self._unknown(prompt, words)
            presence = self._presence.get(key)
            array = self._drawn(volume, prompt, self._masks[key], words)
            array = edit(array, volume, prompt, started=True)
        elif self._on_spatial is not None:
            array = self._drawn(volume, prompt, self._on_spatial, "")
        else:
            array = np.zeros(volume.grid.shape_zyx, dtype=np.bool_) if prompt.mask is None else prompt.mask.array.copy()
            array = edit(array, volume, prompt, started=prompt.mask is not None)
        return answered(volume, prompt, array, presence=presence, seconds=time.perf_counter() - start)

    def _drawn(self, volume: Volume, prompt: Prompt, scripted: Scripted, name: str) -> Bool:
        shape = volume.grid.shape_zyx
        if isinstance(scripted, Mask):
            if not scripted.grid.close_to(volume.grid):
                raise SegmenterError(f"The scripted mask of {name!r} lies on another grid than the scan {volume.name!r}.")
            return scripted.array.copy()
        array = scripted(volume, prompt) if callable(scripted) else scripted
        if array is None:
            return np.zeros(shape, dtype=np.bool_)
        if array.shape != shape:
            raise SegmenterError(f"The scripted mask of {name!r} has shape {array.shape}, but the scan has {shape}.")
        return np.array(array, dtype=np.bool_)

    def _unknown(self, prompt: Prompt, words: str) -> Segmentation:
        import difflib

        near = difflib.get_close_matches(_fold(words), list(self._masks), n=3, cutoff=0.4)
        nearest = tuple(name for name in self._names if _fold(name) in near) or self._names[:3]
        message = f"The script has no answer to {words!r}.{did_you_mean(words, self._names)}"
        return Segmentation(prompt, "unsupported", message=message, nearest=nearest)


def edit(array: Bool, volume: Volume, prompt: Prompt, *, started: bool) -> Bool:
    """The array (Z, Y, X) after the prompt's boxes (`started`: clear what is outside all of them, else fill them) and clicks.

    The given array may be changed."""
    shape = volume.grid.shape_zyx
    if prompt.boxes:
        inside = np.zeros(shape, dtype=np.bool_)
        for box in prompt.boxes:
            inside[_box_slices(box, shape, whole=started)] = True
        array = array & inside if started else array | inside
    for point in prompt.points:
        _click(array, volume, point)
    return array


def _box_slices(box: Box2D | Box3D, shape: tuple[int, int, int], *, whole: bool) -> tuple[slice, ...]:
    """The voxels of the box; a Box2D spans its whole axis when it clears (`whole`), else its slice."""
    if isinstance(box, Box3D):
        return box_voxels(box.lo, box.hi, shape)
    edges = list(box_voxels(box.lo, box.hi, [n for axis, n in enumerate(shape) if axis != box.axis]))
    edges.insert(box.axis, slice(0, shape[box.axis]) if whole else slice(box.index, box.index + 1))
    return tuple(edges)


def _click(array: Bool, volume: Volume, point: Point) -> None:
    """Add or remove the ball of CLICK_MM around the click, at least the voxel that it is in."""
    spacing = volume.grid.spacing_zyx
    centre = [min(n - 1, max(0, round(v))) for v, n in zip(point.zyx, array.shape, strict=True)]
    reach = [int(CLICK_MM // s) for s in spacing]
    window = tuple(slice(max(0, c - r), min(n, c + r + 1)) for c, r, n in zip(centre, reach, array.shape, strict=True))
    offsets = np.ogrid[window]
    square = sum(((o - c) * s) ** 2 for o, c, s in zip(offsets, centre, spacing, strict=True))
    array[window][square <= CLICK_MM**2] = point.positive


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()


def _words(prompt: Prompt) -> str | None:
    if prompt.text is not None and prompt.text.strip():
        return prompt.text
    return prompt.class_name or None


def _identity(masks: Mapping[str, Scripted], presence: Mapping[str, float], on_spatial: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, mask in sorted(masks.items(), key=lambda item: item[0]):
        array = mask.array if isinstance(mask, Mask) else mask
        digest.update(name.encode())
        digest.update(f"object {next(_made)}".encode() if callable(array) else np.packbits(np.asarray(array, dtype=np.bool_)).tobytes())
    digest.update(repr(sorted(presence.items())).encode())
    if on_spatial is not None:
        digest.update(f"object {next(_made)}".encode())
    return f"scripted-{digest.hexdigest()}"


# ------------------------------------------------------------------------------------------------------------ from a file


@dataclass(frozen=True)
class _ScriptedCase:
    labels: Path
    values: dict[str, tuple[int, ...]]

    def draw(self, volume: Volume, name: str) -> Bool | None:
        from seerseg.volume import read_labels

        values = self.values.get(_fold(name))
        if values is None:
            return None
        labels, _ = read_labels(self.labels, like=volume.grid)
        return np.isin(labels, values)


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> ScriptedSegmenter:
    """A ScriptedSegmenter from a JSON file, or from a folder with one as config.json:

    {"kind": "scripted_segmenter", "names": {NAME: VALUE or [VALUES]}, "presence": {NAME: 0..1},
     "cases": {CASE: LABEL_MAP or {"labels": LABEL_MAP, "names": {...}}}}

    Label maps lie relative to the file. CASE is `Volume.name`; "*" stands for every other case. A name that a case does not list is
    not in that scan. `device`, `dtype` and `offline` change nothing. Raises ModelError for a file of another form.
    """
    del device, dtype, offline
    if source is None:
        raise ModelError("The scripted segmenter needs its script: write scripted:FILE.json.")
    path = Path(source).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"The script {path} of the scripted segmenter does not exist.")
    data = read_json(path, ModelError)
    try:
        shared = _values(data.get("names", {}))
        cases = {name: _case(path.parent, entry, shared) for name, entry in data["cases"].items()}
        presence = {str(name): float(score) for name, score in data.get("presence", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise ModelError(
            f"The script {path} of the scripted segmenter has another form than it must ({type(fault).__name__}: {fault})."
        ) from fault
    names: dict[str, str] = {}
    for block in [data.get("names", {}), *[entry.get("names", {}) for entry in data["cases"].values() if isinstance(entry, dict)]]:
        for name in block:
            names.setdefault(_fold(name), name)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8)
    for case in cases.values():
        if not case.labels.is_file():
            raise ModelError(f"The script {path} names the label map {case.labels}, which does not exist.")
        digest.update(case.labels.read_bytes())

    def answer(name: str) -> Callable[[Volume, Prompt], Bool | None]:
        def draw(volume: Volume, prompt: Prompt) -> Bool | None:
            case = cases.get(volume.name) or cases.get("*")
            if case is None:
                raise SegmenterError(f"The script {path} has no case {volume.name!r}.{did_you_mean(volume.name, cases)}")
            return case.draw(volume, name)

        return draw

    return ScriptedSegmenter({name: answer(name) for name in names.values()}, presence=presence, identity=f"scripted-{digest.hexdigest()}")


def _case(folder: Path, entry: Any, shared: dict[str, tuple[int, ...]]) -> _ScriptedCase:
    if isinstance(entry, str):
        return _ScriptedCase(folder / entry, shared)
    return _ScriptedCase(folder / entry["labels"], _values(entry["names"]) if "names" in entry else shared)


def _values(names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {_fold(name): tuple(int(v) for v in (value if isinstance(value, list) else [value])) for name, value in names.items()}
