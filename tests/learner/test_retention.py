"""What is left of the base model, against the formula written out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.learner import ConfigError, LearnerConfig, RetentionProbe, StreamLearner

TinyModel = Callable[..., tf.PreTrainedModel]

TEXTS = [torch.randint(4, 101, (3 + n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(12)]


@pytest.fixture
def learner(tiny_model: TinyModel) -> StreamLearner:
    config = LearnerConfig(rank=3, served_to="all", warm_start=False)
    return StreamLearner(tiny_model("llama", num_hidden_layers=1), config=config)


def _change(learner: StreamLearner) -> None:
    """Some texts become likelier, others less so."""
    expert = learner.state.store.expert("default")
    expert.factors = 0.3 * torch.randn(expert.layout.numel, generator=torch.Generator().manual_seed(1))
    learner.attachment.binding.served = learner.state.store.publish()


@torch.no_grad()
def _losses(model: Any) -> list[float]:
    return [float(model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss) for text in TEXTS]


def test_texts_out_of_scope_lose_nothing_but_could(learner: StreamLearner, tiny_model: TinyModel) -> None:
    scoped = StreamLearner(tiny_model("llama", num_hidden_layers=1), config=LearnerConfig(rank=3, warm_start=False))
    probes = [RetentionProbe(one.attachment, TEXTS) for one in (learner, scoped)]
    for one in (learner, scoped):
        _change(one)
    assert probes[1].measure().crs == 1.0
    assert probes[1].measure(everywhere=True) == probes[0].measure() == probes[0].measure(everywhere=True)
    assert probes[0].measure().crs < 0.99


def test_nothing_is_lost_at_the_start(learner: StreamLearner) -> None:
    found = RetentionProbe(learner.attachment, TEXTS).measure()
    assert found.crs == 1.0
    assert found.ppl_ratio == 1.0


@pytest.mark.parametrize("after", [False, True])
def test_the_formula(learner: StreamLearner, tiny_model: TinyModel, after: bool) -> None:
    """The base's losses are the base's, whatever is served when the probe is made."""
    if after:
        _change(learner)
    probe = RetentionProbe(learner.attachment, TEXTS)
    if not after:
        _change(learner)
    found = probe.measure()
    base, now = _losses(tiny_model("llama", num_hidden_layers=1)), _losses(learner.model)
    shares, nats_base, nats_now, tokens = [], 0.0, 0.0, 0
    for text, old, new in zip(TEXTS, base, now, strict=True):
        shares.append(min(1.0, math.exp(old - new)))
        nats_base += old * (len(text) - 1)
        nats_now += new * (len(text) - 1)
        tokens += len(text) - 1
    assert found.crs == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert found.ppl_base == pytest.approx(math.exp(nats_base / tokens), rel=1e-5)
    assert found.ppl_now == pytest.approx(math.exp(nats_now / tokens), rel=1e-5)
    assert found.ppl_ratio == pytest.approx(found.ppl_now / found.ppl_base)
    # a text that became likelier does not make up for one that was lost
    gains = [old - new for old, new in zip(base, now, strict=True)]
    assert min(gains) < -0.1 and max(gains) > 0.1
    assert found.crs < 0.99


@pytest.mark.parametrize("texts", [[], [[5]], [[5, 6], []]])
def test_texts_without_a_token_to_predict_are_refused(learner: StreamLearner, texts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        RetentionProbe(learner.attachment, texts)


def test_where_one_expert_answers_each_text_has_the_one_that_costs_it_most(tiny_model: TinyModel) -> None:
    config = LearnerConfig(rank=3, warm_start=False, routing="prompt")
    learner = StreamLearner(tiny_model("llama", num_hidden_layers=1), config=config)
    learner.add_expert("law")
    learner.activate({"default": 1.0, "law": 1.0})
    probe = RetentionProbe(learner.attachment, TEXTS)
    store = learner.state.store
    for seed, name in enumerate(store.names):
        expert = store.expert(name)
        generator = torch.Generator().manual_seed(seed)
        expert.factors = expert.factors + 0.3 * torch.randn(len(expert.factors), generator=generator)
    learner.activate({"default": 1.0, "law": 1.0})
    assert probe.measure().crs == 1.0
    binding, served = learner.attachment.binding, store.served
    losses = []
    for name in store.names:
        with binding.using(served, frozenset([name])):
            losses.append(_losses(learner.model))
    base = _losses(tiny_model("llama", num_hidden_layers=1))
    worst = [min(1.0, math.exp(old - max(both))) for old, *both in zip(base, *losses, strict=True)]
    assert {both.index(max(both)) for both in zip(*losses, strict=True)} == {0, 1}
    assert probe.measure(everywhere=True).crs == pytest.approx(sum(worst) / len(worst), rel=1e-5)
