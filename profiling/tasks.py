"""Streams of labelled tasks: samples to learn one by one, test items that are scored by ranking the task's labels."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ogpstream.learner import ConfigError, Sample
from ogpstream.profiling import demo_corrections


@dataclass(frozen=True)
class Task:
    """One domain of a stream: `learn` in the order it arrives, test `prompts` with their `answers` among `labels`."""

    name: str
    labels: tuple[str, ...]
    learn: tuple[Sample, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def demo_tasks(seed: int) -> list[Task]:
    """The embedded corrections, domain after domain, shuffled inside."""
    order = list(demo_corrections.stream(seed))
    tasks = []
    for domain in demo_corrections.domains():
        learn = tuple(
            Sample(prompt=c.prompt, completion=c.completion, id=f"{domain}-{number}")
            for number, c in enumerate(c for c in order if c.domain == domain)
        )
        test = demo_corrections.wordings(domain, "test")
        tasks.append(Task(domain, demo_corrections.labels(domain), learn,
                          tuple(c.prompt for c in test), tuple(c.label for c in test)))
    return tasks


def folder_tasks(folder: Path, stream: str, *, seed: int, limit: int | None = None) -> list[Task]:
    """Tasks of a folder with `tasks.json`, `TASK.train.jsonl` and `TASK.test.jsonl`, in the order of a named stream.

    Args:
        stream: a name from `tasks.json`, or task names joined by commas; with ":reversed" behind it backwards.
        seed: shuffles the samples inside a task.
        limit: samples of each task, the first in the file.

    Raises:
        ConfigError: the stream or a file is not there.
    """
    try:
        known = json.loads((folder / "tasks.json").read_text("utf-8"))
        name, _, backwards = stream.partition(":")
        streams = known.get("streams", {})
        if name in streams:
            named = streams[name]
            names = list(named["tasks"] if isinstance(named, dict) else named)
        else:
            names = name.split(",")
        missing = [n for n in names if n not in known["tasks"]]
        if len(set(names)) < len(names):
            raise ConfigError(f"stream {stream!r} has a task twice: samples of equal ids are learned once")
        if missing or backwards not in ("", "reversed"):
            raise ConfigError(f"no stream {stream!r} in {folder}: streams are {', '.join(streams)}, "
                              f"tasks {', '.join(known['tasks'])}")
        return [_read(folder, n, tuple(known["tasks"][n]["labels"]), seed, limit)
                for n in (names[::-1] if backwards else names)]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder} is no folder of tasks: {error}") from error


def _read(folder: Path, name: str, labels: tuple[str, ...], seed: int, limit: int | None) -> Task:
    learn, test = (
        [json.loads(line) for line in (folder / f"{name}.{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    )
    learn = learn[:limit]
    random.Random(seed).shuffle(learn)
    return Task(
        name, labels,
        tuple(Sample(prompt=row["prompt"], completion=row["completion"], id=f"{name}-{n}")
              for n, row in enumerate(learn)),
        tuple(row["prompt"] for row in test), tuple(row["label"] for row in test),
    )


def split_tail(tasks: Sequence[Task], held: int) -> list[Task]:
    """The same tasks with the last `held` learning samples of each as test items: for tuning, away from the test.

    Raises:
        ConfigError: a task has no more than these.
    """
    cut = []
    for task in tasks:
        if len(task.learn) <= held:
            raise ConfigError(f"{task.name} has {len(task.learn)} samples: hold back fewer than that, not {held}")
        tail = task.learn[-held:]
        cut.append(Task(task.name, task.labels, task.learn[:-held], tuple(str(s.prompt) for s in tail),
                        tuple(str(s.completion).strip() for s in tail)))
    return cut
