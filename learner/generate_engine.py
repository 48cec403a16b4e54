"""The engine of transformers' generate thread, the one of `transformers serve` without continuous batching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol


class InferenceThread(Protocol):
    """What is needed of `transformers.cli.serving.utils.InferenceThread`, and of the `GenerateManager` around it."""

    def submit(self, fn: Callable[[], Any]) -> Future[Any]:
        """Run a callable on the one thread that generates, after what was submitted before."""


class GenerateEngine:
    """Parks the generate thread for each unit, so that a generation is whole or not begun.

    `model.generate` makes a new cache in every call, so no cache outlives a version.

    Args:
        thread: `GenerationState.get_manager(model_id)`, or an `InferenceThread` of one's own.
    """

    def __init__(self, thread: InferenceThread) -> None:
        self._thread = thread
        self._count = threading.Lock()
        self._requests = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request as running or waiting; around its submission and the wait for its result.

        A request that is submitted without it is served right as well, after one unit; but units may be done while
        it is in the thread's queue.
        """
        with self._count:
            self._requests += 1
        try:
            yield
        finally:
            with self._count:
                self._requests -= 1

    def is_idle(self) -> bool:
        return not self._requests

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the generations that were submitted before."""
        parked, done = threading.Event(), threading.Event()

        def park() -> None:
            parked.set()
            done.wait()

        self._thread.submit(park)
        try:
            # an interrupt here is not to leave the thread parked
            parked.wait()
            yield
        finally:
            done.set()

    def adapter_changed(self, version: int) -> None:
        """Nothing to drop."""
