"""How much of the base model is left: losses on fixed texts, with the adapters and without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.sites import Attachment


@dataclass(frozen=True)
class Retention:
    """crs: mean over texts of exp(loss_base - loss_now), each at most 1; 1 means that nothing was lost.
    ppl_ratio: perplexity over all tokens now, over that of the base model."""

    crs: float
    ppl_base: float
    ppl_now: float

    @property
    def ppl_ratio(self) -> float:
        return self.ppl_now / self.ppl_base


class RetentionProbe:
    """Held-out texts and the base model's losses on them, taken once.

    Args:
        texts: token ids, at least 2 each; in neither warm start nor ring if the score is to mean anything.
    """

    def __init__(self, attachment: Attachment, texts: Sequence[Sequence[int]]) -> None:
        if not texts or min(len(text) for text in texts) < 2:
            raise ConfigError("a retention probe needs texts of at least 2 tokens each")
        self.attachment = attachment
        self.texts = [list(text) for text in texts]
        self._tokens = torch.tensor([len(text) - 1 for text in self.texts], dtype=torch.float64)
        with attachment.binding.using(None):
            self._base = text_losses(attachment.model, self.texts)

    def measure(self, *, everywhere: bool = False) -> Retention:
        """Score of the version that is served now.

        Args:
            everywhere: as if all texts lay in the scope of all served experts, which few do: what the adapters
                themselves would cost the base model. Where the nearest one alone answers, of each text the loss with
                the one that costs it most.
        """
        binding = self.attachment.binding
        served = binding.current()
        answering: list[frozenset[str] | None] = [None]
        if everywhere and served is not None:
            alone = binding.gate is not None and binding.gate.nearest
            answering = [frozenset([name]) for name in served.experts] if alone else [frozenset(served.experts)]
        losses = []
        for names in answering:
            with binding.using(served, names):
                losses.append(text_losses(self.attachment.model, self.texts))
        now = torch.stack(losses).max(0).values
        total = self._tokens.sum()
        return Retention(
            crs=float((self._base - now).exp().clamp_max(1.0).mean()),
            ppl_base=math.exp(float((self._base * self._tokens).sum() / total)),
            ppl_now=math.exp(float((now * self._tokens).sum() / total)),
        )


@torch.no_grad()
def text_losses(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Nats per token of each text of token ids after its first one, float64."""
    losses = []
    # one by one: padded together, 16 texts of 96 tokens have a GB of logits at a vocabulary of 150,000
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        total, _ = dispatch.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])
        losses.append(float(total) / (len(text) - 1))
    return torch.tensor(losses, dtype=torch.float64)
