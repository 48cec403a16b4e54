"""Which prompts an expert answers: those like the ones that it learned. All others are the base model's.

A correction has a scope, the inputs whose answers it is meant to change (SERAC, Mitchell et al. 2022,
arXiv:2206.06520). Here nothing is trained for that. A prompt is described by its tokens alone, before any layer has
run, and lies in the scope of an expert if it is as near to a learned prompt as these are to each other, much like the
deferral radius of GRACE (Hartvigsen et al. 2023, arXiv:2211.11031), which is measured in hidden states.

The description is the direction of two means of input embeddings, over all tokens and over the last four, whitened by
the covariance of the embedding matrix, so that tokens that tell little count little. On six streams of 240 to 1800
prompts it tells learned tasks' test prompts from running text without an error (area under the curve 1.000; without
the last four, where a question ends and a text goes on, 0.90 on tasks whose prompts quote long texts).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

# tokens at the end of a prompt that are described on their own
LAST = 4
# prompts that an expert remembers; one more is averaged into its nearest: 8 MB at width 2048
CAPACITY = 1024
# distances are 1 - cosine. From FEW learned prompts on the radius follows theirs, at most to MOST: running text begins
# at 0.41. Before, it is FIRST: of 450 test prompts 99 % are nearer to one that was learned with the same answer
FEW, FIRST, MOST = 32, 0.15, 0.3
# the distance that 99 % of learned prompts keep to the nearest other one, and a tenth more
SHARE, SLACK = 0.99, 1.1
# under this distance two prompts are the same, but for rounding to half precision
SAME = 2e-3
# places in a text that are looked at for the end of a prompt
PLACES = 64
# rows of the embedding matrix that its covariance is taken from, for each of its columns: 34 GFLOP at width 2048
_ROWS = 2
# of the mean variance, added to all: directions that hardly vary are not blown up
_RIDGE = 0.1


class Prompts:
    """Learned prompts of one expert, as descriptions."""

    def __init__(self, width: int) -> None:
        self.rows = torch.zeros(0, width)  # of values that half precision has
        self.counts = torch.zeros(0, dtype=torch.int64)  # prompts that a row is the mean of
        self.nearest = torch.zeros(0)  # distance of each row to the nearest other one
        self.closing: set[int] = set()  # ids that prompts ended with

    def distances(self, described: Tensor) -> Tensor:
        """`[B, n]` for descriptions `[B, width]`."""
        return 1 - described @ self.rows.T

    def add(self, described: Tensor, last: int) -> None:
        """One more learned prompt, by its description `[width]` and its last id."""
        self.closing = self.closing | {last}
        if not len(self.rows):
            self._append(described, torch.inf)
            return
        distance = self.distances(described[None])[0]
        near = int(distance.argmin())
        if float(distance[near]) < SAME:
            self.counts[near] += 1
        elif len(self.rows) < CAPACITY:
            self.nearest = torch.minimum(self.nearest, distance)
            self._append(described, float(distance[near]))
        else:
            mean = self.rows[near] * self.counts[near] + described
            rows = self.rows.clone()
            rows[near] = (mean / mean.norm()).half().float()
            self.rows = rows
            self.counts[near] += 1

    @property
    def radius(self) -> float:
        """Distance up to which a prompt is like the learned ones."""
        if len(self.rows) < FEW:
            return FIRST
        return min(MOST, SLACK * float(torch.quantile(self.nearest, SHARE)))

    def _append(self, described: Tensor, nearest: float) -> None:
        self.rows = torch.cat([self.rows, described[None].half().float()])
        self.counts = torch.cat([self.counts, torch.ones(1, dtype=torch.int64)])
        self.nearest = torch.cat([self.nearest, torch.tensor([nearest])])


class Scope:
    """The scopes of all experts of a model.

    Args:
        embedding: of the model's input ids.

    Attributes:
        everywhere: experts without a scope, such as adapters that were trained elsewhere: they answer every prompt.
    """

    def __init__(self, embedding: nn.Module) -> None:
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        self._weight = weight.detach()
        self.experts: dict[str, Prompts] = {}
        self.everywhere: set[str] = set()

    def warm_up(self) -> None:
        """Compute what all descriptions need now, and not when the first prompt comes."""
        _ = self._whitening

    def describe(self, ids: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Descriptions of the first `ends` of some ids, at least one each: unit rows `[len(ends), 2 D]` in host RAM.

        A part is 0 where nothing varies.
        """
        mean, factor = self._whitening
        taken = self._weight[torch.tensor(ids, device=self._weight.device)].float()
        sums = torch.cat([torch.zeros_like(taken[:1]), taken.cumsum(0)])
        stops = torch.tensor(ends)
        starts = (stops - LAST).clamp_min(0)
        means = torch.stack([sums[stops] / stops[:, None].to(sums), (sums[stops] - sums[starts])
                             / (stops - starts)[:, None].to(sums)], 1).cpu()
        # whitened by the Cholesky factor: cosines are those of any other square root of the covariance
        white = torch.linalg.solve_triangular(factor, (means.flatten(0, 1) - mean).T, upper=False).T
        norms = white.norm(dim=1, keepdim=True)
        return (white / torch.where(norms > 0, norms, 1.0)).view(len(ends), -1) / 2**0.5

    def add(self, expert: str, prompt: Sequence[int]) -> None:
        """An expert has learned to answer a prompt."""
        described = self.describe(prompt, [len(prompt)])[0]
        self.experts.setdefault(expert, Prompts(len(described))).add(described, prompt[-1])

    def answering(self, ids: Sequence[int], experts: Collection[str]) -> frozenset[str]:
        """Which of the experts answer a text: those with a prompt in it, from its start to any of its ids.

        So the answer may follow, or a later question. Looked at are the whole text and, since most prompts have the
        end of a template or a question mark, the places of ids that learned prompts end with: the last `PLACES`.
        """
        always = self.everywhere.intersection(experts)
        known = {name: self.experts[name] for name in experts if name in self.experts and name not in always}
        if not known or not ids:
            return frozenset(always)
        closing = set().union(*(own.closing for own in known.values()))
        ends = [*[end for end, token in enumerate(ids[:-1], 1) if token in closing][-PLACES:], len(ids)]
        described = self.describe(ids, ends)
        return frozenset(always | {name for name, own in known.items()
                                   if float(own.distances(described).min()) <= own.radius})

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and lower Cholesky factor `[D, D]` of the covariance of the embedding matrix, float32."""
        size, width = self._weight.shape
        rows = torch.linspace(0, size - 1, min(size, _ROWS * width)).long()
        chosen = self._weight[rows.to(self._weight.device)].float()
        mean = chosen.mean(0)
        covariance = ((chosen - mean).T @ (chosen - mean) / len(chosen)).cpu().double()
        ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        factor = torch.linalg.cholesky(covariance + ridge * torch.eye(width, dtype=torch.float64))
        return mean.cpu(), factor.float()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values); counts and distances are those in use."""
        names = sorted(self.experts)
        tensors = {}
        for number, name in enumerate(names):
            own = self.experts[name]
            parts = {"rows": own.rows.half(), "counts": own.counts, "nearest": own.nearest}
            tensors.update({f"{number}.{part}": tensor for part, tensor in parts.items()})
        closing = [sorted(self.experts[name].closing) for name in names]
        return tensors, {"experts": names, "closing": closing, "everywhere": sorted(self.everywhere)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become what `state_dict` gave.

        Raises:
            ValueError: it is of a model of another width. Nothing changed.
        """
        experts = {}
        for number, (name, closing) in enumerate(zip(meta["experts"], meta["closing"], strict=True)):
            own = Prompts(2 * self._weight.shape[1])
            rows, counts, nearest = (tensors[f"{number}.{part}"] for part in ("rows", "counts", "nearest"))
            if rows.shape[1:] != own.rows.shape[1:] or not len(rows) == len(counts) == len(nearest):
                raise ValueError(f"the saved prompts of {name!r} are {tuple(rows.shape)}, "
                                 f"expected [n, {own.rows.shape[1]}]")
            own.rows, own.counts, own.nearest = rows.float(), counts.clone(), nearest.clone()
            own.closing = set(closing)
            experts[name] = own
        self.experts, self.everywhere = experts, set(meta["everywhere"])
