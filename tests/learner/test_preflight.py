"""Predicted peaks against counted ones, the choice by the budget, and the longest sample that fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.learner import LearnerConfig
from ogpstream.learner.activations import ActivationPlan, Curve, Footprint, LayerCost, choose
from ogpstream.learner.binding import GradientSink
from ogpstream.learner.meter import Meter
from ogpstream.learner.preflight import Preflight
from ogpstream.learner.sites import attach
from ogpstream.learner.step import sample_gradients
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Held

TinyModel = Callable[..., tf.PreTrainedModel]

LAYERS, POSITIONS = 5, 1024
CONFIG = LearnerConfig(rank=3, max_active=2, held_rank=2, loss_chunk=16, routing="named")


class Bench:
    """A model that serves as many columns as the configuration allows, and counted peaks of its steps."""

    def __init__(self, model: tf.PreTrainedModel, config: LearnerConfig = CONFIG) -> None:
        self.attachment = attach(model, rank=3, target_modules="all-linear")
        self.store = AdapterStore(self.attachment.shapes, serve_dtype=model.dtype)
        for name in ("default", "other"):
            expert = self.store.create(name, 3, 0.5)
            expert.held = [Held(torch.ones(s.d_in, 2), torch.ones(2, s.d_out)) for s in self.attachment.shapes]
            self.store.activate(name)
        self.attachment.binding.served = self.store.publish()
        self.walk = LayerWalk(model)
        self.walk.check(torch.tensor([[5, 6]]))
        self.preflight = Preflight(self.walk, self.attachment.binding, self.store.sites, config)

    def peak(self, tokens: int, rows: int, plan: ActivationPlan, layers: int | None = None) -> int:
        ids = torch.randint(4, 101, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
        sink = GradientSink(self.store.expert("default").layout, "default")
        work = sample_gradients(self.walk, self.attachment.binding, [sink], [(ids, tokens - rows)],
                                chunk=CONFIG.loss_chunk, activations=plan, layers=layers)
        meter = Meter()
        with meter:
            for _ in work:
                pass
        return meter.peak


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 1000), (torch.bfloat16, 300)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
def test_the_predicted_peak_is_the_counted_one(
    tiny_model: TinyModel, family: str, dtype: torch.dtype, longest: int
) -> None:
    """Within 0.3 %, between the measured lengths and at up to four times the longest of them."""
    bench = Bench(tiny_model(family, dtype=dtype, num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS))
    for tokens, rows in ((24, 8), (100, 40), (longest, 40)):
        for plan in bench.preflight.footprint.plans(tokens, rows, host=True):
            # all hidden states but the one in use are in host RAM, which is the same memory here
            host = (LAYERS - 1) * tokens * bench.preflight.footprint.hidden if plan.policy == "offload" else 0
            counted = bench.peak(tokens, rows, plan) - host
            assert plan.peak_bytes == pytest.approx(counted, rel=3e-3), f"{plan} at {tokens}"


def test_fewer_trained_layers_need_less(tiny_model: TinyModel) -> None:
    bench = Bench(tiny_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS))
    before: dict[str, int] = {}
    for layers in (1, 2, 4, LAYERS):
        for plan in bench.preflight.footprint.plans(300, 40, host=False, layers=layers):
            assert plan.peak_bytes == pytest.approx(bench.peak(300, 40, plan, layers), rel=3e-3), f"{plan} of {layers}"
            # a first layer's input is one of the embeddings, which are there anyway
            assert plan.peak_bytes > before.get(str(plan), 0) or layers == LAYERS
            before[str(plan)] = plan.peak_bytes


def test_where_attention_is_square_the_prediction_holds_to_six_percent(tiny_model: TinyModel) -> None:
    """Gemma 2 computes T x T weights, and every second layer has a window of 16."""
    bench = Bench(tiny_model("gemma2", num_hidden_layers=4, max_position_embeddings=POSITIONS))
    for tokens, rows in ((100, 40), (700, 40)):
        for plan in bench.preflight.footprint.plans(tokens, rows, host=False):
            assert plan.peak_bytes == pytest.approx(bench.peak(tokens, rows, plan), rel=0.06), f"{plan} at {tokens}"


def test_when_the_logits_are_the_peak_they_are_predicted(tiny_model: TinyModel) -> None:
    bench = Bench(tiny_model("llama", vocab_size=20011, max_position_embeddings=POSITIONS))
    for rows in (1, 5, 16, 60):
        for plan in bench.preflight.footprint.plans(64, rows, host=False):
            assert plan.peak_bytes == pytest.approx(bench.peak(64, rows, plan), rel=1e-2), f"{plan} with {rows} rows"


def test_the_prediction_does_not_depend_on_what_is_served(tiny_model: TinyModel) -> None:
    """A choice that prompts are cut by must be the same after a restart."""
    bench = Bench(tiny_model("llama"))
    before = bench.preflight.footprint
    bench.store.deactivate("other")
    bench.attachment.binding.served = bench.store.publish()
    again = Preflight(bench.walk, bench.attachment.binding, bench.store.sites, CONFIG)
    assert again.footprint == before


# the formula, on numbers that can be checked by hand


def _flat(value: int) -> Curve:
    return Curve(((1, value),))


def _footprint(layers: int, *, g: int = 100, f: int = 120, b: int = 150, q: int = 0) -> Footprint:
    """One byte per token of a hidden state, 1000 bytes of masks and the like."""
    return Footprint(_flat(1000), 1, (LayerCost(layers, _flat(g), _flat(f), _flat(b)),), _flat(q), chunk=8)


def _peaks(footprint: Footprint, host: bool = False) -> dict[str, int]:
    """At 10 tokens: H = 10."""
    return {str(plan): plan.peak_bytes - 1000 for plan in footprint.plans(10, 4, host=host)}


def test_the_formula() -> None:
    peaks = _peaks(_footprint(9), host=True)
    # the order is that of time: a copy over the bus costs less than computing layers a third time
    assert list(peaks) == ["keep", "every 1", "offload", "every 2", "every 3"]
    assert peaks == {
        "keep": 900 + 10 + 50,
        "every 1": 8 * 10 + 10 + 150,
        "offload": 2 * 10 + 150,
        # 0, 2, 4, 6, 8 are stored; the segment of 6 and 7 is walked with 2, 4, 6 and 7 beside 0
        "every 2": 4 * 10 + 10 + 150,
        # 0, 3, 6 are stored; the last segment has 7 and 8 too
        "every 3": 4 * 10 + 10 + 150,
    }
    assert _peaks(_footprint(9, q=10_000))["every 3"] == 4 * 10 + 10_000
    assert _peaks(_footprint(9, q=10_000))["keep"] == 900 + 10 + 10_000
    assert list(_peaks(_footprint(1))) == ["keep", "every 1"]


def test_a_curve_goes_through_its_points() -> None:
    square = Curve(tuple((t, 3 * t * t + 5 * t + 7) for t in (64, 128, 256)))
    assert square(1024) == pytest.approx(3 * 1024**2 + 5 * 1024 + 7)
    assert Curve(((4, 8), (2, 4)))(3) == 6
    assert _flat(5)(100) == 5


def test_the_first_plan_within_the_budget_is_chosen_and_the_smallest_where_none_is() -> None:
    plans = [ActivationPlan("keep", 1, 900), ActivationPlan("every", 1, 300), ActivationPlan("every", 2, 200)]
    assert [choose(plans, budget).peak_bytes for budget in (1000, 900, 899, 299, 10)] == [900, 900, 300, 200, 200]


# the choice for a model


def _preflight(tiny_model: TinyModel, **changes: Any) -> Preflight:
    model = tiny_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS)
    return Bench(model, replace(CONFIG, **changes)).preflight


def test_by_default_a_small_model_keeps_everything(tiny_model: TinyModel) -> None:
    preflight = _preflight(tiny_model)
    assert str(preflight.plan(1024, 512)) == "keep"
    assert preflight.longest(1024, 512) == 1024


def test_a_smaller_budget_computes_again_and_cuts_at_last(tiny_model: TinyModel) -> None:
    preflight = _preflight(tiny_model, activation_budget_mib=4)
    chosen = [preflight.plan(tokens, 10) for tokens in range(20, 900, 20)]
    policies = list(dict.fromkeys(str(plan) for plan in chosen))
    assert policies == ["keep", "every 1", "every 2"]
    assert all(plan.peak_bytes <= 4 * 2**20 for plan in chosen)
    longest = preflight.longest(1024, 10)
    assert 880 < longest < 1024
    assert preflight.smallest(longest, 10).peak_bytes <= 4 * 2**20 < preflight.smallest(longest + 1, 10).peak_bytes
    assert preflight.longest(longest - 1, 10) == longest - 1
    # not even the completion alone
    assert preflight.longest(1024, 1000) == 0


def test_memory_that_ran_out_lowers_what_is_chosen_but_not_what_is_admitted(tiny_model: TinyModel) -> None:
    preflight = _preflight(tiny_model)
    seen = []
    for _ in range(3):
        seen.append(preflight.plan(1024, 512))
        preflight.lower(seen[-1])
    assert [str(plan) for plan in seen] == ["keep", "every 1", "every 2"]
    assert preflight.longest(1024, 512) == 1024
    # there is nothing smaller, and a shorter sample is as before
    assert str(preflight.plan(1024, 512)) in ("every 2", "every 3")
    assert str(preflight.plan(32, 16)) == "keep"


def test_memory_that_runs_out_while_it_is_measured(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, preflight = _preflight(tiny_model), _preflight(tiny_model)
    expected, plan = whole.plan(500, 40).peak_bytes, LayerWalk.plan
    lengths: list[int] = []

    def short_of_memory(walk: LayerWalk, ids: torch.Tensor, **inputs: Any) -> Any:
        lengths.append(ids.shape[1])
        if ids.shape[1] > 32:
            raise torch.OutOfMemoryError("injected")
        return plan(walk, ids, **inputs)

    monkeypatch.setattr(LayerWalk, "plan", short_of_memory)
    assert preflight.plan(500, 40).peak_bytes == pytest.approx(expected, rel=1e-2)
    assert lengths == [256, 128, 64, 32, 16, 8]
    monkeypatch.setattr(LayerWalk, "plan", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
    with pytest.raises(torch.OutOfMemoryError):
        _preflight(tiny_model).plan(500, 40)
