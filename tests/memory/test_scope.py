"""The scope: distances and radius of learned prompts, and which texts lie in it."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ogpstream.memory import scope as module
from ogpstream.memory.scope import FEW, FORM, WORDS, Prompts, Scope
from ogpstream.memory.words import Words

WIDTH = 16
END = 3  # the last id of every question


def _table() -> Tensor:
    """What ids are like: those of a topic, 24 each from 10 on, have something in common."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(90, WIDTH, generator=generator)
    table[10:82] += 2 * torch.randn(3, WIDTH, generator=generator).repeat_interleave(24, 0)
    return table


TABLE = _table()


def _describe(ids: Sequence[int], ends: Sequence[int]) -> Tensor:
    means = torch.stack([TABLE[list(ids[:end])].mean(0) + TABLE[list(ids[:end][-4:])].mean(0) for end in ends])
    return means / means.norm(dim=1, keepdim=True)


def _question(seed: int, topic: int, length: int = 30) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10 + 24 * topic, 34 + 24 * topic, (length,), generator=generator).tolist()
    return [*ids, 4, 5, 6, END]


def _learn(scope: Scope, ids: Sequence[int], expert: str = "e") -> Scope:
    return scope.learned(expert, ids, _describe(ids, [len(ids)])[0])


def _learned(count: int = 60) -> Scope:
    scope = Scope()
    for seed in range(count):
        scope = _learn(scope, _question(seed, 0))
    return scope


def _share(scope: Scope, topic: int) -> float:
    """Of 100 new questions of a topic, those that "e" answers."""
    return sum("e" in scope.answering(_question(seed, topic), ["e"], _describe) for seed in range(1000, 1100)) / 100


def test_it_tells_questions_like_the_learned_ones_from_others() -> None:
    scope = _learned()
    assert _share(scope, 0) >= 0.95 and _share(scope, 1) <= 0.05


def test_the_form_alone_brings_no_question_into_it() -> None:
    """Of single facts in one form another wording is in the scope, another matter is not, and no words without form."""
    form, scope = [4, 5, 6, 7, 8, 9, *range(82, 90)] * 3, Scope()

    def asked(first: int, second: int) -> list[int]:
        return [*form, 10 + first, 10 + second, 4, 5, 6, END]

    for n in range(12):
        scope = _learn(scope, asked(2 * n, 2 * n + 1))
    near = torch.cat([_describe(question, [len(question)]) for question in (asked(3, 2), asked(30, 31))])
    assert float(scope.experts["e"].distances(near).min(1).values.max()) < FORM.first
    for reworded in (asked(3, 2), [*form, 40, 12, 13, 4, 5, 6, END]):
        assert scope.answering(reworded, ["e"], _describe)
    assert not scope.answering(asked(30, 31), ["e"], _describe)
    assert not scope.answering([60, 61, 12, 13, 62, 63, 64, END], ["e"], _describe)


def test_the_answer_and_a_later_question_do_not_take_a_text_out() -> None:
    scope, question = _learned(), _question(7, 0)
    for behind in ([70, 71], [70] * 300, _question(1, 2)):
        assert scope.answering([*question, *behind], ["e"], _describe) == {"e"}
    # but not where it is too long ago: so many places are looked at
    assert not scope.answering([*question, *[END] * 200], ["e"], _describe)


def test_each_expert_has_its_own() -> None:
    scope = _learned()
    for seed in range(60):
        scope = _learn(scope, _question(seed, 1), "f")
    first, second = _question(7, 0), _question(7, 1)
    assert scope.answering(first, ["e", "f"], _describe) == {"e"}
    assert scope.answering(second, ["e", "f"], _describe) == {"f"}
    assert scope.answering(first, ["f"], _describe) == frozenset()
    scope = scope.opened("g")
    assert scope.answering(first, ["e", "f"], _describe) == {"e"}
    assert scope.answering(first, ["e", "f", "g"], _describe) == {"e", "g"}
    assert scope.answering(_question(7, 2), ["g"], _describe) == {"g"}


def test_nothing_learned_answers_nothing() -> None:
    assert Scope().answering(_question(0, 0), ["e"], _describe) == frozenset()
    assert _learned().answering([], ["e"], _describe) == frozenset()


def test_a_learned_prompt_is_always_in_it() -> None:
    scope = Scope()
    for seed in range(100):
        question = _question(seed, seed % 3, length=1 + seed % 7)
        scope = _learn(scope, question)
        assert scope.answering(question, ["e"], _describe)


def test_to_learn_makes_another_scope() -> None:
    scope = _learned(20)
    own, before = scope.experts["e"], scope.state_dict()
    copies = {key: tensor.clone() for key, tensor in before[0].items()}
    for ids in (_question(3, 0), _question(99, 1)):
        _learn(scope, ids)
    assert scope.experts["e"] is own and scope.state_dict()[1] == before[1]
    assert all(torch.equal(tensor, copies[key]) for key, tensor in scope.state_dict()[0].items())


def test_the_same_prompt_again_is_counted_and_nothing_else() -> None:
    scope = _learned(20)
    again = _learn(scope, _question(3, 0)).experts["e"]
    assert again.counts.tolist() == [1, 1, 1, 2, *[1] * 16]
    assert again.rows is scope.experts["e"].rows and again.nearest is scope.experts["e"].nearest


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_distances_to_the_nearest_other_prompt(seeds: list[int]) -> None:
    scope = Scope()
    for seed in seeds:
        scope = _learn(scope, _question(seed, seed % 3, length=6))
    own = scope.experts["e"]
    assert len(own.rows) == len(set(seeds)) and int(own.counts.sum()) == len(seeds)
    distance = (1 - own.rows @ own.rows.T).fill_diagonal_(torch.inf)
    torch.testing.assert_close(own.nearest, distance.min(1).values, atol=2e-3, rtol=0)


def _prompts(nearest: Tensor) -> Prompts:
    return Prompts(torch.zeros(len(nearest), 4), torch.ones(len(nearest), dtype=torch.int64), nearest)


def test_the_radius() -> None:
    assert _prompts(torch.full((FEW - 1,), 0.01)).radius == FORM.first
    assert _prompts(torch.linspace(0.0, 0.198, 100)).radius == pytest.approx(1.1 * 0.19602)
    assert _prompts(torch.full((100,), 0.01)).radius == FORM.least
    assert _prompts(torch.full((100,), 0.9)).radius == FORM.most


def test_from_some_prompts_on_the_words_radius_follows_theirs_too() -> None:
    def radius(count: int, groups: int) -> float:
        scope = Scope()
        for n in range(count):
            group = n % groups
            own = [200 + 2 * group, 201 + 2 * group, 500 + 2 * n, 501 + 2 * n]
            scope = scope.learned("e", [4, *own, END], _describe([10 + n % 60, END], [2])[0])
        return scope.experts["e"].words_radius

    # pairs of words in common with two others, or with nobody
    assert radius(FEW - 1, 14) == WORDS.first and radius(FEW + 10, 100) == WORDS.most
    assert WORDS.least < radius(FEW + 10, 14) < WORDS.most


def test_words_without_which_no_prompt_could_be_told_are_missed() -> None:
    tensors, meta = _learned(5).state_dict()
    empty = {f"0.{part}": tensor for part, tensor in Words.empty().state_dict().items()}
    with pytest.raises(ValueError, match="saved words of 'e'.*none for 5 descriptions"):
        Scope.from_state_dict({**tensors, **empty}, meta)


def test_a_full_memory_keeps_room_for_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two near ones become one, so that a topic that comes last is not averaged into another one."""
    monkeypatch.setattr(module, "CAPACITY", 40)
    scope = _learned(300)
    for seed in range(100):
        scope = _learn(scope, _question(seed, 1))
    own = scope.experts["e"]
    assert len(own.rows) == len(own.counts) == len(own.nearest) == 40 and int(own.counts.sum()) == 400
    torch.testing.assert_close(own.rows.norm(dim=1), torch.ones(40), atol=2e-3, rtol=0)
    assert _share(scope, 0) >= 0.9 and _share(scope, 1) >= 0.9 and _share(scope, 2) <= 0.05


def test_it_goes_on_from_what_was_saved() -> None:
    scope = _learned(50).opened("g")
    tensors, meta = scope.state_dict()
    loaded = Scope.from_state_dict(tensors, json.loads(json.dumps(meta)))
    ends = []
    for one in (scope, loaded):
        for seed in range(50, 60):
            one = _learn(one, _question(seed, 0))
        ends.append(one.state_dict())
    (first, meta), (second, again) = ends
    assert meta == again and all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match="saved prompts of 'e'"):
        Scope.from_state_dict({**first, "0.counts": torch.ones(3)}, meta)


def _three() -> Scope:
    scope = Scope()
    for seed in range(40):
        for topic, name in enumerate("abc"):
            scope = _learn(scope, _question(seed, topic), name)
    return scope


def test_the_nearest_alone_answers() -> None:
    scope = _three()
    for topic, name in enumerate("abc"):
        answers = [scope.answering(_question(seed, topic), "abc", _describe, nearest=True)
                   for seed in range(1000, 1040)]
        assert all(len(own) <= 1 for own in answers)
        assert sum(own == {name} for own in answers) >= 38
    # of these experts
    assert scope.answering(_question(1000, 0), "bc", _describe, nearest=True) <= {"b", "c"}


def test_where_any_answers_a_young_one_that_is_nearer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # its own radius, of a few prompts, is small yet
    monkeypatch.setattr(module, "FORM", dataclasses.replace(FORM, first=1e-6))
    scope = Scope()
    for seed in range(60):
        scope = _learn(scope, _question(seed, 1 if seed % 15 == 0 else 0), "old")
    for seed in range(100, 106):
        scope = _learn(scope, _question(seed, 1), "young")
    answers = [scope.answering(_question(seed, 1), ["old", "young"], _describe) for seed in range(1000, 1040)]
    assert all(own == {"old"} for own in answers)
    nearest = [scope.answering(_question(seed, 1), ["old", "young"], _describe, nearest=True)
               for seed in range(1000, 1040)]
    assert all(own == {"young"} for own in nearest)


def test_the_last_question_decides() -> None:
    scope = _three()
    # the second is long enough that the means are its own
    both = [*_question(1000, 0), *_question(1001, 1, length=120)]
    assert scope.answering(both, "abc", _describe) >= {"a", "b"}
    assert scope.answering(both, "abc", _describe, nearest=True) == {"b"}


def test_an_adapter_from_elsewhere_answers_beside_the_nearest() -> None:
    scope = _three().opened("import")
    assert scope.answering(_question(1000, 0), ["a", "b", "import"], _describe, nearest=True) == {"a", "import"}
    assert scope.answering([80] * 30, ["a", "b", "import"], _describe, nearest=True) == {"import"}
