"""`voxtell`: VoxTell, free text to masks, from its published folder or hub id, through the PyPI package `voxtell`.

    FOLDER/plans.json fold_0/checkpoint_final.pth [text_embeddings.npz]

`voxtell:FOLDER`, `voxtell:ORG/NAME[/MODEL]`, or bare: the folder that VOXTELL_MODEL names, else mrokuss/VoxTell's in the hub's local cache.
Options follow as ?name=value&name=value: bank (an embedding bank, FILE.npz, or off), encoder (folder or hub id of the text encoder, or
off), step (of the tiles, above 0 to 1).

A prompt that the bank lists is taken from it; only another one makes the text encoder load. Where there is no encoder the bank is all
that can be asked for. What the bank lists is offered as vocabulary; of a large one (the published one has 14,194 texts) the structures of
our own vocabulary alone, since a reasoner has to read them. Any text of it can be asked for all the same.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError
from seerseg.paths import read_json
from seerseg.prompts import Prompt
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, Session, answered, check_licence, refusal
from seerseg.segmenters.checkpoints import finite, network_weights, open_checkpoint
from seerseg.segmenters.closed import ClassNames, split_source, window_step
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Volume

HUB, HUB_MODEL, HUB_ENCODER = "mrokuss/VoxTell", "voxtell_v1.1", "Qwen/Qwen3-Embedding-4B"
CHECKPOINT = Path("fold_0", "checkpoint_final.pth")
BANK = "text_embeddings.npz"
LICENCE = "a non-commercial licence (CC BY-NC-SA 4.0 as far as we know; the model card at mrokuss/VoxTell says what holds)"
INSTALL = (
    'pip install "seerseg[voxtell]" && pip install --no-deps voxtell nnunetv2 dynamic-network-architectures acvl-utils batchgenerators'
)
OFFERED = 400
"""A bank of more texts than these offers the structures of our vocabulary alone."""
SUMS_BYTES = 4 * 2**30
"""Sums of tiles held at once: so many prompts as fit share one pass over the scan, at least one."""
REMEMBERED = 4096
"""Embeddings of free prompts that are kept (10 kB each at the published size)."""
_REVISION = 1  # part of the identity: raise it whenever the same weights would draw other masks
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ENCODER_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_OF_VOXTELL = ("voxtell.model.voxtell_model", "voxtell.utils.text_embedding")
_ON_HOST = "The accelerator's memory did not hold the sums of this scan's tiles; they were kept in main memory, which is slower."


@dataclass(frozen=True)
class VoxTellOptions:
    """bank, encoder: a place, "off", or None for what is found; step: of the tiles, as a share of their size."""

    bank: str | None = None
    encoder: str | None = None
    step: float = 0.5


@dataclass(frozen=True, eq=False)
class Bank:
    """Texts, lower-cased, and their embeddings (N, size) in half precision."""

    labels: tuple[str, ...]
    embeddings: NDArray[np.float16]

    @classmethod
    def read(cls, path: Path) -> Bank:
        """From VoxTell's .npz: "labels" (text) and "embeddings" (float16). WeightsError where it is none; nothing is unpickled."""
        try:
            with np.load(path, allow_pickle=False) as held:
                labels, embeddings = held["labels"], np.asarray(held["embeddings"], dtype=np.float16)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as fault:
            raise WeightsError(f"{path} is no embedding bank of VoxTell ({str(fault).strip('. ') or type(fault).__name__}).") from fault
        if labels.dtype.kind not in "US" or labels.ndim != 1 or embeddings.ndim != 2 or len(labels) != len(embeddings) or not len(labels):
            raise WeightsError(f"{path} is no embedding bank: labels {labels.shape} of {labels.dtype}, embeddings {embeddings.shape}.")
        if not np.isfinite(embeddings).all():
            raise WeightsError(f"{path} holds embeddings that are not finite; copy it again.")
        last = {str(label).lower(): row for row, label in enumerate(labels)}  # VoxTell's own rule where two are alike
        return cls(tuple(last), np.ascontiguousarray(embeddings[list(last.values())]))

    @property
    def identity(self) -> str:
        """Digest of texts and numbers."""
        digest = hashlib.blake2b(json.dumps(self.labels).encode(), digest_size=8)
        digest.update(self.embeddings.tobytes())
        return digest.hexdigest()

    def names(self) -> ClassNames:
        """Those that are offered: all of a small bank; of a large one, one text for each structure of our vocabulary that it has."""
        if len(self.labels) <= OFFERED:
            return ClassNames.of(self.labels)
        listed, single = set(self.labels), {}
        for entry in Vocabulary.load():
            own = (text.lower() for text in entry.texts(kinds=("name", "synonym")))
            found = next((text for text in own if text in listed), None)
            if found is not None:
                single[entry.name] = (found,)
        return ClassNames(single)


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, accept_license: bool = False
) -> VoxTellSegmenter:
    """VoxTell of a folder or hub id. ModelError where the licence of its weights is not accepted or the folder is another model's,
    WeightsError for what is missing or damaged, MissingExtraError without the package, UsageError for options."""
    if dtype not in (None, "auto", "float32"):
        raise UsageError(f"VoxTell keeps its weights in float32 (half precision on a GPU by itself), not in {dtype}; leave the dtype out.")
    place, given = split_source(str(source or ""), {"bank": str, "encoder": str, "step": window_step}, "the segmenter voxtell")
    check_licence("VoxTell's weights", LICENCE, accepted=accept_license)
    options = VoxTellOptions(**given)
    where = place or os.environ.get("VOXTELL_MODEL") or HUB
    folder = find_folder(where, offline=offline)
    _require_voxtell()
    bank = _find_bank(folder, where, options, offline=offline)
    encoder = _find_encoder(folder, options, offline=offline)
    if bank is None and encoder is None:
        raise WeightsError(
            f"For VoxTell in {folder} there is neither an embedding bank ({BANK} beside its plans.json, or ?bank=FILE.npz) nor a text "
            f"encoder (?encoder=FOLDER, or {HUB_ENCODER} in the hub's cache), so nothing can be asked of it."
        )
    return VoxTellSegmenter(folder, bank=bank, encoder=encoder, options=options, device=device)


class VoxTellSegmenter:
    """VoxTell behind the seam. Deterministic on one device: a mask is that of VoxTell's own command for the same text, asked alone.

    encoder: a folder, or a function that fetches one when it is first needed. Several prompts share one pass over the scan. Held for a
    scan: its voxels in float32, one byte per voxel and mask, and the sums of tiles (two bytes per voxel and prompt of a slab as high as
    a tile), of which no more than `sums_bytes` at once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bank: Bank | None,
        encoder: Path | Callable[[], Path] | None,
        options: VoxTellOptions | None = None,
        device: str = "cpu",
        sums_bytes: int = SUMS_BYTES,
    ) -> None:
        from seerseg.segmenters.voxtell_network import build_network

        self.folder, self.options, self.sums_bytes = folder, options or VoxTellOptions(), sums_bytes
        self._device = _device(device)
        plans = read_json(folder / "plans.json", ModelError)
        held = open_checkpoint(folder / CHECKPOINT, "VoxTell's")
        weights = network_weights(held, folder / CHECKPOINT, "copy it again")
        network, self._sizes = build_network(plans if isinstance(plans, dict) else {}, weights, folder)
        if bank is not None and bank.embeddings.shape[1] != self._sizes.text:
            raise WeightsError(
                f"The embedding bank of VoxTell in {folder} has {bank.embeddings.shape[1]} numbers per text, and the weights take "
                f"{self._sizes.text}; it belongs to another version of the model."
            )
        self._bank, self._rows = bank, {} if bank is None else {label: row for row, label in enumerate(bank.labels)}
        self._encoder_place = encoder
        self._encoder: Any = None
        self._remembered: dict[str, Any] = {}
        self.names = bank.names() if bank is not None else ClassNames({})
        self._lock = threading.RLock()
        self._card = ModelCard(
            name="voxtell",
            identity=_identity(plans, weights, self.options.step, bank, encoder),
            code_licence="Apache-2.0",
            weights_licence=LICENCE,
            source=str(folder),
            notes=f"{len(self._rows)} texts in its embedding bank, {'no' if encoder is None else 'a'} text encoder.",
        )
        self._network: Any = network.to(self._device)

    @property
    def capabilities(self) -> Capabilities:
        """Text: open with a text encoder or a bank too large to be offered, else the names of the bank."""
        known = self.names.names
        return Capabilities(
            text="closed" if self._encoder_place is None and len(self._rows) <= OFFERED else "open", vocabulary=known, probabilities=True
        )

    @property
    def card(self) -> ModelCard:
        """Where it comes from."""
        return self._card

    @property
    def encoder_loaded(self) -> bool:
        """Whether the text encoder was needed and takes memory."""
        return self._encoder is not None and self._encoder.loaded

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order, on `volume.grid`."""
        started = time.perf_counter()
        made, asked = self._read(volume, prompts)
        if asked:
            masks = {text: np.zeros(volume.grid.shape_zyx, dtype=np.bool_) for text in _texts(asked)}

            def keep(text: str, place: tuple[slice, slice, slice], logits: Any) -> None:
                masks[text][place] = (logits > 0).cpu().numpy()

            message = self._draw(volume, list(masks), keep)
            seconds = (time.perf_counter() - started) / len(asked)
            taken: set[str] = set()
            for index, texts in asked.items():
                array = masks[texts[0]] if len(texts) == 1 else np.logical_or.reduce([masks[text] for text in texts])
                array = array.copy() if len(texts) == 1 and texts[0] in taken else array  # every answer has a mask of its own
                taken.update(texts)
                made[index] = answered(volume, prompts[index], array, message=message, seconds=seconds)
        return [made[index] for index in range(len(prompts))]

    def probabilities(self, volume: Volume, prompts: Sequence[Prompt]) -> list[NDArray[np.float16] | None]:
        """For each prompt an array (Z, Y, X) on `volume.grid`, above 1/2 where the mask is; None where it cannot be answered."""
        made, asked = self._read(volume, prompts)
        fields = {text: np.zeros(volume.grid.shape_zyx, dtype=np.float16) for text in _texts(asked)}

        def keep(text: str, place: tuple[slice, slice, slice], logits: Any) -> None:
            import torch

            values = torch.sigmoid(logits.float()).half()
            inside = torch.where(logits > 0, values.clamp_min(0.5 + 2**-11), values.clamp_max(0.5))  # half cannot tell 1/2 from just above
            fields[text][place] = inside.cpu().numpy()

        if fields:
            self._draw(volume, list(fields), keep)
        return [None if index in made else np.maximum.reduce([fields[text] for text in asked[index]]) for index in range(len(prompts))]

    def session(self, volume: Volume) -> Session:
        """Always SegmenterError: there is nothing to refine with."""
        raise SegmenterError("The segmenter voxtell takes words only, so it cannot refine a mask over several turns.")

    def unload(self) -> None:
        """Give weights, text encoder and accelerator memory back; asking it afterwards is a SegmenterError."""
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        from seerseg.segmenters.voxtell_network import empty_cache

        with self._lock:
            self._network = None
            if self._encoder is not None:
                self._encoder.unload()
            self._remembered.clear()
            compute_gaussian.cache_clear()
            gc.collect()
            empty_cache(self._device)

    # --------------------------------------------------------------------------------------------------------- words

    def _read(self, volume: Volume, prompts: Sequence[Prompt]) -> tuple[dict[int, Segmentation], dict[int, tuple[str, ...]]]:
        """What cannot be asked, and for the others the texts (lower-cased, as the network was trained) whose union is meant."""
        able = self.capabilities
        made: dict[int, Segmentation] = {}
        asked: dict[int, tuple[str, ...]] = {}
        for index, prompt in enumerate(prompts):
            refused = refusal("voxtell", able, volume, prompt)
            text = " ".join((prompt.text or prompt.class_name or "").split())
            if refused is None and not text:
                refused = Segmentation(prompt, "unsupported", message="The segmenter voxtell needs words.", nearest=("text",))
            if refused is None:
                texts = self._meant(text)
                if texts:
                    asked[index] = texts
                    continue
                refused = self._unknown(prompt, text)
            made[index] = refused
        return made, asked

    def _meant(self, text: str) -> tuple[str, ...]:
        """The text itself where the bank has it; what the bank calls a name that is offered; any text where there is an encoder; a
        spelling of a name that is offered; else ()."""
        lowered = text.lower()
        if lowered in self._rows:
            return (lowered,)
        if text in self.names.single:
            return self.names.single[text]
        if self._encoder_place is not None:
            return (lowered,)
        found = self.names.find(text)
        return found[1] if found is not None else ()

    def _unknown(self, prompt: Prompt, text: str) -> Segmentation:
        from rapidfuzz import process

        near = tuple(label for label, _, _ in process.extract(text.lower(), list(self._rows), limit=3))
        message = (
            f"VoxTell's embedding bank has no {text!r} among its {len(self._rows)} texts, and its text encoder is not here; the nearest "
            f"are {', '.join(near)}."
        )
        return Segmentation(prompt, "unsupported", message=message, nearest=near)

    def _embed(self, texts: Sequence[str]) -> list[Any]:
        """float32 tensors on the device."""
        import torch

        from seerseg.segmenters.voxtell_network import TextEncoder

        lacking = [text for text in texts if text not in self._rows and text not in self._remembered]
        if lacking:
            if self._encoder is None:
                place = self._encoder_place
                if place is None:
                    raise SegmenterError("VoxTell's text encoder is not here; ask only for what its embedding bank lists.")
                self._encoder = TextEncoder(place if isinstance(place, Path) else place(), self._sizes.text, self._device)
            for text, vector in zip(lacking, self._encoder.embed(lacking), strict=True):
                self._remembered[text] = vector
        found = [
            torch.from_numpy(self._bank.embeddings[self._rows[text]].astype(np.float32))
            if self._bank is not None and text in self._rows
            else self._remembered[text]
            for text in texts
        ]
        for text in list(self._remembered)[: max(0, len(self._remembered) - REMEMBERED)]:
            del self._remembered[text]
        return [vector.to(self._device) for vector in found]

    # --------------------------------------------------------------------------------------------------------- masks

    def _draw(self, volume: Volume, texts: list[str], keep: Callable[[str, tuple[slice, slice, slice], Any], None]) -> str:
        """keep(text, place in the volume, half logits) for every text, slab after slab; a note where memory was short."""
        import torch

        from seerseg.segmenters.voxtell_network import Window, empty_cache, normalised_crop, slide

        with self._lock:
            if self._network is None:
                raise SegmenterError(f"VoxTell of {self.folder} was unloaded; load it again.")
            try:
                embeddings = self._embed(texts)
                array = finite(volume.array)
                if not array.any():
                    return "The scan is 0 everywhere."
                image, box = normalised_crop(array)
                window = Window(self._sizes.patch, self.options.step, self._device, self._device)
                share = max(1, self.sums_bytes // window.bytes_per_prompt(image.shape))
                waiting = list(range(len(texts)))
                while waiting:
                    now = waiting[:share]

                    def sink(number: int, slices: slice, logits: Any, now: list[int] = now) -> None:
                        start = box[0].start
                        place = (slice(start + slices.start, start + slices.stop), box[1], box[2])
                        keep(texts[now[number]], place, logits)

                    try:
                        slide(self._network, image, [embeddings[i] for i in now], window, sink)
                    except torch.OutOfMemoryError:
                        empty_cache(self._device)
                        if len(now) > 1:
                            share = len(now) // 2
                        elif window.place != "cpu":
                            window = replace(window, place="cpu")
                        else:
                            raise
                        continue
                    waiting = waiting[share:]
            except (MemoryError, RuntimeError) as fault:
                if not isinstance(fault, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(fault):
                    raise
                raise SegmenterError(
                    f"The memory does not hold this scan of {volume.grid.shape_zyx} voxels for VoxTell; use --device cpu, a machine with "
                    "more memory, or crop the scan."
                ) from fault
            return _ON_HOST if window.place != window.device else ""


def _texts(asked: Mapping[int, tuple[str, ...]]) -> Iterator[str]:
    return iter(dict.fromkeys(text for texts in asked.values() for text in texts))


# ------------------------------------------------------------------------------------------------------------- options and folders


def _device(name: str) -> str:
    import torch

    try:
        place = torch.device(name)
    except RuntimeError as fault:
        raise UsageError(f"There is no device {name!r}; write cpu, cuda, cuda:1 or mps.") from fault
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"The device {name} is not there; use --device cpu.")
    return str(place)


def find_folder(place: str | Path, *, offline: bool) -> Path:
    """The folder with plans.json and fold_0/checkpoint_final.pth that a path, ORG/NAME or ORG/NAME/MODEL means."""
    path = Path(place).expanduser()
    if not path.is_dir():
        path = _from_hub(str(place), offline=offline)
    if not (path / "plans.json").is_file():
        inner = sorted(found.parent for found in path.glob("*/plans.json"))
        if len(inner) != 1:
            held = ", ".join(str(one) for one in inner) or ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(f"{path} is no VoxTell folder (plans.json and {CHECKPOINT}); it holds: {held}. Give the folder of one model.")
        path = inner[0]
    if not (path / CHECKPOINT).is_file():
        raise WeightsError(f"The VoxTell folder {path} has no {CHECKPOINT}; copy it again.")
    return path


def _from_hub(text: str, *, offline: bool) -> Path:
    if not _HUB_ID.fullmatch(text):
        raise ModelError(f"There is no VoxTell folder {text!r}. Give a folder with plans.json and {CHECKPOINT}, or a hub id such as {HUB}.")
    owner, name, *model = text.split("/")
    wanted = model[0] if model else HUB_MODEL
    return _snapshot(f"{owner}/{name}", [f"{wanted}/*"], offline=offline) / wanted


def _snapshot(repository: str, patterns: list[str], *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    fetch = f"hf download {repository} --include {' '.join(repr(pattern) for pattern in patterns)}"
    try:
        path = Path(snapshot_download(repository, local_files_only=offline, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as fault:
        if not offline:
            raise WeightsError(f"The model {repository!r} could not be fetched: {str(fault).splitlines()[0]}") from fault
        path = None
    if path is None or not any(found for pattern in patterns for found in path.glob(pattern)):
        raise WeightsError(
            f"The model {repository!r} is not on this machine and SeerSeg does not download unless told to. Copy its folder here and give "
            f"the path, or fetch it once with: {fetch}."
        )
    return path


def _find_bank(folder: Path, where: str, options: VoxTellOptions, *, offline: bool) -> Bank | None:
    if options.bank is not None:
        if options.bank == "off":
            return None
        path = Path(options.bank).expanduser()
        if not path.is_file():
            raise WeightsError(f"There is no embedding bank {path}; give VoxTell's text_embeddings.npz, or ?bank=off.")
        return Bank.read(path)
    inside = Path("embeddings", folder.name, BANK)
    for path in (folder / BANK, folder.parent / inside):
        if path.is_file():
            return Bank.read(path)
    if Path(where).expanduser().is_dir():
        return None
    try:
        snapshot = _snapshot("/".join(where.split("/")[:2]), [inside.as_posix()], offline=offline)
    except WeightsError:
        return None  # the text encoder may do
    return Bank.read(snapshot / inside)


def _find_encoder(folder: Path, options: VoxTellOptions, *, offline: bool) -> Path | Callable[[], Path] | None:
    """Its folder; where the network may be used and it is not here, what fetches it."""
    if options.encoder == "off":
        return None
    given = options.encoder or str(folder / "text_encoder")
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise WeightsError(f"The text encoder {path} lacks config.json or *.safetensors; copy it again.")
        return path
    name = options.encoder or HUB_ENCODER
    if not _HUB_ID.fullmatch(name):
        raise WeightsError(f"There is no text encoder {name!r}; give its folder, a hub id such as {HUB_ENCODER}, or ?encoder=off.")
    try:
        return _snapshot(name, _ENCODER_FILES, offline=True)
    except WeightsError:
        if not offline:
            return lambda: _snapshot(name, _ENCODER_FILES, offline=False)
        if options.encoder is not None:
            raise
        return None


def _require_voxtell() -> None:
    try:
        for name in (
            "acvl_utils.cropping_and_padding.padding",
            "nnunetv2.inference.sliding_window_prediction",
            "voxtell.model.voxtell_model",
        ):
            importlib.import_module(name)
    except ImportError as fault:
        raise MissingExtraError(
            f"The segmenter voxtell needs the package voxtell ({str(fault).rstrip('.')}). Install it with: {INSTALL}"
        ) from fault


def _identity(plans: Any, weights: Mapping[str, Any], step: float, bank: Bank | None, encoder: Path | Callable[[], Path] | None) -> str:
    from importlib.metadata import version

    from seerseg.segmenters.voxtell_network import CONFIGURATION, encoder_identity

    digest = hashlib.blake2b(digest_size=12)
    spoken = encoder_identity(encoder) if isinstance(encoder, Path) else "none" if encoder is None else HUB_ENCODER
    facts = [_REVISION, version("voxtell"), step, None if bank is None else bank.identity, spoken, plans["configurations"][CONFIGURATION]]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    hashed: dict[int, str] = {}
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name}={hashed.setdefault(value.data_ptr(), name)}".encode())
        if hashed[value.data_ptr()] == name:
            digest.update(value.contiguous().view(-1).numpy().data)
    return f"voxtell-{digest.hexdigest()}"
