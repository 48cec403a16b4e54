"""The Triton kernels behind `dispatch`, and their compilation at start.

The launchers are strict about strides and dtypes; here what autograd hands over (a transposed or expanded gradient, a
scale in another dtype) is copied into the form they take, which costs nothing for a tensor that has it already.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ogpstream.kernels import cross_entropy as _cross_entropy
from ogpstream.kernels import lora_backward as _lora
from ogpstream.kernels import projection as _projection
from ogpstream.kernels.dispatch import Backend
from ogpstream.kernels.optimizer import adam_, sgd_


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def lora_forward(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.lora_forward` with the products in x's dtype; h is float32."""
    return _lora.lora_forward(_rows(x), A, B, scale.float())


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
    """`reference.lora_backward` with the products in x's dtype; dA and dB are float32."""
    h = None if h is None else h.float().contiguous()
    base_dx = None if base_dx is None else _rows(base_dx)
    return _lora.lora_backward(
        _rows(x), _rows(g.to(x.dtype)), A, B, scale.float(), trained=trained, h=h, base_dx=base_dx
    )


def project_out_(Z: Tensor, rows: Tensor, *, chunk: int = 32, weights: Tensor | None = None) -> Tensor:
    """`reference.project_out_` for a float32 Z; rows in host memory are streamed through two device buffers."""
    return _projection.project_out_(Z, rows.float(), chunk=chunk, weights=weights)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.cross_entropy`, in float32 inside."""
    return _cross_entropy.cross_entropy(_rows(logits), target)


def warm_up(
    shapes: Iterable[tuple[int, int, int, slice]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = 1024,
    vocabulary: int | None = None,
) -> None:
    """Compile every kernel that updates of a model will need, so that none is compiled inside an update.

    One call at start, seconds for each new shape; Triton keeps the results on disk. Samples of all lengths up to
    `tokens` share their kernels.

    Args:
        shapes: (D_in, D_out, R, trained) of the adapted linears.
        dtype: of x and g.
        vocabulary: of the logits; their kernel is left out if not given.
    """
    for D_in, D_out, R, trained in sorted(set((a, b, c, (d.start, d.stop)) for a, b, c, d in shapes)):
        # as the learner stores them: factors in the serving dtype, contiguous, in 16-byte steps
        A, B = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((D_in, R), (R, D_out)))
        scale = torch.ones(R, device=device)
        lengths = {_length(splits, tokens, A) for splits in _powers(_lora.token_splits(tokens, A))}
        for T in sorted(lengths):
            x, g = (torch.zeros(T, D, dtype=dtype, device=device) for D in (D_in, D_out))
            _, h = lora_forward(x, A, B, scale)
            for base_dx in (None, x):
                lora_backward(x, g, A, B, scale, trained=slice(*trained), h=h, base_dx=base_dx)
        rank = trained[1] - trained[0]
        if rank:
            master = torch.zeros(D_in, rank, device=device)
            project_out_(master, torch.zeros(_projection.CHUNK, D_in, device=device))
            sgd_(master, master, lr=0.0)
            adam_(master, master, master.clone(), master.clone(), step=1, lr=0.0, betas=(0.0, 0.0), eps=0.0)
    if vocabulary is not None:
        logits = torch.zeros(1, vocabulary, dtype=dtype, device=device)
        cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device))


def _powers(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length() + 1)]


def _length(splits: int, tokens: int, like: Tensor) -> int:
    """The longest sample, up to `tokens`, that K2 splits no further than this."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _lora.token_splits(middle, like) <= splits else (low, middle - 1)
    return low


BACKEND = Backend(
    name="triton",
    lora_forward=lora_forward,
    lora_backward=lora_backward,
    project_out_=project_out_,
    sgd_=sgd_,
    adam_=adam_,
    cross_entropy=cross_entropy,
)
