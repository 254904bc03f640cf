"""The same function over many items in several processes, in completion order, with no item able to end the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from seerseg.errors import SeerSegError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4


def each(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result | SeerSegError]]:
    """(item, function(item)) as results come; a SeerSegError that the function raises comes in the place of its result.

    With one worker everything happens in this process. Otherwise `function` must be importable by name, as new processes
    are spawned, never forked; what is queued is bounded. A worker that dies ends the run with a sentence.
    """
    workers = max(1, min(workers, len(items)))
    if workers == 1:
        for item in items:
            yield item, _guarded(function, item)
        return
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    waiting = iter(items)
    running: dict[Future[Result | SeerSegError], Item] = {}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread)
    try:
        for _ in range(workers * _AHEAD):
            for item in _next(waiting):
                running[pool.submit(_guarded, function, item)] = item
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                item = running.pop(future)
                for following in _next(waiting):
                    running[pool.submit(_guarded, function, following)] = following
                yield item, result
    except BrokenProcessPool as error:
        raise SeerSegError(
            f"A worker process died without a word, most likely because memory ran out ({workers} workers were running). "
            "Run the same command again with fewer, for example -np 1."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(items: Iterator[Item]) -> list[Item]:
    return [item for item in (next(items, None),) if item is not None]


def _guarded(function: Callable[[Item], Result], item: Item) -> Result | SeerSegError:
    try:
        return function(item)
    except SeerSegError as error:
        return error


def _one_thread() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
