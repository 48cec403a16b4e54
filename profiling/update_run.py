"""A whole update timed beside PEFT with autograd, and beside the bare model's own passes, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ogpstream.learner import LearnerConfig
from ogpstream.learner.config import LearningState
from ogpstream.profiling.bench_report import Row
from ogpstream.profiling.gpu_timer import percentile
from ogpstream.profiling.update_providers import Work, providers
from ogpstream.profiling.vram import llama_config


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
