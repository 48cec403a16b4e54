"""The Triton projection: what is left in span(P), streamed and resident, and what it may not touch."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpstream.kernels import reference
from ogpstream.kernels.basis_stream import BasisStream
from ogpstream.kernels.launch import record_launches
from ogpstream.kernels.projection import project_out_
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.replay import ReplayRing

LEAK = 5e-7


def matrix(*shape, device, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("M,D,K", [(0, 9, 3), (1, 3, 1), (31, 64, 8), (33, 100, 5), (96, 96, 24), (512, 520, 8)])
@pytest.mark.parametrize("form", ["streamed", "resident", "chunks"])
def test_nothing_is_left_in_the_span(M, D, K, form, device, orthonormal_rows, guarded):
    rows, before = orthonormal_rows(M, D), matrix(D, K, device=device)
    Z = before.clone()
    source = BasisStream([rows.cpu()], device) if form == "streamed" else rows
    coef = project_out_(Z, source, chunk=max(1, M) if form == "resident" else 32)
    exact = rows.double() @ before.double()
    assert (rows.double() @ Z.double()).norm() <= LEAK * before.norm()
    assert (coef - exact).norm() <= 1e-6 * before.norm()
    assert (Z - (before - rows.double().T @ exact)).norm() <= 1e-6 * before.norm()
    guarded()


@settings(max_examples=15)
@given(
    M=st.integers(0, 50), D=st.integers(1, 70), K=st.integers(1, 20), chunk=st.integers(1, 60),
    seed=st.integers(0, 2**31), weighted=st.booleans(),
)  # fmt: skip
def test_any_shape_equals_the_reference(device, M, D, K, chunk, seed, weighted):
    """On skew directions too, where the second chunk must see what the first one left."""
    rng = torch.Generator().manual_seed(seed)
    rows, Z = torch.randn(M, D, generator=rng) / D**0.5, torch.randn(D, K, generator=rng)
    weights = torch.rand(M, generator=rng) if weighted else None
    exact = Z.double()
    coef_ref = reference.project_out_(exact, rows, chunk=chunk, weights=weights)
    out = Z.to(device)
    coef = project_out_(out, rows.to(device), chunk=chunk, weights=weights)
    size = max(float(exact.norm()), float(Z.norm()))
    assert (out.cpu() - exact).norm() <= 2e-6 * size
    assert (coef.cpu() - coef_ref).norm() <= 2e-6 * max(float(coef_ref.norm()), size)


def test_streamed_and_resident_chunks_agree_bit_for_bit(device, orthonormal_rows):
    rows, Z = orthonormal_rows(150, 200), matrix(200, 20, device=device)
    streamed, resident = Z.clone(), Z.clone()
    coef_streamed = project_out_(streamed, BasisStream([rows.cpu()], device))
    coef_resident = project_out_(resident, rows)
    assert torch.equal(streamed, resident) and torch.equal(coef_streamed, coef_resident)


def test_one_stream_serves_several_bases_in_their_order(device, orthonormal_rows):
    bases = [orthonormal_rows(M, D, seed=M) for M, D in ((70, 90), (0, 10), (5, 40), (64, 64))]
    stream = BasisStream([rows.cpu() for rows in bases], device)
    for rows in bases:
        Z = matrix(rows.shape[1], 3, device=device)
        alone = Z.clone()
        project_out_(Z, stream)
        project_out_(alone, rows)
        assert torch.equal(Z, alone)
    with pytest.raises(IndexError):
        _ = stream.rows


def test_the_stream_holds_two_chunks(device):
    stream = BasisStream([torch.zeros(256, 2048)], device)
    assert stream._buffers.nbytes == 2 * 256 * 1024
    seen = [here.data_ptr() for _, here in stream.chunks()]
    assert seen == 4 * seen[:2] and seen[0] != seen[1]


def test_a_chunk_is_not_overwritten_while_it_is_in_use(device):
    rows = torch.arange(200.0)[:, None].repeat(1, 16)
    for start, here in BasisStream([rows], device).chunks():
        assert torch.equal(here.cpu(), rows[start : start + 32])


def test_launches(device, orthonormal_rows):
    rows, Z = orthonormal_rows(256, 300), matrix(300, 8, device=device)
    for source, chunk, launches in ((BasisStream([rows.cpu()], device), 32, 16), (rows, 32, 16), (rows, 256, 2)):
        with record_launches() as record:
            project_out_(Z, source, chunk=chunk)
        assert [launch.name for launch in record] == launches // 2 * ["coefficients_kernel", "removal_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("M", [0, 40])
def test_the_serving_copy_is_the_rounded_result(dtype, M, device, orthonormal_rows):
    Z, wide = matrix(50, 8, device=device), torch.full((50, 20), 7.0, dtype=dtype, device=device)
    project_out_(Z, orthonormal_rows(M, 50), serving=wide[:, 4:12])
    assert torch.equal(wide[:, 4:12], Z.to(dtype))
    assert bool((wide[:, :4] == 7).all() and (wide[:, 12:] == 7).all())


def test_a_view_in_its_slab_is_changed_and_nothing_beside_it(device, orthonormal_rows):
    slab = torch.ones(12, 10, device=device)
    version = slab._version
    project_out_(slab[:, 2:5], orthonormal_rows(12, 12))
    assert slab[:, 2:5].abs().max() < 1e-6 and slab._version > version
    assert bool((slab[:, :2] == 1).all() and (slab[:, 5:] == 1).all())


def test_zero_rows_are_no_ops(device):
    Z = torch.ones(30, 4, device=device)
    assert not project_out_(Z, torch.zeros(40, 30, device=device)).any()
    assert torch.equal(Z, torch.ones(30, 4, device=device))


def test_bitwise_reproducible_whatever_the_order_of_the_programs(device, orthonormal_rows, permuted, short_splits):
    rows, before = orthonormal_rows(40, 70), matrix(70, 20, device=device)

    def run():
        Z = before.clone()
        return Z, project_out_(Z, rows, chunk=40)

    once = run()
    assert (rows @ once[0]).norm() <= LEAK * before.norm()
    permuted(1)
    assert all(map(torch.equal, once, run()))


@pytest.mark.parametrize(
    "Z,rows,options,message",
    [
        (torch.zeros(4), torch.zeros(3, 4), {}, "Z has shape [4], needs 2 dimensions"),
        (torch.zeros(4, 2).double(), torch.zeros(3, 4), {}, "Z is torch.float64, needs one of float32"),
        (torch.zeros(2, 4).T, torch.zeros(3, 4), {}, "Z has strides (1, 4), needs 1 in the last dimension"),
        (torch.zeros(4, 2), torch.zeros(3, 5), {}, "rows has shape [3, 5], needs [3, 4]"),
        (torch.zeros(4, 2), torch.zeros(3, 4).half(), {}, "rows is torch.float16, needs one of float32"),
        (torch.zeros(4, 2), torch.zeros(3, 4), dict(weights=torch.zeros(2)), "weights has shape [2], needs [3]"),
        (torch.zeros(4, 2), torch.zeros(3, 4), dict(serving=torch.zeros(4, 3)), "serving has shape [4, 3]"),
        (torch.zeros(4, 2), torch.zeros(3, 4), dict(chunk=0), "chunk is 0, needs at least 1 direction"),
    ],
)
def test_what_does_not_fit_is_named(Z, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        project_out_(Z, rows, **options)


def test_a_column_slice_of_a_basis_is_refused(device):
    with pytest.raises(ValueError, match="needs a contiguous P.T"):
        BasisStream([torch.zeros(32, 100)[:, :50]], device)


def ring_and_basis():
    return ReplayRing(4, vocab_size=1000).storage, ProjectionBasis(64, capacity=32).rows()


@pytest.mark.gpu
def test_ring_and_basis_are_pinned():
    assert all(tensor.is_pinned() for tensor in ring_and_basis())


def test_ring_and_basis_ask_for_pinned_memory_where_there_is_cuda(monkeypatch):
    zeros, asked = torch.zeros, []

    def pageable(*size, pin_memory=False, **options):
        tensor = zeros(*size, **options)
        asked.extend([tensor.data_ptr()] if pin_memory else [])
        return tensor

    monkeypatch.setattr(torch, "zeros", pageable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [tensor.data_ptr() for tensor in ring_and_basis()] == asked


def long_rows(chunks):
    """One row of 64 MiB a chunk, row c full of c: a copy takes a millisecond or more, a read 20 us."""
    return torch.arange(float(chunks))[:, None].repeat(1, 1 << 24).pin_memory()


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["copies", "work"])
def test_a_chunk_is_read_after_its_copy_and_before_the_copy_after_next(slow):
    """A read that does not wait finds NaN of a fresh buffer; a copy that does not wait leaves c + 2 to a slow read."""
    device, rows, seen = torch.device("cuda"), long_rows(4), []
    for _, here in BasisStream([rows], device, chunk=1).chunks():
        if slow == "work":
            torch.cuda._sleep(10**8)  # cycles: 50 ms, and the host goes on
        seen.append(torch.stack(torch.aminmax(here)))
    assert torch.stack(seen).tolist() == [[c, c] for c in range(4)]


@pytest.mark.gpu
def test_the_next_chunk_is_copied_while_one_is_worked_on():
    """When the work on chunk c may begin, the copy of c + 1 is not done: on one stream it would be."""
    stream = BasisStream([long_rows(4)], torch.device("cuda"), chunk=1)
    for chunk, _ in stream.chunks():
        ready = torch.cuda.Event()
        ready.record()
        ready.synchronize()
        if chunk + 1 < 4:
            assert not stream._copied[(chunk + 1) % 2].query(), f"chunk {chunk} waited for the copy of the next"
