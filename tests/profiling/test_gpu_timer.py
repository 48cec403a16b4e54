"""Percentiles, the order of the samples and what a sample is, by a clock that the test moves."""

import pytest

from ogpstream.profiling.gpu_timer import MOST, ClockTimer, percentile, time_in_turn


class Clock:
    """Stands still unless a call moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def work(clock, name, seconds, calls):
    """A call that takes the next of these seconds."""
    left = iter(seconds)

    def run():
        calls.append(name)
        clock.now += next(left)

    return run


def test_percentiles_lie_between_the_nearest_samples():
    assert percentile([5.0, 1.0, 3.0, 2.0, 4.0], 50) == 3.0
    assert percentile([1.0, 2.0], 20) == pytest.approx(1.2)
    assert percentile([7.0], 80) == 7.0


def test_a_sample_is_the_second_of_two_calls():
    clock, calls = Clock(), []
    timer = ClockTimer(clock)
    assert timer.sample(work(clock, "a", [9.0, 2.0], calls), cold=False) == 2.0
    assert calls == ["a", "a"]
    with pytest.raises(ValueError, match="no cold samples on a CPU"):
        timer.sample(lambda: None, cold=True)


def test_providers_take_turns_and_each_comes_first():
    clock, calls = Clock(), []
    runs = {name: work(clock, name, [1.0] * 100, calls) for name in "abc"}
    times = time_in_turn(runs, ClockTimer(clock), cold=False, budget=0.0, least=3, clock=clock)
    # two calls a sample
    assert "".join(calls[::2]) == "abc" "bca" "cab"
    assert all(each.samples == 3 and each.p50 == 1.0 for each in times.values())


def test_a_disturbance_of_a_round_hits_all_alike():
    """The machine is twice as slow for a third of the time: the percentiles of equal work stay equal."""
    clock, calls = Clock(), []
    slow = [1.0, 1.0] * 4 + [2.0, 2.0] * 4 + [1.0, 1.0] * 4
    runs = {name: work(clock, name, slow, calls) for name in "ab"}
    times = time_in_turn(runs, ClockTimer(clock), cold=False, budget=0.0, least=12, clock=clock)
    assert times["a"] == times["b"]
    assert (times["a"].p50, times["a"].p80) == (1.0, 2.0)


def test_rounds_end_with_the_budget_or_the_most():
    clock, calls = Clock(), []
    runs = {"a": work(clock, "a", [0.5] * 1000, calls)}
    assert time_in_turn(runs, ClockTimer(clock), cold=False, budget=20.0, least=2, clock=clock)["a"].samples == 20
    assert time_in_turn(runs, ClockTimer(clock), cold=False, budget=1e9, least=2, clock=clock)["a"].samples == MOST
    assert time_in_turn({}, ClockTimer(clock), cold=False, budget=1e9, clock=clock) == {}
