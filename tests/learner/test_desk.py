"""Who has the learner next."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ogpstream.learner.desk import Desk
from ogpstream.learner.errors import StateError


def test_who_asks_goes_before_the_next_unit() -> None:
    learner: Any = SimpleNamespace(queue=SimpleNamespace(reserved_for=None))
    desk = Desk(learner)
    users: list[str] = []

    def ask() -> None:
        with desk.asking() as reserved:
            users.append("asked" if reserved.queue.reserved_for == threading.get_ident() else "not reserved")

    for turn in range(20):
        thread = threading.Thread(target=ask)
        with desk.learning():
            thread.start()
            while not desk._asking:
                time.sleep(0)
            assert learner.queue.reserved_for == threading.get_ident()
        # a plain lock is had again before the other thread wakes up
        with desk.learning():
            assert users == ["asked"] * (turn + 1)
        thread.join()
    assert learner.queue.reserved_for == 0


def test_nobody_asks_at_a_closed_desk() -> None:
    learner: Any = SimpleNamespace(queue=SimpleNamespace(reserved_for=None))
    desk = Desk(learner)
    assert desk.shut() and not desk.shut()
    with pytest.raises(StateError, match="closed"), desk.asking():
        pass
    # the unit that runs may end
    with desk.learning():
        pass
