"""The ahead-of-time gate, in processes without the interpreter: every kernel compiles well for absent cards."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ogpstream.kernels import aot

ROOT = Path(__file__).parents[2]
KERNELS = {
    "shrink_kernel", "expand_kernel", "gradient_kernel", "sum_kernel", "sgd_kernel", "moments_kernel", "adam_kernel",
    "coefficients_kernel", "removal_kernel", "cross_entropy_kernel",
}  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    environment.pop("TRITON_INTERPRET", None)
    command = (sys.executable, *command)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_every_kernel_compiles_without_a_fault(arch):
    done = run("-m", "ogpstream.kernels.aot", arch)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(f"{arch} ") and line.endswith("  ok") for line in lines)
    assert {line.split()[1] for line in lines} == KERNELS
    for dtype in ("bfloat16", "float16", "float32"):
        own = [line for line in lines if f" {dtype} " in line]
        assert {line.split()[1] for line in own} >= {"shrink_kernel", "expand_kernel", "gradient_kernel"}
        # no trained column, and neither h nor base_dx given
        for form in (" r0 ", " nothing given "):
            assert dtype == "float16" or any(" gradient_kernel " in line and form in line for line in own), form
    # the first update of a fresh learner, the least rank, the widest batch, P in any form
    for size in ("shrink_kernel .*2048x2048 R16 ", "gradient_kernel .*2048x2048 R16 r8 ", "shrink_kernel .* R1 ",
                 "gradient_kernel .* R1 r1 ", "(moments|sgd|sum)_kernel .*16 parts", "moments_kernel .*1 part ",
                 "removal_kernel .*512 directions", "removal_kernel .*4096, ", "removal_kernel .* weighted",
                 "removal_kernel .*, 32 directions "):  # fmt: skip
        assert any(re.search(size, line) for line in lines), size
    # at a model's widths activations, masters and moments come 16 bytes at a time; adam also reads single sums
    for name, least in dict(shrink=92, expand=100, gradient=100, sgd=100, moments=100, adam=60).items():
        own = [line for line in lines if re.search(rf" {name}_kernel .*(bfloat16 2048x2048 R48|[0-9] part)", line)]
        shares = [int(share) for line in own for share in re.findall(r"(\d+)% wide", line)]
        assert len(shares) == len(own) > 0 and min(shares) >= least, own


def test_every_kernel_of_the_package_is_in_the_gate():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)) == KERNELS
    # one that said nothing of its precision would multiply float32 in TF32
    dots = re.findall(r"tl\.dot\(.*", sources)
    assert len(dots) == 9 and all('input_precision="ieee"' in dot for dot in dots)


def test_planted_faults_are_refused():
    done = run(str(ROOT / "tests" / "kernels" / "planted_faults.py"))
    assert done.returncode == 0, done.stderr
    faults = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert faults["tf32_dot"] == "TF32: products are float32"
    assert faults["spilling"].startswith("spills: ")
    assert faults["no_tensor_cores"] == "no tensor cores for half precision: products are half"
    assert re.search(r"\d+ bytes of shared memory, over the 101376 of sm_86", faults["too_much_shared"])
    assert faults.pop("exit status") == "1"
    narrow = {name: fault for name, fault in faults.items() if name.endswith(" 8")}
    assert narrow.keys() == {"shrink_kernel BR 8", "expand_kernel BR 8", "gradient_kernel BR 8", "gradient_kernel BK 8"}
    assert set(narrow.values()) == {"CompileTimeAssertionFailure"}
    assert faults.keys() - narrow.keys() == {"tf32_dot", "spilling", "no_tensor_cores", "too_much_shared"}


def test_an_architecture_that_the_gate_does_not_know_is_an_error_of_one_line(capsys):
    assert aot.main(["sm_90", "sm_89"]) == 2
    assert capsys.readouterr() == ("", "aot: sm_89 is unknown: use sm_80, sm_86, sm_90\n")


def test_the_gate_refuses_to_run_on_interpreted_kernels():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "ogpstream.kernels.aot", "sm_80"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "start without TRITON_INTERPRET" in done.stderr
