"""A baseline on a tiny model in float64, and what its optimizer is given."""

import pytest
import torch

from ogpstream.learner import LearnerConfig, Sample
from ogpstream.learner.encoding import encode
from ogpstream.profiling.baselines.baseline import Lesson

SAMPLES = [Sample(prompt=f"{a}{b}:", completion=f" {a}{a}") for a in "pqr" for b in "123"]


class Watched:
    """A baseline that learns `SAMPLES`; `steps` are (theta before, gradient given to Adam, theta after)."""

    def __init__(self, baseline) -> None:
        self.baseline, self.samples = baseline, SAMPLES
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        step = baseline.step

        def watched(gradient: torch.Tensor) -> None:
            before = baseline.theta()
            step(gradient)
            self.steps.append((before, gradient.clone(), baseline.theta()))

        baseline.step = watched

    def learn(self, *numbers: int) -> None:
        for number in numbers:
            self.baseline.learn(SAMPLES[number])

    def lesson(self, number: int) -> Lesson:
        baseline = self.baseline
        encoded = encode(SAMPLES[number], baseline.tokenizer, vocab_size=baseline.vocab_size, max_tokens=64)
        return Lesson(encoded.ids, encoded.prompt_length, number + 1)

    def own_loss(self, number: int) -> torch.Tensor:
        """Mean negative log-probability of a sample's completion, from all logits of the model."""
        # not the model's own loss of labels, which is computed in float32
        lesson = self.lesson(number)
        logits = self.baseline.model(input_ids=torch.tensor([lesson.ids])).logits[0].log_softmax(-1)
        rows = range(lesson.prompt_length, len(lesson.ids))
        return -torch.stack([logits[row - 1, lesson.ids[row]] for row in rows]).mean()

    def own_gradient(self, number: int, at: torch.Tensor) -> torch.Tensor:
        """Its gradient at other parameters."""
        baseline, now = self.baseline, self.baseline.theta()
        baseline.set_theta(at)
        parts = torch.autograd.grad(self.own_loss(number), baseline.parameters)
        baseline.set_theta(now)
        return torch.cat([part.reshape(-1) for part in parts])


@pytest.fixture
def build(tiny_model, tiny_tokenizer):
    def make(kind, *, strength=None, **changes) -> Watched:
        config = LearnerConfig(**{"rank": 2, "lr": 1e-2, "ring_samples": 6, "rehearsals": 2, **changes})
        return Watched(kind(tiny_model("llama", torch.float64), tiny_tokenizer, config, strength=strength))

    return make
