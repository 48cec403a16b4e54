"""Muon in float32, all matrices of one shape at a time: for CPUs, most of which multiply bf16 slowly.

torch.optim.Muon orthogonalises each matrix alone and in bf16: 54 ms for one of 192 x 192 on a CPU without bf16
instructions, where 16 of them together took 29 ms in float32 with its five rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# odd quintics, each with the least largest error on the interval that the one before leaves, from singular values of
# 0.01 of the norm on (the construction of Polar Express, Amsel et al. 2025, arXiv:2505.16932): 3 rounds make 0.73 to
# 1.27 of them. That of Jordan et al. 2024 needs 5 for 0.68 to 1.13: 15 % more time for the demo's base, of perplexity
# 59, not 60
_QUINTICS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

    Args:
        params: matrices only.
        lr: step per update; a matrix with more rows than columns takes sqrt(rows / columns) of it.
        momentum: Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for matrices in shapes.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = torch.stack([p.grad for p in matrices if p.grad is not None]).float()
        state = self.state[matrices[0]]
        average = state.setdefault("momentum", torch.zeros_like(gradients))
        average.lerp_(gradients, 1 - group["momentum"])
        rows, columns = matrices[0].shape
        step = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, change in zip(matrices, orthogonal(gradients.lerp(average, group["momentum"])), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=step)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the orthogonal factor U V.T of each matrix U S V.T of a stack `[n, rows, columns]`."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    # the Frobenius norm bounds the largest singular value, and the first quintic needs that to be at most 1
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    for a, b, c in _QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x
