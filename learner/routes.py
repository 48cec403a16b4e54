"""How well the experts know what they are given, sample by sample, and whether that has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# samples of an expert from which on its level says something
KNOWN = 16
# samples that a level is the running mean of
WINDOW = 32
# a loss counts by how many mean deviations it lies above its level, less the slack, and at most so much, so that three
# odd samples are none; a deviation is this many nats at least. In the losses of one learner on three streams of 5, 5
# and 8 domains the 15 changes were all noticed, after 4 to 10 samples, and nothing else; with half a nat and a limit of
# 12 one of them was not
LEAST, SLACK, MOST, LIMIT = 1.0, 1.0, 3.0, 10.0
# deviations up to which a sample is one of what an expert knows, and up to which it counts for its level
FITS = 3.0
# samples since a drift began that are remembered
SINCE = 32

# samples, mean and mean absolute deviation of their losses
Level = tuple[int, float, float]


@dataclass(frozen=True)
class Routes:
    """A part of the state of a learner.

    Attributes:
        newest: the expert that learned the newest sample.
        levels: by expert, of the losses of its samples before their own update, in nats.
        surge: sum of how far losses lay above their level, in deviations, since they began to.
        since: numbers of the samples since then, the latest ones.
        settled: the levels of before.
    """

    newest: str
    levels: Mapping[str, Level] = field(default_factory=dict)
    surge: float = 0.0
    since: tuple[int, ...] = ()
    settled: Mapping[str, Level] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        levels, settled = ({name: list(level) for name, level in levels.items()}
                           for levels in (self.levels, self.settled))
        return {"newest": self.newest, "levels": levels, "surge": self.surge, "since": list(self.since),
                "settled": settled}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routes:
        """What `to_dict` gave."""
        levels, settled = ({name: (int(count), float(mean), float(spread))
                            for name, (count, mean, spread) in values[key].items()} for key in ("levels", "settled"))
        return cls(str(values["newest"]), levels, float(values["surge"]), tuple(map(int, values["since"])), settled)

    @property
    def drifted(self) -> bool:
        """What comes is not what it was."""
        return self.surge >= LIMIT

    def fits(self, expert: str, loss: float) -> bool:
        """Whether an expert knows such samples as well as its own; nothing is known of one with few."""
        count, mean, spread = self.levels.get(expert, (0, 0.0, 0.0))
        return count < KNOWN or loss <= mean + FITS * max(spread, LEAST)

    def saw(self, expert: str, loss: float, number: int) -> Routes:
        """With a new sample of an expert, its loss before its update, and its number."""
        count, mean, spread = self.levels.get(expert, (0, loss, 0.0))
        unit, surge, since = max(spread, LEAST), self.surge, self.since
        # one with few samples says nothing of a drift
        if count >= KNOWN:
            surge = max(0.0, surge + min(MOST, (loss - mean) / unit - SLACK))
            since = (*since, number)[-SINCE:]
            # what drifts away takes little of the level with it
            loss = min(loss, mean + FITS * unit)
        share = 1 / min(count + 1, WINDOW)
        spread += share * (abs(loss - mean) - spread)
        levels = {**self.levels, expert: (count + 1, mean + share * (loss - mean), spread)}
        if not surge:
            return Routes(expert, levels, settled=levels)
        return Routes(expert, levels, surge, since, self.settled)

    def begun(self, expert: str) -> Routes:
        """After a new expert was made: what has come since the drift began says nothing of the others."""
        return Routes(expert, self.settled, settled=self.settled)
