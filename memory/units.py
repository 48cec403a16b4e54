"""Work in units: generators that stop after each, so that a request waits for one."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

# the unit before one that only writes to the state folder, and touches neither model nor device
WRITES = "writes"

S = TypeVar("S")
T = TypeVar("T")


def named(unit: str, work: Generator[None, None, T]) -> Generator[str, None, T]:
    """The units of a work under a name, and its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        yield unit


def exhausted(work: Generator[S, None, T]) -> T:
    """The result of a work that is done at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
