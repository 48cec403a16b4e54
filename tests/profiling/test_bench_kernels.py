"""The command: its JSON line, CSV, picture, exit status and what it says."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ogpstream.profiling import kernel_providers, kernel_run
from ogpstream.profiling.__main__ import app
from ogpstream.profiling.gpu_timer import ClockTimer
from ogpstream.profiling.kernel_cases import Case
from ogpstream.profiling.kernel_floor import Rates, work
from ogpstream.profiling.kernel_providers import PROVIDERS
from ogpstream.profiling.kernel_report import WHERE, suggestion, suggestion_text, table
from ogpstream.profiling.kernel_run import run_case

# what scripts rely on
FIELDS = {"op", "provider", "shape", "dtype", "ms_p50", "gbps", "floor_ratio", "rel_err", "leak", "launches"}
MORE = {"ms_p20", "ms_p80", "l2", "floor_ms", "floor_by", "correct", "samples"}
COMMAND = ["bench", "kernels", "--quick", "--device", "cpu", "--sweep", "none"]


def run(*words: str):
    return CliRunner().invoke(app, [*COMMAND, *words])


@pytest.mark.skipif(torch.cuda.is_available(), reason="ours is checked in the interpreter here")
def test_rows_file_and_picture(tmp_path):
    options = ["--ops", "projection,lora_backward", "--providers", "addmm,reference,ours"]
    done = run(*options, "--json", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 1, "the table goes to stderr when stdout is for a program"
    values = json.loads(lines[0])
    assert {"device", "torch", "triton", "capability", "driver", "copy_gbps", "command", "left_out"} <= set(values)
    assert values["command"] == ("ogpstream bench kernels --device cpu --ops projection,lora_backward "
                                 "--providers addmm,reference,ours --sweep none --quick")
    # in the order of the operations and of the providers, whatever the order they were asked for in
    assert [(row["op"], row["provider"]) for row in values["rows"]] == [
        (op, name) for op in ("lora_backward", "projection") for name in ("ours", "reference", "addmm")
    ]
    for row in values["rows"]:
        assert FIELDS | MORE <= set(row) and row["correct"] and row["l2"] == "hot"
        assert (row["leak"] is None) == (row["op"] == "lora_backward")
        if row["provider"] == "ours":
            assert row["ms_p50"] is row["gbps"] is None and row["launches"] > 0, "the interpreter is not timed"
        else:
            assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["launches"] is None
        # bytes a second and the floor are those of a GPU's memory
        assert {row[name] for name in ("gbps", "floor_ms", "floor_by", "floor_ratio", "graph_ms_p50")} == {None}
    assert {values[name] for name in ("copy_gbps", "host_gbps", "tflops", "capability", "driver")} == {None}
    with open(tmp_path / "kernels.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert len(stored) == len(values["rows"]) and {*FIELDS, *MORE, *WHERE} <= set(stored[0])
    assert stored[-1]["torch"] == torch.__version__ and stored[-1]["command"] == values["command"]
    assert float(stored[-1]["ms_p50"]) == values["rows"][-1]["ms_p50"]
    assert {line[name] for line in stored for name in ("gbps", "floor_ratio", "copy_gbps")} == {""}
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_it_says_that_it_is_a_cpu_and_shows_the_table():
    done = run("--ops", "cross_entropy", "--providers", "reference")
    assert done.exit_code == 0 and "this is a CPU" in done.stderr and "GB/s, the floor, cold caches" in done.stderr
    head, case, row = done.stdout.splitlines()
    assert head.split() == "ms of a call p20 p50 p80 error".split() and len(row.split()) == 5
    assert case == "cross_entropy fp32 T96 V1000" and row.startswith("  reference")


def test_a_floor_and_bytes_a_second_come_of_measured_rates():
    case = Case("cross_entropy", "fp32", T=5, V=40)
    rates = Rates(1e9, 1e9, dict.fromkeys(("bf16", "fp16", "fp32"), 1e9))
    (row,) = run_case(case, ["reference"], torch.device("cpu"), ClockTimer(), rates, budget=0.0, least=1, graphs=False,
                      failures={})
    assert row["floor_ms"] == pytest.approx(1e-6 * work(case).bytes) and row["floor_by"] == "bytes"
    assert row["floor_ratio"] == pytest.approx(row["ms_p50"] / row["floor_ms"])
    assert row["gbps"] == pytest.approx(1e-6 * work(case).bytes / row["ms_p50"])
    head, first, second = table([row])
    assert "GB/s  x floor" in head and first.endswith(f"floor {row['floor_ms']:.3g} ms (bytes)")
    assert len(second.split()) == 1 + len(head.removeprefix("ms of a call").replace("x floor", "floor").split())


def test_a_backend_that_is_none_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("OGPSTREAM_BACKEND", "abacus")
    done = run("--ops", "cross_entropy", "--providers", "reference")
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "OGPSTREAM_BACKEND=abacus: there is no such backend here, set it to one of: auto," in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="ours is left out on the CPU of a machine with a GPU")
def test_wrong_results_of_ours_and_failures_end_with_1(monkeypatch):
    def off(problem):
        job = PROVIDERS["reference"].make(problem)
        return replace(job, read=lambda result: {"y": [2 * y for y in job.read(result)["y"]]})

    def broken(problem):
        raise RuntimeError("no such product\nand more")

    changed = {"ours": off, "addmm": broken}
    every = {**PROVIDERS, **{name: replace(PROVIDERS[name], make=make) for name, make in changed.items()}}
    for module in (kernel_run, kernel_providers):
        monkeypatch.setattr(module, "PROVIDERS", every)
    done = run("--ops", "lora_forward", "--providers", "ours,addmm,reference", "--json")
    assert done.exit_code == 1
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["provider"], row["correct"]) for row in rows] == [("ours", False), ("reference", True)]
    assert "ours is wrong at lora_forward" in done.stderr and "addmm failed at lora_forward" in done.stderr
    assert "and more" not in done.stderr


@pytest.mark.parametrize("words,status,told", [
    (["--ops", "backward"], 2, "--ops backward is unknown: use lora_forward"),
    (["--providers", "cutlass"], 2, "use ours, separate"),
    (["--sweep", "N"], 2, "use T, L, m"),
    (["--device", "tpu"], 2, "use cpu or cuda"),
    (["--graphs"], 2, "leave it out on a CPU"),
    (["--out", "/dev/null/here"], 1, "choose another folder with --out"),
])  # fmt: skip
def test_what_cannot_be_done_is_told_in_one_line(words, status, told):
    words = [*words] if "--sweep" in words else ["--sweep", "none", *words]
    done = CliRunner().invoke(app, ["bench", "kernels", "--quick", "--device", "cpu", *words])
    assert done.exit_code == status
    assert told in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there():
    done = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda"])
    assert done.exit_code == 2 and "use --device cpu" in done.stderr


def timed(op: str, provider: str, shape: str, ms: float, l2: str = "cold", dtype: str = "bf16") -> dict:
    return {"op": op, "provider": provider, "shape": shape, "dtype": dtype, "l2": l2, "ms_p50": ms}


def test_cublas_is_suggested_where_it_wins_by_more_than_noise():
    rows = [
        *(timed("lora_backward", name, shape, ms) for shape, mine, theirs in (("a", 4.0, 1.0), ("b", 1.0, 1.0))
          for name, ms in (("separate", mine), ("cublas", theirs))),
        # hot rows, float32 and the fused call say nothing of what `dispatch` should take
        timed("lora_backward", "cublas", "a", 99.0, l2="hot"),
        timed("lora_backward", "cublas", "a", 99.0, dtype="fp32"), timed("lora_backward", "ours", "a", 0.1),
        timed("projection", "ours", "a", 1.0), timed("projection", "cublas", "a", 0.97),
        timed("lora_forward", "ours", "a", 1.0),
    ]  # fmt: skip
    found = suggestion(rows)
    assert [(row["operation"], row["ratio"], row["take_cublas"]) for row in found] == [
        ("lora_backward", pytest.approx(0.5), True), ("project_out_", pytest.approx(0.97), False),
    ]  # fmt: skip
    assert suggestion_text(found, [9, 0])[-1] == 'kernels/configs.py, CUBLAS: (9, 0): frozenset({"lora_backward"})'
    assert "no entry" in suggestion_text(found[1:], [9, 0])[-1]
    assert "nothing to suggest" in suggestion_text([], None)[0]


def test_only_what_can_be_captured_is_captured(monkeypatch):
    """Autograd's backward on the stream of its forward would spoil the capture, and what is timed after it."""
    captured = []
    monkeypatch.setattr(kernel_run, "graph_seconds", lambda run, timer: captured.append(run) or 1.0)
    case = Case("lora_backward", "bf16", T=5, L=1, D_in=16, D_out=16, R=8, r=4)
    rates = Rates(1e9, 1e9, dict.fromkeys(("bf16", "fp16", "fp32"), 1e9))
    rows = run_case(case, ["addmm", "peft", "peft_autocast", "cublas"], torch.device("cpu"), ClockTimer(), rates,
                    budget=0.0, least=1, graphs=True, failures={})
    assert {row["provider"]: row["graph_ms_p50"] for row in rows} == {
        "addmm": 1000.0, "peft": None, "peft_autocast": None, "cublas": 1000.0,
    }  # fmt: skip
    assert len(captured) == 2


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path):
    done = CliRunner().invoke(app, ["bench", "kernels", "--quick", "--graphs", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["capability"] == list(torch.cuda.get_device_capability())
    assert {row["l2"] for row in values["rows"]} == {"hot", "cold"}
    assert all(row["ms_p50"] > 0 for row in values["rows"])
    assert all(row["launches"] for row in values["rows"] if row["provider"] == "ours")
    assert all(row["graph_ms_p50"] > 0 for row in values["rows"] if row["provider"] == "ours")
    assert {"peft", "peft_autocast"} <= set(values["without_graphs"])
