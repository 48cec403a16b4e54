"""A decoder model taken layer by layer, without code per architecture and without touching the served model.

The model's own backbone runs once on a shallow copy whose decoder layers are probes: they record how each is
called (masks, rotary tables, layer types) and compute nothing. The real layers are then called with these
arguments, and the head runs through the model's own code, so that soft-capping, logit scales and tied
embeddings need no case of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from ogpstream.learner.errors import ModelError

# largest |walk - model| over largest |logit|: the operations are the same, only rounding may differ
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class LayerCall(NamedTuple):
    """One decoder layer and what its backbone passes to it beside the hidden states."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Plan(NamedTuple):
    """How one input goes through the model: `hidden` `[B, T, D]` enters the first call, `final` follows."""

    hidden: Tensor
    calls: list[LayerCall]
    final: nn.Sequential


class LayerWalk:
    """The decoder layers of a causal language model of transformers as separate calls.

    For ids `[B, T]`, `plan` gives the first layer's input and the calls, `run_layer` makes one of them, and
    the plan's `final` and `head` turn chosen rows of the last output into logits. The model is never written
    to, so that another thread may serve from it meanwhile; adapters on its linears take part as usual.

    Raises:
        ModelError: the model has no single list of decoder layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._kind = type(model).__name__
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        lists = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module)
            and all(type(layer).__name__ in kinds for layer in module)
        ]
        if len(lists) != 1:
            raise ModelError(
                f"{self._kind} has {len(lists)} lists of decoder layers instead of one: "
                "give a text-only decoder of transformers"
            )
        self._body_path, _, self._list_name = lists[0].rpartition(".")
        self._output: type[ModelOutput] = BaseModelOutputWithPast
        self._returns: int | None = None

    @torch.no_grad()
    def plan(self, ids: Tensor, **inputs: Any) -> Plan:
        """Record the layer calls for ids `[B, T]`; costs the embedding, the rotary table and the masks.

        The first plan runs the first layer too, to see whether the layers return a tuple.

        Args:
            inputs: further arguments of the backbone, such as `attention_mask`.

        Raises:
            ModelError: no layer is called, one gets a cache, or not only modules follow the last one.
        """
        body = self.model.get_submodule(self._body_path)
        trace = _Trace(self._returns)
        children: dict[str, nn.Module] = {}
        for name, child in body.named_children():
            if name == self._list_name:
                assert isinstance(child, nn.ModuleList)
                children[name] = nn.ModuleList(_Probe(layer, trace) for layer in child)
            elif not isinstance(child, nn.ModuleList | nn.ModuleDict):
                children[name] = _Watch(child, trace)
        output = _shell(body, children)(input_ids=ids, use_cache=False, return_dict=True, **inputs)
        if trace.first is None or any(call.kwargs.get("past_key_values") is not None for call in trace.calls):
            raise ModelError(f"{self._kind} does not call its layers plainly: it cannot be walked")
        self._output, self._returns = type(output), trace.returns
        return Plan(trace.first, trace.calls, self._final(trace, output.last_hidden_state))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[B, n, vocabulary]` of final states `[B, n, D]`, by the model's own head code.

        Differentiable in `hidden`. Call it after `plan` (it returns what that model's backbone returns).
        """
        given = _Given(self._output(last_hidden_state=hidden))
        logits = _shell_at(self.model, self._body_path, given)(inputs_embeds=hidden, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Compare the logits of the walk for ids `[B, T]` with those of the model.

        Raises:
            ModelError: they differ by more than rounding, so the walk would train another function.
        """
        hidden, calls, final = self.plan(ids)
        for call in calls:
            hidden = run_layer(call, hidden)
        walked = self.head(final(hidden))
        whole = self.model(input_ids=ids, use_cache=False).logits
        difference = ((walked - whole).abs().max() / whole.abs().max()).item()
        if walked.shape != whole.shape or not difference <= _TOLERANCE[whole.dtype]:
            raise ModelError(
                f"{self._kind} run layer by layer differs from its own forward by {difference:.1e} of the "
                "largest logit: models of this kind cannot be walked"
            )

    def _final(self, trace: _Trace, last: Tensor) -> nn.Sequential:
        """The modules between the last layer and the head, found by following the tensors' memory."""
        chain: list[nn.Module] = []
        at = trace.last
        for module, given, made in trace.watched:
            if _place(given) == _place(at):
                chain.append(module)
                at = made
        if _place(at) != _place(last):
            raise ModelError(
                f"{self._kind} computes outside of modules between its last layer and its head: "
                "it cannot be walked"
            )
        return nn.Sequential(*chain)


def run_layer(call: LayerCall, hidden: Tensor) -> Tensor:
    """Output `[B, T, D]` of one decoder layer for hidden states `[B, T, D]`."""
    output = call.layer(hidden, *call.args, **call.kwargs)
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, Tensor)
    return result


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory, by its storage: those of fake tensors have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


class _Trace:
    """What the stand-ins of one pass saw. The tensors are kept, so that no two of them share an address.

    `returns` is the length of the tuple that a layer returns, 0 for a bare tensor, None before one ran.
    """

    def __init__(self, returns: int | None) -> None:
        self.returns = returns
        self.calls: list[LayerCall] = []
        self.first: Tensor | None = None
        self.last = torch.empty(0)
        self.watched: list[tuple[nn.Module, Tensor, Tensor]] = []


class _StandIn(nn.Module):
    """Takes a module's place and lends its attributes, but hides it from whatever visits child modules."""

    def __init__(self, real: nn.Module, trace: _Trace) -> None:
        super().__init__()
        object.__setattr__(self, "_real", real)
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"], name)


class _Probe(_StandIn):
    """A decoder layer that records its call and computes nothing."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        trace, layer = self._trace, self.__dict__["_real"]
        if trace.first is None:
            trace.first = hidden
        if trace.returns is None:
            output = layer(hidden, *args, **kwargs)
            trace.returns = len(output) if isinstance(output, tuple) else 0
        trace.calls.append(LayerCall(layer, args, kwargs))
        # only what runs after the last layer may belong to the way to the head
        trace.last = hidden
        trace.watched.clear()
        return (hidden, *[None] * (trace.returns - 1)) if trace.returns else hidden


class _Watch(_StandIn):
    """Another child of the backbone: runs as it is, and remembers what went in and came out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.__dict__["_real"](*args, **kwargs)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(made, Tensor):
            self._trace.watched.append((self.__dict__["_real"], args[0], made))
        return made


class _Given(nn.Module):
    """A backbone that returns an output it was given."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output


def _shell(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy with some children replaced; the original keeps its own."""
    twin = copy.copy(module)
    # a compiled or wrapped forward is bound to the original and would bypass the replaced children
    twin.__dict__.pop("forward", None)
    twin._modules = {**module._modules, **children}
    return twin


def _shell_at(root: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A shallow copy of `root` in which the module at the dotted path is `replacement`."""
    head, _, rest = path.partition(".")
    child = _shell_at(root.get_submodule(head), rest, replacement) if rest else replacement
    return _shell(root, {head: child})
