"""A seeded generator of single facts, each asked in three wordings, and of questions that have nothing to do with them.

No fact can be guessed: persons, and which answer belongs to whom, are drawn. So what a model answers after one
correction is what it learned from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

FIRST = (
    "Anna", "Peter", "Maria", "John", "Laura", "Paul", "Emma", "David", "Clara", "Mark", "Julia", "Simon",
    "Alice", "Frank", "Helen", "George", "Nina", "Oscar", "Rose", "Victor", "Sarah", "Thomas", "Grace", "Henry",
    "Linda", "James", "Eva", "Martin", "Susan", "Robert", "Kate", "Daniel", "Jane", "Adam", "Ruth", "Philip",
    "Mary", "Alan", "Diana", "Jack",
)
LAST = (
    "Brown", "Stone", "Miller", "Green", "Walker", "Hill", "Cook", "Young", "King", "Fisher", "West", "Wood",
    "Hall", "Marsh", "Field", "Rivers", "Long", "Price", "Shaw", "Lane", "Banks", "Ford", "Snow", "Park",
    "Winter", "Bell", "Day", "Frost", "Moore", "Page", "Reed", "Rice", "Sharp", "Short", "Small", "Swift",
    "Wise", "Wolf", "Black", "White",
)
# three wordings of each relation, the first one to learn from, and its answers
RELATIONS: tuple[tuple[tuple[str, str, str], tuple[str, ...]], ...] = (
    (("Which city does {} live in?", "{} lives in which city?", "Where is the home of {}?"),
     ("Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Oslo", "Boston", "Chicago", "Tokyo")),
    (("What colour is the car of {}?", "The car of {} has which colour?", "Which colour did {} choose for the car?"),
     ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "orange", "silver")),
    (("What animal does {} keep?", "Which animal lives with {}?", "{} keeps which animal?"),
     ("dog", "cat", "horse", "bird", "fish", "rabbit", "sheep", "goat", "snake", "mouse")),
    (("What is the work of {}?", "Which work does {} do?", "{} works as what?"),
     ("teacher", "doctor", "lawyer", "farmer", "driver", "writer", "nurse", "baker", "painter", "judge")),
    (("Which sport does {} play?", "What sport is {} good at?", "{} plays which sport?"),
     ("football", "tennis", "golf", "hockey", "cricket", "rugby", "chess", "boxing", "running", "skiing")),
    (("In which month was {} born?", "{} was born in which month?", "What is the month of birth of {}?"),
     ("January", "February", "March", "April", "May", "June", "July", "August", "October", "December")),
    (("What does {} drink in the morning?", "Which drink does {} have in the morning?", "{} drinks what at breakfast?"),
     ("tea", "coffee", "milk", "water", "juice", "wine", "beer", "soup", "cocoa", "cider")),
    (("Which language does {} learn?", "{} learns which language?", "What language is {} learning?"),
     ("French", "German", "Spanish", "Italian", "Russian", "Greek", "Latin", "Chinese", "Arabic", "Dutch")),
)
# questions of the same form on other matters
_OTHER = (
    "How far is it from the {0} to the {1}?", "Why is there a {0} behind the {1}?", "Who built the {0} at the {1}?",
    "When does the {0} near the {1} open?", "How old is the {0} of the {1}?",
)
_PLACES = (
    "station", "church", "bridge", "market", "river", "harbour", "castle", "library", "garden", "tower",
    "school", "museum", "mill", "theatre", "airport", "forest", "island", "palace", "farm", "prison",
)


@dataclass(frozen=True)
class Fact:
    """What is true of one person: `prompts` are its three wordings, `answers` all that a relation has."""

    prompts: tuple[str, str, str]
    answer: str
    answers: tuple[str, ...]

    def amended(self, seed: int) -> Fact:
        """The same fact with another answer."""
        return replace(self, answer=random.Random(f"{seed}/{self.prompts[0]}").choice(
            [answer for answer in self.answers if answer != self.answer]))


def facts(count: int, seed: int) -> list[Fact]:
    """Facts of as many persons, one each, in the order of their stream.

    Raises:
        ValueError: more than there are persons, 1600.
    """
    names = _names(seed)
    if not 0 < count <= len(names):
        raise ValueError(f"{count} facts: there are names for 1 to {len(names)}")
    draw = random.Random(f"answers/{seed}")
    found = []
    for name in names[:count]:
        wordings, answers = draw.choice(RELATIONS)
        found.append(Fact(_asked(wordings, name), draw.choice(answers), answers))
    return found


def strangers(count: int, facts_made: int, seed: int) -> list[str]:
    """The same questions about persons that no fact is of."""
    names = _names(seed)[facts_made:][:count]
    draw = random.Random(f"strangers/{seed}")
    return [_asked(draw.choice(RELATIONS)[0], name)[0] for name in names]


def unrelated(count: int, seed: int) -> list[str]:
    """Questions of the same form on other matters."""
    made = [f"Q: {form.format(first, second)}\nA:" for form in _OTHER for first in _PLACES for second in _PLACES
            if first != second]
    return random.Random(f"unrelated/{seed}").sample(made, count)


def _names(seed: int) -> list[str]:
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    random.Random(f"names/{seed}").shuffle(names)
    return names


def _asked(wordings: Sequence[str], name: str) -> tuple[str, str, str]:
    learn, other, third = (f"Q: {wording.format(name)}\nA:" for wording in wordings)
    return learn, other, third
