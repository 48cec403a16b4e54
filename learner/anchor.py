"""The base anchor: what an expert adds to the outputs of the base model's own inputs is pulled back a little.

P protects the few directions that hold most of the base's input energy; the many others hold the rest, and learning
moves through them. With C the covariance of the base's inputs, the energy an expert adds to them is

    E = s^2 tr(B.T A.T C A B) / 2        dE/dA = s^2 C A B B.T        dE/dB = s^2 A.T C A B

and each update takes one small gradient step on E, decoupled from the optimizer like weight decay. Where a sample
needs the adapter its loss wins; where only base-like inputs would feel it, it fades. No label and no Fisher
information is involved: C is a plain second moment of inputs.

C is kept as its leading eigenvectors outside P and one mean eigenvalue for all others: C = c I + Q diag(w) Q.T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.learner.staging import in_pieces
from ogpstream.memory.layout import Layout
from ogpstream.memory.pinned import host_copy

# eigenvectors kept per input: 256 x 2048 x 4 B = 2 MiB, as much as P
COLUMNS = 256


@dataclass(frozen=True)
class BaseAnchor:
    """C of one input space, scaled to a mean eigenvalue of 1: `rows` = Q.T `[k, D_in]`, `weights` `[k]`, `floor` c."""

    rows: Tensor
    weights: Tensor
    floor: float

    @classmethod
    def from_eigen(cls, values: Tensor, vectors: Tensor, protected: int) -> BaseAnchor:
        """Of all eigenvalues (largest first) and eigenvectors (columns), the first `protected` of which are in P."""
        scaled = values / values.mean()
        stop = min(protected + COLUMNS, len(scaled))
        rest = scaled[stop:]
        floor = float(rest.mean()) if len(rest) else 0.0
        kept = slice(protected, stop)
        return cls(host_copy(vectors[:, kept].T.float()), (scaled[kept] - floor).float(), floor)

    def times(self, block: Tensor) -> Tensor:
        """C block, shape `[D_in, K]`, on the block's device."""
        # transposed, with the few columns as rows: a fifth of the time of a BLAS
        few, weights, start = block.T, self.weights.to(block), 0
        product = self.floor * few
        for rows in in_pieces(self.rows, block.device, block.dtype):
            product = product + (few @ rows.T * weights[start : start + len(rows)]) @ rows
            start += len(rows)
            del rows  # before the next piece is there
        return product.T

    def pull_(self, layout: Layout, factors: Tensor, key: str, *, scaling: float, strength: float) -> None:
        """One step on E for all linears of this input, in place.

        Args:
            factors: flat slab of an expert.
            strength: length of the step; shortened where it would overshoot.
        """
        block = layout.a_block(factors, key)
        weighted = self.times(block)
        for column, site in enumerate(layout.members(key)):
            own = slice(column * layout.rank, (column + 1) * layout.rank)
            A, CA, B = block[:, own], weighted[:, own], layout.b(factors, site)
            outer, inner = scaling**2 * (B @ B.T), scaling**2 * (A.T @ CA)
            # a step over 1 / (largest eigenvalue) would grow what it should shrink; traces bound the eigenvalues
            # both at once: on a GPU a number that is read is a wait for the device
            of_B, of_A = torch.stack([outer.trace(), inner.trace()]).tolist()
            bound = max(of_B * self._largest, of_A, 1e-30)
            step = min(strength, 0.5 / bound)
            change = step * (inner @ B)
            A.sub_(CA @ outer, alpha=step)
            B.sub_(change)

    @property
    def _largest(self) -> float:
        return self.floor + (float(self.weights[0]) if len(self.weights) else 0.0)
