"""Any transformers image-text-to-text model as a reasoner, with or without a peft adapter.

Images of one case are encoded once for all its requests and samples: dialogues that show the same images in the same words up to
the last of them share one prefill of their common token prefix; what follows is batched, left-padded, behind copies of its cache. With
Qwen's models a dialogue that goes on from one that was replied to before is taken up where that ended: images of earlier turns are neither
prepared nor encoded again.
Architectures for which this was not checked against the stock `generate` use the stock one, with the same results and more work.
A reply depends on its dialogue, the sample number and the seed, never on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from seerseg.errors import ModelError
from seerseg.paths import read_json
from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
from seerseg.quiet import quiet
from seerseg.reasoners.base import ReasonerCard
from seerseg.reasoners.decoding import Decoder, Decoding, Draw, Encoded, Line, Shown
from seerseg.reasoners.lazy import LazyReasoner
from seerseg.reasoners.prefixes import most_bytes
from seerseg.reasoners.vlm_loading import Loaded, Source, check_torchvision, count_weights, default_dtype, find, identity, licence_of
from seerseg.reasoners.vlm_loading import load as load_model

_MROPE, _PLAIN = "mrope", "plain"
_SHARING = {"qwen3_vl": _MROPE, "qwen2_5_vl": _MROPE, "qwen2_vl": _MROPE, "idefics3": _PLAIN, "smolvlm": _PLAIN}
"""Model types whose prefix can be prefilled once, by how they count positions; each is tested token for token."""
_SEQUENCE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_HEADS = 256
"""Dialogues whose tokens up to the last image are remembered."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    """One dialogue as text with image placeholders. head: characters up to and including the last placeholder; marks: digests of the
    images' content; digest: what its random numbers are made from."""

    text: str
    images: list[ImagePart]
    head: int
    digest: str
    marks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Head:
    """The tokens of a dialogue up to its last image, without the image tensors but for their "image_grid_thw"."""

    ids: array[int]
    kinds: dict[str, bytes]
    grids: Any


@dataclass(frozen=True)
class _Row:
    """One reply to draw. key: see `Line`; place: its dialogue and sample number."""

    prompt: _Prompt
    key: str | None
    place: tuple[int, int]


class VlmReasoner:
    """A loaded model that replies to dialogues."""

    def __init__(self, loaded: Loaded, decoding: Decoding | None = None) -> None:
        self.loaded, self.decoding = loaded, decoding or Decoding()
        self.model, self.processor, self.tokenizer = loaded.model, loaded.processor, loaded.tokenizer
        self._marks: WeakKeyDictionary[ImagePart, str] = WeakKeyDictionary()
        self._heads: OrderedDict[str, _Head] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def card(self) -> ReasonerCard:
        """Identity: weights, configuration, number type and decoding."""
        made = self.loaded
        return card_of(made.source, made.identity, str(self.model.dtype), self.decoding, made.licence, self.model.config.model_type)

    @property
    def most_bytes(self) -> int:
        """As of `HoldingReasoner`."""
        if self.model.device.type != "cpu":
            return 0
        weights = sum(w.numel() * w.element_size() for w in self.model.parameters())
        return weights + (most_bytes(weights, self.decoding.kept_bytes) if self.shares_prefix else 0)

    @property
    def shares_prefix(self) -> bool:
        """Whether images of a case are encoded once for all its requests."""
        return self.model.config.model_type in _SHARING

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """`samples` replies per dialogue, in order."""
        import torch

        greedy = samples == 1 and seed == 0
        rows = [
            _Row(prompt, None if greedy else f"{seed}|{sample}|{prompt.digest}", (number, sample))
            for number, prompt in enumerate(self._prompt(dialogue) for dialogue in dialogues)
            for sample in range(samples)
        ]
        out = [[""] * samples for _ in dialogues]
        with torch.inference_mode(), quiet():
            for row, ids in zip(rows, self._generate(rows), strict=True):
                out[row.place[0]][row.place[1]] = self.text(ids)
        return out

    def likelihoods(self, dialogue: Sequence[Message], replies: Sequence[str]) -> list[float]:
        """Log-likelihood of each reply, its end included, after one dialogue; after a reply to the same dialogue no image is encoded.
        ModelError as in `decoder`."""
        import torch

        decoder = self.decoder
        with torch.inference_mode(), quiet():
            asked = self._encoded(self._prompt(dialogue), {}, remember=True)
            return decoder.likelihoods(asked, [self.encode_reply(reply) for reply in replies])

    def text(self, reply: Sequence[int]) -> str:
        """The words of a reply's tokens."""
        said = [token for token in reply if token not in self._eos]
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()

    @cached_property
    def decoder(self) -> Decoder:
        """The decode loop on this model. ModelError for an architecture whose prefix is not shared."""
        kind = self.model.config.model_type
        if kind not in _SHARING:
            raise ModelError(f"The decode loop was not checked for models of type {kind!r}; it was for {', '.join(_SHARING)}.")
        return Decoder(
            self.model, self.decoding, mrope=_SHARING[kind] == _MROPE, eos=self._eos, suppressed=self._suppressed, pad=self.pad_token_id
        )

    def encode(self, dialogue: Sequence[Message], known: MutableMapping[str, Encoded] | None = None) -> Encoded:
        """The tokens and image tensors of a dialogue. known: what was encoded before, so that the images of a case are prepared once
        for all dialogues that begin alike; filled in."""
        return self._encoded(self._prompt(dialogue), known)

    @cached_property
    def goes_on(self) -> bool:
        """Whether a dialogue can be extended from its tokens, images included (`extend`)."""
        asked = [text_message("user", "a"), text_message("assistant", "b")]
        kept = self.chat([*asked, text_message("user", "c")]).startswith(self.chat(asked[:1]) + "b")
        return kept and _SHARING.get(self.model.config.model_type) == _MROPE

    def extend(self, before: Encoded, reply: Sequence[int], message: Message) -> Encoded:
        """An encoded dialogue after a reply and a further message, the tokens of both kept as they were: writing a reply out and reading
        it in again could give other tokens. ModelError where a template writes earlier turns anew, or images cannot be added."""
        return self.append(before, reply, self.continuation(message))

    def continuation(self, message: Message) -> Encoded:
        """What a further message adds to a dialogue after a reply, from the end of that reply on; errors as in `extend`."""
        asked = [text_message("user", "a"), text_message("assistant", "b")]
        start, whole = self.chat(asked[:1]) + "b", self.chat([*asked, message])
        if not whole.startswith(start):
            raise ModelError(
                f"The chat template of {self.loaded.source.name} writes earlier turns anew, so a dialogue cannot go on from its tokens."
            )
        made = self._encode([whole[len(start) :]], list(message.images))
        images = {name: value for name, value in made.items() if name not in _SEQUENCE_KEYS}
        if images and _SHARING.get(self.model.config.model_type) != _MROPE:
            raise ModelError(
                f"Models of type {self.model.config.model_type!r} cannot be shown further images in a dialogue that is trained."
            )
        marks = tuple(self._mark(image) for image in message.images)
        return Encoded(*_tokens(made), images, marks)

    def append(self, before: Encoded, reply: Sequence[int], added: Encoded) -> Encoded:
        """An encoded dialogue after a reply and a `continuation`; a token that ended the reply is not said twice."""
        import torch

        skip = int(bool(reply) and bool(added.ids) and reply[-1] in self._eos and added.ids[0] == reply[-1])
        joined = {name: torch.cat([before.images[name], value]) if name in before.images else value for name, value in added.images.items()}
        return Encoded(
            [*before.ids, *reply, *added.ids[skip:]],
            {
                name: [*before.kinds.get(name, [0] * len(before.ids)), *([0] * len(reply)), *kind[skip:]]
                for name, kind in added.kinds.items()
            },
            joined if joined else before.images,
            before.marks + added.marks,
        )

    def _encoded(self, prompt: _Prompt, known: MutableMapping[str, Encoded] | None, *, remember: bool = False) -> Encoded:
        """remember: images that were prepared in an earlier call are prepared again only when they are wanted."""
        key = _key(prompt.text[: prompt.head], prompt.marks)
        tail = self._tail(prompt) if prompt.images else []
        head = None if known is None else known.get(key)
        if head is None and remember:
            head = self._taken_up(prompt)
        if head is None:
            made = self._encode([prompt.text], prompt.images)
            ids, kinds = _tokens(made)
            images = {name: value for name, value in made.items() if name not in _SEQUENCE_KEYS}
            cut = len(ids) - len(tail)
            if known is None or not tail or ids[cut:] != tail:
                return Encoded(ids, kinds, images, prompt.marks)
            head = Encoded(ids[:cut], {name: kind[:cut] for name, kind in kinds.items()}, images, prompt.marks)
        if known is not None:
            known[key] = head
        if remember and self._cuts:
            self._remember(key, head)
        return Encoded(head.ids + tail, {name: kind + [0] * len(tail) for name, kind in head.kinds.items()}, head.images, prompt.marks)

    def _taken_up(self, prompt: _Prompt) -> Encoded | None:
        """The head of a prompt, from that of the longest beginning of its dialogue that was encoded in an earlier call."""
        import torch

        pieces = prompt.text[: prompt.head].split(self._image_token)
        if not self._cuts or len(pieces) != len(prompt.images) + 1:
            return None
        for count in range(len(prompt.images), 0, -1):
            said = self._image_token.join([*pieces[:count], ""])
            key = _key(said, prompt.marks[:count])
            with self._lock:
                head = self._heads.get(key)
                if head is not None:
                    self._heads.move_to_end(key)
            if head is not None:
                break
        else:
            return None
        ids, kinds = head.ids.tolist(), {name: list(kind) for name, kind in head.kinds.items()}
        after: Mapping[str, Any] = {}
        grids = head.grids
        if count < len(prompt.images):
            made = self._encode([prompt.text[len(said) : prompt.head]], prompt.images[count:])
            more, more_kinds = _tokens(made)
            ids, kinds = ids + more, {name: kind + more_kinds[name] for name, kind in kinds.items()}
            after = {name: value for name, value in made.items() if name not in _SEQUENCE_KEYS}
            grids = torch.cat([grids, after["image_grid_thw"]])

        def before() -> Mapping[str, Any]:
            made = self._encode([self._image_token * count], prompt.images[:count])
            return {name: value for name, value in made.items() if name not in _SEQUENCE_KEYS}

        return Encoded(ids, kinds, Shown(before, count, grids, after), prompt.marks)

    def _remember(self, key: str, head: Encoded) -> None:
        if head.images:
            kept = _Head(array("i", head.ids), {name: bytes(kind) for name, kind in head.kinds.items()}, head.images["image_grid_thw"])
            with self._lock:
                self._heads[key] = kept
                self._heads.move_to_end(key)
                while len(self._heads) > _HEADS:
                    self._heads.popitem(last=False)

    @cached_property
    def _cuts(self) -> bool:
        """Whether a dialogue can be encoded in pieces that end with an image."""
        token = self._image_token
        whole, *parts = (self.tokenizer(text)["input_ids"] for text in (f"a{token} b{token}", f"a{token}", f" b{token}"))
        return _SHARING.get(self.model.config.model_type) == _MROPE and whole == parts[0] + parts[1]

    def _mark(self, image: ImagePart) -> str:
        """A digest of what an image shows."""
        found = self._marks.get(image)
        if found is None:
            pixels = np.ascontiguousarray(image.pixels)
            found = self._marks[image] = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]
        return found

    def encode_reply(self, reply: str) -> list[int]:
        """The tokens of a reply, up to and with the one that ends a turn, as they follow an encoded dialogue."""
        ids: list[int] = self.tokenizer(self._plain(TextPart(reply)) + self._closing, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _closing(self) -> str:
        """What the chat template writes after a reply, up to and with the first token that ends generation."""
        ends = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._eos)]
        asked = [text_message("user", "a")]
        before, after = self.chat(asked), self.chat([*asked, text_message("assistant", "b")], ask=False)
        rest = after[len(before) + 1 :] if after.startswith(before + "b") else ""
        found = sorted((rest.find(end), end) for end in ends if end in rest)
        return rest[: found[0][0]] + found[0][1] if found else str(self.tokenizer.eos_token or "")

    # --- dialogue -> tokens ---------------------------------------------------------------------------------------------

    def chat(self, dialogue: Sequence[Message], *, ask: bool = True) -> str:
        """The dialogue as the model's chat template writes it, ready for the reply unless ask is False; images as placeholders."""
        template = self.processor.chat_template
        if template is None:
            lines = [f"{m.role.capitalize()}: {self._flat(m)}" for m in dialogue]
            return "\n".join([*lines, "Assistant:"] if ask else lines)
        if "image" in template:
            messages: list[dict[str, Any]] = [{"role": m.role, "content": self._content(m)} for m in dialogue]
        else:
            messages = [{"role": m.role, "content": self._flat(m)} for m in dialogue]
        said: str = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=ask)
        return said

    def _content(self, message: Message) -> list[dict[str, str]]:
        """Parts for a chat template: texts that follow each other are joined by a newline."""
        out: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                out.append({"type": "image"})
            elif out and out[-1]["type"] == "text":
                out[-1]["text"] += "\n" + self._plain(part)
            else:
                out.append({"type": "text", "text": self._plain(part)})
        return out

    def _flat(self, message: Message) -> str:
        return "".join(self._image_token if c["type"] == "image" else c["text"] for c in self._content(message))

    def _plain(self, part: TextPart) -> str:
        """Text in which nothing reads as a control token."""
        text = part.text.encode("utf-8", "replace").decode("utf-8")
        for token in self._control_tokens:
            if token in text:
                text = text.replace(token, token[0] + " " + token[1:])
        return text

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if len(str(token)) > 2}
        return tuple(sorted(added | {self._image_token}, key=len, reverse=True))

    @cached_property
    def _image_token(self) -> str:
        token = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        return str(token) if token is not None else "<image>"

    def _prompt(self, dialogue: Sequence[Message]) -> _Prompt:
        if not dialogue or dialogue[-1].role == "assistant":
            raise ModelError("A dialogue must end with a message that asks for a reply.")
        text = self.chat(dialogue)
        images = [image for message in dialogue for image in message.images]
        last = text.rfind(self._image_token)
        digest = hashlib.sha256("\0".join([text, *(image.key for image in images)]).encode()).hexdigest()
        head = last + len(self._image_token) if images and last >= 0 else 0
        return _Prompt(text, images, head, digest, tuple(self._mark(image) for image in images))

    def _encode(self, texts: list[str], images: list[ImagePart]) -> Any:
        """The processor's tensors; every text gets the same images."""
        from PIL import Image

        options: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": len(texts) > 1}
        if images:
            pictures = [Image.fromarray(image.pixels) for image in images]
            options["images"] = [pictures for _ in texts]
        return self.processor(**options)

    def _tail(self, prompt: _Prompt) -> list[int]:
        ids: list[int] = self.tokenizer(prompt.text[prompt.head :], add_special_tokens=False)["input_ids"]
        return ids

    # --- tokens -> tokens -----------------------------------------------------------------------------------------------

    def _generate(self, rows: Sequence[_Row]) -> list[list[int]]:
        if self.shares_prefix:
            known: dict[str, Encoded] = {}
            return self.decoder.replies([Line(self._encoded(row.prompt, known, remember=True), row.key) for row in rows])
        out: dict[int, list[int]] = {}
        shown: dict[tuple[str, ...], list[_Row]] = {}
        for row in rows:
            shown.setdefault(tuple(image.key for image in row.prompt.images), []).append(row)
        size = self.decoding.max_batch
        for alike in shown.values():
            for start in range(0, len(alike), size):
                chunk = alike[start : start + size]
                out.update(zip(map(id, chunk), self._stock(chunk), strict=True))
        return [out[id(row)] for row in rows]

    def _stock(self, rows: Sequence[_Row]) -> list[list[int]]:
        """The stock `generate` on whole prompts, one choice of token per step made by `Draw`."""
        from transformers import LogitsProcessorList

        images = rows[0].prompt.images
        encoded = self._encode([row.prompt.text for row in rows], images).to(self.model.device)
        if "pixel_values" in encoded and hasattr(encoded["pixel_values"], "to"):
            encoded["pixel_values"] = encoded["pixel_values"].to(self.model.dtype)
        draw = Draw([row.key for row in rows], self.decoding, self._suppressed, self._eos, self.model.device)
        self.model.generate(
            **encoded,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.decoding.max_new_tokens,
            logits_processor=LogitsProcessorList([draw.processor()]),
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.pad_token_id,
            eos_token_id=sorted(self._eos) or None,
        )
        return draw.ids

    @cached_property
    def pad_token_id(self) -> int:
        """The token that fills rows of a batch."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self._eos, default=0)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return self._eos

    @cached_property
    def _eos(self) -> frozenset[int]:
        found: set[int] = set()
        for place in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            found.update(place if isinstance(place, list) else [] if place is None else [place])
        return frozenset(found)

    @cached_property
    def _suppressed(self) -> tuple[int, ...]:
        """Tokens that stand for images: a reply that holds one cannot be positioned."""
        config = self.model.config.to_dict()
        vision = {
            value
            for key, value in config.items()
            if isinstance(value, int)
            and key.endswith(("_token_id", "_token_index"))
            and any(k in key for k in ("image", "video", "vision", "audio"))
        }
        unknown = self.tokenizer.unk_token_id
        names = [self._image_token, *(getattr(self.processor, name, None) for name in ("image_token", "video_token", "fake_image_token"))]
        vision.update(i for name in names if name and (i := self.tokenizer.convert_tokens_to_ids(str(name))) is not None and i != unknown)
        return tuple(sorted(int(i) for i in vision - self._eos if 0 <= i < self.model.config.get_text_config().vocab_size))


def _tokens(made: Any) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of the only text, and what the processor says of each besides."""
    return made["input_ids"][0].tolist(), {name: made[name][0].tolist() for name in _SEQUENCE_KEYS[2:] if name in made}


def _key(text: str, marks: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([text, *marks]).encode()).hexdigest()


def card_of(source: Source, identity: str, dtype: str, decoding: Decoding, licence: str, kind: str) -> ReasonerCard:
    """The card of a model. dtype: as torch writes it; kind: its config's "model_type"."""
    said = f"{identity}|{dtype}|{decoding}"
    return ReasonerCard(
        name=source.name,
        identity=f"vlm-{hashlib.sha256(said.encode()).hexdigest()[:32]}",
        licence=licence,
        source=str(source.adapter or source.folder),
        notes=f"{kind}, prefix sharing {'on' if kind in _SHARING else 'off'}",
    )


def card_ahead(source: Source, decoding: Decoding, *, device: str, dtype: str | None) -> ReasonerCard:
    """The card that a model will have when it is loaded: its files are read, not put together. ModelError where they cannot be used for
    sure: no config, or a torchvision that breaks transformers."""
    check_torchvision()
    kind = str(read_json(source.folder / "config.json", ModelError).get("model_type"))
    licence = licence_of(source.folder)
    return card_of(source, identity(source), f"torch.{dtype or default_dtype(device)}", decoding, licence, kind)


def bytes_ahead(source: Source, decoding: Decoding, *, device: str, dtype: str | None) -> int:
    """`VlmReasoner.most_bytes` of a model that is not loaded yet, with room to remember whether its architecture does or not."""
    if device != "cpu":
        return 0
    weights = count_weights(source.folder) * (4 if (dtype or default_dtype(device)) == "float32" else 2)
    return weights + most_bytes(weights, decoding.kept_bytes)


def load(
    *,
    source: str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = True,
    base: str | Path | None = None,
    **decoding: Any,
) -> VlmReasoner:
    """A model by folder or hub id. base: the base model of an adapter; decoding: fields of `Decoding`."""
    if source is None:
        raise ModelError("The reasoner vlm needs a model: vlm:FOLDER, a folder, or a hub id such as Qwen/Qwen3-VL-4B-Instruct.")
    unknown = sorted(set(decoding) - set(Decoding.__dataclass_fields__))
    if unknown:
        raise ModelError(f"The reasoner vlm has no setting {unknown[0]!r}; it has base, {', '.join(Decoding.__dataclass_fields__)}.")
    return VlmReasoner(load_model(find(source, offline=offline, base=base), device=device, dtype=dtype), Decoding(**decoding))


def load_later(*, source: str | Path, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> LazyReasoner:
    """As `load`, but the model is put together when it is first asked."""
    found, decoding = find(source, offline=offline), Decoding()
    card = card_ahead(found, decoding, device=device, dtype=dtype)
    size = bytes_ahead(found, decoding, device=device, dtype=dtype)
    return LazyReasoner(card, lambda: VlmReasoner(load_model(found, device=device, dtype=dtype), decoding), most_bytes=size)
