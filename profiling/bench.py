"""`ogpstream bench ...`: measured evidence, one command each."""

import typer

from ogpstream.profiling.bench_forgetting import bench_forgetting


def register(app: typer.Typer) -> None:
    """Add the benchmarks to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Measure: learning and forgetting.")
    # typer runs a group of one command without its name unless the group has a callback
    group.callback()(lambda: None)
    group.command("forgetting")(bench_forgetting)
    app.add_typer(group, name="bench")
