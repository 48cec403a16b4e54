"""The Triton kernels behind `dispatch`, and their compilation at start.

The launchers are strict about strides and dtypes; here what autograd hands over (a transposed or expanded gradient, a
scale in another dtype) is copied into the form they take, which costs nothing for a tensor that has it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, product

import torch
from torch import Tensor

from ogpstream.kernels import cross_entropy as _cross_entropy
from ogpstream.kernels import lora_backward as _lora
from ogpstream.kernels import projection as _projection
from ogpstream.kernels.dispatch import Backend
from ogpstream.kernels.launch import INTERPRETED, power_of_two
from ogpstream.kernels.lora_update import Block, update_
from ogpstream.kernels.optimizer import Adam, Sgd, adam_, sgd_
from ogpstream.kernels.projection import CHUNK


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
    numel: int = 0,
    blocks: Sequence[tuple[int, int, int]] = (),
    samples: int = 1,
) -> None:
    """Launch every kernel that updates of a model will need once, so that none is compiled inside an update.

    One call at start; Triton keeps what it compiled on disk. Samples of all lengths up to `tokens` share a few kernels.
    Backward passes are those of an update, with h and base_dx given.

    Args:
        shapes: (D_in, D_out, R, trained) of the adapted linears.
        dtype: of x, g and the factors that are served.
        vocabulary: of the logits; their kernel is left out if not given.
        numel, blocks, samples: of the slab of masters on the device that `lora_backward_project` updates: its
            elements, (D_in, K, directions) of each block of A, and the most samples of an update. 0: there is none.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    # steps and sums of splits come in powers of two, and no tile is shorter than 16 tokens
    lengths = [16 << k for k in range(power_of_two(tokens, least=16).bit_length() - 4)]
    # columns that begin at a multiple of 4 are loaded in another way, and all else of where they begin is a number
    ways = {(*sizes, own.stop - own.start, own.start % 4): own.start for *sizes, own in shapes}
    for (D_in, D_out, R, rank, _), first in sorted(ways.items()):
        A, B, scale = zeros(D_in, R, dtype=dtype), zeros(R, D_out, dtype=dtype), zeros(R)
        trained = slice(first, first + rank)
        # the samples of a batch are rows of one tensor, and where they begin Triton compiles for the alignment
        for start in _alignments(D_in * dtype.itemsize, D_out * dtype.itemsize, R * 4):
            for T in lengths:
                x, g = (zeros(start + T, D, dtype=dtype)[start:] for D in (D_in, D_out))
                lora_backward(x, g, A, B, scale, trained=trained, h=zeros(start + T, R)[start:], base_dx=x)
            lora_forward(x, A, B, scale)
    if vocabulary is not None:
        for start in _alignments(vocabulary * dtype.itemsize):
            for first in (0, 1):  # targets are slices of ids, at any multiple of 8 bytes
                logits, target = zeros(start + 1, vocabulary, dtype=dtype), zeros(2, dtype=torch.int64)
                cross_entropy(logits[start:], target[first:][:1])
    if numel:
        most = samples * _lora.token_splits(tokens, zeros(0, dtype=dtype))
        _warm_up_update(zeros(numel), zeros(numel, dtype=dtype), blocks, power_of_two(most))


def _warm_up_update(slab: Tensor, serving: Tensor, blocks: Sequence[tuple[int, int, int]], most: int) -> None:
    """Updates that change nothing, with up to `most` parts, of bases that grow to their size."""
    starts = [0, *accumulate(D_in * K for D_in, K, _ in blocks)]
    # the chunks that are projected at once come in powers of two; a streamed basis is projected chunk by chunk
    chunks = power_of_two(-(-max((M for *_, M in blocks), default=0) // CHUNK))
    sizes = [CHUNK << k for k in range(chunks.bit_length())]
    rules: list[Sgd | Adam] = [Sgd(0.0), Adam(torch.zeros_like(slab), torch.zeros_like(slab), 1, 0.0, (0.0, 0.0), 0.0)]
    parts = [slab.new_zeros(1 << k, len(slab)) for k in range(most.bit_length())]
    for M, out, rule, part in product(sizes, (None, serving), rules, parts):
        resident = [
            Block(slab[at:][: D_in * K].view(D_in, K), slab.new_zeros(M, D_in), resident=True)
            for at, (D_in, K, _) in zip(starts, blocks, strict=False)
        ]
        update_(slab, part, rule, resident, serving=out, numel_A=starts[-1])


def _alignments(*row_bytes: int) -> list[int]:
    """Numbers of rows to skip, one for each pattern of which rows then begin at a multiple of 16 bytes."""
    found: dict[tuple[bool, ...], int] = {}
    for start in range(16):
        found.setdefault(tuple(start * n % 16 == 0 for n in row_bytes), start)
    return list(found.values())


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
