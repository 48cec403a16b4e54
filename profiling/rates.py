"""Tuning: the grid of each method on one stream, and a file of the winners that runs on other streams read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ogpstream.learner import ConfigError
from ogpstream.profiling.forgetting_row import Job
from ogpstream.profiling.methods import METHODS, grid


@dataclass(frozen=True)
class Rate:
    """What was found for one method, and on which stream; None is the method's default."""

    lr: float | None
    strength: float | None
    tuned_on: str | None
    # of B's rate to A's; None leaves what the configuration says
    ratio: float | None = None

    def apply(self, job: Job) -> Job:
        """A job with these."""
        ratio = {} if self.ratio is None else {"loraplus_lr_ratio": self.ratio}
        return replace(job, lr=self.lr, strength=self.strength, tuned_on=self.tuned_on, config={**job.config, **ratio})


def candidates(job: Job) -> list[Job]:
    """A job with each of the settings that its method is tuned over."""
    return [Rate(lr, strength, None, ratio).apply(job) for lr, ratio, strength in grid(job.method)]


def winners(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method, the setting of the highest mean accuracy over the seeds, and all that were tried.

    Of equal ones the first in the grid wins, which is the smaller rate.
    """
    scores: dict[str, dict[tuple[float, float, float | None], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["method"]][row["lr"], row["lr_ratio"], row["strength"]].append(row["acc"] or 0.0)
    found = {}
    for method, by_setting in scores.items():
        tried: list[dict[str, Any]] = [
            {"lr": lr, "lr_ratio": ratio, "strength": strength, "acc": sum(accs) / len(accs), "seeds": len(accs)}
            for (lr, ratio, strength), accs in by_setting.items()
        ]
        found[method] = {**max(tried, key=lambda one: float(one["acc"])), "tried": tried}
    return found


def write_rates(path: Path, stream: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """The winners on a stream; those of other methods in the file stay."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known |= {method: {**found, "tuned_on": stream} for method, found in winners(rows).items()}
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def read_rates(path: Path) -> dict[str, Rate]:
    """By method, what a file of `write_rates` says.

    Raises:
        ConfigError: it is none.
    """
    try:
        known = json.loads(path.read_text("utf-8"))
        if not isinstance(known, dict):
            raise TypeError("no JSON object")
        unknown = sorted(set(known) - set(METHODS))
        if unknown:
            raise ConfigError(f"{path} has rates of {', '.join(unknown)}: methods are {', '.join(METHODS)}")
        return {method: Rate(float(found["lr"]), found["strength"], found["tuned_on"], float(found["lr_ratio"]))
                for method, found in known.items()}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): make it with --find-rates") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no file of rates ({error}): make it with --find-rates") from None
