"""Which prompts an expert answers: those like the ones that it learned. All others are the base model's.

A correction has a scope, the inputs whose answers it is meant to change (SERAC, Mitchell et al. 2022,
arXiv:2206.06520). Here nothing is trained for that: a text lies in the scope of an expert if it is as near to a learned
prompt as these are to each other, much like the deferral radius of GRACE (Hartvigsen et al. 2023, arXiv:2211.11031).
Near is meant twice: by cosines of descriptions, whatever makes these of token ids, and by the words (`words.py`).

A scope is a value: it belongs to a served version, and to learn one more prompt is to make another scope.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ogpstream.memory.grams import Grams, likelihoods
from ogpstream.memory.words import WINDOW, Words

# prompts that an expert remembers; then the two nearest become one: 4 MB in a snapshot at width 2048
CAPACITY = 512
# learned prompts from which on a radius follows their distances
FEW = 32


@dataclass(frozen=True)
class Radius:
    """Distances, 1 - cosine, up to which a text is like the learned prompts: of the first few, and then at least and at
    most."""

    first: float
    least: float
    most: float


# of 450 test prompts 99 % are nearer than 0.15 to one that was learned with the same answer, of other wordings of
# single facts 99 % nearer than 0.1; running text begins at 0.41
FORM = Radius(0.15, 0.1, 0.3)
# base of 5.5M parameters: after 1 to 40 single facts all other wordings are nearer than 0.6, and of questions on other
# matters 2 % nearer than 0.65 from the third fact on, behind a system prompt of 60 words 7 %. Beyond 0.95 less than a
# word is shared
WORDS = Radius(0.65, 0.5, 0.95)
# the distance that 99 % of learned prompts keep to the nearest other one, and a tenth more
SHARE, SLACK = 0.99, 1.1
# under this distance two prompts are the same, but for rounding to half precision
SAME = 2e-3
# places in a text that are looked at for the end of a prompt
PLACES = 64
# unit rows `[len(ends), width]` for the first `ends` of some ids
Describe = Callable[[Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Prompts:
    """Learned prompts of one expert.

    Attributes:
        rows: their descriptions, unit rows `[n, width]` of values that half precision has.
        counts: prompts that each row is the mean of.
        nearest: distance of each row to the nearest other one.
        words: what they consist of.
        grams: how often each id and pair of ids occurs in them.
        closing: ids that prompts ended with.
    """

    rows: Tensor
    counts: Tensor
    nearest: Tensor
    words: Words = field(default_factory=Words.empty)
    grams: Grams = field(default_factory=Grams.empty)
    closing: frozenset[int] = frozenset()

    @classmethod
    def empty(cls, width: int) -> Prompts:
        return cls(torch.zeros(0, width), torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def holds(self, text: Sequence[int], ends: Sequence[int], described: Tensor) -> bool:
        """Whether a text up to one of the ends, by its ids and its descriptions `[len(ends), width]`, is like one."""
        return any(True for _ in self.alike(text, ends, described))

    def alike(self, text: Sequence[int], ends: Sequence[int], described: Tensor) -> Iterator[int]:
        """The places in `ends` where it is."""
        near = self.distances(described).min(1).values <= self.radius
        for place, (end, like) in enumerate(zip(ends, near.tolist(), strict=True)):
            if like and float(self.words.distances(_window(text, end)).min()) <= self.words_radius:
                yield place

    def distances(self, described: Tensor) -> Tensor:
        """`[B, n]` for descriptions `[B, width]`."""
        return 1 - described @ self.rows.T

    def learned(self, prompt: Sequence[int], described: Tensor) -> Prompts:
        """With one more prompt, by its ids and its description `[width]`."""
        words, grams = self.words.learned(prompt), self.grams.learned(_window(prompt, len(prompt)))
        closing = self.closing | {prompt[-1]}
        distance = self.distances(described[None])[0]
        if len(self.rows) and float(distance.min()) < SAME:
            counts = self.counts.clone()
            counts[distance.argmin()] += 1
            return replace(self, counts=counts, words=words, grams=grams, closing=closing)
        if len(self.rows) == CAPACITY:
            return replace(self._merged(described), words=words, grams=grams, closing=closing)
        nearest = float(distance.min()) if len(distance) else torch.inf
        return Prompts(
            torch.cat([self.rows, described[None].half().float()]),
            torch.cat([self.counts, torch.ones(1, dtype=torch.int64)]),
            torch.cat([torch.minimum(self.nearest, distance), torch.tensor([nearest])]),
            words,
            grams,
            closing,
        )

    def _merged(self, described: Tensor) -> Prompts:
        """With one more prompt at the place of one of two that are nearest to each other; the other is their mean."""
        first = int(self.nearest.argmin())
        distance = 1 - self.rows @ self.rows[first]
        distance[first] = torch.inf
        second = int(distance.argmin())
        rows, counts, nearest = self.rows.clone(), self.counts.clone(), self.nearest
        mean = counts[first] * rows[first] + counts[second] * rows[second]
        rows[first], rows[second] = (mean / mean.norm()).half(), described.half()
        counts[first] += counts[second]
        counts[second] = 1
        for place in (first, second):
            distance = 1 - rows @ rows[place]
            distance[place] = torch.inf
            # a distance of others to one of the two that are gone stays: their mean is not far from it
            nearest = torch.minimum(nearest, distance)
            nearest[place] = distance.min()
        return Prompts(rows, counts, nearest)

    @cached_property
    def radius(self) -> float:
        """Distance of descriptions up to which a prompt is like the learned ones."""
        return _radius(self.nearest, FORM)

    @cached_property
    def words_radius(self) -> float:
        """Distance of words up to which it is, too."""
        return _radius(torch.from_numpy(self.words.nearest), WORDS)


def _window(text: Sequence[int], end: int) -> Sequence[int]:
    return text[max(0, end - WINDOW) : end]


def _radius(nearest: Tensor, bounds: Radius) -> float:
    """Of distances to the nearest other prompt."""
    if len(nearest) < FEW:
        return bounds.first
    return min(bounds.most, max(bounds.least, SLACK * float(torch.quantile(nearest, SHARE))))


@dataclass(frozen=True)
class Scope:
    """The scopes of all experts.

    Attributes:
        experts: what each one learned.
        everywhere: experts without a scope, such as adapters that were trained elsewhere: they answer every prompt.
    """

    experts: Mapping[str, Prompts] = field(default_factory=dict)
    everywhere: frozenset[str] = frozenset()

    def learned(self, expert: str, prompt: Sequence[int], described: Tensor) -> Scope:
        """With one more prompt of an expert, by its ids and its description `[width]`."""
        before = self.experts.get(expert) or Prompts.empty(len(described))
        return replace(self, experts={**self.experts, expert: before.learned(prompt, described)})

    def handed_over(self, prompt: Sequence[int], described: Tensor, before: str, after: str) -> Scope:
        """With a prompt that one expert learned as one of another's. The first one's scope still has it in it."""
        scope = self.learned(after, prompt, described)
        if before not in scope.experts:
            return scope
        own = scope.experts[before]
        own = replace(own, grams=own.grams.forgotten(_window(prompt, len(prompt))))
        return replace(scope, experts={**scope.experts, before: own})

    def opened(self, expert: str) -> Scope:
        """With an expert that answers every prompt."""
        return replace(self, everywhere=self.everywhere | {expert})

    def answering(self, ids: Sequence[int], experts: Collection[str], describe: Describe, *, nearest: bool = False
                  ) -> frozenset[str]:
        """Which of the experts answer a text: those with a prompt in it, from its start to any of its ids.

        So the answer may follow, or a later question. Looked at are the whole text and, since most prompts have the
        end of a template or a question mark, the places of ids that learned prompts end with: the last `PLACES`.

        Args:
            nearest: where one that has a scope does, the likeliest of these in place of them, at the last such place.
        """
        always = self.everywhere.intersection(experts)
        known = {name: self.experts[name] for name in experts if name in self.experts and name not in always}
        if not known or not ids:
            return always
        closing = frozenset[int]().union(*(own.closing for own in known.values()))
        ends = [*[end for end, token in enumerate(ids[:-1], 1) if token in closing][-PLACES:], len(ids)]
        described = describe(ids, ends)
        if not nearest:
            return always.union(name for name, own in known.items() if own.holds(ids, ends, described))
        place = max((place for own in known.values() for place in own.alike(ids, ends, described)), default=None)
        if place is None:
            return always
        # the last one: earlier turns of a conversation may have been another's
        return always | {self._likeliest(known, _window(ids, ends[place]))}

    def _likeliest(self, known: Mapping[str, Prompts], text: Sequence[int]) -> str:
        """The expert whose prompts are most like a text, as far back as the longest of them: naive Bayes."""
        text = text[-max(own.words.longest for own in known.values()) :]
        found = likelihoods([own.grams for own in known.values()], text, self._distinct)
        return list(known)[int(found.argmax())]

    def warm_up(self) -> None:
        """Compute what the likeliest is found with now, and not when the first request comes."""
        _ = self._distinct

    @cached_property
    def _distinct(self) -> int:
        """Buckets that any expert has counts in."""
        return int(np.count_nonzero(sum(own.grams.counts for own in self.experts.values())))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values); counts and distances are those in use."""
        names = sorted(self.experts)
        tensors = {}
        for number, name in enumerate(names):
            own = self.experts[name]
            parts = {"rows": own.rows.half(), "counts": own.counts, "nearest": own.nearest, **own.words.state_dict(),
                     **own.grams.state_dict()}
            tensors.update({f"{number}.{part}": tensor for part, tensor in parts.items()})
        closing = [sorted(self.experts[name].closing) for name in names]
        return tensors, {"experts": names, "closing": closing, "everywhere": sorted(self.everywhere)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Scope:
        """What `state_dict` gave; copies the tensors.

        Raises:
            ValueError: the parts of an expert do not fit together.
        """
        experts = {}
        for number, (name, closing) in enumerate(zip(meta["experts"], meta["closing"], strict=True)):
            own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{number}.")}
            rows, counts, nearest = own["rows"], own["counts"], own["nearest"]
            if rows.dim() != 2 or not len(rows) == len(counts) == len(nearest):
                raise ValueError(f"the saved prompts of {name!r} do not fit together: {tuple(rows.shape)} rows, "
                                 f"{len(counts)} counts, {len(nearest)} distances")
            try:
                words = Words.from_state_dict(own)
                grams = Grams.from_state_dict(own)
                if len(rows) and not len(words.nearest):
                    raise ValueError(f"none for {len(rows)} descriptions")
            except ValueError as error:
                raise ValueError(f"the saved words of {name!r} do not fit together: {error}") from None
            experts[name] = Prompts(rows.float(), counts.clone(), nearest.clone(), words, grams, frozenset(closing))
        return cls(experts, frozenset(meta["everywhere"]))
