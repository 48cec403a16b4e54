"""LoRA of one adapted linear in Triton: launchers of K1, the expansion and K2, and the autograd function.

Launchers check what they are given, name what is wrong, and allocate every buffer by `torch.empty`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ogpstream.kernels.configs import Config, config_for
from ogpstream.kernels.device_lora import expand_kernel, gradient_kernel, shrink_kernel
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
from ogpstream.kernels.optimizer import sum_splits

_SINGLE = (torch.float32,)


def lora_forward(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h = (x A) * scale ; y = onto + h B` in two launches.

    Args:
        x: `[T, D_in]` in float32, bfloat16 or float16, rows contiguous. The products are in this dtype.
        A: `[D_in, R]`, B: `[R, D_out]` in any of these dtypes and with any strides.
        scale: `[R]`.
        onto: `[T, D_out]` in x's dtype, rows contiguous, which becomes y in place; zero and a new tensor if not given.

    Returns:
        y `[T, D_out]` in x's dtype, h `[T, R]` in float32.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    T, D_in, D_out, R = _check(x, A, B, scale)
    if onto is not None:
        require_rows("onto", onto, T, D_out, dtypes=(x.dtype,))
    y = torch.empty(T, D_out, dtype=x.dtype, device=x.device) if onto is None else onto
    h = torch.empty(T, R, dtype=torch.float32, device=x.device)
    if R == 0:
        return y.zero_() if onto is None else y, h
    parts, _ = _shrink(x, None, A, B, scale)
    config = config_for(x.device)
    tile = config.lora(x.dtype).expand
    launch(
        expand_kernel, (cdiv(T, tile.tokens), cdiv(D_out, tile.width)), x,
        parts, B, onto, y, h, T, *B.stride(), 0 if onto is None else onto.stride(0), y.stride(0),
        D_OUT=D_out, R=R, PARTS=len(parts), BT=tile.tokens, BD=tile.width, BR=_rank_block(config, R),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    written(onto)
    return y, h


def token_splits(T: int, x: Tensor) -> int:
    """How many parts K2 leaves of dA and dB for a sample of T tokens with inputs like x."""
    tile = config_for(x.device).lora(x.dtype).gradient
    return max(1, cdiv(T, tile.tokens * tile.steps))


def lora_backward_parts(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    *,
    trained: slice,
    dA: Tensor,
    dB: Tensor,
    h: Tensor | None = None,
    base_dx: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """K1 and K2: two launches that leave dA and dB as parts, to be summed by whoever uses them.

        Y = (g B.T) * scale ; sum_s dA[s] = x.T Y[:, trained] ; sum_s dB[s] = h[:, trained].T g
        dx = base_dx + Y A.T

    Args:
        x, g, A, B, scale, trained, h, base_dx: as for `reference.lora_backward`; g in x's dtype.
        dA: `[S, D_in, r]`, dB: `[S, r, D_out]`, float32, S = `token_splits(T, x)`; every element is written. Views of
            a flat slab will do: only the last dimension must be contiguous.
        dx: where dx goes, `[T, D_in]` in x's dtype; may be base_dx itself. A new tensor if not given.

    Returns:
        dx.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    T, D_in, D_out, R = _check(x, A, B, scale)
    require(0 <= trained.start <= trained.stop <= R, f"trained is {trained}, needs to lie within the {R} columns of A")
    rank = trained.stop - trained.start
    splits = token_splits(T, x)
    require_rows("g", g, T, D_out, dtypes=(x.dtype,))
    require_rows("dA", dA, splits, D_in, rank, dtypes=_SINGLE)
    require_rows("dB", dB, splits, rank, D_out, dtypes=_SINGLE)
    if base_dx is not None:
        require_rows("base_dx", base_dx, T, D_in, dtypes=HALF_OR_SINGLE)
    if h is not None:
        require_rows("h", h, T, R, dtypes=_SINGLE)
        require(h.is_contiguous(), f"h has strides {h.stride()}, needs a contiguous matrix")
    if dx is None:
        dx = torch.empty(T, D_in, dtype=x.dtype, device=x.device)
    require_rows("dx", dx, T, D_in, dtypes=(x.dtype,))
    if R == 0:
        dx.zero_() if base_dx is None else dx.copy_(base_dx)
        return dx
    parts_h, parts_y = _shrink(x if h is None and rank else None, g, A, B, scale)
    h = parts_h if h is None else h[None]
    config = config_for(x.device)
    tile, rank_block = config.lora(x.dtype).gradient, _rank_block(config, rank)
    blocks_in, blocks_out = cdiv(D_in, tile.width), cdiv(D_out, tile.width)
    blocks = 2 * blocks_in + blocks_out if rank else blocks_in
    # a float32 tile has two elements a thread, nothing to load wider, and ptxas then spills 8 bytes
    unit = 1 if x.dtype == torch.float32 else unit_of(trained.start, R)
    # no more steps than a short sample has, in powers of two: four kernels serve all lengths
    steps = min(tile.steps, power_of_two(cdiv(T, tile.tokens)))
    launch(
        gradient_kernel, (blocks, splits, max(1, cdiv(rank, rank_block))), x,
        x, g, A, h, parts_y, base_dx, dx, dA, dB, T, trained.start // unit,
        x.stride(0), g.stride(0), *A.stride(), 0 if base_dx is None else base_dx.stride(0), dx.stride(0),
        dA.stride(0), dA.stride(1), dB.stride(0), dB.stride(1),
        D_IN=D_in, D_OUT=D_out, R=R, RANK=rank, UNIT=unit, PARTS_H=max(1, len(h)), PARTS_Y=len(parts_y), STEPS=steps,
        BT=tile.tokens, BD=tile.width, BR=_rank_block(config, R), BK=rank_block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    written(dx, dA, dB)
    return dx


def lora_backward(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    *,
    trained: slice,
    h: Tensor | None = None,
    base_dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dA `[D_in, r]`, dB `[r, D_out]` in float32 and dx: K1, K2, and one launch that sums the parts of both.

    Arguments and errors as for `lora_backward_parts`, meaning as for `reference.lora_backward`.
    """
    rank, (D_in, D_out) = trained.stop - trained.start, (A.shape[0], B.shape[1])
    # dA and dB of one split lie side by side, so that one launch sums both
    parts = torch.empty(token_splits(len(x), x), rank * (D_in + D_out), dtype=torch.float32, device=x.device)
    dx = lora_backward_parts(
        x, g, A, B, scale, trained=trained, h=h, base_dx=base_dx,
        dA=parts[:, : rank * D_in].unflatten(1, (D_in, rank)), dB=parts[:, rank * D_in :].unflatten(1, (rank, D_out)),
    )  # fmt: skip
    both = sum_splits(parts)
    return both[: rank * D_in].view(D_in, rank), both[rank * D_in :].view(rank, D_out), dx


class LoraFunction(torch.autograd.Function):
    """`y = ((x A) * scale) B` for autograd; the gradients are those of `lora_backward`, bit for bit.

    A, B are `[D_in, R]` and `[R, D_out]`, x is `[T, D_in]`; each is float32, bfloat16 or float16, rows of x contiguous.
    scale is float32 `[R]` and a constant: it gets no gradient. y and the gradient of x have x's dtype, those of A and B
    theirs. K2 makes no dA and dB where neither A nor B wants a gradient; dx it makes always.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
        RuntimeError: x, A, B or scale was changed in place between the forward and the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        y, h = lora_forward(x, A, B, scale)
        ctx.save_for_backward(x, A, B, scale, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, A, B, scale, h = ctx.saved_tensors
        of_x, of_A, of_B, _ = ctx.needs_input_grad
        trained = slice(0, A.shape[1] if of_A or of_B else 0)
        dA, dB, dx = lora_backward(x, g.contiguous(), A, B, scale, trained=trained, h=h)
        return dx if of_x else None, dA.to(A.dtype) if of_A else None, dB.to(B.dtype) if of_B else None, None


def _shrink(
    x: Tensor | None, g: Tensor | None, A: Tensor, B: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """K1: parts of h `[S, T, R]` if x is given and of Y `[S', T, R]` if g is; what is not given has no parts."""
    some = x if x is not None else g
    assert some is not None
    (D_in, R), D_out, T = A.shape, B.shape[1], len(some)
    config = config_for(some.device)
    tile, rank_block = config.lora(some.dtype).shrink, _rank_block(config, R)
    steps = [min(tile.steps, power_of_two(cdiv(D, tile.width))) for D in (D_in, D_out)]
    splits = [
        0 if v is None else cdiv(D, tile.width * n) for v, D, n in zip((x, g), (D_in, D_out), steps, strict=True)
    ]
    h, Y = (torch.empty(S, T, R, dtype=torch.float32, device=A.device) for S in splits)
    # of a single column any stride is right; with a 1 and an odd width ptxas takes 16 bytes of stack on sm_90
    of_rank = (0, 0) if R == 1 else (A.stride(1), B.stride(0))
    launch(
        shrink_kernel, (cdiv(T, tile.tokens), cdiv(R, rank_block), sum(splits)), some,
        some if x is None else x, A, h, some if g is None else g, B, Y, scale, T,
        some.stride(0), A.stride(0), of_rank[0], some.stride(0) if g is None else g.stride(0), of_rank[1], B.stride(1),
        D_IN=D_in, D_OUT=D_out, R=R, SPLITS_IN=splits[0], STEPS_IN=steps[0], STEPS_OUT=steps[1],
        BT=tile.tokens, BD=tile.width, BR=rank_block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h, Y


def _check(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[int, int, int, int]:
    """T, D_in, D_out, R of operands that fit together."""
    for name, tensor in (("x", x), ("A", A), ("B", B)):
        require(tensor.dim() == 2, f"{name} has shape {list(tensor.shape)}, needs 2 dimensions")
    (T, D_in), (R, D_out) = x.shape, B.shape
    require_rows("x", x, T, D_in, dtypes=HALF_OR_SINGLE)
    require_rows("scale", scale, R, dtypes=_SINGLE)
    require(A.shape == (D_in, R), f"A has shape {list(A.shape)}, needs {[D_in, R]}")
    for name, tensor in (("A", A), ("B", B)):
        require(tensor.dtype in HALF_OR_SINGLE, f"{name} is {tensor.dtype}, needs one of float32, bfloat16, float16")
    return T, D_in, D_out, R


def _rank_block(config: Config, R: int) -> int:
    # 16: the K of the smallest product that tensor cores do; the interpreter would accept less
    return min(config.rank_block, power_of_two(R, least=16))
