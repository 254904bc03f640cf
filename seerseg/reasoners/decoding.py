"""The decode loop of VLM reasoners: dialogues as tokens in, tokens of replies out, with every shared prefix computed once.

Dialogues with the same images share one prefill of their common token prefix, and a dialogue that goes on from one that was here before
takes up what that one left (`prefixes`), so images of earlier turns are not encoded again. All dialogues of a call are then decoded
together, whatever their images: caches of different prefixes lie side by side, padded on the left and masked, in buffers with room for the
replies, so that no step copies what is already there; rows whose reply has ended leave the batch. What a row draws depends on its tokens
and its key alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from seerseg.errors import ModelError
from seerseg.reasoners.prefixes import Entry, Found, Prefixes

MAX_NEW_TOKENS = 256
_GRIDS = "image_grid_thw"


@dataclass(frozen=True)
class Decoding:
    """How replies are drawn. Greedy for samples = 1 with seed 0, else by temperature and top_p. max_batch: rows at a time; kept_bytes:
    what may be remembered of dialogues for their further turns, None: by the model's size, 0: nothing, so every turn begins anew."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    max_batch: int = 16
    kept_bytes: int | None = field(default=None, repr=False)  # it changes no reply, so it is no part of a reasoner's identity

    def __post_init__(self) -> None:
        if self.kept_bytes is not None and self.kept_bytes < 0:
            raise ModelError(f"Decoding needs kept_bytes of 0 or more; it is {self.kept_bytes}.")
        if self.max_new_tokens < 1 or self.max_batch < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"Decoding needs max_new_tokens and max_batch of at least 1, temperature above 0 and top_p in (0, 1]; these are {self}."
            )


class Shown(Mapping[str, Any]):
    """Image tensors of a dialogue, for models whose images lie one after the other (Qwen's): those of its first `count` images are made
    by `before` when they are asked for, those of the others are `after`. grids: the "image_grid_thw" of all."""

    def __init__(self, before: Callable[[], Mapping[str, Any]], count: int, grids: Any, after: Mapping[str, Any]) -> None:
        self._before, self._count, self._grids, self._after = before, count, grids, after

    def since(self, first: int) -> Mapping[str, Any]:
        """Tensors of the images from `first` on."""
        if first < self._count:
            return since(self._whole, first)
        return since(self._after, first - self._count) if self._after else {}

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        import torch

        return {name: torch.cat([made, self._after[name]]) if self._after else made for name, made in self._before().items()}

    def __getitem__(self, name: str) -> Any:
        return self._grids if name == _GRIDS else self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("pixel_values", _GRIDS))

    def __len__(self) -> int:
        return 2


def since(images: Mapping[str, Any], first: int) -> Mapping[str, Any]:
    """Image tensors from those of image number `first` on; for more than 0 they must be those of a Qwen model."""
    if first == 0:
        return images
    if isinstance(images, Shown):
        return images.since(first)
    rows = int(images[_GRIDS][:first].prod(-1).sum())
    return {name: value[first if name == _GRIDS else rows :] for name, value in images.items()} if first < len(images[_GRIDS]) else {}


@dataclass(frozen=True, eq=False)
class Encoded:
    """A dialogue as tokens, ready for a reply: exactly what `VlmReasoner.reply` feeds to the model.

    ids: (T,). kinds: what the processor says of each token besides ("mm_token_type_ids", "token_type_ids"), each (T,), 0 for text.
    images: the image tensors of the dialogue, in order. marks: a digest of each image's content, in order; a dialogue with images that has
    none, or no kinds to tell where its images are, is not remembered and shares its prefix with those alone that hold the same `images`.
    """

    ids: list[int]
    kinds: dict[str, list[int]]
    images: Mapping[str, Any]
    marks: tuple[str, ...] = ()

    @cached_property
    def ends(self) -> int:
        """Tokens up to and with the last one that stands for an image."""
        return max((place + 1 for kind in self.kinds.values() for place, k in enumerate(kind) if k), default=0)

    @property
    def known(self) -> bool:
        """Whether its content says what it shows, and where."""
        return bool(self.marks) and self.ends > 0


@dataclass(frozen=True, eq=False)
class Line:
    """A dialogue that wants a reply. key: what its random numbers are made from; None: the likeliest token each time."""

    encoded: Encoded
    key: str | None = None


@dataclass(eq=False)
class _Prefix:
    """The shared beginning of some lines; its entry, which may be longer, is found or made when it is wanted."""

    ids: list[int]
    encoded: Encoded
    entry: Entry | None = None
    lines: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Rows:
    """Tails behind their prefixes, ready for a pass: the cache with room to the right of them; mask, tokens and positions (rows, tail),
    padded on the left; seen: columns of the mask up to and with the tails."""

    store: Any
    mask: Any
    tokens: Any
    positions: Any
    padded: bool
    seen: int


class Decoder:
    """Decodes with one model. mrope: it counts positions as Qwen's models do; eos: tokens that end a reply; suppressed: never chosen."""

    def __init__(self, model: Any, decoding: Decoding, *, mrope: bool, eos: frozenset[int], suppressed: Sequence[int], pad: int) -> None:
        self.model, self.decoding, self.mrope = model, decoding, mrope
        self.eos, self.suppressed, self.pad = eos, suppressed, pad
        self.prefixes = Prefixes(decoding.kept_bytes)

    def forget(self) -> None:
        """Remember no dialogue: to have the memory back, or since few values of a weight were written through `weight.data`."""
        self.prefixes.clear()

    def replies(self, lines: Sequence[Line], done: Callable[[list[int], list[list[int]]], None] | None = None) -> list[list[int]]:
        """The tokens of each line's reply, the one that ended it included. done: told the numbers of lines and their replies as soon
        as a batch of them is finished."""
        prefixes = self._begin([line.encoded for line in lines])
        order = [(number, prefix) for prefix in prefixes for number in prefix.lines]
        out: list[list[int]] = [[] for _ in lines]
        size = self.decoding.max_batch
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for prefix in prefixes:
                if prefix.entry is not None and prefix not in (p for _, p in chunk):
                    prefix.entry = None  # its lines are done
            replies = self._decode([lines[number] for number, _ in chunk], [prefix for _, prefix in chunk])
            numbers = [number for number, _ in chunk]
            for number, reply in zip(numbers, replies, strict=True):
                out[number] = reply
            if done is not None:
                done(numbers, replies)
        return out

    def likelihoods(self, asked: Encoded, replies: Sequence[Sequence[int]]) -> list[float]:
        """Log-likelihood of the tokens of each reply (at least one) after one dialogue; no token is suppressed."""
        import torch

        (prefix,) = self._begin([asked])
        rest, out = asked.ids[len(prefix.ids) :], list[float]()
        for start in range(0, len(replies), self.decoding.max_batch):
            chunk = replies[start : start + self.decoding.max_batch]
            rows = self._rows([prefix] * len(chunk), [[*rest, *reply] for reply in chunk], 0)
            longest = max(map(len, chunk))
            logits = self._pass(rows, logits_to_keep=longest + 1)[:, :-1]
            for row, reply in zip(logits, chunk, strict=True):
                said = torch.tensor(list(reply), device=row.device)
                out.append(float(row[longest - len(reply) :].float().log_softmax(-1).gather(-1, said[:, None]).sum()))
        return out

    def _begin(self, asked: Sequence[Encoded]) -> list[_Prefix]:
        """The prefixes of dialogues; what is remembered of any of them counts as used."""
        self.prefixes.begin(self.model)
        prefixes = _prefixes(asked)
        for prefix in prefixes:
            self._find(prefix)
        return prefixes

    def _find(self, prefix: _Prefix) -> Found | None:
        return self.prefixes.find(prefix.ids, prefix.encoded.marks, splits=self.mrope) if prefix.encoded.known else None

    def _prefill(self, prefix: _Prefix) -> None:
        """Put what is new of a prefix through the model, behind what is remembered of it."""
        import torch

        if prefix.entry is not None or not prefix.ids:
            return
        encoded, found, length = prefix.encoded, self._find(prefix), len(prefix.ids)
        parent, start = (found.entry, found.length) if found is not None else (None, 0)
        if start == length:
            prefix.entry = parent
            return
        device, seen = self.model.device, len(parent.marks) if parent is not None else 0
        new = {} if seen and seen == len(encoded.marks) else since(encoded.images, seen)
        given = {name: value.to(device) if hasattr(value, "to") else value for name, value in new.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
            for name, kind in encoded.kinds.items():
                given[name] = torch.tensor([kind[start:length]], device=device)
        positions, delta = self._positions(encoded, start, length)
        past = None if parent is None else _side_by_side([_Prefix(prefix.ids[:start], encoded, parent)], start, length - start)
        made = self.model(
            input_ids=torch.tensor([prefix.ids[start:]], device=device),
            attention_mask=torch.ones((1, length), dtype=torch.long, device=device),
            position_ids=positions.to(device),
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
            **given,
        ).past_key_values
        layers = [(layer.keys, layer.values) for layer in made.layers]
        if parent is not None:
            layers = [(keys[:, :, start:].clone(), values[:, :, start:].clone()) for keys, values in layers]
        prefix.entry = Entry(prefix.ids, encoded.marks, encoded.ends, delta, start, layers, parent)
        if encoded.known:
            self.prefixes.keep(prefix.entry)

    def _positions(self, encoded: Encoded, start: int, length: int) -> tuple[Any, int]:
        """Positions of the tokens from `start` to `length`, and what M-RoPE adds to those of text after them."""
        import torch

        if self.mrope and encoded.images:
            ids, kinds = torch.tensor([encoded.ids[:length]]), {n: torch.tensor([k[:length]]) for n, k in encoded.kinds.items()}
            places, delta = self.model.model.get_rope_index(ids, image_grid_thw=encoded.images[_GRIDS], **kinds)
            return places[:, :, start:], int(delta[0])
        places = torch.arange(start, length)[None]
        return places.expand(3, -1, -1) if self.mrope else places, 0

    def _rows(self, prefixes: Sequence[_Prefix], tails: Sequence[Sequence[int]], room: int) -> _Rows:
        """Tails, each behind its prefix, with room for as many tokens after them."""
        import torch

        for prefix in dict.fromkeys(prefixes):
            with torch.no_grad():  # what is remembered must hold no graph
                self._prefill(prefix)
        device, rows = self.model.device, len(tails)
        before, longest = max(len(p.ids) for p in prefixes), max(map(len, tails))
        store = _side_by_side(prefixes, before, longest + room)
        mask = torch.zeros((rows, before + longest + room), dtype=torch.long)
        tokens = torch.full((rows, longest), self.pad)
        positions = torch.zeros((rows, longest), dtype=torch.long)
        for row, (tail, prefix) in enumerate(zip(tails, prefixes, strict=True)):
            delta = prefix.entry.delta if prefix.entry is not None else 0
            mask[row, before - len(prefix.ids) : before] = 1
            mask[row, before + longest - len(tail) :] = 1
            tokens[row, longest - len(tail) :] = torch.tensor(tail)
            positions[row, longest - len(tail) :] = torch.arange(len(tail)) + len(prefix.ids) + delta
        padded = not bool(mask[:, : before + longest].all())
        return _Rows(store, mask.to(device), tokens.to(device), positions.to(device), padded, before + longest)

    def _pass(self, rows: _Rows, *, logits_to_keep: int = 1) -> Any:
        """Logits of the last tokens; the cache has them all afterwards."""
        return self.model(
            input_ids=rows.tokens,
            attention_mask=rows.mask[:, : rows.seen] if rows.padded else None,
            position_ids=rows.positions.expand(3, -1, -1) if self.mrope else rows.positions,
            past_key_values=rows.store,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits

    def _decode(self, lines: Sequence[Line], prefixes: Sequence[_Prefix]) -> list[list[int]]:
        """Continue lines, each behind its prefix."""
        tails = [line.encoded.ids[len(prefix.ids) :] for line, prefix in zip(lines, prefixes, strict=True)]
        rows = self._rows(prefixes, tails, self.decoding.max_new_tokens)
        draw = Draw([line.key for line in lines], self.decoding, self.suppressed, self.eos, self.model.device)
        while True:
            chosen = draw.choose(self._pass(rows)[:, -1])
            if draw.done:
                return draw.ids
            kept = draw.leave()
            if kept is not None:
                chosen, rows.mask, rows.positions = chosen[kept], rows.mask[kept], rows.positions[kept]
                rows.store.batch_select_indices(kept)
            rows.tokens, rows.positions, rows.seen = chosen[:, None], rows.positions[:, -1:] + 1, rows.seen + 1


def _prefixes(asked: Sequence[Encoded]) -> list[_Prefix]:
    """Dialogues sorted by what they share, each in exactly one place."""
    groups: dict[Hashable, list[int]] = {}
    for number, one in enumerate(asked):
        same: Hashable = (one.marks, tuple(one.ids[: one.ends])) if one.known else id(one.images) if one.images else None
        groups.setdefault(same, []).append(number)
    found = []
    for numbers in groups.values():
        first, shared = asked[numbers[0]], common([asked[n].ids for n in numbers])
        if shared and shared >= first.ends:
            found.append(_Prefix(first.ids[:shared], first, lines=numbers))
        else:
            found.extend(_Prefix(asked[n].ids[:-1], asked[n], lines=[n]) for n in numbers)
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

    store = DynamicCache()
    like = next((p.entry for p in prefixes if p.entry is not None), None)
    if like is None:
        return store
    rows = {prefix: [r for r, p in enumerate(prefixes) if p is prefix] for prefix in dict.fromkeys(prefixes)}
    store.layers = []
    for number, made in enumerate(like.layers):
        keys, values = (part.new_zeros((len(prefixes), part.shape[1], before + room, part.shape[3])) for part in made)
        for prefix, places in rows.items():
            if prefix.entry is not None:
                first, last, start = places[0], places[-1] + 1, before - len(prefix.ids)  # rows of a prefix lie together
                prefix.entry.write(number, keys[first:last, :, start:], values[first:last, :, start:], len(prefix.ids))
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
