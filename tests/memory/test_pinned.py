"""Copies to host memory: their own bytes, and page-locked only where a GPU can use that."""

import pytest
import torch

from ogpstream.memory.pinned import host_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_host_copy_is_a_copy(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:]
    copy = host_copy(tensor)
    assert torch.equal(copy, tensor) and copy.dtype == dtype
    assert copy.device.type == "cpu" and copy.is_pinned() == torch.cuda.is_available()
    tensor.zero_()
    assert bool(copy.any())


@pytest.mark.gpu
def test_a_host_copy_of_a_gpu_tensor_comes_back_in_the_order_of_the_stream() -> None:
    tensor = torch.arange(2**20, device="cuda", dtype=torch.float32)
    copy = host_copy(tensor)
    tensor.zero_()
    assert torch.equal(copy.to("cuda", non_blocking=True), torch.arange(2**20, device="cuda", dtype=torch.float32))
