"""What an operation must give, in float64 from the very operands it was given, and how far a provider is from it.

Masters are compared by how they changed: beside a master of the size of ten steps, an error of a step would be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ogpstream.kernels import reference
from ogpstream.profiling.kernel_problem import BETAS, EPS, LR, STEP, Outputs, Problem, Slab, relative


class Score(NamedTuple):
    """rel_err: the largest |out - exact| / |exact| of all outputs.

    leak: the largest |P.T A| / |Z|, Z the A before the projection, in float64; None where nothing is projected.
    """

    rel_err: float
    leak: float | None


class Truth:
    """The outputs of one problem in float64."""

    def __init__(self, problem: Problem) -> None:
        self._problem, case = problem, problem.case
        self.exact: dict[str, list[Tensor]] = {}
        self._before_projection: list[Tensor] = []
        if case.op == "cross_entropy":
            loss, dlogits = reference.cross_entropy(problem.logits.double(), problem.target)
            self.exact = {"loss": [loss], "dlogits": [dlogits]}
        if case.op == "lora_forward":
            self.exact["y"] = [
                reference.lora_forward(x.double(), A.double(), B.double(), problem.scale.double())[0]
                for x, (A, B) in zip(problem.x, problem.packed, strict=True)
            ]
        if case.op in ("lora_backward", "update"):
            self._backward()
        if case.op in ("step_projection", "update"):
            self._step()
        if case.op == "projection":
            self._project(Slab(problem.gradient.flat.double(), case))

    def score(self, outputs: Outputs) -> Score:
        """KeyError when an output is missing."""
        problem, found = self._problem, {name: outputs[name] for name in self.exact}
        if problem.case.op in ("step_projection", "update"):
            start = problem.masters
            for name, before in (("A", start.A), ("B", start.B)):
                found[name] = [after.double() - old.double() for after, old in zip(found[name], before, strict=True)]
        error = max(relative(found[name], exact) for name, exact in self.exact.items())
        return Score(error, self._leak(outputs["A"]) if self._before_projection else None)

    def _leak(self, A: Sequence[Tensor]) -> float:
        width = len(A) // len(self._before_projection)
        leaks = []
        for number, (Z, rows) in enumerate(zip(self._before_projection, self._problem.rows, strict=True)):
            after = torch.cat(list(A[number * width : (number + 1) * width]), dim=1).double()
            leaks.append((rows.to(Z.device, torch.float64) @ after).norm() / Z.norm())
        return float(torch.stack(leaks).max())

    def _backward(self) -> None:
        p = self._problem
        linears = [
            reference.lora_backward(
                x.double(), g.double(), A.double(), B.double(), p.scale.double(),
                trained=p.trained, base_dx=base.double(),
            )
            for x, g, base, (A, B) in zip(p.x, p.g, p.base_dx, p.packed, strict=True)
        ]
        for number, name in enumerate(("dA", "dB", "dx")):
            self.exact[name] = [each[number] for each in linears]

    def _step(self) -> None:
        p = self._problem
        slab, m, v = (Slab(s.flat.double(), p.case) for s in (p.masters, p.exp_avg, p.exp_avg_sq))
        gradient = Slab(p.gradient.flat.double(), p.case)
        if p.case.op == "update":
            # no provider has to leave them anywhere: they are judged by the change of the masters
            for views, name in ((gradient.A, "dA"), (gradient.B, "dB")):
                for view, exact in zip(views, self.exact.pop(name), strict=True):
                    view.copy_(exact)
        for part in (slice(0, slab.numel_A), slice(slab.numel_A, None)):
            reference.adam_(
                slab.flat[part], gradient.flat[part], m.flat[part], v.flat[part],
                step=STEP, lr=LR, betas=BETAS, eps=EPS,
            )  # fmt: skip
        self._project(slab)
        for name, after, before in (("A", slab.A, p.masters.A), ("B", slab.B, p.masters.B)):
            self.exact[name] = [a - b.double() for a, b in zip(after, before, strict=True)]

    def _project(self, slab: Slab) -> None:
        p = self._problem
        if p.case.m:
            self._before_projection = [block.clone() for block in slab.blocks]
        for block, rows in zip(slab.blocks, p.rows, strict=True):
            reference.project_out_(block, rows, chunk=max(1, p.case.m))
        self.exact["A"] = slab.A
