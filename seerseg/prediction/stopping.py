"""Ending a run early but in order: the first signal asks, the second insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopOnSignals:
    """While entered, SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT set a flag that calling the object returns.

    A second SIGINT or SIGTERM acts as it did before. In a thread that is not the main one it catches nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.received is not None

    def __enter__(self) -> StopOnSignals:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore(keep=getattr(signal, "SIGUSR1", None))

    def _restore(self, keep: int | None = None) -> None:
        for number in list(self._before):
            if number != keep:
                signal.signal(number, self._before.pop(number))
