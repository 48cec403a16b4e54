"""The baseline by hand: in-place `addmm_` of cuBLAS, one fused AdamW, a projection of two products.

What makes it fast, beside the library: factors are published twice in one launch, plain and scaled, so that nothing is
left to scale in a forward or a backward; A is kept transposed, so that all masters and gradients are contiguous slices
of one tensor and one kernel steps them all; products write where their result is wanted; a streamed P comes as one copy
on a stream of its own, into a buffer for all of it. That is more device memory than ours takes, and faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ogpstream.profiling.kernel_problem import BETAS, EPS, LR, SCALE_TRAINED, STEP, Job, Problem, Slab

# by torch's schema: results in float32 of half precision, straight into the slab
_HAS_WIDE_OUT = "dtype_out" in torch.ops.aten.mm.overloads()


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever the operands are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, out in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and _HAS_WIDE_OUT:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(_wide(a, b))


def _backward(x: Tensor, g: Tensor, h: Tensor, A: Tensor, B: Tensor, dA_t: Tensor, dB: Tensor, dx: Tensor) -> None:
    """Four products: Y, then A's gradient transposed, B's, and dx over the base's. The trained columns come first.

    h and B are scaled, A is not: Y = g (s B).T, dA = x.T Y, dB = h.T g, dx += Y A.T.
    """
    rank = len(dA_t)
    Y = g @ B.T
    _product(Y[:, :rank].T, x, dA_t)
    _product(h[:, :rank].T, g, dB)
    dx.addmm_(Y, A.T)


def _backward_to_new(
    x: Tensor, g: Tensor, h: Tensor, A: Tensor, B: Tensor, dx: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The same with gradients in tensors of their own: a compiler would compile anew for each slice of one tensor."""
    Y = g @ B.T
    dA_t, dB = _wide(Y[:, :rank].T, x), _wide(h[:, :rank].T, g)
    dx.addmm_(Y, A.T)
    return dA_t, dB


def _project(Z_t: Tensor, rows: Tensor) -> None:
    """Z.T -= (Z.T P) P.T, of one matrix `[K, D]` or of a batch with a basis each."""
    if len(Z_t) == 1:
        Z_t[0].addmm_(Z_t[0] @ rows[0].T, rows[0], alpha=-1)
    else:
        Z_t.baddbmm_(Z_t @ rows.mT, rows, alpha=-1)


class ByHand:
    """Operands of one problem in the layout of this provider; with `compiled` torch.compile does what it computes."""

    def __init__(self, problem: Problem, *, compiled: bool = False) -> None:
        self._problem, case, self._compiled = problem, problem.case, compiled

        def transform(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._backward_of = transform(_backward_to_new if compiled else _backward)
        self._project_of = transform(_project)
        self._forward_of = transform(lambda x, A, B: (x @ A) @ B)
        if case.op != "cross_entropy":
            self._masters = _transposed(problem.gradient if case.op == "projection" else problem.masters)
        if case.has_factors:
            # a forward takes (s A, B), so that the h it keeps is the scaled one; a backward takes (A, s B)
            self._forward_factors = [((A * problem.scale).to(A.dtype), B) for A, B in problem.packed]
            self._backward_factors = [(A, (B * problem.scale[:, None]).to(B.dtype)) for A, B in problem.packed]
        if case.projects:
            self._blocks = self._masters[: problem.masters.numel_A].view(len(problem.rows), -1, case.D_in)
            self._stored = torch.stack(problem.rows)
            self._rows = self._stored
            if not self._stored.is_cuda and problem.device.type == "cuda":
                self._stored = self._stored.pin_memory()
                self._rows = torch.empty_like(self._stored, device=problem.device)
                self._side = torch.cuda.Stream(problem.device)

    def job(self) -> Job:
        case, p = self._problem.case, self._problem
        if case.op == "lora_forward":
            inputs = [(x, A, B) for x, (A, B) in zip(p.x, self._forward_factors, strict=True)]
            return Job(lambda: [self._forward_of(*each) for each in inputs], lambda y: {"y": y})
        if case.op == "projection":
            return Job(self._projection, lambda _: {"A": self._A(self._masters)})
        self._gradient = _transposed(p.gradient)
        dx = [base_dx.clone() for base_dx in p.base_dx] if case.has_factors else []
        if case.op == "lora_backward":
            backward = self._backward_job(dx)
            return Job(backward, lambda _: {"dA": self._A(self._gradient), "dB": self._B(self._gradient), "dx": dx})
        step = self._step_job()

        def after(_: Any) -> dict[str, list[Tensor]]:
            return {"A": self._A(self._masters), "B": self._B(self._masters), "dx": dx}

        if case.op == "step_projection":

            def alone() -> None:
                self._begin_copy()
                step()

            return Job(alone, after)
        backward = self._backward_job(dx)

        def update() -> None:
            self._begin_copy()
            backward()
            step()

        return Job(update, after)

    def _backward_job(self, dx: list[Tensor]) -> Callable[[], None]:
        p = self._problem
        h = [h.to(p.case.torch_dtype) for h in p.h]
        dA = [A.T for A in self._A(self._gradient)]
        dB = self._B(self._gradient)
        inputs = [(x, g, kept, A, B) for x, g, kept, (A, B) in zip(p.x, p.g, h, self._backward_factors, strict=True)]
        in_place = [(*each, *outputs) for each, *outputs in zip(inputs, dA, dB, dx, strict=True)]
        to_new = [(*each, out, p.case.r) for each, out in zip(inputs, dx, strict=True)]

        def backward() -> None:
            if self._compiled:
                new_dA, new_dB = zip(*(self._backward_of(*each) for each in to_new), strict=True)
                torch.cat([each.view(-1) for each in (*new_dA, *new_dB)], out=self._gradient)
            else:
                for each in in_place:
                    self._backward_of(*each)

        return backward

    def _step_job(self) -> Callable[[], None]:
        p = self._problem
        device = p.device
        masters = torch.nn.Parameter(self._masters)
        masters.grad = self._gradient
        optimizer = torch.optim.AdamW([masters], LR, BETAS, EPS, weight_decay=0.0, fused=True,
                                      capturable=device.type == "cuda")
        optimizer.state[masters] = {
            "step": torch.tensor(STEP - 1.0, device=device),
            "exp_avg": _transposed(p.exp_avg), "exp_avg_sq": _transposed(p.exp_avg_sq),
        }  # fmt: skip
        # the trained columns have one scale
        scales = torch.tensor([[1.0], [SCALE_TRAINED]], device=device)
        serving = torch.empty(2, len(self._masters), dtype=p.case.torch_dtype, device=device)

        def step() -> None:
            optimizer.step()
            if p.case.m:
                self._arrived()
                self._project_of(self._blocks, self._rows)
            torch.mul(self._masters, scales, out=serving)

        return step

    def _projection(self) -> None:
        self._begin_copy()
        self._arrived()
        self._project_of(self._blocks, self._rows)

    def _begin_copy(self) -> None:
        if self._rows is not self._stored:
            # the buffer may still be read by the update before
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._rows.copy_(self._stored, non_blocking=True)

    def _arrived(self) -> None:
        if self._rows is not self._stored:
            torch.cuda.current_stream().wait_stream(self._side)

    def _A(self, flat: Tensor) -> list[Tensor]:
        case = self._problem.case
        return [A.T for A in flat[: case.L * case.r * case.D_in].view(case.L, case.r, case.D_in)]

    def _B(self, flat: Tensor) -> list[Tensor]:
        case = self._problem.case
        return list(flat[case.L * case.r * case.D_in :].view(case.L, case.r, case.D_out))


def _transposed(slab: Slab) -> Tensor:
    """The same numbers, each A as `[r, D_in]`: all A one after the other, then all B."""
    return torch.cat([*(A.T.reshape(-1) for A in slab.A), slab.flat[slab.numel_A :]])
