import json
import re
from collections import Counter
from itertools import product

import pytest

from ogpstream.profiling.demo_corrections import (
    corrections,
    domains,
    labels,
    parse_correction,
    stream,
    wordings,
)


def words(prompt):
    return tuple(re.findall(r"[a-z0-9]+", prompt.lower()))


def test_counts_and_balance():
    assert len(domains()) == 5
    for domain in domains():
        assert len(labels(domain)) == 6
        assert Counter(c.label for c in wordings(domain, "learn")) == dict.fromkeys(labels(domain), 20)
        assert Counter(c.label for c in wordings(domain, "test")) == dict.fromkeys(labels(domain), 5)
    assert len(corrections()) == 750


def test_a_label_belongs_to_one_domain():
    owners = Counter(label for domain in domains() for label in labels(domain))
    assert set(owners.values()) == {1}


def test_no_wording_stands_twice_in_any_spelling():
    counts = Counter(words(c.prompt) for c in corrections())
    assert [text for text, n in counts.items() if n > 1] == []


def test_test_wordings_are_other_wordings():
    """No test wording shares more than 55 % of its words (Jaccard) with a wording to learn."""
    for domain in domains():
        for tested, learned in product(wordings(domain, "test"), wordings(domain, "learn")):
            a, b = set(words(tested.prompt)), set(words(learned.prompt))
            frame = a & b & {"q", "a"}
            a, b = a - frame, b - frame
            assert len(a & b) <= 0.55 * len(a | b), (tested.prompt, learned.prompt)


def test_sentences_are_sentences():
    for c in corrections():
        question, answer = c.prompt.split("\n")
        assert re.fullmatch(r"Q: [A-Z][^\n]*[.?]", question), c.prompt
        assert answer == "A:"
        assert 4 <= len(words(question)) <= 20
        assert 1 <= len(c.label.split()) <= 3
        assert "  " not in c.prompt


def test_stream_is_every_wording_to_learn_once_in_an_order_of_the_seed():
    first = list(stream(0))
    assert Counter(first) == Counter(c for domain in domains() for c in wordings(domain, "learn"))
    assert list(dict.fromkeys(c.domain for c in first)) == list(domains())
    changes = sum(a.domain != b.domain for a, b in zip(first, first[1:], strict=False))
    assert changes == len(domains()) - 1
    assert list(stream(0)) == first
    assert list(stream(1)) != first
    # not the order of the file, in which a label's wordings stand together
    assert sum(a.label == b.label for a, b in zip(first, first[1:], strict=False)) < len(first) / 4


def test_bad_lines_are_refused():
    good = dict(domain="d", split="learn", prompt="p", completion=" x", label="x")
    assert parse_correction(json.dumps(good)).label == "x"
    for change, message in (
        ({"split": "train"}, "split 'train'"),
        ({"completion": "x"}, "completion 'x'"),
        ({"label": 3}, "text fields"),
        ({"extra": "e"}, "text fields"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_correction(json.dumps(good | change))
    with pytest.raises(ValueError, match="'attic'"):
        wordings("attic", "learn")
