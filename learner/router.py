"""Which expert learns a sample that names none: the one that would answer its prompt, or a new one after a drift.

Losses tell a drift (`routes.py`): with a domain well known new samples of it have 0.3 to 0.5 nats per token before
their update, the first ones of another domain 3 to 6.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.folder import Record
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.operations import Operations
from ogpstream.learner.routes import FITS, WELL
from ogpstream.learner.samples import DEFAULT_EXPERT
from ogpstream.learner.state import LearnerState
from ogpstream.learner.update import Updater
from ogpstream.memory.replay import ReplayRing, Slot
from ogpstream.memory.units import named

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Move:
    """A sample to another expert.

    Attributes:
        expert: who has it then.
        prompt, described: ids of its prompt, and their description `[width]`.
    """

    expert: str
    prompt: list[int]
    described: Tensor


class Router:
    """Chooses experts, and makes new ones.

    Args:
        operations: make a new expert.
    """

    def __init__(self, state: LearnerState, updater: Updater, operations: Operations, config: LearnerConfig) -> None:
        self._state, self._updater, self._operations, self._config = state, updater, operations, config

    def choose(self, record: Record) -> Generator[str, None, tuple[str, bool]]:
        """The expert for a record's sample; a name that is not known yet is that of one to be made.

        One that has learned this prompt, which is corrected then; a frozen one that answers it. After a drift a new
        one, where a place is free. Else the one that learned the newest sample, since nobody knows yet which of them
        the prompts of a new domain will be likest to; but the one that would answer the prompt, where it knows what
        there is to learn, and better than that one: looks tell.

        Returns:
            Its name, and whether that follows from the state and the record alone: memory that runs out does not.
        """
        owner = self.owner(record)
        if owner is not None:
            return owner, True
        routes, store, routed = self._state.routes, self._state.store, self._routed
        learning = [name for name in routed if not store.expert(name).frozen]
        current = routes.newest if routes.newest in learning else (learning or routed or [DEFAULT_EXPERT])[-1]
        try:
            # one alone is asked for nothing but whether it is frozen
            likeliest = None if len(routed) == len(learning) == 1 else self._likeliest(_prompt(record), routed)
            if likeliest is not None and store.expert(likeliest).frozen:
                return likeliest, True
            if not learning and DEFAULT_EXPERT not in routed and not store.expert(DEFAULT_EXPERT).frozen:
                # away, but for adapters from elsewhere
                return DEFAULT_EXPERT, True
            if (routes.drifted or not learning) and len(store.active) < self._config.experts:
                return self._new_name(), True
            if likeliest is None or likeliest == current:
                return current, True
            lesson = [Lesson(record["ids"], record["prompt_length"], again=False)]
            (known,) = yield from self._updater.look(lesson, likeliest)
            # while one is young, what is like the others on the outside is most likely its own
            if not routes.fits(likeliest, known.loss, WELL if routes.is_young(current) else FITS):
                return current, True
            (other,) = yield from self._updater.look(lesson, current)
            return (likeliest if known.loss < other.loss else current), True
        except torch.OutOfMemoryError:
            # what was computed is held by the exception, so room is made after this block
            pass
        self._updater.ran_out()
        return current, False

    @property
    def _routed(self) -> list[str]:
        """The served experts that answer prompts of their own."""
        store = self._state.store
        return [name for name in store.active if name not in store.scope.everywhere]

    def _likeliest(self, prompt: Sequence[int], experts: Sequence[str]) -> str | None:
        """Which of the experts would answer a prompt."""
        describer = self._updater.describer
        assert describer is not None
        return next(iter(self._state.store.scope.answering(prompt, experts, describer, nearest=True)), None)

    def moves(self, slots: Sequence[Slot]) -> dict[int, Move]:
        """Of old samples, by number, those whose prompts another expert would answer: what is known is what is served.

        A sample that was learned while a drift was not noticed yet may be another's. Changes nothing.

        Raises:
            torch.OutOfMemoryError: there is no room for the descriptions of prompts.
        """
        store, routed = self._state.store, self._routed
        if not self._config.routes or len(routed) < 2:
            return {}
        found = {}
        for slot in slots:
            likeliest = self._likeliest(slot.ids[: slot.prompt_length].tolist(), routed)
            if likeliest is not None and likeliest != slot.expert and not store.expert(likeliest).frozen:
                found[slot.uid] = Move(likeliest, *self._described([slot.uid])[slot.uid])
        return found

    def carry_out(self, moves: Mapping[int, Move]) -> None:
        """Samples become those of other experts, in a version of their own: who answers a prompt may be another now."""
        if not moves:
            return
        store, binding = self._state.store, self._updater.attachment.binding
        for number, move in moves.items():
            self._hand_over(number, move)
        store.served = binding.served = replace(store.served, version=store.served.version + 1, scope=store.scope)

    def owner(self, record: Record) -> str | None:
        """The served expert that has a sample at hand with the prompt of a record's, of the newest such sample."""
        state, prompt = self._state, record["ids"][: record["prompt_length"]]
        asked = [place.get(slot) for place in (state.ring, state.waiting) for slot in place.asking(prompt)]
        served = [slot for slot in asked if slot.expert in state.store.active]
        return max(served, key=lambda slot: slot.uid).expert if served else None

    def make(self, name: str) -> Generator[str, None, None]:
        """Make the expert if there is none of this name; the samples that raised the drift are its own from now on.

        Raises:
            torch.OutOfMemoryError: there is no room for a version with it; there is none.
        """
        state, store, binding = self._state, self._state.store, self._updater.attachment.binding
        if name in store.names:
            return
        try:
            # what may fail for want of memory comes before anything is changed
            moving = self._described([number for number in state.routes.since if self._holds(number)])
            self._operations.adopt(name, self._config.rank, self._config.scaling)
            active = {**store.active, name: 1.0}
            building = store.building(active, {own: store.expert(own) for own in active})
            served = yield from named("publish", building)
        except BaseException:
            if name in store.names:
                store.remove(name)
            raise
        store.activate(name)
        for number, description in moving.items():
            self._hand_over(number, Move(name, *description))
        # the scope that it is looked up in is of the version
        store.served = binding.served = replace(served, scope=store.scope)
        why = "what is learned has changed" if state.routes.drifted else "all others are frozen"
        state.routes = state.routes.begun(name)
        _log.warning("%s: the expert %r begins", why, name)

    def _holds(self, number: int) -> bool:
        """Whether a sample of an expert that learns is at hand."""
        state = self._state
        held = [place.get(slot) for place in self._places if (slot := place.find(number)) is not None]
        return any(slot.expert not in state.frozen for slot in held)

    @property
    def _places(self) -> tuple[ReplayRing, ReplayRing]:
        return self._state.ring, self._state.waiting

    def _described(self, numbers: Sequence[int]) -> dict[int, tuple[list[int], Tensor]]:
        """Prompts of samples at hand, with their descriptions."""
        describer, found = self._updater.describer, {}
        assert describer is not None
        for number in numbers:
            held = next(place.get(slot) for place in self._places if (slot := place.find(number)) is not None)
            prompt = held.ids[: held.prompt_length].tolist()
            found[number] = prompt, describer(prompt, [len(prompt)])[0]
        return found

    def _hand_over(self, number: int, move: Move) -> None:
        """A sample that is at hand becomes one of another expert, which answers its prompt."""
        store, before = self._state.store, move.expert
        for place in self._places:
            if (slot := place.find(number)) is not None:
                before = place.get(slot).expert
                place.hand_over(slot, move.expert)
        store.scope = store.scope.handed_over(move.prompt, move.described, before, move.expert)

    def _new_name(self) -> str:
        names, number = self._state.store.names, 2
        while f"{DEFAULT_EXPERT}-{number}" in names:
            number += 1
        return f"{DEFAULT_EXPERT}-{number}"


def _prompt(record: Record) -> Sequence[int]:
    """Ids of a record's prompt before any cut."""
    asked: Sequence[int] | None = record.get("asked")
    return record["ids"][: record["prompt_length"]] if asked is None else asked
