"""Device code of K3: sums of K2's parts, SGD and Adam on them, and the projection. Float32 throughout."""

import triton
import triton.language as tl

from ogpstream.kernels.device_common import narrow, sum_parts


@triton.jit
def _gradient(parts, i, inside, splits, stride_s, S: tl.constexpr):
    # S is `splits` rounded up to a power of two, so that few kernels serve samples of all lengths
    # stepped and not multiplied: stride_s comes as int32, and 24 splits of 117M masters are over 2^31 elements
    at = parts + i
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(1, S):
        at += stride_s
        total += tl.load(at, mask=inside & (s < splits), other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(parts, out, numel, splits, stride_s, S: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum of `splits` parts, stride_s elements apart, in a fixed order; S is splits or more."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, _gradient(parts, i, i < numel, splits, stride_s, S), mask=i < numel)


@triton.jit(do_not_specialize=["splits", "serve_from"])
def sgd_kernel(
    w, parts, serving, numel, serve_from, splits, stride_s, lr, decay,
    S: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w = decay w - lr g, and what lies from serve_from UNIT on also in the dtype it is served in."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    new = decay * tl.load(w + i, mask=i < numel, other=0.0)
    new -= lr * _gradient(parts, i, i < numel, splits, stride_s, S)
    tl.store(w + i, new, mask=i < numel)
    if serving is not None:
        served = (i >= serve_from.to(tl.int64) * UNIT) & (i < numel)
        tl.store(serving + i, narrow(new, serving.dtype.element_ty), mask=served)


@triton.jit(do_not_specialize=["numel", "first", "programs", "splits"])
def moments_kernel(
    parts, exp_avg, exp_avg_sq, sums, numel, first, programs, splits, stride_s, beta1, rest1, beta2, rest2,
    S: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2; sums[p] = what program p has of sum(v).

    The first `programs` programs have [0, first), the others [first, numel), both in units of UNIT.
    """
    pid = tl.program_id(0)
    start, end, p = tl.zeros((), tl.int64), first.to(tl.int64) * UNIT, pid
    if pid >= programs:
        start, end, p = first.to(tl.int64) * UNIT, numel.to(tl.int64) * UNIT, pid - programs
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(STEPS):
        i = start + (p.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        g = _gradient(parts, i, i < end, splits, stride_s, S)
        m = beta1 * tl.load(exp_avg + i, mask=i < end, other=0.0) + rest1 * g
        v = beta2 * tl.load(exp_avg_sq + i, mask=i < end, other=0.0) + rest2 * g * g
        tl.store(exp_avg + i, m, mask=i < end)
        tl.store(exp_avg_sq + i, v, mask=i < end)
        total += v
    tl.store(sums + pid, tl.sum(total, 0))


@triton.jit(do_not_specialize=["numel", "first", "blocks", "programs", "all_programs", "serve_from"])
def adam_kernel(
    w, exp_avg, exp_avg_sq, sums, serving, numel, first, blocks, programs, all_programs, serve_from,
    lr, decay, eps, bias1, bias2, SUMS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w = decay w - lr (m / bias1) / (s + eps rms(s)), s = sqrt(v / bias2), from the sums of `moments_kernel`.

    The first `blocks` programs have [0, first), the others [first, numel); these and serve_from in units of UNIT.
    """
    pid = tl.program_id(0)
    middle, last = first.to(tl.int64) * UNIT, numel.to(tl.int64) * UNIT
    start, end, p, low, high = tl.zeros((), tl.int64), middle, pid, pid * 0, programs
    if pid >= blocks:
        start, end, p, low, high = middle, last, pid - blocks, programs, all_programs
    j = low + tl.arange(0, SUMS)
    mean = tl.sum(tl.load(sums + j, mask=j < high, other=0.0), 0) / (end - start).to(tl.float32)
    i = start + p.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(exp_avg + i, mask=i < end, other=0.0) / bias1
    v = tl.load(exp_avg_sq + i, mask=i < end, other=0.0) / bias2
    below = tl.sqrt(v) + eps * tl.sqrt(mean / bias2)
    change = tl.where(below == 0, 0.0, m / tl.where(below == 0, 1.0, below))
    new = decay * tl.load(w + i, mask=i < end, other=0.0) - lr * change
    tl.store(w + i, new, mask=i < end)
    if serving is not None:
        served = (i >= serve_from.to(tl.int64) * UNIT) & (i < end)
        tl.store(serving + i, narrow(new, serving.dtype.element_ty), mask=served)


@triton.jit(do_not_specialize=["M"])
def coefficients_kernel(
    Z, rows, parts, K, M, stride_z, stride_p,
    D: tl.constexpr, STEPS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts[s, m, k] = sum over split s of D of rows[m, d] Z[d, k]; grid (blocks of K, blocks of M, splits)."""
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    for i in range(STEPS):
        d = (split * STEPS + i) * BD + tl.arange(0, BD)
        p_tile = tl.load(
            rows + m[:, None] * stride_p + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0
        )
        z_tile = tl.load(
            Z + d[:, None] * stride_z + k[None, :], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0
        )
        # TF32, the default for float32, leaves 2.6e-4 of Z in span(P) instead of 2e-7
        acc = tl.dot(p_tile, z_tile, acc, input_precision="ieee")
    at = (split * M + m[:, None]) * K + k[None, :]
    tl.store(parts + at, acc, mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def removal_kernel(
    Z, rows, parts, weights, coef, serving, K, M, stride_z, stride_p, stride_serving,
    D: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Z -= rows.T (weights * coef), coef the sum of its parts `[PARTS, M, K]`; grid (blocks of D, blocks of K).

    The first row of programs stores coef; with `serving`, Z is also stored in that dtype.
    """
    d = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    gone = tl.zeros((BD, BK), dtype=tl.float32)
    for i in range(CHUNKS):
        m = i * BM + tl.arange(0, BM).to(tl.int64)
        at, here = m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :]
        c = sum_parts(parts, at, here, M.to(tl.int64) * K, PARTS)
        if tl.program_id(0) == 0:
            tl.store(coef + at, c, mask=here)
        if weights is not None:
            c *= tl.load(weights + m, mask=m < M, other=0.0)[:, None]
        p_tile = tl.load(
            rows + m[None, :] * stride_p + d[:, None], mask=(m < M)[None, :] & (d < D)[:, None], other=0.0
        )
        gone = tl.dot(p_tile, c, gone, input_precision="ieee")
    inside = (d < D)[:, None] & (k < K)[None, :]
    z = tl.load(Z + d[:, None] * stride_z + k[None, :], mask=inside, other=0.0) - gone
    tl.store(Z + d[:, None] * stride_z + k[None, :], z, mask=inside)
    if serving is not None:
        at = serving + d[:, None] * stride_serving + k[None, :]
        tl.store(at, narrow(z, serving.dtype.element_ty), mask=inside)
