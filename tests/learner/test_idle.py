"""The idle loop: when units run, what an interruption leaves behind, and who may use the learner meanwhile."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.learner import EngineBusy, IdleLoop, LearnerConfig, Sample, SampleError, StateError, StreamLearner
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.proposal import Proposer
from ogpstream.memory.journal import Journal

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]

QUICK: dict[str, Any] = dict(
    rank=2, lr=0.02, target_modules=("q_proj", "down_proj"), basis_columns=16, warm_start=False, learned_below=100.0,
    learned_share=0.0, settled_below=0.0, ring_samples=8, replay_every=4,
)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Idle or not as the test says; what it must never see fails at once."""

    def __init__(self) -> None:
        self.idle = True
        self.busy = False  # a generation is half-way
        self.held = False
        self.turns = 0
        self.versions: list[int] = []
        self.in_unit: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None

    def is_idle(self) -> bool:
        return self.idle

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        if self.busy:
            raise EngineBusy
        assert not self.held
        self.held = True
        self.turns += 1
        try:
            self.in_unit()
            yield
        finally:
            self.held = False

    def adapter_changed(self, version: int) -> None:
        assert self.held
        self.on_change()
        self.versions.append(version)


def _sample(seed: int, **fields: Any) -> Sample:
    numbers = random.Random(seed)
    ids = [numbers.randrange(4, 101) for _ in range(6 + seed % 5)]
    return Sample(prompt_ids=tuple(ids[:3]), completion_ids=tuple(ids[3:]), **fields)


@pytest.fixture
def make(tiny_model: TinyModel) -> Iterator[MakeLearner]:
    """`make(state_dir=, **config)`; learners are closed at the end."""
    made: list[StreamLearner] = []

    def make_learner(state_dir: Path | None = None, **changes: Any) -> StreamLearner:
        config = LearnerConfig(**{**QUICK, **changes})
        learner = StreamLearner(_model(tiny_model), None, config, state_dir=state_dir)
        made.append(learner)
        return learner

    yield make_learner
    for learner in made:
        learner.queue.reserved_for = None
        learner.close()


def _model(tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2)


def _finish(loop: IdleLoop) -> int:
    """Tick until there is nothing left to do at once; how often."""
    ticks = 1
    while loop.tick():
        ticks += 1
    return ticks


def test_a_correction_is_updated_until_it_counts_as_learned(make: MakeLearner) -> None:
    changes: dict[str, Any] = dict(repeats=9, learned_below=4.0, rehearsals=0, replay_every=0)
    learner, plain, engine = make(**changes), make(**changes), Engine()
    loop = IdleLoop(learner, engine, hold=1.0)
    future = loop.submit(_sample(0))
    _finish(loop)
    (report,) = plain.learn_batch([_sample(0)])
    assert future.result().updates == report.updates and 2 < report.updates < 10 and future.result().sticks
    assert learner.state.store.served.version == plain.state.store.served.version == report.updates + 1
    factors = [one.state.store.expert("default").factors for one in (learner, plain)]
    assert torch.equal(*factors)
    # no version is announced that is not the newest by then
    assert engine.versions == sorted(engine.versions)


# interruptions


def test_preempted_a_thousand_times_nothing_differs(make: MakeLearner) -> None:
    learner, plain, engine, clock = make(), make(), Engine(), Clock()
    loop = IdleLoop(learner, engine, hold=1.0, patience=1e9, clock=clock)
    numbers = random.Random(0)
    preempted = resumed = number = 0
    while preempted < 1000 or number <= 40:
        future = loop.submit(_sample(number))
        untouched, served = learner.state_sha256(), learner.attachment.binding.served
        while not future.done():
            if numbers.random() < 0.5:
                before, told = loop.status(), len(engine.versions)
                engine.idle = False
                clock.now += numbers.choice((0.0, 0.5, 1.0))
                assert not loop.tick()
                engine.idle = True
                after = loop.status()
                assert after.units == before.units and len(engine.versions) == told
                assert learner.attachment.binding.served is served
                if before.half_way:
                    preempted += 1
                    resumed += after.half_way
                    assert after.half_way == (after.aborted == before.aborted)
                    # the update of a replayed sample comes second, after the first one is committed
                    if learner.state.position.done == 0:
                        assert learner.state_sha256() == untouched
            loop.tick()
            if learner.state.position.done:
                served = learner.attachment.binding.served
        assert plain.learn_one(_sample(number)).status == future.result().status == "learned"
        if number % 3 == 0:
            assert _finish(loop) > 1
            # one rehearsal at a time, as the loop does where nothing is new
            while plain.accept_rehearsal(limit=1) or plain.accept_refresh():
                plain.drain()
        assert learner.state_sha256() == plain.state_sha256()
        number += 1
    assert min(resumed, preempted - resumed) > 200
    assert engine.versions == sorted(set(engine.versions)) and engine.versions[-1] == learner.version
    loop.close()


def test_nothing_runs_while_a_request_waits(make: MakeLearner) -> None:
    learner, engine = make(), Engine()
    loop = IdleLoop(learner, engine, clock=Clock())
    future = loop.submit(_sample(0))
    engine.idle = False
    assert not loop.tick() and loop.status().units == engine.turns == 0
    # it came between the look and the lock
    engine.idle = True
    engine.in_unit = lambda: setattr(engine, "idle", False)
    assert not loop.tick() and loop.status().units == 0
    engine.idle, engine.in_unit = True, lambda: None
    # a generation is half-way, whatever the hint says
    engine.busy = True
    assert not loop.tick() and loop.status().units == 0
    engine.busy = False
    assert loop.tick() and loop.status().units == 1
    assert loop.status().waits == 0
    engine.idle = False
    for _ in range(3):
        assert not loop.tick()
    status = loop.status()
    assert (status.units, status.waits, status.longest_wait, status.half_way) == (1, 1, 1, True)
    engine.idle = True
    _finish(loop)
    assert future.result(timeout=0).status == "learned"
    loop.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_no_request_waits_for_a_snapshot(
    make: MakeLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    learner, plain = (make(tmp_path / name, snapshot_every=3, replay_every=2) for name in ("a", "b"))
    engine, clock = Engine(), Clock()
    loop = IdleLoop(learner, engine, hold=1.0, patience=1e9, consolidate=False, clock=clock)
    folder = learner.queue.applier.folder
    save, saved, held = folder.save, [], []

    def slow(version: int, *state: Any) -> None:
        held.append(engine.held)
        clock.now += 9.0
        # a request comes, and is served
        engine.idle = False
        save(version, *state)
        saved.append(version)

    monkeypatch.setattr(folder, "save", slow)
    for seed in range(8):
        loop.submit(_sample(seed))
    while learner.pending:
        loop.tick()
        if dropped and loop._writing and not loop.status().aborted:
            # between the update and its snapshot, which is made when the record is taken up again
            engine.idle = False
            clock.now += 1.5
            loop.tick()
            assert (loop.status().aborted, loop._writing, saved) == (1, False, [])
        if not engine.idle:
            units = loop.status().units
            assert not loop.tick() and loop.status().units == units
            engine.idle = True
    status = loop.status()
    assert len(saved) == 4 and not any(held)
    # it was in no request's way, and the lock was not held
    assert (status.waits, status.longest_unit) == (dropped, 0.0)
    loop.close()
    monkeypatch.undo()
    for seed in range(8):
        plain.learn_one(_sample(seed))
    assert learner.state_sha256() == plain.state_sha256()
    assert learner.versions() == plain.versions() == saved[-2:]


def test_an_update_that_stands_back_too_long_gives_its_memory_back(make: MakeLearner) -> None:
    learner, engine, clock = make(), Engine(), Clock()
    loop = IdleLoop(learner, engine, hold=2.0, patience=50.0, clock=clock)
    future = loop.submit(_sample(0))
    loop.tick()
    engine.idle = False
    clock.now += 1.9
    loop.tick()
    assert loop.status().half_way
    clock.now += 0.2
    loop.tick()
    assert (loop.status().half_way, loop.status().aborted, learner.pending) == (False, 1, 1)
    engine.idle = True
    loop.tick()
    clock.now += 60.0
    engine.idle, engine.busy = False, True
    loop.tick()
    # that of an impatient correction is kept
    assert loop.status().half_way
    engine.busy = False
    _finish(loop)
    assert future.result(timeout=0).status == "learned"
    loop.close()


def test_a_correction_that_waited_long_gets_units_between_requests(make: MakeLearner) -> None:
    engine, clock = Engine(), Clock()
    loop = IdleLoop(make(), engine, patience=5.0, clock=clock)
    engine.idle = False
    future = loop.submit(_sample(0))
    clock.now += 4.9
    assert not loop.tick() and loop.status().units == 0
    clock.now += 0.2
    units = 0
    while not future.done():
        assert loop.tick()
        units += 1
        assert loop.status().units == units
    # its rehearsal can wait
    assert not loop.tick() and loop.status().units == units
    loop.close()


# time


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_duty_cycle_bounds_the_share_of_wall_time(make: MakeLearner, share: float) -> None:
    engine, clock = Engine(), Clock()
    unit, busy = 0.02, 0.0

    def work() -> None:
        clock.now += unit

    learner = make()
    loop = IdleLoop(learner, engine, duty=share, clock=clock)
    with pytest.MonkeyPatch.context() as patch:
        apply_next = learner.queue.apply_next

        def slow() -> Any:
            steps = apply_next()
            while True:
                work()
                try:
                    yield next(steps)
                except StopIteration as end:
                    return end.value

        patch.setattr(learner.queue, "apply_next", slow)
        begin = clock.now
        for number in range(40):
            loop.submit(_sample(number))
        while learner.pending:
            before = loop.status().units
            loop.tick()
            if loop.status().units == before:
                assert share < 1.0
                clock.now += 0.001
            busy += unit * (loop.status().units - before)
            elapsed = clock.now - begin
            assert busy <= share * elapsed + 0.5 + unit + 1e-6
        assert busy >= share * elapsed - unit
        assert share < 1.0 or busy == pytest.approx(elapsed)
    loop.close()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_duty_cycle_out_of_range_is_refused(make: MakeLearner, share: float) -> None:
    learner = make()
    with pytest.raises(ConfigError, match="duty cycle"):
        IdleLoop(learner, Engine(), duty=share)
    # nothing was reserved
    learner.learn_one(_sample(0))


def test_paused_it_acknowledges_and_answers_but_learns_nothing(make: MakeLearner) -> None:
    learner, engine, clock = make(), Engine(), Clock()
    loop = IdleLoop(learner, engine, hold=1.0, clock=clock)
    future = loop.submit(_sample(0))
    loop.tick()
    loop.pause()
    units = loop.status().units
    loop.submit(_sample(1))
    assert not loop.tick() and loop.status().units == units
    assert loop.status().paused and learner.pending == 2
    clock.now += 1.5
    loop.tick()
    assert not loop.status().half_way and loop.status().waits == 0
    answer = loop.call(lambda learner: learner.versions())
    assert loop.tick() and answer.result(timeout=0) == learner.versions()
    loop.resume()
    _finish(loop)
    assert future.result(timeout=0).status == "learned" and not loop.status().paused
    # one that would wait for itself, and one that ends its thread
    within, ended = loop.call(lambda learner: loop.submit(_sample(2))), loop.call(lambda learner: sys.exit(3))
    _finish(loop)
    with pytest.raises(StateError, match="use the one that the call was given"):
        within.result(timeout=0)
    with pytest.raises(SystemExit):
        ended.result(timeout=0)
    assert loop.call(lambda learner: learner.learn_one(_sample(2)).status) and loop.tick()
    loop.close()


# what is new, and what is not


def test_where_nothing_is_new_it_rehearses_and_a_correction_goes_first(make: MakeLearner) -> None:
    learner = make(replay_every=0)
    loop = IdleLoop(learner, Engine(), clock=Clock())
    for seed in range(3):
        loop.submit(_sample(seed))
    while learner.pending:
        loop.tick()
    assert len(learner.state.unrehearsed()) == 3
    loop.tick()
    new = loop.submit(_sample(3))
    while not new.done():
        loop.tick()
    # one rehearsal was under way
    assert len(learner.state.unrehearsed()) == 3
    _finish(loop)
    # and one look at all four, which are known, and which is no update
    assert not learner.state.unrehearsed() and loop.status().updates == 8
    assert learner.state.rounds.clean == 1
    before = loop.status()
    assert not loop.tick() and loop.status() == before
    loop.close()
    quiet = IdleLoop(learner, Engine(), consolidate=False, clock=Clock())
    quiet.submit(_sample(4))
    _finish(quiet)
    assert len(learner.state.unrehearsed()) == 1
    quiet.close()


def test_an_id_is_learned_once_however_often_it_is_brought(make: MakeLearner) -> None:
    learner = make()
    loop = IdleLoop(learner, Engine(), consolidate=False, clock=Clock())
    first = loop.submit(_sample(0, id="a"))
    waiting = loop.submit(_sample(0, id="a"))
    _finish(loop)
    after = loop.submit(_sample(0, id="a"))
    assert [future.result(timeout=0).status for future in (first, waiting, after)] == ["learned", "skipped", "skipped"]
    assert learner.state.counters.learned == 1
    kept = loop.submit(_sample(1, id="b", label=False))
    _finish(loop)
    assert kept.result(timeout=0).status == "quarantined"
    loop.close()
    work = learner.step(_sample(2, id="c"))
    next(work)
    work.close()
    assert learner.learn_one(_sample(2, id="c")).status == "learned"
    assert learner.state.counters.learned == 2


def test_what_a_guard_refused_before_is_rejected_as_everywhere(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make()
    loop = IdleLoop(learner, Engine(), consolidate=False, clock=Clock())
    with monkeypatch.context() as patch:
        patch.setattr(learner._updater.judge, "_vocabulary", 1.0001)
        first = loop.submit(_sample(0, id="a"))
        _finish(loop)
        assert first.result(timeout=0).status == "rejected"
    again = loop.submit(_sample(0, id="a")).result(timeout=0)
    loop.close()
    assert [again] == learner.learn_batch([_sample(0, id="a")])
    assert again.status == "rejected" and "a guard refused it before" in str(again.reason)


# errors


def test_an_unusable_sample_is_refused_before_it_is_acknowledged(make: MakeLearner) -> None:
    learner = make()
    loop = IdleLoop(learner, Engine(), clock=Clock())
    for sample in (Sample(prompt_ids=(4,), completion_ids=(5000,)), _sample(0, expert="nobody")):
        with pytest.raises(SampleError):
            loop.submit(sample)
    assert learner.pending == 0 and not loop.tick()
    loop.close()


def test_an_error_of_a_unit_goes_to_its_future_and_the_sample_is_tried_again(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, engine, clock = make(), Engine(), Clock()
    loop = IdleLoop(learner, engine, consolidate=False, clock=clock)
    before = learner.state_sha256()
    step = Proposer._step

    def fail(*args: Any) -> Any:
        raise MemoryError("no memory for the update")

    monkeypatch.setattr(Proposer, "_step", fail)
    first, second = loop.submit(_sample(0)), loop.submit(_sample(1))
    _finish(loop)
    with pytest.raises(MemoryError, match="no memory"):
        first.result(timeout=0)
    assert not second.done() and not engine.held
    status = loop.status()
    assert (status.failures, status.pending, status.last_error) == (1, 2, "MemoryError: no memory for the update")
    assert learner.state_sha256() == before and engine.versions == []
    # not at once, and ever more seldom
    clock.now += 0.4
    assert not loop.tick()
    clock.now += 0.2
    _finish(loop)
    assert loop.status().failures == 2
    monkeypatch.setattr(Proposer, "_step", step)
    clock.now += 0.9
    assert not loop.tick()
    clock.now += 0.2
    _finish(loop)
    assert second.result(timeout=0).status == "learned"
    assert learner.pending == 0 and learner.state.counters.learned == 2
    loop.close()


def test_a_version_that_could_not_be_announced_is_announced_before_anything_else(make: MakeLearner) -> None:
    learner, engine, clock = make(), Engine(), Clock()
    loop = IdleLoop(learner, engine, consolidate=False, clock=clock)

    def fail() -> None:
        raise OSError("the cache does not answer")

    engine.on_change = fail
    first, second = loop.submit(_sample(0)), loop.submit(_sample(1))
    _finish(loop)
    assert first.result(timeout=0).status == "learned" and learner.version == 2
    units = loop.status().units
    clock.now += 1.0
    _finish(loop)
    assert (loop.status().units, loop.status().failures, engine.versions) == (units, 2, [])
    engine.on_change = lambda: None
    clock.now += 2.0
    _finish(loop)
    assert second.done() and engine.versions == [2, 3]
    loop.close()


def test_an_engine_that_fails_stops_no_loop(make: MakeLearner) -> None:
    engine, clock = Engine(), Clock()
    loop = IdleLoop(make(), engine, clock=clock)

    def gone() -> None:
        raise RuntimeError("the engine is gone")

    engine.in_unit = gone
    future = loop.submit(_sample(0))
    assert not loop.tick() and loop.status().last_error == "RuntimeError: the engine is gone"
    call = loop.call(lambda learner: learner.version)
    loop.tick()
    with pytest.raises(RuntimeError, match="gone"):
        call.result(timeout=0)
    engine.in_unit = lambda: None
    clock.now += 10.0
    _finish(loop)
    assert future.result(timeout=0).status == "learned"
    loop.close()


# other uses of the learner


def test_calls_go_first_and_abort_what_is_half_way(make: MakeLearner) -> None:
    learner, engine = make(), Engine()
    loop = IdleLoop(learner, engine, consolidate=False, clock=Clock())
    version = learner.version
    loop.submit(_sample(0))
    _finish(loop)
    late = loop.submit(_sample(1))
    loop.tick()
    engine.idle = False  # a call does not wait for idleness, but for the lock
    engine.busy = True
    rolled = loop.call(lambda learner: learner.rollback(version))
    assert not loop.tick() and not rolled.done()
    engine.busy = False
    assert loop.tick()
    assert rolled.result(timeout=0) is None and loop.status().aborted == 1
    assert engine.versions[-1] == learner.version > version
    # the rollback applied it before it undid it
    assert late.result(timeout=0).status == "learned" and learner.pending == 0
    failed = loop.call(lambda learner: learner.rollback(-1))
    loop.tick()
    with pytest.raises(ConfigError, match="no version"):
        failed.result(timeout=0)
    loop.close()


def test_a_driven_learner_refuses_everybody_else(make: MakeLearner) -> None:
    learner = make()
    loop = IdleLoop(learner, Engine(), clock=Clock())
    loop.submit(_sample(0))
    loop.tick()
    for change in (lambda: learner.learn_one(_sample(1)), learner.drain, lambda: learner.add_expert("other"),
                   learner.save_state, learner.close):
        with pytest.raises(StateError, match="IdleLoop"):
            change()
    with pytest.raises(StateError, match="another IdleLoop"):
        IdleLoop(learner, Engine())
    refused: list[BaseException] = []

    def elsewhere() -> None:
        try:
            learner.drain()
        except StateError as error:
            refused.append(error)

    def from_another_thread(learner: StreamLearner) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    loop.call(from_another_thread)
    loop.tick()
    assert len(refused) == 1
    loop.close()
    assert learner.learn_one(_sample(1)).status == "learned"


# the end


def test_closed_half_way_the_sample_is_learned_when_the_state_is_loaded(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
) -> None:
    learner, plain = make(tmp_path / "state"), make(tmp_path / "plain")
    loop = IdleLoop(learner, Engine(), clock=Clock())
    future, call = loop.submit(_sample(0)), None
    for _ in range(3):
        loop.tick()
    call = loop.call(lambda learner: learner.version)
    loop.close()
    loop.close()
    with pytest.raises(StateError, match="learned when the state is loaded"):
        future.result(timeout=0)
    with pytest.raises(StateError, match="before it answered"):
        call.result(timeout=0)
    for late in (lambda: loop.submit(_sample(1)), lambda: loop.call(lambda learner: None), loop.start):
        with pytest.raises(StateError, match="closed"):
            late()
    assert not loop.tick()
    assert (learner.pending, loop.status().aborted) == (1, 1)
    learner.close()
    plain.learn_one(_sample(0))
    again = StreamLearner.load_state(tmp_path / "state", _model(tiny_model))
    assert again.state_sha256() == plain.state_sha256()
    again.close()


@pytest.mark.parametrize("driven", ["by its thread", "by ticks"])
def test_the_thread_that_learns_cannot_close_it_and_another_can(make: MakeLearner, driven: str) -> None:
    learner = make()
    loop = IdleLoop(learner, Engine(), consolidate=False)
    refused: list[BaseException] = []

    def close(_: object) -> None:
        try:
            loop.close()
        except BaseException as error:
            refused.append(error)

    submitted, called = loop.submit(_sample(0)), loop.call(close)
    submitted.add_done_callback(close)
    if driven == "by its thread":
        loop.start()
    else:
        # not in this one, which would hang where it waits for itself
        ticking = threading.Thread(target=_finish, args=(loop,), daemon=True)
        ticking.start()
        ticking.join(timeout=60)
        assert not ticking.is_alive()
    called.result(timeout=60)
    assert submitted.result(timeout=60).status == "learned"
    # nothing is half closed
    again = loop.submit(_sample(1))
    if driven == "by ticks":
        _finish(loop)
    assert again.result(timeout=60).status == "learned"
    loop.close()
    assert [str(error) for error in refused] == 2 * ["this thread drives the idle loop: close it from another one"]
    assert all(isinstance(error, StateError) for error in refused)
    assert learner.learn_one(_sample(2)).status == "learned"
    learner.close()


def test_what_is_submitted_is_on_disk_before_anybody_is_told(make: MakeLearner, tmp_path: Path) -> None:
    learner = make(tmp_path / "state")
    loop = IdleLoop(learner, Engine(), clock=Clock())
    synced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        sync = Journal.sync

        def recorded(journal: Journal) -> Any:
            done = sync(journal)
            synced.append(journal.last_seq)
            return done

        patch.setattr(Journal, "sync", recorded)
        loop.submit(_sample(0))
        assert synced == [learner.queue.oldest]
    loop.close()


def test_its_own_thread_learns_what_many_threads_submit(make: MakeLearner) -> None:
    learner = make()
    with IdleLoop(learner, Engine()) as loop:
        with pytest.raises(StateError, match="thread already"):
            loop.start()
        statuses: list[str] = []

        def submit(first: int) -> None:
            for seed in range(first, first + 5):
                statuses.append(loop.submit(_sample(seed, id=str(seed))).result(timeout=60).status)

        threads = [threading.Thread(target=submit, args=(5 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loop.call(lambda learner: learner.state.counters.learned).result(timeout=60) == 20
    assert statuses == ["learned"] * 20
    assert learner.pending in (0, 1)
