"""What a forward of the model computes with: which of the served experts answer each row of its batch.

A prompt is looked at in the forward that reads it; forwards that go on with its cache keep what was found. So a
generation is the same experts' from its first token to its last, and one that no expert answers is the bare model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ogpstream.learner.binding import Share
from ogpstream.learner.description import Describer
from ogpstream.learner.errors import StateError
from ogpstream.memory.adapters import Served

# so many ids at once, behind a cache, are looked at as another question; fewer are tokens that some method of decoding
# guessed, or an answer that is being scored
QUESTION = 8
# for each row of a batch, the experts that answer it
Answering = Sequence[frozenset[str]]


class Gate:
    """Decides for the forwards of one model.

    Args:
        describer: of its prompts.
        batches: every adapted linear sees the rows of a batch apart.
    """

    def __init__(self, describer: Describer, *, batches: bool) -> None:
        self.describer, self.batches = describer, batches
        self._caches: WeakKeyDictionary[Any, Answering] = WeakKeyDictionary()
        self._variants: tuple[Served, dict[frozenset[str], Served]] | None = None

    def shares(self, served: Served, inputs: Mapping[str, Any]) -> tuple[tuple[Share, ...], Answering | None]:
        """What a forward with these keyword arguments computes with, and what `remember` is to be told.

        Without `input_ids`, as in a forward of embeddings, there is no prompt to look at: all experts answer. So they
        do for several requests packed into one row, and where a cache was filled by another model object.

        Raises:
            StateError: rows of a batch are answered by different experts, but the model does not keep them apart, or
                they do not match those of their cache.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or "cu_seq_lens_q" in inputs:
            return (Share(served),), None
        cache = inputs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            answering = self._caches.get(cache)
            if answering is None:
                return (Share(served),), None
            answering = _repeated(answering, len(ids))
            if ids.shape[1] >= QUESTION:
                answering = [before | self.answering(served, row)
                             for before, row in zip(answering, ids.tolist(), strict=True)]
        else:
            answering = [self.answering(served, row) for row in _prompts(ids, inputs.get("attention_mask"))]
        return self._shares(served, answering, ids.device), answering

    def answering(self, served: Served, ids: Sequence[int]) -> frozenset[str]:
        """The experts of a version that answer a prompt."""
        return served.scope.answering(ids, served.experts, self.describer)

    def remember(self, cache: Any, answering: Answering) -> None:
        """The prompts of these rows are in a cache of the model's."""
        if cache is not None:
            self._caches[cache] = answering

    def only(self, served: Served, answering: frozenset[str]) -> Served | None:
        """The version with those experts alone; None is the bare model."""
        if answering.issuperset(served.experts):
            return served
        if not answering:
            return None
        if self._variants is None or self._variants[0] is not served:
            self._variants = served, {}
        return self._variants[1].setdefault(answering, served.only(answering))

    def _shares(self, served: Served, answering: Answering, device: torch.device) -> tuple[Share, ...]:
        kinds = sorted(set(answering), key=sorted)
        if len(kinds) == 1:
            one = self.only(served, kinds[0])
            return () if one is None else (Share(one),)
        if not self.batches:
            raise StateError("prompts of one batch are answered by different experts, and this model mixes its rows: "
                             "pass them one by one, or set scope to 'all'")
        shares = []
        for kind in kinds:
            one = self.only(served, kind)
            if one is not None:
                rows = torch.tensor([own == kind for own in answering], device=device)
                shares.append(Share(one, rows[:, None, None]))
        return tuple(shares)


def _prompts(ids: Tensor, mask: Any) -> list[list[int]]:
    """The ids of each row `[B, T]` without the padding that a mask `[B, T]` of 0 and 1 tells."""
    rows: list[list[int]] = ids.tolist()
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return rows
    kept = [[token for token, keep in zip(row, own, strict=True) if keep]
            for row, own in zip(rows, mask.tolist(), strict=True)]
    return [own or row for own, row in zip(kept, rows, strict=True)]


def _repeated(answering: Answering, rows: int) -> Answering:
    """For a batch whose cache has each row several times, one after the other."""
    if len(set(answering)) == 1:
        return [answering[0]] * rows
    if rows % len(answering):
        raise StateError(f"the cache was filled by {len(answering)} prompts that different experts answer, and now has "
                         f"{rows} rows: pass the prompts one by one, or set scope to 'all'")
    return [own for own in answering for _ in range(rows // len(answering))]
