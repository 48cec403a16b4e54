"""Synaptic intelligence: a quadratic pull to the parameters of the last task, by how much each one lowered the loss.

    while a task is learned   omega <- omega - g delta, for each step delta with the task's own gradient g
    at its end                Omega <- Omega + omega / ((theta - theta*)^2 + xi), theta* <- theta, omega <- 0
    gradient of the penalty   2 c Omega (theta - theta*)

Zenke et al. 2017, arXiv:1703.04200. An Omega below 0, which would push parameters away, counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ogpstream.profiling.baselines.baseline import Baseline, Lesson

# keeps the importance of parameters that hardly moved finite; it is the square of a move by 0.03
XI = 1e-3


def importance(omega: Tensor, moved: Tensor) -> Tensor:
    """omega / (moved^2 + xi) of one task."""
    return omega / (moved.square() + XI)


def penalty_gradient(strength: float, total: Tensor, theta: Tensor, anchor: Tensor) -> Tensor:
    """2 c Omega (theta - theta*)."""
    return 2 * strength * total.clamp_min(0.0) * (theta - anchor)


class SI(Baseline):
    """Synaptic intelligence; `strength` is c."""

    boundaries = True
    strengths = (0.01, 0.1, 1.0)
    strength = 0.1

    def attach(self) -> None:
        super().attach()
        self.anchor = self.theta()
        self.omega = torch.zeros_like(self.anchor)
        self.total = torch.zeros_like(self.anchor)

    def update(self, lesson: Lesson) -> float:
        gradient, loss = self.gradient(lesson)
        before = self.theta()
        assert self.strength is not None
        self.step(gradient + penalty_gradient(self.strength, self.total, before, self.anchor))
        self.omega -= gradient * (self.theta() - before)
        return loss

    def rest_for(self, evaluations: int) -> None:
        super().rest_for(evaluations)
        theta = self.theta()
        self.total = self.total + importance(self.omega, theta - self.anchor)
        self.anchor, self.omega = theta, torch.zeros_like(theta)

    def kept(self) -> Iterable[Tensor]:
        return (self.anchor, self.omega, self.total)
