"""The nano segmenter behind the seam: words, boxes, clicks and a mask before in, mask out.

Words come with a presence score; an absent or unknown target is an empty answer. What is not words goes to the click network, which
looks through the same frozen image encoder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from seerseg.errors import SegmenterError, WeightsError, did_you_mean
from seerseg.prompts import Point, Prompt
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, Session, answered
from seerseg.segmenters.nano.clicks import ClickNetwork, encoder_digest, load_clicks
from seerseg.segmenters.nano.inference import PRESENCE_THRESHOLD, answer
from seerseg.segmenters.nano.network import NanoConfig, NanoNetwork, normalise
from seerseg.segmenters.nano.refining import Desk
from seerseg.volume import Mask, Volume

SHIPPED = Path(__file__).resolve().parents[2] / "weights" / "nano_segmenter"
SHIPPED_CLICKS = SHIPPED.with_name("nano_clicks")
FINE_SHARE = 0.5
_SCHEMA = 1
_WORDS = frozenset({"text", "class"})
CLICKS_REVISION = 4
"""Part of the identity: raise it whenever refining draws other masks from the same weights."""
_REVISION = 3  # part of the identity: raise it whenever inference draws other masks from the same weights


class NanoSegmenter:
    """Prompts on a CT or MR volume. Deterministic on one device; each prompt is answered as if it were alone.

    clicks: the network for boxes, clicks and masks; without it words alone are taken. Words that come with a box or clicks are answered
    first, and their mask is refined.
    """

    def __init__(
        self,
        network: NanoNetwork,
        vocabulary: dict[str, dict[str, Any]],
        identity: str = "untrained",
        device: str = "cpu",
        *,
        clicks: ClickNetwork | None = None,
    ) -> None:
        self._network = network.eval().to(torch.device(device)).to(memory_format=torch.channels_last_3d)
        self._clicks = None if clicks is None else clicks.eval().to(torch.device(device)).to(memory_format=torch.channels_last_3d)
        self.vocabulary = vocabulary
        self._card = ModelCard(
            name="nano",
            identity=identity,
            code_licence="Apache-2.0",
            weights_licence="CC-BY-SA-4.0",
            source="shipped with seerseg",
            notes="Small, trained on few scans and phantoms, partly with automatic labels. Not for clinical use. See MODEL_CARD.md.",
        )
        able = clicks is not None
        self._capabilities = Capabilities(
            text="open",
            vocabulary=tuple(vocabulary),
            presence=True,
            modalities=("CT", "MR"),
            box2d=able,
            box3d=able,
            points=able,
            previous_mask=able,
            session=able,
        )

    @classmethod
    def load(cls, *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None) -> NanoSegmenter:
        """From a folder with model.safetensors and config.json; None: the shipped weights. Weights are used in float32.

        The click network is that of the folder's own `nano_clicks`, else the shipped one where it was trained on this image encoder, else
        there is none.
        """
        if dtype not in (None, "auto", "float32"):
            raise SegmenterError(f"The nano segmenter runs in float32, not in {dtype}; leave the dtype out.")
        folder = SHIPPED if source is None else Path(source)
        config = _read_config(folder / "config.json")
        try:
            blob = (folder / "model.safetensors").read_bytes()
        except OSError as fault:
            raise WeightsError(
                f"The weights {folder / 'model.safetensors'} cannot be read ({fault.strerror}); install seerseg again."
            ) from fault
        try:
            tensors = load_tensors(blob)
        except (SafetensorError, ValueError, KeyError) as fault:
            raise WeightsError(f"{folder / 'model.safetensors'} is damaged or not a safetensors file ({fault}); copy it again.") from fault
        try:
            network = NanoNetwork(NanoConfig.from_json(config["network"]))
            network.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=True)
        except (RuntimeError, TypeError, KeyError, ValueError) as fault:
            first = str(fault).strip().splitlines()
            reason = " ".join(line.strip() for line in first[:2])[:300]
            raise WeightsError(
                f"The weights in {folder} do not fit the network that config.json describes ({reason}); copy both files again."
            ) from fault
        if not all(torch.isfinite(p).all() for p in network.parameters()):
            raise WeightsError(f"{folder / 'model.safetensors'} holds values that are not finite; copy it again.")
        digest = hashlib.blake2b(blob + repr((_REVISION, PRESENCE_THRESHOLD, FINE_SHARE)).encode(), digest_size=12).hexdigest()
        encoder = encoder_digest(network)
        found = (load_clicks(folder / "nano_clicks", encoder) if source is not None else None) or load_clicks(SHIPPED_CLICKS, encoder)
        clicks, identity = (None, f"nano-{digest}") if found is None else (found[0], f"nano-{digest}-{found[1]}-{CLICKS_REVISION}")
        return cls(network, config["vocabulary"], identity=identity, device=device, clicks=clicks)

    @property
    def capabilities(self) -> Capabilities:
        """Text of any wording; `vocabulary` lists the names that it was trained on."""
        return self._capabilities

    @property
    def card(self) -> ModelCard:
        """Where it comes from."""
        return self._card

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order, on `volume.grid`. The image is encoded once for all of them."""
        return self._answer(volume, prompts, None)

    def session(self, volume: Volume) -> Session:
        """A session in which boxes, clicks and masks refine the mask before; SegmenterError when there is no click network."""
        if self._clicks is None:
            raise SegmenterError("The nano segmenter takes text only, so it cannot refine a mask over several turns.")
        return _Session(self, volume, Desk(self._network, self._clicks, self._embedded_vocabulary()[1], volume, reuse=True))

    def _answer(self, volume: Volume, prompts: Sequence[Prompt], desk: Desk | None) -> list[Segmentation]:
        out: dict[int, Segmentation] = {}
        asked: list[int] = []
        for index, prompt in enumerate(prompts):
            refused = self._refused(volume, prompt)
            if refused is not None:
                out[index] = refused
            elif normalise(_words(prompt)) and prompt.mask is None and min(volume.grid.shape_zyx) >= 2:
                asked.append(index)
        read = dict(zip(asked, self._read(volume, [prompts[index] for index in asked]), strict=True))
        for index, prompt in enumerate(prompts):
            if index in out:
                continue
            if not prompt.kinds - _WORDS:
                out[index] = read[index]
            elif self._clicks is not None:
                desk = desk or Desk(self._network, self._clicks, self._embedded_vocabulary()[1], volume)
                out[index] = _pointed(volume, prompt, desk, read.get(index))
        return [out[index] for index in range(len(prompts))]

    def _refused(self, volume: Volume, prompt: Prompt) -> Segmentation | None:
        """What cannot be tried, and why; None when it can."""
        missing, words, message = self._capabilities.missing(prompt), normalise(_words(prompt)), ""
        if missing:
            message = f"The nano segmenter takes text only, no {' or '.join(missing)}."
        elif prompt.kinds - _WORDS:
            message = _spatial_fault(volume, prompt, bool(words))
        elif not words:
            message = "The nano segmenter needs words (letters or digits) that name one structure."
            if self._clicks is not None:
                message = message[:-1] + ", a box, a point or a mask."
        elif min(volume.grid.shape_zyx) < 2:
            message = "The nano segmenter needs a volume, not a single slice."
            if self._clicks is not None:
                message = "On a single slice the nano segmenter cannot read words; give it a box, a point or a mask."
        able = self._capabilities.kinds if self._clicks is not None else ("text",)
        return Segmentation(prompt, "unsupported", message=message, nearest=able) if message else None

    def _read(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """The answers to the prompts' words."""
        if not prompts:
            return []
        started = time.perf_counter()
        texts = [_words(prompt) for prompt in prompts]
        answers = answer(self._network, volume, texts, threshold=PRESENCE_THRESHOLD, blend=FINE_SHARE)
        seconds = (time.perf_counter() - started) / len(prompts)
        out = []
        for prompt, text, found in zip(prompts, texts, answers, strict=True):
            if found.mask is None:
                known = normalise(text) in self.vocabulary
                message = f"Nothing that looks like {text!r} was found (presence {found.presence:.2f})." + (
                    "" if known else did_you_mean(normalise(text), self.vocabulary)
                )
                empty = Mask(np.zeros(volume.grid.shape_zyx, dtype=np.bool_), volume.grid, text)
                out.append(Segmentation(prompt, "empty", empty, found.presence, message, self.nearest(text), seconds))
            else:
                out.append(Segmentation(prompt, "ok", Mask(found.mask, volume.grid, text), found.presence, seconds=seconds))
        return out

    def nearest(self, text: str, count: int = 3) -> tuple[str, ...]:
        """The canonical names whose text embeddings are most like that of `text`, best first."""
        names, table = self._embedded_vocabulary()
        with torch.inference_mode():
            query = self._network.text([text])[0]
        order = torch.argsort(table @ query, descending=True, stable=True)
        return tuple(names[int(i)] for i in order[:count])

    @lru_cache(maxsize=1)  # noqa: B019  one table per segmenter, dropped with it when the process ends
    def _embedded_vocabulary(self) -> tuple[tuple[str, ...], torch.Tensor]:
        names = tuple(self.vocabulary)
        with torch.inference_mode():
            return names, self._network.text(names)


class _Session:
    """Boxes, clicks and masks on one volume; all clicks so far, the newest boxes and the mask before count in every turn. Words or a mask
    begin anew. A turn that cannot be done changes nothing."""

    def __init__(self, segmenter: NanoSegmenter, volume: Volume, desk: Desk) -> None:
        self._segmenter = segmenter
        self._volume = volume
        self._desk: Desk | None = desk
        self._turns: list[Segmentation] = []

    def add(self, prompt: Prompt) -> Segmentation:
        """The mask so far with the prompt taken into account; its `prompt` holds all that counted."""
        if self._desk is None:
            raise SegmenterError("The segmentation session is closed; open a new one.")
        if self._turns and prompt.kinds and prompt.mask is None and not prompt.kinds & _WORDS:
            last = self._turns[-1]
            placed = {_voxel(point) for point in prompt.points}  # a later click on the same voxel corrects the earlier one
            points = (*(point for point in last.prompt.points if _voxel(point) not in placed), *prompt.points)
            mask = last.mask if last.mask is not None and last.mask.array.any() else None
            words = _words(last.prompt) if self._desk.hears(_words(last.prompt), mask) else None
            prompt = Prompt(text=words, boxes=prompt.boxes or last.prompt.boxes, points=points, mask=mask)
        found = self._segmenter._answer(self._volume, [prompt], self._desk)[0]
        if found.status != "unsupported":
            self._turns.append(found)
        return found

    def undo(self) -> Segmentation | None:
        """Forget the last turn."""
        if self._turns:
            self._turns.pop()
        return self._turns[-1] if self._turns else None

    def close(self) -> None:
        """Release the encoded image and the masks."""
        self._desk = None
        self._turns.clear()


def _voxel(point: Point) -> tuple[int, ...]:
    return tuple(int(np.floor(v + 0.5)) for v in point.zyx)


def _words(prompt: Prompt) -> str:
    return (prompt.text or "").strip() or (prompt.class_name or "").strip()


def _spatial_fault(volume: Volume, prompt: Prompt, words: bool) -> str:
    """Why boxes, points and mask cannot be used; "" when they can."""
    try:
        prompt.check(volume.grid)
    except SegmenterError as fault:
        return str(fault)
    drawn = prompt.mask is not None and bool(prompt.mask.array.any())
    if prompt.boxes or drawn or words or any(point.positive for point in prompt.points):
        return ""
    if prompt.points:
        return "Negative points alone do not say where the target is: add a positive point, a box, a mask or words."
    return "The previous mask is empty: give a mask with voxels, a box, a point or words."


def _pointed(volume: Volume, prompt: Prompt, desk: Desk, read: Segmentation | None) -> Segmentation:
    """The answer to a prompt that points. read: the answer to its words, whose mask is the one before when they found something."""
    started = time.perf_counter()
    asked, presence, message = prompt, None, ""
    if read is not None:
        presence = read.presence
        if read.status == "ok":
            asked = replace(prompt, mask=read.mask)
        else:
            message = f"{read.message} The mask is drawn from the other prompts alone."
    elif _words(prompt) and not desk.hears(_words(prompt), prompt.mask):
        message = "The words were not read: " + ("a mask came with them." if prompt.mask is not None else "the scan is a single slice.")
    drawn = asked.mask is not None and bool(asked.mask.array.any())
    if not (asked.boxes or drawn or any(point.positive for point in asked.points)):
        empty = np.zeros(volume.grid.shape_zyx, dtype=np.bool_)
        return answered(volume, prompt, empty, presence=presence, message=read.message if read is not None else message)
    mask = desk.draw(asked, _words(prompt))
    message = message or ("" if mask.any() else "Nothing was drawn there: give a box, or another point.")
    seconds = time.perf_counter() - started + (read.seconds if read is not None else 0.0)
    return answered(volume, prompt, mask, presence=presence, message=message, seconds=seconds)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise WeightsError(f"{path} cannot be read ({fault.strerror}); it must lie beside model.safetensors.") from fault
    except ValueError as fault:
        raise WeightsError(f"{path} is not valid JSON ({fault}); copy it again.") from fault
    if not isinstance(config, dict) or config.get("schema") != _SCHEMA:
        raise WeightsError(f"{path} is of another version than this seerseg reads (schema {_SCHEMA}); install matching weights.")
    for key in ("network", "vocabulary"):
        if not isinstance(config.get(key), dict):
            raise WeightsError(f"{path} lacks {key!r}; copy it again.")
    return config
