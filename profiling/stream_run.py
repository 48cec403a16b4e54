"""One pass over a stream of tasks, sample by sample, scored as it goes; it continues where a killed run stopped."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np

from ogpstream.profiling.evaluate import accuracy, rank_labels
from ogpstream.profiling.student import Student
from ogpstream.profiling.tasks import Task


class _Served(Protocol):
    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass
class StreamRun:
    """Progress of one pass: plain values, so that it can be written down and taken up again.

    Attributes:
        rows: accuracy on each task after each finished task.
        points: (samples learned, mean accuracy over all tasks) along the stream.
        update_ms: wall time of each new sample's update with what it rehearses.
        losses: of each new sample before its update.
        stuck: whether each new sample was answered right directly after its update.
    """

    learned: int = 0
    rows: list[list[float]] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stuck: list[bool] = field(default_factory=list)

    @property
    def update_ms_p50(self) -> float:
        return float(np.median(self.update_ms)) if self.update_ms else 0.0


def evaluate(served: _Served, tasks: Sequence[Task]) -> list[float]:
    """Accuracy on the test items of each task."""
    prompts = [prompt for task in tasks for prompt in task.prompts]
    labels = [task.labels for task in tasks for _ in task.prompts]
    # prompts of all tasks together: five times as many of equal length share a forward
    chosen = iter(rank_labels(served.model, served.tokenizer, prompts, labels))
    return [accuracy(list(islice(chosen, len(task.prompts))), task.answers) for task in tasks]


def run_stream(
    student: Student,
    tasks: Sequence[Task],
    *,
    idle: int,
    idle_every: int | None = None,
    every: int | None = None,
    score: bool = True,
    ask: bool = False,
    run: StreamRun | None = None,
    on_progress: Callable[[StreamRun], Any] = lambda run: None,
) -> StreamRun:
    """Learn all samples of the tasks once, in order.

    Args:
        idle: updates of the idle phase after each task; with `idle_every` after so many samples each, wherever tasks
            end, and after the last one.
        every: samples between points of the accuracy over the stream, inside tasks; None takes none. The end of a task
            is one too, after its idle phase.
        score: take the accuracies after each task.
        ask: rank the labels for each sample after its own update; not timed.
        run: of an earlier call on the same state, to go on from.
        on_progress: called after every sample.
    """
    run = run or StreamRun()
    # samples before each idle phase
    ends = list(accumulate(len(task.learn) for task in tasks))
    phases = ends if idle_every is None else [*range(idle_every, ends[-1], idle_every), ends[-1]]

    # a run that was killed in its idle phase has finished it while loading
    rested = max(student.rests, bisect_left(phases, run.learned))

    def rest() -> None:
        nonlocal rested
        if rested < bisect_right(phases, run.learned):
            student.rest(idle)
            rested += 1

    offset = 0
    for number, task in enumerate(tasks):
        for at, sample in enumerate(task.learn, offset):
            if at < run.learned:
                continue
            rest()
            started = time.perf_counter()
            loss = student.learn(sample)
            if loss is not None:
                run.update_ms.append((time.perf_counter() - started) * 1e3)
                run.losses.append(loss)
                if ask:
                    (answer,) = rank_labels(student.model, student.tokenizer, [str(sample.prompt)], [task.labels])
                    run.stuck.append(answer == str(sample.completion).strip())
            run.learned = at + 1
            if every and run.learned % every == 0 and sample is not task.learn[-1]:
                run.points.append((run.learned, float(np.mean(evaluate(student, tasks)))))
            on_progress(run)
        offset += len(task.learn)
        if len(run.rows) > number:
            continue
        rest()
        run.rows.append(evaluate(student, tasks) if score else [])
        if score:
            run.points.append((run.learned, float(np.mean(run.rows[-1]))))
        on_progress(run)
    return run
