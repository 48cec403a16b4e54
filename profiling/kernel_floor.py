"""The time below which no version of an operation runs: its bytes and operations over rates measured on the device.

Bytes: each input read once, each output written once, a tensor that is changed in place read and written. Nothing that
an implementation stores for itself counts. Operations: the matrix products; elementwise work hides behind the bytes.
A working set that fits in the L2 can be faster than this floor, which is that of device memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ogpstream.profiling.gpu_timer import Timer, percentile
from ogpstream.profiling.kernel_cases import Case

SINGLE = 4  # bytes of a float32


@dataclass(frozen=True)
class Work:
    """What one call has to do: bytes through device memory, bytes from the host, and operations.

    operations are those of products in the dtype of the case, single those that have to be float32 (the projection).
    """

    bytes: int
    host_bytes: int = 0
    operations: int = 0
    single: int = 0


@dataclass(frozen=True)
class Rates:
    """Measured: bytes/s of a copy on the device (read and written) and from pinned host RAM, operations/s by dtype."""

    memory: float
    host: float
    operations: dict[str, float]


def work(case: Case) -> Work:
    """Bytes and operations of a case, by formula."""
    size, T, L, R, r, m = case.torch_dtype.itemsize, case.T, case.L, case.R, case.r, case.m
    both = case.D_in + case.D_out
    factors = R * both * size
    if case.op == "cross_entropy":
        # logits in, their gradient out, int64 targets
        return Work(2 * T * case.V * size + 8 * T)
    if case.op == "lora_forward":
        # x, factors; y, h in float32
        return Work(L * (T * both * size + factors + T * R * SINGLE), operations=L * 2 * T * R * both)
    # x, g, base_dx, dx, factors, h; not dA and dB, which in an update need reach no memory
    backward = L * (T * (3 * case.D_in + case.D_out) * size + factors + T * R * SINGLE)
    # Y = g B.T and dx += Y A.T with all columns, dA = x.T Y and dB = h.T g with the trained ones
    products = L * 2 * T * (R + r) * both
    numel = L * r * both
    if case.op == "lora_backward":
        return Work(backward + numel * SINGLE, operations=products)
    bases = (1 if case.scope == "shared" else L) * m * case.D_in * SINGLE
    streamed = bases if case.basis == "streamed" else 0
    # coefficients and their removal
    removal = 2 * 2 * m * L * r * case.D_in
    # A of all linears in and out, P, coefficients out
    coefficients = m * L * r * SINGLE
    if case.op == "projection":
        return Work(2 * L * r * case.D_in * SINGLE + bases + coefficients, streamed, single=removal)
    # masters and two moments in and out, the serving copy out
    step = 6 * numel * SINGLE + numel * size + bases + coefficients
    if case.op == "step_projection":
        return Work(step + numel * SINGLE, streamed, single=removal)
    return Work(backward + step, streamed, products, removal)


def floor_seconds(case: Case, rates: Rates) -> tuple[float, str]:
    """The floor of a case, and what sets it: bytes, operations or host (the copy of a streamed P, if it is hidden)."""
    todo = work(case)
    limits = {
        "bytes": todo.bytes / rates.memory,
        "operations": todo.operations / rates.operations[case.dtype] + todo.single / rates.operations["fp32"],
        "host": todo.host_bytes / rates.host,
    }
    name = max(limits, key=lambda each: limits[each])
    return limits[name], name


def measure_rates(device: torch.device, timer: Timer, *, quick: bool = False) -> Rates:
    """The rates of this device, by a large copy and a large product of random numbers (zeros run faster)."""
    # 1 GiB is many times any L2; 64 MiB more than the caches of most CPUs
    numel, side = (1 << 20, 256) if quick else (1 << 24, 1024)
    if device.type == "cuda":
        # a quarter of what is free for both copies together, on a small card
        numel, side = min(1 << 28, torch.cuda.mem_get_info(device)[0] // (8 * SINGLE)), 4096 if quick else 8192

    def median(run: Callable[[], Any]) -> float:
        run()
        return percentile([timer.sample(run, cold=False) for _ in range(7)], 50)

    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    memory = 2 * SINGLE * numel / median(lambda: target.copy_(source))
    host = memory
    if device.type == "cuda":
        pinned = torch.empty(1 << 24, pin_memory=True)
        host = SINGLE * len(pinned) / median(lambda: target[: len(pinned)].copy_(pinned, non_blocking=True))
    operations = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        operations[name] = 2 * side**3 / median(partial(torch.mm, a, a, out=out))
    # whoever finds half precision slower, as on most CPUs, may compute in float32
    return Rates(memory, host, {name: max(rate, operations["fp32"]) for name, rate in operations.items()})
