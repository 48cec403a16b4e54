"""The demo's corrections: what five desks were told after a wrong answer, as hand-written package data.

Each domain has six answers; an answer has twenty wordings to learn from and five others to test with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

SPLITS = ("learn", "test")


@dataclass(frozen=True)
class Correction:
    """One line of `data/corrections.jsonl`; the completion is a space and the label."""

    domain: str
    split: str  # learn | test
    prompt: str
    completion: str
    label: str


def parse_correction(line: str) -> Correction:
    """A record of a JSONL line. Raises ValueError for a key or a value that does not belong there."""
    record = json.loads(line)
    names = [field.name for field in fields(Correction)]
    if sorted(record) != sorted(names) or not all(isinstance(value, str) for value in record.values()):
        raise ValueError(f"keys {sorted(record)}: a correction has the text fields {names}")
    correction = Correction(**record)
    if correction.split not in SPLITS:
        raise ValueError(f"split {correction.split!r}: use one of {SPLITS}")
    if correction.completion != " " + correction.label:
        raise ValueError(
            f"completion {correction.completion!r}: use a space and the label {correction.label!r}"
        )
    return correction


@cache
def corrections() -> tuple[Correction, ...]:
    """All corrections, in the order of the file."""
    lines = (Path(__file__).parent / "data" / "corrections.jsonl").read_text("utf-8").splitlines()
    return tuple(parse_correction(line) for line in lines)


def domains() -> tuple[str, ...]:
    """The domains, in the order of the stream."""
    return tuple(dict.fromkeys(c.domain for c in corrections()))


def labels(domain: str) -> tuple[str, ...]:
    """The answers of a domain, among which a test item is ranked."""
    return tuple(dict.fromkeys(c.label for c in wordings(domain, "learn")))


def wordings(domain: str, split: str) -> tuple[Correction, ...]:
    """The corrections of a domain that are there to `learn` or to `test`."""
    if domain not in domains() or split not in SPLITS:
        raise ValueError(f"{domain!r}, {split!r}: use a domain of {domains()} and a split of {SPLITS}")
    return tuple(c for c in corrections() if c.domain == domain and c.split == split)


def stream(seed: int) -> Iterator[Correction]:
    """Every correction to learn once: domain after domain, shuffled inside; the learner is told neither."""
    shuffle = random.Random(seed).shuffle
    for domain in domains():
        order = list(wordings(domain, "learn"))
        shuffle(order)
        yield from order
