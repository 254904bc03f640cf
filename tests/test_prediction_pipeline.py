"""The pipeline overlaps, keeps its byte budget, and never hangs, whatever a stage does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from seerseg.prediction.pipeline import Pipeline


class Died(BaseException):
    """Not an Exception: what a stage that ends its thread raises."""


def make(log: list[Any], *, limit_bytes: int = 10, cost: int = 1, broken: str = "", at: int = 2, **settings: Any) -> Pipeline[int]:
    def stage(name: str) -> Callable[[Any], Any]:
        def work(value: int) -> int:
            if name == broken and value == at:
                raise Died(f"{name} {value}")
            time.sleep(0.005)
            if name == "write":
                log.append(value)
            return value

        return work

    stages = {name: stage(name) for name in ("read", "think", "draw", "write")}
    return Pipeline(**stages, cost_bytes=lambda _: cost, limit_bytes=limit_bytes, **settings)  # type: ignore[arg-type]


def run_in_time(pipeline: Pipeline[int], items: list[int], limit_s: float = 20.0) -> BaseException | None:
    """Run in a thread, so that a hang fails the test instead of stopping the suite."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            pipeline.run(items)
        except BaseException as fault:
            raised.append(fault)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive(), "the pipeline hangs"
    return raised[0] if raised else None


@pytest.mark.parametrize(("readers", "writers", "overlap"), [(1, 1, True), (3, 2, True), (1, 1, False)])
def test_every_item_is_written_once(readers: int, writers: int, overlap: bool) -> None:
    log: list[int] = []
    assert run_in_time(make(log, readers=readers, writers=writers, overlap=overlap), list(range(40))) is None
    assert sorted(log) == list(range(40))


@pytest.mark.parametrize("stage", ["read", "think", "draw", "write"])
@pytest.mark.parametrize("at", [0, 3, 19])
@pytest.mark.parametrize("limit_bytes", [1, 3, 1000])
def test_a_stage_that_dies_is_raised_in_the_caller_and_nothing_hangs(stage: str, at: int, limit_bytes: int) -> None:
    log: list[int] = []
    fault = run_in_time(make(log, broken=stage, at=at, limit_bytes=limit_bytes, readers=2, writers=2), list(range(20)))
    assert isinstance(fault, Died)
    assert str(fault) == f"{stage} {at}"
    assert at not in log
    assert not [t for t in threading.enumerate() if t.name.startswith("seerseg-")]


def test_bytes_in_flight_stay_within_the_limit() -> None:
    pipeline = make([], limit_bytes=10, cost=3, readers=4, writers=2)
    assert run_in_time(pipeline, list(range(30))) is None
    assert 3 <= pipeline.budget.peak_bytes <= 10


def test_a_case_larger_than_the_limit_goes_alone() -> None:
    log: list[int] = []
    pipeline = make(log, limit_bytes=10, cost=100, readers=3)
    assert run_in_time(pipeline, list(range(6))) is None
    assert sorted(log) == list(range(6))
    assert pipeline.budget.peak_bytes == 100


def test_stages_overlap() -> None:
    def slowly(value: int) -> int:
        time.sleep(0.05)
        return value

    def seconds(overlap: bool) -> float:
        pipeline = Pipeline[int](
            read=slowly,
            think=slowly,
            draw=slowly,
            write=lambda v: (slowly(v), None)[1],
            cost_bytes=lambda _: 1,
            limit_bytes=8,
            overlap=overlap,
        )
        started = time.perf_counter()
        pipeline.run(list(range(10)))
        return time.perf_counter() - started

    assert seconds(True) < 0.6 * seconds(False)


def test_completion_order_not_input_order() -> None:
    log: list[int] = []

    def read(value: int) -> int:
        time.sleep(0.3 if value == 0 else 0.0)
        return value

    pipeline = Pipeline[int](read=read, think=int, draw=int, write=log.append, cost_bytes=lambda _: 1, limit_bytes=100, readers=2)
    assert run_in_time(pipeline, list(range(6))) is None
    assert log[-1] == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_stopping_finishes_what_was_begun_and_starts_nothing_more(overlap: bool) -> None:
    log: list[int] = []
    stop = threading.Event()

    def draw(value: int) -> int:
        if value == 5:
            stop.set()
        return value

    pipeline = Pipeline[int](
        read=int, think=int, draw=draw, write=log.append, cost_bytes=lambda _: 1, limit_bytes=3, overlap=overlap, stopping=stop.is_set
    )
    assert run_in_time(pipeline, list(range(1000))) is None
    assert log == [0, 1, 2, 3, 4, 5]
