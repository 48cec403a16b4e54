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

import torch
from torch import Tensor

# prompts that are remembered; then the one that is nearest to the new one goes. 1 MB, and 20 bytes for each id up to
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

    Attributes:
        ids: distinct ones of each prompt, those of all in ascending order, int32.
        owners: number of the prompt that each of them is of, int32.
        nearest: distance of each prompt to the nearest other one `[n]`, with the weights of the time when the later of
            the two was learned.
        longest: ids of the longest prompt, `WINDOW` at most: so many are looked at of a text, where a conversation may
            have gone before.
    """

    ids: Tensor
    owners: Tensor
    nearest: Tensor
    longest: int = 0

    def __post_init__(self) -> None:
        # when it is learned, and not when the first request comes
        _ = self._norms, self._starts

    @classmethod
    def empty(cls) -> Words:
        return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))

    def learned(self, prompt: Sequence[int]) -> Words:
        """With one more prompt, of one id at least."""
        longest = max(self.longest, min(len(prompt), WINDOW))
        own = _distinct(prompt, longest)
        distance = self._distances(own)
        if len(distance) and float(distance.min()) < _SAME:
            return self
        ids, owners, nearest = self.ids, self.owners, torch.minimum(self.nearest, distance)
        if len(distance) < CAPACITY:
            number = len(distance)
            nearest = torch.cat([nearest, torch.tensor([torch.inf])])
        else:
            number = int(distance.argmin())
            gone = (owners == number).nonzero()[:, 0]
            ids, owners, distance[number] = _without(ids, gone), _without(owners, gone), torch.inf
        nearest[number] = distance.min() if len(distance) else torch.inf
        places = torch.searchsorted(ids, own, right=True)
        return Words(_with(ids, places, own), _with(owners, places, torch.full_like(own, number)), nearest, longest)

    def distances(self, text: Sequence[int]) -> Tensor:
        """Of the end of a text to each prompt: 1 - cosine, `[n]`."""
        return self._distances(_distinct(text, self.longest))

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, those in use."""
        return {"ids": self.ids, "owners": self.owners, "words_nearest": self.nearest,
                "longest": torch.tensor([self.longest])}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Words:
        """What `state_dict` gave; copies the tensors.

        Raises:
            ValueError: they do not fit together.
        """
        ids, owners, nearest = (tensors[part].clone() for part in ("ids", "owners", "words_nearest"))
        held = torch.zeros(len(nearest), dtype=torch.bool)
        if len(ids) == len(owners) and bool(((owners >= 0) & (owners < len(held))).all()):
            held[owners.long()] = True
        if not bool(held.all()) or len(ids) != len(owners) or bool((ids < 0).any()) or bool((ids.diff() < 0).any()):
            raise ValueError(f"{len(ids)} ids of {len(owners)} owners, and {len(nearest)} prompts of which "
                             f"{int(held.sum())} have an id")
        return cls(ids, owners, nearest, int(tensors["longest"]))

    def _distances(self, own: Tensor) -> Tensor:
        known = own[own < len(self._squares)].long()
        squares = self._squares[known]
        # an id that no prompt has counts 1
        norm = float(squares.sum()) + len(own) - len(known)
        first, count = self._starts[known], self._counts[known]
        # of each known id all places in `owners`, one after the other
        places = (first - count.cumsum(0) + count).repeat_interleave(count) + torch.arange(int(count.sum()))
        shared = torch.zeros(len(self.nearest)).index_add_(0, self.owners[places], squares.repeat_interleave(count))
        return 1 - shared / (self._norms * norm).sqrt()

    @cached_property
    def _counts(self) -> Tensor:
        """Of each id, up to the largest that a prompt has: how many prompts have it."""
        return torch.bincount(self.ids)

    @cached_property
    def _starts(self) -> Tensor:
        """Of each of these ids: its first place."""
        return self._counts.cumsum(0) - self._counts

    @cached_property
    def _squares(self) -> Tensor:
        """Of each of these ids: the square of its weight."""
        share = (self._counts - 1).clamp_min(0) / max(1, len(self.nearest) - 1)
        return (_HALF / (_HALF + share)) ** 2

    @cached_property
    def _norms(self) -> Tensor:
        """Of each prompt, squared."""
        return torch.zeros(len(self.nearest)).index_add_(0, self.owners, self._squares[self.ids.long()])


def _distinct(text: Sequence[int], last: int) -> Tensor:
    """The distinct ones of the last ids, at least one."""
    return torch.tensor(sorted(set(text[-max(1, last) :])), dtype=torch.int32)


def _without(values: Tensor, places: Tensor) -> Tensor:
    """Without those at some places, in ascending order; a mask takes 5 times as long."""
    first, *others = values.tensor_split(places)
    return torch.cat([first, *(part[1:] for part in others)])


def _with(values: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """With new ones before those at some places, in ascending order."""
    first, *others = values.tensor_split(places)
    return torch.cat([first, *(part for pair in zip(new.split(1), others, strict=True) for part in pair)])
