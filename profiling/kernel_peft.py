"""The baseline of a user: adapters that PEFT injects, autograd, torch's fused AdamW, and a projection a linear.

The frozen linear below an adapter gives its output and its own input gradient without computing them, as all providers
get the latter: only the adapters' work is compared. The graph is made once; its backward pass is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ogpstream.profiling.kernel_problem import BETAS, EPS, LR, SCALE_REST, SCALE_TRAINED, STEP, Job, Outputs, Problem


class _Base(torch.autograd.Function):
    """An output and an input gradient that are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        ctx.dx = dx
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dx, None, None


class _Known(nn.Linear):
    """A frozen linear of zeros, without storage for them."""

    def __init__(self, D_in: int, D_out: int, y: Tensor, dx: Tensor) -> None:
        super().__init__(1, 1, bias=False, device=y.device, dtype=y.dtype)
        self.in_features, self.out_features = D_in, D_out
        self.weight = nn.Parameter(torch.zeros(1, 1, device=y.device, dtype=y.dtype).expand(D_out, D_in), False)
        self._y, self._dx = y, dx

    def forward(self, input: Tensor) -> Tensor:
        known: Tensor = _Base.apply(input, self._y, self._dx)
        return known


class Peft:
    """One problem with adapters `trained` and `rest` in each linear; float32, as PEFT keeps what it trains.

    Args:
        autocast: products in the dtype of the inputs, as `transformers.Trainer` has it with bf16=True.
    """

    def __init__(self, problem: Problem, *, autocast: bool = False) -> None:
        self._problem, self._autocast = problem, autocast
        case = problem.case
        self._A: list[Tensor] = []
        self._B: list[Tensor] = []
        if case.has_factors:
            self._x = [x.detach().requires_grad_() for x in problem.x]
            self._layers = self._inject()
            # as PEFT stores them: A `[r, D_in]`, B `[D_out, r]`
            self._A = [layer.lora_A["trained"].weight for layer in self._layers]
            self._B = [layer.lora_B["trained"].weight for layer in self._layers]
        elif case.projects:
            source = problem.gradient if case.op == "projection" else problem.masters
            self._A = [nn.Parameter(A.T.contiguous()) for A in source.A]
            self._B = [nn.Parameter(B.T.contiguous()) for B in source.B]

    def job(self) -> Job:
        op, device = self._problem.case.op, self._problem.device
        masters = {"A": [A.data.T for A in self._A], "B": [B.data.T for B in self._B]}
        if op == "cross_entropy":
            return Job(self._loss, lambda out: out)
        if op == "lora_forward":
            return Job(torch.no_grad()(self._forward), lambda y: {"y": y})
        if op == "projection":
            # the same storage without autograd
            A = [each.data for each in self._A]
            return Job(lambda: self._project(A, self._rows(device)), lambda _: masters)
        backward = self._backward() if self._problem.case.has_factors else None
        if op == "lora_backward":
            assert backward is not None
            return Job(backward, lambda _: self._gradients())
        step = self._step()

        def update() -> None:
            rows = self._rows(device)
            if backward is not None:
                backward()
            step(rows)

        return Job(update, lambda _: {**masters, "dx": [x.grad for x in getattr(self, "_x", ())]})

    def _inject(self) -> list[Any]:
        """Linears with their adapters in place, the factors of the problem in them."""
        p, case = self._problem, self._problem.case
        # the output of the base costs nothing here: one zero that is seen as all of them
        y = torch.zeros(1, 1, dtype=case.torch_dtype, device=p.device).expand(case.T, case.D_out)
        layers = nn.ModuleDict({f"linear{i}": _Known(case.D_in, case.D_out, y, dx) for i, dx in enumerate(p.base_dx)})
        model = nn.ModuleDict({"layers": layers})
        ranks = {"trained": (case.r, SCALE_TRAINED), "rest": (case.R - case.r, SCALE_REST)}
        ranks = {name: each for name, each in ranks.items() if each[0]}
        for name, (rank, scale) in ranks.items():
            config = LoraConfig(r=rank, lora_alpha=int(scale * rank), target_modules=list(layers))
            with warnings.catch_warnings():
                # that there is an adapter already is what a second one means
                warnings.simplefilter("ignore")
                inject_adapter_in_model(config, model, name)
        adapted: list[Any] = list(layers.values())
        for layer, (A, B), own_A, own_B in zip(adapted, p.packed, p.masters.A, p.masters.B, strict=True):
            layer.set_adapter(list(ranks))
            for name in ranks:
                trained = name == "trained"
                for part, factor in (("lora_A", own_A if trained else A[:, case.r :]),
                                     ("lora_B", own_B if trained else B[case.r :])):
                    weight = factor.T.float().contiguous()
                    getattr(layer, part)[name].weight = nn.Parameter(weight, requires_grad=trained)
        return adapted

    def _forward(self) -> list[Tensor]:
        case = self._problem.case
        with torch.autocast(self._problem.device.type, case.torch_dtype, enabled=self._autocast):
            return [layer(x) for layer, x in zip(self._layers, self._x, strict=True)]

    def _backward(self) -> Callable[[], None]:
        y, g = self._forward(), self._problem.g
        leaves = [*self._x, *self._A, *self._B]

        def backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(y, g, retain_graph=True, inputs=leaves)

        return backward

    def _gradients(self) -> Outputs:
        def of(leaves: list[Tensor], transpose: bool) -> list[Tensor]:
            found = [leaf.grad for leaf in leaves if leaf.grad is not None]
            return [grad.T for grad in found] if transpose else found

        return {"dA": of(self._A, True), "dB": of(self._B, True), "dx": of(self._x, False)}

    def _step(self) -> Callable[[list[Tensor]], None]:
        p = self._problem
        # the same storage with version counters of their own: the graph is used again after the step
        A, B = ([nn.Parameter(weight.data) for weight in weights] for weights in (self._A, self._B))
        device = p.device
        optimizer = torch.optim.AdamW([*A, *B], LR, BETAS, EPS, weight_decay=0.0, fused=True,
                                      capturable=device.type == "cuda")
        moments = zip([*p.exp_avg.A, *p.exp_avg.B], [*p.exp_avg_sq.A, *p.exp_avg_sq.B], strict=True)
        for parameter, (m, v) in zip([*A, *B], moments, strict=True):
            optimizer.state[parameter] = {
                "step": torch.tensor(STEP - 1.0, device=device),
                "exp_avg": m.T.clone(memory_format=torch.contiguous_format),
                "exp_avg_sq": v.T.clone(memory_format=torch.contiguous_format),
            }
        if not p.case.has_factors:
            for parameter, grad in zip([*A, *B], [*p.gradient.A, *p.gradient.B], strict=True):
                parameter.grad = grad.T.contiguous()
        leaves = [*self._A, *self._B] if p.case.has_factors else []
        projected = [each.data for each in A]

        def step(rows: list[Tensor]) -> None:
            for parameter, leaf in zip([*A, *B], leaves, strict=False):
                parameter.grad = leaf.grad
            optimizer.step()
            if p.case.m:
                self._project(projected, rows)

        return step

    def _rows(self, device: torch.device) -> list[Tensor]:
        return [rows.to(device, non_blocking=True) for rows in self._problem.rows]

    def _project(self, A: list[Tensor], rows: list[Tensor]) -> None:
        each = rows * len(A) if len(rows) == 1 else rows
        for A_t, P_t in zip(A, each, strict=True):
            A_t.addmm_(A_t @ P_t.T, P_t, alpha=-1)

    def _loss(self) -> Outputs:
        # float32 logits, as transformers has them
        logits = self._problem.logits.detach().requires_grad_()
        loss = nn.functional.cross_entropy(logits.float(), self._problem.target, reduction="sum")
        loss.backward()
        assert logits.grad is not None
        return {"loss": [loss.detach()], "dlogits": [logits.grad]}
