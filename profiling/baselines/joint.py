"""Joint training: all samples of all tasks at once, epoch after epoch until the loss no longer falls.

What a stream could reach at best with the same adapter, where nothing is ever old. No stream, so no learning accuracy
and no backward transfer; it makes as many gradient evaluations as it needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ogpstream.learner import Sample
from ogpstream.learner.encoding import encode
from ogpstream.profiling.baselines.baseline import Baseline, Lesson

BATCH = 8
# converged: below this loss, or less than 2 % better than the best for two epochs
LOSS, GAIN, PATIENCE = 0.01, 0.02, 2
EPOCHS = 40


class Joint(Baseline):
    """Plain LoRA on mini-batches of everything."""

    def train_all(self, samples: Sequence[Sample], on_epoch: Callable[[int, float], Any] = lambda n, loss: None
                  ) -> tuple[int, bool]:
        """Epochs until convergence, and whether it came within 40."""
        lessons = []
        for number, sample in enumerate(samples, 1):
            encoded = encode(sample, self.tokenizer, vocab_size=self.vocab_size, max_tokens=self.max_tokens,
                             append_eos=self.config.append_eos)
            lessons.append(Lesson(encoded.ids, encoded.prompt_length, number))
        order, best, since = random.Random(self.config.seed), float("inf"), 0
        for epoch in range(1, EPOCHS + 1):
            order.shuffle(lessons)
            loss = sum(self._batch(lessons[at : at + BATCH]) for at in range(0, len(lessons), BATCH)) / len(lessons)
            on_epoch(epoch, loss)
            since = 0 if loss < (1 - GAIN) * best else since + 1
            best = min(best, loss)
            if loss < LOSS or since == PATIENCE:
                return epoch, math.isfinite(loss)
        return EPOCHS, False

    def _batch(self, lessons: Sequence[Lesson]) -> float:
        """One step on the mean gradient; the sum of the losses before."""
        found = [self.gradient(lesson) for lesson in lessons]
        self.step(torch.stack([gradient for gradient, _ in found]).mean(0))
        return sum(loss for _, loss in found)
