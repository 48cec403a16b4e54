"""Muon: what its updates are, beside torch's own in bf16."""

import pytest
import torch

from ogpstream.profiling import muon
from ogpstream.profiling.muon import Muon, orthogonal


def matrices(n, rows, columns, seed=0):
    return torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows,columns", [(24, 24), (40, 16), (16, 40), (1, 7)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_all_values_near_one(rows, columns):
    stack = matrices(3, rows, columns) * torch.tensor([1e-12, 1.0, 1e6]).view(3, 1, 1)
    out = orthogonal(stack)
    values = torch.linalg.svdvals(out)
    # a value under 1 % of the norm stays small, and random square matrices have such
    assert values.max() < 1.3 and (rows == columns or values.min() > 0.6)
    for before, after in zip(stack.double(), out.double(), strict=True):
        u, _, vt = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vt.T
        assert (inner - inner.diagonal().diag()).norm() < 1e-3 * inner.norm()


def test_each_quintic_brings_what_the_one_before_left_nearer_to_one():
    values = torch.linspace(0.01, 1, 10001, dtype=torch.float64)
    errors = []
    for a, b, c in muon._QUINTICS:
        values = a * values + b * values**3 + c * values**5
        errors.append(float((values - 1).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0.269, abs=2e-3)


def test_under_autocast_the_values_are_near_one_too():
    with torch.autocast("cpu", torch.bfloat16):
        values = torch.linalg.svdvals(orthogonal(matrices(2, 40, 16)).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_matrix_without_gradient_content_does_not_move_to_nan():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_updates_equal_those_of_torch_but_for_its_bf16(monkeypatch):
    # its own quintic and rounds
    monkeypatch.setattr(muon, "_QUINTICS", ((3.4445, -4.7750, 2.0315),) * 5)
    shapes = [(32, 16), (16, 32), (32, 16), (16, 16)]
    ours = [torch.nn.Parameter(matrices(1, *shape, seed=i)[0]) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    starts = [p.detach().clone() for p in ours]
    optimizers = [Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)]
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = matrices(1, *shapes[i], seed=100 * step + i)[0]
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, a, b in zip(starts, ours, theirs, strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()
