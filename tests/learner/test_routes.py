"""Levels of losses and their drift."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.learner.routes import FITS, KNOWN, LIMIT, SINCE, Routes


def _seen(losses: list[float], routes: Routes | None = None, expert: str = "e") -> Routes:
    routes = routes or Routes("e")
    for number, loss in enumerate(losses):
        routes = routes.saw(expert, loss, number)
    return routes


def _first_drift(losses: list[float]) -> int | None:
    routes = Routes("e")
    for number, loss in enumerate(losses):
        routes = routes.saw("e", loss, number)
        if routes.drifted:
            return number
    return None


def test_a_change_is_noticed_within_a_few_samples_that_are_remembered() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        learned = np.abs(0.4 + 0.4 * rng.standard_normal(100)).tolist()
        changed = np.clip(4.0 + 1.5 * rng.standard_normal(20), 2.0, None).tolist()
        at = _first_drift(learned + changed)
        assert at is not None and 100 <= at < 110
        since = _seen((learned + changed)[: at + 1]).since
        assert set(range(100, at + 1)) <= set(since) and len(since) <= at + 1 - 98


@pytest.mark.parametrize("mean, spread", [(5.0, 1.6), (0.4, 0.5), (2.0, 1.0)], ids=["facts", "learned", "between"])
def test_what_stays_the_same_is_no_drift(mean: float, spread: float) -> None:
    losses = np.abs(mean + spread * np.random.default_rng(1).standard_normal(3000)).tolist()
    assert _first_drift(losses) is None


def test_losses_that_fall_while_a_domain_is_learned_are_no_drift() -> None:
    rng = np.random.default_rng(2)
    losses = [float(5.5 * np.exp(-n / 40) + abs(0.5 * rng.standard_normal())) for n in range(400)]
    assert _first_drift(losses) is None


def test_a_single_odd_sample_is_none() -> None:
    odd = _seen([0.4] * 50 + [60.0, 0.4, 60.0, 60.0])
    assert not odd.drifted and odd.surge > 0 and odd.since
    assert _seen([0.4] * 50 + [60.0] + [0.4] * 12).since == ()


def test_a_drift_does_not_take_its_level_with_it() -> None:
    before, after = _seen([0.4] * 100), _seen([0.4] * 100 + [9.0] * 3)
    assert after.levels["e"][1] < before.levels["e"][1] + 3 * FITS * 1.0 / 32 + 1e-9


def test_of_an_expert_with_few_samples_nothing_is_known() -> None:
    few = _seen([0.1] * (KNOWN - 1))
    assert few.fits("e", 50.0) and few.fits("nobody", 50.0) and _seen([50.0], few).surge == 0
    enough = _seen([0.1], few)
    assert enough.fits("e", 1.0) and not enough.fits("e", 50.0)


def test_each_expert_has_a_level_of_its_own() -> None:
    routes = _seen([5.0] * 40, _seen([0.2] * 40), expert="f")
    assert not routes.drifted and routes.newest == "f"
    assert not routes.fits("e", 5.0) and routes.fits("f", 5.0)
    assert _seen([5.0] * 4, routes, expert="e").drifted and not _seen([5.0] * 4, routes, expert="f").drifted


def test_an_expert_with_few_samples_leaves_a_drift_as_it_is() -> None:
    routes = _seen([0.3] * 40 + [5.0] * 3)
    young = _seen([0.2] * 10, routes, expert="f")
    assert (young.surge, young.since) == (routes.surge, routes.since) and young.surge > 0
    assert young.levels["f"][0] == 10 and "f" not in young.settled


@given(st.lists(st.tuples(st.sampled_from("ef"), st.floats(0, 20)), max_size=100))
def test_it_comes_back_from_json(losses: list[tuple[str, float]]) -> None:
    routes = Routes("e")
    for number, (expert, loss) in enumerate(losses):
        routes = routes.saw(expert, loss, number)
    assert Routes.from_dict(json.loads(json.dumps(routes.to_dict()))) == routes
    assert len(routes.since) <= SINCE and routes.surge >= 0 and routes.drifted == (routes.surge >= LIMIT)
