"""Beginnings of dialogues that went through a model before: their keys and values, so that images of earlier turns need not do so again.

An entry is known by its content, its tokens and the digests of the images shown among them, never by a name. It holds the keys and values
of its own tokens; those before are its parent's, so that dialogues which part after their opening share that. What is remembered is
bounded in bytes and forgotten as soon as a weight changes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

LEAST_BYTES = 128 << 20
"""What may be remembered of a small model; of a larger one a quarter of its weights' size."""
_VALUES = 8  # of a weight, looked at for changes


@dataclass(eq=False)
class Entry:
    """A beginning that went through the model. ids: its tokens from the start of the dialogue; marks: digests of all images shown in it;
    ends: tokens up to the end of the last image, fewer than which cannot be used; start: tokens whose keys and values are the
    parent's; layers: keys and values of the others, each (1, heads, tokens, dim); delta: what M-RoPE adds to the positions after it."""

    ids: list[int]
    marks: tuple[str, ...]
    ends: int
    delta: int
    start: int
    layers: list[tuple[Any, Any]]
    parent: Entry | None = None
    used: int = field(default=0, init=False)
    number: int = field(default=0, init=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its own keys and values."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in layer)

    def chain(self) -> Iterator[Entry]:
        """This one, its parent, and so on."""
        entry: Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.parent

    def write(self, layer: int, keys: Any, values: Any, length: int) -> None:
        """Put the first `length` tokens of a layer into (rows, heads, length, dim) buffers, the same into every row."""
        upto = length
        for entry in self.chain():
            own = entry.layers[layer]
            if entry.start < upto:
                keys[:, :, entry.start : upto] = own[0][:, :, : upto - entry.start]
                values[:, :, entry.start : upto] = own[1][:, :, : upto - entry.start]
                upto = entry.start


@dataclass(frozen=True, eq=False)
class Found:
    """A remembered beginning of a dialogue: the first `length` tokens of an entry, all its images among them."""

    entry: Entry
    length: int


class Prefixes:
    """What one model remembers. limit_bytes: how much, None: by the model's size, on a GPU no more than a quarter of what is free.

    What the call at hand has used is never forgotten for what it adds: when more dialogues take turns than there is room for, some of them
    are remembered in every turn rather than none. Methods may be called from several threads.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._wanted, self._limit = limit_bytes, limit_bytes or 0
        self._entries: list[Entry] = []
        self._state: Any = None
        self._clock = itertools.count(1)
        self._now = 0
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(entry.nbytes for entry in self._entries)

    def begin(self, model: Any) -> None:
        """A call begins. Forgets everything when weights have changed since the last one (`_state`)."""
        state = _state(model)
        with self._lock:
            if state != self._state:
                self._entries.clear()
                self._state = state
            self._now = next(self._clock)
            self._limit = _limit(model, self.held_bytes) if self._wanted is None else self._wanted

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._state = None

    def find(self, ids: Sequence[int], marks: tuple[str, ...], *, splits: bool) -> Found | None:
        """The longest remembered beginning of a dialogue; it counts as used now. splits: one that holds only some of the images will do."""
        ids = list(ids)
        with self._lock:
            best: Found | None = None
            for entry in self._entries:
                if entry.marks != marks[: len(entry.marks)] or not (splits or entry.marks == marks):
                    continue
                length = _alike(entry.ids, ids)
                if length >= max(entry.ends, 1) and (best is None or length > best.length):
                    best = Found(entry, length)
            if best is not None:
                self._use(best.entry)
            return best

    def keep(self, entry: Entry) -> None:
        """Remember, where there is room or can be made."""
        with self._lock:
            entry.number = next(self._numbers)
            self._use(entry)
            need, held = entry.nbytes, self.held_bytes
            if need > self._limit or (entry.parent is not None and entry.parent not in self._entries):
                return
            idle = sorted((e for e in self._entries if e.used < self._now), key=lambda e: (e.used, -e.number))  # children before parents
            going: set[int] = set()
            while held + need > self._limit and idle:
                gone = idle.pop(0)
                going.add(id(gone))
                held -= gone.nbytes
            if held + need <= self._limit:
                self._entries = [e for e in self._entries if id(e) not in going]
                self._entries.append(entry)

    def _use(self, entry: Entry) -> None:
        for one in entry.chain():
            one.used = self._now


def _alike(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return next(place for place in range(most) if first[place] != second[place])


def _state(model: Any) -> Any:
    """Something that is another after any change of weights, and in another precision: what torch counts, and, since it does not count
    what fused optimisers do, some values of every weight."""
    import torch

    weights = [w.detach() for w in itertools.chain(model.parameters(), model.buffers()) if w.device.type != "meta"]
    counts = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
    picked: dict[Any, list[Any]] = {}
    for weight in weights:
        flat = weight.view(-1) if weight.is_contiguous() else weight[:1].flatten()
        picked.setdefault((weight.device, weight.dtype), []).append(flat[:: max(1, len(flat) // _VALUES)])
    values = tuple(torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in picked.values())
    kind = model.device.type
    return counts, values, model.training, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def most_bytes(weights_bytes: int, limit_bytes: int | None = None) -> int:
    """What a model of that size may come to remember in main memory. limit_bytes: as of `Prefixes`."""
    return max(LEAST_BYTES, weights_bytes // 4) if limit_bytes is None else limit_bytes


def _limit(model: Any, held: int) -> int:
    import torch

    limit = most_bytes(sum(w.numel() * w.element_size() for w in model.parameters()))
    if model.device.type != "cuda":
        return limit
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return min(limit, (int(free) + held) // 4)
