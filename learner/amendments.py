"""Records about how another record is applied: what a machine could not do, or had no time for.

How much memory there is and how fast a machine is are no part of the state. So what was done about it is journaled
before it is done, and recovery repeats it on any machine.

    shorten   the updates from number `done` on have at most `tokens` ids of each sample
    pace      update number `done` has `prompt` ids of each prompt and trains `layers` top layers
    put off   an expert's restart waits
    blind     update number `done` is made without a look at what is forgotten: by chance, or in a refresh not at all
    route     the sample is learned by `expert`, which the router chose and which did not learn the one before; the last
              of a record counts
"""

from __future__ import annotations

from ogpstream.learner.folder import Record
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.pace import Choice

KINDS = ("shorten", "pace", "put off", "blind", "route")


def enter(amendment: Record, record: Record) -> None:
    """Note an amendment in the record that it is of."""
    match amendment["kind"]:
        case "shorten":
            record.setdefault("limits", []).append([amendment["done"], amendment["tokens"]])
        case "pace":
            record.setdefault("paces", []).append([amendment["done"], amendment["prompt"], amendment["layers"]])
        case "put off":
            record.setdefault("put_off", []).append(amendment["expert"])
        case "blind":
            record.setdefault("blind", []).append(amendment["done"])
        case "route":
            record["route"] = amendment["expert"]


def limited(lesson: Lesson, record: Record, update: int, bos: int | None) -> Lesson:
    """A lesson within the tokens that are left to one update of a record."""
    tokens = min((tokens for done, tokens in record.get("limits", ()) if done <= update), default=None)
    return lesson.within(tokens, bos)


def paced(lesson: Lesson, record: Record, update: int, bos: int | None) -> Lesson:
    """A lesson within them, with what the time leaves of its prompt."""
    lesson, choice = limited(lesson, record, update, bos), pace(record, update)
    return lesson if choice is None or lesson.refusal is not None else lesson.asking(choice.prompt, bos)


def pace(record: Record, update: int) -> Choice | None:
    """What one update of a record trains; None is all."""
    return next((Choice(*choice) for done, *choice in record.get("paces", ()) if done == update), None)


def is_put_off(record: Record, expert: str) -> bool:
    """Whether the restart of an expert that is due in this record waits."""
    return expert in record.get("put_off", ())


def is_blind(record: Record, update: int) -> bool:
    """Whether one update of a record takes old samples as they were drawn."""
    return update in record.get("blind", ())
