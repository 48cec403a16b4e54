import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpstream.learner import samples as module
from ogpstream.learner.errors import SampleError
from ogpstream.learner.samples import Refused, Sample, parse_line, read_samples


def parse(value):
    return parse_line(json.dumps(value), file="f.jsonl", number=7)


def test_prompt_and_completion_with_everything_optional():
    names = {"expert": "math", "id": "a1", "source": "ann"}
    other = {"label": "Business", "task": [1, {"x": None}]}
    sample = parse({"prompt": "2+2=", "completion": " 4", **names, **other})
    assert (sample.prompt, sample.completion, sample.expert) == ("2+2=", " 4", "math")
    assert (sample.id, sample.source, sample.label, sample.trained) == ("a1", "ann", None, True)
    assert sample.meta == other
    free = {"lable": False, "prompt": 1, "meta": {}}
    kept = parse({"prompt": "2", "completion": "4", "split": "train", "meta": free})
    assert kept.meta == {"split": "train", **free} and kept.trained
    assert parse({"prompt": "2", "completion": "4", "source_id": 3, "label_id": 1, "idx": 2, "score": 0.5}).meta
    plain = parse({"prompt": "p", "completion": "x", "meta": None, "id": None, "expert": None, "source": None})
    assert plain == Sample("p", "x") and plain.expert == "default" and plain.meta == {}
    assert parse({"prompt": "p", "completion": "x", "id": 12}).id == "12"


@pytest.mark.parametrize("label", [True, None, 0, "no", "", [], 0.0])
def test_only_the_json_false_marks_a_sample_as_wrong(label):
    sample = parse({"prompt": "a", "completion": "b", "label": label})
    assert sample.trained and sample.label is None
    assert sample.meta["label"] is label or sample.meta["label"] == label
    wrong = parse({"prompt": "a", "completion": "b", "label": False})
    assert not wrong.trained and wrong.label is False and wrong.meta == {}


def test_messages_end_with_the_completion():
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "bye"},
    ]
    assert parse({"messages": turns}) == Sample(turns[:-1], turns[-1:])
    assert parse({"prompt": turns[:-1], "completion": turns[-1:]}) == Sample(turns[:-1], turns[-1:])


USER_TURN = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
BAD = [
    ("{", "not JSON"),
    ("", "not JSON"),
    ('{"prompt": "a", "completion": "b"} x', "Extra data"),
    ("[1]", "a list instead of a JSON object"),
    ("null", "nothing instead of a JSON object"),
    ('{"prompt": "a", "prompt": "a", "completion": "b"}', "'prompt' is there twice"),
    ('{"prompt": "a", "completion": "b", "m": {"k": 1, "k": 2}}', "'k' is there twice"),
    ('{"prompt": "a", "completion": "b", "m": NaN}', "NaN is no JSON number"),
    ('{"prompt": "a", "completion": "b", "m": -Infinity}', "no JSON number"),
    ('{"prompt": "a", "completion": "b", "m": 1e999}', "JSON"),
    ('{"prompt": "a", "completion": "b", "m": ' + "9" * 5000 + "}", "not JSON"),
    ('{"prompt": "a", "completion": "b", "m": ' + "[" * 200_000, "nested too deeply|not JSON"),
    ('{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
    ('{"prompt": "a", "completion": "b", "m": ["\\udc00"]}', "surrogate"),
    ('{"prompt": "a", "completion": "b", "\\udc00": 1}', "surrogate"),
    ('{"prompt": "a\ud800", "completion": "b"}', "surrogate"),
    (b'{"prompt": "a\xff", "completion": "b"}', "byte 14 is not UTF-8"),
    ('{"prompt": "a", "completion": "b"}'.encode("utf-16"), "not UTF-8"),
    ({"prompt": "a"}, "no completion"),
    ({"completion": "b"}, "no prompt"),
    ({"text": "a"}, "no prompt"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": "a", "completion": "  \n "}, "completion is empty"),
    ({"prompt": "", "completion": "b"}, "prompt is empty; give what was asked"),
    ({"prompt": " \n", "completion": "b"}, "prompt is empty"),
    ({"prompt_ids": [], "completion_ids": [1]}, "prompt is empty"),
    ({"prompt": None, "completion": "b"}, "no prompt; give"),
    ({"prompt": "a", "completion": None}, "no completion"),
    ({"prompt": 1, "completion": "b"}, "a number and text"),
    ({"prompt": [USER_TURN], "completion": "b"}, "a list and text"),
    ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
    ({"prompt": [USER_TURN], "completion": []}, "completion is empty"),
    ({"prompt": [USER_TURN], "completion": [USER_TURN]}, "not from the assistant"),
    ({"prompt": ["a"], "completion": [ANSWER]}, "without a role"),
    ({"prompt": [{"role": "user", "content": None}], "completion": [ANSWER]}, "content is not text"),
    ({"prompt": [USER_TURN], "completion": [{"role": "assistant", "content": " "}]}, "completion is empty"),
    ({"messages": [USER_TURN, {"role": "assistant", "content": ""}]}, "completion is empty"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "x"}, "messages is text"),
    ({"messages": [ANSWER]}, "do not end with an answer"),
    ({"messages": [USER_TURN, ANSWER, USER_TURN]}, "do not end with an answer"),
    ({"messages": [USER_TURN, ANSWER], "prompt": "a"}, 'both "messages" and "prompt"'),
    ({"prompt": "a", "completion": "b", "expert": ""}, "expert is ''"),
    ({"prompt": "a", "completion": "b", "expert": 3}, "expert is 3"),
    ({"prompt": "a", "completion": "b", "id": ["x"]}, "id is"),
    ({"prompt": "a", "completion": "b", "id": True}, "id is True"),
    ({"prompt": "a", "completion": "b", "source": {}}, "source is"),
    ({"prompt_ids": [1]}, "no prompt|only one of"),
    ({"prompt_ids": [1], "completion_ids": []}, "completion is empty"),
    ({"prompt_ids": [1], "completion_ids": [True]}, "completion_ids has True"),
    ({"prompt_ids": [1.0], "completion_ids": [1]}, "prompt_ids has 1.0"),
    ({"prompt_ids": "12", "completion_ids": [1]}, "prompt_ids is text"),
    ({"prompt": "a", "completion": "b", "label": "false"}, "label is .*; write false without quotes"),
    ({"prompt": "a", "completion": "b", "label": " False"}, "label is .*; write false without quotes"),
    ({"prompt": "a", "completion": "b", "lable": False}, "'lable' is not known, the nearest is \"label\"; .*meta"),
    ({"prompt": "a", "completion": "b", "Label": False}, "'Label' is not known.*known are prompt, completion"),
    ({"prompt": "a", "completion": "b", "expret": "law"}, "nearest is \"expert\""),
    ({"prompt": "a", "completion": "b", "sources": "ann"}, "nearest is \"source\""),
    ({"prompt": "a", "completion": "b", "ID": "7"}, "nearest is \"id\""),
    ({"promt": "a", "completion": "b"}, "no prompt, only 'promt'"),
    ({"prompt": "a", "complation": "b"}, "no completion, only 'complation'"),
    ({"prompt": "a", "completion": "b", "meta": "x"}, "meta is text; give an object"),
    ({"prompt": "a", "completion": "b", "topic": 1, "meta": {"topic": 2}}, "'topic' is there and in meta too"),
]


@pytest.mark.parametrize(("line", "what"), BAD, ids=lambda value: repr(value)[:50])
def test_bad_lines_are_refused_in_one_line_with_place_and_remedy(line, what):
    line = json.dumps(line) if isinstance(line, dict) else line
    with pytest.raises(SampleError, match=what) as raised:
        parse_line(line, file="f.jsonl", number=7)
    text = str(raised.value)
    assert text.startswith("f.jsonl:7: ") and "; " in text
    assert "\n" not in text and len(text) < 400
    text.encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_are_a_sample_or_a_sample_error(line):
    with pytest.raises(SampleError):
        parse_line(line, file="f", number=1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text().filter(str.strip),
    completion=st.text().filter(str.strip),
    names=st.fixed_dictionaries({}, optional={k: st.text(min_size=1) for k in ("expert", "id", "source")}),
    meta=st.dictionaries(st.text(), VALUES, max_size=3),
    wrong=st.booleans(),
)
def test_a_sample_survives_its_dict_and_a_line(prompt, completion, names, meta, wrong):
    sample = Sample(prompt, completion, **names, label=False if wrong else None, meta=meta)
    assert Sample.from_dict(sample.to_dict()) == sample
    assert parse(sample.to_dict()) == sample
    assert parse_line(json.dumps(sample.to_dict(), ensure_ascii=False).encode(), file="f", number=1) == sample


def test_ids_and_chats_survive_their_dict():
    for sample in (
        Sample(prompt_ids=(1, 2), completion_ids=(3,)),
        Sample("seen", "text", prompt_ids=(5,), completion_ids=(2**70,)),
        Sample([USER_TURN], [ANSWER, ANSWER], meta={"label": "x"}),
        Sample("a", "b", label=False, meta={"label": "x", "prompt": 1, "meta": {"lable": 2}}),
    ):
        assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    assert Sample(prompt_ids=[1], completion_ids=[2]).completion_ids == (2,)


@pytest.mark.parametrize(
    "values",
    [
        {"completion": ""},
        {"prompt": "\ud800"},
        {"label": 0},
        {"meta": {"x": (1,)}},
        {"meta": {"x": float("inf")}},
        {"meta": {1: 1}},
        {"meta": None},
        {"prompt_ids": (1,)},
        {"expert": None},
    ],
    ids=repr,
)
def test_a_sample_built_in_python_is_checked_as_a_line_is(values):
    with pytest.raises(SampleError):
        Sample(**({"prompt": "a", "completion": "b"} | values))


def test_files_are_read_line_by_line(tmp_path):
    path = tmp_path / "s.jsonl"
    good = b'{"prompt": "a\\u0000", "completion": "b"}'
    named = b'{"prompt": "a", "completion": "b", "id": "x"}'
    lines = [b"\xef\xbb\xbf" + good, b"", b"  \t", good + b"\r", b"\xff", named, b"{}", named, good]
    path.write_bytes(b"\n".join(lines))
    read = list(read_samples(path))
    assert [number for number, _ in read] == [1, 4, 5, 6, 7, 8, 9]
    digest = hashlib.sha256(good).hexdigest()
    bad, none = (hashlib.sha256(line).hexdigest() for line in (b"\xff", b"{}"))
    ids = [sample.id for _, sample in read]
    assert ids == [f"{digest}-1", f"{digest}-2", f"{bad}-1", "x", f"{none}-1", "x", f"{digest}-3"]
    assert [isinstance(sample, Refused) for _, sample in read] == [False, False, True, False, True, False, False]
    assert read[2][1].reason.startswith(f"{path}:5: byte 1 is not UTF-8; ")
    assert read[0][1].prompt == "a\0"
    path.write_bytes(b"")
    assert list(read_samples(path)) == []


def test_a_line_over_the_limit_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 60)
    path = tmp_path / "s.jsonl"
    for end in (b"\n", b"\r\n"):
        exact = b'{"prompt": "a", "completion": "b"}'.ljust(60)
        lines = [exact, exact + b" ", b"x" * 500, exact, b"y" * 61]
        for last in (b"", end):
            path.write_bytes(end.join(lines) + last)
            read = list(read_samples(path))
            assert [isinstance(sample, Sample) for _, sample in read] == [True, False, False, True, False]
            assert [number for number, _ in read] == [1, 2, 3, 4, 5]
            length = 500 + len(end)
            reason = f"{path}:3: a line of {length} bytes, over the limit of 60; split it or leave it out"
            assert read[2][1] == Refused(f"line-3-of-{length}-bytes", reason)
    with pytest.raises(SampleError, match="more than 60 bytes"):
        parse_line("x" * 61, file="f", number=1)


def test_occurrences_are_counted_within_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OCCURRENCE_WINDOW", 3)
    path = tmp_path / "s.jsonl"
    order = "abacabdea"
    path.write_text("".join(f'{{"prompt": "{c}", "completion": "b"}}\n' for c in order))
    assert [s.id[-2:] for _, s in read_samples(path)] == [
        "-1",
        "-1",
        "-2",
        "-1",
        "-3",
        "-2",
        "-1",
        "-1",
        "-1",
    ]


def test_memory_stays_flat_over_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OCCURRENCE_WINDOW", 100)
    path = tmp_path / "s.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(4000)))
    reader = read_samples(path)
    for _ in range(500):
        next(reader)
    tracemalloc.start()
    for _ in reader:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000
