"""The gradients of samples as a generator: it stops after every unit, so that a server can take the device back.

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


def sample_gradients(
    walk: LayerWalk, binding: Binding, sinks: Sequence[GradientSink], samples: Sequence[tuple[Sequence[int], int]], *,
    chunk: int,
) -> Generator[str, None, list[Reading]]:
    """Add dA and dB of each sample to its sink; every layer keeps its graph, so nothing is computed twice.

    All units compute with the version that is served when the first one starts. Several samples share the forwards,
    padded on the right, where no real token of a causal model sees it.

    Args:
        sinks: one for each sample.
        samples: ids of prompt and completion, and the prompt's length, at least 1; the completion is supervised.
        chunk: supervised rows whose logits exist at once.

    Yields:
        The name of the unit that was just done.

    Returns:
        How well each completion was known.
    """
    served = binding.current()
    longest = max(len(ids) for ids, _ in samples)
    tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in samples], device=walk.model.device)
    with binding.using(served):
        plan = walk.plan(tokens)
    yield "plan"

    hidden = plan.hidden
    kept: list[tuple[Tensor, Tensor]] = []
    for call in plan.calls:
        entry = hidden.detach().requires_grad_()
        with torch.enable_grad(), binding.using(served), _recording(binding, sinks):
            exit_ = run_layer(call, entry)
        kept.append((entry, exit_))
        hidden = exit_.detach()
        yield "forward"

    gradient = torch.zeros_like(hidden)
    readings = []
    for number, (ids, prompt_length) in enumerate(samples):
        own = slice(number, number + 1)
        rows = torch.arange(prompt_length - 1, len(ids) - 1, device=tokens.device)
        loss, certain = 0.0, 0
        for piece in rows.split(chunk):
            part = hidden[own, piece].requires_grad_()
            with torch.enable_grad(), binding.using(served), _recording(binding, sinks[own]):
                logits = walk.head(plan.final(part))
            target = tokens[number, piece + 1]
            total, dlogits = dispatch.cross_entropy(logits[0].detach(), target)
            # dlogits = softmax - onehot: the target's entry is its probability less 1
            certain += int((dlogits.gather(1, target[:, None]) > -0.5).sum())
            gradient[own, piece] = torch.autograd.grad(logits, part, dlogits[None] / len(rows))[0]
            loss += float(total)
            yield "loss"
        readings.append(Reading(loss / len(rows), certain / len(rows)))

    for _ in plan.calls:
        entry, exit_ = kept.pop()
        (gradient,) = torch.autograd.grad(exit_, entry, gradient)
        yield "backward"
    return readings


@contextmanager
def _recording(binding: Binding, sinks: Sequence[GradientSink]) -> Iterator[None]:
    """Set the sinks for the forward of one unit, never across a pause."""
    binding.sinks = tuple(sinks)
    try:
        yield
    finally:
        binding.sinks = ()


@torch.no_grad()
def sample_loss(walk: LayerWalk, ids: Sequence[int], prompt_length: int) -> float:
    """Mean cross-entropy of the completion's tokens in nats, by a plain forward."""
    tokens = torch.tensor([list(ids)], device=walk.model.device)
    logits = walk.model(input_ids=tokens, use_cache=False).logits[0, prompt_length - 1 : -1]
    total, _ = dispatch.cross_entropy(logits, tokens[0, prompt_length:])
    return float(total) / len(logits)
