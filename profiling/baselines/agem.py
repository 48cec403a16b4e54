"""A-GEM: the gradient of a new sample loses what would raise the mean loss of old ones (Chaudhry et al. 2019,
arXiv:1812.00420).

    g <- g - (g.g_ref / g_ref.g_ref) g_ref   where g.g_ref < 0, g_ref the mean gradient of samples from the memory

The memory is a reference and never learned from, so idle phases go on with the latest samples in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ogpstream.profiling.baselines.baseline import Baseline, Lesson


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """The gradient without what points against the reference."""
    dot = gradient @ reference
    if dot >= 0:
        return gradient
    return gradient - dot / (reference @ reference) * reference


class AGEM(Baseline):
    """Averaged gradient episodic memory."""

    def learn_lesson(self, lesson: Lesson) -> float:
        loss = self._constrained(lesson, self.config.rehearsals)
        self.keep(lesson)
        return loss

    def repeat(self, lesson: Lesson, evaluations: int) -> None:
        # a step without references would not be this method's
        if evaluations > 1:
            self._constrained(lesson, evaluations - 1)

    def _constrained(self, lesson: Lesson, references: int) -> float:
        gradient, loss = self.gradient(lesson)
        old = [self.gradient(one)[0] for one in self.draw(references)] if references else []
        self.step(project(gradient, torch.stack(old).mean(0)) if old else gradient)
        return loss

    def rest_for(self, evaluations: int) -> None:
        size = 1 + self.config.rehearsals
        for number, lesson in enumerate(self.latest(-(-evaluations // size))):
            self._constrained(lesson, min(size, evaluations - number * size) - 1)
