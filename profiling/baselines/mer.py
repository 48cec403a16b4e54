"""MER: experience replay whose steps are interpolated, so that gradients of different samples come to agree.

    theta_0 -> theta_1 -> ... -> theta_k, a step for each sample of a batch, one by one, the new sample last
    theta <- theta_0 + gamma (theta_k - theta_0)                      Riemer et al. 2019, arXiv:1810.11910

There is one batch for each new sample, so the paper's two interpolations, within a batch and across batches, are one.
The steps are Adam's, as for all methods here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from ogpstream.profiling.baselines.baseline import Baseline, Lesson


class MER(Baseline):
    """Meta-experience replay; `strength` is gamma."""

    # a part of each step is taken back, so it wants larger ones
    rates = (1e-3, 2e-3, 3e-3, 4e-3)
    strengths = (0.3, 0.5, 1.0)
    strength = 0.5

    def learn_lesson(self, lesson: Lesson) -> float:
        # before the steps of the old ones, as for the other methods; no evaluation of a gradient
        with torch.no_grad():
            loss = float(cross_entropy(*self.logits(lesson)))
        self._batch([*self.draw(self.config.rehearsals), lesson])
        self.keep(lesson)
        return loss

    def _batch(self, lessons: Sequence[Lesson]) -> None:
        before = self.theta()
        for lesson in lessons:
            self.update(lesson)
        assert self.strength is not None
        self.set_theta(before + self.strength * (self.theta() - before))

    def rest_for(self, evaluations: int) -> None:
        size = 1 + self.config.rehearsals
        for start in range(0, evaluations, size):
            self._batch(self.draw(min(size, evaluations - start)))
