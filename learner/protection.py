"""What is protected: one basis P per input space, the projection of updates against it, and the growth of P.

The guard "fold" keeps P.T A = 0 for every expert, projects A after the optimizer and folds what A does along a new
direction into the held part. The guard "gradient" is the specification's written form: dA is projected, nothing is
folded, and B keeps moving what was protected. The guard "none" has no basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.anchor import BaseAnchor
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.fold import Cut, add_to_held, remove
from ogpstream.learner.restart import fresh_factors, read_directions
from ogpstream.learner.staging import Staging
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.experts import Expert, Held
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.pinned import host_copy

# |p.T Z|^2 over |Z|^2 above which an update used direction p
USED = 1e-3
# singular values of dA under this share of the largest carry no direction
NO_DIRECTION = 1e-3


@dataclass(frozen=True)
class Growth:
    """What one growth of the bases did, summed over them."""

    admitted: int = 0
    replaced: int = 0
    pruned: int = 0

    def __add__(self, other: Growth) -> Growth:
        return Growth(self.admitted + other.admitted, self.replaced + other.replaced, self.pruned + other.pruned)


@dataclass
class Use:
    """By basis, |p.T Z|^2 of each direction p, shape `[occupied rows]`, and |Z|^2, of the A or dA in all blocks."""

    shares: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __iadd__(self, other: Use) -> Use:
        for key, (squares, energy) in other.shares.items():
            before = self.shares.get(key)
            self.shares[key] = (squares, energy) if before is None else (before[0] + squares, before[1] + energy)
        return self


class Protection:
    """The bases of all adapted linears.

    Args:
        sites: the adapted linears; sites with the same `basis` share one P.

    Attributes:
        staging: brings P to where a slab is.
    """

    def __init__(self, sites: Sequence[SiteShape], config: LearnerConfig) -> None:
        self.config = config
        self.staging = Staging(torch.device("cpu"))
        self.sites = tuple(sites)
        # told of what each cut of a held part drops: (expert, site, the dropped matrix)
        self.on_cut: Callable[[str, int, Held], None] | None = None
        self.bases: dict[str, ProjectionBasis] = {}
        self.anchors: dict[str, BaseAnchor] = {}
        if config.guard != "none":
            for site in sites:
                if site.basis not in self.bases:
                    columns = max(1, min(config.basis_columns, int(config.basis_share * site.d_in)))
                    self.bases[site.basis] = ProjectionBasis(site.d_in, capacity=columns, window=config.use_window)

    @property
    def folds(self) -> bool:
        return self.config.guard == "fold"

    @property
    def columns(self) -> int:
        """Directions in all bases together."""
        return sum(basis.columns for basis in self.bases.values())

    def project_(self, layout: Layout, slab: Tensor) -> Use:
        """Take span(P) out of every A (or dA) of a flat slab `[layout.numel]`, in place, on the slab's device.

        Returns:
            What share the slab had in each direction: for `used`.
        """
        use = Use()
        for key in layout.bases:
            count = len(_occupied(self.bases[key])) if key in self.bases else 0
            if not count:
                continue
            block = layout.a_block(slab, key)
            energy = block.square().sum()
            # all that is at hand at once: 8 x fewer products of a size where calls dominate than by chunks of 32
            squares = []
            for rows in self.staging.rows(self.bases[key], count, block):
                squares.append(dispatch.project_out_(block, rows, chunk=len(rows)).square().sum(1))
                del rows  # before the next piece is there
            use.shares[key] = torch.cat(squares), energy
        return use

    def used(self, use: Use) -> dict[str, Tensor]:
        """By basis, the mask `[rows]` of the directions that were used: for `record_use`, when it is committed."""
        masks = {}
        for key, (squares, energy) in use.shares.items():
            masks[key] = torch.zeros(len(self.bases[key].rows()), dtype=torch.bool)
            masks[key][: len(squares)] = (squares > USED * energy).cpu()
        return masks

    def record_use(self, used: Mapping[str, Tensor]) -> None:
        """Count one update, in which the directions of these masks were used."""
        for key, mask in used.items():
            self.bases[key].record_use(mask)

    def pull_to_base_(self, layout: Layout, factors: Tensor, scaling: float) -> None:
        """Fade what an expert adds to the base model's own inputs, in place; nothing without a warm start."""
        if self.config.base_anchor:
            for key in layout.bases:
                if key in self.anchors:
                    self.anchors[key].pull_(layout, factors, key, scaling=scaling, strength=self.config.base_anchor)

    def warm_start(self, covariances: Mapping[str, Tensor]) -> None:
        """Protect the leading directions of the base's inputs for good, and anchor the others.

        Args:
            covariances: C `[D_in, D_in]` by basis.
        """
        found = {}
        for key, covariance in covariances.items():
            if not float(covariance.trace()) > 0:
                continue  # of a linear that no text has reached, such as a routed expert's
            values, vectors = torch.linalg.eigh(covariance)
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            held = values.cumsum(0) / values.sum()
            room = int(self.config.warm_share * self.bases[key].capacity)
            count = min(int((held < self.config.warm_energy).sum()) + 1, room)
            found[key] = vectors[:, :count]
            self.anchors[key] = BaseAnchor.from_eigen(values, vectors, count)
        self.admit(found, [], fixed=True)

    def grow(self, layout: Layout, gradient: Tensor, experts: Sequence[Expert]) -> Growth:
        """Candidates of a learned sample's dA join the bases; `experts` (the active ones) fold.

        Args:
            gradient: flat slab of the sample's dA and dB, before any projection.
        """
        outside = gradient.clone()
        self.project_(layout, outside)
        found = {}
        for key in self.bases:
            block, rest = layout.a_block(gradient, key), layout.a_block(outside, key)
            # the leading vectors of dA itself lie in P after a warm start: P then grew by 5 directions in a stream
            # where it grows by 26 on what is left of dA outside it
            if float(rest.norm()) > self.config.novelty * float(block.norm()):
                found[key] = candidates(rest, self.config.directions_per_sample)
        return self.admit(found, experts)

    def admit(self, found: Mapping[str, Tensor], experts: Sequence[Expert], *, fixed: bool = False) -> Growth:
        """Let novel directions join P and fold them in the given experts, all bases at once.

        Args:
            found: candidates `[D_in, k]` by basis.
            fixed: never replaced or pruned (warm start).
        """
        admitted = replaced = pruned = 0
        new: dict[str, Tensor] = {}
        before = {key: self.bases[key].version for key in found}
        for key, directions in found.items():
            basis = self.bases[key]
            admission = basis.admit(directions.cpu(), threshold=0.0 if fixed else self.config.novelty, fixed=fixed)
            if len(admission):
                new[key] = admission.directions
                admitted += len(admission)
                replaced += len(admission.replaced)
            if basis.saturated:
                pruned += len(basis.prune())
        if self.folds and new:
            for expert in experts:
                late = {k for k in new if expert.folded.get(k, -1) != before[k]}
                self._fold(expert, {k: self._live(k) if k in late else n for k, n in new.items()})
        return Growth(admitted, replaced, pruned)

    def fold(self, expert: Expert) -> None:
        """Fold an expert against the P of this moment: at its creation, import and activation.

        Exact whatever joined or left P while it was away, and a no-op where nothing did.
        """
        if self.folds:
            stale = [key for key, basis in self.bases.items()
                     if basis.columns and expert.folded.get(key, -1) != basis.version]
            self._fold(expert, {key: self._live(key) for key in stale})

    def restart(self, expert: Expert, others: Sequence[Expert]) -> Growth | None:
        """Fold an expert's plastic factors whole, as they were on average, and start them anew outside P.

        What it computes becomes what these compute, but for what the cut to rank r_c drops.

        Args:
            others: active experts, which fold what joins P.

        Returns:
            None, and nothing has changed, where the cut would cost more than the share `restart_loss`.
        """
        mean = expert.factors if expert.average is None else expert.average
        if self._whole_fold(expert, mean).loss() > self.config.restart_loss:
            return None
        expert.factors, expert.average = mean, None
        found = read_directions(expert, self.config.restart_directions)
        growth = self.admit(found, [expert, *others]) if self.config.restart_directions else Growth()
        # of the factors as admission has left them
        change, layout = self._whole_fold(expert, expert.factors), expert.layout
        factors = fresh_factors(layout, self.config.seed, expert.name, expert.steps, dtype=mean.dtype)
        for key in self.bases:
            block = layout.a_block(factors, key)
            block.copy_(remove(block, self._live(key).to(block.dtype))[0])
        change.commit()
        expert.factors, expert.started = factors, expert.steps
        # the second moment stays: the size of the gradients is that of the samples, not of the factors' history
        expert.exp_avg = None if expert.exp_avg is None else torch.zeros_like(expert.exp_avg)
        return growth

    def _whole_fold(self, expert: Expert, factors: Tensor) -> _HeldChange:
        change, every, layout = _HeldChange(expert, self), torch.eye(expert.rank, dtype=factors.dtype), expert.layout
        for site in range(len(layout.sites)):
            change.add(site, layout.a(factors, site), every, layout.b(factors, site))
        return change

    def _live(self, key: str) -> Tensor:
        basis = self.bases[key]
        return basis.rows()[basis.live].T

    def _fold(self, expert: Expert, directions: Mapping[str, Tensor]) -> None:
        if not directions:
            return
        layout = expert.layout
        factors = expert.factors.clone()
        others = {name: slab.clone() for name in ("exp_avg", "average") if (slab := getattr(expert, name)) is not None}
        change = _HeldChange(expert, self)
        for key, stored in directions.items():
            N = stored.to(factors.dtype)
            block = layout.a_block(factors, key)
            freed, coefficients = remove(block, N)
            block.copy_(freed)
            for slab in others.values():
                block = layout.a_block(slab, key)
                block.copy_(remove(block, N)[0])
            for column, site in enumerate(layout.members(key)):
                own = coefficients[:, column * layout.rank : (column + 1) * layout.rank]
                change.add(site, N, own, layout.b(factors, site))
        change.commit()
        for name, slab in {"factors": factors, **others}.items():
            setattr(expert, name, slab)
        expert.folded = {**expert.folded, **{key: self.bases[key].version for key in directions}}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for index, (key, basis) in enumerate(self.bases.items()):
            own, meta[key] = basis.state_dict()
            if key in self.anchors:
                anchor = self.anchors[key]
                own |= {"anchor_rows": anchor.rows, "anchor_weights": anchor.weights}
                meta[key] = {**meta[key], "anchor_floor": anchor.floor}
            tensors.update({f"{index}.{name}": tensor for name, tensor in own.items()})
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore `state_dict` and check that every basis is orthonormal.

        Raises:
            ValueError: the bases differ from those of these sites, or are damaged.
        """
        # as sets: a snapshot comes back with its keys sorted
        if meta.keys() != self.bases.keys():
            odd = min(meta.keys() ^ self.bases.keys())
            raise ValueError(f"the state has bases for {len(meta)} inputs, this learner for {len(self.bases)}: "
                             f"{odd} is only in one of them")
        for index, (key, basis) in enumerate(self.bases.items()):
            mark = f"{index}."
            own = {name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)}
            values = dict(meta[key])
            if "anchor_rows" in own:
                self.anchors[key] = BaseAnchor(
                    host_copy(own.pop("anchor_rows")), own.pop("anchor_weights"), values.pop("anchor_floor")
                )
            basis.load_state_dict(own, values)
            basis.check()


class _HeldChange:
    """New held parts of an expert and what their cuts drop, none of it the expert's before `commit`."""

    def __init__(self, expert: Expert, protection: Protection) -> None:
        self._expert, self._protection = expert, protection
        self._held = list(expert.held)
        self._cuts: list[tuple[int, Cut]] = []

    def add(self, site: int, directions: Tensor, coefficients: Tensor, B: Tensor) -> None:
        """Add directions (scaling * coefficients B) to the held part of a site: see `fold.add_to_held`."""
        self._held[site], cut = add_to_held(self._held[site], directions, coefficients, B, self._expert.scaling,
                                            self._protection.config.held_rank)
        self._cuts.append((site, cut))

    def loss(self) -> float:
        """What the cuts drop, as a share of the new held parts: root of the sums of squares."""
        dropped = sum(cut.energy for _, cut in self._cuts)
        # |U V|^2 = tr(U.T U V V.T)
        kept = sum(float(((h.U.T @ h.U) * (h.V @ h.V.T)).sum()) for h in self._held)
        return (dropped / (dropped + kept)) ** 0.5 if dropped else 0.0

    def commit(self) -> None:
        expert, on_cut = self._expert, self._protection.on_cut
        expert.held = self._held
        expert.discarded, expert.discarded_sq = list(expert.discarded), list(expert.discarded_sq)
        for site, cut in self._cuts:
            expert.discarded[site] += cut.first
            expert.discarded_sq[site] += cut.energy
            if cut.dropped is not None and on_cut is not None:
                on_cut(expert.name, site, cut.dropped)


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


def _occupied(basis: ProjectionBasis) -> Tensor:
    """The rows of P.T up to the last live one, in whole chunks of 32."""
    live = basis.live.nonzero()
    if not len(live):
        return basis.rows()[:0]
    return basis.rows()[: -(-(int(live[-1]) + 1) // 32) * 32]
