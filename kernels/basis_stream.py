"""Bases that lie in host RAM, brought to the device chunk by chunk under the work on the chunk before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ogpstream.kernels.configs import CHUNK
from ogpstream.kernels.launch import require, require_rows


class BasisStream:
    """One pass over one basis or several, one after the other, through two device buffers of `chunk` rows each.

    The first two chunks are on their way when the constructor returns: make the stream before the work that they can
    hide under. Copies run on a stream of their own; what is queued on the current stream for a chunk waits for that
    chunk alone, and the copy of the chunk after next waits until that work has left its buffer. The current stream is
    that of the constructor. On a CPU the same copies are made at once. From pageable memory the copies are correct but
    not asynchronous.

    The host may change the rows when the current stream has been synchronised after the pass.

    Args:
        bases: P.T `[M, D]` of each, float32, contiguous, in pinned host RAM; widths may differ.
        chunk: rows of one copy; 32 of width 2048 are 256 KiB.
        names: what messages call each of them; "rows" if not given.

    Raises:
        ValueError: a basis is no contiguous float32 matrix; the message says what is wrong.
    """

    def __init__(
        self, bases: Sequence[Tensor], device: torch.device, chunk: int = CHUNK, names: Sequence[str] = ()
    ) -> None:
        require(chunk >= 1, f"chunk is {chunk}, needs at least 1 direction")
        for name, rows in zip(names or ["rows"] * len(bases), bases, strict=True):
            require(rows.dim() == 2, f"{name} has shape {list(rows.shape)}, needs 2 dimensions")
            require_rows(name, rows, *rows.shape, dtypes=(torch.float32,))
            # a column slice of P would be copied through a pageable temporary, and the copy would wait for it
            require(rows.is_contiguous(), f"{name} has strides {rows.stride()}, needs a contiguous P.T")
        self.chunk = chunk
        self._bases = list(bases)
        self._pieces = [piece for rows in bases for piece in rows.split(chunk) if len(rows)]
        self._taken = 0
        size = max((piece.numel() for piece in self._pieces), default=0)
        self._buffers = torch.empty(2, size, dtype=torch.float32, device=device)
        self._side: torch.cuda.Stream | None = None
        if self._buffers.is_cuda:
            self._current = torch.cuda.current_stream(device)
            self._side = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]
            # a stream that is dropped half-way may not give its buffers away under a copy
            self._buffers.record_stream(self._side)
        for piece in range(min(2, len(self._pieces))):
            self._copy(piece)

    @property
    def bases(self) -> tuple[Tensor, ...]:
        """Those in host RAM whose turn is still to come."""
        return tuple(self._bases)

    @property
    def rows(self) -> Tensor:
        """The basis in host RAM whose turn it is; IndexError after the last."""
        return self._bases[0]

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows `[<= chunk, D]` on the device) of the basis whose turn it is, then it is the next one's.

        A chunk is valid until the next one is asked for.
        """
        rows = self._bases.pop(0)
        for start in range(0, len(rows), self.chunk):
            piece = self._taken
            if self._side is not None:
                self._current.wait_event(self._copied[piece % 2])
            yield start, self._target(piece)
            self._taken += 1
            if piece + 2 < len(self._pieces):
                self._copy(piece + 2)

    def _target(self, piece: int) -> Tensor:
        source = self._pieces[piece]
        return self._buffers[piece % 2, : source.numel()].view(source.shape)

    def _copy(self, piece: int) -> None:
        target, source = self._target(piece), self._pieces[piece]
        if self._side is None:
            target.copy_(source)
            return
        # the buffer may still be read by what is queued on the current stream, or its memory be in use from before
        self._side.wait_stream(self._current)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            self._copied[piece % 2].record()
