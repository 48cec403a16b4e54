"""Orthonormal basis of the protected input directions of one linear: P."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogpstream.memory import orthonormal
from ogpstream.memory.pinned import host_copy, host_zeros

# rows per chunk of a streamed basis: 32 x 2048 x 4 B = 256 KiB, and the granularity of the storage
CHUNK = 32
MAX_CAPACITY = 512
# a loaded basis further than this from orthonormal is damaged: what `admit` keeps is below 1e-6
DAMAGED = 1e-4
# replacements within one window that, with every direction in use, make a full basis saturated
SATURATION = 32
_BLOCKS = 10


@dataclass(frozen=True)
class Admission:
    """What `admit` took: columns `[D_in, j]` as stored, their slots, and which of these held another one."""

    directions: Tensor
    slots: tuple[int, ...]
    replaced: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.slots)


class ProjectionBasis:
    """Up to `capacity` orthonormal columns P `[D_in, m]`, stored as rows P.T, with counts of their use.

    Slots are stable: a direction keeps its row until it is released, pruned or replaced. `generation[slot]`
    is 0 for an empty slot and otherwise a number that no other admission ever had.

    The storage of the rows is replaced and never written into: what `rows` gave stays what it was.

    Uses are counted in ten blocks of window/10 updates, so a count covers the last 0.9 to 1.0 windows.

    Args:
        d_in: width of the input.
        capacity: largest number of directions, 1 <= capacity <= min(512, d_in).
        window: updates over which uses and replacements are counted, a multiple of 10.

    Raises:
        ValueError: capacity or window is out of range.
    """

    def __init__(self, d_in: int, *, capacity: int = 256, window: int = 1000) -> None:
        if window < _BLOCKS or window % _BLOCKS:
            raise ValueError(f"window is {window}: it must be a positive multiple of {_BLOCKS} updates")
        self.d_in = d_in
        self.capacity = self._checked_capacity(capacity)
        self.window = window
        self.version = 0
        self.updates = 0
        size = -(-capacity // CHUNK) * CHUNK
        self._rows = host_zeros(size, d_in)
        self.live = torch.zeros(size, dtype=torch.bool)
        self.fixed = torch.zeros(size, dtype=torch.bool)
        self.generation = torch.zeros(size, dtype=torch.int64)
        self._admissions = 0
        self._uses = torch.zeros(_BLOCKS, size, dtype=torch.int32)
        self._replacements = torch.zeros(_BLOCKS, dtype=torch.int32)

    def __repr__(self) -> str:
        return f"ProjectionBasis({self.d_in}, {self.columns} of {self.capacity}, version {self.version})"

    @property
    def columns(self) -> int:
        """Number of live directions."""
        return int(self.live.sum())

    @property
    def replacements_in_window(self) -> int:
        """Directions that were replaced within the window."""
        return int(self._replacements.sum())

    @property
    def saturated(self) -> bool:
        """Full, every replaceable direction in use, and 32 replacements in the window all the same: prune."""
        if self.columns < self.capacity or self.replacements_in_window < SATURATION:
            return False
        return bool((self.use_counts()[self.live & ~self.fixed] > 0).all())

    def rows(self) -> Tensor:
        """The storage P.T `[rows, D_in]`, float32 in host RAM, for reading; rows of empty slots are zero."""
        return self._rows

    def directions(self) -> Tensor:
        """The columns of P, `[D_in, m]` float32: a copy."""
        return self._rows[self.live].T

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
        """(first slot, contiguous view `[<= size, D_in]`) of each chunk of slots that holds a direction."""
        for start in range(0, len(self._rows), size):
            if self.live[start : start + size].any():
                yield start, self._rows[start : start + size]

    def coefficients(self, x: Tensor) -> Tensor:
        """P.T x for each row of X `[T, D_in]`: `[T, rows]`, in float32 or wider, on X's device."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = self._rows.to(x.device, dtype)
        return x.to(dtype).matmul(rows.T)

    def share(self, x: Tensor) -> Tensor:
        """|P.T x| / |x| for each row of X `[T, D_in]`: `[T]`; 0 where x is 0."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        peak = x.abs().amax(dim=1, keepdim=True)
        # scaled by the peak: squares of activations of 1e-25 are 0 in fp32
        x = x / torch.where(peak > 0, peak, torch.ones_like(peak))
        norm = x.norm(dim=1)
        return self.coefficients(x).norm(dim=1) / torch.where(norm > 0, norm, torch.ones_like(norm))

    def novelty(self, candidates: Tensor) -> Tensor:
        """|u - P P.T u| / |u| of each column of `[D_in, k]`: `[k]` float32; 0 for zero or non-finite ones."""
        units, usable = orthonormal.unit_rows(candidates, self.d_in)
        return torch.where(usable, orthonormal.residual(self._rows, units.float()).norm(dim=1), 0.0)

    @torch.no_grad()
    def admit(
        self, candidates: Tensor, *, threshold: float = 0.5, fixed: bool = False, at_most: int | None = None
    ) -> Admission:
        """Take the novel ones of the candidate directions, one after the other.

        A candidate u is novel when |u - P P.T u| / |u| > threshold, P with the candidates before it. Only the
        new column is orthogonalised, by Gram-Schmidt twice in float64, so |P.T P - I|_max stays at the
        rounding of the float32 storage (1e-7) for ever. A zero or non-finite candidate is passed over. A full
        basis gives up its least used direction that is neither fixed nor of this call, and takes nothing when
        there is none. The admission itself counts as one use: else the newest direction would always be the
        next to go.

        Args:
            candidates: `[D_in, k]`, any scale, dtype and device.
            threshold: smallest novelty, 0 <= threshold < 1.
            fixed: mark what is taken as never to be replaced or pruned (warm start).
            at_most: largest number of directions to take.

        Raises:
            ValueError: a wrong shape, or a threshold out of range.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold}: novelty is at most 1, choose 0 <= threshold < 1")
        units, usable = orthonormal.unit_rows(candidates, self.d_in)
        # mostly nothing is novel, and float32 tells: widening a full [256, 2048] takes five times as long
        units = units[usable & (self.novelty(candidates) > threshold).any()]
        span, rows = self._rows[: self._end() + len(units)].double(), self._rows
        slots: list[int] = []
        replaced: list[int] = []
        for unit in units:
            column = orthonormal.orthogonalised(span, unit)
            # what shrinks the second time lies in span(P) up to rounding: there is no direction to keep
            if orthonormal.residual(span, unit).norm() <= threshold or not column.norm() > 0.5:
                continue
            if len(slots) == at_most:
                break
            full = self.columns == self.capacity
            slot = self._least_used(but=slots) if full else int((~self.live).nonzero()[0])
            if slot is None:
                break
            if full:
                span[slot] = 0
                column = orthonormal.orthogonalised(span, unit)
                self._clear([slot])
                self._replacements[self._block] += 1
                replaced.append(slot)
            if rows is self._rows:
                rows = host_copy(rows)
            rows[slot] = (column / column.norm()).float()
            span[slot] = rows[slot].double()
            self._admissions += 1
            self.live[slot], self.fixed[slot], self.generation[slot] = True, fixed, self._admissions
            self._uses[self._block, slot] = 1
            slots.append(slot)
        self._rows = rows
        if slots:
            self.version += 1
        return Admission(self._rows[slots].T.contiguous(), tuple(slots), tuple(replaced))

    def record_use(self, used: Tensor) -> None:
        """Count one update, in which the directions of this bool mask `[rows]` were used."""
        if used.dtype != torch.bool or used.shape != self.live.shape:
            raise ValueError(f"used is {used.dtype} {tuple(used.shape)}, expected bool ({len(self.live)},)")
        self._uses[self._block] += (used.cpu() & self.live).int()
        self.updates += 1
        if self.updates % (self.window // _BLOCKS) == 0:
            self._uses[self._block] = 0
            self._replacements[self._block] = 0

    def use_counts(self) -> Tensor:
        """Updates of the window in which each direction was used: `[rows]` int64, 0 for empty slots."""
        return self._uses.sum(dim=0)

    def stayed(self, generation: Tensor) -> Tensor:
        """Mask `[rows]` of the directions that are in P now and were when `generation` was copied."""
        then = torch.zeros_like(self.generation)
        then[: len(generation)] = generation
        return self.live & (self.generation == then)

    def prune(self, keep: int | None = None) -> tuple[int, ...]:
        """Keep the fixed directions and, up to `keep` in all, the most used others (ties: the lower slot).

        Args:
            keep: directions that stay, half the capacity if None.

        Returns:
            The slots that became empty. The count of replacements starts anew.
        """
        keep = self.capacity // 2 if keep is None else keep
        room = max(0, keep - int(self.fixed.sum()))
        counts = self.use_counts().tolist()
        others = (self.live & ~self.fixed).nonzero().flatten().tolist()
        pruned = sorted(sorted(others, key=lambda slot: (-counts[slot], slot))[room:])
        self._replacements.zero_()
        self.release(pruned)
        return tuple(pruned)

    def release(self, slots: Iterable[int]) -> None:
        """Let directions leave P, fixed ones too; what was folded along them stays in the held parts.

        Raises:
            ValueError: a slot holds no direction. Nothing changed.
        """
        leaving = sorted(set(slots))
        for slot in leaving:
            if not 0 <= slot < self.capacity or not self.live[slot]:
                raise ValueError(f"slot {slot} holds no direction: release only live slots")
        if leaving:
            self._rows = host_copy(self._rows)
            self._rows[leaving] = 0
            self._clear(leaving)
            self.version += 1

    def grow(self, capacity: int) -> None:
        """Make room for more directions; slots, generations and the version stay. `rows()` is a new tensor.

        Raises:
            ValueError: capacity is smaller than now or above min(512, d_in).
        """
        if self._checked_capacity(capacity) < self.capacity:
            raise ValueError(f"capacity {capacity} is below the present {self.capacity}: prune instead")
        self.capacity = capacity
        old = len(self._rows)
        size = -(-capacity // CHUNK) * CHUNK
        if size > old:
            rows = host_zeros(size, self.d_in)
            rows[:old] = self._rows
            self._rows = rows
            states = (self.live, self.fixed, self.generation, self._uses)
            self.live, self.fixed, self.generation, self._uses = (
                torch.nn.functional.pad(state, (0, size - old)) for state in states
            )

    def deviation(self) -> float:
        """|P.T P - I|_max of the live directions in float64; NaN if one is not finite, 0 if there is none."""
        return orthonormal.deviation(self._rows[self.live])

    def condition(self) -> float:
        """Condition number of the Gram matrix P.T P: 1 if orthonormal or empty, inf if singular."""
        return orthonormal.condition(self._rows[self.live])

    def check(self) -> None:
        """Refuse a damaged basis.

        Raises:
            ValueError: |P.T P - I| > 1e-4, a number that is not finite, or an empty slot that is not empty.
        """
        deviation = self.deviation()
        if not deviation <= DAMAGED:
            raise ValueError(
                f"the basis is damaged: |P.T P - I| is {deviation:.3g}, over {DAMAGED:g}; load an older state"
            )
        empty = ~self.live
        if self._rows[empty].any() or self.fixed[empty].any() or self.live[self.capacity :].any():
            raise ValueError("the basis is damaged: an empty slot is not empty; load an older state")

    def copy(self) -> ProjectionBasis:
        """Another one with the same directions and counts, which no change of this one reaches."""
        twin = copy.copy(self)
        for name in ("live", "fixed", "generation", "_uses", "_replacements"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def become(self, other: ProjectionBasis) -> None:
        """Take over all that another one has, which is not to be used any more: assignments alone."""
        vars(self).update(vars(other))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of everything as (tensors, JSON-able rest); of the rows only the live ones."""
        tensors = {
            "rows": self._rows[self.live],
            "live": self.live.clone(),
            "fixed": self.fixed.clone(),
            "generation": self.generation.clone(),
            "uses": self._uses.clone(),
            "replacements": self._replacements.clone(),
        }
        meta = {
            "d_in": self.d_in,
            "capacity": self.capacity,
            "window": self.window,
            "version": self.version,
            "updates": self.updates,
            "admissions": self._admissions,
        }
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become the saved basis, bit for bit, with its capacity and window.

        Raises:
            ValueError: the state is of another width, does not fit together or is damaged. Nothing changed.
        """
        if meta["d_in"] != self.d_in:
            raise ValueError(f"the saved basis is of another linear: width {meta['d_in']}, here {self.d_in}")
        loaded = ProjectionBasis(self.d_in, capacity=int(meta["capacity"]), window=int(meta["window"]))
        loaded.version, loaded.updates = int(meta["version"]), int(meta["updates"])
        loaded._admissions = int(meta["admissions"])
        targets = {
            "live": loaded.live,
            "fixed": loaded.fixed,
            "generation": loaded.generation,
            "uses": loaded._uses,
            "replacements": loaded._replacements,
        }
        for key, target in targets.items():
            _copy(key, tensors[key], target)
        rows = loaded._rows.new_empty(loaded.columns, self.d_in)
        _copy("rows", tensors["rows"], rows)
        loaded._rows[loaded.live] = rows
        loaded.check()
        self.become(loaded)

    @property
    def _block(self) -> int:
        return self.updates // (self.window // _BLOCKS) % _BLOCKS

    def _checked_capacity(self, capacity: int) -> int:
        if not 1 <= capacity <= min(MAX_CAPACITY, self.d_in):
            limit = min(MAX_CAPACITY, self.d_in)
            raise ValueError(f"capacity is {capacity}: choose 1 to {limit} for inputs of width {self.d_in}")
        return capacity

    def _end(self) -> int:
        """One past the last live slot."""
        return int(self.live.nonzero()[-1]) + 1 if self.live.any() else 0

    def _least_used(self, but: Iterable[int]) -> int | None:
        replaceable = self.live & ~self.fixed
        replaceable[list(but)] = False
        counts, generations = self.use_counts().tolist(), self.generation.tolist()
        slots = replaceable.nonzero().flatten().tolist()
        return min(slots, key=lambda slot: (counts[slot], generations[slot]), default=None)

    def _clear(self, slots: list[int]) -> None:
        self.live[slots] = False
        self.fixed[slots] = False
        self.generation[slots] = 0
        self._uses[:, slots] = 0


def _copy(key: str, saved: Tensor, target: Tensor) -> None:
    if saved.shape != target.shape or saved.dtype != target.dtype:
        expected = f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(f"the saved {key} is {saved.dtype} {tuple(saved.shape)}, expected {expected}")
    target.copy_(saved)
