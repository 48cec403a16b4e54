"""The fold: what an expert does along a direction moves from its plastic to its held part when P takes the direction.

An expert computes x W with W = scaling A B + U V. With the invariant P.T A = 0 no change of A or B can move x W for x
in span(P). When orthonormal directions N join P, the fold keeps the invariant without changing W:

    U V  <-  U V + N (scaling * N.T A B)          A  <-  A - N (N.T A)

The sum has rank k + min(j, r); two thin QRs and one small SVD cut it back to rank r_c. What the cut drops is returned,
never silent: it is the only thing that moves span(P).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ogpstream.memory.experts import Held

# singular values under this share of the largest are rounding (fp32 factors carry 6e-8), not content
NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Cut:
    """What a cut dropped: its first singular value (a bound on the change of x W per |x|), the energy of all of them,
    and the dropped matrix itself as two factors (None where nothing was dropped)."""

    first: float = 0.0
    energy: float = 0.0
    dropped: Held | None = None


def remove(block: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Take orthonormal directions out of a block of factors.

    Args:
        block: A of all linears that share the input, shape `[D_in, K]`.
        directions: N, shape `[D_in, j]`.

    Returns:
        The block with N.T block = 0 and the coefficients N.T block, shape `[j, K]`.
    """
    coefficients = directions.T @ block
    block = block - directions @ coefficients
    # a second pass takes out what the first one's rounding left: 2e-7 of the block becomes 1e-8
    rest = directions.T @ block
    return block - directions @ rest, coefficients + rest


def add_to_held(held: Held, directions: Tensor, coefficients: Tensor, B: Tensor, scaling: float,
                held_rank: int | None) -> tuple[Held, Cut]:
    """Add N (scaling * C B) to the held part and cut it to `held_rank` (None: no cut).

    Args:
        held: U `[D_in, k]` and V `[k, D_out]`.
        directions: N, shape `[D_in, j]`.
        coefficients: C = N.T A of this linear, shape `[j, r]`.
        B: shape `[r, D_out]`.

    Returns:
        The new held part and what was dropped.
    """
    j, r = coefficients.shape
    if not bool(B.any()) or not bool(coefficients.any()):
        return held, Cut()
    if j <= r:
        left, right = directions, scaling * (coefficients @ B)
    else:
        left, right = directions @ coefficients, scaling * B
    U, V = torch.cat([held.U, left], 1), torch.cat([held.V, right], 0)
    if held_rank is None:
        return Held(U, V), Cut()
    return cut(U, V, held_rank)


def cut(U: Tensor, V: Tensor, rank: int) -> tuple[Held, Cut]:
    """Best approximation of U V of the given rank, balanced between both factors.

    Re-cutting happens hundreds of times, so it runs in float64 and is stored in the dtype of U.

    Args:
        U: shape `[D_in, k]`.
        V: shape `[k, D_out]`.
    """
    left, right = U.double(), V.double().T
    # columns of equal size on both sides: else a small one beside a large one would fall under what is kept
    sizes = left.norm(dim=0), right.norm(dim=0)
    balance = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), torch.zeros_like(sizes[0]))
    left, right = left * balance, right * torch.where(balance > 0, 1 / balance, 0.0)
    whiten_left, r_left = _orthonormal(left)
    whiten_right, r_right = _orthonormal(right)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    keep = min(rank, int((s > NEGLIGIBLE * s[:1]).sum()))
    turn_left, turn_right = whiten_left @ u, whiten_right @ vt.T
    root = s[:keep].sqrt()
    halves = left @ (turn_left[:, :keep] * root), right @ (turn_right[:, :keep] * root)
    held = Held(halves[0].to(U.dtype), halves[1].T.to(V.dtype))
    if keep < rank or keep == len(s):
        return held, Cut()
    rest = s[keep:]
    dropped = Held((left @ (turn_left[:, keep:] * rest)).to(U.dtype), (right @ turn_right[:, keep:]).T.to(V.dtype))
    return held, Cut(float(rest[0]), float((rest**2).sum()), dropped)


def _orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """(W, R) with X W orthonormal and X = (X W) R, for a tall X in float64.

    Through the Gram matrix, a quarter of the time of a QR at 2048 x 40, where a fold happens in every linear of a model
    at once. It squares the singular values, so directions under 1e-7 of the largest are left out.
    """
    values, vectors = torch.linalg.eigh(X.T @ X)
    kept = values > 1e-14 * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    return vectors / root, root[:, None] * vectors.T
