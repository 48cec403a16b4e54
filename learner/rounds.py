"""Going round the ring for what was forgotten: which samples are looked at next, and when there is no need to.

A round looks at all samples, some at a time, and an update goes to the worst of those that are not known any more. It
is over when a whole round has found none. What cannot be learned beside the rest would be rehearsed for ever, and the
rest drift with it, so after some rounds without a new sample or another change nothing is looked at either.
"""

from __future__ import annotations

from dataclasses import dataclass

# samples of one look: of questions and short answers 200 tokens, which share a forward
LOOK = 8
# since the last new sample: of 48 facts that had nothing in common 45 were back after 25, on a base of 5.5M parameters
ROUNDS = 100


@dataclass(frozen=True)
class Rounds:
    """How far a learner has come: a part of its state, so that a run that was killed goes on as it would have.

    Attributes:
        place: number of the part of the ring that was looked at last.
        clean: looks since one found something forgotten.
        looks: since something else than a look changed what is served: a new sample, another expert, a rollback.
        version: that was served after the last look.
    """

    place: int = -1
    clean: int = 0
    looks: int = 0
    version: int = -1

    def next(self, ring: int, version: int) -> int | None:
        """Number of the next `LOOK` samples of a ring that holds so many, oldest first; None where a round is over."""
        total, same = -(-ring // LOOK), version == self.version
        if not total or same and (self.clean >= total or self.looks >= ROUNDS * total):
            return None
        return (self.place + 1) % total

    def after(self, place: int, before: int, version: int, *, found: bool, blind: bool) -> Rounds:
        """With one more look.

        Args:
            before, version: that were served before and after it.
            found: something forgotten, so that an update was made.
            blind: it saw nothing for want of memory, and counts as many, so that a shortage is not tried on for ever.
        """
        clean, looks = (self.clean, self.looks) if before == self.version else (0, 0)
        return Rounds(place, 0 if found or blind else clean + 1, looks + (ROUNDS // 4 if blind else 1), version)
