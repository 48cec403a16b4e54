"""A published version of the experts, on the serving device: what the adapted linears compute with.

A version is new tensors, never written to again: whoever holds one can compute with it for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ogpstream.memory.room import Sources
from ogpstream.memory.scope import Scope

if TYPE_CHECKING:
    from ogpstream.memory.shelf import Part, Taken


@dataclass(frozen=True)
class Pack:
    """All active experts at one site: y += (x A * scale) B.

    A `[D_in, R]` and B `[R, D_out]` in the serving dtype, scale `[R]` in float32 or wider. The plastic
    columns of all experts come first (`trained` gives each one's slice), then their held columns.
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    trained: Mapping[str, slice]


@dataclass(frozen=True)
class Served:
    """One published version: a pack per site, on the serving device; `made_of` tells the next one what to copy anew.

    Where experts are kept apart, a version of several has no packs but `parts`. What these add is summed up, and the
    next version has those again that stay as they are.
    """

    version: int
    experts: tuple[str, ...]
    gates: tuple[float, ...]
    packs: tuple[Pack, ...]
    made_of: Sources | None = field(default=None, repr=False, compare=False)
    scope: Scope = field(default_factory=Scope, repr=False, compare=False)
    parts: tuple[Part | Taken, ...] | None = field(default=None, repr=False, compare=False)

    @property
    def each(self) -> tuple[Served, ...]:
        """Versions with packs that together are this one, on the device now."""
        return (self,) if self.parts is None else tuple(part.served for part in self.parts)

    def taken(self) -> Served:
        """This version with all of its packs on the device for as long as somebody holds what is returned."""
        if self.parts is None:
            return self
        return replace(self, parts=tuple(part.taken() for part in self.parts))

    def only(self, names: Collection[str]) -> Served:
        """This version without the other experts, or on a GPU with their gates at 0.

        There the matrices stay and the scales are new, which takes hardly any memory. A CPU computes every column, so
        those of the others are left out: with five experts an update at width 256 takes 1.2 times as long with them.
        """
        if set(self.experts).issubset(names):
            return self
        if self.parts is not None:
            parts = tuple(part for part in self.parts if part.expert.name in names)
            if len(parts) == 1:
                return replace(parts[0].served, version=self.version, scope=self.scope)
            return replace(self, experts=tuple(part.expert.name for part in parts),
                           gates=tuple(part.gate for part in parts), parts=parts)
        assert self.made_of is not None
        ranks = [columns.stop - columns.start for columns in self.packs[0].trained.values()]
        cut = self.packs[0].A.device.type == "cpu"
        trained = side_by_side({name: rank for name, rank in zip(self.experts, ranks, strict=True) if name in names})
        columns: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        packs = []
        for index, pack in enumerate(self.packs):
            # packs of one version share a scale where their columns are alike
            key = id(pack.scale)
            if key not in scales:
                held = [parts[index].rank for _, parts in self.made_of.experts]
                owners = [name for widths in (ranks, held) for name, width in zip(self.experts, widths, strict=True)
                          for _ in range(width)]
                owners += [""] * (len(pack.scale) - len(owners))
                kept = torch.tensor([name in names for name in owners], device=pack.scale.device)
                columns[key] = kept.nonzero()[:, 0]
                scales[key] = pack.scale[columns[key]] if cut else torch.where(kept, pack.scale, 0.0)
            if cut:
                pack = replace(pack, A=pack.A[:, columns[key]], B=pack.B[columns[key]], trained=trained)
            packs.append(replace(pack, scale=scales[key]))
        if not cut:
            return replace(self, packs=tuple(packs))
        own = [number for number, name in enumerate(self.experts) if name in names]
        made_of = replace(self.made_of, gates={self.experts[number]: self.gates[number] for number in own},
                          experts=[self.made_of.experts[number] for number in own])
        return replace(self, packs=tuple(packs), experts=tuple(made_of.gates), gates=tuple(made_of.gates.values()),
                       made_of=made_of)


def side_by_side(ranks: Mapping[str, int]) -> dict[str, slice]:
    """The plastic columns of experts of these ranks, one after the other."""
    ends = accumulate(ranks.values())
    return {name: slice(end - rank, end) for (name, rank), end in zip(ranks.items(), ends, strict=True)}
