"""The gradients of samples as a generator: it stops after every unit, so that a server can take the device back.

Units: the layer inputs, each decoder layer's forward, each chunk of the cross-entropy, each layer that is computed
again, each layer's backward. Of samples that are only looked at, `sample_readings` makes the forwards alone. Nothing of
the learner's state changes here; a generator that is dropped half-way leaves nothing behind.
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
from ogpstream.memory.served import Served


class Reading(NamedTuple):
    """How well a model knows a completion.

    Attributes:
        loss: mean cross-entropy of its tokens, in nats.
        certain: share of its tokens that got more than half of the probability, so that greedy decoding gives them.
    """

    loss: float
    certain: float


def sample_gradients(
    walk: LayerWalk,
    binding: Binding,
    sinks: Sequence[GradientSink],
    samples: Sequence[tuple[Sequence[int], int]],
    *,
    chunk: int,
    activations: ActivationPlan,
    layers: int | None = None,
    alone: str | None = None,
) -> Generator[str, None, list[Reading]]:
    """Add dA and dB of each sample to its sink.

    All units compute with the version that is served when the first one starts. Several samples share the forwards,
    padded on the right, where no real token of a causal model sees it.

    Args:
        sinks: one for each sample.
        samples: ids of prompt and completion, and the prompt's length, at least 1; the completion is supervised.
        chunk: supervised rows whose logits exist at once.
        activations: what is kept and what is computed again; the gradient is the same, bit for bit.
        layers: how many of the top decoder layers are trained, at least 1; None is all. Those below run without a
            graph, and the backward ends where they begin.
        alone: the expert that computes, without the others that have a scope; None is all of them.

    Yields:
        The name of the unit that was just done.

    Returns:
        How well each completion was known.
    """
    served, tokens = _version(binding, alone), _padded(samples, walk.model.device)
    with binding.using(served):
        plan = walk.plan(tokens)
    yield "plan"

    def run(call: LayerCall, entry: Tensor) -> Tensor:
        with recording(binding, served, sinks):
            return run_layer(call, entry)

    hidden, trail = plan.hidden, Trail(activations, run)
    left = len(plan.calls) if layers is None else layers
    for below, call in enumerate(plan.calls, left - len(plan.calls)):
        if below < 0:
            with torch.no_grad(), binding.using(served):
                hidden = run_layer(call, hidden)
        else:
            hidden = trail.forward(call, hidden)
        yield "forward"

    gradient = torch.zeros_like(hidden)
    seen: list[list[Tensor]] = []
    for number, (ids, prompt_length) in enumerate(samples):
        own, counts = slice(number, number + 1), []
        for piece in _rows(ids, prompt_length, tokens.device).split(chunk):
            with recording(binding, served, sinks[own]):
                count, part = loss_gradient(walk, plan, hidden[own, piece], tokens[number, piece + 1],
                                            len(ids) - prompt_length)
            gradient[own, piece] = part
            counts.append(count)
            yield "loss"
        seen.append(counts)

    del hidden, part
    while left:
        entry, exit_ = yield from trail.back()
        (gradient,) = torch.autograd.grad(exit_, entry, gradient)
        del entry, exit_
        left -= 1
        if not left:
            # of the activations nothing is alive beside what comes next
            del gradient, plan
        yield "backward"
    for sink in sinks:
        sink.finish()
    return _readings(seen, samples)


def sample_readings(
    walk: LayerWalk, binding: Binding, samples: Sequence[tuple[Sequence[int], int]], *, chunk: int,
    alone: str | None = None,
) -> Generator[str, None, list[Reading]]:
    """How well the completions of samples are known, by forwards alone; arguments as those of `sample_gradients`.

    Yields:
        "look", after each layer and each chunk of the cross-entropy.
    """
    served, tokens = _version(binding, alone), _padded(samples, walk.model.device)
    with binding.using(served):
        plan = walk.plan(tokens)
    hidden = plan.hidden
    for call in plan.calls:
        with torch.no_grad(), binding.using(served):
            hidden = run_layer(call, hidden)
        yield "look"
    seen: list[list[Tensor]] = []
    for number, (ids, prompt_length) in enumerate(samples):
        counts = []
        for piece in _rows(ids, prompt_length, tokens.device).split(chunk):
            with torch.no_grad(), binding.using(served):
                logits = walk.head(plan.final(hidden[number : number + 1, piece]))[0]
                counts.append(_counted(logits, tokens[number, piece + 1])[0])
            del logits
            yield "look"
        seen.append(counts)
    return _readings(seen, samples)


def _version(binding: Binding, alone: str | None) -> Served | None:
    """What is served now, or one expert of it with those that answer every prompt."""
    served = binding.current()
    if served is None or alone is None:
        return served
    names = served.scope.everywhere | {alone}
    # which keeps it for the next group, and for requests
    one = served.only(names) if binding.gate is None else binding.gate.only(served, names)
    # every linear asks for its packs
    return None if one is None else one.taken()


def _padded(samples: Sequence[tuple[Sequence[int], int]], device: torch.device) -> Tensor:
    """Ids `[samples, T]`, filled up with 0 on the right."""
    longest = max(len(ids) for ids, _ in samples)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in samples], device=device)


def _rows(ids: Sequence[int], prompt_length: int, device: torch.device) -> Tensor:
    """Places whose next id is of the completion."""
    return torch.arange(prompt_length - 1, len(ids) - 1, device=device)


def _readings(seen: Sequence[Sequence[Tensor]], samples: Sequence[tuple[Sequence[int], int]]) -> list[Reading]:
    """Of the counts of all chunks: read once, since a number read in each unit has the host wait for the device."""
    readings = []
    for counts, (ids, prompt_length) in zip(seen, samples, strict=True):
        loss, certain = (sum(column) for column in zip(*torch.stack(list(counts)).tolist(), strict=True))
        readings.append(Reading(loss / (len(ids) - prompt_length), certain / (len(ids) - prompt_length)))
    return readings


def _counted(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(Sum of cross-entropies, how many targets got over half of the probability) `[2]`, and dlogits."""
    total, dlogits = dispatch.cross_entropy(logits, target)
    # dlogits = softmax - onehot: the target's entry is its probability less 1
    sure = (dlogits.gather(1, target[:, None]) > -0.5).sum()
    return torch.stack([total, sure.to(total)]), dlogits


def loss_gradient(walk: LayerWalk, plan: Plan, hidden: Tensor, target: Tensor, of: int) -> tuple[Tensor, Tensor]:
    """The loss of some rows and its gradient; full logits never exist.

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
    counts, dlogits = _counted(logits[0].detach(), target)
    (gradient,) = torch.autograd.grad(logits, hidden, dlogits.div_(of)[None])
    return counts, gradient


@contextmanager
def recording(binding: Binding, served: Served | None, sinks: Sequence[GradientSink]) -> Iterator[None]:
    """Record graphs of one version whose backward adds to the sinks, for one unit, never across a pause."""
    binding.sinks = tuple(sinks)
    try:
        with torch.enable_grad(), binding.using(served):
            yield
    finally:
        binding.sinks = ()
