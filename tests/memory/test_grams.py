"""Counts of ids and of pairs of ids, and whose a prompt is by them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.memory.grams import BUCKETS, SMOOTHING, Grams, buckets, likelihoods

prompts = st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=20), min_size=1, max_size=6)


def _learned(texts: list[list[int]]) -> Grams:
    grams = Grams.empty()
    for text in texts:
        grams = grams.learned(text)
    return grams


@given(prompts, prompts, st.lists(st.integers(0, 2**31), min_size=1, max_size=20))
def test_likelihoods_are_those_of_the_formula(first: list[list[int]], second: list[list[int]], text: list[int]) -> None:
    counts = [Counter(bucket for one in texts for bucket in buckets(one).tolist()) for texts in (first, second)]
    distinct = len(counts[0].keys() | counts[1].keys())
    found = likelihoods([_learned(first), _learned(second)], text, distinct)
    for value, own in zip(found, counts, strict=True):
        total = sum(own.values()) + SMOOTHING * distinct
        assert value == pytest.approx(sum(math.log((own[bucket] + SMOOTHING) / total)
                                          for bucket in buckets(text).tolist() if any(one[bucket] for one in counts)),
                                      rel=1e-9)


def test_what_nobody_learned_says_nothing() -> None:
    old, young = _learned([[1, 2, 3, token] for token in range(10, 60)]), _learned([[1, 2, 4]])
    known = likelihoods([old, young], [1, 2, 3], 200)
    assert known.argmax() == 0
    assert (likelihoods([old, young], [1, 2, 3, *range(1000, 1100)], 200) == known).all()


def test_an_id_counts_once_a_prompt_and_so_does_a_pair() -> None:
    assert len(buckets([7, 7, 7, 7])) == 2
    assert len(buckets([7, 8, 7, 8])) == 2 + 2
    assert Grams.empty().learned([7, 8, 7, 8]).counts.max() == 1


def test_the_order_of_neighbours_tells_prompts_apart() -> None:
    grams = [_learned([[1, 2, 3, 4]]), _learned([[4, 3, 2, 1]])]
    assert likelihoods(grams, [2, 3], 10).argmax() == 0 and likelihoods(grams, [3, 2], 10).argmax() == 1


def test_ids_are_spread_over_the_buckets() -> None:
    # as many as an even spread would hit: n buckets of N draws give n (1 - (1 - 1 / n)^N)
    ids = len(np.unique(np.concatenate([buckets([token]) for token in range(2**15)])))
    assert ids == pytest.approx(BUCKETS * (1 - (1 - 1 / BUCKETS) ** 2**15), rel=0.02)
    rng = np.random.default_rng(0)
    pairs = np.unique(np.concatenate([buckets(rng.integers(0, 500, 2).tolist()) for _ in range(2**15)]))
    assert len(pairs) > 0.3 * BUCKETS


@given(prompts, st.lists(st.integers(0, 2**31), min_size=1, max_size=20))
def test_what_is_forgotten_leaves_nothing(texts: list[list[int]], text: list[int]) -> None:
    grams = _learned(texts)
    assert (grams.learned(text).forgotten(text).counts == grams.counts).all()


@given(prompts)
def test_it_comes_back_from_its_tensors(texts: list[list[int]]) -> None:
    grams = _learned(texts)
    state = {key: tensor.clone() for key, tensor in grams.state_dict().items()}
    assert (Grams.from_state_dict(state).counts == grams.counts).all()


@pytest.mark.parametrize("change", [
    lambda state: {**state, "buckets": state["buckets"] + BUCKETS},
    lambda state: {**state, "bucket_counts": state["bucket_counts"][1:]},
    lambda state: {**state, "bucket_counts": -state["bucket_counts"]},
])
def test_a_damaged_state_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match="counts of"):
        Grams.from_state_dict(change(_learned([[1, 2, 3]]).state_dict()))


def test_learning_leaves_the_earlier_value_as_it_is() -> None:
    before = Grams.empty()
    before.learned([1, 2, 3])
    assert not before.counts.any() and before.counts.dtype == np.int32
    assert all(isinstance(tensor, torch.Tensor) for tensor in before.state_dict().values())
