"""The Triton kernels behind `dispatch`.

The launchers are strict about strides and dtypes; here what autograd hands over (a transposed or expanded gradient, a
scale in another dtype) is copied into the form they take, which costs nothing for a tensor that has it already.
"""

from __future__ import annotations

from torch import Tensor

from ogpstream.kernels import cross_entropy as _cross_entropy
from ogpstream.kernels import lora_backward as _lora
from ogpstream.kernels import projection as _projection
from ogpstream.kernels.configs import CHUNK
from ogpstream.kernels.dispatch import Backend
from ogpstream.kernels.launch import INTERPRETED
from ogpstream.kernels.optimizer import adam_, sgd_


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def lora_forward(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.lora_forward` with the products in x's dtype; h is float32."""
    # of another dtype where autocast made it
    fits = onto is None or onto.dtype == x.dtype and _rows(onto) is onto
    y, h = _lora.lora_forward(_rows(x), A, B, scale.float(), onto=onto if fits else None)
    return y if onto is None or fits else onto.add_(y), h


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


def project_out_(Z: Tensor, rows: Tensor, *, chunk: int = CHUNK, weights: Tensor | None = None) -> Tensor:
    """`reference.project_out_` for a float32 Z; rows in host memory are streamed through two device buffers."""
    return _projection.project_out_(Z, rows.float(), chunk=chunk, weights=weights)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.cross_entropy`, in float32 inside."""
    return _cross_entropy.cross_entropy(_rows(logits), target)


BACKEND = Backend(
    name="triton",
    lora_forward=lora_forward,
    lora_backward=lora_backward,
    project_out_=project_out_,
    sgd_=sgd_,
    adam_=adam_,
    cross_entropy=cross_entropy,
    on_host=INTERPRETED,
)
