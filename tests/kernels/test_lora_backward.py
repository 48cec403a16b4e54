"""The LoRA kernels against float64, by name of output and gradient, and what they may not touch."""

import dataclasses
import re
import threading

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ogpstream.kernels import device_lora, reference
from ogpstream.kernels import lora_backward as lora
from ogpstream.kernels.configs import Config, Lora, Tile
from ogpstream.kernels.launch import launch, record_launches

# of products in the dtype of x with float32 sums; the outputs in half precision are rounded once more
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# T, D_in, D_out, R, trained: one token, primes, sizes beside a tile or a split, a rank of 64, none trained
SHAPES = [
    (1, 7, 5, 1, slice(0, 1)),
    (63, 40, 17, 24, slice(8, 16)),
    (65, 130, 67, 16, slice(0, 8)),
    (257, 17, 35, 33, slice(8, 16)),
    (5, 64, 64, 9, slice(8, 9)),
    (70, 24, 40, 80, slice(8, 72)),
    (33, 20, 31, 3, slice(1, 1)),
]


def outputs(p, trained, *, given_h=True):
    y, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    return y, h, *lora.lora_backward(*p.operands, trained=trained, h=h if given_h else None, base_dx=p.base_dx)


def check(close, p, trained, dtype, *, given_h=True):
    """y, h, dA, dB, dx against float64; returns them."""
    y, h, dA, dB, dx = found = outputs(p, trained, given_h=given_h)
    ref = p.double()
    y_ref, h_ref = reference.lora_forward(ref.x, ref.A, ref.B, ref.scale)
    dA_ref, dB_ref, dx_ref = reference.lora_backward(*ref.operands, trained=trained, base_dx=ref.base_dx)
    assert (y.dtype, dx.dtype) == (dtype, dtype) and {h.dtype, dA.dtype, dB.dtype} == {torch.float32}
    close(BOUND[dtype], y=(y, y_ref), dA=(dA, dA_ref), dB=(dB, dB_ref), dx=(dx, dx_ref))
    # no intermediate is rounded on the way to h
    close(1e-6, h=(h, h_ref))
    return found


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("T,D_in,D_out,R,trained", SHAPES)
def test_outputs_and_gradients(T, D_in, D_out, R, trained, dtype, problem, close, guarded):
    check(close, problem(T, D_in, D_out, R, dtype), trained, dtype)
    guarded()


@pytest.mark.parametrize("dtype", BOUND)
def test_many_parts(dtype, problem, close, short_splits):
    """5 parts of h and 6 of Y: those over 4 are added in a loop."""
    p = problem(18, 133, 161, 20, dtype)
    with record_launches() as record:
        check(close, p, slice(3, 6), dtype)
    (gradient,) = (launch for launch in record if launch.name == "gradient_kernel")
    (expand,) = (launch for launch in record if launch.name == "expand_kernel")
    assert (expand.options["PARTS"], gradient.options["PARTS_Y"]) == (5, 6)


@pytest.mark.parametrize("T,D_in,D_out,R,trained", [(9, 2048, 600, 16, slice(8, 16))])
def test_long_sums_over_a_width_keep_their_precision(T, D_in, D_out, R, trained, problem, close):
    check(close, problem(T, D_in, D_out, R), trained, torch.float32)


def test_long_sums_over_tokens_keep_their_precision(problem, close):
    p, trained = problem(4096, 7, 5, 2), slice(0, 2)
    ref = p.double()
    _, h = reference.lora_forward(ref.x, ref.A, ref.B, ref.scale)
    dA, dB, dx = lora.lora_backward(*p.operands, trained=trained, h=h.float().contiguous())
    dA_ref, dB_ref, dx_ref = reference.lora_backward(*ref.operands, trained=trained)
    close(1e-6, dA=(dA, dA_ref), dB=(dB, dB_ref), dx=(dx, dx_ref))


@settings(max_examples=20)
@given(
    # a tile and a bit of the largest in every direction
    T=st.integers(1, 40), D_in=st.integers(1, 70), D_out=st.integers(1, 70), r=st.integers(1, 40),
    before=st.integers(0, 9), after=st.integers(0, 9), dtype=st.sampled_from(sorted(BOUND, key=str)),
    seed=st.integers(0, 2**31), given_h=st.booleans(),
)  # fmt: skip
def test_any_shape_and_dtype(problem, close, T, D_in, D_out, r, before, after, dtype, seed, given_h):
    p = problem(T, D_in, D_out, before + r + after, dtype, seed)
    y, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    ref, trained = p.double(), slice(before, before + r)
    y_ref, h_ref = reference.lora_forward(ref.x, ref.A, ref.B, ref.scale)
    out = lora.lora_backward(*p.operands, trained=trained, h=h if given_h else None)
    expected = reference.lora_backward(*ref.operands, trained=trained)
    # cancellation: a sum of few products may be far smaller than they are, so errors are relative to the products
    for name, value, exact, size in zip(
        ("y", "h", "dA", "dB", "dx"), (y, h, *out), (y_ref, h_ref, *expected), sizes(ref, trained), strict=True
    ):
        error = float((value.double() - exact).norm() / size.norm())
        assert error <= BOUND[dtype], f"{name}: {error:.2e}"


def sizes(p, trained):
    """y, h, dA, dB, dx of the absolute values of all operands."""
    operands = [t.abs() for t in p.operands]
    y, h = reference.lora_forward(operands[0], *operands[2:])
    return y, h, *reference.lora_backward(*operands, trained=trained)


@pytest.mark.parametrize("dtype", BOUND)
def test_small_gradients_are_not_lost(dtype, problem, close):
    """Y = g B.T of 1e-8 and h of 1e-7, both below the range of float16."""
    p = problem(20, 24, 30, 16, dtype)
    p = dataclasses.replace(p, g=p.g * 1e-4, B=p.B * 1e-4, A=p.A * 1e-4, scale=p.scale * 1e-2, base_dx=0 * p.base_dx)
    _, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    dA, dB, _ = lora.lora_backward(*p.operands, trained=slice(0, 8), h=h)
    dA_ref, dB_ref, _ = reference.lora_backward(*p.double().operands, trained=slice(0, 8))
    close(BOUND[dtype], dA=(dA, dA_ref), dB=(dB, dB_ref))


def test_h_is_computed_again_when_it_is_not_given(problem, close):
    p = problem(40, 50, 30, 12)
    check(close, p, slice(4, 8), torch.float32, given_h=False)


def test_dx_may_take_the_place_of_the_base_gradient(problem, device):
    p = problem(30, 48, 20, 8)
    splits, (_, _, dx) = lora.token_splits(30, p.x), lora.lora_backward(
        *p.operands, trained=slice(0, 8), base_dx=p.base_dx
    )
    parts = dict(dA=torch.empty(splits, 48, 8, device=device), dB=torch.empty(splits, 8, 20, device=device))
    version, there = p.base_dx._version, p.base_dx
    out = lora.lora_backward_parts(*p.operands, trained=slice(0, 8), base_dx=there, dx=there, **parts)
    assert out is there and torch.equal(there, dx) and there._version > version


def test_two_gated_experts_are_one_matrix_on_the_rank_axis(problem, close):
    T, D_in, D_out, r, gates = 50, 40, 30, 8, (0.25, -1.5)
    first, second = problem(T, D_in, D_out, r, seed=1), problem(T, D_in, D_out, r, seed=2)
    scale = torch.tensor([g for g in gates for _ in range(r)], device=first.x.device)
    A, B = torch.cat((first.A, second.A), 1), torch.cat((first.B, second.B), 0)
    y, h = lora.lora_forward(first.x, A, B, scale)
    x, g = first.x.double(), first.g.double()
    y_ref = sum(gate * (x @ e.A.double() @ e.B.double()) for gate, e in zip(gates, (first, second), strict=True))
    dx_ref = sum(
        gate * (g @ e.B.double().T @ e.A.double().T) for gate, e in zip(gates, (first, second), strict=True)
    )
    close(1e-6, y=(y, y_ref))
    for index, (gate, expert) in enumerate(zip(gates, (first, second), strict=True)):
        trained = slice(index * r, (index + 1) * r)
        dA, dB, dx = lora.lora_backward(first.x, first.g, A, B, scale, trained=trained, h=h)
        dA_ref = gate * x.T @ (g @ expert.B.double().T)
        dB_ref = gate * (x @ expert.A.double()).T @ g
        close(1e-6, dA=(dA, dA_ref), dB=(dB, dB_ref), dx=(dx, dx_ref))


def test_factors_may_lie_as_peft_stores_them(problem):
    p = problem(30, 40, 20, 8)
    A, B = p.A.T.contiguous().T, p.B.T.contiguous().T
    y, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    y_peft, h_peft = lora.lora_forward(p.x, A, B, p.scale)
    assert torch.equal(y, y_peft) and torch.equal(h, h_peft)
    plain = lora.lora_backward(*p.operands, trained=slice(0, 8), h=h)
    peft = lora.lora_backward(p.x, p.g, A, B, p.scale, trained=slice(0, 8), h=h)
    assert all(map(torch.equal, plain, peft))


def test_rows_may_lie_in_a_wider_matrix(problem, device):
    p = problem(30, 40, 20, 8)
    wide = torch.full((30, 100), float("nan"), device=device)
    wide[:, 10:50], wide[:, 60:80] = p.x, p.g
    plain = lora.lora_backward(*p.operands, trained=slice(0, 8))
    views = lora.lora_backward(wide[:, 10:50], wide[:, 60:80], *p.operands[2:], trained=slice(0, 8))
    assert all(map(torch.equal, plain, views))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_reproducible_whatever_the_order_of_the_programs(dtype, problem, permuted, short_splits, close):
    p, trained = problem(40, 36, 20, 20, dtype), slice(1, 19)
    assert lora.token_splits(40, p.x) == 2
    once = check(close, p, trained, dtype)
    assert all(map(torch.equal, once, outputs(p, trained)))
    permuted(0)
    assert all(map(torch.equal, once, outputs(p, trained)))


@triton.jit
def _last_program_wins(out):
    # a planted fault: every program writes the same place
    tl.store(out, tl.program_id(0).to(tl.float32))


def test_the_permutation_finds_a_planted_dependence_on_the_order(permuted, device):
    if device.type != "cpu":
        pytest.skip("only the interpreter's programs can be put in an order")
    found = set()
    for seed in range(4):
        permuted(seed)
        out = torch.zeros(1, device=device)
        launch(_last_program_wins, (8,), out, out)
        found.add(float(out))
    assert len(found) > 1


@triton.jit
def _one_too_many(out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 1.0, mask=i <= n)


def test_the_guard_bands_find_a_planted_write_beside_a_buffer(guarded, device):
    out = torch.empty(5, device=device)
    launch(_one_too_many, (1,), out, out, 5, BLOCK=8)
    with pytest.raises(AssertionError, match="beside its buffer"):
        guarded()


def test_no_columns(problem):
    p = problem(4, 6, 3, 0)
    y, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    dA, dB, dx = lora.lora_backward(*p.operands, trained=slice(0, 0), h=h)
    assert not y.any() and not dx.any() and (dA.shape, dB.shape) == ((6, 0), (0, 3))
    *_, dx = lora.lora_backward(*p.operands, trained=slice(0, 0), base_dx=p.base_dx)
    assert torch.equal(dx, p.base_dx)


def test_autograd_function_has_the_gradients_of_the_launcher_bit_for_bit(problem, close):
    p = problem(40, 24, 30, 8)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.A, p.B)]
    y = lora.LoraFunction.apply(*leaves, p.scale)
    # expanded, as `sum().backward()` hands it over
    y.backward(p.g[:1].expand(40, -1))
    _, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    g = p.g[:1].expand(40, -1).contiguous()
    dA, dB, dx = lora.lora_backward(p.x, g, p.A, p.B, p.scale, trained=slice(0, 8), h=h)
    for name, leaf, gradient in zip(("x", "A", "B"), leaves, (dx, dA, dB), strict=True):
        assert torch.equal(leaf.grad, gradient), name

    double = [t.double().clone().requires_grad_() for t in (p.x, p.A, p.B)]
    (((double[0] @ double[1]) * p.scale.double()) @ double[2]).backward(g.double())
    for name, leaf, exact in zip(("x", "A", "B"), leaves, double, strict=True):
        close(1e-6, **{name: (leaf.grad, exact.grad)})


@pytest.mark.parametrize("wanted,rank", [("x", 0), ("A", 8), ("B", 8), ("xA", 8), ("AB", 8)])
def test_autograd_function_makes_the_gradients_that_are_wanted(wanted, rank, problem):
    p = problem(40, 24, 30, 8)
    leaves = [getattr(p, name).clone().requires_grad_(name in wanted) for name in "xAB"]
    full = [getattr(p, name).clone().requires_grad_() for name in "xAB"]
    lora.LoraFunction.apply(*full, p.scale).backward(p.g)
    with record_launches() as record:
        lora.LoraFunction.apply(*leaves, p.scale).backward(p.g)
    (ranks,) = [launch.options["RANK"] for launch in record if launch.name == "gradient_kernel"]
    assert ranks == rank
    for name, leaf, other in zip("xAB", leaves, full, strict=True):
        assert torch.equal(leaf.grad, other.grad) if name in wanted else leaf.grad is None, name


def test_a_backward_in_another_thread_is_recorded_and_has_the_tiles(problem, with_tiles):
    """Autograd has a thread for the backward of CUDA tensors."""
    p = problem(40, 24, 30, 8)
    tiles = Lora(shrink=Tile(16, 16), expand=Tile(16, 16), gradient=Tile(16, 32))
    A = p.A.clone().requires_grad_()
    with_tiles(Config(single=tiles))
    with record_launches() as record:
        y = lora.LoraFunction.apply(p.x, A, p.B, p.scale)
        thread = threading.Thread(target=lambda: torch.autograd.grad(y, A, p.g))
        thread.start()
        thread.join()
    assert [launch.name for launch in record] == [
        "shrink_kernel", "expand_kernel", "shrink_kernel", "gradient_kernel", "sum_kernel",
    ]  # fmt: skip
    assert (record[3].options["BT"], record[3].options["BD"]) == (16, 32)
    lora.lora_forward(p.x, p.A, p.B, p.scale)
    assert len(record) == 5, "the record is closed"


def test_autograd_notices_a_parameter_that_was_updated_before_its_backward(problem, orthonormal_rows):
    from ogpstream.kernels.optimizer import sgd_
    from ogpstream.kernels.projection import project_out_

    p = problem(10, 24, 30, 8)
    rows = orthonormal_rows(4, 24)
    for change in (
        lambda A: project_out_(A, rows),
        lambda A: sgd_(A, p.A, lr=0.1),
    ):
        A = p.A.clone().requires_grad_()
        y = lora.LoraFunction.apply(p.x, A, p.B, p.scale)
        with torch.no_grad():
            change(A.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_launches(problem):
    p = problem(40, 24, 30, 8)
    with record_launches() as record:
        _, h = lora.lora_forward(p.x, p.A, p.B, p.scale)
    assert [launch.name for launch in record] == ["shrink_kernel", "expand_kernel"]
    with record_launches() as record:
        lora.lora_backward(*p.operands, trained=slice(0, 8), h=h)
    # one split of the tokens: nothing to sum
    assert [launch.name for launch in record] == ["shrink_kernel", "gradient_kernel"]


@pytest.mark.parametrize("dtype,most", [(torch.float32, 5 + 4), (torch.bfloat16, 4 + 3)])
def test_samples_of_all_lengths_share_a_few_kernels(dtype, most):
    """T is a number that Triton does not specialise on; steps and sums of splits come in powers of two."""
    kernels = set()
    for T in (1, 3, 16, 17, 33, 64, 100, 128, 129, 200, 256, 257, 500, 600, 1000, 1024, 1025, 2048, 3000, 4096):
        with FakeTensorMode(), record_launches() as record:
            x, A, B = (torch.empty(s, dtype=dtype) for s in ((T, 32), (32, 16), (16, 32)))
            lora.lora_backward(x, x, A, B, torch.empty(16), trained=slice(0, 8), h=torch.empty(T, 16))
        kernels |= {(launch.name, *sorted(launch.options.items())) for launch in record}
    assert len(kernels) == 1 + most
    for name in ("shrink_kernel", "expand_kernel", "gradient_kernel"):
        kernel = getattr(device_lora, name)
        # the interpreter's wrapper keeps what the decorator was given
        general = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        assert "T" in general, name


def test_memory_is_allocated_in_python_and_no_copy_of_x_is_made():
    """Counted on fake tensors at the size of the memory budget: h, Y and the parts, no float32 x or g."""
    T, D, R, r = 1024, 2048, 48, 8
    allocated = []
    with FakeTensorMode():
        x, A, B = (torch.empty(s, dtype=torch.bfloat16) for s in ((T, D), (D, R), (R, D)))
        h, scale = torch.empty(T, R), torch.empty(R)
        real = torch.empty
        with pytest.MonkeyPatch.context() as patch:

            def counted(*size, **options):
                tensor = real(*size, **options)
                allocated.append(tensor.nbytes)
                return tensor

            patch.setattr(torch, "empty", counted)
            splits = lora.token_splits(T, x)
            lora.lora_backward(x, x, A, B, scale, trained=slice(0, r), h=h, base_dx=x)
    splits_of_d, parts = 2, splits * 2 * D * r * 4
    assert splits == 2
    assert sum(allocated) == splits_of_d * T * R * 4 + T * D * 2 + parts + 2 * D * r * 4


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=(5, 7)), "A has shape [6, 4], needs [7, 4]"),
        (dict(g=(5, 9)), "g has shape [5, 9], needs [5, 8]"),
        (dict(h=(5, 3)), "h has shape [5, 3], needs [5, 4]"),
        (dict(base_dx=(4, 6)), "base_dx has shape [4, 6], needs [5, 6]"),
        (dict(scale=(3,)), "scale has shape [3], needs [4]"),
        (dict(dA=(2, 6, 2)), "dA has shape [2, 6, 2], needs [1, 6, 2]"),
        (dict(dB=(1, 2, 6)), "dB has shape [1, 2, 6], needs [1, 2, 8]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = dict(x=(5, 6), g=(5, 8), A=(6, 4), B=(4, 8), scale=(4,), h=(5, 4), base_dx=(5, 6))
    shapes |= dict(dA=(1, 6, 2), dB=(1, 2, 8))
    tensors = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.lora_backward_parts(**tensors, trained=slice(1, 3))


def test_wrong_dtypes_and_strides_are_named(problem):
    p = problem(6, 6, 6, 6)
    with pytest.raises(ValueError, match="x is torch.float64, needs one of float32, bfloat16, float16"):
        lora.lora_forward(p.x.double(), p.A, p.B, p.scale)
    with pytest.raises(ValueError, match=r"x has strides \(1, 6\), needs 1 in the last dimension"):
        lora.lora_forward(p.x.T, p.A, p.B, p.scale)
    with pytest.raises(ValueError, match="g is torch.float16, needs one of float32"):
        lora.lora_backward(p.x, p.g.half(), *p.operands[2:], trained=slice(0, 1))
    with pytest.raises(ValueError, match=r"trained is slice\(3, 7, None\), needs to lie within the 6 columns of A"):
        lora.lora_backward(*p.operands, trained=slice(3, 7))
    with pytest.raises(ValueError, match="A is torch.int64"):
        lora.lora_forward(p.x, p.A.long(), p.B, p.scale)
