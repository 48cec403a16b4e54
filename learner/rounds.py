"""Going round the ring for what was forgotten: which samples are looked at next, and when there is no need to.

A round looks at all samples, some at a time, and an update goes to the worst of those that are not known any more. It
is over when a whole round has found none. What cannot be learned beside the rest would be rehearsed for ever, and the
rest drift with it, so after some rounds without a new sample nothing is looked at either.
"""

from __future__ import annotations

from ogpstream.learner.state import LearnerState

# samples of one look: 200 tokens of questions and answers share a forward
LOOK = 8
# since the last new sample
ROUNDS = 16


class Rounds:
    """Where the round of a learner is. After a restart of the process it begins anew.

    Attributes:
        place: number of the part that was looked at last.
    """

    def __init__(self, state: LearnerState) -> None:
        self._state = state
        self.place = 0
        self._clean = 0  # looks since the last update
        self._looks = 0  # since the last new sample
        self._seen = (-1, -1)

    def next(self) -> int | None:
        """Number of the next `LOOK` samples of the ring, oldest first; None where a round is over."""
        counters, total = self._state.counters, -(-len(self._state.ring) // LOOK)
        acknowledged, updates = self._seen
        self._seen = counters.acknowledged, counters.updates
        if acknowledged != counters.acknowledged:
            self._looks = self._clean = 0
        if updates != counters.updates:
            self._clean = 0
        if self._clean >= total or self._looks >= ROUNDS * total:
            return None
        self._clean += 1
        self._looks += 1
        self.place = (self.place + 1) % total
        return self.place
