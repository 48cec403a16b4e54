"""The gradient of one sample as a generator: it stops after every unit, so that a server can take the device back.

Units: the layer inputs, each decoder layer's forward, each chunk of the cross-entropy, each layer's backward. Nothing
of the learner's state changes here; a generator that is dropped half-way leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.walk import LayerWalk, run_layer


class Reading(NamedTuple):
    """How well a model knows a completion.

    Attributes:
        loss: mean cross-entropy of its tokens, in nats.
        certain: share of its tokens that got more than half of the probability, so that greedy decoding gives them.
    """

    loss: float
    certain: float


def sample_gradient(
    walk: LayerWalk, binding: Binding, sink: GradientSink, ids: Sequence[int], prompt_length: int, *, chunk: int
) -> Generator[str, None, Reading]:
    """Add dA and dB of one sample to the sink; every layer keeps its graph, so nothing is computed twice.

    All units compute with the version that is served when the first one starts.

    Args:
        ids: prompt and completion, T in all; the completion's tokens are supervised.
        prompt_length: at least 1.
        chunk: supervised rows whose logits exist at once.

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

    hidden = plan.hidden
    kept: list[tuple[Tensor, Tensor]] = []
    for call in plan.calls:
        entry = hidden.detach().requires_grad_()
        with torch.enable_grad(), binding.using(served), _recording(binding, sink):
            exit_ = run_layer(call, entry)
        kept.append((entry, exit_))
        hidden = exit_.detach()
        yield "forward"

    rows = torch.arange(prompt_length - 1, tokens.shape[1] - 1, device=tokens.device)
    gradient = torch.zeros_like(hidden)
    loss, certain = 0.0, 0
    for piece in rows.split(chunk):
        part = hidden[:, piece].requires_grad_()
        with torch.enable_grad(), binding.using(served), _recording(binding, sink):
            logits = walk.head(plan.final(part))
        target = tokens[0, piece + 1]
        total, dlogits = dispatch.cross_entropy(logits[0].detach(), target)
        # dlogits = softmax - onehot: the target's entry is its probability less 1
        certain += int((dlogits.gather(1, target[:, None]) > -0.5).sum())
        gradient[:, piece] = torch.autograd.grad(logits, part, dlogits[None] / len(rows))[0]
        loss += float(total)
        yield "loss"

    for _ in plan.calls:
        entry, exit_ = kept.pop()
        (gradient,) = torch.autograd.grad(exit_, entry, gradient)
        yield "backward"
    return Reading(loss / len(rows), certain / len(rows))


@contextmanager
def _recording(binding: Binding, sink: GradientSink) -> Iterator[None]:
    """Set the sink for the forward of one unit, never across a pause."""
    binding.sink = sink
    try:
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
