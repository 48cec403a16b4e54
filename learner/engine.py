"""What the idle loop asks of a server: whether it is idle, a lock between generations, and a word after each publish.

Every engine keeps the same promise: while `exclusive` is held no generation is half-way and none starts, so a version
that is published inside it is never mixed with another one; and whoever waits for the lock gets it before the loop
has it again, so that a request waits for one unit at most, however wrong the hint `is_idle` may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class EngineBusy(Exception):
    """A generation is half-way and the engine cannot wait for its end; the loop tries again later."""


class Engine(Protocol):
    """A server that the idle loop shares the model with."""

    def is_idle(self) -> bool:
        """Whether no request runs or waits: a hint, asked at every unit from the loop's thread, so it must be cheap."""

    def exclusive(self) -> AbstractContextManager[None]:
        """The lock, held by the loop for one unit at a time.

        Raises:
            EngineBusy: on entry, see there.
        """

    def adapter_changed(self, version: int) -> None:
        """Told inside the lock that `version` is served from now on: drop what was cached under another one."""


class LoopEngine:
    """The engine of a plain loop of the user's, which puts every generation into `request`.

        with engine.request(), learner.pinned() as version:
            tokens = model.generate(**inputs)

    Several threads may have requests at once. Otherwise the lock is had by turns: the idle loop never takes it twice
    in a row while a request waits, and requests one after the other let it in between two of them.

    Args:
        on_change: called with the new version inside the lock; where a prefix cache is cleared. It needs none where
            the cache is keyed by the version that `learner.pinned` names.
    """

    def __init__(self, on_change: Callable[[int], None] | None = None) -> None:
        self._on_change = on_change
        self._turn = threading.Condition()
        self._running = 0  # requests inside
        self._waiting = 0  # requests before the lock
        self._learning = False  # the idle loop is inside
        self._asked = False  # the idle loop is before the lock
        self._learned_last = False  # the idle loop had the last turn

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold the model for one generation; waits for the unit that is being done, or whose turn it is."""
        with self._turn:
            self._waiting += 1
            try:
                self._turn.wait_for(self._request_may)
            finally:
                self._waiting -= 1
            self._running += 1
            self._learned_last = False
        try:
            yield
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def is_idle(self) -> bool:
        return not (self._running or self._waiting)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the requests inside to end."""
        with self._turn:
            self._asked = True
            try:
                self._turn.wait_for(lambda: not self._running and not (self._waiting and self._learned_last))
            finally:
                self._asked = False
            self._learning = True
        try:
            yield
        finally:
            with self._turn:
                self._learning, self._learned_last = False, True
                self._turn.notify_all()

    def adapter_changed(self, version: int) -> None:
        if self._on_change is not None:
            self._on_change(version)

    def _request_may(self) -> bool:
        # beside another request the idle loop cannot go first, and to hold this one up would help nobody
        its_turn = self._asked and not self._learned_last and not self._running
        return not self._learning and not its_turn
