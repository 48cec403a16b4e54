"""One update: gradient, judgement, optimizer, projection, growth of P, and the swap of the served version.

Everything before the last step works on copies. A generator dropped before it ends has changed nothing; the last step
is assignments alone, and what is served changes by one of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.description import Describer
from ogpstream.learner.draft import Draft, Growth
from ogpstream.learner.judge import Judge
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.preflight import Preflight
from ogpstream.learner.proposal import Proposal, Proposer
from ogpstream.learner.protection import Protection
from ogpstream.learner.report import Update
from ogpstream.learner.sites import Attachment
from ogpstream.learner.staging import parts, staging_for
from ogpstream.learner.step import Reading, sample_gradients, sample_readings
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert
from ogpstream.memory.scope import Scope
from ogpstream.memory.served import Served
from ogpstream.memory.units import named

_log = logging.getLogger(__name__)


class NoRoom(Exception):
    """Memory ran out in every mode; with lessons of at most `tokens` ids there may be room."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"out of memory: try with at most {tokens} tokens")
        self.tokens = tokens


class Updater:
    """Makes updates of the experts in a store.

    Args:
        attachment: the model with its adapted linears.
        describer: of the prompts that the scope is to know; None leaves it as it is.

    Attributes:
        out_of_memory: times that the device had no memory left, since the start of this process.
    """

    def __init__(
        self, attachment: Attachment, store: AdapterStore, protection: Protection, config: LearnerConfig,
        describer: Describer | None = None,
    ) -> None:
        self.attachment = attachment
        self.describer = describer
        self.store = store
        self.protection = protection
        self.config = config
        shared = config.basis_scope == "shared"
        self.staging = protection.staging = staging_for(attachment.model.device, config.learning_state, shared=shared)
        self.proposer = Proposer(self.staging, protection, config)
        self.walk = LayerWalk(attachment.model)
        self.preflight = Preflight(self.walk, attachment.binding, store.sites, config)
        self.out_of_memory = 0
        # a prompt is answered by one expert, so each is updated and looked at without the others
        self.alone = config.routes
        self.judge = Judge(config, attachment.model.config.get_text_config().vocab_size)

    def run(self, name: str, lessons: Sequence[Lesson], layers: int | None = None) -> Generator[str, None, Update]:
        """One optimizer step of one expert on the sum of the lessons' gradients.

        A lesson whose loss is settled adds nothing to the sum; with none left there is no step. Every lesson that
        counts as learned offers its directions to P. Where the device has no memory left, all is dropped and done
        again with activations kept in a smaller way, which gives the same bits.

        Args:
            layers: how many of the top decoder layers are trained, at least 1; None is all. Of the linears below
                nothing changes: no master, no moment, and no direction joins the P of their inputs.

        Yields:
            The name of each unit that was done.

        Raises:
            NoRoom: there is no smaller way. Nothing has changed.
        """
        expert = self.store.expert(name)
        layers = None if layers is None or layers >= self.depth else layers
        while True:
            usable = [lesson for lesson in lessons if lesson.refusal is None]
            plans = [plan for _, _, plan in self.plans(usable, layers)]
            most = max(plans, key=_peak, default=None)
            try:
                trial = yield from self._try(expert, lessons, iter(plans), layers)
                break
            except torch.OutOfMemoryError:
                # without a gradient there is nothing to make smaller; and what was computed is held by the exception,
                # so room is made after this block
                if most is None:
                    raise
            assert most is not None
            self._make_room(usable, most, layers)
        losses = tuple(reading.loss for reading in trial.readings)
        if trial.draft is None:
            return Update(losses, trial.norms, tuple(False for _ in lessons), trial.refusal, activations=most)

        proposal, draft = trial.proposal, trial.draft
        on_device = self.store.on_device
        self._commit(draft, trial.served, trial.scope)
        if proposal is not None:
            self.staging.committed(expert, proposal.slabs, proposal.flats, on_device)
        growth = draft.growth
        return Update(losses, trial.norms, trial.learned, None,
                      growth.admitted, growth.replaced, growth.pruned, most)

    def look(self, lessons: Sequence[Lesson], expert: str) -> Generator[str, None, list[Reading]]:
        """How well the completions of lessons are known by what is served now; changes nothing.

        Args:
            expert: where one alone answers a prompt, it is this.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
        """
        found: list[Reading] = []
        for group in self.groups(lessons):
            samples = [(lesson.ids, lesson.prompt_length) for lesson in group]
            found += yield from sample_readings(self.walk, self.attachment.binding, samples,
                                                chunk=self.config.loss_chunk, alone=expert if self.alone else None)
        return found

    def _try(self, expert: Expert, lessons: Sequence[Lesson], plans: Iterator[ActivationPlan], layers: int | None
             ) -> Generator[str, None, _Trial]:
        """Everything of an update that changes nothing."""
        config, sites = self.config, None if layers is None else self.sites_of(layers)
        readings: list[Reading] = []
        gradients: list[Tensor] = []
        usable = [lesson for lesson in lessons if lesson.refusal is None]
        found: list[tuple[Reading, Tensor]] = []
        for group, plan in zip(self.groups(usable), plans, strict=True):
            sinks = [self.staging.sink(expert) for _ in group]
            samples = [(lesson.ids, lesson.prompt_length) for lesson in group]
            known = yield from sample_gradients(self.walk, self.attachment.binding, sinks, samples,
                                                chunk=config.loss_chunk, activations=plan, layers=layers,
                                                alone=expert.name if self.alone else None)
            found += zip(known, (sink.slab for sink in sinks), strict=True)
        results = iter(found)
        for lesson in lessons:
            refused = (Reading(math.nan, 0.0), torch.full((1,), math.nan))
            reading, gradient = next(results) if lesson.refusal is None else refused
            readings.append(reading)
            gradients.append(gradient)
        losses = [reading.loss for reading in readings]
        norms = yield from named("norm", _norms(gradients))
        refusals = [lesson.refusal or self.judge.refusal(loss, norm)
                    for lesson, loss, norm in zip(lessons, losses, norms, strict=True)]
        # an old sample that cannot be used any more does not keep a new one from being learned
        essential = [r for r, lesson in zip(refusals, lessons, strict=True) if not lesson.again] or refusals
        refusal = essential[0] if all(essential) else None
        moving = [g for g, loss, r in zip(gradients, losses, refusals, strict=True)
                  if r is None and loss >= config.settled_below]
        learned = tuple(refusal is None and self.judge.learned(lesson.again, reading)
                        for lesson, reading in zip(lessons, readings, strict=True))
        offered = [self.staging.gathered(expert.layout, gradient)
                   for gradient, counts in zip(gradients, learned, strict=True) if counts]
        proposal = None
        if refusal is None and moving:
            proposal = yield from self.proposer.run(expert, moving, sites)
            if not proposal.finite:
                refusal = "the update is not finite"
        draft = served = scope = None
        if refusal is None:
            draft = yield from self._draft(expert, proposal, offered)
            # what is computed with now: an expert that was activated or folded for this update is served with it,
            # though nothing else may come of it
            new = self.attachment.binding.current() is not self.store.served
            scope = self._scope(expert.name, lessons)
            opens = scope is not self.store.scope and self.attachment.binding.gate is not None
            if proposal is not None or draft.growth.admitted or new or opens:
                served = yield from self._built(draft, scope)
        return _Trial(readings, norms, learned, refusal, proposal, draft, served, scope)

    def _draft(self, expert: Expert, proposal: Proposal | None, offered: Sequence[Tensor]
               ) -> Generator[str, None, Draft]:
        """What becomes of experts and bases by a step and the learned samples' gradients."""
        draft, config = Draft(self.protection, self._folding(expert)), self.config
        used: Mapping[str, Tensor] = {}
        if proposal is not None:
            copy, used = draft.experts[expert.name], proposal.used
            for slab in ("factors", "exp_avg", "exp_avg_sq"):
                setattr(copy, slab, proposal.slabs.get(slab))
            copy.steps += 1
            if config.average and config.restart_after and self.protection.folds:
                yield from named("average", draft.follow(expert.name))
        yield from named("growth", draft.grow(expert.layout, offered, used))
        return draft

    def _scope(self, name: str, lessons: Sequence[Lesson]) -> Scope:
        """With the prompts of the lessons that an expert has not had before."""
        scope = self.store.scope
        if self.describer is not None:
            for lesson in lessons:
                if not lesson.again and lesson.refusal is None:
                    prompt = lesson.ids[: lesson.prompt_length] if lesson.asked is None else lesson.asked
                    scope = scope.learned(name, prompt, self.describer(prompt, [len(prompt)])[0])
        if self.alone:
            scope.warm_up()
        return scope

    def _built(self, draft: Draft, scope: Scope | None = None) -> Generator[str, None, Served]:
        """The version to serve when a draft is committed."""
        experts = {name: self.store.expert(name) for name in self.store.active} | draft.experts
        return (yield from named("publish", self.store.building(self.store.active, experts, scope=scope)))

    def _commit(self, draft: Draft, served: Served | None, scope: Scope | None = None) -> None:
        """No pause from here on, nothing to compute, and nothing that could fail for want of memory."""
        draft.commit()
        if served is not None:
            self.store.served = self.attachment.binding.served = served
        if scope is not None:
            self.store.scope = scope

    def sites_of(self, layers: int) -> frozenset[int]:
        """Numbers of the adapted linears that are trained with so many of the top decoder layers.

        All but those of the layers below alone: a layer that the model calls twice belongs to both places.
        """
        calls = self._layers
        above, below = ({id(module) for layer in part for module in layer.modules()}
                        for part in (calls[len(calls) - layers :], calls[: len(calls) - layers]))
        return frozenset(site.index for site in self.attachment.sites if id(site.module) not in below - above)

    @property
    def depth(self) -> int:
        """Decoder layers in the order of their calls."""
        return len(self._layers)

    @cached_property
    def _layers(self) -> list[nn.Module]:
        one = torch.zeros(1, 1, dtype=torch.long, device=self.attachment.model.device)
        return [call.layer for call in self.walk.plan(one).calls]

    def plans(self, lessons: Sequence[Lesson], layers: int | None
              ) -> Iterator[tuple[list[Lesson], int, ActivationPlan]]:
        """The lessons that share a forward, its tokens with the padding, and how its activations are kept."""
        for group in self.groups(lessons):
            # attention's square term is that of one long sample, which is more than that of several short ones
            tokens = len(group) * max(len(lesson.ids) for lesson in group)
            yield group, tokens, self.preflight.plan(tokens, max(lesson.rows for lesson in group), layers)

    def _make_room(self, lessons: Sequence[Lesson], most: ActivationPlan, layers: int | None) -> None:
        """After memory ran out: give all of it back, and go on with smaller plans than the largest one was."""
        self.ran_out()
        self.preflight.lower(most)
        longest = max(lessons, key=lambda lesson: len(lesson.ids))
        now = max((plan for _, _, plan in self.plans(lessons, layers)), key=_peak)
        smaller = now.peak_bytes < most.peak_bytes
        _log.warning("out of memory with %d tokens and activations kept by %r (%d bytes predicted): the update is done "
                     "again %s", len(longest.ids), str(most), most.peak_bytes,
                     f"by {str(now)!r}" if smaller else "with half of the prompt")
        if not smaller:
            # one id of context for each of the others, so that none is refused for the sake of the longest one
            least = max((lesson.rows + 1 for lesson in lessons if lesson is not longest), default=0)
            raise NoRoom(min(len(longest.ids) - 1, max(longest.rows + longest.prompt_length // 2, least)))

    def groups(self, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
        """The lessons in order, those together that may share a forward."""
        groups: list[list[Lesson]] = []
        for lesson in lessons:
            group = [*groups[-1], lesson] if groups and self.attachment.batches else [lesson]
            if len(group) > 1 and len(group) * max(len(one.ids) for one in group) <= self.config.shared_tokens:
                groups[-1] = group
            else:
                groups.append([lesson])
        return groups

    def publish(self) -> None:
        """Serve the masters as they are now: one assignment, seen by all linears at once."""
        self.attachment.binding.served = self.store.publish()

    def restart(self, name: str) -> Generator[str, None, Growth | None]:
        """Restart an active expert that made enough updates since its last start, and publish.

        Where the cut would cost too much it is put off, until there are as many updates more.

        Yields:
            "restart" and "publish", after each unit.

        Returns:
            What the bases took for it; None if the expert stays as it is.

        Raises:
            torch.OutOfMemoryError: nothing has changed.
        """
        config, expert = self.config, self.store.expert(name)
        # a held part of a lower rank could not take an imported adapter in whole
        fits = config.held_rank is None or expert.rank <= config.held_rank
        due = 0 < config.restart_after <= expert.steps - expert.started
        if not (self.protection.folds and fits and due) or expert.frozen:
            return None
        draft = Draft(self.protection, self._folding(expert))
        made = yield from named("restart", draft.restart(name))
        served = (yield from self._built(draft)) if made else None
        self._commit(draft, served)
        return draft.growth if made else None

    def put_off(self, name: str) -> None:
        """Restart an expert after as many updates more, and not now."""
        expert = self.store.expert(name)
        expert.started = expert.steps

    def ran_out(self) -> None:
        """The device had no memory left: what was computed goes back to it."""
        self.out_of_memory += 1
        if self.attachment.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _folding(self, trained: Expert) -> list[Expert]:
        """The experts that fold what joins P while one is trained; the others do before they are, all at once."""
        if self.alone:
            return [trained]
        active = [self.store.expert(name) for name in self.store.active]
        return [expert for expert in active if expert is trained or not expert.frozen]


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


def _peak(plan: ActivationPlan) -> int:
    return plan.peak_bytes


@dataclass(frozen=True)
class _Trial:
    """What an update found out before it changed anything.

    Attributes:
        readings, norms, learned: of each lesson.
        proposal: the step that they propose; None where all is settled.
        draft: what becomes of experts and bases; None where it is refused.
        served: the version that comes of it; None where none does.
        scope: with the new lessons' prompts; None where it is refused.
    """

    readings: Sequence[Reading]
    norms: tuple[float, ...]
    learned: tuple[bool, ...]
    refusal: str | None
    proposal: Proposal | None
    draft: Draft | None
    served: Served | None
    scope: Scope | None
