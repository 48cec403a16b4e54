"""The scope: descriptions against their formula, the radius, and which texts lie in it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ogpstream.learner import scope as module
from ogpstream.learner.scope import FEW, FIRST, LAST, MOST, Prompts, Scope

WIDTH, VOCABULARY = 12, 90
END = 3  # the last id of every question


def _embedding(seed: int = 0) -> nn.Embedding:
    table = nn.Embedding(VOCABULARY, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    table.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator) + 2.0
    # ids of one topic have something in common, as words have
    table.weight.data[10:82] += 2 * torch.randn(3, WIDTH, generator=generator).repeat_interleave(24, 0)
    return table


def _question(seed: int, topic: int, length: int = 30) -> list[int]:
    """Ids of one of three topics, 24 ids each, and an end."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10 + 24 * topic, 34 + 24 * topic, (length,), generator=generator).tolist()
    return [*ids, 4, 5, 6, END]


def _learned(count: int = 60, expert: str = "e", topic: int = 0) -> Scope:
    scope = Scope(_embedding())
    for seed in range(count):
        scope.add(expert, _question(seed, topic))
    return scope


def _expected(scope: Scope, ids: list[int]) -> Tensor:
    """A description in float64, by the symmetric root of the covariance."""
    E = _embedding().weight.detach().double()
    rows = torch.linspace(0, VOCABULARY - 1, 2 * WIDTH).long()
    mean = E[rows].mean(0)
    C = (E[rows] - mean).T @ (E[rows] - mean) / len(rows)
    C = C + 0.1 * C.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    parts = [(E[part].mean(0) - mean) @ root for part in (ids, ids[-LAST:])]
    return torch.cat([part / part.norm() for part in parts]) / 2**0.5


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 40])
def test_cosines_are_those_of_whitened_means(length: int) -> None:
    scope = Scope(_embedding())
    texts = [torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(n)).tolist()
             for n in range(4)]
    found = torch.cat([scope.describe(text, [length]) for text in texts])
    wanted = torch.stack([_expected(scope, text) for text in texts])
    torch.testing.assert_close((found @ found.T).double(), wanted @ wanted.T, atol=1e-5, rtol=0)


def test_a_place_is_described_as_the_text_up_to_it() -> None:
    scope, text = Scope(_embedding()), _question(0, 1, 20)
    found = scope.describe(text, [1, 3, 7, 24])
    torch.testing.assert_close(found, torch.cat([scope.describe(text[:end], [end]) for end in (1, 3, 7, 24)]),
                               atol=1e-5, rtol=0)


def test_where_nothing_varies_nothing_is_described() -> None:
    table = _embedding()
    table.weight.data[:] = 1.0
    assert not Scope(table).describe([1, 2, 3], [3]).any()


def test_it_tells_questions_like_the_learned_ones_from_others() -> None:
    scope = _learned()
    own = sum("e" in scope.answering(_question(seed, 0), ["e"]) for seed in range(1000, 1100))
    others = sum("e" in scope.answering(_question(seed, 1), ["e"]) for seed in range(1000, 1100))
    assert own >= 95 and others <= 5


def test_the_answer_and_a_later_question_do_not_take_a_text_out() -> None:
    scope = _learned()
    question = _question(7, 0)
    for behind in ([70, 71], [70] * 300, _question(1, 2)):
        assert scope.answering([*question, *behind], ["e"]) == {"e"}
    # but a text of the same ids without the end of a question is none
    assert not scope.answering([*_question(7, 2)[:-1], 80, 81, 82, 83], ["e"])


def test_each_expert_has_its_own() -> None:
    scope = _learned()
    for seed in range(60):
        scope.add("f", _question(seed, 1))
    first, second = _question(7, 0), _question(7, 1)
    assert scope.answering(first, ["e", "f"]) == {"e"} and scope.answering(second, ["e", "f"]) == {"f"}
    assert scope.answering(first, ["f"]) == frozenset()
    scope.everywhere.add("g")
    assert scope.answering(first, ["e", "f"]) == {"e"}
    assert scope.answering(first, ["e", "f", "g"]) == {"e", "g"}
    assert scope.answering(_question(7, 2), ["g"]) == {"g"}


def test_nothing_learned_answers_nothing() -> None:
    assert Scope(_embedding()).answering(_question(0, 0), ["e"]) == frozenset()
    assert _learned().answering([], ["e"]) == frozenset()


def test_a_learned_prompt_is_always_in_it() -> None:
    scope = Scope(_embedding())
    for seed in range(100):
        scope.add("e", _question(seed, seed % 3, length=1 + seed % 7))
        assert scope.answering(_question(seed, seed % 3, length=1 + seed % 7), ["e"])


def test_the_same_prompt_again_is_counted_and_nothing_else() -> None:
    scope = _learned(20)
    own = scope.experts["e"]
    before = own.rows.clone(), own.nearest.clone()
    scope.add("e", _question(3, 0))
    assert own.counts.tolist() == [1, 1, 1, 2, *[1] * 16]
    assert torch.equal(own.rows, before[0]) and torch.equal(own.nearest, before[1])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_distances_to_the_nearest_other_prompt(seeds: list[int]) -> None:
    scope = Scope(_embedding())
    for seed in seeds:
        scope.add("e", _question(seed, seed % 3))
    own = scope.experts["e"]
    assert len(own.rows) == len(set(seeds)) and int(own.counts.sum()) == len(seeds)
    distance = (1 - own.rows @ own.rows.T).fill_diagonal_(torch.inf)
    torch.testing.assert_close(own.nearest, distance.min(1).values, atol=2e-3, rtol=0)


def test_the_radius() -> None:
    prompts = Prompts(4)
    prompts.rows, prompts.nearest = torch.zeros(FEW - 1, 4), torch.full((FEW - 1,), 0.01)
    assert prompts.radius == FIRST
    prompts.rows, prompts.nearest = torch.zeros(100, 4), torch.linspace(0.0, 0.099, 100)
    assert prompts.radius == pytest.approx(1.1 * 0.09801)
    prompts.nearest = torch.full((100,), 0.9)
    assert prompts.radius == MOST


def test_a_full_memory_averages_and_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 40)
    scope = _learned(400)
    own = scope.experts["e"]
    assert len(own.rows) == len(own.counts) == len(own.nearest) == 40 and int(own.counts.sum()) == 400
    torch.testing.assert_close(own.rows.norm(dim=1), torch.ones(40), atol=2e-3, rtol=0)
    assert sum("e" in scope.answering(_question(seed, 0), ["e"]) for seed in range(1000, 1100)) >= 95
    assert sum("e" in scope.answering(_question(seed, 1), ["e"]) for seed in range(1000, 1100)) <= 5


def test_it_goes_on_from_what_was_saved() -> None:
    scope = _learned(50)
    scope.everywhere.add("g")
    tensors, meta = scope.state_dict()
    loaded = Scope(_embedding())
    loaded.load_state_dict(tensors, json.loads(json.dumps(meta)))
    for one in (scope, loaded):
        for seed in range(50, 60):
            one.add("e", _question(seed, 0))
    (first, meta), (second, again) = scope.state_dict(), loaded.state_dict()
    assert meta == again and all(torch.equal(first[key], second[key]) for key in first)
    narrow = Scope(nn.Embedding(VOCABULARY, 8))
    with pytest.raises(ValueError, match="saved prompts of 'e'"):
        narrow.load_state_dict(tensors, meta)
    assert not narrow.experts
