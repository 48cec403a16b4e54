"""The operations by hand-written cuBLAS calls: what a good programmer does without a kernel of their own.

It is the baseline that Triton has to beat, and what `auto` takes where `configs.CUBLAS` says so.
The elementwise operations are those of `reference`: cuBLAS has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from ogpstream.kernels import reference
from ogpstream.kernels.basis_stream import BasisStream
from ogpstream.kernels.configs import CHUNK
from ogpstream.kernels.dispatch import Backend

# the setting is the process's: the first thread that needs it changes it, the last one gives it back
_lock = Lock()
_depth, _before = 0, ""


@contextmanager
def _ieee() -> Iterator[None]:
    """float32 products in float32, whatever the process allows: TF32 leaves 2.6e-4 of Z in span(P)."""
    global _depth, _before
    settings = torch.backends.cuda.matmul
    with _lock:
        if _depth == 0:
            _before, settings.fp32_precision = settings.fp32_precision, "ieee"
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                settings.fp32_precision = _before


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of operands in one dtype."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def lora_forward(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.lora_forward`; the products are in x's dtype, h is float32."""
    with _ieee():
        h = _mm(x, A.to(x.dtype)).mul_(scale)
        narrow, B = h.to(x.dtype), B.to(x.dtype)
        return narrow @ B if onto is None else onto.addmm_(narrow, B), h


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
    """`reference.lora_backward`; the products are in x's dtype, dA and dB are float32."""
    dtype, g = x.dtype, g.to(x.dtype)
    with _ieee():
        if h is None:
            h = _mm(x, A.to(dtype)).mul_(scale)
        Y = _mm(g, B.to(dtype).T).mul_(scale).to(dtype)
        dA = _mm(x.T, Y[:, trained])
        dB = _mm(h[:, trained].to(dtype).T, g)
        dx = Y @ A.to(dtype).T if base_dx is None else torch.addmm(base_dx.to(dtype), Y, A.to(dtype).T)
    return dA, dB, dx


def project_out_(Z: Tensor, rows: Tensor, *, chunk: int = CHUNK, weights: Tensor | None = None) -> Tensor:
    """`reference.project_out_` for a float32 Z: two calls a chunk; rows from the host come by a `BasisStream`."""
    rows = rows.to(Z.dtype)
    coef = torch.empty(len(rows), Z.shape[1], dtype=Z.dtype, device=Z.device)
    weights = None if weights is None else weights.to(Z.device, Z.dtype)
    chunks: Iterator[tuple[int, Tensor]]
    if rows.device == Z.device:
        chunks = ((start, rows[start : start + chunk]) for start in range(0, len(rows), chunk))
    else:
        chunks = BasisStream([rows.contiguous()], Z.device, chunk).chunks()
    with _ieee():
        for start, P_c in chunks:
            own = slice(start, start + len(P_c))
            removed = torch.mm(P_c, Z, out=coef[own])
            if weights is not None:
                removed = weights[own, None] * removed
            Z.addmm_(P_c.T, removed, alpha=-1)
    return coef


BACKEND = Backend(
    name="cublas",
    lora_forward=lora_forward,
    lora_backward=lora_backward,
    project_out_=project_out_,
    sgd_=reference.sgd_,
    adam_=reference.adam_,
    cross_entropy=reference.cross_entropy,
)
