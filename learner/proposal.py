"""What one optimizer step would make of an expert, found on copies: gradient, optimizer, base anchor, projection."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.protection import Protection, Use
from ogpstream.learner.staging import Piece, Staging, parts
from ogpstream.memory.basis import CHUNK
from ogpstream.memory.experts import Expert
from ogpstream.memory.layout import Layout
from ogpstream.memory.pinned import host_empty, host_zeros
from ogpstream.memory.units import named


@dataclass
class Proposal:
    """Masters and moments after the step, in host RAM and not yet the expert's.

    Attributes:
        slabs: by the names that `Expert` has for them.
        flats: their whole copies on the device, where it holds them whole.
        used: mask `[rows]` of the directions, by basis, that the gradient had a share in.
        finite: of all masters.
    """

    used: dict[str, Tensor]
    slabs: dict[str, Tensor] = field(default_factory=dict)
    flats: dict[str, Tensor] = field(default_factory=dict)
    finite: bool = True


class Proposer:
    """Makes proposals, piece by piece as the staging has it."""

    def __init__(self, staging: Staging, protection: Protection, config: LearnerConfig) -> None:
        self.staging, self.protection, self.config = staging, protection, config
        self._names = ("factors",) if config.optimizer == "sgd" else ("factors", "exp_avg", "exp_avg_sq")

    def run(self, expert: Expert, gradients: Sequence[Tensor], sites: Collection[int] | None = None
            ) -> Generator[str, None, Proposal]:
        """One step on the sum of some sinks' slabs, at least one, which may be changed.

        Args:
            sites: those that are trained; None is all. Masters and moments of the others stay bit for bit, as those of
                parameters without a gradient do in torch's optimizers. The number of the step, which Adam's bias
                correction goes by, is the expert's: a site that is trained for the first time in a late update makes
                steps of up to 2.1 times the usual size, in the first 20 of its own.

        Yields:
            "gradient", "optimizer", "anchor" and "projection", for every piece; "untouched" for what is not trained.
        """
        pieces, staging = self.staging.pieces(expert.layout, sites), self.staging
        totals, squares, use = [], [], Use()
        for piece in pieces:
            total = staging.total(piece, gradients)
            # for the fold too, where it is not what protects: the second moment then measures the free directions
            # alone, and their steps are not damped by gradients that the projection removes anyway
            use += yield from named("gradient", self.protection.project_(piece.layout, total))
            if len(pieces) > 1 and "exp_avg_sq" in self._names:
                squares.append(self._second_moments(expert, piece, total))
            totals.append(staging.aside(total))
            del total
            yield "gradient"
        eps = self._eps(pieces, squares)
        # here the device has been waited for, where there are pieces: their masks are there too
        proposal, finite = Proposal(self.protection.used(use)), []
        if sites is not None:
            proposal.slabs = yield from named("untouched", self._untouched(expert))
        for piece, total, own in zip(pieces, totals, eps, strict=True):
            flats = {name: staging.take(expert, name, piece) for name in self._names}
            self._step(expert, piece, flats, total.to(staging.device, non_blocking=True), own)
            yield "optimizer"
            yield from named("anchor", self.protection.pull_to_base_(piece.layout, flats["factors"], expert.scaling))
            yield "anchor"
            if self.protection.folds:
                yield from named("projection", self.protection.project_(piece.layout, flats["factors"]))
            finite.append(flats["factors"].isfinite().all())
            for name in self._names:
                proposal.slabs[name] = staging.keep(piece, flats[name], proposal.slabs.get(name))
            if len(pieces) == 1 and sites is None:
                proposal.flats = flats
            del flats
            yield "projection"
        # waits for the device, so that what is in host RAM may be read
        proposal.finite = bool(torch.stack(finite).all())
        return proposal

    def warm_up(self, layout: Layout) -> None:
        """Launch every kernel of a step once, on zeros, so that none is compiled inside an update."""
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.staging.device)

        sizes: set[int] = set()
        blocks: dict[tuple[int, int], str] = {}
        for own in (piece.layout for piece in self.staging.pieces(layout)):
            sizes |= {own.a_numel, own.numel - own.a_numel}
            for key in own.bases:
                members = own.members(key)
                blocks[own.sites[members[0]].d_in, len(members) * own.rank] = key
        for numel in sizes:
            dispatch.sgd_(zeros(numel), zeros(numel), lr=0.0)
            dispatch.adam_(*(zeros(numel) for _ in range(4)), step=1, lr=0.0, betas=(0.0, 0.0), eps=0.0)
        for shape, key in blocks.items():
            if key not in self.protection.bases:
                continue
            basis, block = self.protection.bases[key], zeros(*shape)
            # P grows by 32 rows at a time, as far as kernels are concerned
            for count in range(CHUNK, len(basis.rows()) + 1, CHUNK):
                for rows in self.staging.rows(basis, count, block):
                    dispatch.project_out_(block, rows, chunk=len(rows))

    def _untouched(self, expert: Expert) -> Generator[None, None, dict[str, Tensor]]:
        """Slabs into which a step on some of the sites is written: what the others have is there already."""
        copies = {}
        for name in self._names:
            slab = getattr(expert, name)
            if slab is None:
                copies[name] = host_zeros(expert.layout.numel, dtype=expert.factors.dtype)
                continue
            copies[name] = host_empty(slab.numel(), dtype=slab.dtype)
            for own, theirs in zip(parts(copies[name]), parts(slab), strict=True):
                own.copy_(theirs)
                yield
        return copies

    def _step(self, expert: Expert, piece: Piece, flats: dict[str, Tensor], gradient: Tensor,
              eps: tuple[float, float]) -> None:
        config, a = self.config, piece.layout.a_numel
        rate = config.learning_rate(expert.steps)
        rates = rate, rate * config.loraplus_lr_ratio
        for part, lr, own in zip((slice(0, a), slice(a, None)), rates, eps, strict=True):
            factors, *moments = (flat[part] for flat in flats.values())
            if config.optimizer == "sgd":
                dispatch.sgd_(factors, gradient[part], lr=lr, weight_decay=config.weight_decay)
            else:
                dispatch.adam_(factors, gradient[part], *moments, step=expert.steps + 1, lr=lr, betas=config.betas,
                               eps=own, weight_decay=config.weight_decay)

    def _second_moments(self, expert: Expert, piece: Piece, gradient: Tensor) -> Tensor:
        """Sums over the A and over the B of a piece of what the step makes of Adam's second moment: `[2]`."""
        beta = self.config.betas[1]
        moment = self.staging.take(expert, "exp_avg_sq", piece).mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
        return torch.stack([part.sum() for part in moment.tensor_split([piece.layout.a_numel])])

    def _eps(self, pieces: Sequence[Piece], squares: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Adam's eps for the A and the B of each piece.

        It is relative to the rms of the second moment over all A (or all B) of an expert, and `adam_` relates it to
        that of what it is given: so a piece gets as much more as its own rms is smaller.
        """
        config = self.config
        if not squares:
            return [(config.eps, config.eps)] * len(pieces)
        found = torch.stack(list(squares)).tolist()
        sizes = [(piece.layout.a_numel, piece.layout.numel - piece.layout.a_numel) for piece in pieces]
        means = [sum(one[part] for one in found) / sum(size[part] for size in sizes) for part in (0, 1)]

        def own(square: float, size: int, mean: float) -> float:
            return config.eps * (mean * size / square) ** 0.5 if square > 0 else config.eps

        return [
            (own(square[0], size[0], means[0]), own(square[1], size[1], means[1]))
            for square, size in zip(found, sizes, strict=True)
        ]
