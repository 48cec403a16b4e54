"""The warm start: which directions of the base model's inputs are protected before anything is learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import ConfigError, LearnerConfig, Sample, StreamLearner, warmstart
from ogpstream.learner.sites import Attachment, attach
from ogpstream.memory.adapters import AdapterStore

TinyModel = Callable[..., tf.PreTrainedModel]

QUICK: dict[str, Any] = dict(rank=3, lr=0.05, basis_columns=20, warm_samples=4, warm_tokens=12, learned_below=100.0,
                             learned_share=0.0)


def _learner(tiny_model: TinyModel, tokenizer: Any = None, calibration: list[str] | None = None, **changes: Any
             ) -> StreamLearner:
    config = LearnerConfig(**{**QUICK, **changes})
    return StreamLearner(tiny_model("llama", num_hidden_layers=1), tokenizer, config, calibration=calibration)


def _serve_noise(attachment: Attachment) -> None:
    """What is served changes the model a lot; the warm start must look at the base."""
    store = AdapterStore(attachment.shapes)
    store.create("default", 2, 1.0, torch.randn(store.layout(2).numel, generator=torch.Generator().manual_seed(1)))
    store.activate("default")
    attachment.binding.served = store.publish()


def test_own_samples_are_drawn_from_the_base_model(tiny_model: TinyModel) -> None:
    """Token for token what sampling without a cache and without adapters gives."""
    attachment = attach(tiny_model("llama"), rank=2)
    bare = tiny_model("llama")
    _serve_noise(attachment)
    for first in (None, 7):
        texts = warmstart.own_samples(attachment, count=3, tokens=10, seed=5, first=first)
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(101, (3, 1), generator=generator) if first is None else torch.full((3, 1), 7)
        for _ in range(9):
            with torch.no_grad():
                chances = bare(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        assert texts == ids.tolist()
    assert texts != warmstart.own_samples(attachment, count=3, tokens=10, seed=6, first=7)
    # never longer than the model's positions
    longest = warmstart.own_samples(attachment, count=1, tokens=1000, seed=5, first=7)
    assert [len(text) for text in longest] == [128]


def _inputs(model: tf.PreTrainedModel, texts: list[list[int]], names: list[str]) -> dict[str, Tensor]:
    """All inputs `[T, D_in]` of the named linears of a bare model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_covariances_of_the_inputs(tiny_model: TinyModel, family: str, scope: Any) -> None:
    attachment = attach(tiny_model(family), rank=2, target_modules="all-linear", basis_scope=scope)
    _serve_noise(attachment)
    texts = [[5, 6, 7, 8, 9], [50, 60, 70]]
    found = warmstart.input_covariances(attachment, texts)
    names = [site.name for site in attachment.sites]
    inputs = _inputs(tiny_model(family), texts, names)
    assert set(found) == {shape.basis for shape in attachment.shapes}
    for key, covariance in found.items():
        members = [site.name for site in attachment.sites if site.shape.basis == key]
        if scope == "layer":
            members = members[:1]
        expected = torch.zeros_like(covariance)
        for name in members:
            product = inputs[name].T @ inputs[name]
            expected += product / product.trace()
        assert torch.allclose(covariance / covariance.trace(), expected / expected.trace(), rtol=0, atol=1e-7)


def test_the_leading_directions_are_fixed_and_take_their_share(tiny_model: TinyModel) -> None:
    for energy, share in ((0.9, 0.5), (0.99, 0.25), (0.3, 1.0), (0.9, 0.0)):
        learner = _learner(tiny_model, warm_energy=energy, warm_share=share)
        texts = warmstart.own_samples(learner.attachment, count=4, tokens=12, seed=0, first=None)
        for key, covariance in warmstart.input_covariances(learner.attachment, texts).items():
            basis = learner.state.protection.bases[key]
            room = int(share * basis.capacity)
            assert torch.equal(basis.fixed, basis.live)
            assert basis.columns <= room
            values, vectors = torch.linalg.eigh(covariance)
            held = values.flip(0).cumsum(0) / values.sum()
            # the fewest that hold the energy, if there is room for them
            assert basis.columns == min(room, int((held < energy).sum()) + 1)
            leading = vectors.flip(1)[:, : basis.columns]
            rows = basis.rows()[basis.live].double()
            assert torch.allclose(rows.T @ rows, leading @ leading.T, rtol=0, atol=1e-5)
        learner.close()


def test_equal_seeds_start_equally(tiny_model: TinyModel) -> None:
    states = []
    for seed in (3, 3, 4):
        learner = _learner(tiny_model, seed=seed)
        states.append([basis.rows().clone() for basis in learner.state.protection.bases.values()])
        learner.close()
    assert all(map(torch.equal, states[0], states[1]))
    assert not any(map(torch.equal, states[0], states[2]))


def test_calibration_texts_choose_the_directions(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    texts = ["The quick brown fox.", "Jumps over 12 lazy dogs!"]
    learner = _learner(tiny_model, tiny_tokenizer, texts)
    ids = [tiny_tokenizer(text).input_ids for text in texts]
    own = _learner(tiny_model, tiny_tokenizer)
    for key, covariance in warmstart.input_covariances(learner.attachment, ids).items():
        basis = learner.state.protection.bases[key]
        leading = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : basis.columns]
        assert float(basis.share(leading.T).min()) > 1 - 1e-5
        assert not torch.equal(basis.rows(), own.state.protection.bases[key].rows())
    own.close()
    learner.close()


def test_texts_of_no_use_are_refused_and_the_model_left_as_it_was(
    tiny_model: TinyModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, state = tiny_model("llama", num_hidden_layers=1), tmp_path / "state"
    config = LearnerConfig(**QUICK)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        StreamLearner(model, config=config, calibration=["text"], state_dir=state)
    with pytest.raises(ConfigError, match="no token"):
        StreamLearner(model, tiny_tokenizer, config, calibration=[], state_dir=state)
    StreamLearner(model, config=config, state_dir=state).close()


@pytest.mark.parametrize("changes", [{"warm_start": False}, {"guard": "gradient"}, {"guard": "none"}])
def test_without_a_warm_start_nothing_is_protected(tiny_model: TinyModel, changes: dict[str, Any]) -> None:
    learner = _learner(tiny_model, **changes)
    assert learner.state.protection.columns == 0
    learner.close()


def test_learning_does_not_touch_what_the_warm_start_protects(tiny_model: TinyModel) -> None:
    learner = _learner(tiny_model, basis_columns=8, novelty=0.1, replay_every=1, target_modules=("q_proj", "down_proj"))
    bases = learner.state.protection.bases
    fixed = {key: basis.rows()[basis.fixed].clone() for key, basis in bases.items()}
    assert all(len(rows) == 4 for rows in fixed.values())
    replaced = 0
    for seed in range(16):
        ids = torch.randint(4, 101, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        replaced += learner.learn_one(Sample(prompt_ids=tuple(ids[:4]), completion_ids=tuple(ids[4:]))).replaced
    assert replaced > 4
    expert = learner.state.store.expert("default")
    for index, site in enumerate(learner.attachment.sites):
        rows = bases[site.shape.basis].rows()[bases[site.shape.basis].fixed]
        assert torch.equal(rows, fixed[site.shape.basis])
        delta = expert.delta(index)
        assert float(torch.linalg.matrix_norm(rows @ delta, 2)) <= 1e-6 * float(torch.linalg.matrix_norm(delta, 2))
    learner.close()
