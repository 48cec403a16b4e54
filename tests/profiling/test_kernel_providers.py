"""Every provider does the whole operation, and a provider that does not is found by the error and the leak."""

from dataclasses import replace

import pytest
import torch

from ogpstream.profiling.kernel_cases import PROVIDER_NAMES, Case
from ogpstream.profiling.kernel_problem import Job, Problem
from ogpstream.profiling.kernel_providers import PROVIDERS, TRITON, launches, left_out
from ogpstream.profiling.kernel_run import is_correct
from ogpstream.profiling.kernel_score import Truth

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = dict(T=20, L=2, D_in=48, D_out=40, R=12, r=4, m=20, V=50)
CASES = [
    Case("lora_forward", "fp32", **SIZES), Case("projection", "fp32", **SIZES),
    Case("lora_backward", "fp32", **SIZES), Case("lora_backward", "bf16", **SIZES),
    Case("step_projection", "fp32", **SIZES), Case("update", "fp32", **SIZES), Case("update", "bf16", **SIZES),
    Case("update", "fp32", **SIZES, basis="streamed", scope="layer"),
    Case("update", "fp32", **{**SIZES, "m": 0}), Case("cross_entropy", "fp32", **SIZES),
]  # fmt: skip
OTHERS = [name for name in PROVIDERS if name != "compiled"]


def solve(case: Case, name: str):
    """The problem, what float64 says of it, and the provider's job."""
    problem = Problem(case, DEVICE)
    return Truth(problem), PROVIDERS[name].make(problem)


def test_help_names_all_providers():
    assert tuple(PROVIDERS) == PROVIDER_NAMES


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.dtype}-{case.scope}-m{case.m}")
def test_a_provider_is_correct(case, name):
    if case.op not in PROVIDERS[name].ops:
        pytest.skip("has no such operation")
    if name == "peft_autocast" and case.dtype == "fp32":
        pytest.skip("float32 is what autocast leaves alone")
    truth, job = solve(case, name)
    score = truth.score(job.read(job.run()))
    assert is_correct(case, score), score
    assert (score.leak is not None) == (case.projects and case.m > 0)
    job.run()
    assert truth.score(job.read(job.run())).rel_err >= 0, "a call leaves what the next one needs"


@pytest.mark.slow
def test_compiled_code_is_correct():
    case = Case("update", "fp32", **SIZES)
    if left_out(["compiled"], CPU, quick=False):
        pytest.skip("no C++ compiler")
    truth, job = solve(case, "compiled")
    assert is_correct(case, truth.score(job.read(job.run())))


def planted(job: Job, change) -> Job:
    """The job with its outputs changed."""
    return replace(job, read=lambda result: change(dict(job.read(result))))


@pytest.mark.parametrize("name", ["dA", "dB", "dx"])
def test_a_wrong_gradient_shows_in_the_error(name):
    case = Case("lora_backward", "fp32", **SIZES)
    truth, job = solve(case, "addmm")

    def one_percent(outputs):
        first, *rest = outputs[name]
        return {**outputs, name: [first * 1.01, *rest]}

    wrong = planted(job, one_percent)
    score = truth.score(wrong.read(wrong.run()))
    assert score.rel_err == pytest.approx(0.01, rel=1e-3) and not is_correct(case, score)


def test_a_step_without_projection_leaks():
    case = Case("step_projection", "fp32", **SIZES)
    truth, _ = solve(case, "addmm")
    job = PROVIDERS["addmm"].make(Problem(replace(case, m=0), DEVICE))
    score = truth.score(job.read(job.run()))
    assert score.leak is not None and score.leak > 1e-2 and score.rel_err > 1e-2
    assert not is_correct(case, score)


def test_a_step_that_is_left_out_is_an_error_of_its_own_size():
    """Masters move by a small part of their size: compared as they are, half a step would look right."""
    case = Case("update", "fp32", **SIZES)
    truth, job = solve(case, "addmm")
    problem = Problem(case, DEVICE)
    before = problem.masters
    half = planted(job, lambda outputs: {
        **outputs, "B": [(after + old) / 2 for after, old in zip(outputs["B"], before.B, strict=True)]
    })  # fmt: skip
    assert truth.score(half.read(half.run())).rel_err == pytest.approx(0.5, rel=1e-3)


def test_nan_is_wrong_and_a_missing_output_is_an_error():
    case = Case("lora_forward", "fp32", **SIZES)
    truth, job = solve(case, "reference")
    nan = planted(job, lambda outputs: {"y": [y * float("nan") for y in outputs["y"]]})
    assert not is_correct(case, truth.score(nan.read(nan.run())))
    with pytest.raises(KeyError):
        truth.score({})


def test_masters_lie_outside_the_basis_before_the_update():
    problem = Problem(Case("update", "fp32", **SIZES, scope="layer"), DEVICE)
    for block, rows in zip(problem.masters.blocks, problem.rows, strict=True):
        assert (rows @ block).norm() <= 1e-6 * block.norm()


def test_operands_are_the_same_whatever_is_asked_for_first():
    one, two = (Problem(Case("update", "fp32", **SIZES), DEVICE) for _ in range(2))
    names = ("x", "g", "base_dx", "packed", "h", "rows")
    for name in names:
        getattr(one, name)
    for name in reversed(names):
        getattr(two, name)
    assert torch.equal(one.masters.flat, two.masters.flat)
    for name in ("x", "g", "base_dx", "h", "rows"):
        assert all(map(torch.equal, getattr(one, name), getattr(two, name))), name


def test_launches_of_ours_are_recorded_and_of_torch_unknown():
    case = Case("update", "fp32", **SIZES)
    counted = {name: launches(name, solve(case, name)[1].run) for name in (*TRITON, "addmm")}
    # two a linear, two of Adam, two of a resident basis; apart, two Adams, no sums of a single part
    assert counted == {"ours": 8, "separate": 10, "addmm": None}


def test_the_backward_of_ours_ends_with_the_sums_that_others_have():
    """Two a linear, and one sum of the parts of all; apart, a sum each."""
    case = Case("lora_backward", "fp32", **SIZES | dict(T=300))
    counted = {name: launches(name, solve(case, name)[1].run) for name in TRITON}
    assert counted == {"ours": 2 * 2 + 1, "separate": 2 * 3}
    truth, job = solve(case, "ours")
    assert is_correct(case, truth.score(job.read(job.run())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is missing there")
def test_what_is_left_out_has_a_reason_and_a_remedy(monkeypatch):
    monkeypatch.setattr("ogpstream.profiling.kernel_providers._interpreted", lambda: False)
    reasons = left_out(list(PROVIDERS), CPU, quick=True)
    assert set(reasons) == {"ours", "separate", "compiled"}
    assert "CUDA" in reasons["ours"] and "--quick" in reasons["compiled"]
    assert left_out(["addmm"], CPU, quick=True) == {}
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "g++" in left_out(["compiled"], CPU, quick=False)["compiled"]
