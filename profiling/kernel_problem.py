"""The operands of a case: random, reproducible, and such that an update means what it means in the learner.

Masters lie outside span(P) before the update, as the learner's invariant has it; the factors that serve are their
rounded copies; moments are those of a run that has gone on for a while, so that Adam's step is a smooth function of
the gradient and its error can be read from the change of the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ogpstream.profiling.kernel_cases import Case

# what all providers do to the masters. eps is too small to matter, since torch's is absolute and ours relative; the
# rate is so large that the change of a master is not lost in its own rounding
LR, BETAS, EPS, STEP = 0.5, (0.9, 0.999), 1e-12, 100
# gradients of about this size make exp_avg and sqrt(exp_avg_sq) alike
GRADIENT = 0.1
SCALE_TRAINED, SCALE_REST = 2.0, 1.0

# by name: y, dA, dB, dx, loss, dlogits; A and B are the masters afterwards. An entry for each linear
Outputs = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Job:
    """A provider at work on one problem: `run` is timed, `read` finds the outputs in what it returned or changed."""

    run: Callable[[], Any]
    read: Callable[[Any], Outputs]


@dataclass(frozen=True)
class Slab:
    """A flat tensor of all A, then all B, with its views.

    The A of linears that are projected against one P lie side by side, `[D_in, K]`: all L with a shared P, else one.
    """

    flat: Tensor
    case: Case

    @cached_property
    def blocks(self) -> list[Tensor]:
        """`[D_in, K]` for each P."""
        case = self.case
        count = 1 if case.scope == "shared" else case.L
        size = case.L * case.D_in * case.r // count
        return [block.view(case.D_in, -1) for block in self.flat[: count * size].split(size)]

    @cached_property
    def A(self) -> list[Tensor]:
        return [A for block in self.blocks for A in block.split(self.case.r, dim=1)]

    @cached_property
    def B(self) -> list[Tensor]:
        return list(self.flat[self.numel_A :].view(self.case.L, self.case.r, self.case.D_out))

    @property
    def numel_A(self) -> int:
        return self.case.L * self.case.D_in * self.case.r

    def clone(self) -> Slab:
        return Slab(self.flat.clone(), self.case)


class Problem:
    """Operands of one case on one device. Providers clone what they change; everything is made when first asked for.

    Lists have one entry a linear. h is what the forward kept, base_dx the frozen linear's own input gradient.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self._rngs: dict[str, torch.Generator] = {}
        self.trained = slice(0, case.r)

    def _rng(self, name: str) -> torch.Generator:
        # one for each operand: it is the same whatever was asked for before
        if name not in self._rngs:
            self._rngs[name] = torch.Generator(self.device).manual_seed(crc32(name.encode()))
        return self._rngs[name]

    def _randn(self, name: str, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=self._rng(name), device=self.device) * std).to(dtype)

    def _inputs(self, name: str, *shape: int, std: float = 1.0) -> list[Tensor]:
        return [self._randn(name, *shape, std=std, dtype=self.case.torch_dtype) for _ in range(self.case.L)]

    @cached_property
    def x(self) -> list[Tensor]:
        return self._inputs("x", self.case.T, self.case.D_in)

    @cached_property
    def g(self) -> list[Tensor]:
        # dA and dB are sums over T tokens: of the size of the moments at any T
        return self._inputs("g", self.case.T, self.case.D_out, std=GRADIENT * self.case.T**-0.5)

    @cached_property
    def base_dx(self) -> list[Tensor]:
        return self._inputs("base_dx", self.case.T, self.case.D_in, std=GRADIENT * self.case.T**-0.5)

    @cached_property
    def scale(self) -> Tensor:
        scale = torch.full((self.case.R,), SCALE_REST, device=self.device)
        scale[self.trained] = SCALE_TRAINED
        return scale

    @cached_property
    def rows(self) -> list[Tensor]:
        """P.T `[m, D_in]` for each block, float32, orthonormal; in pinned host RAM if it is streamed from there."""
        case, bases = self.case, []
        for _ in range(1 if case.scope == "shared" else case.L):
            q = self._randn("rows", case.D_in, case.m).double()
            q = torch.linalg.qr(q).Q if case.m else q
            rows = q.T.float().contiguous()
            if case.basis == "streamed" and self.device.type == "cuda":
                rows = rows.cpu().pin_memory()
            bases.append(rows)
        return bases

    @cached_property
    def masters(self) -> Slab:
        slab = self._slab("masters", 1.0)
        slab.flat[: slab.numel_A] *= self.case.D_in**-0.5
        slab.flat[slab.numel_A :] *= self.case.R**-0.5
        if self.case.projects:
            for block, rows in zip(slab.blocks, self.rows, strict=True):
                P = rows.to(self.device, torch.float64)
                Z = block.double()
                block.copy_(Z - P.T @ (P @ Z))
        return slab

    @cached_property
    def gradient(self) -> Slab:
        return self._slab("gradient", GRADIENT)

    @cached_property
    def exp_avg(self) -> Slab:
        # a tenth of the gradient: half of what 0.9 m + 0.1 g says is this update's, and so is its error
        return self._slab("exp_avg", GRADIENT / 10)

    @cached_property
    def exp_avg_sq(self) -> Slab:
        slab = self._slab("exp_avg_sq", GRADIENT)
        # never near zero, where a rounding of the gradient would be a large part of the step
        slab.flat.square_().add_(GRADIENT**2)
        return slab

    @cached_property
    def packed(self) -> list[tuple[Tensor, Tensor]]:
        """A `[D_in, R]` and B `[R, D_out]` as they serve, the trained columns first."""
        case, pairs = self.case, []
        for A, B in zip(self.masters.A, self.masters.B, strict=True):
            other_A = self._randn("other_A", case.D_in, case.R - case.r, std=case.D_in**-0.5)
            other_B = self._randn("other_B", case.R - case.r, case.D_out, std=case.R**-0.5)
            both = torch.cat([A, other_A], dim=1), torch.cat([B, other_B])
            pairs.append((both[0].to(case.torch_dtype), both[1].to(case.torch_dtype)))
        return pairs

    @cached_property
    def h(self) -> list[Tensor]:
        """`(x A) * scale` in float32."""
        return [
            ((x.double() @ A.double()) * self.scale).float() for x, (A, _) in zip(self.x, self.packed, strict=True)
        ]

    @cached_property
    def logits(self) -> Tensor:
        return self._randn("logits", self.case.T, self.case.V, std=3.0, dtype=self.case.torch_dtype)

    @cached_property
    def target(self) -> Tensor:
        return torch.randint(self.case.V, (self.case.T,), generator=self._rng("target"), device=self.device)

    def _slab(self, name: str, std: float) -> Slab:
        case = self.case
        return Slab(self._randn(name, case.L * case.r * (case.D_in + case.D_out), std=std), case)


def relative(out: Sequence[Tensor], ref: Sequence[Tensor]) -> float:
    """The largest |out - ref| / |ref| of pairs; NaN when one holds a NaN, which no bound passes."""
    errors = [
        (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300) for a, b in zip(out, ref, strict=True)
    ]
    return float(torch.stack(errors).max())
