"""Host memory that a GPU can read asynchronously."""

from __future__ import annotations

import torch


def host_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros in host RAM: page-locked where CUDA is there, pageable otherwise.

    Pinning speeds transfers up and nothing else depends on it, so a machine without CUDA needs no other path.
    """
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
