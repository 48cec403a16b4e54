"""The reference operations against autograd, torch.optim and their own definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.kernels import reference

DOUBLE = torch.float64
# T, D_in, D_out, R, trained: one token, primes, wider and narrower outputs, one column, a slice in the middle
SHAPES = [
    (1, 7, 5, 1, slice(0, 1)),
    (63, 40, 17, 24, slice(8, 16)),
    (63, 13, 48, 16, slice(0, 8)),
    (5, 48, 48, 9, slice(8, 9)),
    (33, 20, 31, 3, slice(1, 1)),
]


def problem(T, D_in, D_out, R, dtype=DOUBLE, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=DOUBLE).to(dtype)

    return randn(T, D_in), randn(T, D_out), randn(D_in, R), randn(R, D_out), randn(R)


def orthonormal_rows(M, D, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, M, generator=rng, dtype=DOUBLE))[0].T.to(dtype).contiguous()


def relative(out, ref):
    return float((out.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.parametrize("T,D_in,D_out,R,trained", SHAPES)
@pytest.mark.parametrize("given_h", [True, False])
def test_lora_gradients_equal_autograd(T, D_in, D_out, R, trained, given_h):
    x, g, A, B, scale = problem(T, D_in, D_out, R)
    W = torch.randn(D_out, D_in, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    x_leaf, A_leaf, B_leaf = (t.clone().requires_grad_() for t in (x, A, B))
    y_ref = torch.einsum("ti,ir,r,ro->to", x_leaf, A_leaf, scale, B_leaf)
    (x_leaf @ W.T + y_ref).backward(g)

    y, h = reference.lora_forward(x, A, B, scale)
    dA, dB, dx = reference.lora_backward(
        x, g, A, B, scale, trained=trained, h=h if given_h else None, base_dx=g @ W
    )
    for name, out, ref in (
        ("y", y, y_ref.detach()),
        ("h", h, torch.einsum("ti,ir,r->tr", x, A, scale)),
        ("dA", dA, A_leaf.grad[:, trained]),
        ("dB", dB, B_leaf.grad[trained]),
        ("dx", dx, x_leaf.grad),
    ):
        torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_lora_forward_adds_in_place(dtype):
    x, base, A, B, scale = problem(9, 12, 7, 5, dtype)
    y, h = reference.lora_forward(x, A, B, scale)
    onto = base.clone()
    added, h_too = reference.lora_forward(x, A, B, scale, onto=onto)
    assert added.data_ptr() == onto.data_ptr() and added.dtype == dtype and torch.equal(h, h_too)
    torch.testing.assert_close(added, base + y)


def test_lora_dx_without_a_base_is_the_adapters_alone():
    x, g, A, B, scale = problem(9, 12, 7, 5)
    *_, dx = reference.lora_backward(x, g, A, B, scale, trained=slice(0, 2))
    torch.testing.assert_close(dx, torch.einsum("to,ro,r,ir->ti", g, B, scale, A))


def test_lora_gradients_of_several_samples_stay_apart():
    x, g, A, B, scale = problem(12, 7, 5, 4)
    h, base_dx = reference.lora_forward(x, A, B, scale)[1], torch.randn(12, 7, dtype=DOUBLE)
    parts, dx = reference.lora_backward_samples(x, g, A, B, scale, 3, trained=slice(1, 3), h=h, base_dx=base_dx.clone())
    assert len(parts) == 3
    for n, (dA, dB) in enumerate(parts):
        own = slice(4 * n, 4 * n + 4)
        alone = reference.lora_backward(x[own], g[own], A, B, scale, trained=slice(1, 3), base_dx=base_dx[own])
        for name, out, ref in zip(("dA", "dB", "dx"), (dA, dB, dx[own]), alone, strict=True):
            torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_lora_without_columns_adds_nothing():
    x, g, A, B, scale = problem(4, 6, 3, 0)
    y, h = reference.lora_forward(x, A, B, scale)
    dA, dB, dx = reference.lora_backward(x, g, A, B, scale, trained=slice(0, 0), h=h)
    assert torch.equal(y, torch.zeros(4, 3, dtype=DOUBLE)) and torch.equal(dx, torch.zeros_like(x))
    assert (h.shape, dA.shape, dB.shape) == ((4, 0), (6, 0), (0, 3))


@pytest.mark.parametrize("dtype,rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_lora_accumulates_half_precision_in_float32(dtype, rounding):
    # 2000 tokens: accumulated in bf16, dA would be off by far more than one rounding of its inputs
    x, g, A, B, scale = problem(2000, 24, 10, 4, dtype)
    wide = [t.double() for t in (x, g, A, B, scale)]
    y, h = reference.lora_forward(x, A, B, scale)
    dA, dB, dx = reference.lora_backward(x, g, A, B, scale, trained=slice(0, 4), base_dx=x)
    y_ref, h_ref = reference.lora_forward(wide[0], *wide[2:])
    dA_ref, dB_ref, dx_ref = reference.lora_backward(*wide, trained=slice(0, 4), base_dx=wide[0])
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert {h.dtype, dA.dtype, dB.dtype} == {torch.float32}
    for name, out, ref in (("h", h, h_ref), ("dA", dA, dA_ref), ("dB", dB, dB_ref)):
        assert relative(out, ref) < 1e-6, name
    for name, out, ref in (("y", y, y_ref), ("dx", dx, dx_ref)):
        assert relative(out, ref) < rounding, name


@pytest.mark.parametrize("M,D,K", [(1, 3, 1), (31, 64, 8), (32, 100, 5), (96, 96, 24), (256, 512, 8)])
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_project_out_leaves_nothing_in_the_span(M, D, K, chunk):
    rows = orthonormal_rows(M, D)
    before = torch.randn(D, K, generator=torch.Generator().manual_seed(3))
    Z = before.clone()
    coef = reference.project_out_(Z, rows, chunk=chunk)
    exact = rows.double() @ before.double()
    assert (rows.double() @ Z.double()).norm() <= 5e-7 * before.norm()
    assert (coef - exact).norm() <= 1e-6 * before.norm()
    assert (Z - (before - rows.double().T @ exact)).norm() <= 1e-6 * before.norm()


def test_project_out_treats_zero_rows_as_absent():
    basis = orthonormal_rows(20, 30, DOUBLE)
    padded = torch.zeros(64, 30, dtype=DOUBLE)
    slots = [0, *range(3, 21), 63]
    padded[slots] = basis
    Z, Z_padded = (torch.ones(30, 4, dtype=DOUBLE) for _ in range(2))
    coef, coef_padded = reference.project_out_(Z, basis), reference.project_out_(Z_padded, padded)
    torch.testing.assert_close(Z_padded, Z, rtol=0, atol=1e-14)
    torch.testing.assert_close(coef_padded[slots], coef, rtol=0, atol=1e-14)
    assert coef_padded.norm() == coef_padded[slots].norm()
    untouched = torch.ones(30, 4)
    assert not reference.project_out_(untouched, torch.zeros(40, 30)).any()
    assert torch.equal(untouched, torch.ones(30, 4))


def test_project_out_takes_each_directions_share():
    rows = orthonormal_rows(40, 50, DOUBLE)
    weights = torch.linspace(0, 1, 40, dtype=DOUBLE)
    Z = torch.randn(50, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    before = rows @ Z
    reference.project_out_(Z, rows, chunk=32, weights=weights)
    torch.testing.assert_close(rows @ Z, (1 - weights)[:, None] * before, rtol=0, atol=1e-13)


def test_project_out_goes_chunk_after_chunk():
    # in two chunks the second one sees what the first one left: on skew directions that is a different result
    rows = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]], dtype=DOUBLE)
    Z = torch.tensor([[1.0], [0.0]], dtype=DOUBLE)
    coef = reference.project_out_(Z, rows, chunk=1)
    torch.testing.assert_close(coef, torch.tensor([[1.0], [0.0]], dtype=DOUBLE))
    assert not Z.any()


def test_project_out_changes_a_view_in_its_slab():
    slab = torch.ones(12, 10)
    reference.project_out_(slab[:, 2:5], orthonormal_rows(12, 12))
    assert slab[:, 2:5].abs().max() < 1e-6
    assert torch.equal(slab[:, :2], torch.ones(12, 2)) and torch.equal(slab[:, 5:], torch.ones(12, 5))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_equals_torch(weight_decay):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(13, 5, generator=rng, dtype=DOUBLE)
    leaf = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.SGD([leaf], lr=0.03, weight_decay=weight_decay)
    for _ in range(5):
        leaf.grad = torch.randn(13, 5, generator=rng, dtype=DOUBLE)
        reference.sgd_(w, leaf.grad, lr=0.03, weight_decay=weight_decay)
        optimizer.step()
    torch.testing.assert_close(w, leaf.data, rtol=1e-14, atol=1e-14)


def adam_steps(gradients, eps, lr=0.01, weight_decay=0.0, dtype=DOUBLE):
    """Masters after these steps from 1, and both moments."""
    w = torch.ones_like(gradients[0], dtype=dtype)
    moments = torch.zeros_like(w), torch.zeros_like(w)
    for step, g in enumerate(gradients, start=1):
        reference.adam_(
            w, g, *moments, step=step, lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay
        )
    return w, *moments


def gradients_like(*shape, steps=6, size=1.0):
    rng = torch.Generator().manual_seed(0)
    return [size * torch.randn(*shape, generator=rng, dtype=DOUBLE) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_adam_equals_torch_when_eps_is_negligible(weight_decay):
    gradients = gradients_like(13, 5)
    leaf = torch.nn.Parameter(torch.ones(13, 5, dtype=DOUBLE))
    optimizer = torch.optim.AdamW([leaf], lr=0.01, eps=1e-30, weight_decay=weight_decay)
    for g in gradients:
        leaf.grad = g.clone()
        optimizer.step()
    w, exp_avg, exp_avg_sq = adam_steps(gradients, eps=1e-30, weight_decay=weight_decay)
    state = optimizer.state[leaf]
    torch.testing.assert_close(w, leaf.data, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1e-7, 1e-12, 1e6])
def test_adam_does_not_depend_on_the_scale_of_the_gradients(size):
    # eps 0.1, so that an absolute eps would be seen at once
    w, *_ = adam_steps(gradients_like(8, 3), eps=0.1)
    scaled, *_ = adam_steps([size * g for g in gradients_like(8, 3)], eps=0.1)
    torch.testing.assert_close(scaled, w, rtol=1e-9, atol=0)
    in_float32, *_ = adam_steps([(size * g).float() for g in gradients_like(8, 3)], 0.1, dtype=torch.float32)
    torch.testing.assert_close(in_float32.double(), w, rtol=1e-5, atol=0)


def test_adam_eps_is_a_share_of_the_rms():
    # one step from zero moments: m_hat = g, sqrt(v_hat) = |g|
    g = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=DOUBLE) * 1e-7
    w, *_ = adam_steps([g], eps=0.5, lr=1.0)
    torch.testing.assert_close(1 - w, g / (g.abs() + 0.5 * 2.5e-7), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_adam_leaves_exact_zeros_where_they_are(eps):
    w, exp_avg, exp_avg_sq = adam_steps([torch.zeros(4, 2, dtype=DOUBLE)] * 3, eps=eps)
    assert torch.equal(w, torch.ones(4, 2, dtype=DOUBLE)) and not exp_avg.any() and not exp_avg_sq.any()
    mixed = torch.tensor([0.0, 1e-7], dtype=DOUBLE)
    w, *_ = adam_steps([mixed] * 3, eps=eps)
    assert w[0] == 1 and 0.9 < w[1] < 1


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]))
def test_cross_entropy_equals_torch(n, V, seed, spread):
    rng = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(n, V, generator=rng, dtype=DOUBLE)).requires_grad_()
    target = torch.randint(V, (n,), generator=rng)
    ref = F.cross_entropy(logits, target, reduction="sum")
    ref.backward()
    untouched = logits.detach().clone()
    loss_sum, dlogits = reference.cross_entropy(logits.detach(), target)
    torch.testing.assert_close(loss_sum, ref.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dlogits, logits.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(logits.detach(), untouched)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_cross_entropy_is_stable_for_large_logits(offset):
    logits = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]]) + offset
    loss_sum, dlogits = reference.cross_entropy(logits, torch.tensor([1, 2]))
    assert float(loss_sum) == pytest.approx(200 + math.log(3), rel=1e-6)
    expected = torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]])
    torch.testing.assert_close(dlogits, expected, rtol=0, atol=1e-6)


def test_cross_entropy_works_in_float32_inside():
    logits = torch.randn(64, 501, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.arange(64)
    loss_sum, dlogits = reference.cross_entropy(logits, target)
    ref_sum, ref = reference.cross_entropy(logits.double(), target)
    assert (loss_sum.dtype, dlogits.dtype, ref_sum.dtype) == (torch.float32, torch.bfloat16, DOUBLE)
    assert float(loss_sum) == pytest.approx(float(ref_sum), rel=1e-6)
    assert relative(dlogits, ref) < 2**-8


def test_cross_entropy_of_no_rows_is_zero():
    loss_sum, dlogits = reference.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert loss_sum == 0 and dlogits.shape == (0, 5)
