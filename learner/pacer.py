"""The time budget of updates: units are timed, and what an update leaves out is chosen before it begins.

Before the first choice one layer of each kind, the loss and the step are run a few times on made-up input, in units of
their own, each at most as long as one of a whole update. So no update has to be made small to learn what one costs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.encoding import max_positions
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.pace import Choice, Costs, Line, Load, Term, check_budget, choose
from ogpstream.learner.preflight import layer_kinds
from ogpstream.learner.report import Pace
from ogpstream.learner.step import loss_gradient, recording
from ogpstream.learner.update import Updater
from ogpstream.learner.walk import Plan, run_layer

Clock = Callable[[], float]
T = TypeVar("T")

# tokens of the measurements: from where calls are the cost to the longest sample
_LADDER = (16, 64, 256, 1024)
# of each, the median of which counts: the first one warms up, and a machine may stop for a moment
_REPEATS = 3
# of a budget that is aimed at: on a machine with other work equal updates differ by a tenth
_AIM = 0.9
_TERMS: dict[str, Term] = {"forward": "forward", "recompute": "forward", "backward": "backward", "loss": "loss",
                           "gradient": "step", "optimizer": "step", "anchor": "step", "projection": "step"}

_log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds between two moments: of the host's clock, or on a CUDA device, where units are queued, of its events."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self._device = device
        self._clock = None if device.type == "cuda" else clock

    def now(self) -> Any:
        if self._clock is not None:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        # the current device of the thread may be another one
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, since: Any, until: Any) -> float:
        """Waits for the later moment, if the device has not come to it."""
        if self._clock is not None:
            return float(until - since)
        until.synchronize()
        return float(since.elapsed_time(until)) / 1e3


class Pacer:
    """Chooses what updates leave out, and learns from their units what they cost.

    Attributes:
        budget_ms: of one update, units alone, pauses not counted; None leaves nothing out.
        watch: times the units.
    """

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self._budget_ms: float | None = None
        self.watch = Stopwatch(updater.attachment.model.device)
        self._costs: Costs | None = None
        # seconds of each repetition of a measurement
        self._measured: dict[tuple[str, int, int], list[list[float]]] = {}
        self._told = False

    @property
    def budget_ms(self) -> float | None:
        return self._budget_ms

    @budget_ms.setter
    def budget_ms(self, budget: float | None) -> None:
        self._budget_ms = check_budget(budget)

    def choose(self, lessons: Sequence[Lesson], bos: int | None) -> Generator[str, None, Choice | None]:
        """What an update of these lessons trains; None if that is all of them, or there is no budget.

        Yields:
            "probe", after each unit of the measurements before the first choice.
        """
        usable = [lesson for lesson in lessons if lesson.refusal is None]
        # as it is now: it may be set anew while this is paused
        budget = self.budget_ms
        if budget is None or not usable:
            return None
        if self._costs is None:
            try:
                self._costs = yield from self._measure()
            except torch.OutOfMemoryError:
                # not even the shortest fits now: the update itself knows how to go on in a smaller way
                pass
            if self._costs is None:
                self._give_back()
                return None
        costs, longest = self._costs, max(lesson.prompt_length for lesson in usable)

        def seconds(choice: Choice) -> float:
            kept = [lesson.asking(choice.prompt, bos) for lesson in usable]
            return costs.predict(self._loads(kept, choice.layers), choice.layers)

        choice, predicted = choose(longest, costs.depth, seconds, _AIM * budget / 1e3)
        if predicted * 1e3 > budget and not self._told:
            self._told = True
            _log.warning("an update fits in no way into %.3g ms: the least one, of the top layer and one id of each "
                         "prompt, is predicted to take %.3g ms; it is made, and so are later ones, without a word",
                         budget, predicted * 1e3)
        return None if choice == (longest, costs.depth) else choice

    def timed(self, work: Generator[str, None, T], lessons: Sequence[Lesson], choice: Choice | None
              ) -> Generator[str, None, tuple[T, Pace | None]]:
        """Drive an update of these lessons, which are cut already, and learn from it what it costs."""
        costs, budget = self._costs, self.budget_ms
        if budget is None or costs is None:
            return (yield from work), None
        layers = costs.depth if choice is None else choice.layers
        usable = [lesson for lesson in lessons if lesson.refusal is None]
        loads, failed = self._loads(usable, layers), self._updater.out_of_memory
        predicted, spans = costs.predict(loads, layers), []
        with closing(work):
            while True:
                since = self.watch.now()
                try:
                    unit = next(work)
                except StopIteration as end:
                    spans.append(("", since, self.watch.now()))
                    result: T = end.value
                    break
                spans.append((unit, since, self.watch.now()))
                yield unit
        took: dict[Term, float] = {}
        for unit, since, until in spans:
            term = _TERMS.get(unit, "rest")
            took[term] = took.get(term, 0.0) + self.watch.seconds(since, until)
        actual = sum(took.values())
        # what was begun anew, or made no step, does not tell what a whole update takes
        if self._updater.out_of_memory == failed:
            if "step" not in took:
                del took["rest"]
            costs.observe(loads, layers, took)
        tokens = max((len(lesson.ids) for lesson in usable), default=0)
        return result, Pace(choice is not None, tokens, layers, costs.depth, predicted * 1e3, actual * 1e3,
                            budget)

    def _loads(self, lessons: Sequence[Lesson], layers: int) -> list[Load]:
        return [Load(tokens, tuple(lesson.rows for lesson in group), _again(plan, layers))
                for group, tokens, plan in self._updater.plans(lessons, layers)]

    def _measure(self) -> Generator[str, None, Costs]:
        """Changes nothing, and computes with what is served."""
        updater = self._updater
        walk, binding, store = updater.walk, updater.attachment.binding, updater.store
        expert, served = store.expert(next(iter(store.active))), binding.current()
        sink = updater.staging.sink(expert)
        device, config = walk.model.device, updater.config
        most = max(2, updater.preflight.longest(min(config.max_tokens, max_positions(walk.model)), 1))
        layers: dict[int, tuple[float, float]] = {}

        def typical(what: tuple[str, int, int], *works: Callable[[], Iterable[object] | None]
                    ) -> Generator[str, None, list[float]]:
            # kept where the measurements are aborted: beside a busy server they would never come to their end
            found = self._measured.setdefault(what, [])
            while len(found) < _REPEATS:
                times = []
                for work in works:
                    times.append((yield from self._seconds(work)))
                found.append(times)
            return [median(column) for column in zip(*found, strict=True)]

        for tokens in sorted({min(tokens, most) for tokens in _LADDER}):
            forwards = backwards = 0.0
            try:
                with binding.using(served):
                    tried = walk.plan(torch.zeros(1, tokens, dtype=torch.long, device=device))
                for index, count in layer_kinds(tried).items():
                    layer = _Layer(tried, index, lambda: recording(binding, served, [sink]))
                    forward, backward = yield from typical(("layer", tokens, index), layer.forward, layer.backward)
                    forwards, backwards = forwards + count * forward, backwards + count * backward
                plan = tried
                layers[tokens] = forwards / len(plan.calls), backwards / len(plan.calls)
            except torch.OutOfMemoryError:
                if not layers:
                    raise
            if tokens not in layers:
                # the lines go on beyond their last point
                self._give_back()
                break
            if self.budget_ms is not None and 1e3 * sum(layers[tokens]) > self.budget_ms:
                # nothing that is longer can be chosen
                break
        loss: list[tuple[int, float]] = []
        for rows in sorted({1, min(config.loss_chunk, max(layers))}):
            target = torch.zeros(rows, dtype=torch.long, device=device)

            def head(target: Tensor = target, plan: Plan = plan, rows: int = rows) -> None:
                with recording(binding, served, [sink]):
                    loss_gradient(walk, plan, plan.hidden[:, target], target, rows)

            (seconds,) = yield from typical(("loss", rows, 0), head)
            loss.append((rows, seconds))

        def step() -> Iterable[object]:
            return updater.proposer.run(expert, [updater.staging.sink(expert).slab])

        def publish() -> Iterable[object]:
            return store.building(store.active, {name: store.expert(name) for name in store.active})

        whole, rest = yield from typical(("step", 0, 0), step, publish)
        return Costs(len(plan.calls), Line(tuple((tokens, pair[0]) for tokens, pair in layers.items())),
                     Line(tuple((tokens, pair[1]) for tokens, pair in layers.items())), Line(tuple(loss)), whole, rest)

    def _give_back(self) -> None:
        """What was computed when memory ran out, to the device."""
        if self._updater.attachment.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _seconds(self, work: Callable[[], Iterable[object] | None]) -> Generator[str, None, float]:
        """Of a work that is one unit, or gives them one by one; pauses not counted."""
        watch, since, spans = self.watch, self.watch.now(), []
        for _ in work() or ():
            spans.append((since, watch.now()))
            yield "probe"
            since = watch.now()
        spans.append((since, watch.now()))
        yield "probe"
        return sum(watch.seconds(*span) for span in spans)


class _Layer:
    """Forward and backward of one layer of a plan, on the embeddings."""

    def __init__(self, plan: Plan, index: int, record: Callable[[], Any]) -> None:
        self._call, self._hidden, self._record = plan.calls[index], plan.hidden, record

    def forward(self) -> None:
        self._entry = self._hidden.detach().requires_grad_()
        with self._record():
            self._exit = run_layer(self._call, self._entry)

    def backward(self) -> None:
        torch.autograd.grad(self._exit, self._entry, torch.zeros_like(self._exit))
        del self._exit


def _again(plan: ActivationPlan, layers: int) -> int:
    """Layers that are computed again: of a segment, all but the last one twice."""
    return 0 if plan.policy == "keep" else 2 * layers - -(-layers // plan.every)
