import torch

from ogpstream.learner.anchor import COLUMNS, BaseAnchor
from ogpstream.memory.layout import Layout, SiteShape


def _case(d: int = 40, protected: int = 5, seed: int = 0) -> tuple[torch.Tensor, BaseAnchor, Layout, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, d, dtype=torch.float64)
    covariance = x.T @ x
    values, vectors = torch.linalg.eigh(covariance)
    anchor = BaseAnchor.from_eigen(values.flip(0), vectors.flip(1), protected)
    layout = Layout([SiteShape("a", d, 24, "x"), SiteShape("b", d, 16, "x")], 3)
    slab = torch.randn(layout.numel, generator=generator, dtype=torch.float64) / d**0.5
    # outside the protected directions, as an expert always is
    P = vectors.flip(1)[:, :protected]
    block = layout.a_block(slab, "x")
    block -= P @ (P.T @ block)
    return covariance / covariance.diagonal().mean(), anchor, layout, slab


def _added(C: torch.Tensor, layout: Layout, slab: torch.Tensor) -> torch.Tensor:
    """tr((A B).T C A B), summed over both linears."""
    products = [layout.a(slab, i) @ layout.b(slab, i) for i in range(2)]
    return torch.stack([(product * (C @ product)).sum() for product in products]).sum()


def test_it_is_a_gradient_step_on_what_the_expert_adds_to_the_base_inputs():
    C, anchor, layout, slab = _case()
    scaling, strength = 2.0, 1e-3
    want = slab.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scaling**2 * _added(C, layout, want) / 2, want)
    got = slab.clone()
    anchor.pull_(layout, got, "x", scaling=scaling, strength=strength)
    # the anchor is stored in float32
    assert torch.allclose(got - slab, -strength * gradient, rtol=1e-4, atol=1e-6 * strength)


def test_the_eigenvalues_beyond_its_columns_are_kept_as_their_mean():
    d = COLUMNS + 30
    values = torch.linspace(2.0, 0.1, d, dtype=torch.float64)
    anchor = BaseAnchor.from_eigen(values, torch.eye(d, dtype=torch.float64), 10)
    got = anchor.times(torch.eye(d, dtype=torch.float64)).diagonal() * values.mean()
    assert torch.allclose(got[10 : 10 + COLUMNS], values[10 : 10 + COLUMNS], rtol=1e-6)
    assert torch.allclose(got[10 + COLUMNS :], values[10 + COLUMNS :].mean().expand(20), rtol=1e-6)


def test_a_step_that_would_overshoot_is_shortened():
    C, anchor, layout, slab = _case(seed=1)
    slab *= 100
    before = float(_added(C, layout, slab))
    for _ in range(5):
        anchor.pull_(layout, slab, "x", scaling=2.0, strength=1.0)
        after = float(_added(C, layout, slab))
        assert 0 < after < before
        before = after


def test_nothing_is_pulled_where_the_expert_does_nothing():
    _, anchor, layout, slab = _case()
    for i in range(2):
        layout.b(slab, i).zero_()
    before = slab.clone()
    anchor.pull_(layout, slab, "x", scaling=2.0, strength=1e-3)
    assert torch.equal(slab, before)
