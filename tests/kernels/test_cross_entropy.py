"""The Triton cross-entropy against the reference in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpstream.kernels import reference
from ogpstream.kernels.cross_entropy import cross_entropy

BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@settings(max_examples=20)
@given(
    n=st.integers(1, 9), V=st.integers(1, 9000), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from(sorted(BOUND, key=str)),
)  # fmt: skip
def test_loss_and_gradient(device, n, V, seed, spread, dtype):
    rng = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(n, V, generator=rng)).to(device, dtype)
    target = torch.randint(V, (n,), generator=rng).to(device)
    before = logits.clone()
    loss, dlogits = cross_entropy(logits, target)
    loss_ref, exact = reference.cross_entropy(logits.double(), target)
    assert (loss.dtype, dlogits.dtype) == (torch.float32, dtype)
    # a loss near 0 is a difference of two numbers of the size of the logits
    assert abs(float(loss) - float(loss_ref)) <= 1e-6 * max(float(loss_ref), float(logits.abs().max()) * n)
    # softmax - onehot of a row that is sure cancels: relative to 1
    assert (dlogits - exact).norm() <= BOUND[dtype] * max(float(exact.norm()), 1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_stable_for_large_logits(offset, device):
    logits = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]], device=device) + offset
    loss, dlogits = cross_entropy(logits, torch.tensor([1, 2], device=device))
    assert float(loss) == pytest.approx(200 + math.log(3), rel=1e-6)
    expected = torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]], device=device)
    torch.testing.assert_close(dlogits, expected, rtol=0, atol=1e-6)


def test_masked_logits_of_minus_infinity(device):
    logits = torch.tensor([[0.0, -math.inf, 1.0]], device=device)
    loss, dlogits = cross_entropy(logits, torch.tensor([2], device=device))
    assert float(loss) == pytest.approx(math.log(1 + math.e) - 1, rel=1e-6)
    assert dlogits[0, 1] == 0 and bool(dlogits.isfinite().all())


@pytest.mark.parametrize("target", [-100, -1, 3, 10**9])
def test_an_id_outside_the_vocabulary_gives_no_finite_loss(target, device):
    loss, _ = cross_entropy(torch.zeros(2, 3, device=device), torch.tensor([0, target], device=device))
    assert loss.isnan()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_non_finite_logits_give_no_finite_loss(device):
    for bad in (math.nan, math.inf):
        loss, _ = cross_entropy(torch.tensor([[0.0, bad]], device=device), torch.tensor([0], device=device))
        assert not loss.isfinite()


def test_no_rows(device):
    loss, dlogits = cross_entropy(torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    assert loss == 0 and dlogits.shape == (0, 5)


def test_rows_of_a_wider_matrix_and_guard_bands(device, guarded):
    wide = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.tensor([0, 5, 16, 3], device=device)
    loss, dlogits = cross_entropy(wide[:, 10:27], target)
    guarded()
    alone, dalone = cross_entropy(wide[:, 10:27].clone(), target)
    assert torch.equal(loss, alone) and torch.equal(dlogits, dalone)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="logits is torch.float64"):
        cross_entropy(torch.zeros(2, 3).double(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target has shape \[3\], needs \[2\]"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target is torch.float32, needs one of int64, int32"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2))
