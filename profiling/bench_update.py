"""`ogpstream bench update`: milliseconds of a whole update beside PEFT with autograd, and beside the bare model.

The ways take turns, so that what else runs on the machine meets all of them; ratios are medians over the turns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from ogpstream.learner.config import LearningState
from ogpstream.profiling.bench_report import (
    Picture,
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

PICTURES = [Picture(sweep, x, ("ours_ms_p50", "peft_ms_p50", "kept_ms_p50", "floor_ms_p50"), 1.0, "ms")
            for sweep, x in (("T", "T"), ("L", "L"))]  # fmt: skip


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
    # here, because they take seconds, and --help needs none of them
    import torch

    from ogpstream.profiling.update_run import LARGE, Geometry, time_update
    from ogpstream.profiling.vram import measure_update

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
