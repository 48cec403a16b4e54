"""Records that were acknowledged and are not applied yet: journaled first, then applied in order.

What one thread may do to a learner it does through here, so a learner that an `IdleLoop` reserved refuses the others
at this one place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ogpstream.learner import amendments
from ogpstream.learner.apply import Applier, Report
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import StateError
from ogpstream.learner.folder import MemoryFolder, Record
from ogpstream.learner.report import SampleReport
from ogpstream.learner.state import LearnerState
from ogpstream.learner.update import Updater


class RecordQueue:
    """The pending records of a learner and the `Applier` that they go to.

    Args:
        own: what identifies the learner in a snapshot.

    Attributes:
        reserved_for: ident of the one thread that may change the state now, 0 for none of them; None while no
            `IdleLoop` drives the learner.
        on_applied: told of each record that was applied, by its number in the journal.
        last_report: of the newest sample that was learned, rejected or skipped.
    """

    def __init__(self, state: LearnerState, updater: Updater, config: LearnerConfig, own: dict[str, Any]) -> None:
        self.applier = Applier(state, updater, config, MemoryFolder(), own, self._journal)
        self.reserved_for: int | None = None
        self.on_applied: Callable[[int, Report], None] | None = None
        self.last_report: SampleReport | None = None
        self._records: deque[Record] = deque()
        self._closed = False

    def __len__(self) -> int:
        """Records that are not, or not wholly, applied."""
        return len(self._records)

    @property
    def oldest(self) -> int | None:
        """Number in the journal of the record that `apply_next` applies; None if nothing is pending."""
        return self._records[0]["seq"] if self._records else None

    def holds(self, id_: str) -> bool:
        """Whether a sample of this id is pending."""
        return any(record.get("id") == id_ for record in self._records)

    def newest(self, id_: str | None) -> int:
        """Number of the newest pending record of a sample of this id, or of one without."""
        return next(one["seq"] for one in reversed(self._records) if "id" in one and one["id"] == id_)

    def check_reserved(self) -> None:
        """Raises StateError where an `IdleLoop` drives the learner and this thread is not its turn's."""
        if self.reserved_for not in (None, threading.get_ident()):
            raise StateError("an IdleLoop drives this learner: use its submit and call, or close it first")

    def close(self) -> None:
        """Nothing is taken or applied any more."""
        self._closed = True

    def _check_open(self) -> None:
        self.check_reserved()
        if self._closed:
            raise StateError("the learner is closed: load its state again, or make a new one")

    def acknowledge(self, records: Sequence[Record]) -> int | None:
        """Journal records and queue them; safe on disk when this returns, and none is taken when it raises.

        Returns:
            The number of the last one, or None for none.

        Raises:
            StateError: the learner is reserved, or the journal cannot be written.
        """
        try:
            return self._journal(records)
        except StateError as error:
            raise _told(error, ", then bring it again: nothing of it was taken") from error.__cause__

    def _journal(self, records: Sequence[Record]) -> int | None:
        """`acknowledge` for those that are about a pending record too, which is kept where they are not taken."""
        self._check_open()
        folder, numbers = self.applier.folder, list[int]()
        try:
            for record in records:
                numbers.append(folder.append(record))
            folder.sync()
        except Exception:
            # whoever brought them will bring them again, and without an id that would be another sample
            folder.withdraw(numbers)
            numbers.clear()
            raise
        finally:
            # those of an interrupt too, which the journal has or will write
            self.enqueue({**record, "seq": number} for record, number in zip(records, numbers, strict=False))
        return numbers[-1] if numbers else None

    def enqueue(self, records: Iterable[Record]) -> None:
        """Queue records that the journal has."""
        for record in records:
            self._records.append(record)
            if record["kind"] not in amendments.KINDS:
                continue
            for other in self._records:
                if other["seq"] == record["of"]:
                    amendments.enter(record, other)

    def apply_next(self) -> Generator[str, None, Report]:
        """Apply the oldest record as a generator that stops after every unit of work.

        Closing the generator aborts the unit's update; the record stays pending. An error of a unit does the same.
        """
        self._check_open()
        applier = self.applier
        before = applier.updater.out_of_memory
        try:
            # what an interrupt has left is on the disk before it acts
            applier.folder.sync()
            report = yield from applier.apply(self._records[0])
        except StateError as error:
            raise _told(error, ": what was acknowledged is kept, and gone on with then") from error.__cause__
        record = self._records.popleft()
        while self._records and self._records[0]["kind"] in amendments.KINDS:
            yield from applier.apply(self._records.popleft())
        if isinstance(report, SampleReport):
            report = replace(report, out_of_memory=applier.updater.out_of_memory - before)
            self.last_report = report
        if self.on_applied is not None:
            self.on_applied(record["seq"], report)
        return report

    def drain(self) -> Generator[str, None, Report]:
        """Apply all that is pending, unit by unit; the report of the last record."""
        report = None
        while self._records:
            report = yield from self.apply_next()
        return report


def _told(error: StateError, more: str) -> StateError:
    """An error, with what has become of the records where it is one of the disk."""
    return StateError(f"{error}{more}") if isinstance(error.__cause__, OSError) else error
