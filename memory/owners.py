"""Whose samples come: how many of each expert were offered to the replay ring, and its share of the newest ones.

What no update reaches any more needs no rehearsal, so room in the ring, and draws from it, go where samples come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# part of the ring that all experts share evenly, whatever comes: with five of them and 128 slots 6 for each
_REST = 0.25
# share of the newest samples that an expert counts for at least
_LEAST = 1e-9


class Owners:
    """Experts by number, in the order of their first sample.

    Args:
        samples: that the share of the newest fades over, exponentially.

    Attributes:
        names: of the experts.
        offered: samples of each so far.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.names: list[str] = []
        self.offered: list[int] = []
        self._recent: list[float] = []

    def number(self, name: str) -> int:
        """Of an expert; the next one for a new name."""
        if name not in self.names:
            self.names.append(name)
            self.offered.append(0)
            self._recent.append(0.0)
        return self.names.index(name)

    def sent(self, name: str) -> int:
        """A sample of an expert has come; its number."""
        owner = self.number(name)
        self.offered[owner] += 1
        self._recent = [share * (1 - 1 / self._samples) for share in self._recent]
        self._recent[owner] += 1 / self._samples
        return owner

    def hand_over(self, before: int, after: int) -> None:
        """A sample of one expert is another's."""
        self.offered[before] -= 1
        self.offered[after] += 1
        moved = min(self._recent[before], 1 / self._samples)
        self._recent[before] -= moved
        self._recent[after] += moved

    def most_crowded(self, owners: np.ndarray, newest: int) -> int:
        """The expert that is furthest above its room in a full ring, once another sample of `newest` is in it.

        Args:
            owners: of the samples in the ring.
        """
        held = np.bincount(owners, minlength=len(self.names)).astype(float)
        held[newest] += 1
        # of those that are gone from the ring none is in it to give way
        recent = np.where(held > 0, np.maximum(self._recent, _LEAST), 0.0)
        shares = (1 - _REST) * recent / recent.sum() + _REST * (held > 0) / np.count_nonzero(held)
        return int((held - shares * len(owners)).argmax())

    def chances(self, owners: np.ndarray) -> np.ndarray:
        """Relative chances `[n]` of samples, so that those of each expert together have its share of the newest."""
        held = np.bincount(owners, minlength=len(self.names))
        if np.count_nonzero(held) < 2:
            return np.ones(len(owners))
        return (np.maximum(self._recent, _LEAST) / np.maximum(held, 1))[owners]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"experts": list(self.names), "offered": list(self.offered), "recent": list(self._recent)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], samples: int) -> Owners:
        """What `to_dict` gave.

        Raises:
            ValueError: it does not fit together.
        """
        owners = cls(samples)
        owners.names = [str(name) for name in values["experts"]]
        owners.offered, owners._recent = list(map(int, values["offered"])), list(map(float, values["recent"]))
        if not len(owners.names) == len(owners.offered) == len(owners._recent):
            raise ValueError(f"{len(owners.names)} experts, {len(owners.offered)} and {len(owners._recent)} counts")
        return owners
