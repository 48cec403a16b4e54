"""A time budget under clocks that tests set: what is chosen is journaled, and recovery elsewhere repeats it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.kernels import dispatch
from ogpstream.learner import ConfigError, IdleLoop, LearnerConfig, LoopEngine, Sample, SampleReport, StreamLearner
from ogpstream.learner.certificate import DriftMeter
from ogpstream.learner.pacer import Stopwatch

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]

LAYERS = 3
SITES = 7  # of a layer


class Machine:
    """Its clock stands still but in the backward of an adapted linear, and where a test moves it.

    A layer's backward takes 7 us a token, and its forward half of that.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.speed = 0.0, 1.0
        for name, cost in (("lora_forward", 0.5e-6), ("lora_backward_samples", 1e-6)):
            patch.setattr(dispatch, name, self._timed(getattr(dispatch, name), cost))

    def _timed(self, real: Callable[..., Any], cost: float) -> Callable[..., Any]:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.now += cost * len(x) / self.speed
            return real(x, *args, **kwargs)

        return call

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def machine() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        yield Machine(patch)


@pytest.fixture
def make(tiny_model: TinyModel, machine: Machine) -> Iterator[MakeLearner]:
    made: list[StreamLearner] = []

    def make_learner(state_dir: Path | None = None, *, budget: float | None = None, load: bool = False, **changes: Any
                     ) -> StreamLearner:
        values: dict[str, Any] = dict(rank=3, lr=0.02, basis_columns=8, learned_below=6.0, learned_share=0.0,
                                      warm_samples=2, warm_tokens=8, restart_after=4, rehearsals=1)
        model = tiny_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=256)
        if load:
            assert state_dir is not None
            learner = StreamLearner.load_state(state_dir, model)
        else:
            learner = StreamLearner(model, config=LearnerConfig(**{**values, **changes}), state_dir=state_dir)
        learner.queue.applier.pacer.watch = Stopwatch(torch.device("cpu"), machine)
        learner.update_budget_ms = budget
        made.append(learner)
        return learner

    yield make_learner
    for learner in made:
        learner.queue.reserved_for = None
        learner.close()


def _sample(seed: int, prompt: int = 100, completion: int = 6) -> Sample:
    ids = torch.randint(4, 101, (prompt + completion,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:prompt]), completion_ids=tuple(ids[prompt:]), id=f"{seed}")


def _ms(tokens: int, layers: int) -> float:
    """Of an update that keeps every graph."""
    return SITES * 1e-3 * tokens * (0.5 * LAYERS + layers)


# the choice


@pytest.mark.parametrize(
    ("budget", "tokens", "layers"),
    [(_ms(106, 3) * 1.12, 106, 3), (_ms(86, 3) * 1.12, 86, 3), (_ms(70, 3) * 1.12, 70, 3), (_ms(70, 2) * 1.12, 70, 2),
     (_ms(70, 1) * 1.12, 70, 1), (_ms(22, 1) * 1.12, 22, 1), (0.001, 7, 1)],
)  # fmt: skip
def test_an_update_fits_its_budget_and_says_how(
    make: MakeLearner, caplog: pytest.LogCaptureFixture, budget: float, tokens: int, layers: int
) -> None:
    learner = make(budget=budget)
    with caplog.at_level(logging.WARNING):
        reports = [learner.learn_one(_sample(seed)) for seed in range(2)]
    for report in reports:
        assert (report.status, report.tokens, report.cut) == ("learned", tokens, 106 - tokens)
        assert report.pace is not None
        assert (report.pace.tokens, report.pace.layers, report.pace.depth) == (tokens, layers, LAYERS)
        # the least measured is of 16 tokens
        assert report.pace.predicted_ms == pytest.approx(_ms(max(16, tokens), layers), rel=1e-6)
        assert report.pace.actual_ms == pytest.approx(_ms(tokens, layers), rel=1e-6)
        assert report.pace.budget_ms == budget
    # where not even the least fits it is made all the same, and told once
    told = [record.getMessage() for record in caplog.records if "fits in no way" in record.getMessage()]
    assert len(told) == (budget == 0.001)


def test_no_measurement_is_longer_than_a_unit_of_the_longest_sample(make: MakeLearner, machine: Machine) -> None:
    learner = make(budget=1e3)

    def units() -> Iterator[tuple[str, float]]:
        before = machine.now
        for unit in learner.step(_sample(0, prompt=250)):
            yield unit, machine.now - before
            before = machine.now

    took = list(units())
    longest = max(seconds for unit, seconds in took if unit != "probe")
    # the backward of a layer
    assert longest == pytest.approx(SITES * 1e-6 * 256)
    assert max(seconds for unit, seconds in took if unit == "probe") <= longest * (1 + 1e-9)


def test_pauses_between_units_do_not_count(make: MakeLearner, machine: Machine) -> None:
    learner = make(budget=1e3)
    for seed in range(2):
        work = learner.step(_sample(seed))
        units = []
        while True:
            try:
                units.append(next(work))
            except StopIteration as end:
                report: SampleReport = end.value
                break
            machine.now += 100.0
        assert ("probe" in units) == (seed == 0)
        assert report.pace is not None and report.tokens == 106
        assert report.pace.actual_ms == pytest.approx(_ms(106, LAYERS), rel=1e-6)
        assert report.pace.predicted_ms == pytest.approx(_ms(106, LAYERS), rel=1e-6)


def test_it_follows_a_machine_that_becomes_slower(make: MakeLearner, machine: Machine) -> None:
    learner = make(budget=_ms(106, 3) * 1.12, settled_below=0.0)
    assert [learner.learn_one(_sample(seed)).tokens for seed in range(2)] == [106, 106]
    machine.speed = 0.75
    paces = [learner.learn_one(_sample(seed)).pace for seed in range(2, 11)]
    # once more than half of the latest updates were slow
    late = [pace for pace in paces if pace is not None][-4:]
    assert all(pace.actual_ms <= pace.budget_ms and 70 <= pace.tokens < 90 for pace in late)


def test_old_samples_in_the_same_update_count_and_stay_whole_in_the_ring(make: MakeLearner) -> None:
    learner = make(budget=_ms(2 * 80, 3) * 1.12)
    learner.learn_batch([_sample(0)])
    (report,) = learner.learn_batch([_sample(1)])
    # a prompt of 64 ids and its completion, of both
    assert report.pace is not None and (report.tokens, report.pace.layers) == (70, 3)
    assert report.pace.actual_ms == pytest.approx(_ms(140, 3), rel=1e-6)
    ring = learner.state.ring
    assert [len(ring.get(slot).ids) for slot in range(2)] == [106, 106]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_that_is_none_is_refused(make: MakeLearner, budget: float) -> None:
    learner = make()
    with pytest.raises(ConfigError, match="update_budget_ms"):
        learner.update_budget_ms = budget
    with pytest.raises(ConfigError, match="update_budget_ms"):
        IdleLoop(learner, LoopEngine(), update_budget_ms=budget)
    # nothing was reserved
    assert learner.learn_one(_sample(0)).pace is None


# the state


def _stream(learner: StreamLearner) -> None:
    for seed in range(3):
        learner.learn_one(_sample(seed))
    learner.learn_batch([_sample(seed, 20 * seed) for seed in range(4, 8)])
    learner.consolidate(5)
    learner.learn_one(_sample(9))


def test_without_a_budget_and_with_a_large_one_nothing_differs(make: MakeLearner, machine: Machine) -> None:
    states = []
    for budget in (None, 1e6):
        learner = make(budget=budget)
        _stream(learner)
        states.append(learner.state_sha256())
    machine.speed = 1e-3
    learner = make()
    _stream(learner)
    assert learner.state_sha256() == states[0] == states[1]
    limited = make(budget=1.0)
    _stream(limited)
    assert limited.state_sha256() != states[0]


@pytest.mark.parametrize("snapshot_every", [100, 4])
def test_recovery_on_another_machine_repeats_what_was_chosen(
    make: MakeLearner, machine: Machine, tmp_path: Path, snapshot_every: int
) -> None:
    learner = make(tmp_path, budget=2.0, snapshot_every=snapshot_every)
    _stream(learner)
    machine.speed = 0.8
    learner.learn_batch([_sample(seed) for seed in range(20, 23)])
    state = learner.state_sha256()
    records = [record for record in learner._applier.folder.kept(0) if record["kind"] == "pace"]
    assert len({(record["prompt"], record["layers"]) for record in records}) > 1
    assert len({record["layers"] for record in records}) > 1
    learner.close()
    machine.speed = 1e-6
    again = make(tmp_path, load=True)
    assert (again.pending, again.state_sha256()) == (0, state)


def test_killed_at_any_unit_it_goes_on_with_what_was_chosen(
    make: MakeLearner, machine: Machine, tmp_path: Path
) -> None:
    whole = make(tmp_path / "whole", budget=1.0)
    whole.learn_one(_sample(0))
    units = list(whole.step(_sample(1)))
    state, first = whole.state_sha256(), units.index("plan")
    for stop in range(first + 1, len(units) + 1, 3):
        machine.speed = 1.0
        learner = make(tmp_path / f"{stop}", budget=1.0)
        learner.learn_one(_sample(0))
        work = learner.step(_sample(1))
        assert [next(work) for _ in range(stop)] == units[:stop]
        # before anything is computed with it, the choice is in the journal
        *_, last = learner._applier.folder.records(0)
        assert (last["kind"], last["of"]) == ("pace", last["seq"] - 1)
        work.close()
        learner.close()
        machine.speed = 1e6
        again = make(tmp_path / f"{stop}", load=True, budget=1.0)
        assert (again.pending, again.state_sha256()) == (0, state)


def test_an_aborted_update_keeps_its_choice(make: MakeLearner, machine: Machine) -> None:
    whole, learner = make(budget=1.0), make(budget=1.0)
    expected = whole.learn_one(_sample(0))
    work = learner.step(_sample(0))
    assert next(unit for unit in work if unit == "forward")
    work.close()
    machine.speed = 1e6
    report = learner.drain()
    assert isinstance(report, SampleReport) and (report.tokens, report.cut) == (expected.tokens, expected.cut)
    assert learner.state_sha256() == whole.state_sha256()


def test_what_is_protected_does_not_move_by_updates_of_the_top_layers(make: MakeLearner) -> None:
    learner = make(budget=_ms(2 * 70, 1) * 1.12, basis_columns=12, warm_energy=0.5, warm_share=0.3)
    meter = DriftMeter(learner.state.protection, learner.state.store)
    before = learner.state.protection.columns
    for seed in range(8):
        learner.learn_batch([_sample(seed)])
        learner.update_budget_ms = None if seed % 3 == 1 else _ms(2 * 70, 1 + seed % 2) * 1.12
        learner.consolidate(1)
        meter.mark()
    assert learner.state.protection.columns > before + 8
    assert 0 < meter.drift().guarantee <= 1e-6


# the idle loop


def test_an_idle_loop_has_500_ms_until_it_is_closed(make: MakeLearner, machine: Machine) -> None:
    learner = make(budget=7.0)
    loop = IdleLoop(learner, LoopEngine(), clock=machine)
    assert learner.update_budget_ms == 500
    future = loop.submit(_sample(0))
    machine.speed = _ms(106, 3) / 400
    while loop.tick():
        pass
    report = future.result(timeout=0)
    assert report.pace is not None and (report.tokens, report.pace.budget_ms) == (106, 500)
    machine.speed /= 2
    reports = []
    for seed in range(1, 5):
        future = loop.submit(_sample(seed))
        while loop.tick():
            pass
        reports.append(future.result(timeout=0))
    assert reports[-1].pace is not None and reports[-1].tokens < 106 and reports[-1].pace.actual_ms <= 500
    loop.close()
    assert learner.update_budget_ms == 7.0
    free = IdleLoop(learner, LoopEngine(), update_budget_ms=None, clock=machine)
    future = free.submit(_sample(9))
    while free.tick():
        pass
    assert future.result(timeout=0).pace is None
    free.close()
