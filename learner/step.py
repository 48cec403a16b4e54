"""The gradient of one sample as a generator: it stops after every unit, so that a server can take the device back.

Units: the layer inputs, each decoder layer's forward, each chunk of the cross-entropy, each layer that is computed
again, each layer's backward. Nothing of the learner's state changes here; a generator that is dropped half-way leaves
nothing behind.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.trail import Trail
from ogpstream.learner.walk import LayerCall, LayerWalk, Plan, run_layer
from ogpstream.memory.adapters import Served


class Reading(NamedTuple):
    """How well a model knows a completion.

    Attributes:
        loss: mean cross-entropy of its tokens, in nats.
        certain: share of its tokens that got more than half of the probability, so that greedy decoding gives them.
    """

    loss: float
    certain: float


def sample_gradient(
    walk: LayerWalk,
    binding: Binding,
    sink: GradientSink,
    ids: Sequence[int],
    prompt_length: int,
    *,
    chunk: int,
    activations: ActivationPlan,
) -> Generator[str, None, Reading]:
    """Add dA and dB of one sample to the sink.

    All units compute with the version that is served when the first one starts.

    Args:
        ids: prompt and completion, T in all; the completion's tokens are supervised.
        prompt_length: at least 1.
        chunk: supervised rows whose logits exist at once.
        activations: what is kept and what is computed again; the gradient is the same, bit for bit.

    Yields:
        The name of the unit that was just done.

    Returns:
        How well the completion was known.
    """
    served = binding.current()
    tokens = torch.tensor([list(ids)], device=walk.model.device)
    with binding.using(served):
        plan = walk.plan(tokens)
    yield "plan"

    def run(call: LayerCall, entry: Tensor) -> Tensor:
        with recording(binding, served, sink):
            return run_layer(call, entry)

    hidden, trail = plan.hidden, Trail(activations, run)
    for call in plan.calls:
        hidden = trail.forward(call, hidden)
        yield "forward"

    rows = torch.arange(prompt_length - 1, tokens.shape[1] - 1, device=tokens.device)
    gradient = torch.zeros_like(hidden)
    seen: list[Tensor] = []
    for piece in rows.split(chunk):
        with recording(binding, served, sink):
            counts, part = loss_gradient(walk, plan, hidden[:, piece], tokens[0, piece + 1], len(rows))
        gradient[:, piece] = part
        seen.append(counts)
        yield "loss"

    del hidden, part
    for _ in plan.calls:
        entry, exit_ = yield from trail.back()
        (gradient,) = torch.autograd.grad(exit_, entry, gradient)
        del entry, exit_
        yield "backward"
    # read once, at the end: a number read in each unit would have the host wait for the device
    loss, certain = (sum(column) / len(rows) for column in zip(*torch.stack(seen).tolist(), strict=True))
    return Reading(loss, certain)


def loss_gradient(walk: LayerWalk, plan: Plan, hidden: Tensor, target: Tensor, of: int) -> tuple[Tensor, Tensor]:
    """The loss of some rows and its gradient: the only place where logits exist.

    Args:
        hidden: the last layer's output at these rows, `[1, n, D]`.
        target: the ids that follow them, `[n]`.
        of: all supervised rows of the sample, whose mean is the loss.

    Returns:
        (The sum of the rows' cross-entropies in nats, how many targets got over half of the probability) as one
        tensor `[2]`, and the gradient of that sum / `of`, `[1, n, D]`.
    """
    hidden.requires_grad_()
    logits = walk.head(plan.final(hidden))
    total, dlogits = dispatch.cross_entropy(logits[0].detach(), target)
    # dlogits = softmax - onehot: the target's entry is its probability less 1
    sure = (dlogits.gather(1, target[:, None]) > -0.5).sum()
    (gradient,) = torch.autograd.grad(logits, hidden, dlogits.div_(of)[None])
    return torch.stack([total, sure.to(total)]), gradient


@contextmanager
def recording(binding: Binding, served: Served | None, sink: GradientSink) -> Iterator[None]:
    """Record graphs of one version whose backward adds to a sink, for one unit, never across a pause."""
    binding.sink = sink
    try:
        with torch.enable_grad(), binding.using(served):
            yield
    finally:
        binding.sink = None


@torch.no_grad()
def sample_loss(walk: LayerWalk, ids: Sequence[int], prompt_length: int) -> float:
    """Mean cross-entropy of the completion's tokens in nats, by a plain forward."""
    tokens = torch.tensor([list(ids)], device=walk.model.device)
    logits = walk.model(input_ids=tokens, use_cache=False).logits[0, prompt_length - 1 : -1]
    total, _ = dispatch.cross_entropy(logits, tokens[0, prompt_length:])
    return float(total) / len(logits)
