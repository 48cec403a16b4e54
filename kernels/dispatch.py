"""The operations of one update under one name each: the arguments are checked here, a backend computes.

Which backend, says the environment variable OGPSTREAM_BACKEND, read at every call:

    auto         (default) on a CUDA device triton, or cublas for what `configs.CUBLAS` says of that card, and where
                 triton is not installed; elsewhere, and in float64, the reference
    reference    plain torch, everywhere
    triton       the Triton kernels. Host tensors, of which a learner on a GPU has some, they take only where
                 TRITON_INTERPRET=1 was set from the start of the process; else the reference computes with these
    cublas       hand-written cuBLAS calls; on a CPU the same calls of its BLAS

A backend is imported when it is first asked for: importing this module needs torch alone.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.kernels import reference
from ogpstream.kernels.configs import CHUNK, CUBLAS, capability

ENV = "OGPSTREAM_BACKEND"
# each has its Backend under the name BACKEND
_MODULES = {"cublas": "ogpstream.kernels.cublas_backend", "triton": "ogpstream.kernels.triton_backend"}


@dataclass(frozen=True)
class Backend:
    """One implementation of all operations; signatures and meaning are those of `kernels.reference`.

    Attributes:
        on_host: it computes with tensors in host memory; where it does not, the reference does.
        lora_backward_samples: None where it calls `lora_backward` for each sample.
    """

    name: str
    lora_forward: Callable[..., tuple[Tensor, Tensor]]
    lora_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    project_out_: Callable[..., Tensor]
    sgd_: Callable[..., None]
    adam_: Callable[..., None]
    cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    on_host: bool = True
    lora_backward_samples: Callable[..., tuple[list[tuple[Tensor, Tensor]], Tensor]] | None = None


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend available under its name; a name can be taken once (ValueError)."""
    if backend.name in _backends:
        raise ValueError(f"backend {backend.name!r} is registered already: give this one another name")
    _backends[backend.name] = backend


register_backend(
    Backend(
        name="reference",
        lora_forward=reference.lora_forward,
        lora_backward=reference.lora_backward,
        project_out_=reference.project_out_,
        sgd_=reference.sgd_,
        adam_=reference.adam_,
        cross_entropy=reference.cross_entropy,
        lora_backward_samples=reference.lora_backward_samples,
    )
)


def backend_for(tensor: Tensor, operation: str) -> Backend:
    """The backend that does this operation with this tensor; ValueError when OGPSTREAM_BACKEND names none there is."""
    choice = os.environ.get(ENV) or "auto"
    if choice == "auto":
        if not tensor.is_cuda or tensor.dtype == torch.float64:
            choice = "reference"
        else:
            instead = operation in CUBLAS.get(capability(tensor.device) or (0, 0), ())
            choice = "cublas" if instead or _backend("triton") is None else "triton"
    backend = _backend(choice)
    if backend is None:
        known = ", ".join(["auto", *sorted({*_backends, *_MODULES} - {choice})])
        raise ValueError(f"{ENV}={choice}: there is no such backend here, set it to one of: {known}")
    # a tensor without memory ("meta") stands for a device's
    return backend if backend.on_host or tensor.device.type != "cpu" else _backends["reference"]


def _backend(name: str) -> Backend | None:
    if name not in _backends and name in _MODULES:
        try:
            register_backend(importlib.import_module(_MODULES[name]).BACKEND)
        except ModuleNotFoundError as error:
            # triton exists for Linux only; anything else that is missing is a fault
            if error.name != "triton":
                raise
    return _backends.get(name)


def lora_forward(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h = (x A) * scale ; y = onto + h B`, returned as (y, h): see `reference.lora_forward`."""
    _check_factors(x, A, B, scale)
    if onto is not None:
        _check_shape("onto", onto, len(x), B.shape[1])
    return backend_for(x, "lora_forward").lora_forward(x, A, B, scale, onto=onto)


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
    """dA, dB of the trained columns, and dx: see `reference.lora_backward`."""
    _check_backward(x, g, A, B, scale, trained, h, base_dx)
    return backend_for(x, "lora_backward").lora_backward(x, g, A, B, scale, trained=trained, h=h, base_dx=base_dx)


def lora_backward_samples(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    samples: int,
    *,
    trained: slice,
    h: Tensor,
    base_dx: Tensor,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(dA, dB) of each of several samples, and dx of all: see `reference.lora_backward_samples`."""
    _check_backward(x, g, A, B, scale, trained, h, base_dx)
    if samples < 1 or len(x) % samples:
        raise ValueError(f"samples is {samples}, needs a number that divides the {len(x)} rows of x")
    backend = backend_for(x, "lora_backward")
    if backend.lora_backward_samples is not None:
        return backend.lora_backward_samples(x, g, A, B, scale, samples, trained=trained, h=h, base_dx=base_dx)
    parts, dxs = [], []
    for x_n, g_n, h_n, base_n in zip(*(t.tensor_split(samples) for t in (x, g, h, base_dx)), strict=True):
        dA, dB, dx = backend.lora_backward(x_n, g_n, A, B, scale, trained=trained, h=h_n, base_dx=base_n)
        parts.append((dA, dB))
        dxs.append(dx)
    return parts, dxs[0] if samples == 1 else torch.cat(dxs)


def project_out_(Z: Tensor, rows: Tensor, *, chunk: int = CHUNK, weights: Tensor | None = None) -> Tensor:
    """`Z -= P_c (w_c * P_c.T Z)` in place, chunk after chunk; returns the coefficients: see `reference`."""
    _check_master("Z", Z)
    D, _ = _check_matrix("Z", Z)
    M, _ = _check_matrix("rows", rows)
    _check_shape("rows", rows, M, D)
    if weights is not None:
        _check_shape("weights", weights, M)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, needs at least 1 direction")
    return backend_for(Z, "project_out_").project_out_(Z, rows, chunk=chunk, weights=weights)


def sgd_(w: Tensor, g: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
    """`w -= lr (g + weight_decay w)` in place: see `reference.sgd_`."""
    _check_master("w", w)
    _check_shape("g", g, *w.shape)
    backend_for(w, "sgd_").sgd_(w, g, lr=lr, weight_decay=weight_decay)


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
    """One AdamW step in place, eps relative to the size of the gradients: see `reference.adam_`."""
    for name, tensor in (("w", w), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_master(name, tensor)
        _check_shape(name, tensor, *w.shape)
        if tensor.dtype != w.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, needs the dtype of w, {w.dtype}")
    _check_shape("g", g, *w.shape)
    if step < 1:
        raise ValueError(f"step is {step}, the first step is 1")
    backend_for(w, "adam_").adam_(
        w, g, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss_sum, dlogits = softmax - onehot) of a chunk of rows: see `reference.cross_entropy`."""
    n, _ = _check_matrix("logits", logits)
    _check_shape("target", target, n)
    return backend_for(logits, "cross_entropy").cross_entropy(logits, target)


def _check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, needs 2 dimensions")
    return tensor.shape[0], tensor.shape[1]


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, needs {list(shape)}")


def _check_factors(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> None:
    _, D_in = _check_matrix("x", x)
    R, _ = _check_matrix("B", B)
    _check_shape("A", A, D_in, R)
    _check_shape("scale", scale, R)


def _check_backward(
    x: Tensor, g: Tensor, A: Tensor, B: Tensor, scale: Tensor, trained: slice, h: Tensor | None, base_dx: Tensor | None
) -> None:
    _check_factors(x, A, B, scale)
    (T, D_in), (R, D_out) = x.shape, B.shape
    _check_shape("g", g, T, D_out)
    if h is not None:
        _check_shape("h", h, T, R)
    if base_dx is not None:
        _check_shape("base_dx", base_dx, T, D_in)
    start, stop, stride = trained.start, trained.stop, trained.step or 1
    if start is None or stop is None or stride != 1 or not 0 <= start <= stop <= R:
        raise ValueError(f"trained is {trained}, needs slice(start, stop) within the {R} columns of A")


def _check_master(name: str, tensor: Tensor) -> None:
    # in place in bf16 at a learning rate of 1e-4, 0.12 % of the elements would change at all
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}, needs float32 or float64: it is updated in place")
