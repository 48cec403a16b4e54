"""One expert (a named LoRA adapter): its plastic factors, its held part and the moments of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.pinned import host_zeros


@dataclass(frozen=True)
class Held:
    """What an expert did along the directions that were protected: U `[D_in, k]`, V `[k, D_out]`, k >= 0."""

    U: Tensor
    V: Tensor

    @classmethod
    def empty(cls, site: SiteShape, dtype: torch.dtype = torch.float32) -> Held:
        """The held part of rank 0, of an expert that was never folded."""
        return cls(torch.zeros(site.d_in, 0, dtype=dtype), torch.zeros(0, site.d_out, dtype=dtype))

    @property
    def rank(self) -> int:
        return self.U.shape[1]


# slabs that an expert may not have
_OPTIONAL = ("exp_avg", "exp_avg_sq", "average")


@dataclass
class Expert:
    """One adapter. Slabs are flat `[layout.numel]`, lists have one entry per site; tensors are replaced
    whole.

    `started` is the step at which the factors last started anew, or should have and it was put off; `average` is their
    running mean since they did. `frozen`: nothing changes what it computes. `folded` maps a basis key to the basis
    version the expert was last folded against. `discarded` sums the first discarded singular value of every cut of the
    held part since creation, `discarded_sq` the squares of all discarded ones.
    """

    name: str
    rank: int
    scaling: float
    layout: Layout
    factors: Tensor
    held: list[Held]
    discarded: list[float]
    discarded_sq: list[float]
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    average: Tensor | None = None
    steps: int = 0
    started: int = 0
    frozen: bool = False
    folded: dict[str, int] = field(default_factory=dict)

    def a(self, index: int) -> Tensor:
        """A of one site, `[D_in, r]`."""
        return self.layout.a(self.factors, index)

    def b(self, index: int) -> Tensor:
        """B of one site, `[r, D_out]`."""
        return self.layout.b(self.factors, index)

    def copy(self) -> Expert:
        """One that keeps these values whatever becomes of this one; it shares the tensors."""
        return replace(self, held=list(self.held), discarded=list(self.discarded),
                       discarded_sq=list(self.discarded_sq), folded=dict(self.folded))

    def computing(self) -> Expert:
        """A copy of what it computes with: no moments, and no mean, which a version would keep in host RAM."""
        return replace(self.copy(), exp_avg=None, exp_avg_sq=None, average=None)

    def restore(self, copy: Expert) -> None:
        """Take back the values of a copy."""
        for field_ in fields(self):
            setattr(self, field_.name, getattr(copy, field_.name))

    def delta(self, index: int) -> Tensor:
        """scaling * A B + U V of one site, `[D_in, D_out]`: what the expert adds at gate 1."""
        held = self.held[index]
        return self.scaling * (self.a(index) @ self.b(index)) + held.U @ held.V

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The expert as (tensors named "<expert>/...", JSON-able rest); the tensors are not copied."""
        slabs = {key: slab for key in ("factors", *_OPTIONAL) if (slab := getattr(self, key)) is not None}
        tensors = {f"{self.name}/{key}": slab for key, slab in slabs.items()}
        for index, held in enumerate(self.held):
            if held.rank:
                tensors[f"{self.name}/held/{index}/U"] = held.U
                tensors[f"{self.name}/held/{index}/V"] = held.V
        entry = {
            "name": self.name,
            "rank": self.rank,
            "scaling": self.scaling,
            "steps": self.steps,
            "started": self.started,
            "frozen": self.frozen,
            "held_ranks": [held.rank for held in self.held],
            "slabs": list(slabs),
            "folded": dict(self.folded),
            "discarded": list(self.discarded),
            "discarded_sq": list(self.discarded_sq),
        }
        return tensors, entry

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], entry: Mapping[str, Any], layout: Layout, dtype: torch.dtype
    ) -> Expert:
        """A saved expert, bit for bit, in copies of the tensors.

        Args:
            tensors: those of this expert, and of any others.
            layout: of the saved rank.
            dtype: of masters and held parts, which the saved ones must have.

        Raises:
            ValueError: a tensor is missing or of another shape or dtype.
        """
        name, sites = entry["name"], layout.sites

        def copied(key: str, *shape: int) -> Tensor:
            if f"{name}/{key}" not in tensors:
                raise ValueError(f"the saved state lacks the tensor {name}/{key}")
            saved = checked(tensors[f"{name}/{key}"], shape, dtype, f"the saved tensor {name}/{key}")
            return host_zeros(*shape, dtype=dtype).copy_(saved)

        if len(entry["held_ranks"]) != len(sites):
            raise ValueError(f"the saved expert {name!r} has {len(entry['held_ranks'])} held parts, not {len(sites)}")
        held = [
            Held(copied(f"held/{index}/U", site.d_in, k), copied(f"held/{index}/V", k, site.d_out))
            if k
            else Held.empty(site, dtype)
            for index, (site, k) in enumerate(zip(sites, entry["held_ranks"], strict=True))
        ]
        return cls(
            name=name,
            rank=entry["rank"],
            scaling=float(entry["scaling"]),
            layout=layout,
            held=held,
            discarded=[float(value) for value in entry["discarded"]],
            discarded_sq=[float(value) for value in entry["discarded_sq"]],
            **{key: copied(key, layout.numel) for key in entry["slabs"]},
            steps=int(entry["steps"]),
            started=int(entry["started"]),
            frozen=bool(entry["frozen"]),
            folded={str(basis): int(version) for basis, version in entry["folded"].items()},
        )


def checked(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """The tensor itself if it has this shape and dtype, else a ValueError that calls it `what`."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{what} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    return tensor
