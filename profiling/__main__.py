"""`python -m ogpstream.profiling ...`: the demo and the benchmarks without an installed command."""

import typer

from ogpstream.profiling import bench, demo

app = typer.Typer(no_args_is_help=True, add_completion=False)
demo.register(app)
bench.register(app)

if __name__ == "__main__":
    app()
