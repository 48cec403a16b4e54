import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ogpstream.learner.encoding import Encoded, encode
from ogpstream.learner.errors import ConfigError, SampleError
from ogpstream.learner.samples import Sample

BOS, EOS, USER, ASSISTANT = 0, 1, 2, 3
VOCAB = 4 + 256
CHAT = (
    "<s>{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('role') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"

USER_TURN = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


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


def test_text_is_tokenised_with_an_exact_border():
    assert enc(Sample("ab", " c", "x", "i", "s")) == Encoded((BOS, *code("ab c")), 3, "x", 0, (BOS, *code("ab")))
    assert enc(Sample("ab", " c")).completion_length == 2
    assert enc(Sample("ab", " c"), NO_BOS).ids == code("ab c")
    assert enc(Sample("ab", "c"), append_eos=True).ids == (BOS, *code("abc"), EOS)
    assert enc(Sample("é\0", "😀")).ids == (BOS, *code("é\0😀"))
    many = byte_tokenizer(template="<s> <s> $A </s>")
    assert enc(Sample("ab", "c"), many).ids == (BOS, BOS, *code("abc"))
    assert enc(Sample("ab", "c"), many, max_tokens=4).ids == (BOS, BOS, *code("bc"))
    asked = (BOS, BOS, *code("ab"))
    assert enc(Sample("ab", "cd"), many, max_tokens=3) == Encoded((BOS, *code("cd")), 1, "default", 3, asked)


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
    prompt=st.text("abc", min_size=1, max_size=30),
    completion=st.text("xyz", min_size=1, max_size=30),
    limit=st.integers(2, 40),
    bos=st.booleans(),
)
def test_what_is_too_long_is_cut_from_the_left_of_the_prompt(prompt, completion, limit, bos):
    tokenizer = TOKENIZER if bos else NO_BOS
    lead = (BOS,) if bos else ()
    if len(completion) > limit - 1:
        with pytest.raises(SampleError, match="over the limit"):
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
    words.normalizer = normalizers.Replace("b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(SampleError, match="no tokens, so there is nothing to learn"):
        enc(Sample("a", "b"), tokenizer)
    with pytest.raises(SampleError, match="no token comes before the completion"):
        enc(Sample("b", "a"), tokenizer)
    with pytest.raises(ConfigError, match="no end token"):
        enc(Sample("a", "a"), tokenizer, append_eos=True)
    with pytest.raises(ConfigError, match="max_tokens = 1"):
        enc(Sample("a", "a"), max_tokens=1)
