"""Doing one thing with many items in several processes, any of which may be killed.

Not a ProcessPoolExecutor: when the system kills one process for lack of memory, an executor loses every item in flight and
cannot say whose fault it was. Here each process has one item at a time, so the item is known, and the rest goes on.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from seerseg.errors import InterruptedRunError, SeerSegError

Item = TypeVar("Item")
Result = TypeVar("Result")
_TOLD_TO_STOP = (-signal.SIGTERM, -signal.SIGINT)


@dataclass(frozen=True)
class Died(Generic[Item]):
    """The process that worked on `item` ended without an answer; how: "was killed by SIGKILL", "ended with code 1"."""

    item: Item
    how: str


@dataclass
class _Worker(Generic[Item]):
    process: BaseProcess
    connection: Connection
    item: Item | None = None


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, *, preload: Sequence[str] = ()
) -> Iterator[Result | Died[Item]]:
    """`function(item)` for every item, in the order of completion; a `Died` for an item whose process ended.

    function: importable by name (it is pickled), returns what can be pickled; what it raises is raised here and ends the run.
    preload: modules that all processes need, imported once. InterruptedRunError when a process was told to stop (SIGTERM).
    Closing the iterator ends the processes; they also end by themselves when this process is gone.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(preload))
    waiting = deque(items)
    pool: list[_Worker[Item]] = []
    try:
        while waiting or any(worker.item is not None for worker in pool):
            while waiting and len(pool) < workers:
                pool.append(_start(context, function))
            for worker in pool:
                if worker.item is None and waiting:
                    _give(worker, waiting.popleft())
            ready = wait([worker.connection for worker in pool if worker.item is not None])
            for worker in [worker for worker in pool if worker.connection in ready]:
                item, worker.item = worker.item, None
                try:
                    result, error = worker.connection.recv()
                except (EOFError, OSError):
                    pool.remove(worker)
                    yield Died(item, _end_of(worker))  # type: ignore[arg-type]
                    continue
                if error is not None:
                    raise error
                yield result
    finally:
        for worker in pool:
            worker.connection.close()
        for worker in pool:
            worker.process.terminate()
            worker.process.join()


def each(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, *, preload: Sequence[str] = ()
) -> Iterator[tuple[Item, Result | SeerSegError]]:
    """(item, function(item)) as results come; a SeerSegError that the function raises, or that tells of a process that died,
    comes in the place of its result. With one worker everything happens in this process."""
    numbered = list(enumerate(items))
    if workers <= 1 or len(numbered) <= 1:
        for item in items:
            yield item, _guarded(function, item)
        return
    for answer in run_in_processes(_Numbered(function), numbered, min(workers, len(numbered)), preload=preload):
        if isinstance(answer, Died):
            item = answer.item[1]
            name = getattr(item, "id", item)
            remedy = "Use fewer workers (-np), or a machine with more memory."
            yield item, SeerSegError(f"The process that worked on {name} {answer.how}, probably for want of memory. {remedy}")
        else:
            yield items[answer[0]], answer[1]


@dataclass(frozen=True)
class _Numbered(Generic[Item, Result]):
    function: Callable[[Item], Result]

    def __call__(self, numbered: tuple[int, Item]) -> tuple[int, Result | SeerSegError]:
        return numbered[0], _guarded(self.function, numbered[1])


def _guarded(function: Callable[[Item], Result], item: Item) -> Result | SeerSegError:
    try:
        return function(item)
    except SeerSegError as error:
        return error


def _start(context: Any, function: Callable[[Item], Result]) -> _Worker[Item]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker[Item], item: Item) -> None:
    worker.item = item
    try:
        worker.connection.send(item)
    except OSError:
        pass  # the process is gone: receiving from it will say so


def _end_of(worker: _Worker[Item]) -> str:
    worker.connection.close()
    worker.process.join()
    code = worker.process.exitcode
    if code in _TOLD_TO_STOP:
        raise InterruptedRunError("The run was stopped by a signal. Run the same command again to continue.")
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _serve(connection: Connection, function: Callable[[Item], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Result | None, Exception | None] = (function(item), None)
        except Exception as error:
            answer = (None, error)
        try:
            connection.send(answer)
        except OSError:
            return
