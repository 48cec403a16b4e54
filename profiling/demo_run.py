"""The run of `ogpstream demo`: a stream of corrections through three learners, each in a process of its own.

A base model is made on the spot (or given), and the same stream runs through three learners that make the same number
of gradient evaluations: ours, replay alone and plain sequential LoRA. Ours is killed half-way and goes on from disk;
a second one that is not killed must be in the same state at the end of the domain in which the first one was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console

from ogpstream.learner import ConfigError, LearnerConfig, OgpStreamError
from ogpstream.profiling.demo_model import base_model, gather_corpus
from ogpstream.profiling.demo_pool import WORKERS, two_at_a_time
from ogpstream.profiling.demo_progress import DemoProgress
from ogpstream.profiling.demo_report import draw, summary
from ogpstream.profiling.demo_worker import Job, run_job
from ogpstream.profiling.out_folder import open_folder
from ogpstream.profiling.tasks import demo_tasks

# slots of the ring: a small part of the 600 samples, as for a stream without an end
RING = 32
# updates in the idle phase after each domain, two old samples each
IDLE = 60
# of A and of B, found for each method by cross-validation on the learning wordings alone, but for replay's of B: twice
# that of A was higher there (.517 for .489) and is lower here (.473 for .513). See profiling/README.md
RATES = {"ogp": (3e-3, 6e-3), "replay1": (1e-3, 1e-3), "sequential": (5e-4, 5e-4)}
# stronger than the default: a base of 1.7M parameters uses every direction it has
BASE_ANCHOR = 3e-2
HELD_OUT = 96


class WorkerFailed(OgpStreamError):
    """A worker ended without a result; the message holds the end of what it said."""


def _cores() -> int:
    """Those that this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_demo(model: str | None, out: Path, cache: Path, seed: int, console: Console) -> dict[str, Any]:
    """All learners; the values of `demo --json`, with the curve in `points`.

    Args:
        out: for `base`, `adapter`, `accuracy.png` and, where a worker fails, its log in a folder of its own.

    Raises:
        OSError: `out` cannot be written.
        WorkerFailed: a learner ended without a result.
    """
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
    sizes = [len(task.learn) for task in demo_tasks(seed)]
    kill_at = sum(sizes) // 2
    # the end of the domain in which the kill falls: what comes after it is equal for equal states
    compared = next(n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= kill_at)
    config = LearnerConfig(ring_samples=RING, base_anchor=BASE_ANCHOR, seed=seed)
    threads = max(1, _cores() // 2)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=out))

    def job(name: str, method: str, *, saved: bool = False, domains: int | None = None,
            adapter: Path | None = None) -> Job:
        rate, of_b = RATES[method]
        settings = replace(config, loraplus_lr_ratio=of_b / rate).to_dict()
        return Job(
            model, method, settings, rate, IDLE, domains is None, threads, None, domains, compared,
            str(work / f"{name}.progress.json"), str(work / f"{name}.json"),
            str(work / f"{name}.state") if saved else None, calibration, held_out,
            None if adapter is None else str(adapter),
        )

    # the longest first, since they run two at a time
    jobs = {
        "ours": job("ours", "ogp", saved=True, adapter=out / "adapter"),
        "sequential LoRA": job("sequential", "sequential"),
        "replay alone": job("replay", "replay1"),
        "ours, not killed": job("steady", "ogp", saved=True, domains=compared),
    }
    totals = {name: sum(sizes[: one.domains]) for name, one in jobs.items()}
    with DemoProgress(console, totals) as progress:
        results = two_at_a_time({
            name: partial(_run, name, one, partial(progress.show, name), kill_at if name == "ours" else None)
            for name, one in jobs.items()
        })
    values |= summary(results["ours"], results["ours, not killed"], results["replay alone"],
                      results["sequential LoRA"])
    draw(values, out / "accuracy.png")
    shutil.rmtree(work)
    return values


def check_folder(out: Path) -> None:
    """Make it, and find what a run would write over that is not the demo's.

    Raises:
        ConfigError: a folder in it holds something else.
        OutFolderError: it cannot be written, or matplotlib is missing.
    """
    # there from the beginning of a run, empty until its end
    if not (out / "demo.json").is_file():
        for path in (out / "base", out / "adapter"):
            if path.exists():
                raise ConfigError(f"{path} is there and not the demo's: choose another folder with --out")
    open_folder(out, "demo.json")


def _run(name: str, job: Job, show: Callable[[int], None], kill_at: int | None, stop: Event) -> dict[str, Any]:
    """One worker to its result; with `kill_at` its process gets SIGKILL there once, and another one goes on.

    Raises:
        WorkerFailed: it ended without a result, or was ended by `stop`.
    """
    log, progress = Path(job.result).with_suffix(".log"), Path(job.progress)
    while True:
        process = WORKERS.Process(target=run_job, args=(job, log), daemon=True)
        process.start()
        killed = False
        while process.is_alive():
            time.sleep(0.05)
            if stop.is_set():
                process.kill()
            learned = json.loads(progress.read_text("utf-8"))["learned"] if progress.exists() else 0
            show(learned)
            if kill_at is not None and learned >= kill_at:
                process.kill()
                process.join()
                killed, kill_at = True, None
        if not killed:
            break
    if process.exitcode != 0 or not Path(job.result).exists():
        said = log.read_text("utf-8", errors="replace").strip().splitlines() if log.exists() else []
        raise WorkerFailed(f"the learner {name!r} failed: {said[-1] if said else 'no message'} (see {log})")
    values: dict[str, Any] = json.loads(Path(job.result).read_text("utf-8"))
    show(values["updates"])
    return values
