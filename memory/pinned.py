"""Host memory that a GPU can read asynchronously."""

from __future__ import annotations

import torch


def host_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros in host RAM: page-locked where CUDA is there, pageable otherwise.

    Pinning speeds transfers up and nothing else depends on it, so a machine without CUDA needs no other path.
    """
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def host_empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`host_zeros` without a value, for what is written whole."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host RAM, page-locked where CUDA is there; from a GPU it is queued on the current stream.

    Read it on that stream, or after a synchronisation.
    """
    return host_empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)
