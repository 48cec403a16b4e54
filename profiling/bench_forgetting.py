"""`ogpstream bench forgetting`: one pass of single samples over a stream of tasks, ours beside replay and sequential.

All methods see the same samples in the same order and make the same number of gradient evaluations.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from ogpstream.learner import LearnerConfig, RetentionProbe, StreamLearner
from ogpstream.learner.pretrained import load_pretrained
from ogpstream.profiling.evaluate import AccuracyMatrix
from ogpstream.profiling.stream_run import Method, method_config, run_stream
from ogpstream.profiling.tasks import Task, demo_tasks, folder_tasks, split_tail

# texts of at least this many characters, cut to this many tokens, as the retention set of a text file
TEXT_CHARS, TEXT_TOKENS, TEXTS = 80, 120, 64


def run_method(
    method: Method, model_path: str, tasks: list[Task], config: LearnerConfig, *, lr: float | None, idle: int,
    texts: list[str], calibration: list[str] | None, progress: Progress,
) -> dict[str, Any]:
    """One row of the benchmark: a fresh model, one pass, all scores."""
    started = time.perf_counter()
    model, tokenizer = load_pretrained(model_path)
    learner = StreamLearner(model, tokenizer, method_config(method, config, lr=lr), calibration=calibration)
    ids = [row[:TEXT_TOKENS] for row in tokenizer(texts, verbose=False)["input_ids"]]
    probe = RetentionProbe(learner.attachment, ids) if texts else None
    total = sum(len(task.learn) for task in tasks)
    bar = progress.add_task(f"{method}, seed {config.seed}", total=total)
    run = run_stream(learner, tasks, method, idle=idle, equal=config,
                     on_progress=lambda run: progress.update(bar, completed=run.learned))
    matrix = AccuracyMatrix([task.name for task in tasks])
    for row in run.rows:
        matrix.add(row)
    retention = probe.measure() if probe else None
    expert = learner.state.store.expert("default")
    return {
        "method": method, "seed": config.seed, "ring": config.ring_samples, "acc": matrix.acc, "la": matrix.la,
        "bwt": matrix.bwt, "crs": retention.crs if retention else None,
        "ppl_ratio": retention.ppl_ratio if retention else None,
        "grad_evals": learner.state.counters.gradients, "update_ms_p50": run.update_ms_p50,
        "state_bytes": learner.state_bytes(), "basis_columns": learner.state.protection.columns,
        "held_discarded": max(expert.discarded), "seconds": time.perf_counter() - started, "final": run.rows[-1],
    }


def bench_forgetting(
    model: Annotated[str, typer.Option(help="path or hub id of the base model")],
    tasks: Annotated[Path | None, typer.Option(help="folder of tasks; without one the demo's corrections")] = None,
    stream: Annotated[str, typer.Option(help="a stream of the folder, or task names with commas")] = "",
    methods: Annotated[str, typer.Option(help="of ogp, replay, sequential")] = "ogp,replay,sequential",
    ring: Annotated[int, typer.Option(help="slots of the replay ring")] = 128,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 1,
    idle: Annotated[int, typer.Option(help="updates of consolidation after each task")] = 100,
    limit: Annotated[int | None, typer.Option(help="samples of each task")] = None,
    tune: Annotated[int, typer.Option(help="score on this many held-back learning samples of each task")] = 0,
    texts: Annotated[Path | None, typer.Option(help="text file, one held-out text a line, for retention")] = None,
    calibration: Annotated[Path | None, typer.Option(help="text file for the warm start, one text a line; without it "
                                                     "samples of the model's own")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="LearnerConfig field=value, for all methods")] = None,
    lr: Annotated[list[str] | None, typer.Option(help="method=rate")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for forgetting.csv")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    threads: Annotated[int | None, typer.Option(help="of torch")] = None,
) -> None:
    """Accuracy, forgetting and retention over a one-pass stream, beside replay and sequential LoRA."""
    unknown = sorted(set(methods.split(",")) - set(get_args(Method)))
    if unknown:
        raise typer.BadParameter(f"unknown method {', '.join(unknown)}: use {', '.join(get_args(Method))}")
    if threads:
        torch.set_num_threads(threads)
    settings, rates = _values(set_ or [], "--set"), _values(lr or [], "--lr")
    lines = texts.read_text("utf-8").splitlines() if texts else []
    held_out = [line for line in lines if len(line) > TEXT_CHARS][:TEXTS]
    warm = calibration.read_text("utf-8").splitlines() if calibration else None
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for seed in range(seeds):
            order = demo_tasks(seed) if tasks is None else folder_tasks(tasks, stream, seed=seed, limit=limit)
            order = split_tail(order, tune) if tune else order
            config = LearnerConfig.from_dict({"ring_samples": ring, "seed": seed, **settings})
            for method in (m for m in get_args(Method) if m in methods.split(",")):
                row = run_method(method, model, order, config, lr=rates.get(method), idle=idle,
                                 texts=held_out, calibration=warm, progress=progress)
                rows.append({**row, "stream": stream or "demo"})
                typer.echo(_line(rows[-1]), err=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "forgetting.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))


def _values(items: list[str], option: str) -> dict[str, Any]:
    """name=value items; a value that is no JSON is a text."""
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} {item}: write name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _line(row: dict[str, Any]) -> str:
    kept = "" if row["crs"] is None else f"  CRS {row['crs']:.3f}  perplexity x{row['ppl_ratio']:.3f}"
    scores = f"LA {row['la']:.3f}  ACC {row['acc']:.3f}  BWT {row['bwt']:+.3f}"
    cost = f"{row['grad_evals']} gradients  {row['update_ms_p50']:.0f} ms  {row['seconds']:.0f} s"
    return f"{row['method']:<10} seed {row['seed']}  {scores}{kept}  P {row['basis_columns']}  {cost}"
