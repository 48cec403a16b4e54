"""Which ids the prompts that an expert learned consist of, and how near another text is to one of them by these.

Means of embeddings tell the form of a prompt well and its matter badly: on a base of 5.5M parameters 60 % of 200
questions on other matters, in the form of 100 learned facts, were as near to a fact as another wording of it is. Ids
that all prompts share are their form, and count little here (`bench scope` has the shares by this).

Near is meant by cosines of sets of ids, each weighted by a / (a + p), p the share of the other learned prompts that
have it (smooth inverse frequency: Arora et al. 2017, https://openreview.net/forum?id=SyK00v5xx). So an id that one
prompt alone has counts whole, as one that none has, and from the second prompt on a template counts little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# prompts that are remembered; then the one that is nearest to the new one goes. 1 MB, and 24 bytes for each id up to
# the largest
CAPACITY = 1024
# ids at the end of a prompt that are looked at
WINDOW = 128
# a: an id that a tenth of the other prompts have counts half
_HALF = 0.1
# under this distance two prompts have the same ids
_SAME = 1e-5


@dataclass(frozen=True)
class Words:
    """The ids of learned prompts; a value: to learn one more makes another.

    Arrays of numpy, whose operations on a few thousand numbers take half of the time of torch's.

    Attributes:
        ids: distinct ones of each prompt, those of all in ascending order, int32.
        owners: number of the prompt that each of them is of, int32.
        nearest: distance of each prompt to the nearest other one `[n]`, float64, with the weights of the time when the
            later of the two was learned.
        longest: ids of the longest prompt, `WINDOW` at most: so many are looked at of a text, where a conversation may
            have gone before.
    """

    ids: np.ndarray
    owners: np.ndarray
    nearest: np.ndarray
    longest: int = 0

    def __post_init__(self) -> None:
        # when it is learned, and not when the first request comes
        _ = self._norms, self._starts

    @classmethod
    def empty(cls) -> Words:
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))

    def learned(self, prompt: Sequence[int]) -> Words:
        """With one more prompt, of one id at least."""
        longest = max(self.longest, min(len(prompt), WINDOW))
        own = _distinct(prompt, longest)
        distance = self._distances(own)
        closest = distance.min(initial=np.inf)
        if closest < _SAME:
            return self
        number, ids, owners, nearest = len(distance), self.ids, self.owners, np.minimum(self.nearest, distance)
        if number < CAPACITY:
            nearest = np.append(nearest, closest)
        else:
            number = int(distance.argmin())
            kept = owners != number
            ids, owners, distance[number] = ids[kept], owners[kept], np.inf
            nearest[number] = distance.min()
        places = np.searchsorted(ids, own, side="right")
        return Words(np.insert(ids, places, own), np.insert(owners, places, number), nearest, longest)

    def distances(self, text: Sequence[int]) -> np.ndarray:
        """Of the end of a text to each prompt: 1 - cosine, `[n]`, float64."""
        return self._distances(_distinct(text, self.longest))

    def state_dict(self) -> dict[str, Tensor]:
        """Its arrays, those in use."""
        return {"ids": torch.from_numpy(self.ids), "owners": torch.from_numpy(self.owners),
                "words_nearest": torch.from_numpy(self.nearest), "longest": torch.tensor([self.longest])}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Words:
        """What `state_dict` gave; copies the tensors.

        Raises:
            ValueError: they do not fit together.
        """
        ids, owners, nearest = (tensors[part].numpy().copy() for part in ("ids", "owners", "words_nearest"))
        held = np.zeros(len(nearest), dtype=bool)
        if len(ids) == len(owners) and ((owners >= 0) & (owners < len(held))).all():
            held[owners] = True
        if not held.all() or len(ids) != len(owners) or (ids < 0).any() or (np.diff(ids) < 0).any():
            raise ValueError(f"{len(ids)} ids of {len(owners)} owners, and {len(nearest)} prompts of which "
                             f"{int(held.sum())} have an id")
        return cls(ids, owners, nearest.astype(np.float64), int(tensors["longest"]))

    def _distances(self, own: np.ndarray) -> np.ndarray:
        known = own[own < len(self._squares)]
        squares = self._squares[known]
        # an id that no prompt has counts 1
        norm = squares.sum() + len(own) - len(known)
        first, count = self._starts[known], self._counts[known]
        # of each known id all places in `owners`, one after the other
        places = np.repeat(first - count.cumsum() + count, count) + np.arange(count.sum())
        shared = np.bincount(self.owners[places], np.repeat(squares, count), len(self.nearest))
        return 1 - shared / np.sqrt(self._norms * norm)

    @cached_property
    def _counts(self) -> np.ndarray:
        """Of each id, up to the largest that a prompt has: how many prompts have it."""
        return np.bincount(self.ids)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Of each of these ids: its first place."""
        return self._counts.cumsum() - self._counts

    @cached_property
    def _squares(self) -> np.ndarray:
        """Of each of these ids: the square of its weight."""
        share = (self._counts - 1).clip(0) / max(1, len(self.nearest) - 1)
        return (_HALF / (_HALF + share)) ** 2

    @cached_property
    def _norms(self) -> np.ndarray:
        """Of each prompt, squared."""
        return np.bincount(self.owners, self._squares[self.ids], len(self.nearest))


def _distinct(text: Sequence[int], last: int) -> np.ndarray:
    """The distinct ones of the last ids, at least one."""
    return np.array(sorted(set(text[-max(1, last) :])), np.int32)
