"""Which old samples come back in idle time: of some by chance, those that the model knows least by then."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from ogpstream.learner import IdleLoop, LearnerConfig, RehearsalReport, Sample, StreamLearner, recall, update
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.rounds import LOOK, ROUNDS
from ogpstream.learner.step import Reading, sample_readings
from ogpstream.memory.units import exhausted

MakeLearner = Callable[..., StreamLearner]


def _sample(seed: int, length: int = 4) -> Sample:
    draw = random.Random(seed)
    ids = [draw.randrange(1, 90) for _ in range(6 + length)]
    return Sample(prompt_ids=ids[:6], completion_ids=ids[6:])


def _loss(model: tf.PreTrainedModel, ids: list[int], prompt_length: int) -> tuple[float, float]:
    """(Loss, share of tokens over half of the probability) by the model's own forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, prompt_length - 1 : -1]
    target = torch.tensor(ids[prompt_length:])
    likely = logits.softmax(-1).gather(1, target[:, None]) > 0.5
    return float(F.cross_entropy(logits, target)), float(likely.float().mean())


@pytest.mark.parametrize("chunk", [2, 128])
def test_a_look_reads_what_the_model_says(tiny_model: Callable[..., tf.PreTrainedModel], chunk: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        # sure of everything, so that some of what follows is known
        model.lm_head.weight.mul_(100)
    learner = StreamLearner(model, None, LearnerConfig(rank=3, lr=0.02, warm_start=False, served_to="all"))
    learner.learn_batch([_sample(seed) for seed in range(3)])
    samples = [([*sample.prompt_ids, *sample.completion_ids], 6) for sample in (_sample(n, 3 + n) for n in range(4))]
    known = model.generate(torch.tensor([samples[0][0][:6]]), max_new_tokens=4, do_sample=False)[0].tolist()
    samples.append((known, 6))
    before, updater = learner.state_sha256(), learner._updater
    readings = exhausted(sample_readings(updater.walk, learner.attachment.binding, samples, chunk=chunk))
    for (ids, prompt_length), reading in zip(samples, readings, strict=True):
        loss, certain = _loss(model, ids, prompt_length)
        assert reading.loss == pytest.approx(loss, rel=1e-4, abs=1e-5) and reading.certain == pytest.approx(certain)
    assert readings[-1].certain > 0.5 > readings[0].certain
    assert learner.state_sha256() == before
    learner.close()


class _Watched:
    """The lessons of every look and of every update after it."""

    def __init__(self, learner: StreamLearner, patch: pytest.MonkeyPatch) -> None:
        updater = learner._updater
        self.looked: list[list[list[int]]] = []
        self.trained: list[list[list[int]]] = []
        for name, place in (("look", self.looked), ("run", self.trained)):
            patch.setattr(updater, name, self._noting(getattr(updater, name), place))

    @staticmethod
    def _noting(real: Callable[..., Any], place: list[list[list[int]]]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            lessons: Sequence[Lesson] = args[0] if isinstance(args[0], list) else args[1]
            place.append([list(lesson.ids) for lesson in lessons])
            return real(*args)

        return noted


@pytest.fixture(autouse=True)
def small_rings_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "EACH", 1)


def _taught(make: MakeLearner, count: int = 12, **changes: Any) -> StreamLearner:
    learner = make(rehearsals=0, replay_every=0, **changes)
    learner.learn_batch([_sample(seed) for seed in range(count)])
    learner.consolidate()
    return learner


def test_idle_time_goes_to_what_is_known_least(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = _taught(make, rehearsal_candidates=5, rehearsal_batch=2)
    watched = _Watched(learner, monkeypatch)
    for _ in range(4):
        model = learner.model
        known = {tuple(slot.ids.tolist()): _loss(model, slot.ids.tolist(), slot.prompt_length)[0]
                 for slot in map(learner.state.ring.get, learner.state.ring.slots)}
        learner.consolidate(1)
        looked = watched.looked[-1]
        assert len(looked) == len({tuple(ids) for ids in looked}) == 5
        assert watched.trained[-1] == sorted(looked, key=lambda ids: -known[tuple(ids)])[:2]
    assert len(watched.looked) == 4
    # and not the same ones always
    assert len({tuple(ids) for looked in watched.looked for ids in looked}) > 5


def test_without_candidates_samples_come_back_by_chance(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    for candidates in (0, 2):
        learner = _taught(make, rehearsal_candidates=candidates, rehearsal_batch=2)
        watched = _Watched(learner, monkeypatch)
        first = learner.queue.applier.recall.draw(1)
        both = first + learner.queue.applier.recall.draw(1, expert="default", but=first)
        learner.consolidate(1)
        assert watched.trained == [[slot.ids.tolist() for slot in both]] and not watched.looked


def test_what_waits_for_its_first_rehearsal_comes_first(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(rehearsals=0, replay_every=0, rehearsal_candidates=3)
    learner.learn_batch([_sample(seed) for seed in range(3)])
    watched = _Watched(learner, monkeypatch)
    learner.consolidate()
    assert [len(lessons) for lessons in watched.trained] == [1, 1, 1] and not watched.looked


def test_no_more_is_looked_at_than_one_sample_may_have(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "LOOKED", 35)
    learner = _taught(make, rehearsal_candidates=8, rehearsal_batch=2)
    # of ten tokens each
    assert len(learner.queue.applier.recall.candidates(2)) == 3
    # what is rehearsed anyway is there however long it is
    assert len(learner.queue.applier.recall.candidates(5)) == 5


def test_few_of_a_ring_are_looked_at(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = _taught(make, rehearsal_candidates=8)
    for each, looked in ((1, 8), (2, 6), (4, 3), (24, 2)):
        monkeypatch.setattr(recall, "EACH", each)
        assert len(learner.queue.applier.recall.candidates(2)) == looked


@pytest.mark.parametrize("routing", ["named", "prompt"])
def test_rehearsal_leaves_who_is_served_as_it_was_told(make: MakeLearner, monkeypatch: pytest.MonkeyPatch, routing: str
                                                       ) -> None:
    learner = _taught(make, rehearsal_candidates=5, routing=routing)
    learner.add_expert("other")
    learner.learn_batch([replace(_sample(seed), expert="other") for seed in range(20, 26)])
    learner.activate({"other": 0.5})
    watched = _Watched(learner, monkeypatch)
    learner.consolidate(6)
    learner.consolidate()
    learner.refresh()
    assert learner.state.store.active == {"other": 0.5} and learner.state.store.served.experts == ("other",)
    others = [[*one.prompt_ids, *one.completion_ids] for one in map(_sample, range(20, 26))]
    assert watched.trained and all(ids in others for lessons in watched.trained for ids in lessons)
    # what it left out comes when it is served again
    learner.activate({"default": 1.0})
    learner.consolidate(2)
    assert any(ids not in others for ids in watched.trained[-1])


def test_a_consolidation_that_is_aborted_anywhere_ends_in_the_same_state(make: MakeLearner) -> None:
    whole, learner = (_taught(make, rehearsal_candidates=5) for _ in range(2))
    whole.consolidate(3)
    learner.accept_rehearsal(3)
    draw, units = random.Random(0), []
    while learner.pending:
        work: Iterator[str] = learner.queue.drain()
        for unit in work:
            units.append(unit)
            if draw.random() < 0.1:
                break
        work.close()
    assert "look" in units
    assert learner.state_sha256() == whole.state_sha256()


def test_without_memory_to_look_chance_decides_and_recovery_repeats_it(
    make: MakeLearner, tiny_model: Callable[..., tf.PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner = _taught(make, state_dir=tmp_path / "state", rehearsal_candidates=5)
    drawn = learner.queue.applier.recall.candidates(2)
    watched = _Watched(learner, monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(update, "sample_readings", full)
        learner.consolidate(1)
    assert watched.trained == [[slot.ids.tolist() for slot in drawn[:2]]]
    assert "5 old samples" in caplog.text and learner.queue.applier.updater.out_of_memory == 1
    learner.consolidate(1)
    state = learner.state_sha256()
    learner.close()
    # where there is memory
    again = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=1))
    assert again.state_sha256() == state
    again.close()


# going round the ring

@pytest.fixture
def sharp(tiny_model: Callable[..., tf.PreTrainedModel]) -> Callable[..., StreamLearner]:
    """Learners of a model that can be sure of something after a few updates."""
    def make_sharp(state_dir: Path | None = None, load: bool = False, **changes: Any) -> StreamLearner:
        model = tiny_model("llama", num_hidden_layers=1)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        if load:
            assert state_dir is not None
            return StreamLearner.load_state(state_dir, model)
        values: dict[str, Any] = dict(rank=3, lr=0.01, served_to="all", basis_columns=16, warm_start=False,
                                      learned_below=1.0, learned_share=0.5, settled_below=0.0, restart_after=0,
                                      rehearsals=0, replay_every=0)
        return StreamLearner(model, None, LearnerConfig(**{**values, **changes}), state_dir=state_dir)

    return make_sharp


def _known(learner: StreamLearner) -> list[bool]:
    ring = learner.state.ring
    found = (_loss(learner.model, ring.get(slot).ids.tolist(), ring.get(slot).prompt_length) for slot in ring.slots)
    return [loss < 1.0 and certain >= 0.5 for loss, certain in found]


def _short(seed: int) -> Sample:
    return Sample(prompt_ids=[seed + 1, 2 * seed + 3, 50 - seed], completion_ids=[seed + 60])


def test_a_refresh_ends_when_all_is_known(sharp: MakeLearner) -> None:
    learner = sharp()
    learner.learn_batch([_short(seed) for seed in range(10)])
    learner.consolidate()
    count = len(learner.state.ring)
    # more than one part
    assert not all(_known(learner)) and count > LOOK
    report = learner.refresh()
    assert report.updates > 0 and (report.looked, report.known) == (count, count)
    assert all(_known(learner))
    # and there is nothing left to do
    state = learner.state_sha256()
    assert learner.refresh() == RehearsalReport(0, learner.version) and learner.state_sha256() == state


def test_each_look_of_a_refresh_goes_to_the_worst_that_is_forgotten(sharp: MakeLearner, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    learner = sharp(rehearsal_batch=2)
    learner.learn_batch([_short(seed) for seed in range(10)])
    learner.consolidate()
    watched = _Watched(learner, monkeypatch)
    ring = learner.state.ring
    for part in (0, 1, 0, 1):
        slots = [ring.get(slot) for slot in ring.slots[8 * part : 8 * part + 8]]
        read = [(_loss(learner.model, slot.ids.tolist(), slot.prompt_length), slot.ids.tolist()) for slot in slots]
        forgotten = sorted((-loss, ids) for (loss, certain), ids in read if loss >= 1.0 or certain < 0.5)
        assert learner.accept_refresh()
        report = learner.drain()
        assert isinstance(report, RehearsalReport)
        assert watched.looked[-1] == [ids for _, ids in read]
        assert (report.looked, report.known) == (len(slots), len(slots) - len(forgotten))
        if forgotten:
            assert watched.trained.pop() == [ids for _, ids in forgotten[:2]]
        assert not watched.trained and report.updates == bool(forgotten)


def test_a_refresh_restarts_no_expert(sharp: MakeLearner) -> None:
    learner = sharp(restart_after=1, restart_loss=1.0)
    learner.learn_batch([_short(seed) for seed in range(10)])
    learner.consolidate()
    expert = learner.state.store.expert("default")
    started, steps = expert.started, expert.steps
    assert started > 0
    assert learner.refresh().updates > 0
    assert expert.started == started and expert.steps > steps


def test_what_cannot_be_learned_is_not_rehearsed_for_ever(sharp: MakeLearner) -> None:
    learner = sharp(learned_below=1e-9)
    learner.learn_batch([_short(seed) for seed in range(3)])
    learner.consolidate()
    report = learner.refresh()
    assert (report.updates, report.looked, report.known) == (ROUNDS, 3, 0)
    assert not learner.accept_refresh()
    learner.learn_batch([_short(7)])
    assert learner.accept_refresh()


def test_a_refresh_that_is_aborted_anywhere_ends_in_the_same_state(sharp: MakeLearner, tmp_path: Path) -> None:
    whole, learner = (sharp(folder, snapshot_every=3)
                      for folder in (None, tmp_path / "state"))
    for one in (whole, learner):
        one.learn_batch([_short(seed) for seed in range(10)])
        one.consolidate()
    whole.refresh()
    draw, units = random.Random(0), []
    while learner.accept_refresh():
        while learner.pending:
            work = learner.queue.drain()
            for unit in work:
                units.append(unit)
                if draw.random() < 0.05:
                    break
            work.close()
    assert {"look", "writes", "publish"} <= set(units)
    assert learner.state_sha256() == whole.state_sha256()
    learner.close()
    again = sharp(tmp_path / "state", load=True)
    assert again.state_sha256() == whole.state_sha256()
    again.close()


class Always:
    """An engine that is never busy."""

    def is_idle(self) -> bool:
        return True

    def exclusive(self) -> Any:
        return nullcontext()

    def adapter_changed(self, version: int) -> None:
        pass


def test_an_idle_loop_refreshes_until_all_is_known(sharp: MakeLearner) -> None:
    learner = sharp()
    loop = IdleLoop(learner, Always(), update_budget_ms=None)
    futures = [loop.submit(_short(seed)) for seed in range(6)]
    while loop.tick():
        pass
    loop.close()
    assert all(future.done() for future in futures)
    assert len(learner.state.ring) > 3 and all(_known(learner))


def test_a_round_is_over_for_the_experts_that_are_served(sharp: MakeLearner) -> None:
    learner = sharp()
    learner.learn_batch([_short(seed) for seed in range(10)])
    learner.consolidate()
    learner.add_expert("other")
    learner.activate({"other": 1.0})
    assert learner.refresh().looked == 0 and not learner.accept_refresh()
    learner.activate({"default": 1.0})
    report = learner.refresh()
    assert report.updates > 0 and report.known == report.looked == len(learner.state.ring)


def test_a_shortage_of_memory_ends_a_refresh_and_is_not_taken_for_knowledge(
    sharp: MakeLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = sharp(tmp_path / "state")
    learner.learn_batch([_short(seed) for seed in range(10)])
    learner.consolidate()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(update, "sample_readings", full)
        for _ in range(2):
            assert learner.accept_refresh()
            report = learner.drain()
            assert isinstance(report, RehearsalReport) and (report.updates, report.looked) == (0, 0)
    # there is memory again
    report = learner.refresh()
    assert report.updates > 0 and report.known == len(learner.state.ring)
    with monkeypatch.context() as patch:
        patch.setattr(update, "sample_readings", full)
        learner.learn_batch([_short(11)])
        assert learner.refresh().looked == 0 and learner.queue.applier.updater.out_of_memory < 20
    state = learner.state_sha256()
    learner.close()
    again = sharp(tmp_path / "state", load=True)
    assert again.state_sha256() == state
    again.close()


def test_what_an_update_would_not_move_is_not_rehearsed(sharp: MakeLearner) -> None:
    """Settled by its loss, though one of its tokens is not sure; and what no update may be made of."""
    learner = sharp(learned_share=1.0)
    judge, rehearsals = learner._updater.judge, learner.queue.applier._rehearsals
    rehearsals._config = replace(rehearsals._config, settled_below=0.5)
    assert rehearsals._is_forgotten(Reading(0.6, 0.5)) and rehearsals._is_forgotten(Reading(2.0, 0.0))
    assert not rehearsals._is_forgotten(Reading(0.4, 0.5))
    assert not rehearsals._is_forgotten(Reading(float("nan"), 0.0)) and judge.refusal(1e3, 0.0)
    assert not rehearsals._is_forgotten(Reading(1e3, 0.0))


def test_only_what_changes_the_model_begins_a_new_round(sharp: MakeLearner) -> None:
    learner = sharp(learned_below=1e-9)
    learner.learn_batch([_short(seed) for seed in range(3)])
    learner.refresh()
    learner.learn_batch([Sample(prompt_ids=[1], completion_ids=[2], label=False)])
    assert not learner.accept_refresh()
    learner.learn_batch([_short(7)])
    assert learner.refresh().updates >= ROUNDS - 1
