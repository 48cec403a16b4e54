"""One row of `ogpstream bench forgetting`: a fresh model, one method, one pass over one stream, all scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ogpstream.learner import ConfigError, LearnerConfig, RetentionProbe
from ogpstream.learner.binding import Binding
from ogpstream.learner.pretrained import load_pretrained
from ogpstream.learner.sites import AdaptedLinear, Attachment
from ogpstream.profiling.baselines.joint import EPOCHS, Joint
from ogpstream.profiling.evaluate import AccuracyMatrix
from ogpstream.profiling.methods import OURS, PLAIN, baseline_class, method_config, student
from ogpstream.profiling.row_store import Keyed
from ogpstream.profiling.stream_run import evaluate, run_stream
from ogpstream.profiling.student import LearnerStudent, Student
from ogpstream.profiling.tasks import Task, demo_tasks, folder_tasks, split_tail

# ids that a held-out text is cut to
TEXT_TOKENS = 120

# (samples or epochs done, of how many)
Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Job(Keyed):
    """What one row is of; all values are JSON values, so that a process of its own can compute it.

    Attributes:
        stream: a stream of the folder `tasks`, or where that is None "demo", the embedded corrections; ":reversed"
            behind it runs the tasks backwards.
        config: of the learner, as `LearnerConfig.to_dict` has it, with ring and seed.
        lr, strength: of the method; None is its default.
        tuned_on: the stream that these were found on, or None.
        idle: updates of an idle phase; idle_every: samples between two of these, None for one after each task.
        limit: samples of each task, the first ones.
        tune: learning samples of each task that are held back and scored in place of the test items; 0 tests.
        texts: held-out texts for retention; calibration: texts for the warm start, None for the model's own samples.
    """

    method: str
    model: str
    tasks: str | None
    stream: str
    config: dict[str, Any]
    lr: float | None = None
    strength: float | None = None
    tuned_on: str | None = None
    idle: int = 100
    idle_every: int | None = None
    limit: int | None = None
    tune: int = 0
    every: int | None = None
    texts: Sequence[str] = field(default=(), repr=False)
    calibration: Sequence[str] | None = field(default=None, repr=False)
    threads: int | None = None

    def order(self) -> list[Task]:
        """The tasks in the order of the stream."""
        if self.tasks is None:
            name, _, backwards = self.stream.partition(":")
            if name != "demo" or backwards not in ("", "reversed"):
                raise ConfigError(f"no stream {self.stream!r} without --tasks: there are demo and demo:reversed")
            tasks = [replace(task, learn=task.learn[: self.limit]) for task in demo_tasks(self.seed)]
            tasks = tasks[::-1] if backwards else tasks
        else:
            tasks = folder_tasks(Path(self.tasks), self.stream, seed=self.seed, limit=self.limit)
        return split_tail(tasks, self.tune) if self.tune else tasks

    def check(self) -> None:
        """What would fail only after the pass has begun.

        Raises:
            ConfigError: a setting is out of range, or does not go with the method.
        """
        method_config(self.method, LearnerConfig.from_dict(self.config), lr=self.lr)
        if self.method in OURS or self.method in PLAIN:
            return
        if self.idle_every is not None and baseline_class(self.method).boundaries:
            raise ConfigError(f"{self.method} takes the idle phase for the end of a task: leave --idle-every out")
        if self.method == "ewc" and not self.idle:
            raise ConfigError("ewc measures its Fisher information in idle phases: give --idle 1 or more")


@dataclass(frozen=True)
class _Bare:
    """What a `RetentionProbe` asks of an attachment, for a model that carries no adapters yet."""

    model: Any
    binding: Binding


def run_row(job: Job, on_progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """The scores of one job.

    Raises:
        OgpStreamError: model, stream or settings do not fit.
    """
    started = time.perf_counter()
    if job.threads:
        torch.set_num_threads(job.threads)
    config = LearnerConfig.from_dict(job.config)
    own = method_config(job.method, config, lr=job.lr)
    tasks = job.order()
    model, tokenizer = load_pretrained(job.model)
    probe = None
    if job.texts:
        ids = [row[:TEXT_TOKENS] for row in tokenizer(list(job.texts), verbose=False)["input_ids"]]
        probe = RetentionProbe(cast(Attachment, _Bare(model, Binding())), ids)
    scores = _joint if job.method == "joint" else _stream
    row = scores(job, model, tokenizer, config, tasks, on_progress)
    if probe is not None:
        # the perplexity of a run that diverged may be beyond any float
        with suppress(OverflowError):
            # the adapters are there by now; of another method's changes all texts are in scope
            linears = (module for module in model.modules() if isinstance(module, AdaptedLinear))
            binding = next((linear.binding for linear in linears), Binding())
            probe.attachment = cast(Attachment, _Bare(model, binding))
            retention = probe.measure()
            row |= {"crs": retention.crs, "ppl_ratio": retention.ppl_ratio,
                    "crs_everywhere": probe.measure(everywhere=True).crs}
    # and JSON has no word for what is not finite
    row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
           for name, value in row.items()}
    return {
        "method": job.method, "stream": job.stream, "seed": job.seed, "ring": config.ring_samples,
        **dict.fromkeys(("acc", "la", "bwt", "crs", "ppl_ratio", "crs_everywhere", "stickiness", "prequential_loss",
                         "coverage")), **row,
        "lr": own.lr, "lr_ratio": own.loraplus_lr_ratio, "tuned_on": job.tuned_on, "idle": job.idle,
        "idle_every": job.idle_every, "limit": job.limit, "tune": job.tune,
        "samples": sum(len(task.learn) for task in tasks),
        "tasks": [task.name for task in tasks], "torch": torch.__version__, "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started, "settings": job.settings,
    }


def _stream(job: Job, model: Any, tokenizer: Any, config: LearnerConfig, tasks: list[Task], on_progress: Progress
            ) -> dict[str, Any]:
    learner = student(job.method, model, tokenizer, config, lr=job.lr, strength=job.strength,
                      calibration=job.calibration)
    total = sum(len(task.learn) for task in tasks)
    run = run_stream(learner, tasks, idle=job.idle, idle_every=job.idle_every, every=job.every, ask=True,
                     on_progress=lambda run: on_progress(run.learned, total))
    matrix = AccuracyMatrix([task.name for task in tasks])
    for accuracies in run.rows:
        matrix.add(accuracies)
    row = {
        "acc": matrix.acc, "la": matrix.la, "bwt": matrix.bwt, "stickiness": float(np.mean(run.stuck)),
        "prequential_loss": float(np.mean(run.losses)), "coverage": 0.0, "update_ms_p50": run.update_ms_p50,
        "accuracies": run.rows, "points": run.points, **_cost(learner),
    }
    if isinstance(learner, LearnerStudent):
        state = learner.learner.state
        row |= {"coverage": learner.coverage(), "basis_columns": state.protection.columns,
                "held_discarded": max(max(state.store.expert(name).discarded) for name in state.store.names),
                "experts": len(state.store.names)}
    return row


def _joint(job: Job, model: Any, tokenizer: Any, config: LearnerConfig, tasks: list[Task], on_progress: Progress
           ) -> dict[str, Any]:
    """The same scores without a stream: its accuracies are those at the end."""
    joint = Joint(model, tokenizer, method_config("joint", config, lr=job.lr))
    started = time.perf_counter()
    epochs, converged = joint.train_all([sample for task in tasks for sample in task.learn],
                                        on_epoch=lambda epoch, loss: on_progress(epoch, EPOCHS))
    milliseconds = 1e3 * (time.perf_counter() - started)
    final = evaluate(joint, tasks)
    return {"acc": float(np.mean(final)), "update_ms_p50": milliseconds / joint.gradients,
            "accuracies": [final], "points": [], "epochs": epochs, "converged": converged, **_cost(joint)}


def _cost(learner: Student | Joint) -> dict[str, Any]:
    return {"grad_evals": learner.gradients, "state_bytes": learner.state_bytes(), "boundaries": learner.boundaries,
            "strength": getattr(learner, "strength", None)}
