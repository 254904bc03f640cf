"""Four stages that overlap: read and write in threads, reason in one thread, draw in the calling thread.

What is in flight is bounded in bytes, once for all stages: a case is admitted when its bytes fit beside those of the cases
that are somewhere between reading and written, or when nothing else is in flight. Cases leave in the order in which they
are done. A stage that raises ends the run: every other stage is woken, all threads are joined, and the exception is
raised in the caller. What is wrong with one case alone a stage must return as a result, not raise.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.2
_END = object()


class Budget:
    """Bytes that may be in flight. At least one holder is always admitted, however much it needs."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._held = 0
        self._holders = 0
        self._changed = threading.Condition()

    def acquire(self, needed_bytes: int, cancelled: Callable[[], bool]) -> bool:
        """Wait until the bytes fit; False when cancelled first."""
        with self._changed:
            while not cancelled():
                if not self._holders or self._held + needed_bytes <= self.limit_bytes:
                    self._held += needed_bytes
                    self._holders += 1
                    self.peak_bytes = max(self.peak_bytes, self._held)
                    return True
                self._changed.wait(_POLL_S)
        return False

    def release(self, needed_bytes: int) -> None:
        """Give back what `acquire` granted."""
        with self._changed:
            self._held -= needed_bytes
            self._holders -= 1
            self._changed.notify_all()


class Pipeline(Generic[T]):
    """read(item) -> a; think(a) -> b; draw(b) -> c; write(c). `draw` runs in the thread that calls `run`, so does
    everything with overlap=False.

    settled(item): True for one that needs no stage, as it was done before; asked first, in a reading thread. cost_bytes(item): what
    the item holds while in flight; stopping(): True asks to finish what is being drawn or written and to
    start nothing more.
    """

    def __init__(
        self,
        *,
        read: Callable[[T], Any],
        think: Callable[[Any], Any],
        draw: Callable[[Any], Any],
        write: Callable[[Any], None],
        cost_bytes: Callable[[T], int],
        limit_bytes: int,
        readers: int = 1,
        writers: int = 1,
        overlap: bool = True,
        stopping: Callable[[], bool] = lambda: False,
        settled: Callable[[T], bool] = lambda item: False,
    ) -> None:
        self._settled = settled
        self._read, self._think, self._draw, self._write = read, think, draw, write
        self._cost_bytes, self._stopping, self._overlap = cost_bytes, stopping, overlap
        self._readers, self._writers = max(1, readers), max(1, writers)
        self.budget = Budget(limit_bytes)
        self._to_think: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_draw: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._fault: BaseException | None = None
        self._lock = threading.Lock()
        self._reading = self._readers

    def run(self, items: Sequence[T]) -> None:
        """Work through the items; returns when all are written or, when stopping, when what was begun is."""
        if not self._overlap:
            self._run_serially(items)
            return
        source = iter(items)
        threads = [self._thread(f"read-{i}", lambda: self._reader(source)) for i in range(self._readers)]
        threads += [self._thread("reason", self._thinker)]
        threads += [self._thread(f"write-{i}", self._writer) for i in range(self._writers)]
        for thread in threads:
            thread.start()
        try:
            self._drawer()
        except BaseException as fault:
            self._fail(fault)
        finally:
            for _ in range(self._writers):
                self._to_write.put(_END)
            for thread in threads:
                thread.join()
        if self._fault is not None:
            raise self._fault

    def _run_serially(self, items: Sequence[T]) -> None:
        for item in items:
            if self._stopping():
                return
            if not self._settled(item):
                self._write(self._draw(self._think(self._read(item))))

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            try:
                work()
            except BaseException as fault:
                self._fail(fault)

        return threading.Thread(target=body, name=f"seerseg-{name}", daemon=True)

    def _fail(self, fault: BaseException) -> None:
        with self._lock:
            if self._fault is None:
                self._fault = fault
        for waiting in (self._to_think, self._to_draw):
            waiting.put(_END)
        for _ in range(self._writers):
            self._to_write.put(_END)

    def _ending(self) -> bool:
        return self._fault is not None or self._stopping()

    def _reader(self, source: Any) -> None:
        while not self._ending():
            with self._lock:
                item: Any = next(source, _END)
            if item is _END:
                break
            if self._settled(item):
                continue
            cost = self._cost_bytes(item)
            if not self.budget.acquire(cost, self._ending):
                break
            self._to_think.put((self._read(item), cost))
            del item
        with self._lock:
            self._reading -= 1
            last = self._reading == 0
        if last:
            self._to_think.put(_END)

    def _thinker(self) -> None:
        while (got := self._to_think.get()) is not _END and self._fault is None:
            value, cost = got
            if self._stopping():
                self.budget.release(cost)
                continue
            self._to_draw.put((self._think(value), cost))
            del got, value
        self._to_draw.put(_END)

    def _drawer(self) -> None:
        while (got := self._to_draw.get()) is not _END and self._fault is None:
            value, cost = got
            if self._stopping():
                self.budget.release(cost)
                continue
            self._to_write.put((self._draw(value), cost))
            del got, value

    def _writer(self) -> None:
        while (got := self._to_write.get()) is not _END:
            value, cost = got
            self._write(value)
            del got, value
            self.budget.release(cost)
