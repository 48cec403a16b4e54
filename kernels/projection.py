"""Projection out of span(P) in Triton, float32 throughout: the second half of K3.

Per chunk of the basis two launches: coefficients, then removal. An orthonormal basis on the device may be one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ogpstream.kernels.basis_stream import BasisStream
from ogpstream.kernels.configs import CHUNK, config_for
from ogpstream.kernels.device_update import coefficients_kernel, removal_kernel
from ogpstream.kernels.launch import (
    HALF_OR_SINGLE,
    cdiv,
    launch,
    power_of_two,
    require,
    require_rows,
    written,
)


def project_out_(
    Z: Tensor,
    rows: Tensor | BasisStream,
    *,
    chunk: int = CHUNK,
    weights: Tensor | None = None,
    serving: Tensor | None = None,
) -> Tensor:
    """`Z -= P_c (w_c * P_c.T Z)` in place, chunk after chunk, two launches each.

    Args:
        Z: `[D, K]`, float32, rows contiguous: a block of a slab will do.
        rows: P.T `[M, D]`, float32. On Z's device it is used where it lies; from elsewhere it comes through a
            `BasisStream`. A stream begun earlier may be given: the basis whose turn it is, in chunks of the stream.
        chunk: directions at a time, all from the same Z. M means two launches in all, for a basis on Z's device.
        weights: `[M]`, the share of each direction to remove; all of it when not given.
        serving: `[D, K]` in a serving dtype, where the finished Z goes too.

    Returns:
        coef `[M, K]`, float32: what Z had along each direction when its chunk came.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    require(Z.dim() == 2, f"Z has shape {list(Z.shape)}, needs 2 dimensions")
    D, K = Z.shape
    if isinstance(rows, Tensor) and rows.device != Z.device:
        rows = BasisStream([rows], Z.device, chunk)
    stored = rows.rows if isinstance(rows, BasisStream) else rows
    M = len(stored)
    require_rows("Z", Z, D, K, dtypes=(torch.float32,))
    require_rows("rows", stored, M, D, dtypes=(torch.float32,))
    require(chunk >= 1, f"chunk is {chunk}, needs at least 1 direction")
    if weights is not None:
        require_rows("weights", weights, M)
        weights = weights.to(Z.device, torch.float32)
    if serving is not None:
        require_rows("serving", serving, D, K, dtypes=HALF_OR_SINGLE)
    chunks: Iterable[tuple[int, Tensor]]
    if isinstance(rows, BasisStream):
        chunks, chunk = rows.chunks(), rows.chunk
    else:
        chunks = ((start, stored[start : start + chunk]) for start in range(0, M, chunk))
    coef = torch.empty(M, K, dtype=torch.float32, device=Z.device)
    if M == 0 and serving is not None:
        serving.copy_(Z)
    sums, removal = config_for(Z.device).coefficients, config_for(Z.device).removal
    steps = min(sums.steps, power_of_two(cdiv(D, sums.width)))
    splits = cdiv(D, sums.width * steps)
    parts = torch.empty(splits, min(chunk, M), K, dtype=torch.float32, device=Z.device)
    for start, here in chunks:
        m, own = len(here), slice(start, start + len(here))
        launch(
            coefficients_kernel, (cdiv(K, sums.tokens), cdiv(m, CHUNK), splits), Z,
            Z, here, parts, K, m, Z.stride(0), here.stride(0), D=D, STEPS=steps,
            BM=CHUNK, BD=sums.width, BK=sums.tokens, num_warps=sums.warps, num_stages=sums.stages,
        )  # fmt: skip
        finished = serving if own.stop == M else None
        launch(
            removal_kernel, (cdiv(D, removal.width), cdiv(K, removal.tokens)), Z,
            Z, here, parts, None if weights is None else weights[own], coef[own], finished,
            K, m, Z.stride(0), here.stride(0), 0 if finished is None else finished.stride(0),
            # a power of two, so that a basis that grows is not compiled for anew at each chunk
            D=D, PARTS=splits, CHUNKS=power_of_two(cdiv(m, CHUNK)),
            BM=CHUNK, BD=removal.width, BK=removal.tokens, num_warps=removal.warps, num_stages=removal.stages,
        )  # fmt: skip
    written(Z, serving)
    return coef
