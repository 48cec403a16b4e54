"""Ranks of losses and their drift."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.learner.routes import KNOWN, LIMIT, RISE, SINCE, SLACK, WELL, WINDOW, Routes


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
        learned = rng.exponential(0.5, 100).tolist()
        changed = (3.0 + rng.exponential(2.0, 20)).tolist()
        at = _first_drift(learned + changed)
        assert at is not None and 100 <= at < 110
        since = _seen((learned + changed)[: at + 1]).since
        assert set(range(100, at + 1)) <= set(since) and len(since) <= at + 1 - 85


def test_the_highest_of_all_reach_the_limit_in_the_least_number() -> None:
    step = math.log(WINDOW + 1) - SLACK
    at = _first_drift([0.1 * (n % 7) for n in range(100)] + [9.0] * 20)
    assert at == 99 + math.ceil(LIMIT / step)


@pytest.mark.parametrize("shape", ["normal", "exponential", "heavy"])
def test_what_stays_the_same_is_no_drift_whatever_its_distribution(shape: str) -> None:
    rng = np.random.default_rng(1)
    losses = {"normal": np.abs(2 + rng.standard_normal(3000)), "exponential": rng.exponential(1.5, 3000),
              "heavy": rng.pareto(1.5, 3000)}[shape]
    assert _first_drift(losses.tolist()) is None


def test_a_drift_that_is_large_is_one_of_ranks() -> None:
    rng = np.random.default_rng(2)
    losses = np.concatenate([rng.exponential(0.5, 100), 2 + rng.exponential(1.0, 30)])
    assert _first_drift(losses.tolist()) == _first_drift((losses**3 + 1).tolist()) is not None


def test_losses_that_creep_are_no_drift_however_certain() -> None:
    rng = np.random.default_rng(3)
    known, later = 0.01 * rng.exponential(1.0, 100), 0.05 + 0.005 * rng.exponential(1.0, 200)
    assert _first_drift([*known.tolist(), *later.tolist()]) is None
    # and are what later ones are judged by
    assert min(_seen([*known.tolist(), *later.tolist()]).settled["e"]) >= 0.05
    assert _first_drift([*known.tolist(), *(later[:20] + RISE).tolist()]) == 105


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_domain_that_comes_among_samples_of_the_old_one_is_noticed(share: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        known, new = 0.4 * rng.exponential(1.0, 400), 4 + rng.exponential(1.0, 400)
        mixed = np.where(rng.random(400) < share, new, known)
        at = _first_drift([*known[:100].tolist(), *mixed[100:].tolist()])
        assert at is not None and at < 200


def test_what_comes_to_two_experts_in_turn_is_noticed_as_soon() -> None:
    routes = _seen([0.4] * 100, expert="f", routes=_seen([0.4] * 100))
    for number in range(6):
        assert not routes.drifted
        routes = routes.saw("ef"[number % 2], 5.0, 200 + number)
    assert routes.drifted and set(routes.since) >= set(range(200, 206))


def test_losses_that_fall_while_a_domain_is_learned_are_no_drift() -> None:
    rng = np.random.default_rng(2)
    losses = [float(5.5 * np.exp(-n / 40) + abs(0.5 * rng.standard_normal())) for n in range(400)]
    assert _first_drift(losses) is None


def test_a_few_odd_samples_are_none() -> None:
    odd = _seen([0.4] * 50 + [60.0, 0.4, 60.0, 60.0])
    assert not odd.drifted and odd.surge > 0 and odd.since
    assert _seen([0.4] * 50 + [60.0] + [0.4] * 12).since == ()


def test_a_drift_does_not_take_what_it_is_judged_by_with_it() -> None:
    settled = _seen([0.4] * 100).settled
    assert _seen([0.4] * 100 + [9.0] * 3).settled == settled


def test_a_drift_that_nothing_came_of_is_what_is() -> None:
    routes = _seen([0.4] * 100 + [9.0] * 6)
    assert routes.drifted
    accepted = _seen([9.0], routes)
    assert not accepted.drifted and accepted.surge == 0 and accepted.settled["e"][-7:] == (9.0,) * 7
    assert _first_drift([0.4] * 100 + [9.0] * 300) == 105


def test_of_an_expert_with_few_samples_nothing_is_known() -> None:
    few = _seen([0.1] * (KNOWN - 1))
    assert few.is_young("e") and few.is_young("nobody")
    assert few.fits("e", 50.0) and few.fits("nobody", 50.0) and _seen([50.0], few).surge == 0
    enough = _seen([0.1], few)
    assert not enough.is_young("e") and enough.fits("e", 0.1) and not enough.fits("e", 50.0)


def test_fitting_is_a_matter_of_rank() -> None:
    routes = _seen([float(n) for n in range(WINDOW)])
    assert routes.fits("e", WINDOW - 3.0) and not routes.fits("e", float(WINDOW))
    assert routes.fits("e", WINDOW / 2 - 1.0, WELL) and not routes.fits("e", WINDOW / 2 + 2.0, WELL)


def test_each_expert_is_judged_by_its_own() -> None:
    routes = _seen([5.0] * 40, _seen([0.2] * 40), expert="f")
    assert not routes.drifted and routes.newest == "f"
    assert not routes.fits("e", 5.0) and routes.fits("f", 5.0)
    assert _seen([5.0] * 6, routes, expert="e").drifted and not _seen([5.0] * 6, routes, expert="f").drifted


def test_an_expert_with_few_samples_leaves_a_drift_as_it_is_and_grows_up() -> None:
    routes = _seen([0.3] * 40 + [5.0] * 3)
    young = _seen([0.2] * (KNOWN - 1), routes, expert="f")
    assert (young.surge, young.since) == (routes.surge, routes.since) and young.surge > 0
    grown = _seen([0.2] * 6, young, expert="f")
    assert not grown.is_young("f") and grown.surge == 0


def test_a_stray_sample_of_another_does_not_end_the_search_for_drifts() -> None:
    rng = np.random.default_rng(0)
    routes = _seen(rng.exponential(0.5, 100).tolist()).begun("f")
    routes = _seen(rng.exponential(0.5, 8).tolist(), routes, expert="f")
    routes = _seen([9.0], routes, expert="e")
    routes = _seen(rng.exponential(0.5, 200).tolist(), routes, expert="f")
    assert routes.surge < LIMIT and _seen([9.0] * 6, routes, expert="f").drifted


@given(st.lists(st.tuples(st.sampled_from("ef"), st.floats(0, 20)), max_size=120))
def test_it_comes_back_from_json(losses: list[tuple[str, float]]) -> None:
    routes = Routes("e")
    for number, (expert, loss) in enumerate(losses):
        routes = routes.saw(expert, loss, number)
    assert Routes.from_dict(json.loads(json.dumps(routes.to_dict()))) == routes
    assert len(routes.since) <= SINCE and routes.surge >= 0 and routes.drifted == (routes.surge >= LIMIT)
    assert all(len(own) <= WINDOW for own in routes.losses.values())
