"""`ogpstream bench ...`: measured evidence, one command each, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

NAMES = ("corrections", "forgetting", "kernels", "scope", "serving", "update", "vram")


class Benchmarks(TyperGroup):
    """The function bench_NAME of the module bench_NAME as the command NAME; their imports take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(NAMES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in NAMES:
            return None
        module = import_module(f"ogpstream.profiling.bench_{cmd_name}")
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(getattr(module, f"bench_{cmd_name}"))
        return typer.main.get_command(alone)


def register(app: typer.Typer) -> None:
    """Add the benchmarks to the command line."""
    group = typer.Typer(cls=Benchmarks, no_args_is_help=True,
                        help="Measure: kernels, updates, memory, serving, forgetting, corrections, scope.")
    # without a callback or a command of its own typer takes it for empty
    group.callback()(lambda: None)
    app.add_typer(group, name="bench")
