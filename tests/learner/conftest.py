"""A learner that is small and quick."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.learner import LearnerConfig, StreamLearner

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]

# small and quick: two linears of two inputs each layer, one layer
QUICK: dict[str, Any] = dict(
    rank=3, lr=0.02, served_to="all", target_modules=("q_proj", "down_proj"), basis_columns=16, warm_samples=2,
    warm_tokens=8, warm_share=0.25, learned_below=100.0, learned_share=0.0, settled_below=0.0,
)


def _parameters(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def make(tiny_model: TinyModel) -> Iterator[MakeLearner]:
    """`make(state_dir=, tokenizer=, verifier=, **config)`; whatever a test does, the base stays bit for bit."""
    made: list[tuple[StreamLearner, str]] = []

    def make_learner(state_dir: Path | None = None, tokenizer: Any = None, verifier: Any = None, **changes: Any
                     ) -> StreamLearner:
        model = tiny_model("llama", num_hidden_layers=1)
        before = _parameters(model)
        config = LearnerConfig(**{**QUICK, **changes})
        learner = StreamLearner(model, tokenizer, config, state_dir=state_dir, verifier=verifier)
        made.append((learner, before))
        return learner

    yield make_learner
    for learner, before in made:
        learner.close()
        assert _parameters(learner.model) == before
        assert all(parameter.grad is None for parameter in learner.model.parameters())
