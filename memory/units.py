"""Work in units: generators that stop after each, so that a request waits for one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

# the unit before one that only writes to the state folder, and touches neither model nor device
WRITES = "writes"

S = TypeVar("S")
T = TypeVar("T")


class _Kept(Generic[S, T]):
    """A work whose result is there when its units are."""

    result: T

    def __init__(self, work: Generator[S, None, T]) -> None:
        self._work = work

    def __iter__(self) -> Generator[S, None, None]:
        self.result = yield from self._work


def named(unit: str, work: Generator[None, None, T]) -> Generator[str, None, T]:
    """The units of a work under a name, and its result."""
    kept = _Kept(work)
    for _ in kept:
        yield unit
    return kept.result


def exhausted(work: Generator[S, None, T]) -> T:
    """The result of a work that is done at once."""
    kept = _Kept(work)
    for _ in kept:
        pass
    return kept.result


def writing(write: Callable[[], object]) -> Generator[str, None, None]:
    """A write to the state folder, in a unit of its own."""
    yield WRITES
    write()
    yield "written"
