"""What is protected: one basis P per input space, the projection of updates against it. `draft.py` grows P.

The guard "fold" keeps P.T A = 0 for every expert, projects A after the optimizer and folds what A does along a new
direction into the held part. The guard "gradient" is the specification's written form: dA is projected, nothing is
folded, and B keeps moving what was protected. The guard "none" has no basis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.anchor import BaseAnchor
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.staging import Staging
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.experts import Expert, Held
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.pinned import host_copy

# numbers of P or of anchors that are read in one unit on a CPU: 3 ms of one core, for 24 columns
READS = 2**18
# |p.T Z|^2 over |Z|^2 above which an update used direction p
USED = 1e-3


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

    def has_folded(self, expert: Expert) -> bool:
        """Whether an expert is folded against the P of now."""
        # version 0 is the empty P, against which there is nothing to fold
        return not self.folds or all(expert.folded.get(key, 0) == basis.version for key, basis in self.bases.items())

    def project_(self, layout: Layout, slab: Tensor) -> Generator[None, None, Use]:
        """Take span(P) out of every A (or dA) of a flat slab `[layout.numel]`, in place, on the slab's device.

        Yields:
            On a CPU, between a few bases and the next ones.

        Returns:
            What share the slab had in each direction: for `used`.
        """
        use, reads = Use(), 0
        for key in layout.bases:
            count = len(occupied(self.bases[key])) if key in self.bases else 0
            if not count:
                continue
            if reads > READS and slab.device.type == "cpu":
                reads = 0
                yield
            reads += self.bases[key].d_in * count
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
        """By basis, the mask `[rows]` of the directions that were used: for `record_use`."""
        masks = {}
        for key, (squares, energy) in use.shares.items():
            masks[key] = torch.zeros(len(self.bases[key].rows()), dtype=torch.bool)
            masks[key][: len(squares)] = (squares > USED * energy).cpu()
        return masks

    def pull_to_base_(self, layout: Layout, factors: Tensor, scaling: float) -> Generator[None, None, None]:
        """Fade what an expert adds to the base model's own inputs, in place; nothing without a warm start.

        Yields:
            On a CPU, between a few anchors and the next ones.
        """
        reads = 0
        if self.config.base_anchor:
            for key in layout.bases:
                if key in self.anchors:
                    if reads > READS and factors.device.type == "cpu":
                        reads = 0
                        yield
                    reads += self.anchors[key].rows.numel()
                    self.anchors[key].pull_(layout, factors, key, scaling=scaling, strength=self.config.base_anchor)

    def warm_start(self, covariances: Mapping[str, Tensor]) -> None:
        """Protect the leading directions of the base's inputs for good, and anchor the others.

        Args:
            covariances: C `[D_in, D_in]` by basis.
        """
        for key, covariance in covariances.items():
            if not float(covariance.trace()) > 0:
                continue  # of a linear that no text has reached, such as a routed expert's
            values, vectors = torch.linalg.eigh(covariance)
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            held = values.cumsum(0) / values.sum()
            room = int(self.config.warm_share * self.bases[key].capacity)
            count = min(int((held < self.config.warm_energy).sum()) + 1, room)
            self.bases[key].admit(vectors[:, :count].cpu(), threshold=0.0, fixed=True)
            self.anchors[key] = BaseAnchor.from_eigen(values, vectors, count)

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


def occupied(basis: ProjectionBasis) -> Tensor:
    """The rows of P.T up to the last live one, in whole chunks of 32."""
    live = basis.live.nonzero()
    if not len(live):
        return basis.rows()[:0]
    return basis.rows()[: -(-(int(live[-1]) + 1) // 32) * 32]
