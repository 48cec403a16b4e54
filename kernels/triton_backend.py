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
from ogpstream.kernels.launch import power_of_two
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
    blocks: Iterable[tuple[int, int]] = (),
    numels: Iterable[int] = (),
    vocabulary: int | None = None,
) -> None:
    """Launch every kernel that updates of a model will need once, so that none is compiled inside an update.

    One call at start; Triton keeps what it compiled on disk. Samples of all lengths up to `tokens` share a few kernels.

    Args:
        shapes: (D_in, D_out, R, trained) of the adapted linears.
        dtype: of x, g and the factors that are served.
        blocks: (D_in, K) of the matrices that are projected.
        numels: sizes of the flat tensors that an optimizer steps.
        vocabulary: of the logits; their kernel is left out if not given.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    for D_in, D_out, R, start, stop in sorted({(*sizes, own.start, own.stop) for *sizes, own in shapes}):
        A, B, scale = zeros(D_in, R, dtype=dtype), zeros(R, D_out, dtype=dtype), zeros(R)
        # steps and sums of splits come in powers of two, and no tile is shorter than 16 tokens
        for T in (16 << k for k in range(power_of_two(tokens, least=16).bit_length() - 4)):
            x, g = zeros(T, D_in, dtype=dtype), zeros(T, D_out, dtype=dtype)
            _, h = lora_forward(x, A, B, scale)
            for base_dx in (None, x):
                lora_backward(x, g, A, B, scale, trained=slice(start, stop), h=h, base_dx=base_dx)
    for D_in, K in sorted(set(blocks)):
        project_out_(zeros(D_in, K), zeros(_projection.CHUNK, D_in))
    for numel in sorted(set(numels)):
        w, g, m, v = (zeros(numel) for _ in range(4))
        sgd_(w, g, lr=0.0)
        adam_(w, g, m, v, step=1, lr=0.0, betas=(0.0, 0.0), eps=0.0)
    if vocabulary is not None:
        cross_entropy(zeros(1, vocabulary, dtype=dtype), zeros(1, dtype=torch.int64))


BACKEND = Backend(
    name="triton",
    lora_forward=lora_forward,
    lora_backward=lora_backward,
    project_out_=project_out_,
    sgd_=sgd_,
    adam_=adam_,
    cross_entropy=cross_entropy,
)
