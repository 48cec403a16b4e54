"""Futures of what was handed to the idle loop, completed outside all locks: whoever waits may call the loop at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ogpstream.learner.report import SampleReport


def promise() -> Future[Any]:
    """A future that cannot be cancelled: what is acknowledged will be done."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class Tickets:
    """Who waits for which record, by its number in the journal; oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Future[SampleReport], float]] = {}
        self._settled: list[Callable[[], None]] = []

    def add(self, number: int, now: float) -> Future[SampleReport]:
        future = promise()
        with self._lock:
            self._open[number] = (future, now)
        return future

    def oldest(self) -> float | None:
        """When the oldest open ticket was added."""
        with self._lock:
            return next((since for _, since in self._open.values()), None)

    def settle(self, number: int, outcome: SampleReport | Exception) -> None:
        """Close a ticket, if there is one."""
        with self._lock:
            future, _ = self._open.pop(number, (None, 0.0))
            if future is not None:
                self._settled.append(partial(_complete, future, outcome))

    def settle_all(self, error: Exception) -> None:
        for number in tuple(self._open):
            self.settle(number, error)

    def later(self, future: Future[Any], outcome: Any) -> None:
        """Complete another future together with the tickets; an exception is raised by it."""
        with self._lock:
            self._settled.append(partial(_complete, future, outcome))

    def tell(self) -> None:
        """Complete all that was settled."""
        with self._lock:
            settled, self._settled = self._settled, []
        for complete in settled:
            complete()


def _complete(future: Future[Any], outcome: Any) -> None:
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
