"""Cross-entropy of a chunk of rows with its gradient in closed form, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ogpstream.kernels.configs import config_for
from ogpstream.kernels.device_loss import cross_entropy_kernel
from ogpstream.kernels.launch import HALF_OR_SINGLE, cdiv, launch, power_of_two, require, require_rows


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_i (logsumexp(logits_i) - logits_i[target_i])` and `softmax - onehot`, one launch and torch's sum.

    Args:
        logits: `[n, V]` in float32, bfloat16 or float16, rows contiguous.
        target: `[n]`, integer ids; one outside [0, V) makes the loss NaN.

    Returns:
        loss_sum, a float32 scalar in nats, and dlogits `[n, V]` in the dtype of logits.

    Raises:
        ValueError: a wrong shape, dtype or stride; the message names the tensor.
    """
    require(logits.dim() == 2, f"logits has shape {list(logits.shape)}, needs 2 dimensions")
    n, V = logits.shape
    require_rows("logits", logits, n, V, dtypes=HALF_OR_SINGLE)
    require_rows("target", target, n, dtypes=(torch.int64, torch.int32))
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    dlogits = torch.empty(n, V, dtype=logits.dtype, device=logits.device)
    block = min(config_for(logits.device).vocabulary, power_of_two(V))
    launch(
        cross_entropy_kernel, (n,), logits,
        logits, target, loss, dlogits, logits.stride(0), V=V, STEPS=cdiv(V, block), BLOCK=block,
    )  # fmt: skip
    return loss.sum(), dlogits
