"""Bytes and operations by formula against numbers worked out by hand, and the sizes that are measured."""

from dataclasses import replace

import pytest
import torch

from ogpstream.profiling.gpu_timer import ClockTimer
from ogpstream.profiling.kernel_cases import OPERATIONS, SWEEPS, Case, cases
from ogpstream.profiling.kernel_floor import Rates, Work, floor_seconds, measure_rates, work

MIB = 1 << 20
# 2 linears 4 -> 6 wide, 3 tokens, 5 columns of which 2 are trained, 3 directions; bf16
TINY = dict(T=3, L=2, D_in=4, D_out=6, R=5, r=2, m=3)


def test_lora_forward():
    # x 12, y 18 and factors 5 * 10 elements of 2 bytes; h 15 of 4
    assert work(Case("lora_forward", **TINY)) == Work(2 * (2 * (12 + 18 + 50) + 4 * 15), operations=2 * 2 * 3 * 5 * 10)


def test_lora_backward():
    # x, base_dx, dx 12 each, g 18, factors 50, of 2 bytes; h 15, dA 8, dB 12, of 4
    bytes_ = 2 * (2 * (3 * 12 + 18 + 50) + 4 * (15 + 8 + 12))
    # Y 3x6x5, dA 4x3x2, dB 2x3x6, dx 3x5x4
    operations = 2 * 2 * (3 * 6 * 5 + 4 * 3 * 2 + 2 * 3 * 6 + 3 * 5 * 4)
    assert work(Case("lora_backward", **TINY)) == Work(bytes_, operations=operations)


@pytest.mark.parametrize("scope,bases", [("shared", 1), ("layer", 2)])
@pytest.mark.parametrize("basis", ["resident", "streamed"])
def test_projection(scope, bases, basis):
    # A 2 x 8 in and out, P 3 x 4, coefficients 3 x 2 a linear, of 4 bytes
    P = 4 * bases * 3 * 4
    expected = Work(4 * 2 * 2 * 8 + P + 4 * 2 * 3 * 2, P if basis == "streamed" else 0, single=2 * 2 * 2 * 3 * 4 * 2)
    assert work(Case("projection", **TINY, scope=scope, basis=basis)) == expected


def test_an_update_is_its_two_halves_without_the_gradient_between_them():
    for m in (0, 3):
        backward, step, update = (
            work(Case(op, **{**TINY, "m": m})) for op in ("lora_backward", "step_projection", "update")
        )
        # dA and dB 2 * (8 + 12) floats: written by one half and read by the other
        assert update.bytes == backward.bytes + step.bytes - 2 * 4 * 40
        assert (update.operations, update.single) == (backward.operations, step.single)
    # six times the 40 masters and moments and the gradient in float32, the serving copy in bf16
    assert work(Case("step_projection", **{**TINY, "m": 0})).bytes == 40 * (7 * 4 + 2)


def test_cross_entropy():
    assert work(Case("cross_entropy", T=3, V=10)).bytes == 2 * 2 * 30 + 8 * 3
    assert work(Case("cross_entropy", "fp32", T=3, V=10)).bytes == 2 * 4 * 30 + 8 * 3


def test_the_size_that_the_goals_name():
    """32 layers at T = 1024: x, g, base_dx and dx are 512 MiB, and factors, h and gradients 4 % more."""
    todo = work(Case("lora_backward"))
    assert todo.bytes == 32 * 16 * MIB + 32 * (48 * 4096 * 2 + 1024 * 48 * 4 + 8 * 4096 * 4)
    assert work(Case("projection", basis="streamed")).host_bytes == 2 * MIB


def test_the_floor_is_the_largest_limit():
    case = Case("projection", **TINY, basis="streamed")
    todo, fast = work(case), 1e30
    for name, rates in {
        "bytes": Rates(2.0, fast, {"bf16": fast, "fp32": fast}),
        "host": Rates(fast, 2.0, {"bf16": fast, "fp32": fast}),
        "operations": Rates(fast, fast, {"bf16": fast, "fp32": 2.0}),
    }.items():
        amount = {"bytes": todo.bytes, "host": todo.host_bytes, "operations": todo.single}[name]
        assert floor_seconds(case, rates) == (amount / 2, name)


def test_rates_are_measured():
    now = iter(range(1000))
    # the clock moves one second between two looks: rates are what was moved and done
    rates = measure_rates(torch.device("cpu"), ClockTimer(lambda: next(now)), quick=True)
    assert rates.memory == rates.host == 2 * 4 * (1 << 20)
    assert rates.operations == dict.fromkeys(("bf16", "fp16", "fp32"), 2 * 256**3)


@pytest.mark.parametrize("quick", [False, True])
def test_sweeps_cover_what_the_table_is_for(quick):
    found = list(cases(list(OPERATIONS), list(SWEEPS), quick=quick))
    assert len(found) == len(set(found)) == len({(case.op, case.dtype, case.shape) for case in found})
    assert [case.op for case in found[:6]] == list(OPERATIONS)
    assert not any(case.op == "projection" and case.m == 0 for case in found)
    assert {case.basis for case in found} == {"resident", "streamed"}
    assert {case.scope for case in found} == {"shared", "layer"}
    if not quick:
        assert {case.T for case in found if case.op == "update"} == {64, 256, 512, 1024, 2048, 4096}
        assert {case.L for case in found if case.op == "update"} == {1, 8, 22, 32}
        assert {case.m for case in found if case.op == "update"} == {0, 64, 128, 256, 512}
        assert {case.dtype for case in found if case.op == "update"} == {"bf16", "fp16", "fp32"}
        assert any(case.D_in != case.D_out for case in found)


def test_a_shape_names_what_matters_and_nothing_else():
    case = Case("update")
    assert case.shape == "T1024 L32 2048x2048 R48 r8 m256 shared resident"
    assert replace(case, op="projection").shape == "L32 2048x2048 r8 m256 shared resident"
    assert replace(case, op="lora_backward").shape == "T1024 L32 2048x2048 R48 r8"
    assert replace(case, op="cross_entropy").shape == "T1024 V32000"
