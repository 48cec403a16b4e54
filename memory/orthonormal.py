"""Geometry of orthonormal rows P.T `[m, D_in]`: what lies outside their span, and how far from orthonormal they are."""

import torch
from torch import Tensor


def unit_rows(candidates: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Unit rows `[k, D_in]` in float64 of candidates `[D_in, k]` (zero for unusable ones), and which are usable `[k]`.

    Raises:
        ValueError: a wrong shape.
    """
    if candidates.ndim != 2 or candidates.shape[0] != d_in:
        raise ValueError(f"candidates have shape {tuple(candidates.shape)}, expected [{d_in}, k]")
    units = candidates.detach().T.to("cpu", torch.float64).contiguous()
    peak = units.abs().amax(dim=1)
    usable = peak.isfinite() & (peak > 0)
    units = torch.where(usable[:, None], units / peak[:, None], 0.0)
    return units / torch.where(usable, units.norm(dim=1), 1.0)[:, None], usable


def residual(span: Tensor, x: Tensor) -> Tensor:
    """(I - P P.T) x of each row x `[..., D_in]`; the rows of the span `[n, D_in]` are P.T."""
    return x - (x @ span.T) @ span


def orthogonalised(span: Tensor, unit: Tensor) -> Tensor:
    """Gram-Schmidt twice, normalised in between: the result has norm 1 unless the unit lies in the span."""
    first = residual(span, unit)
    return residual(span, first / first.norm())


def deviation(rows: Tensor) -> float:
    """|P.T P - I|_max in float64; NaN if a number is not finite, 0 if there is no row."""
    gram = _gram(rows)
    return float((gram - torch.eye(len(gram))).abs().max()) if len(gram) else 0.0


def condition(rows: Tensor) -> float:
    """Condition number of the Gram matrix P.T P: 1 if orthonormal or empty, inf if singular."""
    gram = _gram(rows)
    if not len(gram):
        return 1.0
    if not gram.isfinite().all():
        return float("inf")
    values = torch.linalg.eigvalsh(gram)
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows @ rows.T
