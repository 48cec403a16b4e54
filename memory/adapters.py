"""The experts (named LoRA adapters): fp32 masters in host RAM, a few active, an immutable served version.

An expert adds to the linear of site i, with A [D_in, r], B [r, D_out] its plastic and U [D_in, k], V [k,
D_out] its held part:

    y = W x + sum_e gate_e * (scaling_e * (x A_e) B_e + (x U_e) V_e)

The learner replaces masters (`expert.factors = new_slab`) and never writes into them, and a new version is
new tensors, swapped in by one assignment: whoever holds a `Served` or a state dict can read it for
ever.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ogpstream.memory.experts import Expert, Held, checked
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.pinned import host_zeros
from ogpstream.memory.room import Room, Sources, put
from ogpstream.memory.scope import Scope
from ogpstream.memory.served import Pack, Served, side_by_side
from ogpstream.memory.shelf import Part, Shelf
from ogpstream.memory.units import exhausted

# matrices and scales of a served version start at multiples of 16 elements: 32 B in bf16, so that loads can be vector
# loads, and one kernel serves all of a shape
_ALIGN = 16
# a version is built so many sites at a time, or fewer of so many elements: 16 of width 256 are 64 copies in 1.3 ms
_SITES, _ELEMENTS = 16, 2**20


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGN) * _ALIGN


class UnknownExpert(KeyError):
    """No expert has this name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr of the message


class AdapterStore:
    """All experts of a model and the version that is served.

    Args:
        sites: the adapted linears; the order gives the indices used everywhere.
        dtype: of masters and held parts (float32; float64 in exactness tests).
        serve_dtype: of the served copies; the masters' dtype if None.
        device: where the served copies live; masters stay in host RAM.
        max_active: experts that are served at once; one more makes the least recently activated leave. None is all.
        apart: experts whose packs are on the device at once, each in packs of its own, so that a version that changes
            one of them takes no copy of the others; the packs of others are built when somebody computes with them.
            None has all active ones side by side, so that one product computes them all.
        multiple: R of every pack is rounded up to a multiple of it with columns of zeros, so that a few compiled
            kernels serve all ranks that folds come to.

    Attributes:
        scope: which prompts the experts answer, from the next version on; replaced, never changed.
    """

    def __init__(
        self,
        sites: Sequence[SiteShape],
        *,
        dtype: torch.dtype = torch.float32,
        serve_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        max_active: int | None = 2,
        apart: int | None = None,
        multiple: int = 1,
    ) -> None:
        if (max_active is not None and max_active < 1) or multiple < 1:
            raise ValueError(f"max_active is {max_active} and multiple {multiple}: both are at least 1")
        self.sites = Layout(sites, 1).sites
        self.dtype = dtype
        self.serve_dtype = serve_dtype or dtype
        self.device = torch.device(device)
        self.max_active = max_active
        self.shelf = None if apart is None else Shelf(apart, self._built)
        self.multiple = multiple
        self._experts: dict[str, Expert] = {}
        self._active: dict[str, float] = {}  # name -> gate; the order is the order of activation
        self.scope = Scope()
        self._layouts: dict[int, Layout] = {}
        self.served = Served(0, (), (), ())
        self.publish(0)

    @property
    def names(self) -> tuple[str, ...]:
        """All experts, in order of creation."""
        return tuple(self._experts)

    @property
    def active(self) -> dict[str, float]:
        """Gate of each active expert, the least recently activated first."""
        return dict(self._active)

    @property
    def on_device(self) -> tuple[str, ...]:
        """The experts whose packs are on the serving device."""
        return tuple(self._active) if self.served.parts is None or self.shelf is None else self.shelf.experts

    def layout(self, rank: int) -> Layout:
        """The layout that all experts of this rank share."""
        if rank not in self._layouts:
            self._layouts[rank] = Layout(self.sites, rank)
        return self._layouts[rank]

    def expert(self, name: str) -> Expert:
        """The expert of this name.

        Raises:
            UnknownExpert: there is none; the message names the known ones.
        """
        try:
            return self._experts[name]
        except KeyError:
            known = ", ".join(map(repr, self._experts)) or "none yet"
            raise UnknownExpert(f"no expert {name!r}; known experts: {known}") from None

    def create(self, name: str, rank: int, scaling: float, factors: Tensor | None = None) -> Expert:
        """Add an inactive expert with an empty held part.

        Args:
            factors: initial slab `[layout.numel]`, copied; zeros if None (which no gradient can leave).

        Raises:
            ValueError: the name is taken or has a "/" or ".", or rank, scaling or factors do not fit.
        """
        if not name or "/" in name or "." in name:
            raise ValueError(f"{name!r} is no expert name: use letters, digits, '_' and '-'")
        if name in self._experts:
            raise ValueError(f"the expert {name!r} exists already: remove it first or choose another name")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling of expert {name!r} is {scaling}: it must be finite")
        layout = self.layout(rank)
        slab = host_zeros(layout.numel, dtype=self.dtype)
        if factors is not None:
            slab.copy_(checked(factors, (layout.numel,), self.dtype, f"factors of expert {name!r}"))
        empty = [Held.empty(site, self.dtype) for site in self.sites]
        zeros = [0.0] * len(self.sites)
        expert = Expert(name, rank, float(scaling), layout, slab, empty, zeros, list(zeros))
        self._experts[name] = expert
        return expert

    def activate(self, name: str, gate: float = 1.0, *, pinned: Collection[str] = ()) -> tuple[str, ...]:
        """Make an expert the most recently used active one, with this gate, from the next `publish` on.

        Returns:
            The experts that left for it, the least recently activated first; those in `pinned` never do.

        Raises:
            ValueError: the gate is not finite, or every place is taken by a pinned expert.
        """
        self.expert(name)
        self._check_gate(name, gate)
        others = [other for other in self._active if other != name]
        surplus = 0 if self.max_active is None else max(0, len(others) + 1 - self.max_active)
        leaving = tuple(other for other in others if other not in pinned)[:surplus]
        if len(leaving) < surplus:
            raise ValueError(f"no place for expert {name!r}: all {self.max_active} active experts are pinned")
        for left in (*leaving, name):
            self._active.pop(left, None)
        self._active[name] = float(gate)
        return leaving

    def remove(self, name: str) -> None:
        """Forget an inactive expert.

        Raises:
            ValueError: it is active.
        """
        self.expert(name)
        if name in self._active:
            raise ValueError(f"the expert {name!r} is active: deactivate it first")
        del self._experts[name]

    def deactivate(self, name: str) -> None:
        """Take an expert out of the active set from the next `publish` on; its masters stay."""
        self.expert(name)
        self._active.pop(name, None)

    def reserve(self, experts: Sequence[Expert]) -> Room:
        """Allocate what a version of these experts needs on the device, where memory may run out."""
        ranks = self._ranks(experts)
        numel = self._starts(ranks)[-1]
        widest = max((rank * width for site, rank in zip(self.sites, ranks, strict=True)
                      for width in (site.d_in, site.d_out)), default=0)
        staged = self.device.type != "cpu"
        return Room(
            torch.empty(numel, dtype=self.serve_dtype, device=self.device),
            torch.empty(sum(map(_aligned, ranks)), dtype=torch.promote_types(self.serve_dtype, torch.float32),
                        device=self.device),
            torch.empty(widest if staged else 0, dtype=self.dtype, device=self.device),
        )

    def publish(self, version: int | None = None) -> Served:
        """Build new packs of the active experts and serve them from this assignment on.

        Memory may run out; what is served stays then.

        Args:
            version: number of the new version; one more than the served one if None.
        """
        self.served = exhausted(self.building(self._active, self._experts, version))
        return self.served

    def building(self, active: Mapping[str, float], experts: Mapping[str, Expert], version: int | None = None,
                 scope: Scope | None = None) -> Generator[None, None, Served]:
        """Build a version, a few sites at a time; assign it to `served` to publish it.

        Its memory is taken first, so that nothing later can fail for want of it.

        Args:
            active: gate of each expert that is in it, the least recently activated first.
            experts: these by name, as they will be by then; nobody may change them meanwhile.
            version: its number; one more than the served one if None.
            scope: of the experts by then; as it is now if None.

        Yields:
            After the allocation, and after every few sites.
        """
        number = self.served.version + 1 if version is None else version
        if self.shelf is None or len(active) < 2:
            packs, made_of = yield from self._packed(active, experts, self.served)
            return Served(number, tuple(active), tuple(active.values()), packs, made_of, scope or self.scope)
        before = {part.expert.name: part for part in self.served.parts or () if isinstance(part, Part)}
        parts: list[Part] = []
        for name, gate in active.items():
            part, last = Part(experts[name].computing(), gate, self.shelf), before.get(name)
            if last is not None and last.is_like(part):
                part = last
            elif last is None or last in self.shelf:
                # what is computed with now is on the device before anything is changed
                one = None if last is None else last.served
                packs, made_of = yield from self._packed({name: gate}, experts, one)
                self.shelf.put(part, Served(number, (name,), (gate,), packs, made_of))
            parts.append(part)
        return Served(number, tuple(active), tuple(active.values()), (), None, scope or self.scope, tuple(parts))

    def _built(self, part: Part) -> Served:
        """The packs of one expert."""
        name = part.expert.name
        packs, made_of = exhausted(self._packed({name: part.gate}, {name: part.expert}, None))
        return Served(0, (name,), (part.gate,), packs, made_of)

    def _packed(self, active: Mapping[str, float], experts: Mapping[str, Expert], last_one: Served | None
                ) -> Generator[None, None, tuple[tuple[Pack, ...], Sources]]:
        """Packs of all these experts side by side; what `last_one` has of them already is copied from there."""
        parts = [experts[name] for name in active]
        room, ranks = self.reserve(parts), self._ranks(parts)
        yield
        trained = side_by_side({expert.name: expert.rank for expert in parts})
        # one slab: one allocation for hundreds of sites
        starts = self._starts(ranks)
        slab = room.slab[: starts[-1]]
        made_of = Sources(dict(active), slab, [(expert.factors, list(expert.held)) for expert in parts])
        before = None if last_one is None else last_one.made_of
        if before is not None and not before.fits(made_of):
            before = None
        scales: dict[tuple[int, ...], Tensor] = {}
        scales_end = 0
        packs: list[Pack] = []
        last = 0
        for index, (site, rank) in enumerate(zip(self.sites, ranks, strict=True)):
            if index == last:
                if index:
                    yield
                last = self._portion(starts, index)
                if before is not None:
                    # what stays of these sites comes by one copy
                    same = slice(starts[2 * index], starts[2 * last])
                    slab[same].copy_(before.slab[same])
            a = slab[starts[2 * index] :][: site.d_in * rank].view(site.d_in, rank)
            b = slab[starts[2 * index + 1] :][: rank * site.d_out].view(rank, site.d_out)
            held = [expert.held[index] for expert in parts]
            factors = [(expert.layout.a(expert.factors, index), expert.layout.b(expert.factors, index))
                       for expert in parts]
            column = 0
            for number, (left, right) in enumerate(factors + [(part.U, part.V) for part in held]):
                columns = slice(column, column + left.shape[1])
                if before is None or before.part(number, index) is not made_of.part(number, index):
                    put(a[:, columns], left, room)
                    put(b[columns], right, room)
                column = columns.stop
            if before is None:
                a[:, column:].zero_()
                b[column:].zero_()
            held_ranks = tuple(part.rank for part in held)
            if held_ranks not in scales:
                values = self._scale(parts, active, held_ranks)
                own = room.scales[scales_end:][: len(values)]
                scales[held_ranks] = own.copy_(torch.tensor(values, dtype=own.dtype))
                scales_end += _aligned(len(values))
            packs.append(Pack(a, b, scales[held_ranks], trained))
        if self.device.type == "cuda":
            # readers on other streams must not see a slab whose copies are still queued on this one
            torch.cuda.current_stream(self.device).synchronize()
        yield
        return tuple(packs), made_of

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All experts and the active set as (named tensors, JSON-able rest); the tensors are not copied."""
        tensors: dict[str, Tensor] = {}
        experts = []
        for expert in self._experts.values():
            expert_tensors, entry = expert.state_dict()
            tensors |= expert_tensors
            experts.append(entry)
        meta = {
            "sites": [[site.name, site.d_in, site.d_out, site.basis] for site in self.sites],
            "version": self.served.version,
            "active": [[name, gate] for name, gate in self._active.items()],
            "experts": experts,
        }
        own, meta["scope"] = self.scope.state_dict()
        return tensors | {f"scope.{key}": tensor for key, tensor in own.items()}, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], version: int | None = None
                        ) -> None:
        """Replace all experts by a saved state, bit for bit, and publish it; copies the tensors.

        Memory may run out, as in `publish`; nothing has changed then.

        Args:
            version: number of the published version; the saved one if None.

        Raises:
            ValueError: other sites, or a tensor that is missing or of another shape or dtype. Nothing
            changed.
        """
        saved_sites = tuple(SiteShape(*site) for site in meta["sites"])
        if saved_sites != self.sites:
            raise ValueError(
                f"the {len(saved_sites)} saved sites are not the {len(self.sites)} sites of this model: "
                "attach with the saved targets and basis scope"
            )
        active = {name: float(gate) for name, gate in meta["active"]}
        experts = {
            entry["name"]: Expert.from_state_dict(tensors, entry, self.layout(entry["rank"]), self.dtype)
            for entry in meta["experts"]
        }
        if (self.max_active or len(active)) < len(active) or not active.keys() <= experts.keys():
            raise ValueError(f"the saved active experts {list(active)} do not fit: max_active is {self.max_active}")
        scope = Scope.from_state_dict({key.removeprefix("scope."): tensor for key, tensor in tensors.items()
                                       if key.startswith("scope.")}, meta["scope"])
        served = exhausted(self.building(active, experts, int(meta["version"]) if version is None else version, scope))
        self._experts, self._active, self.scope, self.served = experts, active, scope, served

    def _ranks(self, experts: Sequence[Expert]) -> list[int]:
        """Columns of the pack of each site."""
        return [self._columns(sum(expert.rank + expert.held[index].rank for expert in experts))
                for index in range(len(self.sites))]

    @staticmethod
    def _portion(starts: Sequence[int], first: int) -> int:
        """Where the sites end that are built together, beginning with `first`."""
        sites = len(starts) // 2
        small = (last for last in range(first + 2, min(first + _SITES, sites) + 1)
                 if starts[2 * last] - starts[2 * first] <= _ELEMENTS)
        return max(small, default=first + 1)

    def _starts(self, ranks: Sequence[int]) -> list[int]:
        """Where in a slab the matrices of the packs begin, A and B of one site after the other, and where it ends."""
        starts = [0]
        for site, rank in zip(self.sites, ranks, strict=True):
            for numel in (site.d_in * rank, rank * site.d_out):
                starts.append(starts[-1] + _aligned(numel))
        return starts

    def _scale(self, experts: Sequence[Expert], gates: Mapping[str, float], held_ranks: Sequence[int]) -> list[float]:
        values: list[float] = []
        for expert in experts:
            values += [gates[expert.name] * expert.scaling] * expert.rank
        for expert, k in zip(experts, held_ranks, strict=True):
            values += [gates[expert.name]] * k
        return values + [0.0] * (self._columns(len(values)) - len(values))

    def _columns(self, rank: int) -> int:
        return -(-rank // self.multiple) * self.multiple

    @staticmethod
    def _check_gate(name: str, gate: float) -> None:
        if not math.isfinite(gate):
            raise ValueError(f"gate of expert {name!r} is {gate}: it must be finite")
