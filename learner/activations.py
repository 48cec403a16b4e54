"""What a step keeps between its forward and its backward: the policies, their predicted peaks, and the choice.

With L layers, T tokens, and n supervised rows whose logits exist at once, in bytes:

    P(T)            what the layers are given: embeddings, rotary tables, masks
    H(T)            one hidden state `[1, T, D]`
    g(T), f(T)      what a layer's graph holds, its output included, and the peak of the forward that makes it
    b(T)            the peak of one layer's forward and backward, graph and outgoing gradient included
    q(n)            the peak of one chunk of the loss

    keep       P + sum(g) + max(f - g, H + q, H + b - g)
    every k    P + max((N - 1 + [(L - 1) mod k > 0]) H + f, (N + 1) H + q, (S + 1) H + b)
    offload    P + max(H + f, 2 H + q, 2 H + b)

N = ceil(L / k) inputs are stored, the first of them in P. S is the number of inputs alive beside it when a segment is
walked backward: N - 1 stored ones and those of the last segment, or one less and those of a whole one. Hidden states
that were offloaded are in host RAM and do not count.

Where only the top layers are trained, L is their number, and the first of their inputs is one H more than P, but for
those that were offloaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["keep", "every", "offload"]


@dataclass(frozen=True)
class ActivationPlan:
    """How one sample's activations are kept.

    Attributes:
        policy: "keep" every layer's graph, so that nothing is computed twice; "every" k-th layer's input, from which
            the segment is computed again; "offload" every layer's input to host RAM.
        every: k.
        peak_bytes: predicted peak of the activations on the model's device.
    """

    policy: Policy
    every: int
    peak_bytes: int

    def __str__(self) -> str:
        return f"every {self.every}" if self.policy == "every" else self.policy


@dataclass(frozen=True)
class Curve:
    """A polynomial through measured points (tokens or rows, bytes): three points carry attention's square term."""

    points: tuple[tuple[int, int], ...]

    def __call__(self, at: int) -> float:
        """Bytes at this many tokens or rows, by Lagrange's formula."""
        return sum(y * math.prod((at - u) / (x - u) for u, _ in self.points if u != x) for x, y in self.points)


@dataclass(frozen=True)
class LayerCost:
    """g, f and b of `count` layers that are alike."""

    count: int
    graph: Curve
    forward: Curve
    backward: Curve


@dataclass(frozen=True)
class Footprint:
    """The terms of the formulas above for one model.

    Attributes:
        fixed: P.
        hidden: bytes of one token's hidden state, H / T.
        layers: g, f and b, by kinds of layers.
        loss: q, of rows.
        chunk: most rows whose logits exist at once.
    """

    fixed: Curve
    hidden: int
    layers: tuple[LayerCost, ...]
    loss: Curve
    chunk: int

    def plans(self, tokens: int, rows: int, *, host: bool, layers: int | None = None) -> list[ActivationPlan]:
        """Every policy for a sample of `tokens` ids, `rows` of them supervised, the cheapest in time first.

        Args:
            layers: how many of the top layers are trained; None is all. They count as the largest kind.
            host: whether host RAM is another memory than the model's: there a copy (80 us for 4 MiB over a bus of
                50 GB/s) costs less than computing a layer a second time, and without it saves nothing.
        """
        H, q = tokens * self.hidden, self.loss(min(rows, self.chunk))
        kinds = [(k.count, k.graph(tokens), k.forward(tokens), k.backward(tokens)) for k in self.layers]
        depth = sum(count for count, *_ in kinds)
        L = depth if layers is None else min(layers, depth)
        entry = H if L < depth else 0
        f, b = max(f for *_, f, _ in kinds), max(b for *_, b in kinds)

        def plan(policy: Policy, every: int, scratch: float) -> ActivationPlan:
            return ActivationPlan(policy, every, round(self.fixed(tokens) + scratch))

        def segments(k: int) -> ActivationPlan:
            N = -(-L // k)
            S = max(N - 1 + (L - 1) % k, N - 2 + k - 1 if N > 1 else 0)
            return plan("every", k, entry + max((N - 1 + ((L - 1) % k > 0)) * H + f, (N + 1) * H + q, (S + 1) * H + b))

        graphs = min(sum(count * g for count, g, _, _ in kinds), L * max(g for _, g, _, _ in kinds))
        keep = plan("keep", 1, entry + graphs + max(H + q, *(max(f - g, H + b - g) for _, g, f, b in kinds)))
        offload = [plan("offload", 1, max(H + f, 2 * H + q, 2 * H + b))] if host else []
        # with k over sqrt(L) the segment's own inputs outgrow what is saved between segments
        return [keep, segments(1), *offload, *map(segments, range(2, math.isqrt(L - 1) + 2))]


def choose(plans: Sequence[ActivationPlan], budget: int) -> ActivationPlan:
    """The first plan whose peak is within `budget` bytes; where none is, the one with the least peak."""
    return next((plan for plan in plans if plan.peak_bytes <= budget), min(plans, key=lambda plan: plan.peak_bytes))
