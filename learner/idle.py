"""The idle loop: corrections are learned in the moments that a server has nothing else to do, one unit at a time.

A unit runs only when nothing waits at its boundary, and inside the engine's lock; so a request waits for the unit that
runs and, on a CUDA device, for the one that is queued behind it. What a unit publishes is told to the engine before
the lock is given back. A snapshot takes as long as the disk does and is a unit outside the lock. When units run is
decided by the clock, what they compute is not: the state afterwards is that of the same records applied without any
pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ogpstream.learner.apply import Report
from ogpstream.learner.desk import Desk
from ogpstream.learner.duty import DutyCycle
from ogpstream.learner.engine import Engine, EngineBusy
from ogpstream.learner.errors import ConfigError, StateError
from ogpstream.learner.fence import Fence
from ogpstream.learner.learner import StreamLearner
from ogpstream.learner.pace import check_budget
from ogpstream.learner.pacer import Stopwatch
from ogpstream.learner.report import LoopStatus, RehearsalReport, SampleReport
from ogpstream.learner.samples import Sample
from ogpstream.learner.tickets import Tickets, promise
from ogpstream.memory.units import WRITES

T = TypeVar("T")

# seconds before the next try after an error: doubled with each one in a row, up to the second number
RETRY = (0.5, 60.0)

_log = logging.getLogger(__name__)


class IdleLoop:
    """Drives a learner beside a server: by a thread of its own (`start`), or by `tick` from a loop of the user's.

    From now on until `close` the learner is changed through the loop only; it refuses everybody else. `submit`,
    `call`, `pause`, `resume`, `status` and `close` may be used from any thread.

    Args:
        duty: share of wall time that units may take, above 0 and at most 1.
        patience: seconds after which a correction gets units between two requests, not in idle moments only.
        hold: seconds that an update which stands back keeps its activations; then it is aborted, and begun anew later.
            That of an impatient correction is kept, or it might never end.
        consolidate: rehearse where there is nothing new, and then what is forgotten, as `StreamLearner.refresh` does.
        update_budget_ms: milliseconds that the units of one update may take, `update_budget_ms` of the learner until
            `close`; None is without a bound.
        poll: seconds between two looks at an engine that is busy.
        clock: seconds, monotonic; units are timed by it too, but those on a CUDA device.

    Raises:
        ConfigError: the duty cycle or the budget is out of range, or the engine packs requests and `served_to` of the
            learner is "scope".
        StateError: another loop drives this learner.
    """

    def __init__(
        self,
        learner: StreamLearner,
        engine: Engine,
        *,
        duty: float = 1.0,
        patience: float = 30.0,
        hold: float = 2.0,
        consolidate: bool = True,
        update_budget_ms: float | None = 500,
        poll: float = 0.005,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if learner.config.served_to == "scope" and not getattr(engine, "looks_at_prompts", True):
            raise ConfigError(f"{type(engine).__name__} packs requests, so that no prompt can be looked at: make the "
                              "learner with served_to = 'all'")
        self._duty = DutyCycle(duty, clock)
        budget = check_budget(update_budget_ms)
        self._desk = Desk(learner)
        pacer = learner.queue.applier.pacer
        self._before = pacer.budget_ms, pacer.watch
        pacer.budget_ms, pacer.watch = budget, Stopwatch(learner.model.device, clock)
        self._learner, self._engine = learner, engine
        self._patience, self._hold, self._poll, self._clock = patience, hold, poll, clock
        self._fence = Fence(learner.model.device)
        self._tickets = Tickets()
        self._calls: deque[tuple[Callable[[StreamLearner], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._ticking = threading.Lock()
        self._ticker: int | None = None  # ident of the thread that ticks
        self._wake = threading.Event()
        self._paused = False
        self._work: Generator[str, None, Report] | None = None  # the update that is half-way
        self._writing = False  # its next unit writes a snapshot
        self._rehearses = consolidate
        self._rested = False  # nothing was left to rehearse
        self._announced = learner.version
        self._ran = 0  # units in the engine's lock, since it was taken last
        self._last_unit = clock()
        self._retry, self._retry_at = RETRY[0], clock()
        self._done = LoopStatus()
        learner.queue.on_applied = self._applied

    # for everybody

    def submit(self, sample: Sample) -> Future[SampleReport]:
        """Acknowledge a correction: it is in the journal when this returns, after at most one unit and an fsync.

        Returns:
            The report of its update. An error of its units comes there too; the sample stays pending and is tried
            again. "skipped" if its id was brought before, "rejected" if a guard refused it before.

        Raises:
            SampleError: the sample is unusable.
            StateError: the journal cannot be written, or the loop is closed: the sample is not taken.
        """
        with self._desk.asking() as learner:
            accepted = learner.accept(sample)
            if isinstance(accepted, SampleReport):
                future: Future[SampleReport] = promise()
                future.set_result(accepted)
            else:
                future = self._tickets.add(accepted, self._clock())
        self._wake.set()
        return future

    def call(self, work: Callable[[StreamLearner], T]) -> Future[T]:
        """Do something else with the learner, such as a rollback or an export, inside the engine's lock.

        It goes before updates, and aborts the one that is half-way. What it publishes is told to the engine.

        Raises:
            StateError: the loop is closed.
        """
        future: Future[T] = promise()
        with self._desk.asking():
            self._calls.append((work, future))
        self._wake.set()
        return future

    def pause(self) -> None:
        """Run no more units, from the next boundary on; samples are acknowledged and calls are answered as before."""
        self._paused = True
        self._wake.set()

    def resume(self) -> None:
        """End `pause`."""
        self._paused = False
        self._wake.set()

    def status(self) -> LoopStatus:
        """What was done so far."""
        return replace(self._done, pending=self._learner.pending, half_way=self._work is not None, paused=self._paused)

    def start(self) -> IdleLoop:
        """Drive it by a thread of its own.

        Raises:
            StateError: it has one, or is closed.
        """
        self._desk.check_open()
        if self._thread is not None:
            raise StateError("the idle loop has a thread already")
        self._thread = threading.Thread(target=self._run, name="ogpstream-idle", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop after the unit that runs and give the learner back; what is pending is learned when it is loaded next.

        Waits for the generation that the engine's lock waits for. Futures that are open get a StateError.

        Raises:
            StateError: called by what the thread that learns runs: a `call`, a callback of a future, the engine.
        """
        if self._ticker == threading.get_ident():
            # it would wait for itself
            raise StateError("this thread drives the idle loop: close it from another one")
        if not self._desk.shut():
            return
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        # a tick in another thread ends first
        with self._ticking, self._desk.learning() as learner:
            self._drop()
        pacer = learner.queue.applier.pacer
        pacer.budget_ms, pacer.watch = self._before
        learner.queue.reserved_for = learner.queue.on_applied = None
        self._tickets.settle_all(StateError("the idle loop was closed: the sample is in the journal, and is learned "
                                            "when the state is loaded next"))
        for _, future in self._calls:
            self._tickets.later(future, StateError("the idle loop was closed before it answered this call"))
        self._tickets.tell()

    def __enter__(self) -> IdleLoop:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # the thread that learns

    def tick(self) -> bool:
        """At most one unit, or one call; raises no Exception.

        Returns:
            Whether the next tick has something to do at once.
        """
        with self._alone():
            try:
                return not self._desk.closed and self._turn()
            except Exception as error:
                self._fail(error)
                return False
            finally:
                self._tickets.tell()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._ticking:
            self._ticker = threading.get_ident()
            try:
                yield
            finally:
                self._ticker = None

    def _run(self) -> None:
        device = self._learner.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while not self._desk.closed:
            if not self.tick():
                self._wake.wait(self._rest())
                self._wake.clear()

    def _rest(self) -> float | None:
        """Seconds until the next look, if nobody wakes the loop before."""
        if self._calls:
            return self._poll
        if self._paused or not self._has_work():
            return self._poll if self._work is not None else None
        return max(self._poll, self._retry_at - self._clock(), self._duty.wait())

    def _turn(self) -> bool:
        if self._calls:
            return self._answer()
        oldest = self._tickets.oldest()
        impatient = oldest is not None and self._clock() - oldest >= self._patience
        if self._paused:
            return self._stand_back(impatient)
        if self._clock() < self._retry_at or not self._has_work():
            return False
        if not (impatient or self._engine.is_idle()):
            return self._stand_back(impatient, waited=True)
        if self._duty.wait() > 0 or not self._next_record():
            return False
        if self._writing:
            # 140 ms of 8 MB beside units of 10: a request that comes now is served meanwhile
            self._unit()
            return True
        self._fence.wait()
        try:
            with self._engine.exclusive():
                # one whose announcement failed, or nothing
                self._announce()
                if not (impatient or self._engine.is_idle()):
                    return self._stand_back(impatient, waited=True)
                self._ran = 0
                self._unit()
                self._announce()
        except EngineBusy:
            return self._stand_back(impatient, waited=True)
        return True

    def _unit(self) -> None:
        started = self._clock()
        writing, self._writing = self._writing, False
        with self._desk.learning() as learner:
            number = learner.queue.oldest
            if self._work is None:
                self._work = learner.queue.apply_next()
            try:
                self._writing = next(self._work) == WRITES
            except StopIteration:
                self._work, self._retry = None, RETRY[0]
            except Exception as error:
                self._work = None
                self._fail(error)
                if number is not None:
                    self._tickets.settle(number, error)
            except BaseException:
                self._work = None  # it is at its end, and would pass for a record that was applied
                raise
        self._last_unit = self._clock()
        # a writing one is in no request's way
        self._ran = 0 if writing else self._ran + 1
        took = self._last_unit - started
        self._duty.spend(took)
        longest = self._done.longest_unit if writing else max(self._done.longest_unit, took)
        self._done = replace(self._done, units=self._done.units + 1, longest_unit=longest)
        if not writing:
            self._fence.mark()

    def _answer(self) -> bool:
        work, future = self._calls[0]
        try:
            with self._engine.exclusive():
                self._announce()
                with self._desk.learning() as learner:
                    self._drop()
                    self._rested = False
                    self._calls.popleft()
                    try:
                        self._tickets.later(future, work(learner))
                    except BaseException as error:
                        # an exit too is of whoever asked for it, not of the thread that learns
                        self._tickets.later(future, error)
                        if isinstance(error, KeyboardInterrupt):
                            raise
                self._announce()
        except EngineBusy:
            return False
        except Exception as error:
            # of the engine; before the work was done, it is told of it
            if self._calls and self._calls[0][1] is future:
                self._calls.popleft()
                self._tickets.later(future, error)
            raise
        return True

    def _announce(self) -> None:
        version = self._learner.version
        if version != self._announced:
            self._engine.adapter_changed(version)
            self._announced = version

    def _has_work(self) -> bool:
        return bool(self._learner.pending) or self._rehearses and not self._rested

    def _next_record(self) -> bool:
        """Make sure that something is pending; one rehearsal at a time, so that a correction waits for no more."""
        if self._learner.pending:
            return True
        with self._desk.learning() as learner:
            self._rested = not (learner.pending or learner.accept_rehearsal(limit=1) or learner.accept_refresh())
        return not self._rested

    def _stand_back(self, impatient: bool, *, waited: bool = False) -> bool:
        """Run no unit, for a request if one `waited`; an update that stands back too long gives its memory back."""
        if self._ran and waited:
            ahead = max(self._ran, self._done.longest_wait, self._fence.ahead())
            self._done = replace(self._done, waits=self._done.waits + 1, longest_wait=ahead)
        self._ran = 0
        if self._work is not None and not impatient and self._clock() - self._last_unit >= self._hold:
            with self._desk.learning():
                self._drop()
        return False

    def _drop(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work, self._writing = None, False
            self._done = replace(self._done, aborted=self._done.aborted + 1)

    def _applied(self, number: int, report: Report) -> None:
        # a look that found nothing forgotten is no update
        made = not isinstance(report, RehearsalReport) or report.updates > 0
        self._done = replace(self._done, updates=self._done.updates + made)
        self._rested = False
        if isinstance(report, SampleReport):
            self._tickets.settle(number, report)

    def _fail(self, error: Exception) -> None:
        _log.error("the idle loop goes on %.1f s after an error", self._retry, exc_info=error)
        last = f"{type(error).__name__}: {error}"
        self._done = replace(self._done, failures=self._done.failures + 1, last_error=last)
        self._retry_at = self._clock() + self._retry
        self._retry = min(2 * self._retry, RETRY[1])
