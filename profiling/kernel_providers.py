"""Ways to do the operations of a case, each as a good engineer would write it, and which of them this machine has.

All get the same operands and leave the same outputs; each keeps its factors in the layout that suits it. What a
provider allocates once for all calls, and casts of factors that a server makes when it publishes, are not timed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor

from ogpstream.kernels import reference
from ogpstream.profiling.kernel_by_hand import ByHand
from ogpstream.profiling.kernel_cases import Case, Operation
from ogpstream.profiling.kernel_peft import Peft
from ogpstream.profiling.kernel_problem import BETAS, EPS, LR, STEP, Job, Problem

ALL: frozenset[Operation] = frozenset(get_args(Operation))
LINEAR_ALGEBRA = ALL - {"cross_entropy"}
TRITON = ("ours", "separate")


@dataclass(frozen=True)
class Provider:
    """One way to do the operations `ops`.

    Attributes:
        capturable: its calls may be captured in a CUDA graph. Autograd runs a backward on the stream of its forward,
            which is not the one that captures: the attempt would spoil the capture and what is timed after it.
    """

    what: str
    ops: frozenset[Operation]
    make: Callable[[Problem], Job]
    capturable: bool = True


def by_backend(backend: Any, problem: Problem) -> Job:
    """One call an operation, of whatever has the functions of `kernels.reference` under their names."""
    case, p = problem.case, problem
    chunk = max(1, case.m) if case.basis == "resident" else 32
    if case.op == "cross_entropy":
        return Job(lambda: backend.cross_entropy(p.logits, p.target), _loss)
    if case.op == "lora_forward":
        operands = [(x, A, B, p.scale) for x, (A, B) in zip(p.x, p.packed, strict=True)]
        return Job(lambda: [backend.lora_forward(*each)[0] for each in operands], lambda y: {"y": y})
    linears = _linears(p) if case.has_factors else []

    def backward() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            backend.lora_backward(*operands, trained=p.trained, h=h, base_dx=base_dx)
            for operands, h, base_dx in linears
        ]

    if case.op == "lora_backward":
        return Job(backward, lambda out: dict(zip(("dA", "dB", "dx"), map(list, zip(*out, strict=True)), strict=True)))
    slab = (p.gradient if case.op == "projection" else p.masters).clone()

    def project() -> None:
        for block, rows in zip(slab.blocks, p.rows, strict=True):
            backend.project_out_(block, rows, chunk=chunk)

    if case.op == "projection":
        return Job(project, lambda _: {"A": slab.A})
    gradient, m, v = p.gradient.clone(), p.exp_avg.clone(), p.exp_avg_sq.clone()
    serving = torch.empty_like(slab.flat, dtype=case.torch_dtype)
    parts = [
        [each.flat[part] for each in (slab, gradient, m, v)]
        for part in (slice(0, slab.numel_A), slice(slab.numel_A, None))
    ]

    def step() -> None:
        for part in parts:
            backend.adam_(*part, step=STEP, lr=LR, betas=BETAS, eps=EPS)
        project()
        serving.copy_(slab.flat)

    if case.op == "step_projection":
        return Job(step, lambda _: {"A": slab.A, "B": slab.B})
    width = len(slab.A) // len(slab.blocks)
    all_dB = gradient.flat[gradient.numel_A :].view(-1, case.D_out)

    def update() -> list[Tensor]:
        dA, dB, dx = zip(*backward(), strict=True)
        for number, block in enumerate(gradient.blocks):
            torch.cat(dA[number * width : (number + 1) * width], dim=1, out=block)
        torch.cat(dB, out=all_dB)
        step()
        return list(dx)

    return Job(update, lambda dx: {"A": slab.A, "B": slab.B, "dx": dx})


def ours(problem: Problem) -> Job:
    """The fused call: parts of dA and dB instead of gradients, all of an update in one call.

    `lora_backward` ends with one sum of the parts of all linears, which K3 makes as it goes in an `update`: it leaves
    the gradients that the others leave.
    """
    from ogpstream.kernels.lora_update import Block, Linear, Parts, lora_backward_project, update_
    from ogpstream.kernels.optimizer import Adam, sum_splits
    from ogpstream.kernels.triton_backend import BACKEND

    case, p = problem.case, problem
    if case.op not in ("lora_backward", "step_projection", "update"):
        return by_backend(BACKEND, problem)
    slab = p.masters.clone()
    linears: list[Linear] = []
    if case.op != "step_projection":
        linears = [
            Linear(x, g, A, B, p.scale, p.trained, own_A, own_B, h=h, base_dx=base_dx)
            for ((x, g, A, B, _), h, base_dx), own_A, own_B in zip(_linears(p), slab.A, slab.B, strict=True)
        ]
    if case.op == "lora_backward":

        def backward() -> tuple[Tensor, list[Tensor]]:
            parts = Parts(slab.flat, [case.T], p.x[0])
            dx = [parts.add(linear) for linear in linears]
            return sum_splits(parts.complete()), dx

        def gradients(out: tuple[Tensor, list[Tensor]]) -> dict[str, list[Tensor]]:
            sums = type(slab)(out[0], case)
            return {"dA": sums.A, "dB": sums.B, "dx": out[1]}

        return Job(backward, gradients)
    rule = Adam(p.exp_avg.clone().flat, p.exp_avg_sq.clone().flat, STEP, LR, BETAS, EPS)
    blocks = [Block(A, rows, case.basis == "resident") for A, rows in zip(slab.blocks, p.rows, strict=True)]
    serving = torch.empty_like(slab.flat, dtype=case.torch_dtype)
    if case.op == "step_projection":
        one_part = p.gradient.flat[None]
        return Job(lambda: update_(slab.flat, one_part, rule, blocks, serving=serving),
                   lambda _: {"A": slab.A, "B": slab.B})
    return Job(lambda: lora_backward_project([linears], slab.flat, rule, blocks, serving=serving),
               lambda out: {"A": slab.A, "B": slab.B, "dx": out[0][0]})


def separate(problem: Problem) -> Job:
    """The same kernels by one call an operation, the gradients stored between them."""
    from ogpstream.kernels.triton_backend import BACKEND

    return by_backend(BACKEND, problem)


def cublas(problem: Problem) -> Job:
    """The cuBLAS backend that `dispatch` can choose instead of Triton."""
    from ogpstream.kernels.cublas_backend import BACKEND

    return by_backend(BACKEND, problem)


def compiled(problem: Problem) -> Job:
    """torch.compile of the code by hand, and of the plain cross-entropy."""
    # otherwise the graphs of earlier shapes count against the limit of recompilations
    torch.compiler.reset()
    if problem.case.op == "cross_entropy":
        loss = torch.compile(reference.cross_entropy, dynamic=False)
        return Job(lambda: loss(problem.logits, problem.target), _loss)
    return ByHand(problem, compiled=True).job()


def _linears(problem: Problem) -> list[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """(x, g, A, B, scale), h and base_dx of each linear."""
    p = problem
    return [
        ((x, g, A, B, p.scale), h, base_dx)
        for x, g, (A, B), h, base_dx in zip(p.x, p.g, p.packed, p.h, p.base_dx, strict=True)
    ]


def _loss(out: tuple[Tensor, Tensor]) -> dict[str, list[Tensor]]:
    return {"loss": [out[0]], "dlogits": [out[1]]}


PROVIDERS: dict[str, Provider] = {
    "ours": Provider("Triton, fused: one call of lora_backward_project", ALL, ours),
    "separate": Provider("Triton, one call an operation",
                         frozenset({"lora_backward", "step_projection", "update"}), separate),
    "reference": Provider("plain torch in float32", ALL, lambda p: by_backend(reference, p)),
    "cublas": Provider("the cuBLAS backend of dispatch", LINEAR_ALGEBRA, cublas),
    "addmm": Provider("addmm_ and cuBLAS projection by hand, fused AdamW", LINEAR_ALGEBRA, lambda p: ByHand(p).job()),
    # seconds of compilation for each of them
    "compiled": Provider("torch.compile of addmm", ALL - {"lora_forward", "step_projection"}, compiled),
    "peft": Provider("PEFT, autograd, fused AdamW, projection a linear; float32 adapters", ALL,
                     lambda p: Peft(p).job(), capturable=False),
    "peft_autocast": Provider("the same under autocast", frozenset({"lora_forward", "lora_backward", "update"}),
                              lambda p: Peft(p, autocast=True).job(), capturable=False),
}


def left_out(names: list[str], device: torch.device, *, quick: bool) -> dict[str, str]:
    """Providers that cannot run here or would say nothing, each with the reason in one line."""
    reasons: dict[str, str] = {}
    if find_spec("triton") is None:
        reasons |= dict.fromkeys((*TRITON, "cublas"), "triton is not installed: pip install triton")
    elif device.type == "cpu" and not _interpreted():
        here = "the Triton kernels need a CUDA device; TRITON_INTERPRET=1 checks them here, untimed"
        reasons |= dict.fromkeys(TRITON, here)
    if quick:
        reasons["compiled"] = "compilation takes longer than a quick run: leave --quick out"
    elif not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++", "cc", "gcc")):
        reasons["compiled"] = "torch.compile needs a C++ compiler: install g++"
    return {name: reason for name, reason in reasons.items() if name in names}


def runs(name: str, case: Case, *, is_base: bool) -> bool:
    """Whether a provider has something to say of a case; what compiles for seconds has at the base sizes only."""
    if name == "compiled" and not is_base:
        return False
    return case.op in PROVIDERS[name].ops and not (name == "peft_autocast" and case.dtype == "fp32")


def is_timed(name: str, device: torch.device) -> bool:
    """Not the kernels in the interpreter, which is a thousand times slower and says nothing of a GPU."""
    return device.type == "cuda" or name not in TRITON


def launches(name: str, run: Callable[[], Any]) -> int | None:
    """Triton kernels of one call of ours, as they are recorded; None for others, which only a profiler can count."""
    if name not in TRITON:
        return None
    from ogpstream.kernels.launch import record_launches

    with record_launches() as record:
        run()
    return len(record)


def _interpreted() -> bool:
    from ogpstream.kernels.launch import INTERPRETED

    return INTERPRETED
