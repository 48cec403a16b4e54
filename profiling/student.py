"""What one pass over a stream needs of a method, and the learner in that form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ogpstream.learner import Sample, StreamLearner


class Student(Protocol):
    """Learns a stream of single samples.

    Attributes:
        model: serves what is learned by now.
        boundaries: whether the method's formula is told where a task ends; else it only knows that it rests.
        rests: idle phases that are done.
        gradients: evaluations so far, one for each sample in each update.
    """

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def boundaries(self) -> bool: ...

    @property
    def rests(self) -> int: ...

    @property
    def gradients(self) -> int: ...

    def learn(self, sample: Sample) -> float | None:
        """Learn one sample once; its loss before, or None where it was learned before."""

    def rest(self, updates: int) -> None:
        """An idle phase of so many updates, each with the learner's `rehearsal_batch` evaluations."""

    def state_bytes(self) -> int:
        """Bytes of all that the method must keep."""


class LearnerStudent:
    """A `StreamLearner`.

    Args:
        alone: spend the evaluations of this many rehearsals on each new sample again, and those of idle phases on the
            latest ones; None rehearses from the ring.
    """

    boundaries = False

    def __init__(self, learner: StreamLearner, *, alone: int | None = None) -> None:
        self.learner = learner
        self.alone = alone
        self._recent: list[Sample] = []

    @property
    def model(self) -> Any:
        return self.learner.model

    @property
    def tokenizer(self) -> Any:
        return self.learner.tokenizer

    @property
    def rests(self) -> int:
        return self.learner.state.counters.consolidations

    @property
    def gradients(self) -> int:
        return self.learner.state.counters.gradients

    def learn(self, sample: Sample) -> float | None:
        (report,) = self.learner.learn_batch([sample])
        if self.alone is not None:
            self._recent.append(sample)
            for _ in range(self.alone if report.status != "skipped" else 0):
                self.learner.learn_one(replace(sample, id=None))
        return report.loss

    def rest(self, updates: int) -> None:
        if self.alone is None:
            self.learner.consolidate(updates)
            return
        # the same number of evaluations on what a learner without memory still has: its latest samples
        for number in range(updates * self.learner.config.rehearsal_batch):
            self.learner.learn_one(replace(self._recent[-1 - number % len(self._recent)], id=None))
        self._recent.clear()

    def state_bytes(self) -> int:
        return self.learner.state_bytes()

    def coverage(self) -> float:
        """Share of the input energy of the ring's samples that lies in span(P), the mean over the adapted linears.

        For this part of an input the retention certificate is exact: no update changes what the adapter makes of it.
        0 where nothing is protected.
        """
        learner = self.learner
        samples = [learner.state.ring.get(slot).ids.tolist() for slot in learner.state.ring.slots]
        if learner.config.guard != "fold" or not samples:
            return 0.0
        return covered_energy(learner, samples)


@torch.no_grad()
def covered_energy(learner: StreamLearner, samples: Sequence[Sequence[int]]) -> float:
    """Mean over the linears of sum |P.T x|^2 / sum |x|^2, x their inputs on these token ids as the model is served."""
    energies = {site.index: torch.zeros(2, dtype=torch.float64) for site in learner.attachment.sites}
    handles = []
    for site in learner.attachment.sites:
        basis = learner.state.protection.bases[site.shape.basis].rows().double()

        def add(_module: object, args: tuple[Tensor, ...], P: Tensor = basis, index: int = site.index) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double().cpu()
            energies[index] += torch.stack([(x @ P.T).square().sum(), x.square().sum()])

        handles.append(site.module.register_forward_pre_hook(add))
    try:
        for ids in samples:
            learner.model(input_ids=torch.tensor([list(ids)], device=learner.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shares = [float(inside / total) for inside, total in energies.values() if total > 0]
    return sum(shares) / len(shares)
