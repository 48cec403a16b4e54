"""The operations of one update in plain torch: slow, obvious, the truth for the fast ones, what a CPU runs.

They accumulate in float32, or in float64 when an operand is float64, and upcast what is narrower; the ones
that work in place (a trailing underscore) do so in the dtype of the tensor they change. Arguments are not
checked here: `dispatch` does that once for all backends.

Times in comments were measured in float32 on one core of an EPYC with torch's MKL, best of 60.

Symbols: T tokens, D_in and D_out widths of the adapted linear, R columns of all packed factors, r trained
ones among them, M rows of a basis, K columns projected against it, n supervised rows, V vocabulary.
"""

import torch
from torch import Tensor

from ogpstream.kernels.configs import CHUNK

_TILE = 256  # tokens summed at a time: one BLAS call may add its 2000 terms one by one, rounding 8e-7 instead of 3e-7


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to accumulate in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _sum_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a.T b of a `[T, m]` and b `[T, n]`, with a rounding that does not grow with T or hang on the BLAS."""
    out = a[:_TILE].T @ b[:_TILE]
    for start in range(_TILE, len(a), _TILE):
        out += a[start : start + _TILE].T @ b[start : start + _TILE]
    return out


def _thin(a: Tensor, b: Tensor) -> Tensor:
    """a b where b has few columns, as (b.T a.T).T.

    With 8 columns 0.33 of the time of a b at `[128, 256]`, 0.47 at `[1024, 2048]`; with 40 columns 1.3 and 0.9.
    """
    return (b.T @ a.T).T


def lora_forward(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, *, onto: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the packed adapters add to an adapted linear.

        h = (x A) * scale ; y = onto + h B

    Args:
        x: inputs of the linear, `[T, D_in]`.
        A: `[D_in, R]`, B: `[R, D_out]`, the factors of all active experts side by side on the rank axis.
        scale: `[R]`, gate times scaling of each column.
        onto: `[T, D_out]` in x's dtype, the frozen linear's own output, which becomes y in place; zero when it is not
            given.

    Returns:
        y `[T, D_out]` in x's dtype, and h `[T, R]` in the dtype accumulated in, for `lora_backward`.
    """
    wide = _wide(x, A, B, scale)
    # contiguous, as the other backends need it that may go on from here
    h = (_thin(x.to(wide), A.to(wide)) * scale.to(wide)).contiguous()
    if onto is None:
        return (h @ B.to(wide)).to(x.dtype), h
    if onto.dtype == wide:
        # with R 8 0.5 to 0.3 of the time of a product and a sum, for T 128 to 1024 and widths of 256 to 2048
        return onto.addmm_(h, B.to(wide)), h
    return onto.add_(h @ B.to(wide)), h


def lora_backward(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    *,
    trained: slice,
    h: Tensor | None = None,
    base_dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_forward` with respect to the trained columns and the input.

        Y = (g B.T) * scale ; dA = x.T Y[:, trained] ; dB = h[:, trained].T g ; dx = base_dx + Y A.T

    All R columns take part in dx, only the `trained` ones in dA and dB.

    Args:
        x: `[T, D_in]`, A: `[D_in, R]`, B: `[R, D_out]`, scale: `[R]`, as given to `lora_forward`.
        g: gradient of the loss with respect to y, `[T, D_out]`.
        trained: the columns, r of them, that belong to the expert of this sample.
        h: `[T, R]`, as returned by `lora_forward`; computed again when it is not given.
        base_dx: `[T, D_in]`, the frozen linear's own input gradient `g W`; zero when it is not given.

    Returns:
        dA `[D_in, r]` and dB `[r, D_out]` in the dtype accumulated in, dx `[T, D_in]` in x's dtype.
    """
    [(dA, dB)], Y = _factor_gradients(x, g, A, B, scale, 1, trained, h)
    A = A.to(Y.dtype)
    dx = Y @ A.T if base_dx is None else torch.addmm(base_dx.to(Y.dtype), Y, A.T)
    return dA, dB, dx.to(x.dtype)


def lora_backward_samples(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    samples: int,
    *,
    trained: slice,
    h: Tensor,
    base_dx: Tensor,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """`lora_backward` of several samples at once, whose gradients stay apart.

    What each row has alone is computed for all rows together: for three samples of 26 tokens, width 192 and R 8 half of
    the time of three calls.

    Args:
        samples: how many; their rows, equally many, lie one after the other.
        base_dx: as for `lora_backward`; it may be overwritten.

    Returns:
        (dA, dB) of each sample, and dx `[T, D_in]`.
    """
    parts, Y = _factor_gradients(x, g, A, B, scale, samples, trained, h)
    if base_dx.dtype == Y.dtype:
        # with R 8 0.6 to 0.5 of the time that a new tensor takes, for T 128 to 1024 and widths of 256 to 2048
        return parts, base_dx.addmm_(Y, A.T.to(Y.dtype)).to(x.dtype)
    return parts, torch.addmm(base_dx.to(Y.dtype), Y, A.T.to(Y.dtype)).to(x.dtype)


def _factor_gradients(
    x: Tensor, g: Tensor, A: Tensor, B: Tensor, scale: Tensor, samples: int, trained: slice, h: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(dA, dB) of each sample, and Y, in the dtype accumulated in."""
    wide = _wide(x, g, A, B, scale, h)
    x, g, scale = x.to(wide), g.to(wide), scale.to(wide)
    h = _thin(x, A.to(wide)) * scale if h is None else h.to(wide)
    Y = _thin(g, B.to(wide).T) * scale
    each = zip(*(t.tensor_split(samples) for t in (Y[:, trained], x, h[:, trained], g)), strict=True)
    parts = [(_sum_over_tokens(Y_n, x_n).T, _sum_over_tokens(h_n, g_n)) for Y_n, x_n, h_n, g_n in each]
    return parts, Y


def project_out_(Z: Tensor, rows: Tensor, *, chunk: int = CHUNK, weights: Tensor | None = None) -> Tensor:
    """Remove from Z, in place, what lies along protected directions, one chunk of them after the other.

        coef_c = P_c.T Z ; Z -= P_c (w_c * coef_c)        for the chunks c of the basis P

    With orthonormal directions this is Z - P P.T Z, whatever the chunk size; what is left of Z in span(P) is
    rounding, |P.T Z| <= 5e-7 |Z before| in float32.

    Args:
        Z: `[D, K]`, float32 or float64: masters, a moment, or a gradient.
        rows: P.T `[M, D]`, one direction a row; may lie in host memory. Rows of zeros are no-ops.
        chunk: directions at a time; 32 rows of width 2048 are 256 KiB in float32.
        weights: `[M]`, the share of each direction to remove; all of it when not given.

    Returns:
        coef `[M, K]` in Z's dtype: what Z had along each direction when its chunk came.
    """
    coef = Z.new_empty(rows.shape[0], Z.shape[1])
    for start in range(0, rows.shape[0], chunk):
        here = slice(start, start + chunk)
        P_c = rows[here].to(device=Z.device, dtype=Z.dtype, non_blocking=True)  # [chunk, D]
        removed = coef[here] = _thin(P_c, Z)
        if weights is not None:
            removed = weights[here, None].to(device=Z.device, dtype=Z.dtype) * removed
        Z -= _thin(P_c.T, removed)
    return coef


def sgd_(w: Tensor, g: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
    """One step of SGD in place: `w -= lr (g + weight_decay w)`, for float32 or float64 masters w."""
    w.mul_(1 - lr * weight_decay).sub_(g.to(w.dtype), alpha=lr)


def adam_(
    w: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One step of AdamW in place, with an eps that is relative.

        m = b1 m + (1 - b1) g ; v = b2 v + (1 - b2) g^2 ; s = sqrt(v / (1 - b2^step))
        w = (1 - lr weight_decay) w - lr (m / (1 - b1^step)) / (s + eps rms(s))

    rms(s) is the root mean square of s over the whole tensor: the step does not depend on the scale of the
    gradients, which are 1e-7 in BitNet-like models, where the usual absolute 1e-8 is a tenth of s. An element
    whose s + eps rms(s) is 0 is not moved: 0/0 counts as 0. (Gradients under 1e-18 vanish in a float32 g^2.)

    Args:
        w, exp_avg, exp_avg_sq: masters and moments of one shape and dtype, float32 or float64.
        g: gradient, same shape.
        step: number of this step, the first is 1.
        lr: learning rate, weight_decay: decoupled from the gradient (Loshchilov and Hutter, 2019).
        betas: b1, b2. eps: relative to rms(s).
    """
    g = g.to(w.dtype)
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    v_hat = exp_avg_sq / (1 - beta2**step)
    denominator = v_hat.sqrt() + eps * v_hat.mean().sqrt()
    change = (exp_avg / (1 - beta1**step)) / denominator
    w.mul_(1 - lr * weight_decay).sub_(change.masked_fill_(denominator == 0, 0.0), alpha=lr)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of a chunk of supervised rows, with its gradient in closed form.

        loss_sum = sum_i (logsumexp(logits_i) - logits_i[target_i])
        dlogits = softmax(logits) - onehot(target)

    Args:
        logits: `[n, V]`. target: `[n]`, int64 ids in [0, V).

    Returns:
        loss_sum, a scalar in nats in the dtype accumulated in, and dlogits `[n, V]` in the dtype of logits.
    """
    wide = _wide(logits)
    row = torch.arange(len(target), device=target.device)
    # not exp(log_softmax): where one logit is 95 above the rest its denormal results take 18 times as long (64 rows of
    # 8000)
    dlogits = torch.softmax(logits, dim=-1, dtype=wide)
    largest, at = logits.max(dim=-1)
    # the largest probability is at least 1 / V, so its logarithm is exact enough for the logsumexp
    loss_sum = (largest.to(wide) - dlogits[row, at].log() - logits[row, target].to(wide)).sum()
    dlogits[row, target] -= 1
    return loss_sum, dlogits.to(logits.dtype)
