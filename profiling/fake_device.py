"""A device that is not there: its tensors have shapes and bytes but no numbers, and nothing is computed on it.

The learner's own code runs on a full-size model in seconds, on any machine: what it allocates on the device is what it
would allocate on a GPU, up to an allocator's rounding and cuBLAS's workspace. Of kernels only the launch is skipped.
Host tensors are real. The device is torch's `meta`: fake CUDA tensors end the process in autograd where torch has no
CUDA, and FakeTensorMode takes 0.5 ms an operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ogpstream.kernels import cross_entropy, dispatch, lora_backward, optimizer, projection

DEVICE = torch.device("meta")
_aten = torch.ops.aten


class FakeDevice(TorchDispatchMode):
    """What `meta` tensors lack of a device's: numbers come from them, and to host tensors nothing is copied.

    Attributes:
        number: what reading any number of the device gives, such as a loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 1.0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return self.number
        if func is _aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        device = kwargs.get("device")
        if func is _aten._to_copy.default and args[0].is_meta and device is not None and device.type != "meta":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
        return func(*args, **kwargs)


class _FlashAttention(TorchFunctionMode):
    """Attention as a GPU computes it: output and log-sum-exp. On `meta` torch would make T x T weights."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention or args[0].device != DEVICE:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        # takes fewer heads of keys than of queries as it is
        given.pop("enable_gqa", None)
        mask, query, key, value = (given.pop(name, None) for name in ("attn_mask", *names[:3]))
        flash = _aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, attn_mask=mask, **given)[0]


def _skip(kernel: Any, grid: Sequence[int], on: Tensor, *args: Any, **options: Any) -> None:
    """A launch that is not made."""


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """While it is open, models and tensors on `DEVICE` work, with the Triton backend."""
    mode = FakeDevice()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {dispatch.ENV: "triton"}))
        for module in (cross_entropy, lora_backward, optimizer, projection):
            stack.enter_context(patch.object(module, "launch", _skip))
        for each in (mode, _FlashAttention()):
            stack.enter_context(each)
        yield mode
