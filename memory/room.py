"""The memory that a new version of served packs is built in, taken beforehand, and what the newest one was made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ogpstream.memory.experts import Held


@dataclass(frozen=True)
class Room:
    """All memory on the serving device that a new version takes.

    Attributes:
        slab: for the packs, in the serving dtype.
        scales: for the scale of each column of each site.
        factor: for one factor of one expert in the masters' dtype, on its way; empty where masters are served.
    """

    slab: Tensor
    scales: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Sources:
    """What packs were made of. Masters are replaced whole, so a part that is the same object needs no new copy.

    Attributes:
        gates: of the active experts, in their order.
        slab: of the packs.
        experts: the factors and held parts of each.
    """

    gates: dict[str, float]
    slab: Tensor
    experts: list[tuple[Tensor, list[Held]]]

    def part(self, number: int, site: int) -> Tensor | Held:
        """Of one site: the factors of each expert, then the held part of each."""
        factors, held = self.experts[number % len(self.experts)]
        return factors if number < len(self.experts) else held[site]

    def fits(self, other: Sources) -> bool:
        """Whether the matrices of both lie at the same places."""
        def shapes(sources: Sources) -> list[tuple[int, list[int]]]:
            return [(len(factors), [part.rank for part in held]) for factors, held in sources.experts]

        return list(self.gates) == list(other.gates) and shapes(self) == shapes(other)


def put(target: Tensor, source: Tensor, room: Room) -> None:
    """Write a factor of a master into a pack: on a device through `room.factor`, one after the other on one stream."""
    if source.device != target.device:
        source = room.factor[: source.numel()].view(source.shape).copy_(source, non_blocking=True)
    target.copy_(source)
