"""The steps of one update: one on all lessons together, or one on each in turn, and then a part of the way.

    theta_0 -> theta_1 -> ... -> theta_k    a step of the optimizer for each lesson, the new one last
    theta   <- theta_0 + rate (theta_k - theta_0)

The second is Reptile's (Nichol et al. 2018, arXiv:1803.02999), for old samples beside a new one MER's (Riemer et al.
2019, arXiv:1810.11910): it goes where the gradients of different samples agree. P.T A = 0 holds all the way, since it
is linear.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.proposal import Proposal
from ogpstream.learner.staging import parts
from ogpstream.learner.step import Reading, sample_gradients
from ogpstream.memory.adapters import Served
from ogpstream.memory.experts import Expert
from ogpstream.memory.units import named

if TYPE_CHECKING:
    from ogpstream.learner.update import Updater


@dataclass
class Seen:
    """What the gradient of a lesson showed.

    Attributes:
        norm: of the gradient.
        refusal: why it does not count, or None.
        gradient: its slab in host RAM where the lesson counts as learned.
    """

    reading: Reading
    norm: float
    refusal: str | None
    learned: bool = False
    gradient: Tensor | None = None


class Course:
    """Found on copies: nothing of the expert changes.

    Args:
        lessons: of one update; that of a new sample is the first.

    Attributes:
        seen: what there was of each lesson.
        proposal: what the steps make of the expert; None where there was none.
        refusal: why nothing of the update may be committed, or None.
    """

    def __init__(self, updater: Updater, expert: Expert, lessons: Sequence[Lesson]) -> None:
        self._updater, self._expert, self._lessons = updater, expert, lessons
        self._copy = expert.copy()
        self._seen: dict[int, Seen] = {}
        self.proposal: Proposal | None = None
        self.refusal: str | None = None

    @property
    def seen(self) -> list[Seen]:
        return [self._seen[number] for number in range(len(self._lessons))]

    def run(self, plans: Iterator[ActivationPlan], layers: int | None) -> Generator[str, None, None]:
        """All steps.

        Args:
            plans: of each group of `Updater.groups`, in the order of `Updater.turns`.
            layers: how many of the top decoder layers are trained; None is all.

        Yields:
            The name of each unit that was done.
        """
        updater, version = self._updater, None
        sites = None if layers is None else updater.sites_of(layers)
        turns = updater.turns(self._lessons)
        for left, turn in zip(range(len(turns) - 1, -1, -1), turns, strict=True):
            gradients = yield from self._gradients(turn, plans, layers, version)
            # an old sample that cannot be used any more does not keep a new one from being learned
            new = [self._seen[number].refusal for number in turn if not self._lessons[number].again]
            if new and all(new):
                self.refusal = new[0]
                return
            if not gradients:
                continue
            step = yield from updater.proposer.run(self._copy, gradients, sites)
            if not step.finite:
                self.refusal = "the update is not finite"
                return
            for name, slab in step.slabs.items():
                setattr(self._copy, name, slab)
            self._copy.steps += 1
            self.proposal = step if self.proposal is None else self.proposal.followed_by(step)
            if left:
                del gradients, version
                version = yield from named("publish", updater.building({self._copy.name: self._copy}))
        refusals = [seen.refusal for seen in self.seen]
        if all(refusals):
            self.refusal = refusals[0]
        elif len(turns) > 1 and self.proposal is not None:
            yield from named("average", self._go_part_of_the_way(self.proposal))

    def _gradients(self, turn: Sequence[int], plans: Iterator[ActivationPlan], layers: int | None,
                   version: Served | None) -> Generator[str, None, list[Tensor]]:
        """Slabs of the lessons of a turn, by their numbers, that are not refused or settled; notes what it saw."""
        updater, expert = self._updater, self._expert
        config = updater.config
        found: list[tuple[Reading, Tensor]] = []
        for group in updater.groups([self._lessons[number] for number in turn]):
            sinks = [updater.staging.sink(expert) for _ in group]
            samples = [(lesson.ids, lesson.prompt_length) for lesson in group]
            known = yield from sample_gradients(updater.walk, updater.attachment.binding, sinks, samples,
                                                chunk=config.loss_chunk, activations=next(plans), layers=layers,
                                                alone=expert.name if updater.alone else None, version=version)
            found += zip(known, (sink.slab for sink in sinks), strict=True)
        norms = yield from named("norm", _norms([slab for _, slab in found]))
        results, moving = zip(found, norms, strict=True), []
        for number in turn:
            lesson = self._lessons[number]
            if lesson.refusal is not None:
                self._seen[number] = Seen(Reading(math.nan, 0.0), math.nan, lesson.refusal)
                continue
            (reading, slab), norm = next(results)
            seen = self._seen[number] = Seen(reading, norm, updater.judge.refusal(reading.loss, norm))
            if seen.refusal is None and reading.loss >= config.settled_below:
                moving.append(slab)
            seen.learned = updater.judge.learned(lesson.again, reading)
            if seen.learned:
                seen.gradient = updater.staging.gathered(expert.layout, slab)
        return moving

    def _go_part_of_the_way(self, proposal: Proposal) -> Generator[None, None, None]:
        rate, before, after = self._updater.config.turn_rate, self._expert.factors, proposal.slabs["factors"]
        factors = torch.empty_like(before)
        for own, start, end in zip(parts(factors), parts(before), parts(after), strict=True):
            torch.lerp(start, end, rate, out=own)
            yield
        proposal.slabs["factors"] = factors
        proposal.flats.pop("factors", None)


def _norms(gradients: Sequence[Tensor]) -> Generator[None, None, tuple[float, ...]]:
    """Of each slab, in pieces: 40M numbers of a large model are 10 ms on a core."""
    found = []
    for gradient in gradients:
        own = []
        for part in parts(gradient):
            own.append(part.norm())
            yield
        found.append(float(torch.stack(own).norm()) if len(own) > 1 else float(own[0]))
    return tuple(found)
