"""One update in one call against its steps in the reference, its launches, and what it stores."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ogpstream.kernels import reference
from ogpstream.kernels.basis_stream import BasisStream
from ogpstream.kernels.launch import record_launches
from ogpstream.kernels.lora_backward import token_splits
from ogpstream.kernels.lora_update import Block, Linear, Parts, lora_backward_project, stream_of, update_
from ogpstream.kernels.optimizer import Adam, Sgd

R, RANK, TRAINED = 12, 4, slice(4, 8)
# (D_in, D_out) of three linears: the first two share an input, so that their A are one block
SITES = [(40, 24), (40, 56), (30, 40)]
BLOCKS = [(40, 2), (30, 1)]
OPTIONS = dict(step=3, lr=0.05, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.01)


class Model:
    """Masters, moments and bases of three linears in one slab, and samples for them."""

    def __init__(self, device, orthonormal_rows, problem, tokens, dtype, M=40):
        numel_A = sum(D * n * RANK for D, n in BLOCKS)
        self.slab = torch.randn(
            numel_A + sum(RANK * d for _, d in SITES), generator=torch.Generator().manual_seed(5)
        ).to(device)
        self.m, self.v = 0.1 * self.slab, 0.01 * self.slab.square()
        self.first, self.rows = numel_A, [orthonormal_rows(min(M, D - 5), D) for D, _ in BLOCKS]
        self.serving = torch.empty_like(self.slab, dtype=torch.bfloat16)
        self.problems = [
            [problem(T, *site, R, dtype, seed=10 * t + s) for s, site in enumerate(SITES)]
            for t, T in enumerate(tokens)
        ]

    def views(self, slab):
        """(A of each block, A of each linear, B of each linear) of a slab."""
        blocks, A, B, at = [], [], [], 0
        for D, n in BLOCKS:
            blocks.append(slab[at : at + D * n * RANK].view(D, n * RANK))
            A += blocks[-1].split(RANK, dim=1)
            at += D * n * RANK
        for _, D_out in SITES:
            B.append(slab[at : at + RANK * D_out].view(RANK, D_out))
            at += RANK * D_out
        return blocks, A, B

    def blocks(self, *, resident):
        return [
            Block(A, rows, resident) for A, rows in zip(self.views(self.slab)[0], self.rows, strict=True)
        ]

    def samples(self):
        _, A, B = self.views(self.slab)
        return [
            [
                Linear(*p.operands, TRAINED, a, b, base_dx=p.base_dx)
                for p, a, b in zip(problems, A, B, strict=True)
            ]
            for problems in self.problems
        ]

    def adam(self):
        return Adam(self.m, self.v, **OPTIONS)

    def expected(self, rule):
        """Masters and coefficients in float64, each step by the reference; dx of each linear."""
        slab, m, v = (t.double() for t in (self.slab, self.m, self.v))
        gradient = torch.zeros_like(slab)
        _, dA, dB = self.views(gradient)
        dx = []
        for problems in self.problems:
            dx.append([])
            for p, a, b in zip(problems, dA, dB, strict=True):
                exact = p.double()
                one, two, three = reference.lora_backward(*exact.operands, trained=TRAINED, base_dx=exact.base_dx)
                a += one
                b += two
                dx[-1].append(three)
        for part in (slice(0, self.first), slice(self.first, None)):
            if isinstance(rule, Sgd):
                reference.sgd_(slab[part], gradient[part], lr=rule.lr, weight_decay=rule.weight_decay)
            else:
                reference.adam_(slab[part], gradient[part], m[part], v[part], **OPTIONS)
        coef = [
            reference.project_out_(A, rows) for A, rows in zip(self.views(slab)[0], self.rows, strict=True)
        ]
        return slab, m, v, dx, coef


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_two_samples(optimizer, resident, dtype, device, orthonormal_rows, problem, close):
    model = Model(device, orthonormal_rows, problem, (20, 33), dtype)
    rule = Sgd(0.01, 0.1) if optimizer == "sgd" else model.adam()
    slab, m, v, dx_ref, coef_ref = model.expected(rule)
    version = model.slab._version
    dx, coef = lora_backward_project(
        model.samples(), model.slab, rule, model.blocks(resident=resident), serving=model.serving
    )
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    close(bound, masters=(model.slab, slab))
    for index, (out, exact) in enumerate(zip(coef, coef_ref, strict=True)):
        close(bound, **{f"coef of block {index}": (out, exact)})
    for sample in range(2):
        for linear in range(3):
            close(bound, **{f"dx {sample} {linear}": (dx[sample][linear], dx_ref[sample][linear])})
    if optimizer == "adam":
        close(bound, exp_avg=(model.m, m), exp_avg_sq=(model.v, v))
    for A, rows in zip(model.views(model.slab)[0], model.rows, strict=True):
        assert (rows.double() @ A.double()).norm() <= 5e-7 * A.norm() * 2
    assert torch.equal(model.serving, model.slab.bfloat16()), "what serves is the rounded masters, every element"
    assert model.slab._version > version


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_without_blocks_the_optimizer_has_the_last_word(device, orthonormal_rows, problem, close, kind):
    model = Model(device, orthonormal_rows, problem, (20,), torch.float32, M=1)
    model.rows = [torch.zeros(0, D, device=device) for D, _ in BLOCKS]
    rule = Sgd(0.01) if kind == "sgd" else model.adam()
    slab, *_ = model.expected(rule)
    lora_backward_project(model.samples(), model.slab, rule, serving=model.serving)
    close(1e-6, masters=(model.slab, slab))
    assert torch.equal(model.serving, model.slab.bfloat16())


def test_an_update_is_bitwise_the_sum_of_its_calls(device, orthonormal_rows, problem, short_splits):
    """A backward pass adds one linear after the other, the last layer first, and gets the very same masters."""
    whole, pieces = (Model(device, orthonormal_rows, problem, (20, 40), torch.float32) for _ in range(2))
    lora_backward_project(whole.samples(), whole.slab, whole.adam(), whole.blocks(resident=False))
    samples, blocks = pieces.samples(), pieces.blocks(resident=False)
    parts = Parts(pieces.slab, (20, 40), samples[0][0].x)
    stream = stream_of(blocks, pieces.slab.device)
    for number in (1, 0):
        for linear in reversed(samples[number]):
            parts.add(linear, number)
    update_(pieces.slab, parts.complete(), pieces.adam(), blocks, stream=stream)
    assert torch.equal(whole.slab, pieces.slab)


@pytest.mark.parametrize("optimizer,first", [("sgd", 1), ("adam", 2)])
def test_launches_per_update(optimizer, first, device, orthonormal_rows, problem):
    """Two a linear and sample, one or two for the optimizer, two a resident block or streamed chunk."""
    model = Model(device, orthonormal_rows, problem, (5, 6), torch.float32, M=35)
    rule = Sgd(0.01) if optimizer == "sgd" else model.adam()
    for resident, projections in ((True, 2 * 2), (False, 2 * (2 + 1))):
        with record_launches() as record:
            lora_backward_project(model.samples(), model.slab, rule, model.blocks(resident=resident))
        names = [launch.name for launch in record]
        assert names[:12] == 6 * ["shrink_kernel", "gradient_kernel"]
        assert names[12 : 12 + first] == (["sgd_kernel"] if first == 1 else ["moments_kernel", "adam_kernel"])
        assert names[12 + first :] == projections // 2 * ["coefficients_kernel", "removal_kernel"]


@pytest.mark.parametrize("resident,launches", [(True, 64 + 2 + 2), (False, 64 + 2 + 16)])
def test_launches_and_memory_of_an_update_of_32_layers(resident, launches):
    """The memory budget: 32 linears of 2048, rank 8, one shared P of 256 directions, T = 1024, Adam; fake tensors.

    dA and dB exist as K2's parts and in no other tensor.
    """
    L, D, r, T = 32, 2048, 8, 1024
    sizes = {}
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch, record_launches() as record:
        slab = torch.empty(2 * L * D * r)
        A, B = slab[: L * D * r].view(D, L * r), slab[L * D * r :].view(L, r, D)
        x, factor = torch.empty(T, D, dtype=torch.bfloat16), torch.empty(D, 48, dtype=torch.bfloat16)
        linears = [
            Linear(x, x, factor, factor.T, torch.empty(48), slice(0, r), A[:, r * i : r * i + r], B[i],
                   h=torch.empty(T, 48), base_dx=x)
            for i in range(L)
        ]  # fmt: skip
        adam = Adam(torch.empty_like(slab), torch.empty_like(slab), **OPTIONS)
        blocks = [Block(A, torch.empty(256, D), resident)]
        real = torch.empty

        def counted(*size, **options):
            tensor = real(*size, **options)
            sizes[tuple(tensor.shape)] = sizes.get(tuple(tensor.shape), 0) + 1
            return tensor

        patch.setattr(torch, "empty", counted)
        lora_backward_project([linears], slab, adam, blocks)
        splits = token_splits(T, x)
    assert len(record) == launches
    assert sizes.pop((splits, slab.numel())) == 1, "the parts of dA and dB"
    assert sizes.pop((T, D)) == L, "dx"
    assert sizes.pop((2, T, 48)) == L and sizes.pop((0, T, 48)) == L, "parts of Y, and none of h"
    assert sizes.pop((256, L * r)) == 1, "coefficients"
    if not resident:
        assert sizes.pop((2, 32 * D)) == 1, "two chunks of P"
        assert sizes.pop((4, 32, L * r)) == 1, "parts of the coefficients of a chunk"
    else:
        assert sizes.pop((4, 256, L * r)) == 1 and sizes.pop((2, 0)) == 1
    (sums,) = sizes
    assert sums == (1024,), "sums of v"


def test_a_missing_linear_is_an_error_and_not_a_nan(device, orthonormal_rows, problem):
    model = Model(device, orthonormal_rows, problem, (20,), torch.float32)
    before = model.slab.clone()
    (linears,) = model.samples()
    with pytest.raises(ValueError, match="gradients are missing"):
        lora_backward_project([linears[:2]], model.slab, Sgd(0.1))
    # the last two: as many gradients as masters, and one linear's place unwritten
    same = dataclasses.replace(linears[0], master_B=linears[2].master_B)
    for wrong in ([*linears, linears[0]], [linears[0], linears[0], *linears[1:]], [linears[0], same, *linears[1:]]):
        with pytest.raises(ValueError, match="sample 0 has the gradient of this master_A, at element 0, already"):
            lora_backward_project([wrong], model.slab, Sgd(0.1))
    with pytest.raises(ValueError, match="holds no linear"):
        lora_backward_project([], model.slab, Sgd(0.1))
    blocks = model.blocks(resident=True)
    with pytest.raises(ValueError, match="block 0 does not begin"):
        lora_backward_project([linears], model.slab, Sgd(0.1), blocks[1:])
    narrow = dataclasses.replace(blocks[1], rows=blocks[0].rows)
    with pytest.raises(ValueError, match="block 1: its basis has width 40, its A 30"):
        lora_backward_project([linears], model.slab, Sgd(0.1), [blocks[0], narrow])
    assert torch.equal(model.slab, before)


def test_masters_must_be_views_of_the_slab(device, orthonormal_rows, problem):
    model = Model(device, orthonormal_rows, problem, (20,), torch.float32)
    (linears,) = model.samples()
    parts = Parts(model.slab[: model.slab.numel() - 1], (20,), linears[0].x)
    for wrong, name in (
        (dataclasses.replace(linears[0], master_A=linears[0].master_A.clone()), "master_A"),
        (dataclasses.replace(linears[0], master_B=linears[0].master_B.clone()), "master_B"),
        (linears[2], "master_B"),  # the last element lies beyond this slab
    ):
        with pytest.raises(ValueError, match=f"{name} is no view of the slab"):
            parts.add(wrong)
    parts.add(linears[0])  # what was refused counts for nothing


def test_what_does_not_fit_is_named_as_the_caller_knows_it(device, orthonormal_rows, problem):
    model = Model(device, orthonormal_rows, problem, (20,), torch.float32)
    (linears,), before = model.samples(), model.slab.clone()
    first, blocks = linears[0], model.blocks(resident=False)
    long = problem(40, *SITES[1], R, torch.float32, seed=0)
    # of several parts
    long = dataclasses.replace(linears[1], x=long.x.repeat(20, 1), g=long.g.repeat(20, 1), base_dx=None)

    def raises(message, linears=linears, slab=model.slab, blocks=blocks):
        with pytest.raises(ValueError, match=message):
            lora_backward_project([linears], slab, Sgd(0.1), blocks)

    def instead(**changes):
        return [dataclasses.replace(first, **changes), *linears[1:]]

    raises(r"^master_A has shape \[40, 3\], needs \[40, 4\]", instead(master_A=first.master_A[:, :3]))
    raises(r"^master_B has shape \[3, 24\], needs \[4, 24\]", instead(master_B=first.master_B[:3]))
    columns = first.master_B.reshape(-1).as_strided(first.master_B.shape, (1, RANK))
    raises(r"^master_B has strides \(1, 4\)", instead(master_B=columns))
    raises(r"^g has shape \[19, 24\], needs \[20, 24\]", instead(g=first.g[:19]))
    raises("^x of 800 tokens in torch.float32 leaves .* parts, and sample 0 has 1: its linears have one T",
           [first, long, linears[2]])
    raises("^slab is torch.bfloat16, needs one of float32", slab=model.slab.bfloat16())
    raises(r"^slab has shape \[1, \d+\], needs \[\d+\]", slab=model.slab[None])
    raises(r"^rows of block 1 has strides", blocks=[blocks[0], dataclasses.replace(blocks[1], rows=blocks[1].rows.T)])
    raises(r"^rows of block 1 is torch.float64",
           blocks=[blocks[0], dataclasses.replace(blocks[1], rows=blocks[1].rows.double())])
    assert torch.equal(model.slab, before)


@pytest.mark.parametrize("kind", ["none", "others", "taken", "host", "A"])
def test_what_does_not_fit_is_found_before_the_masters_change(kind, device, orthonormal_rows, problem):
    model = Model(device, orthonormal_rows, problem, (20,), torch.float32)
    before, blocks = model.slab.clone(), model.blocks(resident=False)
    stream = stream_of(blocks, device)
    message = "stream has other bases"
    if kind == "none":
        stream = stream_of([], device)
    elif kind == "others":
        stream = stream_of([dataclasses.replace(block, rows=block.rows.clone()) for block in blocks], device)
    elif kind == "taken":
        list(stream.chunks())
    elif kind == "host":
        elsewhere = torch.empty(blocks[0].rows.shape, device="cpu" if device.type == "cuda" else "meta")
        blocks[0], message = dataclasses.replace(blocks[0], rows=elsewhere, resident=True), "rows of block 0 are on"
    else:
        blocks[1] = dataclasses.replace(blocks[1], A=blocks[1].A.clone())
        message = "A of block 1 is no view of the slab"
    with pytest.raises(ValueError, match=message):
        update_(model.slab, torch.ones(1, model.slab.numel(), device=device), Sgd(0.1), blocks, stream=stream)
    assert torch.equal(model.slab, before)


def test_the_stream_of_an_update_begins_before_its_first_gradient(device, orthonormal_rows, problem, monkeypatch):
    model = Model(device, orthonormal_rows, problem, (5,), torch.float32)
    begin, launched = BasisStream.__init__, []

    def begun(*args):
        launched.append(len(record))
        begin(*args)

    monkeypatch.setattr(BasisStream, "__init__", begun)
    with record_launches() as record:
        lora_backward_project(model.samples(), model.slab, Sgd(0.1), model.blocks(resident=False))
    assert launched == [0] and record


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [False, True])
def test_an_update_of_full_size_is_bitwise_reproducible(resident, problem, orthonormal_rows):
    """Where hundreds of programs run at once: masters, moments, serving copy and dx of three runs."""
    linears, D, r, T = 4, 2048, 8, 1024
    problems = [problem(T, D, D, 48, torch.bfloat16, seed=n) for n in range(linears)]
    rows = orthonormal_rows(256, D)
    rows = rows if resident else rows.cpu().pin_memory()
    runs = []
    for _ in range(3):
        slab = torch.linspace(-1, 1, 2 * linears * D * r, device="cuda")
        A, B = slab[: linears * D * r].view(D, linears * r), slab[linears * D * r :].view(linears, r, D)
        m, v, serving = torch.zeros_like(slab), torch.zeros_like(slab), torch.empty_like(slab, dtype=torch.bfloat16)
        sample = [
            Linear(*p.operands, slice(8, 16), A[:, r * i : r * i + r], B[i], base_dx=p.base_dx)
            for i, p in enumerate(problems)
        ]
        dx, coef = lora_backward_project(
            [sample], slab, Adam(m, v, **OPTIONS), [Block(A, rows, resident)], serving=serving
        )
        runs.append((slab, m, v, serving, *dx[0], *coef))
        assert bool(slab.isfinite().all())
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
