"""Records of idle time: old samples come back, some at a time or round after round until all are known."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ogpstream.learner import amendments
from ogpstream.learner.folder import Record
from ogpstream.learner.look import Look
from ogpstream.learner.report import RehearsalReport, Update
from ogpstream.learner.router import Move
from ogpstream.learner.step import Reading
from ogpstream.memory.replay import Slot
from ogpstream.memory.units import writing

if TYPE_CHECKING:
    from ogpstream.learner.apply import Applier

_log = logging.getLogger(__name__)


class Rehearsals:
    """The records of an `Applier` that bring no new sample.

    Attributes:
        look: how well old samples are known.
    """

    def __init__(self, applier: Applier) -> None:
        self._applier, self._state, self._config = applier, applier.state, applier.config
        self.look = Look(applier.updater, applier.acknowledge)

    def consolidate(self, record: Record) -> Generator[str, None, RehearsalReport]:
        """So many updates on old samples, and the restarts that are due then."""
        applier, state = self._applier, self._state
        updates: list[Update] = []
        # owed where it was aborted after an update
        yield from applier.save()
        while state.position.done < record["updates"] and len(state.ring):
            if record["waiting_only"]:
                slots = state.unrehearsed()[:1] or applier.recall.draw(1)
            else:
                slots = yield from self._forgotten(record, self._config.rehearsal_batch)
            if not slots:
                break
            updates.append((yield from applier.rehearse(record, slots)))
            yield from applier.save()
        admitted = sum(update.admitted for update in updates)
        for name in state.store.active:
            admitted += yield from self._restart(record, name)
        state.counters.consolidations += 1
        losses = [loss for update in updates for loss in update.losses if math.isfinite(loss)]
        return RehearsalReport(state.position.done, state.store.served.version,
                               sum(losses) / len(losses) if losses else None, admitted)

    def refresh(self, record: Record) -> Generator[str, None, RehearsalReport]:
        """A look at a part of the ring, and one update on the worst of what is not known any more.

        No expert restarts: of 48 facts on a base of 5.5M parameters 45 came back in 150 updates, with restarts 18.
        """
        applier, state = self._applier, self._state
        # owed where it was aborted after its update
        yield from applier.save()
        store, before = state.store, state.store.served.version
        if state.position.done:
            return RehearsalReport(0, before)
        slots = applier.recall.part(record["place"])
        moves = yield from self._moves(slots, record)
        slots = [replace(slot, expert=moves[slot.uid].expert) if slot.uid in moves else slot for slot in slots]
        known = (yield from self.look.worst(slots, record, 0)) if slots else []
        forgotten = [slot for slot, reading in known if self._is_forgotten(reading)]
        worst = [slot for slot in forgotten if slot.expert == forgotten[0].expert][: self._config.rehearsal_batch]
        update = (yield from applier.rehearse(record, worst)) if worst else None
        # at once with its commit, as it was found out: after another abort the scope would be another. Where recovery
        # is to look at nothing it is to move nothing either
        if not amendments.is_blind(record, 0):
            applier.router.carry_out(moves)
        found, version = update is not None, store.served.version
        state.rounds = state.rounds.after(record["place"], before, version, found=found,
                                          blind=bool(slots) and not known)
        if found:
            yield from applier.save()
        elif state.rounds.next(len(state.ring), version) is None:
            # what clean looks found out is in no journal: a restart is not to make more of them than one round
            applier.owe()
        return RehearsalReport(int(found), version, admitted=update.admitted if update else 0, looked=len(known),
                               known=len(known) - len(forgotten))

    def _moves(self, slots: Sequence[Slot], record: Record) -> Generator[str, None, dict[int, Move]]:
        """Samples that another expert would answer; none where there is no memory to see it, nor a look then."""
        if amendments.is_blind(record, 0):
            return {}
        try:
            return self._applier.router.moves(slots)
        except torch.OutOfMemoryError:
            # what was computed is held by the exception, so room is made after this block
            pass
        yield from self.look.blind(record, 0, len(slots))
        return {}

    def _is_forgotten(self, reading: Reading) -> bool:
        """Whether an update of a sample that is known so would bring it back: it moves nothing where that is settled
        or refused."""
        judge = self._applier.updater.judge
        return (judge.refusal(reading.loss, 0.0) is None and reading.loss >= self._config.settled_below
                and not judge.learned(True, reading))

    def _restart(self, record: Record, name: str) -> Generator[str, None, int]:
        """Restart an expert if it is due; where there is no memory for it, it is put off. Returns how much P grew."""
        applier, updater = self._applier, self._applier.updater
        if not amendments.is_put_off(record, name):
            try:
                growth = yield from updater.restart(name)
                return 0 if growth is None else growth.admitted
            except torch.OutOfMemoryError:
                # what was computed is held by the exception, so room is made after this block
                pass
            updater.ran_out()
            _log.warning("out of memory in the restart of the expert %r: it is put off for %d updates", name,
                         self._config.restart_after)
            yield from writing(partial(applier.acknowledge, [{"kind": "put off", "of": record["seq"], "expert": name}]))
        updater.put_off(name)
        return 0

    def _forgotten(self, record: Record, count: int) -> Generator[str, None, list[Slot]]:
        """Of random old samples of one expert those that are known least now."""
        drawn = self._applier.recall.candidates(count)
        if len(drawn) > count:
            known = yield from self.look.worst(drawn, record, self._state.position.done)
            # in the order that they were drawn where nothing was seen of them
            drawn = [slot for slot, _ in known] or drawn
        return drawn[:count]
