"""Device code of the cross-entropy: logits are read twice and their gradient is written once."""

import triton
import triton.language as tl

from ogpstream.kernels.device_common import narrow


@triton.jit
def cross_entropy_kernel(
    logits, target, loss, dlogits, stride_n, V: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row: log-sum-exp as it goes over the row, then softmax - onehot."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride_n
    # per lane, so that one reduction per row is enough; -1e38 and not -inf, whose difference with itself is NaN
    top = tl.full((BLOCK,), -1e38, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(STEPS):
        v = step * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(source + v, mask=v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    peak = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - peak), 0)
    wanted = tl.load(target + row)
    # an id outside the vocabulary gives a loss that no guard lets through
    known = (wanted >= 0) & (wanted < V)
    own = tl.load(source + wanted, mask=known, other=float("nan")).to(tl.float32)
    # everything relative to the peak: of logits around 1e4 their sum with log(total) would keep 3 decimals
    tl.store(loss + row, tl.log(total) - (own - peak))
    for step in range(STEPS):
        v = step * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(source + v, mask=v < V, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(z - peak) / total - tl.where(v == wanted, 1.0, 0.0)
        tl.store(dlogits + row * V + v, narrow(gradient, dlogits.dtype.element_ty), mask=v < V)
