"""Packs of single experts on the serving device: those that were used last. All others are in host RAM alone.

With routing by prompt a request computes with one expert, and an update changes one. So of eight experts two are on the
device, 10 MB each at width 2048 and rank 40 in 32 linears in half precision, and another one comes when a prompt asks
for it. Which version it is of does not change by that: masters are replaced and never written to, so what an expert was
in a version can be built again for as long as somebody holds the version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from threading import Lock
from weakref import WeakKeyDictionary

import torch

from ogpstream.memory.experts import Expert
from ogpstream.memory.served import Served


@dataclass(frozen=True, eq=False)
class Part:
    """One expert in a version.

    Attributes:
        expert: a copy of what it computes with in this version.
        gate: the factor on what it adds.
    """

    expert: Expert
    gate: float
    shelf: Shelf = field(repr=False)

    @property
    def served(self) -> Served:
        """A version of this expert alone, on the device.

        Raises:
            torch.OutOfMemoryError: there is no room for it, though nothing else is on the shelf.
        """
        return self.shelf.find(self)

    def taken(self) -> Taken:
        """This one, on the device for as long as somebody holds what is returned."""
        return Taken(self.expert, self.gate, self.served)

    def is_like(self, other: Part) -> bool:
        """Whether the packs of both are the same."""
        return (self.gate == other.gate and self.expert.factors is other.expert.factors
                and all(map(is_, self.expert.held, other.expert.held)))


@dataclass(frozen=True, eq=False)
class Taken:
    """A part with its packs."""

    expert: Expert
    gate: float
    served: Served

    def taken(self) -> Taken:
        return self


class Shelf:
    """The packs of parts, by part; what nobody has a version of any more leaves by itself.

    Requests and updates may ask at the same time.

    Args:
        most: experts that are on it; the least recently used one makes room.
        build: the packs of a part.
    """

    def __init__(self, most: int, build: Callable[[Part], Served]) -> None:
        self._most, self._build = most, build
        # in the order of their last use
        self._held: WeakKeyDictionary[Part, Served] = WeakKeyDictionary()
        self._lock = Lock()

    def __contains__(self, part: Part) -> bool:
        with self._lock:
            return part in self._held

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of those on it, the last used first."""
        with self._lock:
            return self._names()

    def find(self, part: Part) -> Served:
        """The packs of a part, built if they are not on the shelf."""
        with self._lock:
            found = self._held.pop(part, None)
            if found is None:
                self._make_room(part.expert.name)
                try:
                    found = self._build(part)
                except torch.OutOfMemoryError:
                    # what was computed is held by the exception, so room is made after this block
                    pass
            if found is None:
                self._held.clear()
                torch.cuda.empty_cache()
                found = self._build(part)
            self._held[part] = found
            return found

    def put(self, part: Part, packs: Served) -> None:
        """Take packs that were built elsewhere."""
        with self._lock:
            self._make_room(part.expert.name)
            self._held[part] = packs

    def _names(self) -> tuple[str, ...]:
        # by the last use of any part of each: older versions may be held too
        return tuple(dict.fromkeys(part.expert.name for part in reversed(list(self._held))))

    def _make_room(self, name: str) -> None:
        """Keep the last used experts, one less than there is room for; parts of one more name may come then."""
        others = [other for other in self._names() if other != name]
        leaving = set(others[max(0, self._most - 1) :])
        for part in [part for part in self._held if part.expert.name in leaving]:
            del self._held[part]
