"""What tells prompts from one another before any layer has run: means of their input embeddings.

A description is the direction of two means, over all tokens and over the last four, whitened by the covariance of the
embedding matrix, so that tokens that tell little count little. On streams of 300 to 2880 prompts it lets 99 % of the
test prompts of learned tasks into the scope, and of 298 running texts none. Without the last four tokens, where a
question ends and a text goes on, 65 % of the texts came in where prompts quote long texts. Prompts of one form on other
matters it hardly tells apart: for these the words count (`memory/words.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ogpstream.learner.errors import ModelError

# tokens at the end of a prompt that are described on their own
LAST = 4
# rows of the embedding matrix that its covariance is taken from, for each of its columns: 34 GFLOP at width 2048
_ROWS = 2
# tokens whose embeddings are gathered on the model's device at once: 0.5 MB at width 2048 in bf16
_SLICE = 128
# of the mean variance, added to all: directions that hardly vary are not blown up
_RIDGE = 0.1


class Describer:
    """Describes texts for one model.

    Args:
        embedding: of the model's input ids, `[V, D]`.

    Raises:
        ModelError: it has no such matrix, or one that is not finite; when it is first used.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding = embedding

    @property
    def _weight(self) -> Tensor:
        # read when it is used: `resize_token_embeddings` replaces it
        weight = getattr(self._embedding, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ModelError(f"prompts cannot be described by a {type(self._embedding).__name__}, which has no matrix "
                             "of embeddings: give a decoder whose input embeddings are an nn.Embedding")
        return weight.detach()

    def warm_up(self) -> None:
        """Compute what all descriptions need now, and not when the first text comes."""
        _ = self._whitening

    def __call__(self, ids: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Descriptions of the first `ends` of some ids, at least one each: unit rows `[len(ends), 2 D]` in host RAM.

        A part is 0 where nothing varies.
        """
        mean, factor = self._whitening
        stops = torch.tensor(ends).repeat_interleave(2)
        starts = (stops - LAST).clamp_min(0)
        starts[::2] = 0
        places = torch.arange(len(ids))
        shares = ((places >= starts[:, None]) & (places < stops[:, None])) / (stops - starts)[:, None]
        tokens = torch.tensor(ids)
        means = sum((share @ self._rows(some) for share, some in zip(shares.split(_SLICE, 1), tokens.split(_SLICE),
                                                                      strict=True)), torch.zeros(len(stops), 1))
        # whitened by the Cholesky factor: cosines are those of any other square root of the covariance
        white = torch.linalg.solve_triangular(factor, (means - mean).T, upper=False).T
        norms = white.norm(dim=1, keepdim=True)
        return (white / torch.where(norms > 0, norms, 1.0)).view(len(ends), -1) / 2**0.5

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and lower Cholesky factor `[D, D]` of the covariance of the embedding matrix, float32."""
        size, width = self._weight.shape
        rows = torch.linspace(0, size - 1, min(size, _ROWS * width)).long()
        chosen = torch.cat([self._rows(some) for some in rows.split(_SLICE)])
        if not bool(chosen.isfinite().all()):
            raise ModelError("the embeddings of the model are not finite")
        mean = chosen.mean(0)
        covariance = ((chosen - mean).T @ (chosen - mean) / len(chosen)).double()
        ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        factor = torch.linalg.cholesky(covariance + ridge * torch.eye(width, dtype=torch.float64))
        return mean, factor.float()

    def _rows(self, tokens: Tensor) -> Tensor:
        """Their embeddings `[n, D]` in float32, in host RAM."""
        weight = self._weight
        return weight[tokens.to(weight.device)].cpu().float()
