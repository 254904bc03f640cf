"""Ending a run early but in order: a signal asks, Ctrl-C a second time insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopOnSignals:
    """While entered, SIGTERM, SIGUSR1 (Slurm's warning) and SIGINT set a flag that calling the object returns.

    After one SIGINT the next acts as it did before; the others may come as often as a scheduler sends them. In a thread that is
    not the main one nothing is caught.
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
        for number in list(self._before):
            signal.signal(number, self._before.pop(number))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))
