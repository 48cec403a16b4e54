"""The fold keeps x W, empties span(P) of A, and says what a cut drops."""

import pytest
import torch
from torch import Tensor

from ogpstream.learner.fold import Cut, add_to_held, cut, remove
from ogpstream.memory.experts import Held

D_IN, D_OUT, RANK, SCALING = 61, 37, 5, 1.7


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _directions(seed: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(_normal(seed, D_IN, count)).Q.to(dtype)


def _product(held: Held) -> Tensor:
    return held.U.double() @ held.V.double()


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 5e-7)])
@pytest.mark.parametrize("count", [1, 4, RANK, RANK + 3, 40])
def test_a_fold_without_a_cut_does_not_change_the_function(dtype: torch.dtype, rounding: float, count: int) -> None:
    A, B = _normal(1, D_IN, RANK, dtype=dtype), _normal(2, RANK, D_OUT, dtype=dtype)
    held = Held(_normal(3, D_IN, 2, dtype=dtype), _normal(4, 2, D_OUT, dtype=dtype))
    N = _directions(5, count, dtype)
    before = SCALING * A.double() @ B.double() + _product(held)
    freed, coefficients = remove(A, N)
    new, lost = add_to_held(held, N, coefficients, B, SCALING, None)
    after = SCALING * freed.double() @ B.double() + _product(new)
    assert _norm(after - before) <= rounding * _norm(before)
    # no wider than the fold's own rank
    assert new.rank == 2 + min(count, RANK)
    assert new.U.dtype == new.V.dtype == dtype
    assert lost == Cut()


def test_what_is_removed_leaves_less_than_one_pass_would() -> None:
    A, N = _normal(1, 2048, 24, dtype=torch.float32), torch.linalg.qr(_normal(2, 2048, 16)).Q.float()
    # along N it is a thousand times as large as elsewhere
    A = A + 1000 * N @ _normal(3, 16, 24, dtype=torch.float32)
    freed, coefficients = remove(A, N)
    left = _norm(N.double().T @ freed.double())
    one_pass = _norm(N.double().T @ (A - N @ (N.T @ A)).double())
    assert left < 0.2 * one_pass
    assert left <= 1e-7 * _norm(freed.double())
    assert _norm(freed.double() + N.double() @ coefficients.double() - A.double()) <= 3e-7 * _norm(A.double())


@pytest.mark.parametrize(("k", "rank"), [(9, 4), (9, 1), (9, 8), (45, 16)])
def test_a_cut_is_the_best_approximation_and_names_what_it_drops(k: int, rank: int) -> None:
    U, V = _normal(1, D_IN, k), _normal(2, k, D_OUT)
    left, s, right = torch.linalg.svd(U @ V, full_matrices=False)
    held, lost = cut(U, V, rank)
    assert held.rank == rank
    best = left[:, :rank] * s[:rank] @ right[:rank]
    assert torch.allclose(_product(held), best, rtol=0, atol=1e-12 * float(s[0]))
    assert lost.first == pytest.approx(float(s[rank]), rel=1e-10)
    assert lost.energy == pytest.approx(float(s[rank:].square().sum()), rel=1e-10)
    assert lost.dropped is not None
    assert torch.allclose(_product(held) + _product(lost.dropped), U @ V, rtol=0, atol=1e-12 * float(s[0]))
    # both factors of one size, so that neither loses digits in float32
    assert held.U.norm() == pytest.approx(float(held.V.norm()))


@pytest.mark.parametrize("rank", [3, 4, 16])
def test_a_cut_that_is_wide_enough_drops_nothing(rank: int) -> None:
    """Rank 3 of 8 columns: the others are dependent, so they go without a loss."""
    U = _normal(1, D_IN, 3) @ _normal(2, 3, 8)
    V = _normal(3, 8, D_OUT)
    held, lost = cut(U, V, rank)
    assert held.rank == 3
    assert torch.allclose(_product(held), U @ V, rtol=0, atol=1e-12 * _norm(U @ V))
    assert lost.first <= 1e-12 * _norm(U @ V)


def test_the_function_moves_by_no_more_than_the_first_dropped_value() -> None:
    A, B, N = _normal(1, D_IN, RANK), _normal(2, RANK, D_OUT), _directions(3, 4)
    held = Held(_normal(4, D_IN, 6), _normal(5, 6, D_OUT))
    freed, coefficients = remove(A, N)
    new, lost = add_to_held(held, N, coefficients, B, SCALING, 6)
    change = SCALING * (freed - A) @ B + _product(new) - _product(held)
    assert new.rank == 6
    assert _norm(change) == pytest.approx(lost.first, rel=1e-9)
    assert float(change.norm()) == pytest.approx(lost.energy**0.5, rel=1e-9)


@pytest.mark.parametrize("rank", [None, 2])
def test_nothing_to_fold_leaves_the_held_part_as_it_is(rank: int | None) -> None:
    held = Held(_normal(1, D_IN, 2), _normal(2, 2, D_OUT))
    B, C, N = _normal(3, RANK, D_OUT), _normal(4, 3, RANK), _directions(5, 3)
    for coefficients, factor in ((torch.zeros_like(C), B), (C, torch.zeros_like(B))):
        new, lost = add_to_held(held, N, coefficients, factor, SCALING, rank)
        assert new is held and lost == Cut()


def test_cutting_hundreds_of_times_does_not_drift() -> None:
    """fp32 factors and cuts that drop nothing: only rounding remains, and it does not pile up."""
    held = Held(_normal(1, D_IN, 8, dtype=torch.float32), _normal(2, 8, D_OUT, dtype=torch.float32))
    before = _product(held)
    lost = 0.0
    for _ in range(300):
        held, one = cut(held.U, held.V, 8)
        lost += one.first
    assert lost == 0.0
    assert _norm(_product(held) - before) <= 1e-6 * _norm(before)


def test_nothing_cuts_to_nothing() -> None:
    held, lost = cut(torch.zeros(7, 3), torch.randn(3, 5), 2)
    assert (held.U.shape, held.V.shape, lost.first, lost.energy) == ((7, 0), (0, 5), 0.0, 0.0)
