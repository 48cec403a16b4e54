"""What a forward of the model computes with: which of the served experts answer each row of its batch.

A prompt is looked at in the forward that reads it, and what was found goes with its cache, copies of it included. So a
generation is the same experts' from its first token to its last, and one that no expert answers is the bare model's.
Where every forward reads the whole text anew, without a cache, the prompt in it is found where learned prompts end with
the id that it ends with; `StreamLearner.pinned` names it where that may fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ogpstream.learner.binding import Share
from ogpstream.learner.description import Describer
from ogpstream.learner.errors import StateError
from ogpstream.memory.served import Served

# so many ids at once behind an answer are looked at as another question; fewer are tokens that some method of decoding
# guessed
QUESTION = 8
# where a cache keeps what was found
_FOUND = "_ogpstream_found"


@dataclass(frozen=True)
class Found:
    """What a forward was computed with.

    Attributes:
        answering: the experts that answer each row.
        texts: the ids of each row without padding, all that the cache holds of it; empty where that is not known.
        length: columns of the cache that they fill.
        mixed: where rows differ, the version and what it makes of them, for the next token: with more kinds of rows
            than there are experts on the device they would be brought for each.
    """

    answering: Sequence[frozenset[str]]
    texts: Sequence[Sequence[int]] = ()
    length: int = 0
    mixed: list[tuple[Served, tuple[Share, ...]]] = field(default_factory=list, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Found:
        # a copy of a cache was filled by the same
        return self

    def repeated(self, rows: int) -> Found:
        """For a batch whose cache has each row several times, one after the other."""
        before = len(self.answering)
        if rows == before:
            return self
        if rows % before == 0:
            times = rows // before
            return Found([own for own in self.answering for _ in range(times)],
                         [text for text in self.texts for _ in range(times)], self.length)
        if len(set(self.answering)) == 1:
            return Found([self.answering[0]] * rows)
        raise StateError(f"the cache was filled by {before} prompts that different experts answer, and now has {rows} "
                         "rows: pass the prompts one by one, or set served_to to 'all'")


class Gate:
    """Decides for the forwards of one model.

    Args:
        describer: of its prompts.
        batches: every adapted linear sees the rows of a batch apart.
        nearest: of the experts with a scope the nearest one alone answers a prompt.
    """

    def __init__(self, describer: Describer, *, batches: bool, nearest: bool = False) -> None:
        self.describer, self.batches, self.nearest = describer, batches, nearest
        self._variants: tuple[Served, dict[frozenset[str], Served]] | None = None

    def shares(self, served: Served, inputs: Mapping[str, Any]) -> tuple[tuple[Share, ...], Found | None]:
        """What a forward with these arguments computes with, and what `remember` is to be told.

        Without `input_ids`, as in a forward of embeddings, there is no prompt to look at: all experts answer. So they
        do for several requests packed into one row, and where no forward of this model was seen to fill the cache.

        Raises:
            StateError: rows of a batch are answered by different experts, but the model does not keep them apart, or
                they do not match those of their cache.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or "cu_seq_lens_q" in inputs:
            return tuple(map(Share, served.each)), None
        cache = inputs.get("past_key_values")
        length = 0 if cache is None else int(cache.get_seq_length())
        if length:
            before: Found | None = getattr(cache, _FOUND, None)
            if before is None:
                return tuple(map(Share, served.each)), None
            found = self._goes_on(served, before.repeated(len(ids)), ids, length)
        else:
            texts = _texts(ids, inputs.get("attention_mask"))
            found = Found([self.answering(served, text) for text in texts], texts, ids.shape[1])
        if found.mixed and found.mixed[0][0] is served:
            return found.mixed[0][1], found
        shares = self._shares(served, found.answering, ids.device)
        found.mixed[:] = [(served, shares)] if len(set(found.answering)) > 1 else []
        return shares, found

    def answering(self, served: Served, ids: Sequence[int]) -> frozenset[str]:
        """The experts of a version that answer a prompt."""
        return served.scope.answering(ids, served.experts, self.describer, nearest=self.nearest)

    def told(self, answering: frozenset[str], inputs: Mapping[str, Any]) -> Found | None:
        """What goes with the cache of a forward whose prompt was named."""
        ids = inputs.get("input_ids")
        return Found([answering] * len(ids)) if isinstance(ids, Tensor) else None

    def remember(self, output: Any, inputs: Mapping[str, Any], found: Found) -> None:
        """What a forward was computed with goes with the cache that it filled."""
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for part in (*parts, inputs.get("past_key_values")):
            if hasattr(part, "get_seq_length"):
                setattr(part, _FOUND, found)

    def only(self, served: Served, answering: frozenset[str]) -> Served | None:
        """The version with those experts alone; None is the bare model."""
        if not answering:
            return None
        if served.parts is not None:
            # which is no work, and what is kept here would stay on the device
            return served.only(answering)
        variants = self._variants
        if variants is None or variants[0] is not served:
            self._variants = variants = served, {}
        if answering not in variants[1]:
            variants[1][answering] = served.only(answering)
        return variants[1][answering]

    def of(self, served: Served, answering: frozenset[str]) -> tuple[Share, ...]:
        """What all rows are computed with where these experts answer each."""
        one = self.only(served, answering)
        return () if one is None else tuple(map(Share, one.each))

    def _goes_on(self, served: Served, before: Found, ids: Tensor, length: int) -> Found:
        """Of ids behind a cache: its rows' kind, and that of what came since."""
        new = ids.shape[1]
        if before.texts and length <= before.length and (new > 1 or length < before.length):
            # more of the prompt, as where it is read in pieces, or another end behind a part of it
            cut = before.length - length
            texts = [[*text[: max(0, len(text) - cut)], *row]
                     for text, row in zip(before.texts, ids.tolist(), strict=True)]
            answering = [self.answering(served, text) for text in texts]
            if not cut:
                answering = [self._both(served, old, now) for old, now in zip(before.answering, answering, strict=True)]
            return Found(answering, texts, length + new)
        if new >= QUESTION:
            # of the answer in between nothing is known
            return Found([self._both(served, old, self.answering(served, row))
                          for old, row in zip(before.answering, ids.tolist(), strict=True)])
        return before

    def _both(self, served: Served, old: frozenset[str], now: frozenset[str]) -> frozenset[str]:
        """Who answers what goes on: those of before too, but where one alone does the newest."""
        return now if self.nearest and now - served.scope.everywhere else old | now

    def _shares(self, served: Served, answering: Sequence[frozenset[str]], device: torch.device) -> tuple[Share, ...]:
        kinds = sorted(set(answering), key=sorted)
        if len(kinds) == 1:
            return self.of(served, kinds[0])
        if not self.batches:
            raise StateError("prompts of one batch are answered by different experts, and this model mixes its rows: "
                             "pass them one by one, or set served_to to 'all'")
        shares = []
        for kind in kinds:
            one = self.only(served, kind)
            if one is not None:
                rows = torch.tensor([own == kind for own in answering], device=device)
                shares += [Share(part, rows[:, None, None]) for part in one.each]
        return tuple(shares)


def _texts(ids: Tensor, mask: Any) -> list[list[int]]:
    """The ids of each row `[B, T]` without the padding that a mask tells."""
    rows: list[list[int]] = ids.tolist()
    seen = _seen(mask, ids.shape[1])
    if seen is None or len(seen) != len(rows):
        return rows
    kept = [[token for token, keep in zip(row, own, strict=True) if keep]
            for row, own in zip(rows, seen.tolist(), strict=True)]
    return [own or row for own, row in zip(kept, rows, strict=True)]


def _seen(mask: Any, columns: int) -> Tensor | None:
    """Which of the first columns `[B, T]` are no padding.

    Masks are `[B, T]` of 0 and 1; or, as generation with a cache of fixed size makes them, `[B, 1, T, K]`, of bools or
    of numbers to be added, where only what is no padding sees itself; or several of those by the kind of layer.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        itself = mask[:, 0].diagonal(dim1=1, dim2=2)[:, :columns]
        return itself if mask.dtype == torch.bool else itself == 0
    return mask.bool() if mask.shape[1] == columns else None
