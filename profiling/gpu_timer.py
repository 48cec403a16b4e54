"""Times of short device work: CUDA events on a GPU, a clock on a CPU, providers in turn, caches hot or cold.

Each sample begins with an empty queue and one untimed call. So the host is ahead of the device by as much as it can be
for that provider, as in the middle of a backward pass, the operands are in the L2 as far as they fit, and what is timed
runs from its first kernel to its last, with the gaps that its launches leave. A cold sample overwrites the L2 between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType

Clock = Callable[[], float]
LEAST, MOST = 10, 200  # samples of each provider


class Timer(Protocol):
    """Seconds of one call, with caches as the call before left them or cold."""

    def sample(self, run: Callable[[], Any], *, cold: bool) -> float: ...


class EventTimer:
    """CUDA events around one call on the current stream."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # twice the L2, written, leaves nothing of the operands there
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, run: Callable[[], Any], *, cold: bool) -> float:
        torch.cuda.synchronize()
        run()
        if cold:
            self._flush.fill_(1)
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


class ClockTimer:
    """A clock around one call, for a CPU, whose caches are shared and not ours to flush: it has no cold samples."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, run: Callable[[], Any], *, cold: bool) -> float:
        if cold:
            raise ValueError("there are no cold samples on a CPU: ask for hot ones")
        run()
        start = self._clock()
        run()
        return self._clock() - start


@dataclass(frozen=True)
class Times:
    """Percentiles in seconds of one provider's samples."""

    p20: float
    p50: float
    p80: float
    samples: int


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between the nearest two samples."""
    ordered = sorted(samples)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]],
    timer: Timer,
    *,
    cold: bool,
    budget: float,
    least: int = LEAST,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Each provider once a round, another one first in each round, so that clocks and neighbours hit all alike.

    Rounds go on until `budget` seconds a provider are spent; at least `least` and at most `MOST`.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, start, rounds = list(runs), clock(), 0
    while names and (rounds < least or (rounds < MOST and clock() - start < budget * len(names))):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timer.sample(runs[name], cold=cold))
        rounds += 1
    return {
        name: Times(percentile(taken, 20), percentile(taken, 50), percentile(taken, 80), len(taken))
        for name, taken in samples.items()
    }


def graph_seconds(run: Callable[[], Any], timer: Timer) -> float | None:
    """Median of replays of a CUDA graph of `run`, device time without the gaps of launches; None if it is none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        return percentile([timer.sample(graph.replay, cold=False) for _ in range(LEAST)], 50)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def count_kernels(run: Callable[[], Any]) -> int | None:
    """Kernels that one call launches, by torch's profiler; None where it sees none. Copies and fills do not count.

    Launches may be slower for the rest of the process, so nothing is timed after it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events() or []
        if event.device_type == DeviceType.CUDA
        # ranges like Optimizer.step also appear on the device's time line
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))
    ]
    return len(kernels) or None
