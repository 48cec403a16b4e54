"""Kernels that the ahead-of-time gate must refuse. Run as a script: prints what it says of each."""

import contextlib
import sys

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from ogpstream.kernels import aot
from ogpstream.kernels.aot import Case, compile_case
from ogpstream.kernels.launch import launch, record_launches
from ogpstream.kernels.lora_backward import lora_backward, lora_forward


@triton.jit
def tf32_dot(a, b, out, N: tl.constexpr):
    # Triton's silent default for float32: the interpreter computes it in float32
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def spilling(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def no_tensor_cores(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x, y = tl.load(a + at).to(tl.float32), tl.load(b + at).to(tl.float32)
    tl.store(out + at, tl.dot(x, y, input_precision="ieee"))


@triton.jit
def too_much_shared(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def main() -> None:
    for kernel, N, warps, dtype, products in (
        (tf32_dot, 32, 4, torch.float32, "float32"),
        (spilling, 64, 1, torch.float32, "float32"),
        (no_tensor_cores, 32, 4, torch.bfloat16, "half"),
        (too_much_shared, 256, 16, torch.bfloat16, "half"),
    ):
        with FakeTensorMode(), record_launches() as record:
            a = torch.empty(N, N, dtype=dtype)
            launch(kernel, (1,), a, a, a, torch.empty(N, N), N=N, num_warps=warps)
        case = Case("planted", record[0], products)
        print(f"{kernel.fn.__name__}: {'; '.join(compile_case(case, 86).faults)}")
    aot.cases = lambda arch: [case]
    with contextlib.redirect_stdout(sys.stderr):
        status = aot.main(["sm_86"])
    print(f"exit status: {status}")
    # less than the least K of a product on tensor cores
    with FakeTensorMode(), record_launches() as record:
        x, A = torch.empty(64, 64), torch.empty(64, 16)
        lora_forward(x, A, A.T, torch.empty(16))
        lora_backward(x, x, A, A.T, torch.empty(16), trained=slice(0, 8), base_dx=x)
    for each in record:
        for option in ("BR", "BK"):
            if option in each.options:
                try:
                    compile_case(Case("planted", each._replace(options=each.options | {option: 8}), "float32"), 86)
                    print(f"{each.name} {option} 8: compiled")
                except Exception as error:
                    print(f"{each.name} {option} 8: {type(error.__cause__ or error).__name__}")


if __name__ == "__main__":
    main()
