"""What all launchers share: the one place that launches, what they check, and what they tell autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# read when @triton.jit decorates, so a kernel is interpreted or compiled for the life of the process
INTERPRETED: bool = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """One launch as it was made: `options` are constexpr parameters and Triton's own, as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.fn.__name__
        return name


# of the process, since autograd runs the backward of CUDA tensors in a thread of its own
_records: tuple[list[Launch], ...] = ()
_lock = Lock()


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on the device of the tensor `on`, unless the grid is empty.

    Fake tensors are not computed with, so that memory, launches and compilation can be tested without a GPU.

    Raises:
        RuntimeError: `on` is not on a CUDA device, and the kernels were not imported for the interpreter.
    """
    if 0 in grid:
        return
    if _records:
        with _lock:
            for record in _records:
                record.append(Launch(kernel, grid, args, options))
    if isinstance(on, FakeTensor):
        return
    if not (on.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"the triton kernels run on CUDA, this tensor is on {on.device}: call ogpstream.kernels.dispatch, "
            "or set TRITON_INTERPRET=1 before they are imported"
        )
    # triton launches on the current device whatever the tensors are on
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[grid](*args, **options)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """The launches of all threads while the context is open; they keep their tensors alive."""
    global _records
    record: list[Launch] = []
    with _lock:
        _records = (*_records, record)
    try:
        yield record
    finally:
        with _lock:
            _records = tuple(other for other in _records if other is not record)


def written(*tensors: Tensor | None) -> None:
    """Tell autograd that these were changed in place: a raw write leaves a saved tensor silently wrong."""
    # tensors made in inference mode have no counter, and no graph can hold them
    torch.autograd.graph.increment_version([t for t in tensors if t is not None and not t.is_inference()])


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up; triton.cdiv takes 6 us on the host, and a linear asks ten times."""
    return -(-n // size)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two >= max(n, least): tl.arange and unrolled loops come in these sizes."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def unit_of(*numbers: int) -> int:
    """4 if it divides all of them, else 1.

    In this unit a kernel is given offsets that Triton does not specialise on: four float32 side by side are then loaded
    as one, where `moments_kernel` had 48 loads of 4 bytes for 12 of 16.
    """
    return 1 if any(n % 4 for n in numbers) else 4


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_rows(name: str, tensor: Tensor, *shape: int, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """A tensor of this shape whose last dimension is contiguous, in one of these dtypes; ValueError names it."""
    # the stride of a dimension of one element says nothing
    contiguous = not tensor.dim() or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    if tensor.shape == shape and contiguous and (not dtypes or tensor.dtype in dtypes):
        return  # before any message is made: they were 40 % of a launcher's 107 us on the host
    require(tensor.shape == shape, f"{name} has shape {list(tensor.shape)}, needs {list(shape)}")
    require(contiguous, f"{name} has strides {tensor.stride()}, needs 1 in the last dimension")
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(not dtypes or tensor.dtype in dtypes, f"{name} is {tensor.dtype}, needs one of {names}")


def require_view(name: str, view: Tensor, whole_name: str, whole: Tensor) -> int:
    """A view of a contiguous tensor; returns the element that it begins at, ValueError names it."""
    start = int(view.storage_offset() - whole.storage_offset())
    last = start + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True))
    # _cdata and not data_ptr, which fake tensors have not
    same = view.untyped_storage()._cdata == whole.untyped_storage()._cdata
    inside = not view.numel() or 0 <= start <= last < whole.numel()
    require(same and inside and view.dtype == whole.dtype, f"{name} is no view of {whole_name}")
    return start


HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
