"""At most one unit queued on a CUDA device behind the running one, so that a request waits for two at most."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch


class Event(Protocol):
    """What is needed of a `torch.cuda.Event`."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Fence:
    """Bounds how far a learning thread runs ahead of its device; on a CPU a unit is done when its call returns.

    Args:
        device: where the units run, on its current stream in the calling thread.
        record: gives an event behind all that was queued; a CUDA event if None.
    """

    def __init__(self, device: torch.device, record: Callable[[], Event] | None = None) -> None:
        self._record = record or (partial(_cuda_event, device) if device.type == "cuda" else None)
        self._events: deque[Event] = deque()  # one of each unit that may still run or wait, oldest first

    def wait(self) -> None:
        """Before a unit is queued: wait until at most one other is not done."""
        while len(self._events) > 1:
            self._events.popleft().synchronize()

    def mark(self) -> None:
        """A unit was queued."""
        if self._record is not None:
            self._events.append(self._record())

    def ahead(self) -> int:
        """Units that run or wait on the device, 0 to 2: what a request that comes now waits for."""
        while self._events and self._events[0].query():
            self._events.popleft()
        return len(self._events)


def _cuda_event(device: torch.device) -> Event:
    # blocking: the waiting thread sleeps instead of spinning on a core that the server needs
    event = torch.cuda.Event(blocking=True)
    # the current device of the thread may be another one
    event.record(torch.cuda.current_stream(device))
    return event
