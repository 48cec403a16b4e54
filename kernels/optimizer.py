"""SGD and Adam in Triton, on the sum of K2's parts: the first half of K3. The gradient itself is never stored.

A slab is flat: all A first, all B after them. What Adam relates to the size of the gradients (its eps) it takes from
the A and from the B apart, as `reference.adam_` does when it is called for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.kernels.configs import config_for
from ogpstream.kernels.device_update import adam_kernel, moments_kernel, sgd_kernel, sum_kernel
from ogpstream.kernels.launch import (
    HALF_OR_SINGLE,
    cdiv,
    launch,
    power_of_two,
    require,
    require_rows,
    unit_of,
    written,
)

# programs that sum v over one part of a slab: each program of the next launch adds up all of their sums
_SUMS = 512


@dataclass(frozen=True)
class Sgd:
    """`w -= lr (g + weight_decay w)`, see `reference.sgd_`."""

    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Adam:
    """One step of AdamW with a relative eps, see `reference.adam_`. The moments `[numel]` are changed in place."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0


def sum_splits(parts: Tensor) -> Tensor:
    """The sum `[numel]` of parts `[S, numel]`, float32, in one launch; a view of the only part where S is 1."""
    S, numel = parts.shape
    if S == 1:
        return parts[0]
    out = torch.empty(numel, dtype=torch.float32, device=parts.device)
    block = config_for(parts.device).elements
    launch(
        sum_kernel, (cdiv(numel, block),), parts,
        parts, out, numel, S, parts.stride(0), S=power_of_two(S), BLOCK=block,
    )  # fmt: skip
    return out


def step_(
    w: Tensor,
    parts: Tensor,
    rule: Sgd | Adam,
    *,
    first: int | None = None,
    serving: Tensor | None = None,
    serve_from: int = 0,
) -> None:
    """One optimizer step on a flat slab in place, its gradient the sum of parts: one launch for SGD, two for Adam.

    Args:
        w: masters `[numel]`, float32, contiguous.
        parts: `[S, numel]`, from one sample or several; S sums are made per element and nowhere stored.
        first: where the second part of the slab begins, of which Adam takes its rms apart; numel if not given.
        serving: `[numel]` in a serving dtype; elements from serve_from on are also written there.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    numel = w.numel()
    require_rows("w", w, numel, dtypes=(torch.float32,))
    require(parts.dim() == 2, f"parts has shape {list(parts.shape)}, needs 2 dimensions")
    require_rows("parts", parts, len(parts), numel, dtypes=HALF_OR_SINGLE)
    require(len(parts) > 0, "parts holds no part: give those of at least one sample")
    if serving is not None:
        require_rows("serving", serving, numel, dtypes=HALF_OR_SINGLE)
    first = numel if first is None else first
    block, S = config_for(w.device).elements, len(parts)
    unit = unit_of(numel, first, serve_from)
    source = dict(S=power_of_two(S), UNIT=unit, BLOCK=block)
    decay = 1.0 - rule.lr * rule.weight_decay
    if isinstance(rule, Sgd):
        launch(
            sgd_kernel, (cdiv(numel, block),), w,
            w, parts, serving, numel, serve_from // unit, S, parts.stride(0), float(rule.lr), decay, **source,
        )  # fmt: skip
        written(w, serving)
        return
    for name, moment in (("exp_avg", rule.exp_avg), ("exp_avg_sq", rule.exp_avg_sq)):
        require_rows(name, moment, numel, dtypes=(torch.float32,))
    blocks = [cdiv(n, block) for n in (first, numel - first)]
    steps = power_of_two(cdiv(max(blocks), _SUMS))
    programs = [cdiv(n, steps) for n in blocks]
    sums = torch.empty(sum(programs), dtype=torch.float32, device=w.device)
    beta1, beta2 = rule.betas
    launch(
        moments_kernel, (sum(programs),), w,
        parts, rule.exp_avg, rule.exp_avg_sq, sums, numel // unit, first // unit, programs[0], S, parts.stride(0),
        float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, STEPS=steps, **source,
    )  # fmt: skip
    launch(
        adam_kernel, (sum(blocks),), w,
        w, rule.exp_avg, rule.exp_avg_sq, sums, serving, numel // unit, first // unit, blocks[0], programs[0],
        sum(programs), serve_from // unit, float(rule.lr), decay, float(rule.eps),
        1.0 - beta1**rule.step, 1.0 - beta2**rule.step,
        SUMS=_SUMS, UNIT=unit, BLOCK=block,
    )  # fmt: skip
    written(w, rule.exp_avg, rule.exp_avg_sq, serving)


def sgd_(w: Tensor, g: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
    """`reference.sgd_` for contiguous float32 masters, in one launch.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    step_(_flat("w", w), _flat("g", g)[None], Sgd(lr, weight_decay))


def adam_(
    w: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """`reference.adam_` for contiguous float32 masters and moments, in two launches.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    rule = Adam(_flat("exp_avg", exp_avg), _flat("exp_avg_sq", exp_avg_sq), step, lr, betas, eps, weight_decay)
    step_(_flat("w", w), _flat("g", g)[None], rule)


def _flat(name: str, tensor: Tensor) -> Tensor:
    require(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}, needs to be contiguous")
    return tensor.view(-1)
