"""What growth of P, folds and a restart make of bases and experts, found on copies, one linear input after the other.

A unit of it is the work of one linear input, or of a few where there is little: it does not grow with the model. Bases
depend on nothing but the candidates of their own input, and held parts on nothing but their own linear, so the order of
the inputs changes no bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.fold import add_to_held, remove
from ogpstream.learner.protection import READS, Protection, occupied
from ogpstream.learner.restart import drawing, read_directions
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.experts import Expert, Held
from ogpstream.memory.layout import Layout
from ogpstream.memory.pinned import host_empty
from ogpstream.memory.units import exhausted

# singular values of dA under this share of the largest carry no direction
NO_DIRECTION = 1e-3
# elements of a slab that are copied in one unit: 4 MiB in 2 ms
PART = 2**20
# linears in a unit, where an input has more: a cut at width 256 takes 1.4 ms
CUTS = 4
# numbers of P that could be read while the uses of one basis are counted, which takes 40 us
COUNT = 2**12


@dataclass(frozen=True)
class Growth:
    """What one growth of the bases did, summed over them."""

    admitted: int = 0
    replaced: int = 0
    pruned: int = 0

    def __add__(self, other: Growth) -> Growth:
        return Growth(self.admitted + other.admitted, self.replaced + other.replaced, self.pruned + other.pruned)


class Draft:
    """Bases and experts as they are to become, while everybody else goes on with what they are.

    Its generators yield after each unit. Dropped at any of them it has changed nothing; `commit` is assignments alone.

    Args:
        experts: those that fold what joins P.

    Attributes:
        experts: their copies, by name.
        growth: what the bases took and gave up so far.
    """

    def __init__(self, protection: Protection, experts: Sequence[Expert]) -> None:
        self.experts = {expert.name: expert.copy() for expert in experts}
        self.growth = Growth()
        self._protection, self._config = protection, protection.config
        self._originals = tuple(experts)
        self._bases: dict[str, ProjectionBasis] = {}
        # slabs that are the draft's own, by expert and name: others are somebody else's too, and not written into
        self._own: dict[tuple[str, str], Tensor] = {}
        self._cuts: list[tuple[str, int, Held]] = []

    def commit(self) -> None:
        """Put everything into place; the draft is used no more."""
        for key, basis in self._bases.items():
            self._protection.bases[key].become(basis)
        for expert in self._originals:
            expert.restore(self.experts[expert.name])
        self.tell()

    def tell(self) -> None:
        """Tell `Protection.on_cut` of what the cuts dropped."""
        if self._protection.on_cut is not None:
            for expert, site, dropped in self._cuts:
                self._protection.on_cut(expert, site, dropped)

    def follow(self, name: str) -> Generator[None, None, None]:
        """Take an expert's new factors into their running mean; it begins with them."""
        expert = self.experts[name]
        mean = expert.factors if expert.average is None else expert.average
        expert.average = self._own[name, "average"] = torch.empty_like(mean)
        for part in _parts(mean):
            torch.lerp(mean[part], expert.factors[part], 1 - self._config.average, out=expert.average[part])
            yield

    def grow(self, layout: Layout, gradients: Sequence[Tensor], used: Mapping[str, Tensor]
             ) -> Generator[None, None, None]:
        """Count an update, and let candidates of learned samples' dA join the bases; the experts fold.

        Args:
            layout: of the expert that was updated.
            gradients: flat slab of each sample's dA and dB, before any projection, in host RAM.
            used: by basis, mask `[rows]` of the directions that the update used: `Protection.used`.
        """
        reads = 0
        for key, basis in self._protection.bases.items():
            # before a direction is replaced: the least used one is
            if key in used:
                self._basis(key).record_use(used[key])
            for gradient in gradients:
                found = self._candidates(key, layout.a_block(gradient, key))
                if found is not None:
                    yield from self.admit(key, found)
                    yield
            reads += COUNT + len(gradients) * len(occupied(basis)) * basis.d_in
            if reads > READS:
                reads = 0
                yield

    def _candidates(self, key: str, block: Tensor) -> Tensor | None:
        """Directions of a learned sample's dA `[D_in, K]` outside P; None where too little of it is."""
        outside, rows = block.clone(), occupied(self._basis(key))
        if len(rows):
            dispatch.project_out_(outside, rows.to(outside.dtype), chunk=len(rows))
        # the leading vectors of dA itself lie in P after a warm start: P then grew by 5 directions in a stream where
        # it grows by 26 on what is left of dA outside it
        if float(outside.norm()) > self._config.novelty * float(block.norm()):
            return candidates(outside, self._config.directions_per_sample)
        return None

    def admit(self, key: str, found: Tensor) -> Generator[None, None, None]:
        """Let the novel ones of some directions join a basis and fold them in the experts.

        Args:
            found: candidates `[D_in, k]`.
        """
        basis = self._basis(key)
        before = basis.version
        admission = basis.admit(found.cpu(), threshold=self._config.novelty)
        pruned = len(basis.prune()) if basis.saturated else 0
        self.growth += Growth(len(admission), len(admission.replaced), pruned)
        if self._protection.folds and len(admission):
            for expert in self.experts.values():
                late = expert.folded.get(key, -1) != before
                yield from self._fold(expert, key, basis.directions() if late else admission.directions)

    def fold(self, name: str) -> Generator[None, None, None]:
        """Fold an expert against the P of this moment: at its creation, import and activation.

        Exact whatever joined or left P while it was away, and a no-op where nothing did.
        """
        expert = self.experts[name]
        for key in self._protection.bases if self._protection.folds else ():
            basis = self._now(key)
            if basis.columns and expert.folded.get(key, -1) != basis.version:
                yield from self._fold(expert, key, basis.directions())
                yield

    def restart(self, name: str) -> Generator[None, None, bool]:
        """Fold an expert's plastic factors whole, as they were on average, and start them anew outside P.

        What it computes becomes what these compute, but for what the cut to rank r_c drops. What they read most joins
        P, and the other experts fold it.

        Returns:
            Whether it was made; not where the cut would cost more than the share `restart_loss`. Then it is put off,
            and nothing else has changed.
        """
        expert, config = self.experts[name], self._config
        layout, mean = expert.layout, expert.factors if expert.average is None else expert.average
        expert.started = expert.steps
        dropped, kept = [0.0] * len(layout.sites), [0.0] * len(layout.sites)
        for key in layout.bases:
            for place, site in enumerate(layout.members(key)):
                if place and place % CUTS == 0:
                    yield
                held, cut = add_to_held(expert.held[site], *_whole(layout, mean, site), expert.scaling,
                                        config.held_rank)
                # |U V|^2 = tr(U.T U V V.T)
                dropped[site], kept[site] = cut.energy, float(((held.U.T @ held.U) * (held.V @ held.V.T)).sum())
            yield
        lost = sum(dropped)
        if lost and (lost / (lost + sum(kept))) ** 0.5 > config.restart_loss:
            return False
        expert.factors, expert.average = mean, None
        fresh = yield from drawing(layout, config.seed, name, expert.steps, dtype=mean.dtype)
        for key in layout.bases:
            if config.restart_directions:
                yield from self.admit(key, read_directions(expert, key, config.restart_directions))
                yield
            # of the factors as admission has left them
            for place, site in enumerate(layout.members(key)):
                if place and place % CUTS == 0:
                    yield
                self._hold(expert, site, *_whole(layout, expert.factors, site))
            block = layout.a_block(fresh, key)
            block.copy_(remove(block, self._now(key).directions().to(block.dtype))[0])
            yield
        expert.factors = fresh
        # the second moment stays: the size of the gradients is that of the samples, not of the factors' history
        if expert.exp_avg is not None:
            expert.exp_avg = torch.empty_like(expert.exp_avg)
            for part in _parts(expert.exp_avg):
                expert.exp_avg[part].zero_()
                yield
        return True

    def _now(self, key: str) -> ProjectionBasis:
        """A basis as it is to become, for reading."""
        return self._bases.get(key, self._protection.bases[key])

    def _basis(self, key: str) -> ProjectionBasis:
        """The copy of a basis."""
        if key not in self._bases:
            self._bases[key] = self._protection.bases[key].copy()
        return self._bases[key]

    def _fold(self, expert: Expert, key: str, directions: Tensor) -> Generator[None, None, None]:
        """Move what A does along directions `[D_in, j]` of P to the held parts of the linears of one input."""
        layout, N = expert.layout, directions.to(expert.factors.dtype)
        for name in ("factors", "exp_avg", "average"):
            slab = getattr(expert, name)
            if slab is not None and self._own.get((expert.name, name)) is not slab:
                own = host_empty(len(slab), dtype=slab.dtype)
                for part in _parts(slab):
                    own[part].copy_(slab[part])
                    if part.stop < len(slab):
                        yield
                self._own[expert.name, name] = own
                setattr(expert, name, own)
        block = layout.a_block(expert.factors, key)
        freed, coefficients = remove(block, N)
        block.copy_(freed)
        for slab in (expert.exp_avg, expert.average):
            if slab is not None:
                block = layout.a_block(slab, key)
                block.copy_(remove(block, N)[0])
        for place, site in enumerate(layout.members(key)):
            if place and place % CUTS == 0:
                yield
            own = coefficients[:, place * layout.rank : (place + 1) * layout.rank]
            self._hold(expert, site, N, own, layout.b(expert.factors, site))
        expert.folded[key] = self._now(key).version

    def _hold(self, expert: Expert, site: int, directions: Tensor, coefficients: Tensor, B: Tensor) -> None:
        """Add directions (scaling * coefficients B) to the held part of a site: see `fold.add_to_held`."""
        expert.held[site], cut = add_to_held(expert.held[site], directions, coefficients, B, expert.scaling,
                                             self._config.held_rank)
        expert.discarded[site] += cut.first
        expert.discarded_sq[site] += cut.energy
        if cut.dropped is not None and self._protection.on_cut is not None:
            self._cuts.append((expert.name, site, cut.dropped))


def fold_now(protection: Protection, expert: Expert) -> None:
    """`Draft.fold` of an expert, all at once."""
    draft = Draft(protection, [expert])
    exhausted(draft.fold(expert.name))
    draft.commit()


def candidates(gradient: Tensor, at_most: int) -> Tensor:
    """Leading left singular vectors of dA, through the Gram matrix of its few columns.

    dA = sum_t x_t (G_t B.T) is an error-weighted mix of the inputs, so these are the input directions along which the
    sample was learned.

    Args:
        gradient: dA of all linears of one input, shape `[D_in, K]`.

    Returns:
        Unit columns, shape `[D_in, <= at_most]`; none where dA is 0.
    """
    # scaled first: squares of gradients of 1e-25 would vanish
    largest = gradient.abs().max()
    if not bool(largest > 0) or at_most == 0:
        return gradient[:, :0]
    wide = (gradient / largest).double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    keep = min(at_most, int((values > NO_DIRECTION**2 * values[-1]).sum()))
    leading = wide @ vectors[:, -keep:].flip(1)
    return leading / leading.norm(dim=0)


def _whole(layout: Layout, factors: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of a linear as what `fold.add_to_held` takes: all of A is along directions that are held."""
    return layout.a(factors, site), torch.eye(layout.rank, dtype=factors.dtype), layout.b(factors, site)


def _parts(slab: Tensor) -> Iterator[slice]:
    return (slice(start, start + PART) for start in range(0, len(slab), PART))
