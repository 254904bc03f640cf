"""The decode loop of VLM reasoners: dialogues as tokens in, tokens of replies out, with every shared prefix computed once.

Dialogues with the same images share one prefill of their common token prefix. All dialogues of a call are then decoded together, whatever
their images: caches of different prefixes lie side by side, padded on the left and masked, in buffers with room for the replies, so that
no step copies what is already there; rows whose reply has ended leave the batch. What a row draws depends on its tokens and its key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from seerseg.errors import ModelError

MAX_NEW_TOKENS = 256


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


@dataclass(frozen=True, eq=False)
class Encoded:
    """A dialogue as tokens, ready for a reply: exactly what `VlmReasoner.reply` feeds to the model.

    ids: (T,). kinds: what the processor says of each token besides ("mm_token_type_ids", "token_type_ids"), each (T,), 0 for text.
    images: the image tensors of the dialogue, in order; dialogues that hold the same object show the same images after the same words.
    """

    ids: list[int]
    kinds: dict[str, list[int]]
    images: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Line:
    """A dialogue that wants a reply. key: what its random numbers are made from; None: the likeliest token each time."""

    encoded: Encoded
    key: str | None = None


@dataclass(eq=False)
class _Prefix:
    """The shared beginning of some lines; its cache (batch of 1) is made when first wanted. delta: what M-RoPE adds to later positions."""

    ids: list[int]
    encoded: Encoded
    cache: Any = None
    delta: int = 0
    lines: list[int] = field(default_factory=list)


class Decoder:
    """Decodes with one model. mrope: it counts positions as Qwen's models do; eos: tokens that end a reply; suppressed: never chosen."""

    def __init__(self, model: Any, decoding: Decoding, *, mrope: bool, eos: frozenset[int], suppressed: Sequence[int], pad: int) -> None:
        self.model, self.decoding, self.mrope = model, decoding, mrope
        self.eos, self.suppressed, self.pad = eos, suppressed, pad

    def replies(self, lines: Sequence[Line], done: Callable[[list[int], list[list[int]]], None] | None = None) -> list[list[int]]:
        """The tokens of each line's reply, the one that ended it included. done: told the numbers of lines and their replies as soon
        as a batch of them is finished."""
        prefixes = _prefixes(lines)
        order = [(number, prefix) for prefix in prefixes for number in prefix.lines]
        out: list[list[int]] = [[] for _ in lines]
        size = self.decoding.max_batch
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for prefix in prefixes:
                if prefix.cache is not None and prefix not in (p for _, p in chunk):
                    prefix.cache = None  # its lines are done
            replies = self._decode([lines[number] for number, _ in chunk], [prefix for _, prefix in chunk])
            numbers = [number for number, _ in chunk]
            for number, reply in zip(numbers, replies, strict=True):
                out[number] = reply
            if done is not None:
                done(numbers, replies)
        return out

    def _prefill(self, prefix: _Prefix) -> None:
        import torch
        from transformers import DynamicCache

        if prefix.cache is not None:
            return
        if not prefix.ids:
            prefix.cache = DynamicCache(config=self.model.config.get_text_config())
            return
        device = self.model.device
        given = {name: value.to(device) if hasattr(value, "to") else value for name, value in prefix.encoded.images.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
            for name, kind in prefix.encoded.kinds.items():
                given[name] = torch.tensor([kind[: len(prefix.ids)]], device=device)
        tokens = torch.tensor([prefix.ids], device=device)
        made = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, logits_to_keep=1, **given)
        prefix.cache = made.past_key_values
        if self.mrope and "pixel_values" in given:
            prefix.delta = int(self.model.model.rope_deltas[0])
            self.model.model.rope_deltas = None  # a later forward pass must not take it for its own

    def _decode(self, lines: Sequence[Line], prefixes: Sequence[_Prefix]) -> list[list[int]]:
        """Continue lines, each behind its prefix."""
        import torch

        device, rows = self.model.device, len(lines)
        for prefix in dict.fromkeys(prefixes):
            self._prefill(prefix)
        tails = [line.encoded.ids[len(prefix.ids) :] for line, prefix in zip(lines, prefixes, strict=True)]
        before, longest = max(len(p.ids) for p in prefixes), max(map(len, tails))
        room = longest + self.decoding.max_new_tokens
        store = _side_by_side(prefixes, before, room)
        mask = torch.zeros((rows, before + room), dtype=torch.long)
        tokens = torch.full((rows, longest), self.pad)
        positions = torch.zeros((rows, longest), dtype=torch.long)
        for row, (tail, prefix) in enumerate(zip(tails, prefixes, strict=True)):
            mask[row, before - len(prefix.ids) : before] = 1
            mask[row, before + longest - len(tail) :] = 1
            tokens[row, longest - len(tail) :] = torch.tensor(tail)
            positions[row, longest - len(tail) :] = torch.arange(len(tail)) + len(prefix.ids) + prefix.delta
        padded = not bool(mask[:, : before + longest].all())
        mask, tokens, positions = mask.to(device), tokens.to(device), positions.to(device)
        draw = Draw([line.key for line in lines], self.decoding, self.suppressed, self.eos, device)
        seen = before + longest
        while True:
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask[:, :seen] if padded else None,
                position_ids=positions.expand(3, -1, -1) if self.mrope else positions,
                past_key_values=store,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            chosen = draw.choose(logits[:, -1])
            if draw.done:
                return draw.ids
            kept = draw.leave()
            if kept is not None:
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                store.batch_select_indices(kept)
            tokens, positions, seen = chosen[:, None], positions[:, -1:] + 1, seen + 1


def _prefixes(lines: Sequence[Line]) -> list[_Prefix]:
    """Lines sorted by what they share, each in exactly one place."""
    groups: dict[int, list[int]] = {}
    for number, line in enumerate(lines):
        groups.setdefault(id(line.encoded.images) if line.encoded.images else 0, []).append(number)
    found = []
    for numbers in groups.values():
        encoded = [lines[n].encoded for n in numbers]
        shared = common([e.ids for e in encoded])
        ends = max((i + 1 for kind in encoded[0].kinds.values() for i, k in enumerate(kind) if k), default=0)
        if shared and shared >= ends:
            found.append(_Prefix(encoded[0].ids[:shared], encoded[0], lines=numbers))
        else:
            found.extend(_Prefix(lines[n].encoded.ids[:-1], lines[n].encoded, lines=[n]) for n in numbers)
    return found


def common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix, at least one token short of the shortest."""
    shortest = min(map(len, sequences)) - 1
    first = sequences[0]
    for place in range(shortest):
        if any(other[place] != first[place] for other in sequences[1:]):
            return place
    return max(shortest, 0)


def _side_by_side(prefixes: Sequence[_Prefix], before: int, room: int) -> Any:
    """One cache of all rows: each row's prefix ends at `before`, zeros to its left, room for `room` tokens to the right."""
    from transformers import DynamicCache

    filled = next((p.cache for p in prefixes if p.ids), None)
    if filled is None:
        return prefixes[0].cache
    rows = {prefix: [r for r, p in enumerate(prefixes) if p is prefix] for prefix in dict.fromkeys(prefixes)}
    store = DynamicCache()
    store.layers = []
    for number, like in enumerate(filled.layers):
        shape = (len(prefixes), like.keys.shape[1], before + room)
        keys = like.keys.new_zeros((*shape, like.keys.shape[3]))
        values = like.values.new_zeros((*shape, like.values.shape[3]))
        for prefix, places in rows.items():
            if prefix.ids:
                layer, first, last = prefix.cache.layers[number], places[0], places[-1] + 1  # rows of a prefix lie together
                keys[first:last, :, before - len(prefix.ids) : before] = layer.keys
                values[first:last, :, before - len(prefix.ids) : before] = layer.values
        store.layers.append(_roomy_layer()(keys, values, before))
    return store


@cache
def _roomy_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values written into buffers that are there already."""

        def __init__(self, keys: Any, values: Any, length: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._all, self._length = (keys, values), length
            self._show()

        def _show(self) -> None:
            self.keys, self.values = (part[:, :, : self._length] for part in self._all)

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            """Write what is new and return all."""
            end = self._length + key_states.shape[-2]
            for part, new in zip(self._all, (key_states, value_states), strict=True):
                part[:, :, self._length : end] = new
            self._length = end
            self._show()
            return self.keys, self.values

        def batch_select_indices(self, indices: Any) -> None:
            """Keep some rows."""
            keys, values = (part[indices] for part in self._all)
            self._all = (keys, values)
            self._show()

    return RoomyLayer


class Draw:
    """Chooses the next token of every row: the likeliest, or by numbers drawn from a generator made from the row's key.

    `ids`: what every row has so far, the token that ended it included.
    """

    def __init__(self, keys: Sequence[str | None], decoding: Decoding, suppressed: Sequence[int], eos: frozenset[int], device: Any) -> None:
        import torch

        self._decoding, self._eos, self._step = decoding, eos, 0
        self._suppressed = torch.tensor(list(suppressed), dtype=torch.long, device=device)
        self._rows = list(range(len(keys)))
        self._ended = [False] * len(keys)
        self.ids: list[list[int]] = [[] for _ in keys]
        self._uniform = None
        if any(key is not None for key in keys):
            drawn = []
            for key in keys:
                seed = hashlib.sha256((key or "").encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big", signed=True))
                numbers = torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)
                drawn.append(numbers if key is not None else torch.full_like(numbers, -1.0))
            self._uniform = torch.stack(drawn).to(device if getattr(device, "type", "cpu") != "mps" else "cpu")

    @property
    def done(self) -> bool:
        """Whether no row wants a further token."""
        return all(self._ended) or self._step >= self._decoding.max_new_tokens

    def choose(self, logits: Any) -> Any:
        """Take (rows, vocabulary) logits of the rows that are left and return the chosen ids (rows,)."""
        scores = logits.float()
        if len(self._suppressed):
            scores[:, self._suppressed] = float("-inf")
        chosen = scores.argmax(-1)
        if self._uniform is not None:
            uniform = self._uniform[self._rows, self._step]
            sampled = self._sample(scores.to(uniform.device), uniform.clamp(min=0)).to(scores.device)
            chosen = sampled.where((uniform >= 0).to(scores.device), chosen)
        for row, token in zip(self._rows, chosen.tolist(), strict=True):
            if not self._ended[row]:
                self.ids[row].append(token)
                self._ended[row] = token in self._eos
        self._step += 1
        return chosen

    def leave(self) -> Any | None:
        """Where at least half of the rows have ended: which of them stay, as indices; they alone are chosen for from now on."""
        import torch

        open_rows = [place for place, row in enumerate(self._rows) if not self._ended[row]]
        if len(open_rows) > len(self._rows) // 2:
            return None
        self._rows = [self._rows[place] for place in open_rows]
        return torch.tensor(open_rows, device=self._suppressed.device)

    def _sample(self, scores: Any, uniform: Any) -> Any:
        import torch

        weights = torch.softmax(scores.double() / self._decoding.temperature, -1)
        if self._decoding.top_p >= 1.0:
            total = weights.cumsum(-1)
            place = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
            last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1, keepdim=True)  # the last token that can be drawn
            return torch.minimum(place, last)[:, 0]
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
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
