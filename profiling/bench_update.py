"""`ogpstream bench update`: milliseconds of a whole update beside PEFT with autograd, and beside the bare model.

The ways take turns, so that what else runs on the machine meets all of them; ratios are medians over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from ogpstream.learner import LearnerConfig
from ogpstream.learner.config import LearningState
from ogpstream.profiling.bench_report import (
    Picture,
    Row,
    chosen,
    device_named,
    each,
    fail,
    measured,
    prepare,
    table,
    write,
)
from ogpstream.profiling.bench_vram import fields
from ogpstream.profiling.gpu_timer import percentile
from ogpstream.profiling.update_providers import Work, providers
from ogpstream.profiling.vram import llama_config, measure_update

PICTURES = [Picture(sweep, x, ("ours_ms_p50", "peft_ms_p50", "kept_ms_p50", "floor_ms_p50"), 1.0, "ms")
            for sweep, x in (("T", "T"), ("L", "L"))]  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A model with all linears adapted, and one sample. The defaults are a CPU's: 58M parameters."""

    width: int = 512
    L: int = 8
    vocabulary: int = 32000
    T: int = 256
    rows: int = 16
    targets: tuple[str, ...] | str = "all-linear"

    def architecture(self) -> Any:
        heads = max(1, self.width // 64)
        return llama_config(layers=self.L, width=self.width, inner=11 * self.width // 4, heads=heads, key_heads=heads,
                            vocabulary=self.vocabulary)

    def config(self, mode: LearningState = "lean") -> LearnerConfig:
        return LearnerConfig(target_modules=self.targets, learning_state=mode)


# the specification's, on a GPU
LARGE = Geometry(width=2048, L=32, T=1024, rows=512, targets=("o_proj",))


def time_update(geometry: Geometry, device: torch.device, turns: int) -> Row:
    """Medians of each way, of their ratios, and the 99th percentile of what a request waits for a unit."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(geometry.architecture(), dtype=dtype).eval()
    ours, peft = providers(model, geometry.config())
    work = Work.random(geometry.vocabulary, geometry.T, geometry.rows)
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: ours.update(work), "peft": lambda: peft.update(work),
        "kept": lambda: peft.update(work, kept=True), "floor": lambda: ours.floor(work),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            taken = _milliseconds(run, device)
            if turn:  # the first one compiles and fills caches
                times[name].append(taken)
    row: Row = {f"{name}_ms_p50": statistics.median(taken) for name, taken in times.items()}
    for name in ("peft", "kept", "floor"):
        row[f"ratio_vs_{name}"] = statistics.median(a / b for a, b in zip(times["ours"], times[name], strict=True))
    waits: list[float] = []
    for _ in range(3):
        last = time.perf_counter()

        def on_unit(unit: str) -> None:
            nonlocal last
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waits.append(1e3 * (time.perf_counter() - last))
            last = time.perf_counter()

        ours.update(work, on_unit)
    row["yield_ms_p99"] = percentile(waits, 99)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return row | {"T": geometry.T, "L": geometry.L, "rows": geometry.rows, "parameters": parameters,
                  "turns": turns, "choice": str(ours.updater.preflight.plan(geometry.T, geometry.rows))}


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def bench_update(
    device: Annotated[str, typer.Option(help="cuda or cpu; by default the GPU where there is one")] = "",
    layers: Annotated[int | None, typer.Option(min=1, help="L; by default 8 on a CPU, 32 on a GPU")] = None,
    width: Annotated[int | None, typer.Option(min=64, help="d; by default 512, and 2048")] = None,
    vocabulary: Annotated[int, typer.Option(min=100)] = 32000,
    tokens: Annotated[int | None, typer.Option(min=2, max=2048, help="T; by default 256, and 1024")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="supervised tokens; by default 16, and T/2")] = None,
    turns: Annotated[int, typer.Option(min=1, help="of all ways")] = 15,
    sweep: Annotated[list[str] | None, typer.Option(
        help="one of T, L, or none; repeat for more, by default all")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for update.csv and update.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Time of a whole update beside PEFT, autograd, AdamW and projection, and beside the model's own passes."""
    on = device_named(device)
    base = Geometry() if on.type == "cpu" else LARGE
    base = replace(base, vocabulary=vocabulary, L=layers or base.L)
    if width is not None:
        if width % 64:
            fail(f"--width is {width}: use a multiple of 64, the width of an attention head", 2)
        base = replace(base, width=width)
    if tokens is not None:
        base = replace(base, T=tokens, rows=min(base.rows, tokens - 1))
    base = replace(base, rows=rows or base.rows)
    if base.rows >= base.T:
        fail(f"--rows is {base.rows}: at most {base.T - 1} of {base.T} tokens can be supervised", 2)
    names = chosen("--sweep", sweep, ["T", "L"])
    prepare(out)
    if on.type == "cpu":
        Console(stderr=True).print("this is a CPU: times say nothing of a GPU", highlight=False)
    cases = [("base", base), ("all supervised", replace(base, rows=base.T - 1))]
    if "T" in names:
        cases += [("T", replace(base, T=T, rows=min(base.rows, T - 1))) for T in (base.T // 4, base.T // 2, base.T)]
    if "L" in names:
        cases += [("L", replace(base, L=L)) for L in sorted({max(1, base.L // 4), max(1, base.L // 2), base.L})]

    def measure() -> dict[str, Any]:
        told = each(cases, lambda case: f"T {case[1].T}, L {case[1].L}, {case[1].rows} supervised")
        found = [{"sweep": name, **time_update(geometry, on, turns)} for name, geometry in told]
        lean, resident = (measure_update(base.architecture(), base.config(mode), tokens=base.T, rows=base.rows)
                          for mode in get_args(LearningState))
        card = on.type if on.type == "cpu" else torch.cuda.get_device_name(on)
        # bytes are those of a GPU: with the model on a CPU everything is host RAM
        return {**fields(lean, resident), **{k: v for k, v in found[0].items() if k != "sweep"}, "device": card,
                "threads": torch.get_num_threads(), "rows": found}

    values = measured(measure)
    typer.echo("\n".join(table(values["rows"], [
        "sweep", "L", "T", "rows", "ours_ms_p50", "peft_ms_p50", "kept_ms_p50", "floor_ms_p50", "ratio_vs_peft",
        "ratio_vs_kept", "ratio_vs_floor", "choice",
    ])), err=as_json)  # fmt: skip
    write(values, "update", PICTURES, out, as_json=as_json)
