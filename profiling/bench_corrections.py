"""`ogpstream bench corrections`: facts are told once, one after the other; what sticks, what lasts, what else changes.

Finished rows are kept in the folder `--out`, and the same command computes only those that are missing.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ogpstream.learner import ConfigError, LearnerConfig, OgpStreamError
from ogpstream.profiling.bench_report import assigned, fail, method_rates, prepare, table
from ogpstream.profiling.methods import METHODS, method_config, named_methods
from ogpstream.profiling.row_store import RowStore

SHOWN = ("method", "seed", "facts", "stickiness", "stickiness_end", "stickiness_aged", "paraphrase", "neighbours",
         "strangers", "amended", "grad_evals", "update_ms_p50", "state_bytes")


def bench_corrections(
    model: Annotated[str, typer.Option(help="path or hub id of the base model")],
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = "ogp,replay1,sequential,joint",
    facts: Annotated[int, typer.Option(min=1, max=1500, help="told, each once")] = 1000,
    amends: Annotated[int, typer.Option(min=0, help="of them that are told again with another answer")] = 100,
    neighbours: Annotated[int, typer.Option(min=1, max=200, help="questions of each of two kinds that are never told")
                          ] = 200,
    ring: Annotated[int, typer.Option(min=1, help="slots of the replay ring")] = 4096,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds")] = 1,
    idle: Annotated[int, typer.Option(min=0, help="updates of an idle phase after every 100 facts and the last")] = 100,
    refresh: Annotated[bool, typer.Option("--refresh", help="ours and replay1 rest until they know all they have kept")
                       ] = False,
    lr: Annotated[list[str] | None, typer.Option(help="method=rate")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="LearnerConfig field=value, for all methods")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for rows and corrections.csv")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """What sticks of single corrections, at once, later and in other words, and whether all else stays as it was."""
    # here, because they take seconds, and --help needs none of them
    from ogpstream.profiling.baselines.joint import EPOCHS
    from ogpstream.profiling.corrections_row import Job, run_row
    from ogpstream.profiling.demo_progress import DemoProgress
    from ogpstream.profiling.forgetting_report import write_csv

    try:
        chosen = named_methods(methods)
        prepare(out)
        rates = method_rates(lr or [])
        settings = {"ring_samples": ring, "repeats": 8, **assigned(set_ or [], "--set")}
        if "lr" in settings:
            raise ConfigError("--set lr would be one rate for all methods: give each its own with --lr method=rate")
        if "ewc" in chosen and not idle:
            raise ConfigError("ewc measures its Fisher information in idle phases: give --idle 1 or more")
        plan = [
            Job(method, model, LearnerConfig.from_dict({**settings, "seed": seed}).to_dict(), rates.get(method), facts,
                min(amends, facts), neighbours, idle, threads, refresh)
            for seed in range(seeds) for method in chosen
        ]
        for job in plan:
            method_config(job.method, LearnerConfig.from_dict(job.config), lr=job.lr)
        store = RowStore(out)
        missing = [job for job in plan if store.find(job.settings) is None]
        if found := store.found(job.settings for job in plan):
            Console(stderr=True).print(found, highlight=False)
        totals = {f"{job.method}, seed {job.seed}": EPOCHS if job.method == "joint" else job.facts for job in missing}
        with DemoProgress(Console(stderr=True), totals) as bars:
            for name, job in zip(totals, missing, strict=True):
                store.add(run_row(job, partial(bars.show, name)))
    except OSError as error:
        fail(f"{error.filename} cannot be read or written ({error.strerror})", 1)
    except OgpStreamError as error:
        fail(str(error), error.exit_status)
    rows = [row for job in plan if (row := store.find(job.settings)) is not None]
    console = Console(stderr=as_json)
    for line in table(rows, SHOWN):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_csv(out / "corrections.csv", store.rows())
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
