"""A look at old samples before some of them are rehearsed: by forwards alone, how well each is known now."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch

from ogpstream.learner import amendments
from ogpstream.learner.folder import Record
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.step import Reading
from ogpstream.learner.update import Updater
from ogpstream.memory.replay import Slot
from ogpstream.memory.units import writing

_log = logging.getLogger(__name__)


class Look:
    """Looks with what is served.

    Args:
        acknowledge: writes records into the journal and queues them.
    """

    def __init__(self, updater: Updater, acknowledge: Callable[[Sequence[Record]], object]) -> None:
        self._updater, self._acknowledge = updater, acknowledge

    def worst(self, slots: Sequence[Slot], record: Record, update: int
              ) -> Generator[str, None, list[tuple[Slot, Reading]]]:
        """The samples with how well they are known, those with the highest loss first; equal ones as they came.

        Nothing of them where there is no memory to see it, which an amendment of this update of the record says.
        """
        if amendments.is_blind(record, update):
            return []
        try:
            known: list[tuple[Slot, Reading]] = []
            for own in self._together(slots):
                readings = yield from self._updater.look([Lesson.of(slot) for slot in own], own[0].expert)
                known += zip(own, readings, strict=True)
            return sorted(known, key=_loss, reverse=True)
        except torch.OutOfMemoryError:
            # what was computed is held by the exception, so room is made after this block
            pass
        yield from self.blind(record, update, len(slots))
        return []

    def blind(self, record: Record, update: int, count: int) -> Generator[str, None, None]:
        """Note that memory ran out on so many old samples, and that recovery is not to look at them."""
        self._updater.ran_out()
        _log.warning("out of memory while %d old samples were looked at: what is forgotten is not known", count)
        yield from writing(partial(self._acknowledge, [{"kind": "blind", "of": record["seq"], "done": update}]))

    def _together(self, slots: Sequence[Slot]) -> list[list[Slot]]:
        """Those that are computed with the same experts."""
        if not self._updater.alone:
            return [list(slots)]
        return [[slot for slot in slots if slot.expert == name]
                for name in dict.fromkeys(slot.expert for slot in slots)]


def _loss(known: tuple[Slot, Reading]) -> float:
    # a sample that the model cannot compute is none to rehearse
    return known[1].loss if math.isfinite(known[1].loss) else -math.inf
