"""Facts: as many as persons, none to be guessed, and questions that have nothing to do with them."""

from collections import Counter

import pytest

from ogpstream.profiling.facts import RELATIONS, facts, strangers, unrelated


def test_each_person_has_one_fact_in_three_wordings() -> None:
    made = facts(1000, seed=0)
    names = [fact.prompts[0] for fact in made]
    assert len(set(names)) == 1000
    for fact in made:
        assert len(set(fact.prompts)) == 3 and fact.answer in fact.answers
        assert all(prompt.startswith("Q: ") and prompt.endswith("?\nA:") for prompt in fact.prompts)


def test_wordings_of_all_relations_are_distinct() -> None:
    wordings = [wording for three, _ in RELATIONS for wording in three]
    assert len(set(wordings)) == len(wordings) and all(wording.count("{}") == 1 for wording in wordings)
    assert all(len(set(answers)) == 10 for _, answers in RELATIONS)


def test_answers_are_drawn_evenly_and_by_seed() -> None:
    made = facts(1500, seed=3)
    assert made == facts(1500, seed=3) != facts(1500, seed=4)
    counts = Counter(fact.answer for fact in made)
    # 1500 over 80 answers: 19 each, with a standard deviation of 4.3
    assert len(counts) == 80 and 3 <= min(counts.values()) and max(counts.values()) <= 38


def test_an_amended_fact_has_another_answer() -> None:
    for fact in facts(100, seed=0):
        other = fact.amended(0)
        assert other.prompts == fact.prompts and other.answer in set(fact.answers) - {fact.answer}
        assert other == fact.amended(0)


def test_strangers_are_persons_without_a_fact() -> None:
    known = {prompt for fact in facts(1500, seed=0) for prompt in fact.prompts}
    asked = strangers(100, 1500, seed=0)
    assert len(asked) == 100 and not known.intersection(asked)
    others = unrelated(100, seed=0)
    assert len(set(others)) == 100 and not known.intersection(others) and not set(asked).intersection(others)


@pytest.mark.parametrize("count", [0, 1601])
def test_there_are_1600_persons(count: int) -> None:
    with pytest.raises(ValueError, match="names for 1 to 1600"):
        facts(count, seed=0)
