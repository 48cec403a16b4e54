"""The rows of `bench forgetting` that are missing: one after the other, or side by side in processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ogpstream.profiling.forgetting_report import line
from ogpstream.profiling.forgetting_row import Job, run_row
from ogpstream.profiling.row_store import Row, RowStore


def compute(plan: Sequence[Job], store: RowStore, jobs: int) -> None:
    """The rows that are missing, with a line for each as soon as it is done."""
    missing = list({job.settings: job for job in plan if store.find(job.settings) is None}.values())
    console = Console(stderr=True)
    if found := store.found(job.settings for job in plan):
        console.print(found, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("rows", total=len(missing))
        for row in (_one_by_one(missing, progress) if jobs == 1 else _side_by_side(missing, jobs)):
            store.add(row)
            progress.advance(whole)
            typer.echo(line(row), err=True)


def _one_by_one(missing: Sequence[Job], progress: Progress) -> Iterator[Row]:
    for job in missing:
        bar = progress.add_task(f"{job.method}, {job.stream}, seed {job.seed}", total=None)

        def show(done: int, total: int, bar: Any = bar) -> None:
            progress.update(bar, completed=done, total=total)

        yield run_row(job, show)
        progress.remove_task(bar)


def _side_by_side(missing: Sequence[Job], jobs: int) -> Iterator[Row]:
    # not by fork: torch's threads do not survive it
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_row, job) for job in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
