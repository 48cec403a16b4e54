"""The rows of `bench kernels`: each provider compared with float64 first, then timed in turn on the same operands."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ogpstream.profiling.environment import environment
from ogpstream.profiling.gpu_timer import (
    LEAST,
    ClockTimer,
    EventTimer,
    Timer,
    count_kernels,
    graph_seconds,
    time_in_turn,
)
from ogpstream.profiling.kernel_cases import Case, Operation, cases
from ogpstream.profiling.kernel_floor import Rates, floor_seconds, measure_rates, work
from ogpstream.profiling.kernel_problem import Job, Problem
from ogpstream.profiling.kernel_providers import PROVIDERS, TRITON, is_timed, launches, left_out, runs
from ogpstream.profiling.kernel_report import CsvLog, suggestion
from ogpstream.profiling.kernel_score import Score, Truth

# of gradients and of what the projection leaves in span(P); the change of a float32 master is read from numbers ten
# times larger, whose rounding it carries
SINGLE_BOUND, CHANGE_BOUND, HALF_BOUND, LEAK_BOUND = 1e-6, 1e-5, 1e-2, 5e-7
# seconds a provider and state of the caches: 70 cases of up to 8 providers, hot and cold, are 112 s of timing; with
# compilation and checks less than 5 minutes, an estimate that no GPU has confirmed
BUDGET, QUICK_BUDGET, QUICK_LEAST = 0.1, 0.02, 5


def is_correct(case: Case, score: Score) -> bool:
    """Within the promised error and leak; NaN is not."""
    single = CHANGE_BOUND if case.op in ("step_projection", "update") else SINGLE_BOUND
    # these two work in float32 whatever the dtype of the activations is
    bound = single if case.dtype == "fp32" or case.op in ("projection", "step_projection") else HALF_BOUND
    return score.rel_err <= bound and (score.leak is None or score.leak <= LEAK_BOUND)


def run_case(
    case: Case, names: Sequence[str], device: torch.device, timer: Timer, rates: Rates | None, *,
    budget: float, least: int, graphs: bool, failures: dict[str, str],
) -> list[dict[str, Any]]:
    """The rows of one case: a provider each, twice (L2 hot and cold) on a GPU.

    Without rates there is no floor, and no bytes per second.
    A provider that raises is left out, and the first line of what it said goes to `failures`.
    """
    problem = Problem(case, device)
    truth = Truth(problem)
    jobs: dict[str, Job] = {}
    facts: dict[str, tuple[Score, int | None, float | None]] = {}
    for name in names:
        try:
            job = PROVIDERS[name].make(problem)
            score = truth.score(job.read(job.run()))
            # the runs after the first are warm: nothing is compiled in them
            kernels = launches(name, job.run)
            graph = graph_seconds(job.run, timer) if graphs and PROVIDERS[name].capturable else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failures[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        facts[name] = score, kernels, graph
        if is_timed(name, device):
            jobs[name] = job
    floor, floor_by = (None, None) if rates is None else floor_seconds(case, rates)
    rows = []
    for cold in (False, True) if device.type == "cuda" else (False,):
        calls = {name: job.run for name, job in jobs.items()}
        times = time_in_turn(calls, timer, cold=cold, budget=budget, least=least)
        for name, (score, kernels, graph) in facts.items():
            taken = times.get(name)
            rows.append({
                "op": case.op, "provider": name, "shape": case.shape, "dtype": case.dtype,
                "l2": "cold" if cold else "hot",
                "ms_p20": taken and 1e3 * taken.p20, "ms_p50": taken and 1e3 * taken.p50,
                "ms_p80": taken and 1e3 * taken.p80, "graph_ms_p50": graph and 1e3 * graph,
                "gbps": taken and floor and work(case).bytes / taken.p50 / 1e9,
                "floor_ms": floor and 1e3 * floor, "floor_by": floor_by,
                "floor_ratio": taken and floor and taken.p50 / floor,
                # JSON has no NaN
                "rel_err": score.rel_err if math.isfinite(score.rel_err) else None, "leak": score.leak,
                "correct": is_correct(case, score), "launches": kernels, "samples": taken and taken.samples,
                "T": case.T, "L": case.L, "D_in": case.D_in, "D_out": case.D_out, "R": case.R, "r": case.r, "m": case.m,
                "basis": case.basis, "scope": case.scope, "V": case.V,
            })  # fmt: skip
    return rows


def measure(
    device: torch.device, ops: list[Operation], sweeps: list[str], names: list[str], command: str, out: Path | None,
    console: Console, *, quick: bool, graphs: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The values of the JSON line, and what is wrong with them in one line each."""
    started = time.perf_counter()
    # TF32 leaves 2.6e-4 of Z in span(P): no provider may use it
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    missing = left_out(names, device, quick=quick)
    names = [name for name in names if name not in missing]
    timer: Timer = EventTimer(device) if device.type == "cuda" else ClockTimer()
    # the floor is that of device memory, and a CPU has none: its caches hold what a small case has
    rates = measure_rates(device, timer, quick=quick) if device.type == "cuda" else None
    values: dict[str, Any] = {**environment(device), "command": command, **_told(rates), "left_out": missing}
    values["rows"] = []
    copied = "" if rates is None else f": {values['copy_gbps']:.0f} GB/s by a copy, read and written"
    console.print(f"{values['device']}{copied}", markup=False, highlight=False, soft_wrap=True)
    if device.type == "cpu":
        sizes = "" if quick else "; these sizes are for a GPU and take long here, --quick has small ones"
        console.print("this is a CPU: times say nothing of a GPU, and GB/s, the floor, cold caches and launches of "
                      f"others are left out{sizes}", highlight=False, soft_wrap=True)
    for name, reason in missing.items():
        console.print(f"{name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    every = list(cases(ops, sweeps, quick=quick))
    base = set(cases(ops, [], quick=quick))
    wrong: list[str] = []
    log = None if out is None else CsvLog(out / "kernels.csv", values)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(every))
        for case in every:
            what = f"{case.op} {case.dtype} {case.shape}"
            progress.update(bar, description=what)

            failures: dict[str, str] = {}
            try:
                rows = run_case(
                    case, [name for name in names if runs(name, case, is_base=case in base)], device, timer, rates,
                    budget=QUICK_BUDGET if quick else BUDGET, least=QUICK_LEAST if quick else LEAST, graphs=graphs,
                    failures=failures,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                missing[what] = "not enough device memory"
                torch.cuda.empty_cache()
                rows = []
            # torch.compile is not ours to repair
            missing |= {f"compiled, {what}": message for name, message in failures.items() if name == "compiled"}
            wrong += [f"{name} failed at {what}: {message}" for name, message in failures.items() if name != "compiled"]
            wrong += [
                f"{row['provider']} is wrong at {what}: relative error {row['rel_err']}, leak {row['leak']}"
                for row in rows if row["provider"] in TRITON and not row["correct"] and row["l2"] == "hot"
            ]  # fmt: skip
            values["rows"] += rows
            if log is not None:
                log.write(rows)
            progress.advance(bar)
    if device.type == "cuda":
        _count_launches(values["rows"], base, device)
        if log is not None:
            log.rewrite(values["rows"])
    if graphs:
        values["without_graphs"] = sorted({row["provider"] for row in values["rows"] if row["graph_ms_p50"] is None})
        console.print(f"timed without CUDA graphs in some case: {', '.join(values['without_graphs']) or 'none'}",
                      highlight=False, soft_wrap=True)
    values["suggestion"] = suggestion(values["rows"])
    values["seconds"] = time.perf_counter() - started
    return values, wrong


def _count_launches(rows: list[dict[str, Any]], of: set[Case], device: torch.device) -> None:
    """Fill in how many kernels torch launches, for these cases: after all timing, since a profiler slows launches."""
    for case in of:
        problem = Problem(case, device)
        unknown = [row for row in rows if (row["op"], row["shape"], row["dtype"]) == (case.op, case.shape, case.dtype)
                   and row["launches"] is None]
        for name in sorted({row["provider"] for row in unknown}):
            job = PROVIDERS[name].make(problem)
            job.run()
            counted = count_kernels(job.run)
            for row in unknown:
                if row["provider"] == name:
                    row["launches"] = counted


def _told(rates: Rates | None) -> dict[str, Any]:
    if rates is None:
        return {"copy_gbps": None, "host_gbps": None, "tflops": None}
    return {"copy_gbps": rates.memory / 1e9, "host_gbps": rates.host / 1e9,
            "tflops": {name: rate / 1e12 for name, rate in rates.operations.items()}}
