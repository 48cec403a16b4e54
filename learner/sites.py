"""The adapted linears of a model: PEFT finds and wraps them, and `detach` puts the model back as it was.

PEFT's own LoRA layer is injected with its `forward` replaced and its parameters removed: the factors live in
the AdapterStore, and the linears read them through a `Binding`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ogpstream.kernels import dispatch
from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.errors import ConfigError, ModelError, StateError
from ogpstream.learner.meter import learning_state
from ogpstream.memory.layout import SiteShape
from ogpstream.memory.served import Pack

_ADAPTER = "default"


class AdaptedLinear(LoraLinear):
    """PEFT's LoRA layer around a frozen linear, with the packed factors of a `Binding` instead of its own.

        y = base(x) + ((x A) * scale) B        A, B, scale: this site's pack of the current version

    Where gradients are recorded and x takes part, the backward yields dx and adds dA and dB to the binding's
    sink.

    Raises:
        ModelError: the linear is not exactly nn.Linear or Conv1D (a subclass may hold its weight otherwise).
    """

    binding: Binding
    index: int

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            raise ModelError(
                f"cannot adapt a {type(base).__name__} (only nn.Linear and Conv1D themselves): "
                "choose other target_modules, or load the model without quantisation"
            )
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = type(base) is Conv1D

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., D_in]` to `[..., D_out]`."""
        if args or kwargs:
            raise TypeError("an adapted linear takes its input and nothing else")
        shares = [(pack, share.rows) for share in self.binding.shares()
                  if (pack := share.served.packs[self.index]).A.shape[1]]
        if not shares:
            result: Tensor = self.base_layer(x)
        elif torch.is_grad_enabled() and x.requires_grad:
            if any(rows is not None for _, rows in shares):
                raise StateError("a batch of prompts that different experts answer has no gradient: pass them one by "
                                 "one, or set served_to to 'all'")
            result = _Adapted.apply(x, self, [pack for pack, _ in shares], self.binding.sinks)
        else:
            result = self.frozen(x)
            for pack, rows in shares:
                # rows that it does not answer get an exact 0
                self.add(x if rows is None else x * rows, pack, result)
        return result

    def adapt(self, x: Tensor, packs: Sequence[Pack]) -> tuple[Tensor, Tensor]:
        """y `[..., D_out]`, and h `[T, R]` of the first pack for the backward."""
        y = self.frozen(x)
        h, *_ = [self.add(x, pack, y) for pack in packs]
        return y, h

    def frozen(self, x: Tensor) -> Tensor:
        """The frozen linear of x, to be written to."""
        y: Tensor = self.base_layer(x)
        # a hook may keep what it was given, or have given what it keeps
        return y.clone() if self.base_layer._forward_hooks else y

    def add(self, x: Tensor, pack: Pack, y: Tensor) -> Tensor:
        """Add what a pack makes of x to y, in place; h `[T, R]`."""
        _, h = dispatch.lora_forward(x.reshape(-1, x.shape[-1]), pack.A, pack.B, pack.scale,
                                     onto=y.view(-1, y.shape[-1]))
        return h

    def base_input_gradient(self, g: Tensor) -> Tensor:
        """`[T, D_in]` for g = dL/dy `[T, D_out]`, of the frozen linear alone."""
        # nn.Linear keeps its weight as [D_out, D_in], Conv1D as [D_in, D_out]
        weight: Tensor = self.base_layer.weight
        return g @ weight.T if self.fan_in_fan_out else g @ weight


class _Adapted(torch.autograd.Function):
    """Keeps x itself (no wider copy) and the narrow h between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: AdaptedLinear, packs: list[Pack], sinks: tuple[GradientSink, ...]) -> Tensor:
        for sink in sinks:
            # the first one is the one that is trained; all sinks are of one expert
            packs = sorted(packs, key=lambda pack: sink.trained not in pack.trained)
            if sink.trained not in packs[0].trained:
                raise StateError(f"expert {sink.trained!r} is not in the served version: activate it to train it")
        y, h = site.adapt(x, packs)
        ctx.save_for_backward(x, *((h,) if sinks else ()))
        ctx.site, ctx.packs, ctx.sinks = site, packs, sinks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x, *h), site, packs, sinks = ctx.saved_tensors, ctx.site, ctx.packs, ctx.sinks
        g = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        dx = site.base_input_gradient(g)
        for pack in packs[1:] if sinks else packs:
            # no trained column: the products for dA and dB are empty
            _, _, dx = dispatch.lora_backward(rows, g, pack.A, pack.B, pack.scale, trained=slice(0, 0), base_dx=dx)
        if not sinks:
            return dx.view(x.shape), None, None, None
        pack = packs[0]
        # the rows of each sample of the batch lie together, and the sinks are all of one expert
        # a backend may make dx of each sample before that of all
        with learning_state(but=(rows.nbytes, rows.nbytes // len(sinks))):
            parts, dx = dispatch.lora_backward_samples(rows, g, pack.A, pack.B, pack.scale, len(sinks), h=h[0],
                                                       trained=pack.trained[sinks[0].trained], base_dx=dx)
            for sink, (dA, dB) in zip(sinks, parts, strict=True):
                sink.add(site.index, dA, dB)
        return dx.view(x.shape), None, None, None


@dataclass(frozen=True)
class Site:
    """One adapted linear; `name` is its dotted path in the model as it was before attaching."""

    index: int
    name: str
    module: AdaptedLinear
    shape: SiteShape


@dataclass
class Attachment:
    """What `attach` put into a model. `target_modules` select exactly these sites in a model of its kind.

    `batches` says that every site sees the samples of a batch apart, as `[batch, tokens, D_in]`; routed experts do not.
    """

    model: PreTrainedModel
    binding: Binding
    sites: list[Site]
    target_modules: list[str]
    batches: bool
    _before: _Before = field(repr=False)
    _hooks: tuple[RemovableHandle, ...] = field(repr=False)

    @property
    def shapes(self) -> list[SiteShape]:
        return [site.shape for site in self.sites]

    @property
    def widest(self) -> int:
        """The highest rank of an expert: the least of all widths."""
        return min(min(shape.d_in, shape.d_out) for shape in self.shapes)

    def detach(self) -> None:
        """Put the model's own modules, gradient flags and modes back as they were; twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._before.restore(self.model)


def attach(
    model: PreTrainedModel,
    *,
    rank: int,
    target_modules: Sequence[str] | str | None = None,
    basis_scope: Literal["layer", "shared"] = "layer",
    binding: Binding | None = None,
) -> Attachment:
    """Wrap linears of a model in place. The model stays the same object, is frozen and put in eval mode.

    Args:
        rank: of the trainable factors; no adapted linear may be narrower.
        target_modules: names as for PEFT; None for PEFT's choice for this architecture, "all-linear" for all
            linears but the head.
        basis_scope: "layer" gives linears that read the very same input one basis, found by one small
            forward; "shared" gives one basis to all of one D_in.

    Raises:
        ModelError: the model carries PEFT layers or another learner's already, or a target is missing or cannot be
            adapted.
        ConfigError: the rank does not fit, or the scope is unknown. The model is as before in either case.
    """
    if basis_scope not in ("layer", "shared"):
        raise ConfigError(f"basis_scope is {basis_scope!r}: set it to 'layer' or 'shared'")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ModelError("the model carries the adapters of another learner: close() that one first")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("the model carries PEFT layers already: give the base model, or merge_and_unload() first")
    binding = binding or Binding()
    before = _Before(model)
    try:
        _inject(model, rank, target_modules)
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
        for index, (name, module) in enumerate(adapted.items()):
            module.delete_adapter(_ADAPTER)
            module.binding, module.index = binding, index
            if rank > min(module.in_features, module.out_features):
                raise ConfigError(
                    f"rank {rank} exceeds a width of {name} ({module.in_features} to {module.out_features}): "
                    "lower the rank or choose other target_modules"
                )
        model.eval()
        keys, batches = _input_groups(model, adapted, binding)
        if basis_scope == "shared":
            keys = [f"d{module.in_features}" for module in adapted.values()]
    except BaseException:
        before.restore(model)
        raise
    sites = [
        Site(module.index, name, module, SiteShape(name, module.in_features, module.out_features, key))
        for (name, module), key in zip(adapted.items(), keys, strict=True)
    ]
    return Attachment(model, binding, sites, _targets(model, adapted), batches, before, binding.pin_forwards(model))


class _Before:
    """What `attach` changes on a model, as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self, model: nn.Module) -> None:
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        # PEFT leaves its configuration on the model it injects into
        model.__dict__.pop("peft_config", None)
        for module, training in self.modes:
            module.training = training
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def _inject(model: PreTrainedModel, rank: int, target_modules: Sequence[str] | str | None) -> None:
    """Let PEFT wrap the targets, and check that it wrapped all of them and nothing but linears."""
    wanted = target_modules if isinstance(target_modules, str | None) else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted)
    config._register_custom_module({nn.Linear: AdaptedLinear, Conv1D: AdaptedLinear})
    kind, remedy = type(model).__name__, _remedy(model)
    try:
        # factors on the meta device: neither memory nor random numbers are spent on what is removed again
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    except re.error as error:
        raise ConfigError(f"target_modules {wanted!r} is no regular expression ({error}): {remedy}") from error
    except ValueError as error:
        what = "has no default targets" if wanted is None else f"finds no target {wanted!r}"
        raise ModelError(f"PEFT {what} for {kind}: {remedy}") from error
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, module in wrapped.items():
        if type(module) is not AdaptedLinear:
            raise ModelError(f"cannot adapt {name}, a {type(module.get_base_layer()).__name__}: {remedy}")
    if isinstance(wanted, list):
        missing = [t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in wrapped)]
        if missing:
            raise ModelError(f"{kind} has no linear named {', '.join(missing)}: {remedy}")


def _remedy(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    possible = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head
    }
    return f"set target_modules to some of {', '.join(sorted(possible))}" if possible else "it has no linear"


def _targets(model: nn.Module, adapted: dict[str, AdaptedLinear]) -> list[str]:
    """The last parts of the sites' names where these select nothing else, else the full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == adapted.keys() else adapted)


@torch.no_grad()
def _input_groups(
    model: PreTrainedModel, adapted: dict[str, AdaptedLinear], binding: Binding
) -> tuple[list[str], bool]:
    """For each linear, the name of the first one that reads the same tensor in a forward of two rows of two tokens,
    and whether all of them were given both rows."""
    # the tensors are kept, so that no two objects share an id
    inputs: dict[str, list[Tensor]] = {name: [] for name in adapted}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.append(args[0]))
        for name, module in adapted.items()
    ]
    try:
        with binding.using(None):
            model(input_ids=torch.zeros(2, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    first: dict[tuple[int, ...], str] = {}
    keys = []
    for name, seen in inputs.items():
        group = tuple(id(tensor) for tensor in seen)
        # a linear that was not reached (an expert that was not routed to) stays alone
        keys.append(first.setdefault(group, name) if group else name)
    whole = all(seen and all(t.dim() == 3 and t.shape[:2] == (2, 2) for t in seen) for seen in inputs.values())
    return keys, whole
