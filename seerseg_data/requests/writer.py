"""A language model rewrites requests, and a round trip decides which rewrites are kept.

The writer is any causal language model: a local transformers folder, a GGUF file, or an endpoint that speaks OpenAI's protocol. A
rewrite is kept only when the lexicon, with all of the vocabulary, still reads the same target from it, the side and the
structure's own words are still there, and no word for the target of another language split has come in.
"""

from __future__ import annotations

import json
import os
import random
import struct
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from seerseg.dataset import check_text
from seerseg.errors import MissingExtraError, ModelError, RequestError, UsageError
from seerseg.protocols.base import ABSENT
from seerseg.quiet import quiet
from seerseg.reasoners.lexicon import LexiconReasoner
from seerseg.reasoners.reading import Words, negated_positions, tokenise
from seerseg.vocabulary import Vocabulary, words
from seerseg_data.requests.generate import Made, Report

ASK = (
    "Rewrite this request of a clinician in other words, as another clinician would say it. Keep every anatomical term and every side "
    "exactly as they are. Answer with the rewritten request only, on one line."
)
REWRITTEN = (
    "clinical_request",
    "verbose_request",
    "report_style",
    "formal_task",
    "implicit",
    "chat",
    "order_form",
    "out_of_region_reference",
)
"""Styles that are offered to a writer: those whose point is not in the spelling."""
_TIMEOUT_S = 120.0
_BATCH = 8


class Writer(Protocol):
    """Something that rewrites texts."""

    @property
    def name(self) -> str:
        """What it is, for the card."""
        ...

    def rewrite(self, texts: Sequence[str], seed: int) -> list[str]:
        """One rewrite per text, in order; "" where there is none."""
        ...


def load_writer(
    source: str, *, model: str | None = None, key_variable: str = "SEERSEG_WRITER_KEY", ask: str = ASK, label: str = "Request"
) -> Writer:
    """A writer from a URL (http, https), a GGUF file or a transformers folder; nothing is downloaded. ask: what it is told to do with a
    text; label: what a text is called where a model has no chat template. UsageError when `source` is none of them, ModelError when it
    cannot be loaded."""
    if source.startswith(("http://", "https://")):
        if not model:
            raise UsageError(f"The endpoint {source} needs the name of its model: --writer_model NAME.")
        return EndpointWriter(source, model, os.environ.get(key_variable, ""), ask)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return LocalWriter(path.parent, gguf=path.name, ask=ask, label=label)
    if path.is_dir() and (path / "config.json").is_file():
        return LocalWriter(path, ask=ask, label=label)
    raise UsageError(f"{source} is no writer: give a folder with a config.json of transformers, a .gguf file, or the URL of an endpoint.")


@dataclass
class EndpointWriter:
    """An endpoint that speaks OpenAI's chat protocol. url: of the API ("http://host:8000/v1") or of its chat/completions."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    ask: str = ASK

    @property
    def name(self) -> str:
        """The model's name; never the key."""
        return f"{self.model} at an endpoint"

    def rewrite(self, texts: Sequence[str], seed: int) -> list[str]:
        """One call per text; ModelError when the endpoint cannot be reached, refuses, or answers something else."""
        return [self._one(text, seed + number) for number, text in enumerate(texts)]

    def _one(self, text: str, seed: int) -> str:
        address = self.url.rstrip("/")
        address = address if address.endswith("/chat/completions") else f"{address}/chat/completions"
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": self.ask}, {"role": "user", "content": text}],
            "temperature": 0.8,
            "max_tokens": 200,
            "seed": seed,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                told = json.load(answer)
            return str(told["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            raise ModelError(
                f"The endpoint {address} refused with status {error.code} ({error.reason}). Check model name and key."
            ) from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ModelError(f"The endpoint {address} cannot be reached ({getattr(error, 'reason', error)}). Is it running?") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError(f"The endpoint {address} answered something that is no chat completion ({error!r}).") from error


class LocalWriter:
    """A causal language model on this machine, read from a folder or from a GGUF file in it."""

    def __init__(self, folder: Path, *, gguf: str | None = None, ask: str = ASK, label: str = "Request") -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._name, self._ask, self._label = gguf or folder.resolve().name, ask, label
        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if gguf is not None:
            given["gguf_file"] = gguf
        weights = {} if gguf is not None else {"use_safetensors": True}
        try:
            with quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **given)
                self._model = AutoModelForCausalLM.from_pretrained(str(folder), **given, **weights).eval()
        except ImportError as error:
            raise MissingExtraError(f"{folder / (gguf or '')} needs a package that is not installed: {error}") from error
        except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, struct.error, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise ModelError(f"{folder / (gguf or '')} cannot be loaded as a causal language model: {reason}") from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.decode([0])
        self._tokenizer.padding_side = "left"
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self._name

    def rewrite(self, texts: Sequence[str], seed: int) -> list[str]:
        """Sampled at temperature 0.8, in batches."""
        import torch

        torch.manual_seed(seed)
        out: list[str] = []
        for start in range(0, len(texts), _BATCH):
            asked = [self._asked(text) for text in texts[start : start + _BATCH]]
            batch = self._tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
            batch = batch.to(self._model.device)
            with torch.inference_mode():
                made = self._model.generate(
                    **batch, max_new_tokens=96, do_sample=True, temperature=0.8, pad_token_id=self._tokenizer.pad_token_id
                )
            new = made[:, batch["input_ids"].shape[1] :]
            out += [str(text) for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]
        return out

    def _asked(self, text: str) -> str:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": f"{self._ask}\n\n{text}"}]
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return f"{self._ask}\n\n{self._label}: {text}\nRewritten: "


@dataclass
class RoundTrip:
    """Judges rewrites for one dataset's context."""

    vocabulary: Vocabulary
    names: tuple[str, ...]
    modality: str | None

    def __post_init__(self) -> None:
        self._lexicon = LexiconReasoner(vocabulary=self.vocabulary)
        self._words = Words(self.vocabulary)

    def fault(self, made: Made, text: str) -> str | None:
        """Why a rewrite of a request cannot be kept ("target", "side", "own words", "other split", ...), None when it can."""
        if words(text) == words(made.request.text):
            return "unchanged"
        if len(text) > 4 * len(made.request.text) + 80:
            return "length"
        answer = self._lexicon.decide(text, self.names, modality=self.modality).answer
        if answer != self._wanted(made):
            return "target"
        if self._sides(text) != self._sides(made.request.text):
            return "side"
        said = f" {' '.join(words(text))} "
        own = f" {' '.join(words(made.wording.surface))} "
        if own not in said:
            return "own words"
        entry = self.vocabulary.resolve(made.name)
        for surface in entry.surfaces if entry is not None else ():
            other = f" {' '.join(words(surface.text))} "
            if surface.split != made.wording.split and surface.kind != "name" and other not in own and other in said:
                return "other split"
        return None

    def _wanted(self, made: Made) -> str:
        if made.request.absent:
            return ABSENT
        if made.name in self.names:
            return made.name
        entry = self.vocabulary.resolve(made.name)
        return entry.name if entry is not None else made.name

    def _sides(self, text: str) -> set[tuple[str, bool]]:
        tokens = tokenise(text, self._words)
        negated = negated_positions(tokens)
        return {(str(token.side), number in negated) for number, token in enumerate(tokens) if token.side is not None}


class Rewriter:
    """Has a writer rewrite a share of a report's requests, and counts what was kept and why the rest was not."""

    def __init__(self, writer: Writer, *, share: float = 0.5, seed: int = 0) -> None:
        self.writer, self.share, self.seed = writer, share, seed
        self.kept = 0
        self.reasons: Counter[str] = Counter()

    def rewrite(self, report: Report) -> Report:
        """The report with the rewrites that were kept in the place of the requests that they were made from."""
        trip = RoundTrip(report.vocabulary, report.context.names, report.context.modality)
        rng = random.Random(self.seed)
        chosen = [
            n for n, m in enumerate(report.made) if m.wording.style in REWRITTEN and not m.wording.slips and rng.random() < self.share
        ]
        texts = self.writer.rewrite([report.made[n].request.text for n in chosen], self.seed)
        made = list(report.made)
        taken = {(m.request.case, m.request.text.casefold()) for m in made}
        for number, raw in zip(chosen, texts, strict=True):
            one = made[number]
            text = cleaned(raw)
            fault = "empty" if text is None else trip.fault(one, text)
            if fault is None and (one.request.case, str(text).casefold()) in taken:
                fault = "said already"
            if fault is not None or text is None:
                self.reasons[fault or "empty"] += 1
                continue
            self.kept += 1
            taken.add((one.request.case, text.casefold()))
            wording = replace(one.wording, text=text)
            made[number] = replace(one, request=replace(one.request, text=text), wording=wording, writer=self.writer.name)
        return replace(report, made=tuple(made))

    def told(self) -> dict[str, Any]:
        """What was done, for the card."""
        refused = dict(sorted(self.reasons.items()))
        return {"writer": self.writer.name, "share": self.share, "kept": self.kept, "refused": sum(refused.values()), "reasons": refused}


def cleaned(raw: str) -> str | None:
    """A model's answer as one line of text: its first line that is not empty, without quotes and labels; None when nothing is left."""
    lines = [line.strip().strip("\"'\u201c\u201d`* ") for line in raw.splitlines()]
    first = next((line for line in lines if line), "")
    for label in ("rewritten request:", "rewritten:", "request:"):
        if first.lower().startswith(label):
            first = first[len(label) :].strip().strip("\"'\u201c\u201d` ")
    try:
        return " ".join(check_text(first).split())
    except RequestError:
        return None
