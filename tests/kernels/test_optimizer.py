"""SGD and Adam in Triton against the reference in float64, from one gradient and from parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpstream.kernels import optimizer, reference
from ogpstream.kernels.launch import record_launches
from ogpstream.kernels.optimizer import Adam, Sgd, adam_, sgd_, step_, sum_splits

BETAS = (0.9, 0.99)


def normal(*shape, device, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 40)), size=st.sampled_from([1.0, 1e-7, 1e6]),
    weight_decay=st.sampled_from([0.0, 0.1]), eps=st.sampled_from([1e-8, 0.1]), seed=st.integers(0, 999),
)  # fmt: skip
def test_steps_equal_the_reference(device, close, shape, size, weight_decay, eps, seed):
    w = normal(*shape, device=device, seed=seed)
    start, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    exact = [t.double() for t in (w, m, v)]
    sgd, sgd_exact = w.clone(), w.double()
    for step in (1, 2, 3):
        g = normal(*shape, device=device, seed=seed + step, size=size)
        adam = dict(step=step, lr=0.1, betas=BETAS, eps=eps, weight_decay=weight_decay)
        adam_(w, g, m, v, **adam)
        reference.adam_(exact[0], g, *exact[1:], **adam)
        sgd_(sgd, g, lr=0.1 / size, weight_decay=size * weight_decay)
        reference.sgd_(sgd_exact, g, lr=0.1 / size, weight_decay=size * weight_decay)
    close(1e-6, exp_avg=(m, exact[1]), exp_avg_sq=(v, exact[2]))
    # beside where they began: of a single weight that ends near 0 the step's rounding is all that is left
    for name, out, ref in (("w", w, exact[0]), ("sgd", sgd, sgd_exact)):
        close(1e-6, **{name: (torch.cat([out, start]), torch.cat([ref, start.double()]))})


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_exact_zeros_stay_where_they_are(eps, device):
    w, m, v = torch.ones(70, device=device), torch.zeros(70, device=device), torch.zeros(70, device=device)
    for step in (1, 2):
        adam_(w, torch.zeros(70, device=device), m, v, step=step, lr=0.1, betas=BETAS, eps=eps)
    assert bool((w == 1).all()) and not m.any() and not v.any()
    g = torch.zeros(70, device=device)
    g[1] = 1e-7
    adam_(w, g, m, v, step=1, lr=0.1, betas=BETAS, eps=eps)
    assert w[0] == 1 and 0.89 < w[1] < 1


@pytest.mark.parametrize("S", [1, 2, 3, 8, 11])
def test_parts_are_summed(S, device, close, guarded):
    parts = normal(S, 3000, device=device)
    close(1e-6, sum=(sum_splits(parts), parts.double().sum(0)))
    w = normal(3000, device=device, seed=1)
    expected = w - 0.5 * parts.double().sum(0)
    step_(w, parts, Sgd(0.5))
    close(1e-6, w=(w, expected))
    if S > 1:
        guarded()


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("first", [1, 64, 100, 999, 1300])
def test_the_two_parts_of_a_slab_have_their_own_rms(first, size, device, close, short_splits, guarded):
    """Gradients of A 1e4 x smaller or larger than those of B: with one rms, an eps of 0.5 would all but stop one."""
    numel = 1300
    parts = normal(3, numel, device=device)
    parts[:, :first] *= size
    w, m, v = (normal(numel, device=device, seed=s).abs() for s in (1, 2, 3))
    v[:first] *= size**2
    exact = [t.double() for t in (w, m, v)]
    options = dict(step=4, lr=0.1, betas=BETAS, eps=0.5, weight_decay=0.01)
    serving = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    step_(w, parts, Adam(m, v, **options), first=first, serving=serving, serve_from=first)
    for part in (slice(0, first), slice(first, None)):
        if exact[0][part].numel():
            g = parts.double().sum(0)[part]
            reference.adam_(exact[0][part], g, exact[1][part], exact[2][part], **options)
    close(1e-6, w=(w, exact[0]), exp_avg=(m, exact[1]), exp_avg_sq=(v, exact[2]))
    assert torch.equal(serving[first:], w[first:].bfloat16()) and not serving[:first].any()
    guarded()


@pytest.mark.parametrize("serve_from", [0, 3, 64])
def test_sgd_serves_what_lies_from_a_place_on(serve_from, device):
    w, serving = normal(300, device=device), torch.zeros(300, dtype=torch.bfloat16, device=device)
    step_(w, normal(2, 300, device=device, seed=1), Sgd(0.5), serving=serving, serve_from=serve_from)
    assert torch.equal(serving[serve_from:], w[serve_from:].bfloat16()) and not serving[:serve_from].any()


def test_many_blocks_are_summed_by_few_programs(device, close, short_splits, monkeypatch):
    """More blocks than one program adds up: each of the first launch then goes through several."""
    monkeypatch.setattr(optimizer, "_SUMS", 8)
    numel = 64 * 13 + 5
    w, g = torch.ones(numel, device=device), normal(numel, device=device)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    exact = [t.double() for t in (w, m, v)]
    with record_launches() as record:
        adam_(w, g, m, v, step=1, lr=0.1, betas=BETAS, eps=0.5)
    reference.adam_(exact[0], g, *exact[1:], step=1, lr=0.1, betas=BETAS, eps=0.5)
    assert [(launch.name, launch.grid) for launch in record] == [("moments_kernel", (7,)), ("adam_kernel", (14,))]
    close(1e-6, w=(w, exact[0]))


def test_bitwise_reproducible_whatever_the_order_of_the_programs(device, permuted, short_splits):
    def run():
        w, parts = normal(900, device=device), normal(3, 900, device=device, seed=1)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        step_(w, parts, Adam(m, v, 1, 0.1, BETAS, 0.1), first=500)
        return w, m, v

    once = run()
    permuted(2)
    assert all(map(torch.equal, once, run()))


def test_versions_count_every_tensor_that_is_written(device):
    w, m, v = (torch.zeros(9, device=device) for _ in range(3))
    serving = torch.zeros(9, dtype=torch.float16, device=device)
    before = [t._version for t in (w, m, v, serving)]
    step_(w, torch.ones(1, 9, device=device), Adam(m, v, 1, 0.1, BETAS, 0.1), serving=serving)
    assert all(t._version > b for t, b in zip((w, m, v, serving), before, strict=True))


def test_what_does_not_fit_is_named():
    w = torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"w has strides \(1, 6\)"):
        sgd_(torch.zeros(2, 6).T, w, lr=0.1)
    with pytest.raises(ValueError, match="w is torch.float64, needs one of float32"):
        sgd_(w.double(), w, lr=0.1)
    with pytest.raises(ValueError, match=r"parts has shape \[3, 5\], needs \[3, 12\]"):
        step_(w.view(-1), torch.zeros(3, 5), Sgd(0.1))
    with pytest.raises(ValueError, match="parts holds no part"):
        step_(w.view(-1), torch.zeros(0, 12), Sgd(0.1))
    with pytest.raises(ValueError, match=r"exp_avg_sq has shape \[5\], needs \[12\]"):
        step_(w.view(-1), torch.zeros(1, 12), Adam(torch.zeros(12), torch.zeros(5), 1, 0.1, BETAS, 0.1))
    with pytest.raises(ValueError, match=r"serving has shape \[3\], needs \[12\]"):
        step_(w.view(-1), torch.zeros(1, 12), Sgd(0.1), serving=torch.zeros(3))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_is_served_begins_beyond_2_to_the_31(optimizer, device):
    """In 32 bits, 2**30 units of 4 are element 0."""
    w, g = torch.ones(8, device=device), torch.ones(1, 8, device=device)
    serving = torch.full_like(w, 7.0)
    rule = Sgd(0.1) if optimizer == "sgd" else Adam(w.clone(), w.clone(), 1, 0.1, BETAS, 0.1)
    step_(w, g, rule, serving=serving, serve_from=2**32)
    assert bool((serving == 7.0).all()) and not bool((w == 1.0).any())
