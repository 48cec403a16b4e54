"""`ogpstream bench forgetting`: one pass of single samples over streams of tasks, ours beside the known methods.

All methods see the same samples in the same order and make the same number of gradient evaluations. Finished rows are
kept in the folder `--out`, and the same command computes only those that are missing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ogpstream.learner import ConfigError, LearnerConfig, OgpStreamError
from ogpstream.profiling.bench_report import assigned, fail, method_rates, prepare
from ogpstream.profiling.methods import METHODS, named_methods, untuned
from ogpstream.profiling.row_store import RowStore

# texts of at least this many characters from a text file, as the retention set
TEXT_CHARS, TEXTS = 80, 64


def bench_forgetting(
    model: Annotated[str, typer.Option(help="path or hub id of the base model")],
    tasks: Annotated[Path | None, typer.Option(help="folder of tasks; without one the demo's corrections")] = None,
    stream: Annotated[list[str] | None, typer.Option(
        help="a stream of the folder, or task names with commas; :reversed behind it runs it backwards; repeat for "
        "more")] = None,
    methods: Annotated[str, typer.Option(help=f"of {', '.join(METHODS)}")] = ",".join(METHODS),
    ring: Annotated[int, typer.Option(min=1, help="slots of the replay ring")] = 128,
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds")] = 3,
    idle: Annotated[int, typer.Option(min=0, help="updates in the idle phase after each task")] = 100,
    idle_every: Annotated[int | None, typer.Option(min=1, help="idle phases after so many samples each, wherever tasks "
                                                   "end")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="samples of each task")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="samples between points of the curve, besides the ends of "
                                              "tasks")] = None,
    tune: Annotated[int, typer.Option(min=0, help="score on this many held-back learning samples of each task")] = 0,
    find_rates: Annotated[Path | None, typer.Option(help="try each method's grid and write the winners here; with "
                                                    "--tune")] = None,
    rates: Annotated[Path | None, typer.Option(help="file of --find-rates with each method's settings")] = None,
    lr: Annotated[list[str] | None, typer.Option(help="method=rate")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="LearnerConfig field=value, for all methods")] = None,
    texts: Annotated[Path | None, typer.Option(help="text file, one held-out text a line, for retention")] = None,
    calibration: Annotated[Path | None, typer.Option(help="text file for the warm start, one text a line; without it "
                                                     "samples of the model's own")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="rows at a time, each in a process of its own")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch, for each row")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for rows, forgetting.csv and pictures")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Accuracy, forgetting and retention over one-pass streams of single samples, beside eleven other methods."""
    # here, because they take seconds, and --help needs none of them
    from ogpstream.profiling.forgetting_report import draw, tables, write_csv
    from ogpstream.profiling.forgetting_row import Job
    from ogpstream.profiling.forgetting_run import compute
    from ogpstream.profiling.rates import Rate, candidates, read_rates, write_rates

    try:
        chosen = named_methods(methods)
        prepare(out)
        known = read_rates(rates) if rates else {}
        for name, rate in method_rates(lr or []).items():
            known[name] = replace(known.get(name, Rate(0.0, untuned(name)[1], None)), lr=rate)
        if find_rates is not None and (tune < 1 or len(stream or []) > 1):
            raise ConfigError("--find-rates needs --tune N and a single --stream: what is tuned on is never tested on")
        if find_rates is not None and find_rates.exists():
            read_rates(find_rates)
        settings = {"ring_samples": ring, **assigned(set_ or [], "--set")}
        if "lr" in settings:
            raise ConfigError("--set lr would be one rate for all methods: give each its own with --lr method=rate")
        held_out = [line for line in (texts.read_text("utf-8").splitlines() if texts else []) if len(line) > TEXT_CHARS]
        if texts and not held_out:
            raise ConfigError(f"{texts} has no line of more than {TEXT_CHARS} characters: retention needs running text")
        plan = [
            Job(method, model, None if tasks is None else str(tasks.resolve()), name,
                LearnerConfig.from_dict({**settings, "seed": seed}).to_dict(), idle=idle, idle_every=idle_every,
                limit=limit, tune=tune, every=every, texts=held_out[:TEXTS],
                calibration=calibration.read_text("utf-8").splitlines() if calibration else None, threads=threads)
            for name in stream or ["demo"] for seed in range(seeds) for method in chosen
        ]
        plan = ([one for job in plan for one in candidates(job)] if find_rates is not None
                else [known.get(job.method, Rate(*untuned(job.method), None)).apply(job) for job in plan])
        if not plan:
            raise ConfigError(f"nothing to try for {', '.join(chosen)}: ours runs with its defaults")
        # a wrong stream or setting is told before the first row is computed
        for job in {(job.stream, job.seed): job for job in plan}.values():
            job.order()
        for job in plan:
            job.check()
        store = RowStore(out)
        compute(plan, store, jobs)
    except OSError as error:
        fail(f"{error.filename} cannot be read or written ({error.strerror})", 1)
    except UnicodeDecodeError as error:
        fail(f"--texts or --calibration is not UTF-8 ({error}): save it as UTF-8 text, one a line", 2)
    except OgpStreamError as error:
        fail(str(error), error.exit_status)
    rows = [row for job in plan if (row := store.find(job.settings)) is not None]
    if find_rates is not None:
        write_rates(find_rates, rows[0]["stream"], rows)
    else:
        for table in tables(rows):
            Console(stderr=as_json, width=180).print(table)
    if out is not None:
        write_csv(out / "forgetting.csv", store.rows())
        if find_rates is None:
            draw(rows, out)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
