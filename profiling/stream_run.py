"""One pass of a learner over a stream of tasks, scored as it goes; it continues where a killed run stopped.

The method "ogp" is the learner as it is. "replay" is plain LoRA with the same ring and the same rehearsal, and
"sequential" plain LoRA that spends the same number of gradient evaluations on each new sample alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.profiling.evaluate import accuracy, rank_labels
from ogpstream.profiling.tasks import Task

Method = Literal["ogp", "replay", "sequential"]


def method_config(method: Method, config: LearnerConfig, *, lr: float | None = None) -> LearnerConfig:
    """The configuration of a method, with its own learning rate if given."""
    if method != "ogp":
        config = replace(config, guard="none", warm_start=False, settled_below=0.0, second_look=False)
    if method == "sequential":
        config = replace(config, rehearsals=0, replay_every=0)
    return config if lr is None else replace(config, lr=lr)


@dataclass
class StreamRun:
    """Progress of one pass: plain values, so that it can be written down and taken up again.

    Attributes:
        rows: accuracy on each task after each finished task.
        points: (samples learned, mean accuracy over all tasks) along the stream.
        update_ms: wall time of each new sample's update with what it rehearses.
    """

    learned: int = 0
    rows: list[list[float]] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)

    @property
    def update_ms_p50(self) -> float:
        return float(np.median(self.update_ms)) if self.update_ms else 0.0


def evaluate(learner: StreamLearner, tasks: Sequence[Task]) -> list[float]:
    """Accuracy on the test items of each task."""
    prompts = [prompt for task in tasks for prompt in task.prompts]
    labels = [task.labels for task in tasks for _ in task.prompts]
    # prompts of all tasks together: five times as many of equal length share a forward
    chosen = iter(rank_labels(learner.model, learner.tokenizer, prompts, labels))
    return [accuracy(list(islice(chosen, len(task.prompts))), task.answers) for task in tasks]


def run_stream(
    learner: StreamLearner,
    tasks: Sequence[Task],
    method: Method,
    *,
    idle: int,
    equal: LearnerConfig,
    every: int | None = None,
    score: bool = True,
    run: StreamRun | None = None,
    on_progress: Callable[[StreamRun], Any] = lambda run: None,
) -> StreamRun:
    """Learn all samples of the tasks once, in order.

    Args:
        idle: updates of `consolidate` after each task, as an idle phase would make them.
        equal: the learner's own configuration, whose gradient evaluations the other methods get too.
        every: samples between points of the accuracy over the stream, inside tasks; None takes none. The end of a task
            is one too, after its idle phase.
        score: take the accuracies after each task.
        run: of an earlier call on the same state, to go on from.
        on_progress: called after every sample.
    """
    run = run or StreamRun()
    offset = 0
    for number, task in enumerate(tasks):
        for at, sample in enumerate(task.learn, offset):
            if at < run.learned:
                continue
            started = time.perf_counter()
            if _learn(learner, sample, method, equal):
                run.update_ms.append((time.perf_counter() - started) * 1e3)
            run.learned = at + 1
            if every and run.learned % every == 0 and sample is not task.learn[-1]:
                run.points.append((run.learned, float(np.mean(evaluate(learner, tasks)))))
            on_progress(run)
        offset += len(task.learn)
        if len(run.rows) > number:
            continue
        # a run that was killed in its idle phase has finished it while loading
        if learner.state.counters.consolidations <= number:
            _rest(learner, task, method, idle, equal)
        run.rows.append(evaluate(learner, tasks) if score else [])
        if every and score:
            run.points.append((run.learned, float(np.mean(run.rows[-1]))))
        on_progress(run)
    return run


def _learn(learner: StreamLearner, sample: Sample, method: Method, equal: LearnerConfig) -> bool:
    """False where a run that was killed had learned the sample already."""
    (report,) = learner.learn_batch([sample])
    new = report.status != "skipped"
    if new and method == "sequential":
        for _ in range(equal.rehearsals):
            learner.learn_one(replace(sample, id=None))
    return new


def _rest(learner: StreamLearner, task: Task, method: Method, idle: int, equal: LearnerConfig) -> None:
    if method != "sequential":
        learner.consolidate(idle)
        return
    # the same number of evaluations on what a learner without memory still has: its latest samples
    for number in range(idle * equal.rehearsal_batch):
        learner.learn_one(replace(task.learn[-1 - number % len(task.learn)], id=None))
