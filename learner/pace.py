"""What an update costs in time, and what is left out of it so that it fits a budget.

With L layers of which the top k are trained, and groups of N tokens (samples that share a forward) with n supervised
rows each, an update takes

    (L + again) F(N) + k B(N) + Q(n)    of each group: forward, layers computed again, backward, loss
    S k / L + C                         once: optimizer and projection; publishing, growth of P and the rest

F, B and Q are lines through a few measured points, S and C are measured too. Each of the five has a level, the median
of actual over predicted seconds in the latest updates, so that the prediction follows the machine and what else runs on
it, and one stall does not move it.

What is left out comes in one order, so that a larger budget never leaves out more: first ids from the left of the
prompts, down to `PROMPT`; then layers, from below; then the rest of the prompts. On a pretrained model of 6 layers and
5.5M parameters on a CPU (prompts of 240 ids, completions of 16, 4 updates of each of 24 samples) a sample whose prompt
was cut to 64 ids in its updates had 97 % of the fall in loss that whole updates give, in 44 % of their time; the top 3
layers alone had 76 % in 68 % of the time. Under 64 ids the prompt is worth more than what it costs: with 16 of them
89 % remain, with one 70 %, and more of what is learned is learned for other prompts too (74 % against 68 %).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from ogpstream.learner.errors import ConfigError

# ids of a prompt that are cut only after the layers
PROMPT = 64
# ids between two lengths that are tried above that
STEP = 16
# updates whose median is a level, and how many at the start count as just what was measured
WINDOW, TRUSTED = 9, 2

Term = Literal["forward", "backward", "loss", "step", "rest"]


class Choice(NamedTuple):
    """Ids that stay of each prompt, and top layers that are trained."""

    prompt: int
    layers: int


class Load(NamedTuple):
    """Samples that share a forward: tokens with the padding, supervised rows of each, and layers computed again."""

    tokens: int
    rows: tuple[int, ...]
    again: int


@dataclass(frozen=True)
class Line:
    """Seconds by tokens or rows: straight between measured points (size, seconds), and on beyond the last one.

    Under the first one it is the first one's: there the calls are the cost, and not the numbers.
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, at: int) -> float:
        sizes = [size for size, _ in self.points]
        if at <= sizes[0] or len(sizes) == 1:
            return self.points[0][1] * (1.0 if at <= sizes[0] else at / sizes[0])
        number = min(bisect_left(sizes, at), len(sizes) - 1)
        (x0, y0), (x1, y1) = self.points[number - 1], self.points[number]
        return y0 + max(0.0, y1 - y0) * (at - x0) / (x1 - x0)


class Costs:
    """The terms above for one model, and their levels.

    Args:
        depth: L.
        forward, backward: seconds of one layer by tokens; loss: of a sample by rows.
        step, rest: S and C, seconds.
    """

    def __init__(self, depth: int, forward: Line, backward: Line, loss: Line, step: float, rest: float) -> None:
        self.depth = depth
        self._forward, self._backward, self._loss = forward, backward, loss
        self._step, self._rest = step, rest
        self._ratios: dict[Term, deque[float]] = {}

    def terms(self, loads: Sequence[Load], layers: int) -> dict[Term, float]:
        """Seconds of an update that trains so many layers, by term, before the levels."""
        return {
            "forward": sum((self.depth + load.again) * self._forward(load.tokens) for load in loads),
            "backward": sum(layers * self._backward(load.tokens) for load in loads),
            "loss": sum(self._loss(rows) for load in loads for rows in load.rows),
            "step": self._step * layers / self.depth,
            "rest": self._rest,
        }

    def predict(self, loads: Sequence[Load], layers: int) -> float:
        """Seconds of such an update."""
        return sum(seconds * self.level(term) for term, seconds in self.terms(loads, layers).items())

    def level(self, term: Term) -> float:
        return median([*[1.0] * TRUSTED, *self._ratios.get(term, ())][-WINDOW:])

    def observe(self, loads: Sequence[Load], layers: int, took: Mapping[Term, float]) -> None:
        """Take in an update that was made; terms that are not in `took` were no part of it."""
        for term, predicted in self.terms(loads, layers).items():
            if predicted > 0 and term in took:
                self._ratios.setdefault(term, deque(maxlen=WINDOW)).append(took[term] / predicted)


def choices(prompt: int, depth: int) -> list[Choice]:
    """All choices for prompts of at most `prompt` ids, the one that leaves out nothing first."""
    floor = min(prompt, PROMPT)
    longer = [prompt, *range((prompt - 1) // STEP * STEP, floor, -STEP)]
    found = [Choice(ids, depth) for ids in dict.fromkeys([*longer, floor])]
    found += [Choice(floor, layers) for layers in range(depth - 1, 0, -1)]
    while floor > 1:
        floor = (floor + 1) // 2
        found.append(Choice(floor, 1))
    return found


def choose(prompt: int, depth: int, seconds: Callable[[Choice], float], budget: float) -> tuple[Choice, float]:
    """The first choice within `budget` seconds, and its seconds; where none is, the last one.

    Seconds fall along the choices, so they are bisected: of 100 choices 7 are predicted.
    """
    found = choices(prompt, depth)
    first = bisect_left(found, True, key=lambda choice: seconds(choice) <= budget)
    choice = found[min(first, len(found) - 1)]
    return choice, seconds(choice)


def check_budget(budget: float | None) -> float | None:
    """Raises ConfigError for a budget of milliseconds that is none."""
    if budget is not None and not budget > 0:
        raise ConfigError(f"update_budget_ms is {budget}: it must be greater than 0, or None for no budget")
    return budget
