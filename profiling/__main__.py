"""`python -m ogpstream.profiling ...`: the demo and the benchmarks without an installed command."""

import typer

from ogpstream.learner.threads import spin_briefly
from ogpstream.profiling.bench import register as register_bench
from ogpstream.profiling.demo import register as register_demo

app = typer.Typer(no_args_is_help=True, add_completion=False)
register_demo(app)
register_bench(app)

if __name__ == "__main__":
    spin_briefly()
    app()
