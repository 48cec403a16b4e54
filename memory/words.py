"""Which ids the prompts that an expert learned consist of, and how near another text is to one of them by these.

Means of embeddings tell the form of a prompt well and its matter badly: of 200 questions on other matters, in the form
of 100 learned facts, 60 % were as near to a fact as another wording of it is. Ids that all prompts share are their
form, and count little here; of those 200 none is near, and of other wordings all are.

Near is meant by cosines of sets of ids, each weighted by a / (a + p), p the share of the learned prompts that have it
(smooth inverse frequency: Arora et al. 2017, https://openreview.net/forum?id=SyK00v5xx).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# prompts that are remembered, at most 2 MB; then one of the two that are nearest to each other goes
CAPACITY = 4096
# ids at the end of a prompt that are looked at
WINDOW = 128
# a: an id that a tenth of the prompts have counts half
_HALF = 0.1
# of the first few prompts, what all of them have is not known to be form: as if there were so many others without it
_OTHERS = 4
# under this distance two prompts have the same ids
_SAME = 1e-5


@dataclass(frozen=True)
class Words:
    """The ids of learned prompts; a value: to learn one more makes another.

    Attributes:
        ids: distinct ones of each prompt, one prompt after the other, int32.
        lengths: how many are of each prompt `[n]`.
        nearest: distance of each prompt to the nearest other one `[n]`, as it was when the later came.
    """

    ids: Tensor
    lengths: Tensor
    nearest: Tensor

    def __post_init__(self) -> None:
        # when it is learned, and not when the first request comes
        _ = self._norms

    @classmethod
    def empty(cls) -> Words:
        return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def learned(self, prompt: Sequence[int]) -> Words:
        """With one more prompt."""
        distance, own = self.distances(prompt), _distinct(prompt)
        if len(distance) and float(distance.min()) < _SAME:
            return self
        kept = self if len(self.lengths) < CAPACITY else self._without(int(self.nearest.argmin()))
        if kept is not self:
            distance = kept.distances(prompt)
        nearest = float(distance.min()) if len(distance) else torch.inf
        return Words(
            torch.cat([kept.ids, own]),
            torch.cat([kept.lengths, torch.tensor([len(own)])]),
            torch.cat([torch.minimum(kept.nearest, distance), torch.tensor([nearest])]),
        )

    def distances(self, text: Sequence[int]) -> Tensor:
        """Of the end of a text to each prompt: 1 - cosine, `[n]`."""
        own, weights = _distinct(text).long(), self._squares
        known = own[own < len(weights)]
        shared = torch.zeros(len(weights))
        shared[known] = weights[known]
        # an id that no prompt has counts 1
        norm = float(weights[known].sum()) + len(own) - len(known)
        return 1 - self._sums(shared) / (self._norms * max(norm, _SAME)).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, those in use."""
        return {"words": self.ids, "lengths": self.lengths, "apart": self.nearest}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Words:
        """What `state_dict` gave; copies the tensors.

        Raises:
            ValueError: they do not fit together.
        """
        ids, lengths, nearest = (tensors[part].clone() for part in ("words", "lengths", "apart"))
        if len(lengths) != len(nearest) or int(lengths.sum()) != len(ids):
            raise ValueError(f"{len(ids)} ids of {len(lengths)} prompts of {int(lengths.sum())} ids, "
                             f"{len(nearest)} distances")
        return cls(ids, lengths, nearest)

    def _without(self, number: int) -> Words:
        keep = torch.arange(len(self.lengths)) != number
        return Words(self.ids[keep[self._owners]], self.lengths[keep], self.nearest[keep])

    def _sums(self, values: Tensor) -> Tensor:
        """Over the ids of each prompt, of a value for each id."""
        return torch.zeros(len(self.lengths)).index_add_(0, self._owners, values[self.ids.long()])

    @cached_property
    def _owners(self) -> Tensor:
        """The prompt of each of `ids`."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @cached_property
    def _norms(self) -> Tensor:
        """Of each prompt, squared."""
        return self._sums(self._squares)

    @cached_property
    def _squares(self) -> Tensor:
        """Square of the weight of each id, up to the largest that a prompt has."""
        share = torch.bincount(self.ids.long()) / (len(self.lengths) + _OTHERS)
        return (_HALF / (_HALF + share)) ** 2


def _distinct(text: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(set(text[-WINDOW:])), dtype=torch.int32)
