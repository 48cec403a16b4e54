"""Records applied in order: with `operations` the one place where the state of a learner changes.

A record is a JSON object with `kind` and `seq`. Applying it is a function of the state and the record alone, so
repeating the journal repeats the history. A record of several updates counts those that are done in `position`, and
goes on after them when it is applied again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ogpstream.learner import amendments
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import StateError
from ogpstream.learner.folder import MemoryFolder, Record, StateFolder
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.operations import Operations
from ogpstream.learner.pacer import Pacer
from ogpstream.learner.recall import Recall
from ogpstream.learner.rehearsals import Rehearsals
from ogpstream.learner.report import RehearsalReport, SampleReport, Update
from ogpstream.learner.router import Router
from ogpstream.learner.samples import DEFAULT_EXPERT
from ogpstream.learner.state import LearnerState, Position
from ogpstream.learner.trial import activating
from ogpstream.learner.update import NoRoom, Updater
from ogpstream.memory.replay import ReplayRing, Slot
from ogpstream.memory.units import writing

Report = SampleReport | RehearsalReport | None

_log = logging.getLogger(__name__)


class Applier:
    """Applies records to a state.

    Args:
        own: what identifies this learner in a snapshot: its config, the base model's fingerprint, the environment.
        acknowledge: writes records into the journal and queues them; amendments are entered into the record that they
            are of, which may be the one that is being applied.

    Attributes:
        pacer: the time budget of the updates.
        recall: which old samples come back.
        router: which expert learns a sample that names none.
        operations: records without an update.
    """

    def __init__(
        self,
        state: LearnerState,
        updater: Updater,
        config: LearnerConfig,
        folder: StateFolder | MemoryFolder,
        own: dict[str, Any],
        acknowledge: Callable[[Sequence[Record]], object],
    ) -> None:
        self.state = state
        self.updater = updater
        self.config = config
        self.folder = folder
        self.own = own
        self.acknowledge = acknowledge
        self.pacer = Pacer(updater)
        self.recall = Recall(state, config)
        self.operations = Operations(state, updater, config)
        self.router = Router(state, updater, self.operations, config)
        self._rehearsals = Rehearsals(self)
        # number of a record of a sample, and its updates so far
        self._made: tuple[int, list[Update]] = (0, [])
        self._owed = False  # a snapshot

    def apply(self, record: Record) -> Generator[str, None, Report]:
        """Apply one record; yields after every unit. Dropped half-way, the rest is done when it is applied again."""
        report: Report
        match record["kind"]:
            case "sample":
                report = yield from self._sample(record)
            case "rehearse":
                report = yield from self._rehearsals.consolidate(record)
            case "refresh":
                report = yield from self._rehearsals.refresh(record)
            case _:
                report = self.operations.run(record, self.folder)
        self.state.position = Position(record["seq"], 0)
        return report

    # records of updates

    def _sample(self, record: Record) -> Generator[str, None, SampleReport]:
        started = time.perf_counter()
        counters, ring = self.state.counters, self.state.ring
        reason = None
        # of the same record, where it was aborted between two of its updates
        updates = self._made[1] if self._made[0] == record["seq"] and self.state.position.done else []
        self._made = record["seq"], updates
        loss = updates[0].losses[0] if updates else None
        new = Lesson(record["ids"], record["prompt_length"], again=False, asked=record.get("asked"))
        if self.state.position.done == 0:
            expert = yield from self._route(record)
            if self.state.store.expert(expert).frozen:
                reason = f"the expert {expert!r}, which answers such prompts, is frozen: unfreeze it"
                yield from writing(partial(self.folder.quarantine, {**record, "reason": reason}))
                counters.acknowledged += 1
                counters.rejected += 1
                return self._report(record, new, "rejected", started, None, updates, reason)
            contradicted = self._contradicted(record)
            # what this sample corrects is not learned beside it
            slots = [slot for slot in self.recall.companions(record["rehearsals"], expert)
                     if slot.uid not in contradicted]
            update = yield from self.update(record, expert, [new, *map(Lesson.of, slots)])
            updates.append(update)
            new = amendments.limited(new, record, 0, self._bos)
            trained = amendments.paced(new, record, 0, self._bos)
            loss, reason = None if new.refusal else update.losses[0], update.refusal
            if reason is not None:
                yield from writing(partial(self.folder.quarantine, {**record, "reason": reason}))
                counters.acknowledged += 1
                counters.gradients += 1 + len(slots)
                counters.rejected += 1
                if record["id"] is not None:
                    # not by its id, which the mended sample may have too
                    self.state.refused.add(record["digest"])
                return self._report(record, trained, "rejected", started, loss, updates, reason)
            counters.acknowledged += 1
            counters.learned += 1
            if record["id"] is not None:
                self.state.seen.add(record["id"])
            self.recall.note(slots, update, first=1)
            # a correction of what is known tells nothing of what comes
            if self._is_routed(record) and loss is not None and self.router.owner(record) is None:
                self.state.routes = self.state.routes.saw(expert, loss, counters.acknowledged)
            # not the journal's number: a copy of the state starts its journal anew
            for place in self._rings:
                for older in contradicted:
                    if (held := place.find(older)) is not None:
                        place.evict(held)
                place.add(new.ids, new.prompt_length, expert=expert, uid=counters.acknowledged)
            self.commit(gradients=1 + len(slots))
        yield from self.save()
        yield from self._repeat(record, updates)
        count, sticks = len(updates), updates[-1].learned[0] if len(updates) > 1 else None
        # rehearsal in the same update takes the place of the replayed sample after every 16th
        every = 0 if record["rehearsals"] else self.config.replay_every
        if every and counters.learned % every == 0 and self.state.position.done == 1 + _repeats(record):
            newest = ring.find(counters.acknowledged)
            new_one = [] if newest is None else [ring.get(newest)]
            if old := self.recall.draw(1, but=new_one):
                updates.append((yield from self.rehearse(record, old)))
                yield from self.save()
        trained = amendments.paced(new, record, 0, self._bos)
        report = self._report(record, trained, "learned", started, loss, updates, None)
        return replace(report, updates=count, sticks=sticks)

    @property
    def _rings(self) -> tuple[ReplayRing, ReplayRing]:
        return self.state.ring, self.state.waiting

    def _route(self, record: Record) -> Generator[str, None, str]:
        """Who learns a record's sample: whom it names, or whom the router chooses.

        That is journaled first, but where it is who learned the newest sample, as mostly: recovery finds that out.
        """
        if self._is_routed(record):
            if "route" not in record:
                name, follows = yield from self.router.choose(record)
                if follows and name == self.state.routes.newest:
                    record["route"] = name
                else:
                    yield from self._routed(record, name)
            try:
                yield from self.router.make(self._expert(record))
                return self._expert(record)
            except torch.OutOfMemoryError:
                # what was computed is held by the exception, so room is made after this block
                pass
            self.updater.ran_out()
            _log.warning("out of memory for a new expert: %r goes on", self.state.routes.newest)
            yield from self._routed(record, self.state.routes.newest)
        return self._expert(record)

    def _expert(self, record: Record) -> str:
        """Who learns a record's sample, or has learned it."""
        if self._is_routed(record) and "route" not in record:
            # it was begun before a restart, and no choice was journaled
            return self.state.routes.newest
        name: str = record["route"] if "route" in record else record["expert"]
        return name

    def _is_routed(self, record: Record) -> bool:
        return self.config.routes and record["expert"] == DEFAULT_EXPERT

    def _routed(self, record: Record, expert: str) -> Generator[str, None, None]:
        yield from writing(partial(self.acknowledge, [{"kind": "route", "of": record["seq"], "expert": expert}]))

    def _contradicted(self, record: Record) -> list[int]:
        """Numbers of the samples with the prompt of a record's sample and another answer, of who may answer it."""
        ids, length = record["ids"], record["prompt_length"]
        named = () if self._is_routed(record) else (record["expert"],)
        # one alone answers a prompt where they are routed, and not always the one that a sample names
        experts = {*named, *(self.state.store.active if self.config.routes else ())}
        return sorted({place.get(slot).uid for place in self._rings for expert in experts
                       for slot in place.contradicting(ids, length, expert=expert)})

    def _repeat(self, record: Record, updates: list[Update]) -> Generator[str, None, None]:
        """Update a new sample again until it counts as learned, at most `repeats` times."""
        repeats = _repeats(record)
        new = Lesson(record["ids"], record["prompt_length"], again=True)
        while 0 < self.state.position.done <= repeats:
            update = yield from self.update(record, self._expert(record), [new])
            updates.append(update)
            self.recall.note_newest(update)
            # what comes after the last one has its number, whether or not all of them were made
            over = update.learned[0] or update.refusal is not None
            self.commit(gradients=1, done=1 + repeats if over else None)
            yield from self.save()

    def _report(self, record: Record, new: Lesson, status: Any, started: float, loss: float | None,
                updates: list[Update], reason: str | None) -> SampleReport:
        plans = [u.activations for u in updates if u.activations is not None]
        return SampleReport(
            record["id"], status, self.state.store.served.version, loss, len(new.ids),
            record["cut"] + len(record["ids"]) - len(new.ids), (time.perf_counter() - started) * 1e3,
            sum(u.admitted for u in updates), sum(u.replaced for u in updates), reason,
            max(plans, key=lambda plan: plan.peak_bytes, default=None),
            pace=updates[0].pace if updates else None,
        )

    # what they are made of

    def rehearse(self, record: Record, slots: Sequence[Slot]) -> Generator[str, None, Update]:
        """One update on old samples of one expert; a snapshot may be owed then."""
        update = yield from self.update(record, slots[0].expert, list(map(Lesson.of, slots)))
        self.recall.note(slots, update, first=0)
        self.commit(gradients=len(slots))
        return update

    def update(self, record: Record, expert: str, lessons: Sequence[Lesson]) -> Generator[str, None, Update]:
        """One update within the time budget; where memory runs out in every mode, another with less of the prompts."""
        done = self.state.position.done
        limited = [amendments.limited(one, record, done, self._bos) for one in lessons]
        if amendments.pace(record, done) is None:
            choice = yield from self.pacer.choose(limited, self._bos)
            if choice is not None:
                # one that leaves out nothing needs no record, since none is left out where there is no budget
                about = {"kind": "pace", "of": record["seq"], "done": done, **choice._asdict()}
                yield from writing(partial(self.acknowledge, [about]))
        while True:
            choice = amendments.pace(record, done)
            layers = None if choice is None else choice.layers
            trained = [amendments.paced(one, record, done, self._bos) for one in lessons]
            try:
                work = activating(self.updater, expert, self.updater.run(expert, trained, layers))
                update, pace = yield from self.pacer.timed(work, trained, choice)
                return replace(update, pace=pace)
            except NoRoom as error:
                tokens = error.tokens
            about = {"kind": "shorten", "of": record["seq"], "done": done, "tokens": tokens}
            yield from writing(partial(self.acknowledge, [about]))

    @property
    def _bos(self) -> int | None:
        bos: int | None = self.updater.attachment.model.config.get_text_config().bos_token_id
        return bos

    def commit(self, *, gradients: int, done: int | None = None) -> None:
        """One update of the current record is in the state; after every so many a snapshot is owed.

        Args:
            done: updates of the record that need not be made again; by default one more than before.
        """
        counters = self.state.counters
        self.state.position.done = self.state.position.done + 1 if done is None else done
        counters.updates += 1
        counters.gradients += gradients
        self._owed |= counters.updates % self.config.snapshot_every == 0

    def save(self) -> Generator[str, None, None]:
        """The snapshot that is owed, in a unit of its own; aborted before, it is owed still."""
        if self._owed:
            yield from writing(self.checkpoint)

    def owe(self) -> None:
        """A snapshot, which the next `save` makes."""
        self._owed = True

    # snapshots

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = self.state.capture()
        return tensors, {**meta, **self.own}

    def checkpoint(self) -> None:
        # where it fails the journal has it all, and the next one is tried in its turn
        self._owed = False
        self.folder.save(self.state.store.served.version, *self.capture())

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over a snapshot and serve it.

        Raises:
            StateError: it belongs to another base model.
        """
        if meta["base"] != self.own["base"]:
            raise StateError(f"the state belongs to another base model ({meta['model']['name'] or 'without a name'}): "
                             "give that one, or choose another state folder")
        if meta["environment"] != self.own["environment"]:
            _log.warning("the state was written with %s, this is %s: going on, but not bit for bit",
                         meta["environment"], self.own["environment"])
        self.state.restore(tensors, meta)
        self.updater.attachment.binding.served = self.state.store.served


def _repeats(record: Record) -> int:
    # records of earlier releases have none
    repeats: int = record.get("repeats", 0)
    return repeats
