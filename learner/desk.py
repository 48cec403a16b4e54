"""A learner that several threads want and one has: those who submit go before the one that learns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ogpstream.learner.errors import StateError
from ogpstream.learner.learner import StreamLearner


class Desk:
    """Reserves a learner for its users; it refuses whoever comes another way.

    Raises:
        StateError: it is reserved already.
    """

    def __init__(self, learner: StreamLearner) -> None:
        if learner.queue.reserved_for is not None:
            raise StateError("another IdleLoop drives this learner: close it first")
        learner.queue.reserved_for = 0
        self.learner = learner
        self.closed = False
        self._turn = threading.Condition()
        self._taken = False
        self._asking = 0

    @contextmanager
    def asking(self) -> Iterator[StreamLearner]:
        """The learner for a moment, after at most one unit.

        Raises:
            StateError: the desk was closed, or this thread has the learner and would wait for itself.
        """
        if self.learner.queue.reserved_for == threading.get_ident():
            raise StateError("this thread has the learner now: use the one that the call was given")
        with self._turn:
            self._asking += 1
            try:
                self._turn.wait_for(lambda: not self._taken)
            finally:
                self._asking -= 1
            self.check_open()
            self._taken = True
        with self._taking():
            yield self.learner

    @contextmanager
    def learning(self) -> Iterator[StreamLearner]:
        """The learner for one unit, after all who ask; a plain lock, taken again at once, would starve them."""
        with self._turn:
            self._turn.wait_for(lambda: not (self._taken or self._asking))
            self._taken = True
        with self._taking():
            yield self.learner

    def check_open(self) -> None:
        if self.closed:
            raise StateError("the idle loop is closed")

    def shut(self) -> bool:
        """Let nobody in any more who asks; False if that was done before."""
        with self._turn:
            was, self.closed = self.closed, True
        return not was

    @contextmanager
    def _taking(self) -> Iterator[None]:
        self.learner.queue.reserved_for = threading.get_ident()
        try:
            yield
        finally:
            self.learner.queue.reserved_for = 0
            with self._turn:
                self._taken = False
                self._turn.notify_all()
