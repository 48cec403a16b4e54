"""How far a learning thread may run ahead of its device, with events that a test completes."""

import torch

from ogpstream.learner.fence import Fence


class Event:
    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number, self.done = log, number, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.number}")
        self.done = True


def test_a_unit_is_queued_behind_at_most_one_other() -> None:
    log: list[str] = []
    events: list[Event] = []

    def record() -> Event:
        events.append(Event(log, len(events)))
        return events[-1]

    fence = Fence(torch.device("cuda"), record)
    for number in range(4):
        fence.wait()
        log.append(f"unit {number}")
        fence.mark()
        assert fence.ahead() <= 2
    assert log == ["unit 0", "unit 1", "wait for 0", "unit 2", "wait for 1", "unit 3"]
    events[2].done = True
    assert fence.ahead() == 1
    events[3].done = True
    assert fence.ahead() == 0
    fence.wait()
    assert len(log) == 6


def test_on_a_cpu_a_unit_is_done_when_its_call_returns() -> None:
    fence = Fence(torch.device("cpu"))
    for _ in range(3):
        fence.wait()
        fence.mark()
        assert fence.ahead() == 0
