"""One update: gradient, judgement, optimizer, projection, growth of P, and the swap of the served version.

Everything before the last step works on copies. A generator dropped before it ends has changed nothing, and what is
served changes by one assignment.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.protection import Growth, Protection
from ogpstream.learner.report import Update
from ogpstream.learner.sites import Attachment, GradientSink
from ogpstream.learner.step import sample_gradient
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore, Expert


@dataclass(frozen=True)
class Lesson:
    """Token ids to learn from; `again` says that they had an update before, so that they can count as learned."""

    ids: Sequence[int]
    prompt_length: int
    again: bool


class Updater:
    """Makes updates of the experts in a store.

    Args:
        attachment: the model with its adapted linears.
    """

    def __init__(
        self, attachment: Attachment, store: AdapterStore, protection: Protection, config: LearnerConfig
    ) -> None:
        self.attachment = attachment
        self.store = store
        self.protection = protection
        self.config = config
        self.walk = LayerWalk(attachment.model)
        self._vocabulary = attachment.model.config.get_text_config().vocab_size

    def run(self, name: str, lessons: Sequence[Lesson]) -> Generator[str, None, Update]:
        """One optimizer step of one expert on the mean gradient of the lessons.

        Yields:
            The name of each unit that was done.
        """
        expert = self.store.expert(name)
        losses: list[float] = []
        gradients: list[Tensor] = []
        for lesson in lessons:
            sink = GradientSink(expert.layout, name, dtype=expert.factors.dtype, device=self.attachment.model.device)
            losses.append((yield from sample_gradient(
                self.walk, self.attachment.binding, sink, lesson.ids, lesson.prompt_length,
                chunk=self.config.loss_chunk,
            )))
            gradients.append(sink.slab.to(expert.factors.device))
        norms = [float(gradient.norm()) for gradient in gradients]
        learned = [self._is_learned(lesson, loss) for lesson, loss in zip(lessons, losses, strict=True)]
        refusal = self._refusal(losses, norms)
        if refusal is not None:
            return Update(tuple(losses), tuple(norms), tuple(False for _ in lessons), refusal)

        proposal = self._optimise(expert, torch.stack(gradients).mean(0) if len(gradients) > 1 else gradients[0])
        yield "optimizer"
        if self.protection.folds:
            self.protection.project_(expert.layout, proposal.factors, record_use=True)
        yield "projection"
        if not bool(proposal.factors.isfinite().all()):
            return Update(tuple(losses), tuple(norms), tuple(False for _ in lessons), "the update is not finite")

        expert.factors, expert.steps = proposal.factors, expert.steps + 1
        expert.exp_avg, expert.exp_avg_sq = proposal.exp_avg, proposal.exp_avg_sq
        growth = Growth()
        for gradient, counts in zip(gradients, learned, strict=True):
            if counts:
                growth += self.protection.grow(expert.layout, gradient, self._active())
        self.publish()
        return Update(tuple(losses), tuple(norms), tuple(learned), None,
                      growth.admitted, growth.replaced, growth.pruned)

    def publish(self) -> None:
        """Serve the masters as they are now: one assignment, seen by all linears at once."""
        self.attachment.binding.served = self.store.publish()

    def _active(self) -> list[Expert]:
        return [self.store.expert(name) for name in self.store.active]

    def _is_learned(self, lesson: Lesson, loss: float) -> bool:
        # the specification's form asks no second look; ours judges a loss that an update could have lowered
        return loss < self.config.learned_below and (lesson.again or self.config.guard == "gradient")

    def _refusal(self, losses: Sequence[float], norms: Sequence[float]) -> str | None:
        # a first loss of 13 to 26 x the running mean is normal where a new domain begins, so only the absurd is
        # refused: twice the loss of guessing among all tokens
        limit = 2.0 * math.log(self._vocabulary)
        for loss, norm in zip(losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return "the loss or its gradient is not finite"
            if loss > limit:
                return f"the loss is {loss:.2f} nats per token, over the limit of {limit:.2f}"
        return None

    def _optimise(self, expert: Expert, gradient: Tensor) -> _Proposal:
        config, a = self.config, expert.layout.a_numel
        lr = config.learning_rate(expert.steps)
        if config.guard == "gradient":
            gradient = gradient.clone()
            self.protection.project_(expert.layout, gradient, record_use=True)
        factors = expert.factors.clone()
        parts = (slice(0, a), slice(a, None))
        if config.optimizer == "sgd":
            for part in parts:
                dispatch.sgd_(factors[part], gradient[part], lr=lr, weight_decay=config.weight_decay)
            return _Proposal(factors, None, None)
        exp_avg = torch.zeros_like(factors) if expert.exp_avg is None else expert.exp_avg.clone()
        exp_avg_sq = torch.zeros_like(factors) if expert.exp_avg_sq is None else expert.exp_avg_sq.clone()
        for part in parts:
            dispatch.adam_(factors[part], gradient[part], exp_avg[part], exp_avg_sq[part], step=expert.steps + 1,
                           lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
        return _Proposal(factors, exp_avg, exp_avg_sq)


@dataclass(frozen=True)
class _Proposal:
    """Masters and moments after the optimizer, not yet the expert's."""

    factors: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
