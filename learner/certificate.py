"""What the guarantee is worth: how far x W moved for the x that P protects, measured on the masters.

With W = scaling A B + U V of one linear and expert, updates of A and B never change x W for x in span(P). Only cuts
of the held part do; each one's dropped matrix D is known exactly, so the two are told apart:

    x W_t - x W_s  =  (what should be 0)  -  sum of x D over the cuts since s
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.learner.protection import Protection
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert, Held


@dataclass(frozen=True)
class Drift:
    """guarantee: largest |x (W_t - W_s) + sum of x D| over |x| max_t |W_t|_2, for x in the span of the directions that
        stayed in P since they were noted at s; rounding is all it should be. 0 where nothing is protected.
    held: largest sum of the cuts' first singular values since creation over |W_t|_2, a bound on what all cuts moved.
    """

    guarantee: float
    held: float


@dataclass
class _Noted:
    """One expert at one linear: what W gave along the rows of P when each was noted, and W's largest norm since."""

    generation: Tensor  # [rows] of the direction that a row was noted for; 0 where none
    along: Tensor  # p.T W at that time, less what cuts took since; [rows, D_out] float64
    largest: float = 0.0


class DriftMeter:
    """Watches the guarantee while a learner runs.

    It notes new directions only when it looks (`mark`), so s is the first look after a direction joined; W of an
    inactive expert is noted too, and its later fold must not move it. One look costs a few products of P with factors
    of rank r + r_c for each linear and expert. What cuts drop is kept until the next look, so look every 50 updates or
    so, and `close` the meter in the end. A rollback or a loaded state is another history: make a new meter then.
    """

    def __init__(self, protection: Protection, store: AdapterStore) -> None:
        self.protection = protection
        self.store = store
        self._noted: dict[tuple[str, int], _Noted] = {}
        self._dropped: dict[tuple[str, int], list[Held]] = {}
        self._worst = 0.0
        protection.on_cut = self._note_cut
        self.mark()

    def mark(self) -> None:
        """Measure the directions noted before, then note those that joined since."""
        for name in self.store.names:
            expert = self.store.expert(name)
            for index in range(len(self.store.sites)):
                self._look(expert, index)
        self._dropped.clear()

    def drift(self) -> Drift:
        """The largest over all looks, linears and experts, this one included."""
        self.mark()
        held = 0.0
        for name in self.store.names:
            expert = self.store.expert(name)
            for index, lost in enumerate(expert.discarded):
                if lost > 0.0:
                    held = max(held, lost / max(spectral_norm(expert, index), torch.finfo(torch.float64).tiny))
        return Drift(self._worst, held)

    def close(self) -> None:
        """Stop collecting what cuts drop."""
        self.protection.on_cut = None

    def _note_cut(self, expert: str, site: int, dropped: Held) -> None:
        self._dropped.setdefault((expert, site), []).append(dropped)

    def _look(self, expert: Expert, index: int) -> None:
        site = self.store.sites[index]
        basis = self.protection.bases.get(site.basis)
        if basis is None:
            return
        rows = basis.rows().double()
        here = (expert.name, index)
        along = rows @ (expert.scaling * expert.a(index).double()) @ expert.b(index).double()
        along += rows @ expert.held[index].U.double() @ expert.held[index].V.double()
        noted = self._noted.setdefault(here, _Noted(torch.zeros(0, dtype=torch.int64), along[:0]))
        noted.largest = max(noted.largest, spectral_norm(expert, index))
        grown = len(rows) - len(noted.along)
        before = torch.cat([noted.along, along.new_zeros(grown, site.d_out)])
        if here in self._dropped:
            cuts = self._dropped[here]
            U, V = torch.cat([cut.U for cut in cuts], 1), torch.cat([cut.V for cut in cuts], 0)
            before -= rows @ U.double() @ V.double()
        stayed = basis.stayed(noted.generation)
        if bool(stayed.any()) and noted.largest > 0.0:
            moved = torch.linalg.matrix_norm((along - before)[stayed], 2)
            self._worst = max(self._worst, float(moved) / noted.largest)
        noted.along = torch.where(stayed[:, None], before, along)
        noted.generation = basis.generation.clone()


def spectral_norm(expert: Expert, index: int) -> float:
    """|scaling A B + U V|_2 of one linear, float64, through QRs of the narrow factors."""
    held = expert.held[index]
    left = torch.cat([expert.scaling * expert.a(index), held.U], 1).double()
    right = torch.cat([expert.b(index), held.V], 0).double()
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(torch.linalg.matrix_norm(core, 2))
