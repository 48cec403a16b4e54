"""Going round the ring for what was forgotten: which samples are looked at next, and when there is no need to.

A round looks at all samples, some at a time, and an update goes to the worst of those that are not known any more. It
is over when a whole round has found none. What cannot be learned beside the rest would be rehearsed for ever, and the
rest drift with it, so after some rounds without a new sample nothing is looked at either.
"""

from __future__ import annotations

from dataclasses import dataclass

# samples of one look: 200 tokens of questions and answers share a forward
LOOK = 8
# since the last new sample: of 48 facts that had nothing in common 45 were back after 25, on a base of 5.5M parameters
ROUNDS = 100


@dataclass(frozen=True)
class Rounds:
    """How far a learner has come: a part of its state, so that a run that was killed goes on as it would have.

    Attributes:
        place: number of the part of the ring that was looked at last.
        clean: looks since one found something forgotten, or anything else was learned.
        looks: since the last new sample.
        acknowledged, updates: samples and updates of the learner by then.
    """

    place: int = -1
    clean: int = 0
    looks: int = 0
    acknowledged: int = 0
    updates: int = 0

    def next(self, ring: int, acknowledged: int, updates: int) -> int | None:
        """Number of the next `LOOK` samples of a ring that holds so many, oldest first; None where a round is over."""
        total, now = -(-ring // LOOK), self._now(acknowledged, updates)
        if now.clean >= total or now.looks >= ROUNDS * total:
            return None
        return (self.place + 1) % total

    def after(self, place: int, found: bool, acknowledged: int, updates: int) -> Rounds:
        """With one more look, which found something and made an update of the `updates`, or did not."""
        before = self._now(acknowledged, updates - found)
        return Rounds(place, 0 if found else before.clean + 1, before.looks + 1, acknowledged, updates)

    def _now(self, acknowledged: int, updates: int) -> Rounds:
        new, same = acknowledged != self.acknowledged, (acknowledged, updates) == (self.acknowledged, self.updates)
        return Rounds(self.place, self.clean if same else 0, 0 if new else self.looks)
