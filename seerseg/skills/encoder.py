"""Sentence embeddings for retrieval: any transformers encoder in a folder, and a file that keeps what was embedded.

A folder as sentence-transformers writes them is understood: `1_Pooling/config.json` says whether tokens are averaged (as without that
file) or the first is taken. Nothing is downloaded and nothing in the folder can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import BankError, ModelError, OutputError
from seerseg.paths import safe_name, write_atomically
from seerseg.quiet import quiet

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> (n, d) float32, any length; for the bank's phrases and for requests alike. One with an `identity` is kept track of."""
EMBEDDINGS = "embeddings"
RETRIEVAL = "retrieval"
"""Folder in a bank for what it has learnt about finding its skills with one encoder."""
RIDGE = 0.3  # of the mean variance, so that directions that hardly vary are not blown up; chosen on validation language
EACH, MOST, LEAST = 12, 1000, 100
"""Texts of a phrase, and in all, that a metric is learnt from; and how many it needs."""
_BATCH = 64
_LONGEST = 128  # tokens of a request that are read


class SentenceEncoder:
    """A sentence encoder on one device. ModelError when the folder holds none."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        folder = folder.expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is no sentence encoder: it holds no config.json of transformers. Give such a folder with --encoder."
            )
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **given)
                self._model = AutoModel.from_pretrained(str(folder), use_safetensors=True, **given).eval().to(device)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, struct.error, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{folder} cannot be loaded as a sentence encoder: {reason}") from error
        self._first = _takes_first(folder)
        self.identity = f"{safe_name(folder.resolve().name, 40)}-{_digest(folder)}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d), unit length; the same whatever is asked for beside a text, up to rounding."""
        import torch

        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        out: list[Any] = [None] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                part = order[start : start + _BATCH]
                batch = self._tokenizer(
                    [texts[n] for n in part], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
                ).to(self._model.device)
                states = self._model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][..., None].to(states.dtype)
                pooled = states[:, 0] if self._first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                for n, vector in zip(part, torch.nn.functional.normalize(pooled, dim=1).cpu().numpy(), strict=True):
                    out[n] = vector
        return np.stack(out).astype(np.float32) if out else np.zeros((0, int(self._model.config.hidden_size)), np.float32)


class Remembered:
    """An encoder that is asked once for each text."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, NDArray[np.float32]] = {}
        self.identity = getattr(encoder, "identity", None)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the encoder's."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known |= dict(zip(missing, np.asarray(self._encoder(missing), np.float32), strict=True))
        return np.stack([self._known[text] for text in texts]) if len(texts) else np.asarray(self._encoder([]), np.float32)


class Adapted:
    """An encoder seen through a bank's metric: (n, d) unit vectors in which the wording around a structure's name counts for less."""

    def __init__(self, encoder: Encoder, metric: NDArray[np.float32]) -> None:
        self._encoder, self._metric = encoder, metric
        named = getattr(encoder, "identity", None)
        self.identity = None if named is None else f"{named}-{hashlib.blake2b(metric.tobytes(), digest_size=4).hexdigest()}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the encoder's, adapted."""
        made = np.asarray(self._encoder(texts), np.float32) @ self._metric
        return np.asarray(made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9), np.float32)


def learn_metric(said: Mapping[tuple[str, str], Sequence[str]], encoder: Encoder) -> NDArray[np.float32] | None:
    """(d, d), to multiply vectors by: whitens how the vectors of training requests with one and the same phrase differ, so that what is
    said around a phrase weighs less than what tells phrases apart. said: texts by phrase and target. None when there are too few."""
    texts: list[str] = []
    groups: list[range] = []
    for _, group in sorted(said.items(), key=lambda item: (-len(item[1]), item[0])):
        some = sorted(set(group), key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())[:EACH]
        if len(some) > 1 and len(texts) + len(some) <= MOST:
            groups.append(range(len(texts), len(texts) + len(some)))
            texts += some
    if len(texts) < LEAST:
        return None
    vectors = np.asarray(encoder(texts), np.float32)
    apart = np.concatenate([vectors[list(group)] - vectors[list(group)].mean(0) for group in groups])
    values, axes = np.linalg.eigh(apart.T @ apart / len(apart))
    scale = 1 / np.sqrt(np.maximum(values, 0) / max(float(values.mean()), 1e-12) + RIDGE)
    return np.asarray((axes * scale) @ axes.T, np.float32)


def keep_metric(metric: NDArray[np.float32], encoder: Encoder, bank: Path) -> None:
    """Keep it in a bank for one encoder, which must have an identity."""
    data = {"metric": metric}
    write_atomically(_metric_path(encoder, bank), lambda temporary: _save(temporary, data))


def adapted(encoder: Encoder, bank: Path) -> Encoder:
    """The encoder through the metric that the bank keeps for it; itself where there is none. BankError when that cannot be read."""
    from zipfile import BadZipFile

    path = _metric_path(encoder, bank)
    if getattr(encoder, "identity", None) is None or not path.is_file():
        return encoder
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            metric = np.asarray(stored["metric"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, BadZipFile) as fault:
        raise BankError(f"{path} cannot be read ({fault}). Copy the bank again, or remove the file and evolve the bank anew.") from None
    return Adapted(encoder, metric)


def _metric_path(encoder: Encoder, bank: Path) -> Path:
    return bank / RETRIEVAL / f"{getattr(encoder, 'identity', None)}.npz"


def kept_vectors(texts: Sequence[str], encoder: Encoder, bank: Path) -> NDArray[np.float32]:
    """The encoder's vectors of phrases, those known from `bank`/embeddings/<identity>.npz not made again (by the phrase's hash, so a new
    state of the bank costs its new phrases alone); new ones are kept there where that can be written."""
    identity = getattr(encoder, "identity", None)
    if identity is None or not texts:
        return np.asarray(encoder(list(texts)), np.float32)
    path = bank / EMBEDDINGS / f"{identity}.npz"
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    known = _read(path)
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        made = np.asarray(encoder(list(missing.values())), np.float32).astype(np.float16)
        known |= dict(zip(missing, made, strict=True))
        data = {"keys": np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16), "vectors": np.stack(list(known.values()))}
        with contextlib.suppress(OutputError, OSError):  # a read-only bank is still a bank
            write_atomically(path, lambda temporary: _save(temporary, data))
    return np.stack([known[key] for key in keys]).astype(np.float32)


def _read(path: Path) -> dict[bytes, NDArray[Any]]:
    """What was kept; nothing when the file is missing or damaged."""
    from zipfile import BadZipFile

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            keys, vectors = stored["keys"], stored["vectors"]
            return dict(zip([row.tobytes() for row in keys], vectors, strict=True))
    except (OSError, ValueError, KeyError, EOFError, zlib.error, BadZipFile):
        return {}


def _save(path: Path, data: dict[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **data)


def _takes_first(folder: Path) -> bool:
    """Whether the folder says that the first token stands for a text; ModelError for a pooling that is neither that nor the mean."""
    path = folder / "1_Pooling" / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        modes = {key for key, value in said.items() if key.startswith("pooling_mode_") and value is True}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Copy the encoder again.") from None
    if modes - {"pooling_mode_mean_tokens", "pooling_mode_cls_token"} or len(modes) > 1:
        raise ModelError(f"{path} asks for {', '.join(sorted(modes))}; encoders that average tokens or take the first one are supported.")
    return "pooling_mode_cls_token" in modes


def _digest(folder: Path) -> str:
    """Of the files that vectors depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
