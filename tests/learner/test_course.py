"""Steps in turn: what comes of them is a part of the way that single steps go, one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ogpstream.learner import Sample, StreamLearner
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.report import Update
from ogpstream.memory.units import exhausted

MakeLearner = Callable[..., StreamLearner]

PROMPT = 4
SLABS = ("exp_avg", "exp_avg_sq")


def _ids(seed: int) -> list[int]:
    ids: list[int] = torch.randint(4, 101, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _lesson(seed: int, *, again: bool) -> Lesson:
    return Lesson(_ids(seed), PROMPT, again=again)


def _taught(make: MakeLearner, **changes: Any) -> StreamLearner:
    # nothing is learned, so P does not grow; the anchor fades at every step
    learner = make(**{"learned_below": 1e-6, "warm_start": True, **changes})
    for seed in range(4):
        learner.learn_one(Sample(prompt_ids=tuple(_ids(seed)[:PROMPT]), completion_ids=tuple(_ids(seed)[PROMPT:])))
    return learner


def _update(learner: StreamLearner, *lessons: Lesson) -> Update:
    return exhausted(learner._updater.run("default", lessons))


def _expert(learner: StreamLearner) -> dict[str, Tensor]:
    expert = learner.state.store.expert("default")
    return {name: getattr(expert, name).clone() for name in ("factors", *SLABS)}


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_it_goes_a_part_of_the_way_of_single_steps(make: MakeLearner, rate: float) -> None:
    new, old, older = (_lesson(seed, again=seed < 10) for seed in (10, 1, 2))
    by_turns, single = _taught(make, turn_rate=rate), _taught(make)
    start, steps = _expert(single), single.state.store.expert("default").steps
    assert all(torch.equal(start[name], slab) for name, slab in _expert(by_turns).items())
    apart = [_update(single, lesson) for lesson in (old, older, new)]
    together = _update(by_turns, new, old, older)
    found, way = _expert(by_turns), _expert(single)
    expected = start["factors"] + rate * (way["factors"] - start["factors"])
    assert torch.allclose(found["factors"], expected, rtol=0, atol=1e-7)
    assert float((found["factors"] - start["factors"]).abs().max()) > 1e-3
    assert all(torch.equal(found[name], way[name]) for name in SLABS)
    assert by_turns.state.store.expert("default").steps == steps + 3
    # told in the order of the lessons, each as it was before its own step
    assert together.losses == (apart[2].losses[0], apart[0].losses[0], apart[1].losses[0])
    assert together.gradient_norms == pytest.approx([apart[place].gradient_norms[0] for place in (2, 0, 1)])


def test_a_single_sample_goes_all_the_way(make: MakeLearner) -> None:
    by_turns, whole = _taught(make, turn_rate=0.25), _taught(make)
    for learner in (by_turns, whole):
        _update(learner, _lesson(10, again=False))
    assert all(torch.equal(slab, _expert(whole)[name]) for name, slab in _expert(by_turns).items())


def test_what_is_served_is_what_came_of_it(make: MakeLearner) -> None:
    learner = _taught(make, turn_rate=0.5)
    _update(learner, _lesson(10, again=False), _lesson(1, again=True))
    expert, store = learner.state.store.expert("default"), learner.state.store
    for index, pack in enumerate(store.served.packs):
        assert torch.equal(pack.A[:, pack.trained["default"]], expert.a(index))
    ids = torch.tensor([_ids(50)])
    with torch.no_grad():
        served = learner.model(input_ids=ids).logits
        learner._updater.publish()
        assert torch.equal(learner.model(input_ids=ids).logits, served)


def test_the_directions_of_all_turns_join(make: MakeLearner) -> None:
    def admitted(**changes: Any) -> int:
        learner = _taught(make, learned_below=100.0, novelty=0.0, **changes)
        return _update(learner, _lesson(1, again=True), _lesson(2, again=True)).admitted

    assert admitted(turn_rate=0.5) == admitted() == 4  # two linears of two inputs


def test_a_new_sample_that_is_refused_takes_the_turns_before_it_back(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _taught(make, turn_rate=0.5)
    judge, ids = learner._updater.judge, _ids(10)
    sha, served = learner.state_sha256(), learner.state.store.served
    seen: list[float] = []

    def refusal(loss: float, norm: float) -> str | None:
        seen.append(loss)
        return "odd" if len(seen) == 2 else None

    monkeypatch.setattr(judge, "refusal", refusal)
    update = _update(learner, Lesson(ids, PROMPT, again=False), _lesson(1, again=True))
    assert update.refusal == "odd" and len(seen) == 2
    assert learner.state_sha256() == sha and learner.state.store.served is served


def test_an_old_sample_that_is_refused_is_left_out(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, other = _taught(make, turn_rate=0.5), _taught(make, turn_rate=0.5)
    calls: list[float] = []
    real = learner._updater.judge.refusal

    def refusal(loss: float, norm: float) -> str | None:
        calls.append(loss)
        return "odd" if len(calls) == 1 else real(loss, norm)

    monkeypatch.setattr(learner._updater.judge, "refusal", refusal)
    update = _update(learner, _lesson(10, again=False), _lesson(1, again=True), _lesson(2, again=True))
    assert update.refusal is None
    _update(other, _lesson(10, again=False), _lesson(2, again=True))
    assert torch.equal(_expert(learner)["factors"], _expert(other)["factors"])


def test_a_course_that_is_dropped_has_changed_nothing(make: MakeLearner) -> None:
    learner = _taught(make, turn_rate=0.5)
    sha, served = learner.state_sha256(), learner.state.store.served
    lessons = [_lesson(10, again=False), _lesson(1, again=True)]
    units = sum(1 for _ in learner._updater.run("default", lessons))
    learner = _taught(make, turn_rate=0.5)
    served = learner.state.store.served
    for stop in range(1, units, 3):
        work = learner._updater.run("default", lessons)
        for _ in range(stop):
            next(work)
        work.close()
        assert learner.state_sha256() == sha and learner.state.store.served is served
