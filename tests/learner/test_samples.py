import dataclasses
import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ogpstream.learner import samples as module
from ogpstream.learner.errors import ConfigError, SampleError
from ogpstream.learner.samples import Encoded, Sample, encode, parse_line, read_samples

BOS, EOS, USER, ASSISTANT = 0, 1, 2, 3
VOCAB = 4 + 256
CHAT = (
    "<s>{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('role') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def byte_tokenizer(*, template="<s> $A </s>", chat=CHAT):
    """One id per byte, after four special tokens."""
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": specials[2:]})
    fast.chat_template = chat
    return fast


TOKENIZER = byte_tokenizer()
NO_BOS = byte_tokenizer(template=None)


def code(text, tokenizer=TOKENIZER):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def enc(sample, tokenizer=TOKENIZER, *, vocab_size=VOCAB, max_tokens=64, **options):
    return encode(sample, tokenizer, vocab_size=vocab_size, max_tokens=max_tokens, **options)


def parse(value):
    return parse_line(json.dumps(value), file="f.jsonl", number=7)


def test_prompt_and_completion_with_everything_optional():
    names = {"expert": "math", "id": "a1", "source": "ann"}
    other = {"label": "Business", "task": [1, {"x": None}]}
    sample = parse({"prompt": "2+2=", "completion": " 4", **names, **other})
    assert (sample.prompt, sample.completion, sample.expert) == ("2+2=", " 4", "math")
    assert (sample.id, sample.source, sample.label, sample.trained) == ("a1", "ann", None, True)
    assert sample.meta == other
    plain = parse({"prompt": "", "completion": "x", "id": None, "expert": None, "source": None})
    assert plain == Sample("", "x") and plain.expert == "default" and plain.meta == {}
    assert parse({"prompt": "", "completion": "x", "id": 12}).id == "12"


@pytest.mark.parametrize("label", [True, None, 0, "false", "", [], 0.0])
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
    ({"prompt": "a", "completion": None}, "no completion"),
    ({"prompt": 1, "completion": "b"}, "a number and text"),
    ({"prompt": [USER_TURN], "completion": "b"}, "a list and text"),
    ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
    ({"prompt": [USER_TURN], "completion": []}, "completion is empty"),
    ({"prompt": [USER_TURN], "completion": [USER_TURN]}, "not from the assistant"),
    ({"prompt": ["a"], "completion": [ANSWER]}, "without a role"),
    ({"prompt": [{"role": "user", "content": None}], "completion": [ANSWER]}, "content is not text"),
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
    prompt=st.text(),
    completion=st.text(min_size=1),
    names=st.fixed_dictionaries({}, optional={k: st.text(min_size=1) for k in ("expert", "id", "source")}),
    meta=st.dictionaries(st.text(), VALUES, max_size=3),
    wrong=st.booleans(),
)
def test_a_sample_survives_its_dict_and_a_line(prompt, completion, names, meta, wrong):
    meta = {
        k: v for k, v in meta.items() if k not in {f.name for f in dataclasses.fields(Sample)} | {"messages"}
    }
    sample = Sample(prompt, completion, **names, label=False if wrong else None, meta=meta)
    assert Sample.from_dict(sample.to_dict()) == sample
    assert parse(sample.to_dict()) == sample
    assert parse_line(json.dumps(sample.to_dict(), ensure_ascii=False).encode(), file="f", number=1) == sample


def test_ids_and_chats_survive_their_dict():
    for sample in (
        Sample(prompt_ids=(1, 2), completion_ids=(3,)),
        Sample("seen", "text", prompt_ids=(), completion_ids=(2**70,)),
        Sample([USER_TURN], [ANSWER, ANSWER], meta={"label": "x"}),
    ):
        assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    assert Sample(prompt_ids=[1], completion_ids=[2]).completion_ids == (2,)


@pytest.mark.parametrize(
    "values",
    [
        {"completion": ""},
        {"prompt": "\ud800"},
        {"label": 0},
        {"meta": {"prompt": 1}},
        {"meta": {"x": (1,)}},
        {"meta": {"x": float("inf")}},
        {"meta": {1: 1}},
        {"meta": None},
        {"label": False, "meta": {"label": "x"}},
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
    ids = [sample.id if isinstance(sample, Sample) else type(sample) for _, sample in read]
    assert ids == [f"{digest}-1", f"{digest}-2", SampleError, "x", SampleError, "x", f"{digest}-3"]
    assert str(read[2][1]).startswith(f"{path}:5: byte 1 is not UTF-8; ")
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
            assert str(read[2][1]) == f"{path}:3: a line of more than 60 bytes; split it or leave it out"
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


def test_text_is_tokenised_with_an_exact_border():
    assert enc(Sample("ab", " c", "x", "i", "s")) == Encoded((BOS, *code("ab c")), 3, "x", "i", "s", 0)
    assert enc(Sample("ab", " c")).completion_length == 2
    assert enc(Sample("ab", " c"), NO_BOS).ids == code("ab c")
    assert enc(Sample("", "c")).ids == (BOS, *code("c"))
    assert enc(Sample("ab", "c"), append_eos=True).ids == (BOS, *code("abc"), EOS)
    assert enc(Sample("é\0", "😀")).ids == (BOS, *code("é\0😀"))
    many = byte_tokenizer(template="<s> <s> $A </s>")
    assert enc(Sample("ab", "c"), many).ids == (BOS, BOS, *code("abc"))
    assert enc(Sample("ab", "c"), many, max_tokens=4).ids == (BOS, BOS, *code("bc"))
    assert enc(Sample("ab", "cd"), many, max_tokens=3) == Encoded(
        (BOS, *code("cd")), 1, "default", None, None, 3
    )


def test_ids_are_taken_as_they_are():
    encoded = enc(Sample("not", "this", prompt_ids=(5, 6), completion_ids=(7, VOCAB - 1)))
    assert (encoded.ids, encoded.prompt_length) == ((5, 6, 7, VOCAB - 1), 2)


def test_chats_go_through_the_template():
    encoded = enc(Sample([USER_TURN, ANSWER, USER_TURN], [ANSWER]))
    context = (BOS, USER, *code("a"), ASSISTANT, *code("b"), EOS, USER, *code("a"), ASSISTANT)
    assert encoded.ids == (*context, *code("b"), EOS)
    assert encoded.prompt_length == len(context)
    for tokenizer, what in (
        (byte_tokenizer(chat=None), "has no chat template"),
        (byte_tokenizer(chat=REWRITING), "changes the prompt"),
        (byte_tokenizer(chat="{{ nothing.there }}"), "template refuses it"),
    ):
        with pytest.raises(SampleError, match=what) as raised:
            enc(Sample([USER_TURN], [ANSWER]), tokenizer)
        assert "\n" not in str(raised.value) and "; " in str(raised.value)
    with pytest.raises(SampleError, match="template refuses it: role"):
        enc(Sample([{"role": "tool", "content": "a"}], [ANSWER]))


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("abc", max_size=30),
    completion=st.text("xyz", min_size=1, max_size=30),
    limit=st.integers(2, 40),
    bos=st.booleans(),
)
def test_what_is_too_long_is_cut_from_the_left_of_the_prompt(prompt, completion, limit, bos):
    tokenizer = TOKENIZER if bos else NO_BOS
    lead = (BOS,) if bos else ()
    if len(completion) > limit - 1 or not (prompt or bos):
        with pytest.raises(SampleError, match="over the limit|no token comes before"):
            enc(Sample(prompt, completion), tokenizer, max_tokens=limit)
        return
    encoded = enc(Sample(prompt, completion), tokenizer, max_tokens=limit)
    kept = min(len(prompt), limit - len(completion) - len(lead))
    assert encoded.ids == lead + code(prompt[len(prompt) - kept :] + completion)
    assert encoded.cut == len(prompt) - kept
    assert encoded.prompt_length == len(lead) + kept >= 1
    assert encoded.completion_length == len(completion)
    by_ids = Sample(prompt_ids=lead + code(prompt), completion_ids=code(completion))
    assert enc(by_ids, tokenizer, max_tokens=limit).ids == encoded.ids


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        (
            Sample(prompt_ids=(1,), completion_ids=(VOCAB,)),
            f"id {VOCAB} of the completion is outside the vocabulary of {VOCAB}",
        ),
        (Sample(prompt_ids=(1, -1), completion_ids=(2,)), "id -1 of the prompt is outside"),
        (
            Sample(prompt_ids=(2**70, *range(100)), completion_ids=(2,)),
            "id 1180591620717411303424 of the prompt",
        ),
        (Sample(prompt_ids=(), completion_ids=(2,)), "no token comes before"),
        (Sample("a", "b" * 64), "has 64 tokens, over the limit of 63"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_learned_is_refused_by_name(sample, what):
    with pytest.raises(SampleError, match=what) as raised:
        enc(sample)
    assert "; " in str(raised.value) and "\n" not in str(raised.value)
    assert enc(Sample("a", "b" * 63)).prompt_length == 1


def test_a_model_smaller_than_its_tokenizer_and_texts_without_tokens():
    with pytest.raises(SampleError, match="outside the vocabulary of 4"):
        enc(Sample("a", "b"), vocab_size=4)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token=None))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(SampleError, match="no tokens, so there is nothing to learn"):
        enc(Sample("a", "  "), tokenizer)
    with pytest.raises(ConfigError, match="no end token"):
        enc(Sample("a", "a"), tokenizer, append_eos=True)
    with pytest.raises(ConfigError, match="max_tokens = 1"):
        enc(Sample("a", "a"), max_tokens=1)
