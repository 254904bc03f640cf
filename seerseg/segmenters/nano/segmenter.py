"""The nano segmenter behind the seam: text in, mask out, with a presence score; an absent or unknown target is an empty answer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from seerseg.errors import SegmenterError, WeightsError, did_you_mean
from seerseg.prompts import Prompt
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, Session
from seerseg.segmenters.nano.inference import answer
from seerseg.segmenters.nano.network import NanoConfig, NanoNetwork, normalise
from seerseg.volume import Mask, Volume

SHIPPED = Path(__file__).resolve().parents[2] / "weights" / "nano_segmenter"
PRESENCE_THRESHOLD = 0.5
FINE_SHARE = 0.5
_SCHEMA = 1
_REVISION = 3  # part of the identity: raise it whenever inference draws other masks from the same weights


class NanoSegmenter:
    """Text prompts on a CT or MR volume. Deterministic on one device; each text is answered as if it were alone."""

    def __init__(
        self, network: NanoNetwork, vocabulary: dict[str, dict[str, Any]], identity: str = "untrained", device: str = "cpu"
    ) -> None:
        self._network = network.eval().to(torch.device(device)).to(memory_format=torch.channels_last_3d)
        self.vocabulary = vocabulary
        self._card = ModelCard(
            name="nano",
            identity=identity,
            code_licence="Apache-2.0",
            weights_licence="CC-BY-SA-4.0",
            source="shipped with seerseg",
            notes="Small, trained on few scans and phantoms, partly with automatic labels. Not for clinical use. See MODEL_CARD.md.",
        )
        self._capabilities = Capabilities(text="open", vocabulary=tuple(vocabulary), presence=True, modalities=("CT", "MR"))

    @classmethod
    def load(cls, *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None) -> NanoSegmenter:
        """From a folder with model.safetensors and config.json; None: the shipped weights. Weights are used in float32."""
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
        return cls(network, config["vocabulary"], identity=f"nano-{digest}", device=device)

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
        started = time.perf_counter()
        out: dict[int, Segmentation] = {}
        asked: list[tuple[int, str]] = []
        for index, prompt in enumerate(prompts):
            text = (prompt.text or "").strip() or (prompt.class_name or "").strip()
            missing = self._capabilities.missing(prompt)
            if missing:
                message = f"The nano segmenter takes text only, no {' or '.join(missing)}."
                out[index] = Segmentation(prompt, "unsupported", message=message, nearest=("text",))
            elif not normalise(text):
                message = "The nano segmenter needs words (letters or digits) that name one structure."
                out[index] = Segmentation(prompt, "unsupported", message=message, nearest=("text",))
            else:
                asked.append((index, text))
        if min(volume.grid.shape_zyx) < 2 and asked:
            for index, _ in asked:
                out[index] = Segmentation(prompts[index], "unsupported", message="The nano segmenter needs a volume, not a single slice.")
            asked = []
        answers = (
            answer(self._network, volume, [text for _, text in asked], threshold=PRESENCE_THRESHOLD, blend=FINE_SHARE) if asked else []
        )
        seconds = (time.perf_counter() - started) / max(1, len(asked))
        empty = np.zeros(volume.grid.shape_zyx, dtype=np.bool_)
        for (index, text), found in zip(asked, answers, strict=True):
            prompt = prompts[index]
            if found.mask is None:
                known = normalise(text) in self.vocabulary
                message = f"Nothing that looks like {text!r} was found (presence {found.presence:.2f})." + (
                    "" if known else did_you_mean(normalise(text), self.vocabulary)
                )
                out[index] = Segmentation(
                    prompt, "empty", Mask(empty.copy(), volume.grid, text), found.presence, message, self.nearest(text), seconds
                )
            else:
                out[index] = Segmentation(prompt, "ok", Mask(found.mask, volume.grid, text), found.presence, seconds=seconds)
        return [out[index] for index in range(len(prompts))]

    def session(self, volume: Volume) -> Session:
        """Always SegmenterError: there is nothing to refine with."""
        raise SegmenterError("The nano segmenter takes text only, so it cannot refine a mask over several turns.")

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
