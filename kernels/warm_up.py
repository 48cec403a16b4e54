"""The compilation of every kernel that updates will launch, at start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, product

import torch
from torch import Tensor

from ogpstream.kernels import dispatch
from ogpstream.kernels.configs import CHUNK
from ogpstream.kernels.launch import cdiv, power_of_two
from ogpstream.kernels.lora_backward import token_splits
from ogpstream.kernels.lora_update import Block, update_
from ogpstream.kernels.optimizer import Adam, Sgd


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
    Backward passes are those of an update, with h and base_dx given. Linears and loss go through `dispatch`, so each
    operation is warmed up in the backend that will do it. The memory of one launch at a time is taken.

    Args:
        shapes: (D_in, D_out, R, trained) of the adapted linears.
        dtype: of x, g and the factors that are served.
        device: that all tensors of an update lie on.
        tokens: of the longest sample.
        vocabulary: of the logits; their kernel is left out if not given.
        numel, blocks, samples: of the slab of masters on the device that `lora_backward_project` updates: its
            elements, (D_in, K, directions) of each block of A, and the most samples of an update. 0: there is none.

    Raises:
        ValueError: a shape or dtype that no kernel takes, blocks that the slab does not hold, or OGPSTREAM_BACKEND
            names no backend; the message says what is wrong.
        RuntimeError: there is a slab, and the device is none that Triton computes on.
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
                dispatch.lora_backward(x, g, A, B, scale, trained=trained, h=zeros(start + T, R)[start:], base_dx=x)
            # onto what the frozen linear has just made
            dispatch.lora_forward(x, A, B, scale, onto=zeros(len(x), D_out, dtype=dtype))
    if vocabulary is not None:
        for start in _alignments(vocabulary * dtype.itemsize):
            for first in (0, 1):  # targets are slices of ids, at any multiple of 8 bytes
                logits, target = zeros(start + 1, vocabulary, dtype=dtype), zeros(2, dtype=torch.int64)
                dispatch.cross_entropy(logits[start:], target[first:][:1])
    if numel:
        most = samples * token_splits(tokens, zeros(0, dtype=dtype))
        _warm_up_update(zeros(numel), zeros(numel, dtype=dtype), blocks, power_of_two(most))


def _warm_up_update(slab: Tensor, serving: Tensor, blocks: Sequence[tuple[int, int, int]], most: int) -> None:
    """Updates that change nothing, with up to `most` parts, of bases that grow to their size."""
    starts = [0, *accumulate(D_in * K for D_in, K, _ in blocks)]
    # the chunks that are projected at once come in powers of two; a streamed basis is projected chunk by chunk
    chunks = power_of_two(cdiv(max((M for *_, M in blocks), default=0), CHUNK))
    rules: list[Sgd | Adam] = [Sgd(0.0), Adam(torch.zeros_like(slab), torch.zeros_like(slab), 1, 0.0, (0.0, 0.0), 0.0)]
    for k in range(most.bit_length()):
        parts = slab.new_zeros(1 << k, len(slab))
        for M, out, rule in product([CHUNK << n for n in range(chunks.bit_length())], (None, serving), rules):
            resident = [
                Block(slab[at:][: D_in * K].view(D_in, K), slab.new_zeros(M, D_in), resident=True)
                for at, (D_in, K, _) in zip(starts, blocks, strict=False)
            ]
            update_(slab, parts, rule, resident, serving=out, numel_A=starts[-1])
        del parts  # before the next, which is twice as large


def _alignments(*row_bytes: int) -> list[int]:
    """Numbers of rows to skip, one for each pattern of which rows then begin at a multiple of 16 bytes."""
    found: dict[tuple[bool, ...], int] = {}
    for start in range(16):
        found.setdefault(tuple(start * n % 16 == 0 for n in row_bytes), start)
    return list(found.values())
