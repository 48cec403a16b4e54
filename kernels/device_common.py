"""Rounding that Triton's interpreter gets right too, and sums of parts in a fixed order."""

import triton
import triton.language as tl

from ogpstream.kernels.launch import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def _nearest_bf16(v):
    # the interpreter's cast to bf16 truncates: this rounds to nearest even, after which the cast is exact
    bits = v.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """v in a dtype to be stored, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        v = _nearest_bf16(v.to(tl.float32))
    return v.to(dtype)


@triton.jit
def operand(v, dtype: tl.constexpr):
    """v as an operand of tl.dot in this dtype.

    The interpreter multiplies bf16 as bit patterns and sums fp16 in fp16, so there the values are rounded as on a GPU
    but held in float32.
    """
    if not INTERPRET:
        v = v.to(dtype)
    elif dtype == tl.bfloat16:
        v = _nearest_bf16(v.to(tl.float32))
    else:
        v = v.to(dtype).to(tl.float32)
    return v


@triton.jit
def sum_parts(parts, offset, mask, stride_s, PARTS: tl.constexpr):
    """Sum of PARTS tiles in float32, stride_s elements apart, always in the same order."""
    total = tl.load(parts + offset, mask=mask, other=0.0).to(tl.float32)
    if PARTS <= 4:
        for s in tl.static_range(1, PARTS):
            total += tl.load(parts + s * stride_s + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        # a width of 14336 leaves 14 parts, 28 in float32: unrolled in a pipelined loop each takes a shared buffer of
        # its own, 119 KB in all
        for s in tl.range(1, PARTS, num_stages=1, loop_unroll_factor=2):
            total += tl.load(parts + s * stride_s + offset, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def largest(v):
    """max |v| of a tile, 1 where it is 0: what float16 operands are divided by, whose range ends at 6e-8."""
    size = tl.max(tl.max(tl.abs(v), 1), 0)
    return tl.where(size == 0, 1.0, size)
