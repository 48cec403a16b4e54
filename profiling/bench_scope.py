"""`ogpstream bench scope`: which prompts an expert answers, and which it leaves to the base model.

It takes a minute, since nothing is trained: the scope goes by the ids of prompts and their embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ogpstream.learner import OgpStreamError
from ogpstream.profiling.bench_report import fail, table

SHOWN = ("learned", "prompts", "own", "own_answered", "others", "texts", "strangers")


def bench_scope(
    model: Annotated[str, typer.Option(help="path or hub id of the base model")],
    tasks: Annotated[Path | None, typer.Option(help="folder of tasks; without one the demo's corrections")] = None,
    stream: Annotated[str, typer.Option(help="a stream of the folder, or task names with commas")] = "",
    texts: Annotated[Path | None, typer.Option(help="text file, one running text a line")] = None,
    learned: Annotated[int, typer.Option(min=1, help="prompts of each task that are learned")] = 300,
    facts: Annotated[list[int] | None, typer.Option(min=1, max=1400, help="single facts that are learned; repeat for "
                                                    "more; 5, 100 and 1000 by default")] = None,
    seed: Annotated[int, typer.Option(help="of the tasks' order and the facts")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Shares of prompts in the scope: of learned tasks, of others, of texts; other wordings of facts, and others."""
    # here, because they take seconds, and --help needs none of them
    from ogpstream.learner.description import Describer
    from ogpstream.learner.pretrained import load_pretrained
    from ogpstream.profiling.scope_shares import ASKED, of_facts, of_tasks
    from ogpstream.profiling.tasks import demo_tasks, folder_tasks

    try:
        loaded, tokenizer = load_pretrained(model)
        chosen = demo_tasks(seed) if tasks is None else folder_tasks(tasks, stream, seed=seed)
        lines = [] if texts is None else [line for line in texts.read_text("utf-8").splitlines() if line.strip()]
        describe = Describer(loaded.get_input_embeddings())
        rows = [*of_tasks(tokenizer, describe, chosen, lines[:ASKED], learned),
                *of_facts(tokenizer, describe, facts or [5, 100, 1000], seed)]
    except OSError as error:
        fail(f"{error.filename} cannot be read ({error.strerror})", 1)
    except UnicodeDecodeError as error:
        fail(f"--texts is not UTF-8 ({error}): save it as UTF-8 text, one a line", 2)
    except OgpStreamError as error:
        fail(str(error), error.exit_status)
    console = Console(stderr=as_json)
    for line in table(rows, SHOWN):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
