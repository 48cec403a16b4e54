"""`ogpstream demo`: a language model learns a stream of corrections one by one, and keeps what it knew."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ogpstream.learner.terminal import tell
from ogpstream.profiling.demo_pool import load_libraries


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command("demo")(demo)


def demo(
    model: Annotated[str | None, typer.Option(help="a model of yours, path or hub id, at the rate and base anchor that "
                                              "were found for the one that is made otherwise")] = None,
    out: Annotated[Path, typer.Option(help="folder for the picture, the adapter and the result")] = Path("demo-out"),
    cache: Annotated[Path | None, typer.Option(help="where the made base model is kept")] = None,
    seed: Annotated[int, typer.Option(help="order of the stream")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Learn 600 corrections in five domains one by one beside replay and sequential LoRA, survive a kill."""
    load_libraries()
    # here, because they take seconds, and --help needs none of them
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from ogpstream.learner import OgpStreamError
    from ogpstream.learner.pretrained import check_pretrained
    from ogpstream.profiling.demo_report import table
    from ogpstream.profiling.demo_run import check_folder, run_demo

    console = Console(stderr=True)
    # the bars of loading and saving a small model say nothing
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        if model is not None:
            model, _ = check_pretrained(model)
        check_folder(out)
        values = run_demo(model, out, cache or default_cache(), seed, console)
    except OSError as error:
        tell(f"{error.filename or out} cannot be written ({error.strerror}): choose another folder with --out")
        raise typer.Exit(1) from None
    except OgpStreamError as error:
        tell(str(error))
        raise typer.Exit(error.exit_status) from None
    values["seconds"] = time.perf_counter() - started
    (out / "demo.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    Console(stderr=as_json).print(table(values))
    console.print(f"picture {out / 'accuracy.png'}, adapter {out / 'adapter'}, {values['seconds']:.0f} s in all",
                  highlight=False)
    if as_json:
        typer.echo(json.dumps(values))
    if not values["resumed_exactly"]:
        tell("the learner that was killed did not come back to the state of the other one: this is a fault, report it")
        raise typer.Exit(1)


def default_cache() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ogpstream"
