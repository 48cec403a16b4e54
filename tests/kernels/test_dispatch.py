"""Which backend computes, and what is refused before one does."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ogpstream.kernels import configs, dispatch, reference

REFERENCE = dispatch.backend_for(torch.zeros(1), "sgd_")
# what every backend has
OPERATIONS = [
    field.name for field in dataclasses.fields(dispatch.Backend)
    if field.name != "name" and field.default is dataclasses.MISSING
]
MOMENTS = dict(step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A copy of the registry and no choice in the environment."""
    monkeypatch.setattr(dispatch, "_backends", dict(dispatch._backends))
    monkeypatch.delenv(dispatch.ENV, raising=False)


def on_cuda(dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(1, device="cuda", dtype=dtype)


def chosen(tensor, operation="lora_backward"):
    return dispatch.backend_for(tensor, operation).name


@pytest.mark.parametrize("choice", [None, "", "auto", "reference"])
def test_the_reference_runs_on_a_cpu(choice, monkeypatch):
    if choice is not None:
        monkeypatch.setenv(dispatch.ENV, choice)
    backend = dispatch.backend_for(torch.zeros(1), "lora_backward")
    assert backend.name == "reference" and backend.lora_backward is reference.lora_backward


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_takes_triton_on_cuda_and_the_reference_in_float64(operation, monkeypatch):
    assert chosen(on_cuda(), operation) == chosen(on_cuda(torch.bfloat16), operation) == "triton"
    assert chosen(on_cuda(torch.float64), operation) == chosen(torch.zeros(1), operation) == "reference"
    monkeypatch.setenv(dispatch.ENV, "reference")
    assert chosen(on_cuda(), operation) == "reference"


def test_auto_takes_cublas_for_what_a_table_says_of_that_card(monkeypatch):
    monkeypatch.setitem(configs.CUBLAS, (0, 1), frozenset({"project_out_"}))
    with configs.assume_capability((0, 1)):
        assert (chosen(on_cuda(), "project_out_"), chosen(on_cuda(), "lora_backward")) == ("cublas", "triton")
    with configs.assume_capability((0, 2)):
        assert chosen(on_cuda(), "project_out_") == "triton"


@pytest.mark.parametrize("choice", ["triton", "cublas"])
def test_the_environment_forces_a_backend(choice, monkeypatch):
    monkeypatch.setenv(dispatch.ENV, choice)
    assert {chosen(on_cuda(), op) for op in OPERATIONS} == {choice}
    on_host = choice if dispatch.backend_for(on_cuda(), "sgd_").on_host else "reference"
    assert {chosen(torch.zeros(1), op) for op in OPERATIONS} == {on_host}


def test_a_backend_that_does_not_compute_on_the_host_leaves_host_tensors_to_the_reference(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "triton")
    compiled = dataclasses.replace(dispatch.backend_for(on_cuda(), "sgd_"), on_host=False)
    monkeypatch.setitem(dispatch._backends, "triton", compiled)
    for operation in OPERATIONS:
        assert chosen(on_cuda(), operation) == "triton" and chosen(torch.zeros(1), operation) == "reference"


def test_without_triton_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    dispatch._backends.pop("triton", None)
    cublas = dispatch._backend("cublas")
    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    assert cublas is not None and chosen(on_cuda()) == "cublas" and chosen(torch.zeros(1)) == "reference"
    monkeypatch.setenv(dispatch.ENV, "triton")
    with pytest.raises(ValueError, match=r"^OGPSTREAM_BACKEND=triton: .* auto, cublas, reference$"):
        dispatch.sgd_(torch.zeros(2), torch.zeros(2), lr=0.1)


def test_a_fault_in_a_backend_is_not_taken_for_its_absence(monkeypatch):
    dispatch._backends.pop("triton", None)
    monkeypatch.setitem(dispatch._MODULES, "triton", "ogpstream.kernels.not_there")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        chosen(on_cuda())


def test_the_dispatch_alone_imports_neither_triton_nor_its_kernels():
    code = "import sys, ogpstream.kernels.dispatch; sys.exit('triton' in sys.modules)"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / ".typing")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, timeout=120).returncode == 0


def test_a_backend_that_is_not_there_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "cuda")
    with pytest.raises(ValueError, match=r"^OGPSTREAM_BACKEND=cuda: .* auto, cublas, reference, triton$"):
        dispatch.sgd_(torch.zeros(2), torch.zeros(2), lr=0.1)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'reference' is registered already"):
        dispatch.register_backend(REFERENCE)


def test_every_operation_reaches_the_chosen_backend_with_its_arguments(monkeypatch):
    calls = {}

    def recorder(name):
        return lambda *args, **kwargs: calls.setdefault(name, (args, kwargs))

    dispatch.register_backend(dispatch.Backend("spy", *map(recorder, OPERATIONS)))
    monkeypatch.setenv(dispatch.ENV, "spy")
    x, g, A, B, scale = (torch.zeros(s) for s in ((3, 4), (3, 5), (4, 2), (2, 5), (2,)))
    h, rows, weights, ids = torch.zeros(3, 2), torch.zeros(7, 4), torch.zeros(7), torch.zeros(3).long()
    options = dict(trained=slice(1, 2), h=h, base_dx=x)
    m, v = torch.zeros_like(A), torch.zeros_like(A)
    dispatch.lora_forward(x, A, B, scale, onto=g)
    dispatch.lora_backward(x, g, A, B, scale, **options)
    dispatch.project_out_(A, rows, chunk=5, weights=weights)
    dispatch.sgd_(A, A, lr=0.1, weight_decay=0.2)
    dispatch.adam_(A, A, m, v, **MOMENTS, weight_decay=0.2)
    dispatch.cross_entropy(x, ids)
    expected = {
        "lora_forward": ((x, A, B, scale), dict(onto=g)),
        "lora_backward": ((x, g, A, B, scale), options),
        "project_out_": ((A, rows), dict(chunk=5, weights=weights)),
        "sgd_": ((A, A), dict(lr=0.1, weight_decay=0.2)),
        "adam_": ((A, A, m, v), dict(MOMENTS, weight_decay=0.2)),
        "cross_entropy": ((x, ids), {}),
    }
    assert calls.keys() == expected.keys() == set(OPERATIONS)
    for name, (args, kwargs) in expected.items():
        assert [id(a) for a in args] == [id(a) for a in calls[name][0]], name
        assert kwargs.keys() == calls[name][1].keys(), name
        assert all(calls[name][1][key] is value for key, value in kwargs.items()), name


@pytest.mark.parametrize("samples", [1, 3])
def test_a_backend_for_one_sample_at_a_time_gets_one_after_the_other(samples, monkeypatch):
    calls = []

    def one(*args, **kwargs):
        calls.append(len(args[0]))
        return reference.lora_backward(*args, **kwargs)

    dispatch.register_backend(dataclasses.replace(REFERENCE, name="one", lora_backward=one, lora_backward_samples=None))
    rng = torch.Generator().manual_seed(0)
    x, g, A, B, scale, h = (torch.randn(s, generator=rng) for s in ((6, 4), (6, 5), (4, 2), (2, 5), (2,), (6, 2)))
    results = []
    for name in ("one", "reference"):
        monkeypatch.setenv(dispatch.ENV, name)
        base_dx = torch.ones_like(x)
        results.append(
            dispatch.lora_backward_samples(x, g, A, B, scale, samples, trained=slice(0, 1), h=h, base_dx=base_dx)
        )
    assert calls == [6 // samples] * samples
    (parts, dx), (expected, expected_dx) = results
    torch.testing.assert_close(dx, expected_dx)
    for part, ref in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, ref)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def forward(x=(3, 4), A=(4, 2), scale=(2,), onto=(3, 5)):
    dispatch.lora_forward(zeros(*x), zeros(*A), zeros(2, 5), zeros(*scale), onto=zeros(*onto))


def backward(g=(3, 5), start=0, stop=2, stride=None, **optional):
    optional = {name: zeros(*shape) for name, shape in optional.items()}
    factors = zeros(4, 2), zeros(2, 5), zeros(2)
    dispatch.lora_backward(zeros(3, 4), zeros(*g), *factors, trained=slice(start, stop, stride), **optional)


def samples(count, stop=2):
    factors = zeros(4, 2), zeros(2, 5), zeros(2)
    dispatch.lora_backward_samples(
        zeros(3, 4), zeros(3, 5), *factors, count, trained=slice(0, stop), h=zeros(3, 2), base_dx=zeros(3, 4)
    )


def project(Z=(4, 2), rows=(3, 4), dtype=torch.float32, **optional):
    dispatch.project_out_(zeros(*Z, dtype=dtype), zeros(*rows), **optional)


def adam(exp_avg=(4,), dtype=torch.float32, step=1):
    dispatch.adam_(zeros(4), zeros(4), zeros(*exp_avg), zeros(4, dtype=dtype), **dict(MOMENTS, step=step))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: forward(x=(2, 3, 4)), "x has shape [2, 3, 4], needs 2 dimensions"),
        (lambda: forward(A=(2, 4)), "A has shape [2, 4], needs [4, 2]"),
        (lambda: forward(scale=(1,)), "scale has shape [1], needs [2]"),
        (lambda: forward(onto=(3, 4)), "onto has shape [3, 4], needs [3, 5]"),
        (lambda: backward(g=(1, 5)), "g has shape [1, 5], needs [3, 5]"),
        (lambda: backward(h=(3, 1)), "h has shape [3, 1], needs [3, 2]"),
        (lambda: backward(base_dx=(1, 4)), "base_dx has shape [1, 4], needs [3, 4]"),
        (lambda: backward(stop=3), "trained is slice(0, 3, None), needs slice(start, stop) within the 2"),
        (lambda: backward(stride=2), "trained is slice(0, 2, 2)"),
        (lambda: backward(start=None), "trained is slice(None, 2, None)"),
        (lambda: samples(2), "samples is 2, needs a number that divides the 3 rows of x"),
        (lambda: samples(0), "samples is 0"),
        (lambda: samples(3, stop=3), "trained is slice(0, 3, None)"),
        (lambda: backward(start=-1), "trained is slice(-1, 2, None)"),
        (lambda: project(dtype=torch.bfloat16), "Z is torch.bfloat16, needs float32 or float64"),
        (lambda: project(Z=(4,)), "Z has shape [4], needs 2 dimensions"),
        (lambda: project(rows=(4, 3)), "rows has shape [4, 3], needs [4, 4]"),
        (lambda: project(weights=zeros(1)), "weights has shape [1], needs [3]"),
        (lambda: project(chunk=0), "chunk is 0"),
        (lambda: dispatch.sgd_(zeros(4, dtype=torch.float16), zeros(4), lr=1.0), "w is torch.float16"),
        (lambda: dispatch.sgd_(zeros(4), zeros(1), lr=1.0), "g has shape [1], needs [4]"),
        (lambda: adam(exp_avg=(1,)), "exp_avg has shape [1], needs [4]"),
        (lambda: adam(dtype=torch.float64), "exp_avg_sq is torch.float64, needs the dtype of w"),
        (lambda: adam(step=0), "step is 0, the first step is 1"),
        (lambda: dispatch.cross_entropy(zeros(3, 4), zeros(1).long()), "target has shape [1], needs [3]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
