"""Which version the adapted linears of a model compute with, and where they leave their gradients.

All linears of a model read one `Binding`, so that a version is swapped by one assignment.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ogpstream.memory.layout import Layout
from ogpstream.memory.served import Served

if TYPE_CHECKING:
    from ogpstream.learner.gate import Found, Gate


@dataclass(frozen=True)
class Share:
    """A version that rows of a batch are computed with.

    Attributes:
        rows: which ones, `[B, 1, 1]`; None is all.
    """

    served: Served
    rows: Tensor | None = None


@dataclass(frozen=True)
class _Pin:
    """A version of one binding, pinned; in a forward with what its rows are computed with."""

    binding: Binding
    served: Served | None
    shares: tuple[Share, ...] | None = None
    answering: frozenset[str] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    found: Found | None = None


class GradientSink:
    """Where the linears leave dA and dB of one expert: a flat `slab` `[layout.numel]` like its factors.

    Gradients are added, because a layer may be used twice and the head is run in chunks: zero the
    slab between samples.

    Args:
        layout: of the expert.
        trained: name of the expert.
    """

    def __init__(
        self,
        layout: Layout,
        trained: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.trained = trained
        self.slab = torch.zeros(layout.numel, dtype=dtype, device=device)

    def add(self, index: int, dA: Tensor, dB: Tensor) -> None:
        """Add the gradients of one site, dA `[D_in, r]` and dB `[r, D_out]`."""
        self.layout.a(self.slab, index).add_(dA)
        self.layout.b(self.slab, index).add_(dB)

    def finish(self) -> None:
        """All gradients of a sample are added."""


# the versions pinned in this thread or task, the innermost last
_pins: ContextVar[tuple[_Pin, ...]] = ContextVar("ogpstream_pins", default=())


class Binding:
    """The version that the adapted linears of one model compute with.

    Replace `served` by one assignment. A forward of the whole model keeps the version it started with; for
    one version over several forwards (a generation with its cache), pin it by `using`. `sinks` receive the
    gradients of the forwards that recorded them while they were set: one of the whole forward, or one for each row
    of its batch, all of one expert. `gate` looks at the prompts of a forward of the whole model; None lets all experts
    answer all of them.
    """

    def __init__(self, served: Served | None = None) -> None:
        self.served = served
        self.sinks: tuple[GradientSink, ...] = ()
        self.gate: Gate | None = None

    def current(self) -> Served | None:
        """The version for this thread and moment; None is the bare base model."""
        pin = self._pin()
        return self.served if pin is None else pin.served

    def shares(self) -> tuple[Share, ...]:
        """What the rows of the present forward are computed with; none of it is the bare base model."""
        pin = self._pin()
        if pin is not None and pin.shares is not None:
            return pin.shares
        served = self.served if pin is None else pin.served
        return () if served is None else tuple(map(Share, served.each))

    def _pin(self) -> _Pin | None:
        return next((pin for pin in reversed(_pins.get()) if pin.binding is self), None)

    @contextmanager
    def using(self, served: Served | None, answering: frozenset[str] | None = None) -> Iterator[None]:
        """Pin a version, or the base model by None, for this thread or task.

        Args:
            answering: the experts that answer every prompt; None lets the gate look at each. Without a gate all do.

        Not across a `yield` of a generator, which would leave the pin to whoever resumes it.
        """
        outer, pin = _pins.get(), _Pin(self, served)
        if answering is not None and served is not None and self.gate is not None:
            pin = replace(pin, shares=self.gate.of(served, answering), answering=answering)
        _pins.set((*outer, pin))
        try:
            yield
        finally:
            _pins.set(outer)

    def pin_forwards(self, model: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Hook a model so that each of its forwards keeps one version; remove the handles to undo it."""
        # first of all pre-hooks, so that `_leave` never runs without `_enter`
        return (
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outer, served = self._pin(), self.current()
        inputs = {**dict(zip(_parameters(cast(Hashable, type(module))), args, strict=False)), **kwargs}
        pin = _Pin(self, served, inputs=inputs) if outer is None else replace(outer, inputs=inputs)
        try:
            if served is not None and self.gate is not None:
                if pin.shares is None:
                    shares, found = self.gate.shares(served, inputs)
                    pin = replace(pin, shares=shares, found=found)
                elif pin.answering is not None:
                    pin = replace(pin, found=self.gate.told(pin.answering, inputs))
        finally:
            _pins.set((*_pins.get(), pin))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        pin = _pins.get()[-1]
        _pins.set(_pins.get()[:-1])
        if self.gate is not None and pin.found is not None and output is not None:
            self.gate.remember(output, pin.inputs, pin.found)


@cache
def _parameters(model: Any) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, in their order."""
    return tuple(inspect.signature(model.forward).parameters)[1:]
