"""One learner of the demo in a process of its own: it can be killed and started again with the same job.

The job names the model, the method and the files; progress is written to one of them after every few samples, whole
or not at all, and the scores when the stream has ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ogpstream.learner import LearnerConfig, RetentionProbe, StreamLearner
from ogpstream.learner.certificate import DriftMeter
from ogpstream.learner.pretrained import load_pretrained
from ogpstream.profiling.methods import learner_student, method_config
from ogpstream.profiling.stream_run import StreamRun, evaluate, run_stream
from ogpstream.profiling.tasks import demo_tasks

# samples between two looks at the guarantee and between two writings of the progress
LOOK = 50
WRITE = 5


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        model: folder or hub id.
        method: one that the learner itself runs: ogp, replay1 or sequential.
        config: the learner's settings as JSON values, before the method changes them.
        samples: of each domain, the first ones of its order; None takes all.
        domains: the first ones; None takes all.
        digest_after: so many domains and their idle phases, the digest of the state is taken.
        state_dir: journal and snapshots; None keeps the state in memory.
        calibration: texts for the warm start; None for the model's own samples.
        held_out: texts that retention is measured on.
        adapter: folder for the PEFT export of all experts, or None.
        scored: before the stream and after each domain; else it only learns.
    """

    model: str
    method: str
    config: dict[str, Any]
    lr: float
    idle: int
    scored: bool
    threads: int
    samples: int | None
    domains: int | None
    digest_after: int
    progress: str
    result: str
    state_dir: str | None
    calibration: Sequence[str] | None
    held_out: Sequence[str]
    adapter: str | None


def run_job(job: Job, log: Path) -> None:
    """`work` as the whole of a process, whose output goes to a file."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(job)


def work(job: Job) -> None:
    """Run the job to its end, from where an earlier process left it."""
    torch.set_num_threads(job.threads)
    model, tokenizer = load_pretrained(job.model)
    equal = LearnerConfig.from_dict(job.config)
    tasks = [replace(task, learn=task.learn[: job.samples]) for task in demo_tasks(equal.seed)[: job.domains]]
    run = StreamRun()
    if job.state_dir is not None and Path(job.progress).exists():
        run = StreamRun(**json.loads(Path(job.progress).read_text("utf-8")))
        learner = StreamLearner.load_state(job.state_dir, model, tokenizer)
    else:
        learner = StreamLearner(model, tokenizer, method_config(job.method, equal, lr=job.lr),
                                state_dir=job.state_dir, calibration=job.calibration)
    before: list[float] = []
    if job.scored:
        texts = tokenizer(list(job.held_out), truncation=True, max_length=learner.max_tokens)["input_ids"]
        probe = RetentionProbe(learner.attachment, texts)
        with learner.attachment.binding.using(None):
            before = evaluate(learner, tasks)
    meter = DriftMeter(learner.state.protection, learner.state.store)
    compared = sum(len(task.learn) for task in tasks[: job.digest_after])
    # in a file of its own, since the process may be killed after that
    digest = Path(f"{job.progress}.digest")

    parent = multiprocessing.parent_process()

    def tell(run: StreamRun) -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit("the demo is gone")
        # once: a worker that goes on from before passes it again, and what it knows by then may be of later samples
        if run.learned == compared and len(run.rows) == job.digest_after and not digest.exists():
            _write(digest, learner.state_sha256())
        if run.learned % LOOK == 0:
            meter.mark()
        if run.learned % WRITE == 0:
            _write(job.progress, asdict(run))

    _write(job.progress, asdict(run))
    run = run_stream(learner_student(learner, job.method, equal), tasks, idle=job.idle, score=job.scored, run=run,
                     on_progress=tell)
    drift = meter.drift()
    retention = probe.measure() if job.scored else None
    everywhere = probe.measure(everywhere=True) if job.scored else None
    if job.adapter is not None:
        learner.export_experts(job.adapter, replace=True)
    _write(job.result, {
        "tasks": [task.name for task in tasks], "before": before, "rows": run.rows, "points": run.points,
        "updates": run.learned, "update_ms_p50": run.update_ms_p50, "grad_evals": learner.state.counters.gradients,
        "state_bytes": learner.state_bytes(),
        "base_retention": retention and retention.crs, "ppl_ratio": retention and retention.ppl_ratio,
        "base_retention_everywhere": everywhere and everywhere.crs,
        "guarantee_drift": drift.guarantee, "held_drift": drift.held, "state_sha256": learner.state_sha256(),
        "digest": json.loads(digest.read_text("utf-8")),
        "basis_columns": learner.state.protection.columns, "version": learner.version,
    })
    learner.close()


def _write(path: str | Path, values: Any) -> None:
    temporary = f"{path}.new"
    Path(temporary).write_text(json.dumps(values), "utf-8")
    os.replace(temporary, path)
