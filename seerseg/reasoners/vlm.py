"""Any transformers image-text-to-text model as a reasoner, with or without a peft adapter.

Images of one case are encoded once for all its requests and samples: dialogues that show the same images in the same words up to
the last of them share one prefill of their common token prefix; what follows is batched, left-padded, behind copies of its cache.
Architectures for which this was not checked against the stock `generate` use the stock one, with the same results and more work.
A reply depends on its dialogue, the sample number and the seed, never on what else is in the batch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.errors import ModelError
from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
from seerseg.reasoners.base import ReasonerCard
from seerseg.reasoners.vlm_loading import Loaded, find, quiet
from seerseg.reasoners.vlm_loading import load as load_model

MAX_NEW_TOKENS = 256
_MROPE, _PLAIN = "mrope", "plain"
_SHARING = {"qwen3_vl": _MROPE, "qwen2_5_vl": _MROPE, "qwen2_vl": _MROPE, "idefics3": _PLAIN, "smolvlm": _PLAIN}
"""Model types whose prefix can be prefilled once, by how they count positions; each is tested token for token."""
_SEQUENCE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Decoding:
    """How replies are drawn. Greedy for samples = 1 with seed 0, else by temperature and top_p. max_batch: rows at a time."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    max_batch: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.max_batch < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"Decoding needs max_new_tokens and max_batch of at least 1, temperature above 0 and top_p in (0, 1]; these are {self}."
            )


@dataclass(eq=False)
class _Prompt:
    """One dialogue as text with image placeholders. head: characters up to and including the last placeholder."""

    text: str
    images: list[ImagePart]
    head: int
    digest: str
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A dialogue as tokens, ready for a reply: exactly what `VlmReasoner.reply` feeds to the model.

    ids: (T,). kinds: what the processor says of each token besides ("mm_token_type_ids", "token_type_ids"), each (T,), 0 for text.
    images: the image tensors of the dialogue, in order.
    """

    ids: list[int]
    kinds: dict[str, list[int]]
    images: dict[str, Any]


@dataclass(frozen=True)
class _Row:
    prompt: _Prompt
    sample: int
    place: tuple[int, int]


class VlmReasoner:
    """A loaded model that replies to dialogues."""

    def __init__(self, loaded: Loaded, decoding: Decoding | None = None) -> None:
        self.loaded, self.decoding = loaded, decoding or Decoding()
        self.model, self.processor, self.tokenizer = loaded.model, loaded.processor, loaded.tokenizer

    @cached_property
    def card(self) -> ReasonerCard:
        """Identity: weights, configuration, number type and decoding."""
        said = f"{self.loaded.identity}|{self.model.dtype}|{self.decoding}"
        return ReasonerCard(
            name=self.loaded.source.name,
            identity=f"vlm-{hashlib.sha256(said.encode()).hexdigest()[:32]}",
            licence=self.loaded.licence,
            source=str(self.loaded.source.adapter or self.loaded.source.folder),
            notes=f"{self.model.config.model_type}, prefix sharing {'on' if self.shares_prefix else 'off'}",
        )

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows of a batch."""
        return self._pad

    @property
    def shares_prefix(self) -> bool:
        """Whether images of a case are encoded once for all its requests."""
        return self.model.config.model_type in _SHARING

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        """`samples` replies per dialogue, in order."""
        import torch

        prompts = [self._prompt(dialogue) for dialogue in dialogues]
        groups: dict[tuple[tuple[str, ...], str], list[_Row]] = {}
        for number, prompt in enumerate(prompts):
            key = (tuple(image.key for image in prompt.images), prompt.text[: prompt.head])
            groups.setdefault(key, []).extend(_Row(prompt, sample, (number, sample)) for sample in range(samples))
        out = [[""] * samples for _ in prompts]
        greedy = samples == 1 and seed == 0
        with torch.inference_mode(), quiet():
            for rows in groups.values():
                for row, ids in zip(rows, self._generate(rows, None if greedy else seed), strict=True):
                    out[row.place[0]][row.place[1]] = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return out

    def encode(self, dialogue: Sequence[Message], known: MutableMapping[str, Encoded] | None = None) -> Encoded:
        """The tokens and image tensors of a dialogue. known: what was encoded before, so that the images of a case are prepared once
        for all dialogues that begin alike; filled in."""
        prompt = self._prompt(dialogue)
        key = hashlib.sha256("\0".join([prompt.text[: prompt.head], *(image.key for image in prompt.images)]).encode()).hexdigest()
        tail = self._tail(prompt) if prompt.images else []
        head = None if known is None else known.get(key)
        if head is None:
            made = self._encode([prompt.text], prompt.images)
            ids = made["input_ids"][0].tolist()
            kinds = {name: made[name][0].tolist() for name in _SEQUENCE_KEYS[2:] if name in made}
            images = {name: value for name, value in made.items() if name not in _SEQUENCE_KEYS}
            cut = len(ids) - len(tail)
            if known is None or not tail or ids[cut:] != tail:
                return Encoded(ids, kinds, images)
            head = known[key] = Encoded(ids[:cut], {name: kind[:cut] for name, kind in kinds.items()}, images)
        return Encoded(head.ids + tail, {name: kind + [0] * len(tail) for name, kind in head.kinds.items()}, head.images)

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
        return _Prompt(text, images, last + len(self._image_token) if images and last >= 0 else 0, digest)

    def _encode(self, texts: list[str], images: list[ImagePart]) -> Any:
        """The processor's tensors; every text gets the same images."""
        from PIL import Image

        options: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": len(texts) > 1}
        if images:
            pictures = [Image.fromarray(image.pixels) for image in images]
            options["images"] = [pictures for _ in texts]
        return self.processor(**options)

    def _tokenise(self, prompts: Sequence[_Prompt]) -> dict[str, Any]:
        """Fill in the ids of prompts that share their head; returns the image tensors, which belong to all of them."""
        first = prompts[0]
        encoded = self._encode([first.text], first.images)
        first.ids = encoded["input_ids"][0].tolist()
        tail = self._tail(first)
        together = first.ids[len(first.ids) - len(tail) :] == tail if first.images else False
        for prompt in prompts[1:]:
            if not first.images:
                prompt.ids = self._encode([prompt.text], [])["input_ids"][0].tolist()
            elif together:
                prompt.ids = first.ids[: len(first.ids) - len(tail)] + self._tail(prompt)
            else:
                prompt.ids = self._encode([prompt.text], prompt.images)["input_ids"][0].tolist()
        return {key: value for key, value in encoded.items() if key not in _SEQUENCE_KEYS} | {
            key: encoded[key] for key in ("mm_token_type_ids",) if key in encoded and first.images
        }

    def _tail(self, prompt: _Prompt) -> list[int]:
        ids: list[int] = self.tokenizer(prompt.text[prompt.head :], add_special_tokens=False)["input_ids"]
        return ids

    # --- tokens -> tokens -----------------------------------------------------------------------------------------------

    def _generate(self, rows: Sequence[_Row], seed: int | None) -> list[list[int]]:
        size = self.decoding.max_batch
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        if not self.shares_prefix:
            return [ids for chunk in chunks for ids in self._stock(chunk, seed)]
        prompts = list({id(row.prompt): row.prompt for row in rows}.values())
        tensors = self._tokenise(prompts)
        shared = _common([prompt.ids for prompt in prompts])
        cache, delta = self._prefill(prompts[0].ids[:shared], tensors)
        out: list[list[int]] = []
        for number, chunk in enumerate(chunks):
            own = cache if number == len(chunks) - 1 else copy.deepcopy(cache)
            own.batch_repeat_interleave(len(chunk))
            out.extend(self._decode(chunk, own, shared, delta, seed))
        return out

    def _prefill(self, ids: list[int], tensors: dict[str, Any]) -> tuple[Any, int]:
        """Cache of the shared prefix, and what M-RoPE adds to later positions."""
        import torch
        from transformers import DynamicCache

        if not ids:
            return DynamicCache(config=self.model.config.get_text_config()), 0
        device = self.model.device
        given = {key: value.to(device) for key, value in tensors.items() if key != "mm_token_type_ids"}
        if "mm_token_type_ids" in tensors:
            given["mm_token_type_ids"] = tensors["mm_token_type_ids"][:, : len(ids)].to(device)
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        tokens = torch.tensor([ids], device=device)
        made = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, logits_to_keep=1, **given)
        shifted = _SHARING[self.model.config.model_type] == _MROPE and "pixel_values" in given
        return made.past_key_values, int(self.model.model.rope_deltas[0]) if shifted else 0

    def _decode(self, rows: Sequence[_Row], cache: Any, shared: int, delta: int, seed: int | None) -> list[list[int]]:
        """Continue `rows` behind a cache of their first `shared` tokens."""
        import torch

        device = self.model.device
        tails = [row.prompt.ids[shared:] for row in rows]
        longest = max(map(len, tails))
        tokens = torch.full((len(rows), longest), self._pad, device=device)
        mask = torch.zeros((len(rows), shared + longest), dtype=torch.long, device=device)
        mask[:, :shared] = 1
        for number, tail in enumerate(tails):
            tokens[number, longest - len(tail) :] = torch.tensor(tail, device=device)
            mask[number, shared + longest - len(tail) :] = 1
        draw = _Draw(rows, seed, self.decoding, self._suppressed, self._eos, device)
        while True:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :] + delta
            if _SHARING[self.model.config.model_type] == _MROPE:
                positions = positions.unsqueeze(0).expand(3, -1, -1)
            logits = self.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            chosen = draw.choose(logits[:, -1])
            if draw.done:
                return draw.ids
            tokens = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)

    def _stock(self, rows: Sequence[_Row], seed: int | None) -> list[list[int]]:
        """The stock `generate` on whole prompts, one choice of token per step made by `_Draw`."""
        from transformers import LogitsProcessorList

        images = rows[0].prompt.images
        encoded = self._encode([row.prompt.text for row in rows], images).to(self.model.device)
        if "pixel_values" in encoded and hasattr(encoded["pixel_values"], "to"):
            encoded["pixel_values"] = encoded["pixel_values"].to(self.model.dtype)
        draw = _Draw(rows, seed, self.decoding, self._suppressed, self._eos, self.model.device)
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
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos) or None,
        )
        return draw.ids

    @cached_property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self._eos, default=0)

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


class _Draw:
    """Chooses the next token of every row: greedily, or by numbers drawn from a generator of (seed, dialogue, sample)."""

    def __init__(
        self, rows: Sequence[_Row], seed: int | None, decoding: Decoding, suppressed: Sequence[int], eos: frozenset[int], device: Any
    ) -> None:
        import torch

        self._decoding, self._eos, self._step = decoding, eos, 0
        self._suppressed = torch.tensor(list(suppressed), dtype=torch.long, device=device)
        self._open = [True] * len(rows)
        self.ids: list[list[int]] = [[] for _ in rows]
        self._uniform = None
        if seed is not None:
            drawn = []
            for row in rows:
                key = hashlib.sha256(f"{seed}|{row.sample}|{row.prompt.digest}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
                drawn.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
            self._uniform = torch.stack(drawn)

    @property
    def done(self) -> bool:
        """Whether no row wants a further token."""
        return not any(self._open) or self._step >= self._decoding.max_new_tokens

    def choose(self, logits: Any) -> Any:
        """Take (rows, vocabulary) logits and return the chosen ids (rows,)."""
        scores = logits.float()
        if len(self._suppressed):
            scores[:, self._suppressed] = float("-inf")
        chosen = scores.argmax(-1) if self._uniform is None else self._sample(scores.cpu(), self._uniform[:, self._step]).to(scores.device)
        for number, token in enumerate(chosen.tolist()):
            if self._open[number]:
                if token in self._eos:
                    self._open[number] = False
                else:
                    self.ids[number].append(token)
        self._step += 1
        return chosen

    def _sample(self, scores: Any, uniform: Any) -> Any:
        import torch

        ordered, order = torch.softmax(scores.double() / self._decoding.temperature, -1).sort(dim=-1, descending=True, stable=True)
        total = ordered.cumsum(-1)
        kept = (total - ordered < self._decoding.top_p).sum(-1, keepdim=True)
        mass = total.gather(-1, kept - 1)
        place = torch.searchsorted(total, uniform[:, None] * mass, right=True).clamp(max=kept - 1)
        return order.gather(-1, place)[:, 0]

    def processor(self) -> Any:
        """A logits processor for the stock `generate` that leaves it no choice."""
        import torch
        from transformers import LogitsProcessor

        draw = self

        class Choice(LogitsProcessor):
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                chosen = draw.choose(scores.clone())
                return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)

        return Choice()


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix, at least one token short of the shortest."""
    shortest = min(map(len, sequences)) - 1
    first = sequences[0]
    for place in range(shortest):
        if any(other[place] != first[place] for other in sequences[1:]):
            return place
    return max(shortest, 0)


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
