"""Old samples for updates: which ones come back, and what is noted of them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.report import Update
from ogpstream.learner.rounds import LOOK
from ogpstream.learner.state import LearnerState
from ogpstream.memory.replay import Slot, SlotFlag

# tokens that are looked at for one update of a rehearsal: as many as one sample may have
LOOKED = 1024

# samples in the ring for each that is looked at. Of a small ring the worst of 8 are the same hard ones again and again:
# with 32 slots backward transfer fell from 0 to -.10 (the demo's cross-validation), with 48 accuracy from .70 to .67
# (intents); and of 200 facts in 4096 slots .82 stayed for .62 (profiling/README.md)
EACH = 24


class Recall:
    """Draws samples from the ring of a state, and marks there what their updates showed."""

    def __init__(self, state: LearnerState, config: LearnerConfig) -> None:
        self.state = state
        self.config = config

    def companions(self, count: int, expert: str) -> list[Slot]:
        """Old samples for the update of a new one: the one that waits for its first rehearsal, and random ones."""
        if count == 0:
            return []
        if not self.config.second_look:
            return self.draw(count, expert=expert)
        waiting = [slot for slot in map(self.state.waiting.get, self.state.waiting.pending()) if slot.expert == expert]
        slots = waiting[:1]
        return slots + self.draw(count - len(slots), expert=expert, but=slots)

    def draw(self, count: int, *, expert: str | None = None, but: Sequence[Slot] = ()) -> list[Slot]:
        """So many random samples, or all there are, of one expert or of any that does not rest."""
        # numbered by what is committed, so that an aborted update draws the same samples again
        ring, number = self.state.ring, 2 * self.state.counters.updates + bool(but)
        exclude = [slot for slot in (ring.find(other.uid) for other in but) if slot is not None]
        # one that is named learns a new sample now, and is served by it
        but_experts = self.state.resting if expert is None else self.state.frozen
        drawn = ring.draw(count, counter=number, expert=expert, exclude=exclude, but=but_experts)
        return [ring.get(slot) for slot in drawn]

    def candidates(self, count: int) -> list[Slot]:
        """Random old samples of one expert, of which `count` are rehearsed: as many as are looked at before."""
        first, most = self.draw(1), min(self.config.rehearsal_candidates, len(self.state.ring) // EACH)
        if not first:
            return []
        drawn = first + self.draw(max(count, most) - 1, expert=first[0].expert, but=first)
        ends = accumulate(len(slot.ids) for slot in drawn)
        return [slot for number, (slot, end) in enumerate(zip(drawn, ends, strict=True))
                if number < count or end <= LOOKED]

    def part(self, place: int) -> list[Slot]:
        """Part number `place` of the ring, oldest first: `rounds.LOOK` samples, of served experts that learn."""
        ring, resting = self.state.ring, self.state.resting
        slots = map(ring.get, ring.slots[place * LOOK : (place + 1) * LOOK])
        return [slot for slot in slots if slot.expert not in resting]

    def note(self, slots: Sequence[Slot], update: Update, *, first: int) -> None:
        """Mark rehearsed samples with what their lessons, from number `first` on, showed."""
        ring, waiting = self.state.ring, self.state.waiting
        for at, sample in enumerate(slots, first):
            waits, slot = waiting.find(sample.uid), ring.find(sample.uid)
            if waits is not None:
                waiting.evict(waits)
            if slot is None:
                continue
            flags = SlotFlag.REHEARSED | (SlotFlag.LEARNED if update.learned[at] else SlotFlag(0))
            ring.mark(slot, flags)

    def note_newest(self, update: Update) -> None:
        """Mark the newest sample with what an update of it alone showed; once learned, it waits for no rehearsal."""
        if update.refusal is not None:
            return
        flags = SlotFlag.REHEARSED | SlotFlag.LEARNED if update.learned[0] else SlotFlag(0)
        for place in (self.state.ring, self.state.waiting):
            slot = place.find(self.state.counters.acknowledged)
            if slot is not None:
                place.mark(slot, flags)
                if flags and place is self.state.waiting:
                    place.evict(slot)
