"""What a step holds on to: its logits, its peak of memory, and nothing once it is dropped."""

from collections.abc import Callable, Generator

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner.activations import ActivationPlan, Policy
from ogpstream.learner.binding import GradientSink
from ogpstream.learner.meter import Meter
from ogpstream.learner.sites import Attachment, attach
from ogpstream.learner.step import Reading, sample_gradients
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore

TinyModel = Callable[..., tf.PreTrainedModel]
Step = Callable[..., Generator[str, None, list[Reading]]]

POLICIES: list[tuple[Policy, int]] = [("keep", 1), ("every", 1), ("every", 2), ("offload", 1)]
PLANS = [ActivationPlan(policy, every, 0) for policy, every in POLICIES]


def _step(model: tf.PreTrainedModel) -> Step:
    """`step(tokens, rows, plan, chunk)`: the gradient of one sample on an attached model."""
    attachment: Attachment = attach(model, rank=3, target_modules="all-linear")
    store = AdapterStore(attachment.shapes, serve_dtype=model.dtype)
    slab = torch.randn(store.layout(3).numel, generator=torch.Generator().manual_seed(2))
    expert = store.create("default", 3, 0.5, slab)
    store.activate("default")
    attachment.binding.served = store.publish()
    walk = LayerWalk(model)
    walk.check(torch.tensor([[5, 6]]))

    def step(tokens: int, rows: int, plan: ActivationPlan, chunk: int) -> Generator[str, None, list[Reading]]:
        ids = torch.randint(4, 101, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
        sink = GradientSink(expert.layout, "default")
        return sample_gradients(walk, attachment.binding, [sink], [(ids, tokens - rows)], chunk=chunk, activations=plan)

    return step


def _advance(work: Generator[str, None, list[Reading]], meter: Meter) -> str | None:
    with meter:
        return next(work, None)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_step_dropped_at_any_unit_frees_everything(tiny_model: TinyModel, plan: ActivationPlan) -> None:
    step = _step(tiny_model("llama", num_hidden_layers=4))
    units = len(list(step(9, 5, plan, 2)))
    held = []
    for stop in range(1, units + 1):
        work, meter = step(9, 5, plan, 2), Meter()
        for _ in range(stop):
            _advance(work, meter)
        held.append(meter.alive)
        work.close()
        assert meter.alive == 0, f"dropped after unit {stop}"
    # it did hold something until then
    assert min(held) > 0


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_tensor_is_as_large_as_the_logits_of_two_chunks(tiny_model: TinyModel, plan: ActivationPlan) -> None:
    """One chunk's are there, in the dtype that the loss accumulates in; those of all rows never."""
    vocabulary, rows, chunk = 5003, 60, 7
    step = _step(tiny_model("llama", dtype=torch.bfloat16, vocab_size=vocabulary))
    work, meter = step(64, rows, plan, chunk), Meter()
    while _advance(work, meter):
        pass
    assert meter.largest == chunk * vocabulary * torch.float32.itemsize
    # nor all chunks' together
    assert meter.peak < rows * vocabulary * torch.bfloat16.itemsize


def test_the_meter_counts_what_is_made_inside_until_it_is_released() -> None:
    before, meter = torch.zeros(100), Meter()
    with meter:
        made: list[Tensor] = [before + 1, before.view(10, 10), before.add_(1)]
        assert (meter.alive, meter.peak, meter.largest) == (400, 400, 400)
        made.append(torch.zeros(3, dtype=torch.float64))
        made.append(made[-1][:2])
        assert meter.alive == 424
    torch.zeros(1000)
    made.clear()
    assert (meter.alive, meter.peak) == (0, 424)
    with meter:
        del before
        assert torch.zeros(5).sum() == 0
    assert (meter.alive, meter.peak, meter.largest) == (0, 424, 400)
