"""`ogpstream bench ...`: measured evidence, one command each."""

import typer

from ogpstream.profiling.bench_forgetting import bench_forgetting
from ogpstream.profiling.bench_kernels import bench_kernels


def register(app: typer.Typer) -> None:
    """Add the benchmarks to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure: kernels, learning and forgetting.")
    group.command("forgetting")(bench_forgetting)
    group.command("kernels")(bench_kernels)
    app.add_typer(group, name="bench")
