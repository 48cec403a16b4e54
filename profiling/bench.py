"""`ogpstream bench ...`: measured evidence, one command each."""

import typer

from ogpstream.profiling.bench_forgetting import bench_forgetting
from ogpstream.profiling.bench_kernels import bench_kernels
from ogpstream.profiling.bench_update import bench_update
from ogpstream.profiling.bench_vram import bench_vram


def register(app: typer.Typer) -> None:
    """Add the benchmarks to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure: kernels, updates, memory, forgetting.")
    group.command("forgetting")(bench_forgetting)
    group.command("kernels")(bench_kernels)
    group.command("update")(bench_update)
    group.command("vram")(bench_vram)
    app.add_typer(group, name="bench")
