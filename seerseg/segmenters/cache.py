"""Memory for a segmenter's answers: in a GRPO group, and over paraphrases of one request, most prompts repeat."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from seerseg.errors import SegmenterError
from seerseg.prompts import Prompt
from seerseg.segmenters.base import Segmentation, Segmenter, Status, Wrapping
from seerseg.segmenters.packed import PackedMask
from seerseg.volume import Mask, Volume

Key = tuple[str, int, str, str]
OVERHEAD_BYTES = 1024
"""Charged for each answer beside its bits: keys, prompt-free fields and the containers they lie in."""


@dataclass(frozen=True)
class CacheStatistics:
    """hits: prompts answered without the segmenter (from memory, from a twin in the same call, or from another thread's
    computation); misses: prompts forwarded; evictions; entries and bytes held now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


@dataclass(frozen=True, eq=False)
class _Answer:
    """One answer; voxels: None when there is no mask."""

    status: Status
    voxels: PackedMask | None
    name: str
    presence: float | None
    message: str
    nearest: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return OVERHEAD_BYTES + (0 if self.voxels is None else self.voxels.bits.nbytes) + len(self.message) + len(self.name)


class CachedSegmenter(Wrapping):
    """A segmenter that remembers what `segmenter` answered, keyed by (volume.content_hash, volume.channel, card.identity, prompt.key).

    Masks are bit-identical to the uncached ones and fresh arrays each time. At most `max_bytes` are held, the least recently used
    dropped first. Thread-safe: two threads that ask for the same thing compute it once; a call's misses go to the segmenter in one
    call, so they share its image encoding. A failed computation is not remembered. Sessions go to the segmenter unremembered.
    """

    def __init__(self, segmenter: Segmenter, *, max_bytes: int = 256 * 2**20) -> None:
        if max_bytes < 0:
            raise SegmenterError(f"The segmenter cache cannot hold {max_bytes} bytes; give 0 or more.")
        super().__init__(segmenter)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, _Answer] = OrderedDict()
        self._pending: dict[Key, Future[_Answer]] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    @property
    def wrapped(self) -> Segmenter:
        """The segmenter that is remembered, for work in which nothing repeats."""
        return self._segmenter

    @property
    def statistics(self) -> CacheStatistics:
        """Counts since it was made."""
        with self._lock:
            return CacheStatistics(self._hits, self._misses, self._evictions, len(self._held), self._bytes)

    def clear(self) -> None:
        """Forget all answers; counts are kept."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """As `Segmenter.segment`; `seconds` of a remembered answer is the time it took to remember it."""
        identity = self._segmenter.card.identity
        keys: list[Key] = [(volume.content_hash, volume.channel, identity, prompt.key) for prompt in prompts]
        made: dict[int, Segmentation] = {}
        answers: dict[Key, _Answer] = {}
        counted: set[Key] = set()
        while len(answers) < len(set(keys)):
            own, awaited = self._claim([key for key in dict.fromkeys(keys) if key not in answers], answers)
            if own:
                self._compute(volume, prompts, keys, own, made, answers)
                counted.update(own)
            for key, future in awaited.items():
                try:
                    answers[key] = future.result()
                except Exception:  # the other thread's fault may be one of its own prompts': this thread asks again for itself
                    continue
        with self._lock:
            self._hits += len(keys) - len(counted)
            self._misses += len(counted)
        return [made[i] if i in made else _unpacked(volume, prompts[i], answers[key]) for i, key in enumerate(keys)]

    def _claim(self, wanted: list[Key], answers: dict[Key, _Answer]) -> tuple[list[Key], dict[Key, Future[_Answer]]]:
        """Sort the wanted keys into remembered (put in `answers`), to be computed here, and being computed by another thread."""
        own: list[Key] = []
        awaited: dict[Key, Future[_Answer]] = {}
        with self._lock:
            for key in wanted:
                if key in self._held:
                    self._held.move_to_end(key)
                    answers[key] = self._held[key]
                elif key in self._pending:
                    awaited[key] = self._pending[key]
                else:
                    self._pending[key] = Future()
                    own.append(key)
        return own, awaited

    def _compute(
        self,
        volume: Volume,
        prompts: Sequence[Prompt],
        keys: list[Key],
        own: list[Key],
        made: dict[int, Segmentation],
        answers: dict[Key, _Answer],
    ) -> None:
        """One call of the segmenter for the keys claimed here; each first asker gets the segmenter's own object."""
        first = [keys.index(key) for key in own]
        try:
            results = self._segmenter.segment(volume, [prompts[i] for i in first])
            if len(results) != len(own):
                raise SegmenterError(f"The segmenter {self.card.name} answered {len(own)} prompts with {len(results)} results.")
            packed = [_packed(result) for result in results]
        except BaseException as fault:
            with self._lock:
                futures = [self._pending.pop(key) for key in own]
            for future in futures:
                future.set_exception(fault if isinstance(fault, Exception) else SegmenterError("The computation was interrupted."))
            raise
        for i, key, result, answer in zip(first, own, results, packed, strict=True):
            made[i], answers[key] = result, answer
            with self._lock:
                self._keep(key, answer)
                future = self._pending.pop(key)
            future.set_result(answer)

    def _keep(self, key: Key, answer: _Answer) -> None:
        if answer.bytes > self._max_bytes:
            return
        self._held[key] = answer
        self._bytes += answer.bytes
        while self._bytes > self._max_bytes:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= dropped.bytes
            self._evictions += 1


def _packed(result: Segmentation) -> _Answer:
    mask = result.mask
    voxels = None if mask is None else PackedMask.of(mask.array)
    return _Answer(result.status, voxels, "" if mask is None else mask.name, result.presence, result.message, result.nearest)


def _unpacked(volume: Volume, prompt: Prompt, answer: _Answer) -> Segmentation:
    start = time.perf_counter()
    mask = None if answer.voxels is None else Mask(answer.voxels.unpacked(volume.grid.shape_zyx), volume.grid, answer.name)
    seconds = time.perf_counter() - start
    return Segmentation(prompt, answer.status, mask, answer.presence, answer.message, answer.nearest, seconds)
