"""What a step on this model needs, before it starts: how activations are kept, and the longest sample that fits.

The model's own layers are run once, on a few tokens each, and the bytes they have alive are fitted by a polynomial in
T. The result is a function of model, configuration and build alone: the packs that it computes with have as many
columns as the configuration allows, not as many as are in use. An allocator's rounding, a kernel's own scratch and
cuBLAS's workspace (32 MiB a stream on Hopper) come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ogpstream.learner.activations import ActivationPlan, Curve, Footprint, LayerCost, choose
from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.encoding import max_positions
from ogpstream.learner.meter import Meter
from ogpstream.learner.step import loss_gradient, recording
from ogpstream.learner.walk import LayerCall, LayerWalk, Plan, run_layer
from ogpstream.memory.layout import SiteShape
from ogpstream.memory.served import Pack, Served

# tokens of the longest measurement: with its half and its quarter 0.44 of one layer's work at T = 1024, and a quarter
# of the bytes
_TOKENS = 256
_ROWS = 16  # of logits: 29 MiB for a vocabulary of 128k
_TRAINED = "measured"


class Preflight:
    """Chooses how activations are kept, within a budget that falls when memory runs out.

    Args:
        walk: of the model.
        binding: that its adapted linears read.
        sites: the adapted linears.

    Attributes:
        limit: bytes of the configured budget; what is admitted is measured by it.
        budget: bytes of the budget that policies are chosen by; under `limit` once the device had less than that.
    """

    def __init__(
        self, walk: LayerWalk, binding: Binding, sites: Sequence[SiteShape], config: LearnerConfig
    ) -> None:
        self.limit = self.budget = config.activation_budget_mib * 2**20
        self._walk = walk
        self._binding = binding
        self._sites = sites
        self._config = config

    def plan(self, tokens: int, rows: int, layers: int | None = None) -> ActivationPlan:
        """How to keep the activations of a sample of `tokens` ids, `rows` of them supervised.

        Of all layers, or of the given number of top ones.

        The first policy that fits, in the order of time; the smallest one where none does.
        """
        return choose(self._plans(tokens, rows, layers), self.budget)

    def smallest(self, tokens: int, rows: int) -> ActivationPlan:
        """The policy with the least peak."""
        return choose(self._plans(tokens, rows), 0)

    def lower(self, plan: ActivationPlan) -> None:
        """There was no memory for this plan: from now on choose smaller ones."""
        self.budget = min(self.budget, plan.peak_bytes - 1)

    def longest(self, tokens: int, rows: int) -> int:
        """The most ids, at most `tokens`, of a sample with `rows` supervised ones that fits the limit; 0 if none."""
        low, high = rows, tokens
        if self.smallest(tokens, rows).peak_bytes <= self.limit:
            return tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.smallest(middle, rows).peak_bytes <= self.limit:
                low = middle
            else:
                high = middle - 1
        return low if low > rows else 0

    def _plans(self, tokens: int, rows: int, layers: int | None = None) -> list[ActivationPlan]:
        return self.footprint.plans(tokens, rows, host=self._walk.model.device.type != "cpu", layers=layers)

    @cached_property
    def footprint(self) -> Footprint:
        """Measured at first use, on fewer tokens where memory runs out.

        Raises:
            torch.OutOfMemoryError: not even eight tokens fit.
        """
        most = min(_TOKENS, self._config.max_tokens, max_positions(self._walk.model))
        while True:
            try:
                return self._measure(most)
            except torch.OutOfMemoryError:
                if most < 16:
                    raise
            most //= 2

    @torch.no_grad()
    def _measure(self, most: int) -> Footprint:
        binding, served = self._binding, self._widest()
        at = sorted({max(1, most // 4), max(1, most // 2), most}, reverse=True)
        fixed: list[tuple[int, int]] = []
        kinds: dict[int, int] = {}
        layers: dict[int, list[tuple[int, int, int, int]]] = {}
        for tokens in at:
            meter = Meter()
            with binding.using(served), meter:
                plan = self._walk.plan(torch.zeros(1, tokens, dtype=torch.long, device=self._walk.model.device))
            fixed.append((tokens, meter.alive))
            # told apart at the longest: a sliding window has a mask only beyond its width
            kinds = kinds or layer_kinds(plan)
            for index in kinds:
                layers.setdefault(index, []).append((tokens, *_layer(binding, served, plan.calls[index], plan.hidden)))
        costs = []
        for index, count in kinds.items():
            graph, forward, backward = (
                Curve(tuple((point[0], point[place]) for point in layers[index])) for place in (1, 2, 3)
            )
            costs.append(LayerCost(count, graph, forward, backward))
        loss = []
        for rows in sorted({1, min(_ROWS, self._config.loss_chunk)}):
            target, meter = torch.zeros(rows, dtype=torch.long, device=plan.hidden.device), Meter()
            with recording(binding, served, [_Nowhere()]), meter:
                loss_gradient(self._walk, plan, plan.hidden[:, target], target, rows)
            loss.append((rows, meter.peak))
        hidden = plan.hidden.shape[-1] * plan.hidden.element_size()
        return Footprint(Curve(tuple(fixed)), hidden, tuple(costs), Curve(tuple(loss)), self._config.loss_chunk)

    def _widest(self) -> Served:
        """A version that computes nothing with all the columns that the configured experts can have.

        A held part without a bound counts as 32 columns, and an imported expert as one of the configured rank: each
        column more is 4 bytes a token and linear.
        """
        config, model = self._config, self._walk.model
        columns = config.side_by_side * (config.rank + (config.held_rank or 32))
        wide = torch.promote_types(model.dtype, torch.float32)
        scale = torch.zeros(columns, dtype=wide, device=model.device)
        packs: dict[tuple[int, int], Pack] = {}
        for site in self._sites:
            shape = (site.d_in, site.d_out)
            if shape not in packs:
                A, B = (torch.zeros(size, dtype=model.dtype, device=model.device)
                        for size in ((site.d_in, columns), (columns, site.d_out)))
                packs[shape] = Pack(A, B, scale, {_TRAINED: slice(0, config.rank)})
        return Served(0, (_TRAINED,), (0.0,), tuple(packs[s.d_in, s.d_out] for s in self._sites))


class _Nowhere(GradientSink):
    """Takes gradients and keeps nothing."""

    def __init__(self) -> None:
        self.trained = _TRAINED

    def add(self, index: int, dA: Tensor, dB: Tensor) -> None:
        return None


def layer_kinds(plan: Plan) -> dict[int, int]:
    """The first layer of each kind, by index, with the number of its kind."""
    first: dict[str, int] = {}
    count: dict[int, int] = {}
    for index, call in enumerate(plan.calls):
        mask = call.kwargs.get("attention_mask")
        index = first.setdefault(f"{call.layer} {None if mask is None else mask.shape}", index)
        count[index] = count.get(index, 0) + 1
    return count


def _layer(binding: Binding, served: Served, call: LayerCall, hidden: Tensor) -> tuple[int, int, int]:
    """g, f and b of one layer."""
    entry, meter = hidden.detach().requires_grad_(), Meter()
    with recording(binding, served, [_Nowhere()]), meter:
        exit_ = run_layer(call, entry)
    graph, forward, gradient = meter.alive, meter.peak, torch.zeros_like(exit_)
    with meter:
        torch.autograd.grad(exit_, entry, gradient)
    return graph, forward, meter.peak
