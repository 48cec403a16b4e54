"""Device code of the LoRA kernels: shrink (K1), expand (the forward's second half) and gradients (K2).

Symbols as in `reference`. No kernel fuses across a `[T, R]` intermediate, no atomics: where several programs add to
one result each writes its own part, and the reader adds the parts in a fixed order.

h and Y are float32 in memory and rounded to x's dtype only as operands; where that is float16, each tile is first
divided by its largest element, since gradients are often below 6e-8, where float16 ends.
"""

import triton
import triton.language as tl

from ogpstream.kernels.device_common import largest, narrow, operand, sum_parts


@triton.jit
def _rows_times(
    x, w, out, scale, T, stride_xt, stride_wd, stride_wr, split,
    D: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[split, t, r] = scale[r] * sum over this split's d of x[t, d] w[d, r]."""
    # here and below: the interpreter multiplies tiles that tensor cores do not
    tl.static_assert(BR >= 16)
    dtype: tl.constexpr = x.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros((BT, BR), dtype=tl.float32)
    for i in range(STEPS):
        d = (split.to(tl.int64) * STEPS + i) * BD + tl.arange(0, BD)
        x_tile = tl.load(
            x + t[:, None] * stride_xt + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
        )
        w_tile = tl.load(
            w + d[:, None] * stride_wd + r[None, :] * stride_wr, mask=(d < D)[:, None] & (r < R)[None, :], other=0.0
        )
        acc = tl.dot(operand(x_tile, dtype), operand(w_tile, dtype), acc, input_precision="ieee")
    acc *= tl.load(scale + r, mask=r < R, other=0.0)[None, :].to(tl.float32)
    at = (split.to(tl.int64) * T + t[:, None]) * R + r[None, :]
    tl.store(out + at, acc, mask=(t < T)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, A, h, g, B, Y, scale, T, stride_xt, stride_ad, stride_ar, stride_gt, stride_br, stride_bd,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr,
    SPLITS_IN: tl.constexpr, STEPS_IN: tl.constexpr, STEPS_OUT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """K1: the first SPLITS_IN programs of axis 2 make parts of h = (x A) * scale, the others of Y = (g B.T) * scale.

    h `[SPLITS_IN, T, R]`, Y `[splits of D_out, T, R]`. SPLITS_IN 0 leaves h out; x, A, h are not read then.
    """
    split = tl.program_id(2)
    if split < SPLITS_IN:
        _rows_times(x, A, h, scale, T, stride_xt, stride_ad, stride_ar, split, D_IN, R, STEPS_IN, BT, BD, BR)
    else:
        split -= SPLITS_IN
        _rows_times(g, B, Y, scale, T, stride_gt, stride_bd, stride_br, split, D_OUT, R, STEPS_OUT, BT, BD, BR)


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    h, B, onto, y, h_sum, T, stride_br, stride_bd, stride_onto, stride_y,
    D_OUT: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y = onto + h B from the parts of h `[PARTS, T, R]`, which the first column of programs also leaves summed in
    h_sum. y may be onto itself: each program reads what it writes."""
    tl.static_assert(BR >= 16)
    dtype: tl.constexpr = y.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    inside = (t < T)[:, None] & (d < D_OUT)[None, :]
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    if onto is not None:
        acc += tl.load(onto + t[:, None] * stride_onto + d[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in range((R + BR - 1) // BR):
        r = i * BR + tl.arange(0, BR)
        at, here = t[:, None] * R + r[None, :], (t < T)[:, None] & (r < R)[None, :]
        h_tile = sum_parts(h, at, here, T.to(tl.int64) * R, PARTS)
        if tl.program_id(1) == 0:
            tl.store(h_sum + at, h_tile, mask=here)
        b_tile = tl.load(
            B + r[:, None] * stride_br + d[None, :] * stride_bd,
            mask=(r < R)[:, None] & (d < D_OUT)[None, :], other=0.0,
        )  # fmt: skip
        if dtype == tl.float16:
            size = largest(h_tile)
            acc += size * tl.dot(operand(h_tile / size, dtype), operand(b_tile, dtype), input_precision="ieee")
        else:
            acc = tl.dot(operand(h_tile, dtype), operand(b_tile, dtype), acc, input_precision="ieee")
    tl.store(y + t[:, None] * stride_y + d[None, :], narrow(acc, dtype), mask=inside)


@triton.jit
def _token_sum(
    x, y, out, T, first, stride_xt, stride_od, stride_or, d,
    D: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[d, k] = sum over this split's t of x[t, d] y[t, first UNIT + k], for the RANK trained columns k."""
    dtype: tl.constexpr = x.dtype.element_ty
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    acc = tl.zeros((BD, BK), dtype=tl.float32)
    for i in range(STEPS):
        t = (tl.program_id(1).to(tl.int64) * STEPS + i) * BT + tl.arange(0, BT)
        x_tile = tl.load(
            x + t[:, None] * stride_xt + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
        )
        here = (t < T)[:, None] & (k < RANK)[None, :]
        y_tile = sum_parts(y, t[:, None] * R + first * UNIT + k[None, :], here, T.to(tl.int64) * R, PARTS)
        x_tile = tl.trans(operand(x_tile, dtype))
        if dtype == tl.float16:
            size = largest(y_tile)
            acc += size * tl.dot(x_tile, operand(y_tile / size, dtype), input_precision="ieee")
        else:
            acc = tl.dot(x_tile, operand(y_tile, dtype), acc, input_precision="ieee")
    tl.store(
        out + d[:, None] * stride_od + k[None, :] * stride_or, acc, mask=(d < D)[:, None] & (k < RANK)[None, :]
    )


@triton.jit(do_not_specialize=["T", "first"])
def gradient_kernel(
    x, g, A, h, Y, base_dx, dx, dA, dB, T, first,
    stride_xt, stride_gt, stride_ad, stride_ar, stride_base, stride_dx,
    stride_dAs, stride_dAd, stride_dBs, stride_dBr,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
    PARTS_H: tl.constexpr, PARTS_Y: tl.constexpr, STEPS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """K2: one launch of three kinds of programs; x and g are read once for each block of BK trained columns.

    Grid axis 0: blocks of D_in that finish dx = base_dx + Y A.T, then blocks of D_in that make parts of
    dA = x.T Y[:, trained], then blocks of D_out that make parts of dB = h[:, trained].T g. Axis 1: splits of the
    tokens. Axis 2: blocks of BK trained columns, which begin at column first UNIT: with a UNIT of 4 they are loaded 16
    bytes at a time. A is that of before any update. dA and dB are float32 parts, stride_dAs and stride_dBs elements
    apart.
    """
    tl.static_assert(BR >= 16 and BK >= 16)
    dtype: tl.constexpr = x.dtype.element_ty
    blocks_in: tl.constexpr = (D_IN + BD - 1) // BD
    block, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if block >= 2 * blocks_in:
        d = (block - 2 * blocks_in).to(tl.int64) * BD + tl.arange(0, BD)
        _token_sum(
            g, h, dB + split * stride_dBs, T, first, stride_gt, 1, stride_dBr, d,
            D_OUT, R, RANK, UNIT, PARTS_H, STEPS, BT, BD, BK,
        )  # fmt: skip
    elif block >= blocks_in:
        d = (block - blocks_in).to(tl.int64) * BD + tl.arange(0, BD)
        _token_sum(
            x, Y, dA + split * stride_dAs, T, first, stride_xt, stride_dAd, 1, d,
            D_IN, R, RANK, UNIT, PARTS_Y, STEPS, BT, BD, BK,
        )  # fmt: skip
    elif tl.program_id(2) == 0:
        d = block.to(tl.int64) * BD + tl.arange(0, BD)
        for i in range(STEPS):
            t = (split * STEPS + i) * BT + tl.arange(0, BT)
            inside = (t < T)[:, None] & (d < D_IN)[None, :]
            acc = tl.zeros((BT, BD), dtype=tl.float32)
            if base_dx is not None:
                at = base_dx + t[:, None] * stride_base + d[None, :]
                acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            for j in range((R + BR - 1) // BR):
                r = j * BR + tl.arange(0, BR)
                here = (t < T)[:, None] & (r < R)[None, :]
                y_tile = sum_parts(Y, t[:, None] * R + r[None, :], here, T.to(tl.int64) * R, PARTS_Y)
                a_tile = tl.load(
                    A + d[None, :] * stride_ad + r[:, None] * stride_ar,
                    mask=(r < R)[:, None] & (d < D_IN)[None, :], other=0.0,
                )  # fmt: skip
                if dtype == tl.float16:
                    size = largest(y_tile)
                    acc += size * tl.dot(operand(y_tile / size, dtype), operand(a_tile, dtype), input_precision="ieee")
                else:
                    acc = tl.dot(operand(y_tile, dtype), operand(a_tile, dtype), acc, input_precision="ieee")
            tl.store(dx + t[:, None] * stride_dx + d[None, :], narrow(acc, dtype), mask=inside)
