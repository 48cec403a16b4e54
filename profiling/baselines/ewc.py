"""EWC, online and diagonal: a quadratic pull to the parameters of the last task, by Fisher information.

    gradient of the penalty   lambda F (theta - theta*)                Kirkpatrick et al. 2017, arXiv:1612.00796
    at the end of a task      F <- gamma F + F_task, theta* <- theta   Schwarz et al. 2018, arXiv:1805.06370

F_task is the mean of squared gradients of the task's latest samples at theta*. These evaluations are the second half of
those of the idle phase, so that EWC has no more than the others.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ogpstream.learner import ConfigError
from ogpstream.profiling.baselines.baseline import Baseline, Lesson

# of what earlier tasks weigh after one more; 1 would add them all up
GAMMA = 0.9


def penalty_gradient(strength: float, importance: Tensor, theta: Tensor, anchor: Tensor) -> Tensor:
    """lambda F (theta - theta*)."""
    return strength * importance * (theta - anchor)


class EWC(Baseline):
    """Online elastic weight consolidation; `strength` is lambda."""

    boundaries = True
    strengths = (1e2, 1e3, 1e4)
    strength = 1e3

    def attach(self) -> None:
        super().attach()
        self.anchor = self.theta()
        self.importance = torch.zeros_like(self.anchor)

    def update(self, lesson: Lesson) -> float:
        gradient, loss = self.gradient(lesson)
        assert self.strength is not None
        self.step(gradient + penalty_gradient(self.strength, self.importance, self.theta(), self.anchor))
        return loss

    def rest_for(self, evaluations: int) -> None:
        if evaluations < 2:
            raise ConfigError("ewc measures its Fisher information in idle phases: give --idle 1 or more")
        lessons = self.latest(evaluations)
        for lesson in lessons[: evaluations // 2]:
            self.update(lesson)
        squares = [self.gradient(lesson)[0].square() for lesson in lessons[evaluations // 2 :]]
        if squares:
            self.importance = GAMMA * self.importance + torch.stack(squares).mean(0)
        self.anchor = self.theta()

    def kept(self) -> Iterable[Tensor]:
        return (self.anchor, self.importance)
