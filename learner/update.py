"""One update: gradient, judgement, optimizer, projection, growth of P, and the swap of the served version.

Everything before the last step works on copies. A generator dropped before it ends has changed nothing; the last step
is assignments alone, and what is served changes by one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.course import Course
from ogpstream.learner.description import Describer
from ogpstream.learner.draft import Draft, Growth
from ogpstream.learner.judge import Judge
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.preflight import Preflight
from ogpstream.learner.proposal import Proposal, Proposer
from ogpstream.learner.protection import Protection
from ogpstream.learner.report import Update
from ogpstream.learner.sites import Attachment
from ogpstream.learner.staging import staging_for
from ogpstream.learner.step import Reading, sample_readings
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore, Served
from ogpstream.memory.experts import Expert
from ogpstream.memory.scope import Scope
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
        self.alone = config.routing == "prompt"
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
            plans = [plan for _, _, plan in self.plans(lessons, layers)]
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
        course = trial.course
        losses, norms = (tuple(column) for column in zip(*((one.reading.loss, one.norm) for one in course.seen),
                                                         strict=True))
        if trial.draft is None:
            return Update(losses, norms, tuple(False for _ in lessons), course.refusal, activations=most)

        proposal, draft = course.proposal, trial.draft
        self._commit(draft, trial.served, trial.scope)
        if proposal is not None:
            self.staging.committed(expert, proposal.slabs, proposal.flats, self.store.active)
        growth = draft.growth
        return Update(losses, norms, tuple(one.learned for one in course.seen), None,
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
        course = Course(self, expert, lessons)
        yield from course.run(plans, layers)
        draft = served = scope = None
        if course.refusal is None:
            offered = [seen.gradient for seen in course.seen if seen.gradient is not None]
            draft = yield from self._draft(expert, course.proposal, offered)
            # an expert that is not served yet is with its first update, though nothing else may come of this one
            new = tuple(self.store.active) != self.store.served.experts
            scope = self._scope(expert.name, lessons)
            opens = scope is not self.store.scope and self.attachment.binding.gate is not None
            if course.proposal is not None or draft.growth.admitted or new or opens:
                served = yield from named("publish", self.building(draft.experts, scope))
        return _Trial(course, draft, served, scope)

    def _draft(self, expert: Expert, proposal: Proposal | None, offered: Sequence[Tensor]
               ) -> Generator[str, None, Draft]:
        """What becomes of experts and bases by a step and the learned samples' gradients."""
        draft, config = Draft(self.protection, self._folding(expert)), self.config
        used: Mapping[str, Tensor] = {}
        if proposal is not None:
            copy, used = draft.experts[expert.name], proposal.used
            for slab in ("factors", "exp_avg", "exp_avg_sq"):
                setattr(copy, slab, proposal.slabs.get(slab))
            copy.steps += proposal.steps
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
        return scope

    def building(self, experts: Mapping[str, Expert], scope: Scope | None = None) -> Generator[None, None, Served]:
        """The version to serve once some experts are as these."""
        active = self.store.active
        served = {name: self.store.expert(name) for name in active}
        return self.store.building(active, {**served, **experts}, scope=scope)

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
        for turn in self.turns(lessons):
            for group in self.groups([lessons[number] for number in turn]):
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

    def turns(self, lessons: Sequence[Lesson]) -> list[list[int]]:
        """Numbers of the lessons of each step: all in one, or each in one, that of a new sample, the first, last."""
        numbers = list(range(len(lessons)))
        if self.config.turn_rate and len(lessons) > 1:
            return [[number] for number in [*numbers[1:], 0]]
        return [numbers]

    def groups(self, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
        """The lessons in order that are not refused, those together that may share a forward."""
        groups: list[list[Lesson]] = []
        for lesson in lessons:
            if lesson.refusal is not None:
                continue
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
        served = (yield from named("publish", self.building(draft.experts))) if made else None
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


def _peak(plan: ActivationPlan) -> int:
    return plan.peak_bytes


@dataclass(frozen=True)
class _Trial:
    """What an update found out before it changed anything.

    Attributes:
        course: its steps.
        draft: what becomes of experts and bases; None where it is refused.
        served: the version that comes of it; None where none does.
        scope: with the new lessons' prompts; None where it is refused.
    """

    course: Course
    draft: Draft | None
    served: Served | None
    scope: Scope | None
