"""The cost of an update, and what is left out for a budget: on numbers that can be checked by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.learner.pace import PROMPT, WINDOW, Choice, Costs, Line, Load, choices, choose

DEPTH = 4


def _costs(depth: int = DEPTH, forward: float = 1.0, backward: float = 2.0) -> Costs:
    """A token costs so much in a layer; a row 3, the step 8 for all layers, the rest 5."""
    return Costs(depth, Line(((1, forward), (100, 100 * forward))), Line(((1, backward), (100, 100 * backward))),
                 Line(((1, 3.0), (2, 6.0))), step=8.0, rest=5.0)


def test_the_formula() -> None:
    loads = [Load(10, (4,), again=0), Load(30, (2, 1), again=3)]
    assert _costs().terms(loads, 2) == pytest.approx(
        {"forward": 4 * 10 + 7 * 30, "backward": 2 * 2 * 40, "loss": 3 * 7, "step": 4.0, "rest": 5.0})
    assert _costs().predict(loads, 2) == pytest.approx(250 + 160 + 21 + 4 + 5)


def test_a_line_is_straight_between_its_points_and_beyond_them() -> None:
    line = Line(((16, 2.0), (64, 4.0), (256, 20.0)))
    assert [line(at) for at in (1, 16, 40, 64, 160, 256, 448)] == pytest.approx([2, 2, 3, 4, 12, 20, 36])
    # what noise makes fall counts as flat
    assert Line(((16, 2.0), (64, 1.0)))(256) == 2.0
    assert Line(((16, 2.0),))(32) == 4.0


def test_prompts_are_cut_first_then_layers_are_left_out_then_the_rest_of_the_prompts() -> None:
    assert choices(100, 3) == [
        Choice(100, 3), Choice(96, 3), Choice(80, 3), Choice(64, 3), Choice(64, 2), Choice(64, 1),
        *(Choice(ids, 1) for ids in (32, 16, 8, 4, 2, 1)),
    ]
    assert choices(5, 2) == [Choice(5, 2), Choice(5, 1), Choice(3, 1), Choice(2, 1), Choice(1, 1)]
    assert choices(1, 1) == [Choice(1, 1)]


@given(prompt=st.integers(1, 1023), rows=st.integers(1, 200), depth=st.integers(1, 40), seed=st.integers(0, 9),
       budgets=st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)))
def test_the_choice_fits_or_is_the_least_and_a_larger_budget_leaves_out_no_more(
    prompt: int, rows: int, depth: int, seed: int, budgets: tuple[float, float]
) -> None:
    numbers = random.Random(seed)
    costs = _costs(depth, numbers.uniform(0.01, 2), numbers.uniform(0.01, 2))

    def seconds(choice: Choice) -> float:
        return costs.predict([Load(rows + choice.prompt, (rows,), again=0)], choice.layers)

    found = [choose(prompt, depth, seconds, budget) for budget in sorted(budgets)]
    for (choice, predicted), budget in zip(found, sorted(budgets), strict=True):
        assert predicted == seconds(choice)
        assert predicted <= budget or choice == Choice(1, 1)
        assert 1 <= choice.prompt <= prompt and 1 <= choice.layers <= depth
        # layers go before the prompt is short, and not before it is as short as that
        assert choice.layers == depth or choice.prompt <= PROMPT
        assert choice.prompt >= min(prompt, PROMPT) or choice.layers == 1
    (less, _), (more, _) = found
    assert less.prompt <= more.prompt and less.layers <= more.layers
    assert choose(prompt, depth, seconds, 1e9)[0] == Choice(prompt, depth)


def test_levels_follow_what_updates_took_and_one_stall_does_not_move_them() -> None:
    costs, loads = _costs(), [Load(10, (1,), again=0)]
    as_measured = costs.predict(loads, DEPTH)
    terms = costs.terms(loads, DEPTH)
    costs.observe(loads, DEPTH, {term: 50 * seconds for term, seconds in terms.items()})
    assert costs.predict(loads, DEPTH) == as_measured
    for _ in range(3):
        costs.observe(loads, DEPTH, {term: 2 * seconds for term, seconds in terms.items()})
    assert costs.predict(loads, DEPTH) == pytest.approx(2 * as_measured)
    for _ in range(WINDOW // 2 + 1):
        costs.observe(loads, DEPTH, {"forward": 0.5 * terms["forward"]})
    assert costs.level("forward") == 0.5 and costs.level("backward") == 2.0
