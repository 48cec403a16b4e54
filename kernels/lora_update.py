"""K1, K2 and K3 as one update: dA and dB reach device memory only as K2's parts.

The masters of an update are one flat slab, all A before all B, where the A of the linears that share an input lie side
by side as one `[D_in, K]` block. K2 writes its parts at the same places of a `[S, numel]` tensor, so one launch reduces
all linears of all samples, and each block is projected as one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.kernels.basis_stream import BasisStream
from ogpstream.kernels.configs import CHUNK
from ogpstream.kernels.launch import require, require_rows, require_view
from ogpstream.kernels.lora_backward import lora_backward_parts, token_splits
from ogpstream.kernels.optimizer import Adam, Sgd, step_
from ogpstream.kernels.projection import project_out_


@dataclass(frozen=True)
class Linear:
    """What `lora_backward_parts` takes of one linear and one sample, and where its masters lie.

    Attributes:
        x, g, A, B, scale, trained, h, base_dx: as for `reference.lora_backward`.
        master_A: `[D_in, r]`, master_B: `[r, D_out]`, views of the slab of masters.
    """

    x: Tensor
    g: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    trained: slice
    master_A: Tensor
    master_B: Tensor
    h: Tensor | None = None
    base_dx: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """The A of all linears of one input, and the basis they are projected against.

    Attributes:
        A: view `[D_in, K]` of the slab of masters.
        rows: P.T `[M, D_in]`, float32, contiguous: in pinned host RAM, or on the device where it is resident.
        resident: all M directions at once, in two launches; the rows lie where the masters do. Else the rows are
            streamed, 32 directions in two launches.
    """

    A: Tensor
    rows: Tensor
    resident: bool = False


class Parts:
    """K2's parts of one update, `[S, numel]`, float32.

    A backward pass adds its linears one after the other, in any order; every sample must bring every linear, or parts
    of the slab stay unwritten. Several samples have their splits one after the other, and `update_` sums them all.

    Args:
        slab: the masters `[numel]`.
        tokens: T of each sample.
        like: a tensor with the dtype of the samples' x, which the number of splits depends on.

    Raises:
        ValueError: the slab is no flat float32 tensor.
    """

    def __init__(self, slab: Tensor, tokens: Sequence[int], like: Tensor) -> None:
        _check_slab(slab)
        self.slab = slab
        ends = [0]
        for T in tokens:
            ends.append(ends[-1] + token_splits(T, like))
        self._splits = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        self._missing = [slab.numel()] * len(tokens)
        self._begun: list[set[int]] = [set() for _ in tokens]
        self.sums = torch.empty(ends[-1], slab.numel(), dtype=torch.float32, device=slab.device)

    def add(self, linear: Linear, sample: int = 0) -> Tensor:
        """K1 and K2 of one linear, two launches; returns dx `[T, D_in]`.

        Raises:
            ValueError: a wrong shape, dtype or stride, a master that is no view of the slab, or one that this sample
                has brought already, or an x of another number of tokens than the sample's; the message names it.
            IndexError: there is no such sample.
        """
        own, begun = self.sums[self._splits[sample]], self._begun[sample]
        masters = [("master_A", linear.master_A), ("master_B", linear.master_B)]
        starts = [require_view(name, master, "the slab", self.slab) for name, master in masters]
        for (name, master), start in zip(masters, starts, strict=True):
            twice = start in begun and master.numel()
            require(not twice, f"sample {sample} has the gradient of this {name}, at element {start}, already")
        rank, splits = linear.trained.stop - linear.trained.start, token_splits(len(linear.x), linear.x)
        # here, by the caller's names: below they are dA and dB, and their first dimension is the splits
        require_rows("master_A", linear.master_A, *linear.A.shape[:1], rank)
        require_rows("master_B", linear.master_B, rank, *linear.B.shape[1:])
        if splits != len(own):
            raise ValueError(f"x of {len(linear.x)} tokens in {linear.x.dtype} leaves {splits} parts, and sample "
                             f"{sample} has {len(own)}: its linears have one T and one dtype")
        dA, dB = (
            own[:, start:].as_strided((len(own), *master.shape), (own.stride(0), *master.stride()))
            for start, (_, master) in zip(starts, masters, strict=True)
        )
        dx = lora_backward_parts(
            linear.x, linear.g, linear.A, linear.B, linear.scale, trained=linear.trained, h=linear.h,
            base_dx=linear.base_dx, dA=dA, dB=dB,
        )  # fmt: skip
        begun.update(starts)
        self._missing[sample] -= linear.master_A.numel() + linear.master_B.numel()
        return dx

    def complete(self) -> Tensor:
        """The parts, for `update_`; ValueError when a sample lacks a linear."""
        for sample, missing in enumerate(self._missing):
            require(not missing, f"sample {sample}: {missing} of {self.slab.numel()} gradients are missing")
        return self.sums


def stream_of(blocks: Sequence[Block], device: torch.device) -> BasisStream:
    """The stream of all bases of these blocks that are not resident: begun now, for `update_` to take from.

    Raises:
        ValueError: a basis is no contiguous float32 matrix; the message names its block.
    """
    streamed = {f"rows of block {number}": block.rows for number, block in enumerate(blocks) if not block.resident}
    return BasisStream(list(streamed.values()), device, CHUNK, list(streamed))


def update_(
    slab: Tensor,
    parts: Tensor,
    rule: Sgd | Adam,
    blocks: Sequence[Block] = (),
    *,
    stream: BasisStream | None = None,
    serving: Tensor | None = None,
    numel_A: int | None = None,
) -> list[Tensor]:
    """K3: gradient from its parts, optimizer, projection of each block, masters and serving copies.

    Launches: 1 for SGD or 2 for Adam, then 2 for each resident block and 2 for each 32 directions of a streamed one.
    An update that must be judged before it counts works on a clone of the masters.

    Args:
        slab: masters `[numel]`, float32, contiguous; the blocks of A from its beginning, then all B.
        parts: `[S, numel]`, see `Parts`.
        rule: the moments of an `Adam` are slabs like the masters.
        blocks: all blocks of A, in their order; with none, A stays as the optimizer leaves it.
        stream: of `stream_of(blocks, slab.device)`, begun earlier; begun here if not given.
        serving: slab `[numel]` in a serving dtype, which gets the new factors.
        numel_A: elements of all A, whose gradients Adam's eps is relative to apart from those of B; the sum of the
            blocks if not given.

    Returns:
        coef `[M, K]` of each block.

    Raises:
        ValueError: something does not fit; the message names it.
    """
    # all of it before the first launch: after that the masters change
    _check_slab(slab)
    require(numel_A is not None or bool(blocks) or isinstance(rule, Sgd), "numel_A: Adam without blocks needs it")
    projected = 0
    for number, block in enumerate(blocks):
        name = f"of block {number}"
        for what, tensor in (("A", block.A), ("rows", block.rows)):
            require(tensor.dim() == 2, f"{what} {name} has shape {list(tensor.shape)}, needs 2 dimensions")
        fits = block.A.is_contiguous() and require_view(f"A {name}", block.A, "the slab", slab) == projected
        require(fits, f"block {number} does not begin where the one before ends: give all blocks of A in their order")
        width, D_in = block.rows.shape[-1], block.A.shape[0]
        require(width == D_in, f"block {number}: its basis has width {width}, its A {D_in}")
        require_rows(f"rows {name}", block.rows, *block.rows.shape, dtypes=(torch.float32,))
        here = not block.resident or block.rows.device == slab.device
        require(here, f"rows {name} are on {block.rows.device}: a resident basis lies where the masters do")
        projected += block.A.numel()
    if stream is None:
        stream = stream_of(blocks, slab.device)
    streamed = [block.rows for block in blocks if not block.resident]
    own = len(stream.bases) == len(streamed) and all(map(_same, stream.bases, streamed))
    require(own, "stream has other bases than the blocks that are not resident: give that of stream_of(blocks, device)")
    step_(slab, parts, rule, first=projected if numel_A is None else numel_A, serving=serving, serve_from=projected)
    coefficients = []
    for block in blocks:
        copy = None
        if serving is not None:
            start = block.A.storage_offset() - slab.storage_offset()
            copy = serving[start : start + block.A.numel()].view(block.A.shape)
        rows = block.rows if block.resident else stream
        coefficients.append(project_out_(block.A, rows, chunk=max(1, len(block.rows)), serving=copy))
    return coefficients


def _check_slab(slab: Tensor) -> None:
    require_rows("slab", slab, slab.numel(), dtypes=(torch.float32,))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one matrix in memory."""
    place = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (a, b)]
    return place[0] == place[1]


def lora_backward_project(
    samples: Sequence[Sequence[Linear]],
    slab: Tensor,
    rule: Sgd | Adam,
    blocks: Sequence[Block] = (),
    *,
    serving: Tensor | None = None,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Gradients of all linears, optimizer, projection and serving copies of one update, in one call.

    The first directions are on their way to the device before the first gradient is computed.

    Args:
        samples: for each sample, its linears; together they cover the slab.
        slab, rule, blocks, serving: as for `update_`.

    Returns:
        dx `[T, D_in]` of each linear of each sample, and coef `[M, K]` of each block.

    Raises:
        ValueError: something does not fit; the message names it.
    """
    require(bool(samples) and all(samples), "samples holds no linear: give each sample its linears")
    stream = stream_of(blocks, slab.device)
    parts = Parts(slab, [len(linears[0].x) for linears in samples], samples[0][0].x)
    dx = [[parts.add(linear, number) for linear in linears] for number, linears in enumerate(samples)]
    numel_A = sum(linear.master_A.numel() for linear in samples[0])
    return dx, update_(slab, parts.complete(), rule, blocks, stream=stream, serving=serving, numel_A=numel_A)
