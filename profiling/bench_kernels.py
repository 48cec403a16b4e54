"""`ogpstream bench kernels`: every operation of an update, ours beside the best alternatives, against the floor.

First each provider's outputs are compared with float64, then the providers are timed in turn on the same operands.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from ogpstream.learner import ConfigError, OgpStreamError
from ogpstream.profiling.kernel_cases import OPERATIONS, PROVIDER_NAMES, SWEEPS, Operation
from ogpstream.profiling.kernel_report import draw, suggestion_text, table
from ogpstream.profiling.out_folder import open_folder

if TYPE_CHECKING:
    import torch


def bench_kernels(
    device: Annotated[str, typer.Option(help="cuda or cpu; by default the GPU where there is one")] = "",
    ops: Annotated[str, typer.Option(help=f"of {', '.join(OPERATIONS)}; by default all")] = "",
    providers: Annotated[str, typer.Option(help=f"of {', '.join(PROVIDER_NAMES)}; by default all")] = "",
    sweep: Annotated[list[str] | None, typer.Option(
        help=f"one of {', '.join(SWEEPS)}, or none for the base sizes alone; repeat for more, by default all")] = None,
    quick: Annotated[bool, typer.Option(help="small sizes, few samples: whether it works, not how fast it is")] = False,
    graphs: Annotated[bool, typer.Option(help="also replays of a CUDA graph: device time without launch gaps")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for kernels.csv and kernels.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Time, bytes, error and launches of the kernels beside PEFT, cuBLAS by hand and torch.compile."""
    # here, because they take seconds, and --help needs none of them
    from ogpstream.profiling.kernel_run import measure

    console = Console(stderr=True)
    try:
        sweeps = [] if sweep == ["none"] else _chosen("--sweep", sweep or [], SWEEPS)
        chosen_ops = cast(list[Operation], _chosen("--ops", _words(ops), OPERATIONS))
        names = _chosen("--providers", _words(providers), PROVIDER_NAMES)
        if device not in ("", "cpu", "cuda"):
            raise ValueError(f"--device is {device!r}: use cpu or cuda")
    except ValueError as error:
        console.print(f"ogpstream: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    words = ["ogpstream", "bench", "kernels"]
    for option, value in (("--device", device), ("--ops", ops), ("--providers", providers)):
        words += [option, value] if value else []
    for each in sweep or []:
        words += ["--sweep", each]
    words += [option for option, given in (("--quick", quick), ("--graphs", graphs)) if given]
    try:
        on = _device(device)
        if graphs and on.type != "cuda":
            raise ConfigError("--graphs replays CUDA graphs: leave it out on a CPU")
        if out is not None:
            open_folder(out, "kernels.csv")
        values, wrong = measure(on, chosen_ops, sweeps, names, shlex.join(words), out, console,
                                quick=quick, graphs=graphs)
    except OgpStreamError as error:
        console.print(f"ogpstream: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_status) from None
    typer.echo("\n".join(table(values["rows"])), err=as_json)
    for line in (*suggestion_text(values["suggestion"], values["capability"]), *wrong):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        draw(values, out / "kernels.png")
        console.print(f"{out / 'kernels.csv'}, {out / 'kernels.png'}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(values))
    if wrong:
        raise typer.Exit(1)


def _words(option: str) -> list[str]:
    return [word.strip() for word in option.split(",") if word.strip()]


def _chosen(option: str, words: list[str], known: Collection[Any]) -> list[str]:
    """What was asked for, in the order of `known`, or all; ValueError for a name that is not known."""
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"{option} {', '.join(unknown)} is unknown: use {', '.join(known)}")
    return [name for name in known if name in words] if words else list(known)


def _device(name: str) -> torch.device:
    """The device of that name, or by default.

    Raises:
        ConfigError: there is none here, or OGPSTREAM_BACKEND names no backend, which the learner would use there.
    """
    import torch

    from ogpstream.kernels import dispatch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: leave --device out, or use --device cpu")
    on = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        on = torch.device("cuda", torch.cuda.current_device())
    try:
        dispatch.backend_for(torch.empty(0, device=on), "lora_forward")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return on
