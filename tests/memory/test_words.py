"""Words: distances of texts to learned prompts by the ids that they share, against a slow float64 reference."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ogpstream.memory import words as module
from ogpstream.memory.words import WINDOW, Words

FORM = [1, 2, 3, 4, 5, 6]

prompts = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1, max_size=12)


def _learned(texts: Sequence[Sequence[int]]) -> Words:
    words = Words.empty()
    for text in texts:
        words = words.learned(text)
    return words


def _distance(text: Sequence[int], prompt: Sequence[int], learned: Sequence[Sequence[int]]) -> float:
    """1 - cosine of the two sets, with weights of a learned collection."""
    def weight(token: int) -> float:
        others = max(0, sum(token in one for one in learned) - 1)
        return 0.1 / (0.1 + others / max(1, len(learned) - 1))

    first, second = set(text), set(prompt)
    norms = [math.sqrt(sum(weight(token) ** 2 for token in own)) for own in (first, second)]
    return 1 - sum(weight(token) ** 2 for token in first & second) / (norms[0] * norms[1])


@given(prompts, st.lists(st.integers(0, 60), min_size=1, max_size=200))
def test_distances_are_those_of_the_formula(texts: list[list[int]], text: list[int]) -> None:
    different = [list(own) for own in dict.fromkeys(tuple(sorted(set(one))) for one in texts)]
    words = _learned(texts)
    assert len(words.nearest) == len(different)
    for number, own in enumerate(different):
        assert words.ids[words.owners == number].tolist() == own
    expected = [_distance(text[-words.longest :], own, different) for own in different]
    np.testing.assert_allclose(words.distances(text), expected, atol=1e-9, rtol=0)


def test_what_all_prompts_have_counts_little() -> None:
    words = _learned([[*FORM, 100 + n, 200 + n, 300 + n, 7] for n in range(50)])
    # two of three words and not the form, the form and no word, words that no prompt has
    reworded, other = [20, 21, 105, 205, 7], [*FORM, 400, 401, 402, 7]
    assert float(words.distances(reworded).min()) < 0.5 and int(words.distances(reworded).argmin()) == 5
    assert float(words.distances(other).min()) > 0.9
    assert float(words.distances([*FORM, 105, 205, 305, 7])[5]) < 1e-6


def test_only_the_end_of_a_long_prompt_is_looked_at() -> None:
    long = [*range(1000, 1500), *range(2000, 2000 + WINDOW)]
    words = _learned([long])
    assert len(words.ids) == words.longest == WINDOW
    assert float(words.distances(long[-WINDOW:])[0]) < 1e-6 and float(words.distances(long[:500])[0]) == 1


def test_what_was_said_before_a_prompt_is_not_looked_at() -> None:
    words = _learned([[*FORM, 100 + n, 200 + n] for n in range(10)])
    assert float(words.distances([*range(300, 340), *FORM, 103, 203])[3]) < 1e-6


def test_the_nearest_other_prompt_is_known_of_each() -> None:
    words, third = _learned([[*FORM, 10, 11], [*FORM, 20, 21]]), [*FORM, 10, 12]
    near, far = words.distances(third).tolist()
    assert near < far
    before = words.nearest.tolist()
    assert words.learned(third).nearest.tolist() == [min(near, before[0]), min(far, before[1]), near]
    assert np.isinf(_learned([FORM]).nearest).all()


def test_to_learn_makes_another_value() -> None:
    words = _learned([[1, 2], [3, 4]])
    before = words.state_dict()
    copies = {key: tensor.clone() for key, tensor in before.items()}
    assert len(words.learned([5, 6]).nearest) == 3 and words.learned([2, 1]) is words
    assert all(torch.equal(words.state_dict()[key], copies[key]) for key in copies)


def test_where_it_is_full_the_one_nearest_to_the_new_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 10)
    apart = [[*FORM, 100 + 3 * n, 101 + 3 * n, 102 + 3 * n] for n in range(10)]
    for near, place in (([*FORM, 112, 113, 500], 4), ([*FORM, 127, 128, 501], 9)):
        words = _learned([*apart, near])
        assert len(words.nearest) == 10 and words.ids[words.owners == place].tolist() == sorted(near)
        assert (np.diff(words.ids) >= 0).all()
        for kept in (*apart[:place], *apart[place + 1 :], near):
            assert float(words.distances(kept).min()) < 1e-6
        assert 0.1 < float(words.distances(apart[place]).min()) < 0.5


def test_of_many_wordings_of_one_matter_some_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 50)
    wordings = [[*FORM, 20, 21, 22, 100 + n] for n in range(25)]
    words = _learned([*wordings, *([*FORM, 300 + 3 * n, 301 + 3 * n, 302 + 3 * n] for n in range(60))])
    assert len(words.nearest) == 50 and float(words.distances(wordings[0]).min()) < 0.5


def test_it_goes_on_from_what_was_saved() -> None:
    words = _learned([[*FORM, n, 50 + n % 3] for n in range(10, 30)])
    saved = words.state_dict()
    loaded = Words.from_state_dict(saved)
    first, second = (one.learned([*FORM, 70, 71]) for one in (words, loaded))
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())
    saved["ids"].zero_()
    assert loaded.ids.any()


@pytest.mark.parametrize("part,change", [
    ("owners", lambda owners: owners[1:]), ("owners", lambda owners: owners.clamp_min(1)),
    ("owners", lambda owners: owners - 1), ("ids", lambda ids: ids - 2), ("ids", lambda ids: ids.flip(0)),
    ("words_nearest", lambda nearest: torch.cat([nearest, nearest])),
])
def test_parts_that_do_not_fit_together_are_refused(part: str, change: Callable[[Tensor], Tensor]) -> None:
    state = _learned([[1, 2], [2, 3], [3, 4]]).state_dict()
    with pytest.raises(ValueError, match="prompts of which"):
        Words.from_state_dict({**state, part: change(state[part])})
