"""`ogpstream demo`: a language model learns a stream of corrections one by one, and keeps what it knew.

A base model is made on the spot (or given), and the same stream runs through three learners that make the same number
of gradient evaluations: ours, replay alone and plain sequential LoRA. Ours is killed half-way and goes on from disk;
a second one that is not killed must end in the same state.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from ogpstream.learner import LearnerConfig, OgpStreamError
from ogpstream.profiling.demo_model import base_model, gather_corpus
from ogpstream.profiling.demo_report import draw, summary, table
from ogpstream.profiling.demo_worker import Job
from ogpstream.profiling.stream_run import Method
from ogpstream.profiling.tasks import demo_tasks

# slots of the ring: a small part of the 600 samples, as for a stream without an end
RING = 32
# updates in the idle phase after each domain, two old samples each
IDLE = 60
# samples between two points of the curve
EVERY = 60
# found for each method by cross-validation on the learning wordings alone: see profiling/README.md
RATES: dict[Method, float] = {"ogp": 4e-3, "replay": 1e-3, "sequential": 5e-4}
# stronger than the default: a base of 2M parameters uses every direction it has
BASE_ANCHOR = 3e-2
HELD_OUT = 96


class WorkerFailed(OgpStreamError):
    """A worker ended without a result; the message holds the end of what it said."""


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command("demo")(demo)


def demo(
    model: Annotated[str | None, typer.Option(help="a model of yours, path or hub id; by default one is made")] = None,
    out: Annotated[Path, typer.Option(help="folder for the picture, the adapter and the result")] = Path("demo-out"),
    cache: Annotated[Path | None, typer.Option(help="where the made base model is kept")] = None,
    seed: Annotated[int, typer.Option(help="order of the stream")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Learn 600 corrections in five domains one by one beside replay and sequential LoRA, survive a kill."""
    console = Console(stderr=True)
    # the bars of loading and saving a small model say nothing
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        console.print(f"ogpstream: {out} cannot be written ({error.strerror}): choose another folder with --out")
        raise typer.Exit(1) from None
    try:
        values = run_demo(model, out, cache or default_cache(), seed, console)
    except OgpStreamError as error:
        console.print(f"ogpstream: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    values["seconds"] = time.perf_counter() - started
    (out / "demo.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    Console(stderr=as_json).print(table(values))
    console.print(f"picture {out / 'accuracy.png'}, adapter {out / 'adapter'}, {values['seconds']:.0f} s in all",
                  highlight=False)
    if as_json:
        typer.echo(json.dumps(values))


def _cores() -> int:
    """Those that this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_cache() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ogpstream"


def run_demo(model: str | None, out: Path, cache: Path, seed: int, console: Console) -> dict[str, Any]:
    """All learners; the values of `demo --json`, with the curve in `points`."""
    values: dict[str, Any] = {}
    calibration = None
    if model is None:
        made, tokenizer, base = base_model(cache, progress=console)
        model = str(out / "base")
        made.save_pretrained(model)
        tokenizer.save_pretrained(model)
        calibration, held_out = base.calibration, base.held_out
        values |= {"base_parameters": base.parameters, "base_text_bytes": base.text_bytes,
                   "base_perplexity": base.perplexity, "trigram_perplexity": base.trigram_perplexity}
        console.print(f"base model: {base.parameters / 1e6:.1f}M parameters, held-out perplexity "
                      f"{base.perplexity:.1f} (trigram model: {base.trigram_perplexity:.1f})", highlight=False)
    else:
        held_out = gather_corpus(HELD_OUT).held_out
    config = LearnerConfig(ring_samples=RING, base_anchor=BASE_ANCHOR, seed=seed)
    threads = max(1, _cores() // 2)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def job(name: str, method: Method, *, saved: bool = False, scored: bool = True, adapter: Path | None = None) -> Job:
        return Job(
            model, method, config.to_dict(), RATES[method], IDLE, EVERY if scored else None, threads, None,
            str(work / f"{name}.progress.json"), str(work / f"{name}.json"),
            str(work / f"{name}.state") if saved else None, calibration, held_out,
            None if adapter is None else str(adapter),
        )

    jobs = {
        "ours": job("ours", "ogp", saved=True, adapter=out / "adapter"),
        "ours, not killed": job("steady", "ogp", saved=True, scored=False),
        "replay alone": job("replay", "replay"),
        "sequential LoRA": job("sequential", "sequential"),
    }
    samples = sum(len(task.learn) for task in demo_tasks(seed))
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(2) as pool:
        bars = {name: progress.add_task(name, total=samples) for name in jobs}
        running = {
            name: pool.submit(_run, one, lambda n, bar=bars[name]: progress.update(bar, completed=n),
                              samples // 2 if name == "ours" else None)
            for name, one in jobs.items()
        }
        results = {name: future.result() for name, future in running.items()}
    values |= summary(results["ours"], results["ours, not killed"], results["replay alone"],
                      results["sequential LoRA"])
    draw(values, out / "accuracy.png")
    shutil.rmtree(work)
    return values


def _run(job: Job, show: Any, kill_at: int | None) -> dict[str, Any]:
    """One worker to its result; with `kill_at` its process gets SIGKILL there once, and another one goes on."""
    description = Path(job.result).with_suffix(".job")
    description.write_text(json.dumps(asdict(job)), "utf-8")
    log = Path(job.result).with_suffix(".log")
    progress = Path(job.progress)
    while True:
        with open(log, "ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "ogpstream.profiling.demo_worker", str(description)],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )
        killed = False
        while process.poll() is None:
            time.sleep(0.05)
            learned = json.loads(progress.read_text("utf-8"))["learned"] if progress.exists() else 0
            show(learned)
            if kill_at is not None and learned >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed, kill_at = True, None
        if not killed:
            break
    if process.returncode != 0 or not Path(job.result).exists():
        said = log.read_text("utf-8", errors="replace").strip().splitlines()
        raise WorkerFailed(f"the {job.method} learner failed: {said[-1] if said else 'no message'} (see {log})")
    values: dict[str, Any] = json.loads(Path(job.result).read_text("utf-8"))
    show(values["updates"])
    return values
