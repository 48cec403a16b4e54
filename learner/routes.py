"""How well the experts know what they are given, sample by sample, and whether that has changed.

A loss is judged by its rank among the latest losses of its expert, so that no shape of their distribution is assumed:
where nothing has changed, p, the share of them that are at least as high, is uniform in (0, 1]. A cumulative sum (Page
1954, Biometrika 41) of -log p less a slack then seldom passes its limit, and more seldom while losses fall. Only losses
that are also clearly higher than what was known raise it, since losses of one domain may creep.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# latest losses of an expert that are remembered, and how many of them say something
WINDOW, KNOWN = 48, 32
# nats; of losses that are drawn alike two in 400,000 reach the limit by chance, and six of another domain do that are
# all higher than the 48 before. With a slack of 1.5 it is 3 to 8 in 36,000 (limits of 10 and 12); with 2 a domain after
# 60 samples of one that is only half learned is noticed after 40 samples or not at all, and now after 20
SLACK, LIMIT = 1.75, 11.0
# nats per token above the median of what was known from which on a loss raises the sum: first losses of another domain
# lie 2 to 5 above it, but those of one domain that creep up by hundredths would reach the limit as well
RISE = 0.1
# p from which on a sample is one of what an expert knows; and one that it knows as well as the half of them
FITS, WELL = 0.05, 0.5
# samples since a drift began that are remembered
SINCE = 32

Losses = tuple[float, ...]


@dataclass(frozen=True)
class Routes:
    """A part of the state of a learner.

    Attributes:
        newest: the expert that learned the newest sample that named none, corrections of what was at hand aside.
        losses: by expert, of its latest samples before their own update, in nats per token.
        surge: the cumulative sum.
        since: numbers of the samples that raised it since it was 0, the latest ones.
        settled: the losses of then, by which later ones are judged.
    """

    newest: str
    losses: Mapping[str, Losses] = field(default_factory=dict)
    surge: float = 0.0
    since: tuple[int, ...] = ()
    settled: Mapping[str, Losses] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        losses, settled = ({name: list(own) for name, own in known.items()} for known in (self.losses, self.settled))
        return {"newest": self.newest, "losses": losses, "surge": self.surge, "since": list(self.since),
                "settled": settled}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routes:
        """What `to_dict` gave."""
        losses, settled = ({name: tuple(map(float, own)) for name, own in values[key].items()}
                           for key in ("losses", "settled"))
        return cls(str(values["newest"]), losses, float(values["surge"]), tuple(map(int, values["since"])), settled)

    @property
    def drifted(self) -> bool:
        """What comes is not what it was."""
        return self.surge >= LIMIT

    def is_young(self, expert: str) -> bool:
        """Whether an expert has so few samples that their losses say nothing."""
        return len(self.settled.get(expert, ())) < KNOWN

    def fits(self, expert: str, loss: float, least: float = FITS) -> bool:
        """Whether an expert knows such samples as it knew its own; nothing is known of a young one.

        Args:
            least: p from which on it does.
        """
        return self.is_young(expert) or _chance(self.settled[expert], loss) >= least

    def saw(self, expert: str, loss: float, number: int) -> Routes:
        """With a new sample of an expert, its loss before its update, and its number."""
        losses = {**self.losses, expert: (*self.losses.get(expert, ()), loss)[-WINDOW:]}
        # one with few samples says nothing of a drift
        surge, since = self.surge, self.since
        if self.drifted:
            # nothing came of it, since there was no place for another expert: so it is what is
            surge = 0.0
        elif not self.is_young(expert):
            known = self.settled[expert]
            step = -math.log(_chance(known, loss)) - SLACK
            if loss - statistics.median(known) < RISE:
                step = min(step, 0.0)
            surge = max(0.0, surge + step)
            # what is known is of the old domain
            since = (*since, number)[-SINCE:] if step > 0 else since
        if not surge:
            return Routes(expert, losses, settled=losses)
        # a young one grows up all the same, or nothing would ever bring the sum down again
        settled = {**self.settled, expert: losses[expert]} if self.is_young(expert) else self.settled
        return Routes(expert, losses, surge, since, settled)

    def begun(self, expert: str) -> Routes:
        """After a new expert was made: what has come since the drift began says nothing of the others."""
        return Routes(expert, self.settled, settled=self.settled)


def _chance(known: Losses, loss: float) -> float:
    """p: of a new loss and the known ones, the share that are at least as high."""
    return (1 + sum(other >= loss for other in known)) / (1 + len(known))
