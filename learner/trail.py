"""The layers' inputs and graphs between forward and backward, kept as an activation plan says.

The forward records a graph under every policy, though most drop it at once: it takes no more than the recomputation
will, and the same kernels run, so that all policies give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.walk import LayerCall
from ogpstream.memory.pinned import host_copy


class Trail:
    """What one sample's forward leaves for its backward.

    Args:
        run: computes a layer's output from its input `[1, T, D]` and records the graph between them.
    """

    def __init__(self, plan: ActivationPlan, run: Callable[[LayerCall, Tensor], Tensor]) -> None:
        self.plan = plan
        self._run = run
        self._calls: list[LayerCall] = []  # those whose backward is still to come
        self._graphs: list[tuple[Tensor, Tensor]] = []
        self._inputs: dict[int, Tensor] = {}
        self._device = torch.device("cpu")

    def forward(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Output `[1, T, D]` of the next layer."""
        self._device = hidden.device
        entry, exit_ = self._record(call, hidden)
        if self.plan.policy == "keep":
            self._graphs.append((entry, exit_))
        elif self.plan.policy == "offload":
            self._inputs[len(self._calls)] = host_copy(entry.detach())
        elif len(self._calls) % self.plan.every == 0:
            self._inputs[len(self._calls)] = entry.detach()
        self._calls.append(call)
        return exit_.detach()

    def back(self) -> Generator[str, None, tuple[Tensor, Tensor]]:
        """Input and output of the last layer that was not given back yet, with the graph between them.

        Yields:
            "recompute", after each layer that was computed again.
        """
        if self.plan.policy == "keep":
            return self._graphs.pop()
        last = len(self._calls) - 1
        # the first call of a segment finds only its first input and leaves the others
        for index in range(max(self._inputs), last):
            _, exit_ = self._record(self._calls[index], self._inputs[index])
            self._inputs[index + 1] = exit_.detach()
            del exit_
            yield "recompute"
        call = self._calls.pop()
        # on the step's own stream: copies and kernels stay in order without an event
        found = self._record(call, self._inputs.pop(last).to(self._device, non_blocking=True))
        yield "recompute"
        return found

    def _record(self, call: LayerCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
        entry = hidden.detach().requires_grad_()
        return entry, self._run(call, entry)
