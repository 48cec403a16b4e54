"""From a sample to the token ids of one update, and where their supervised part begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ogpstream.learner.errors import ConfigError
from ogpstream.learner.samples import Message, Sample, one_line, refuse, shown


@dataclass(frozen=True)
class Encoded:
    """Token ids of a sample: prompt, then completion; only the completion is supervised.

    `cut` counts the ids that were taken from the left of the prompt to fit; `asked` is the prompt with them.
    """

    ids: tuple[int, ...]
    prompt_length: int
    expert: str
    cut: int
    asked: tuple[int, ...]

    @property
    def completion_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode(sample: Sample, tokenizer: Any, *, vocab_size: int, max_tokens: int, append_eos: bool = False) -> Encoded:
    """Token ids of `sample`, at most `max_tokens` (T), every one in [0, vocab_size).

    Text: the special tokens that the tokenizer puts in front (BOS, if it has one), the prompt, the
    completion, tokenised apart so that the border is exact; nothing after the prompt, and after the
    completion the end token only with `append_eos`. Chat: the tokenizer's template, the completion being what
    the whole conversation adds to the prompt with the generation prompt. A sample that is too long loses ids
    from the left of its prompt, behind the leading special tokens.

    Raises SampleError (too long or nothing to learn, no context, an id outside the vocabulary, a chat that
    the template cannot render); ConfigError when max_tokens < 2 or the tokenizer lacks what is asked of it.
    """
    if max_tokens < 2:
        raise ConfigError(f"max_tokens = {max_tokens}: a sample needs at least 2, one of context and one to learn")
    prompt, completion, head = _split(sample, tokenizer, append_eos)
    for name, ids in (("prompt", prompt), ("completion", completion)):
        for token in ids:
            if not 0 <= token < vocab_size:
                refuse(
                    f"id {shown(token)} of the {name} is outside the vocabulary of {vocab_size}",
                    "use the tokenizer of this model",
                )
    if not completion:
        refuse("the completion has no tokens, so there is nothing to learn", "give a longer completion")
    if not prompt:
        refuse("no token comes before the completion", "give a prompt: this tokenizer adds no begin token")
    if len(completion) >= max_tokens:
        refuse(
            f"the completion has {len(completion)} tokens, over the limit of {max_tokens - 1}",
            "shorten or split it",
        )
    cut = max(0, len(prompt) + len(completion) - max_tokens)
    kept = cut_prompt(prompt, cut, head)
    return Encoded(tuple(kept + completion), len(kept), sample.expert, cut, tuple(prompt))


def encode_prompt(prompt: str | Sequence[Message] | Sequence[int], tokenizer: Any) -> list[int]:
    """Ids of a prompt as a sample of it has them, before any cut; ids stay as they are.

    Raises:
        SampleError: a chat that the template cannot render.
        ConfigError: text or a chat, and no tokenizer.
    """
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        return list(cast(Sequence[int], prompt))
    if tokenizer is None:
        raise ConfigError("the learner was made without a tokenizer: give the prompt as ids")
    if isinstance(prompt, str):
        return _leading_ids(tokenizer) + _tokenize(tokenizer, prompt)
    return _rendered(list(cast(Sequence[Message], prompt)), tokenizer, add_generation_prompt=True)


def max_positions(model: Any) -> int:
    """Tokens that a model can take at once; 2^31 where its configuration names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 2**31


def cut_prompt(prompt: list[int], cut: int, head: int) -> list[int]:
    """A prompt without `cut` ids of its left, where the first `head` ids stay as far as there is room for them."""
    head = min(head, len(prompt) - cut)
    return prompt[:head] + prompt[head + cut :]


def _split(sample: Sample, tokenizer: Any, append_eos: bool) -> tuple[list[int], list[int], int]:
    """Ids of prompt and completion, and how many of the prompt's first ids stay whatever is cut."""
    if sample.prompt_ids is not None and sample.completion_ids is not None:
        prompt, completion = list(sample.prompt_ids), list(sample.completion_ids)
    elif isinstance(sample.prompt, str):
        prompt = encode_prompt(sample.prompt, tokenizer)
        completion = _tokenize(tokenizer, str(sample.completion))
        if append_eos:
            if tokenizer.eos_token_id is None:
                raise ConfigError("append_eos is set, but the tokenizer has no end token; unset it")
            completion.append(tokenizer.eos_token_id)
        return prompt, completion, len(_leading_ids(tokenizer))
    else:
        prompt, completion = _render(sample, tokenizer)
    return prompt, completion, int(prompt[:1] == [getattr(tokenizer, "bos_token_id", None)])


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading_ids(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text."""
    plain = _tokenize(tokenizer, "a")
    full = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0) if plain else 0
    return full[:start]


def _render(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    assert isinstance(sample.prompt, list) and isinstance(sample.completion, list)
    prompt = encode_prompt(sample.prompt, tokenizer)
    whole = _rendered(sample.prompt + sample.completion, tokenizer)
    if whole[: len(prompt)] != prompt:
        refuse("the chat template changes the prompt once it is answered", "give prompt and completion as text")
    return prompt, whole[len(prompt) :]


def _rendered(messages: list[Message], tokenizer: Any, *, add_generation_prompt: bool = False) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        refuse("messages, but the tokenizer has no chat template", "give prompt and completion as text")
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True,
                                                  return_dict=False))
    except ImportError as error:
        raise ConfigError(f"chat templates need a package that is missing: {error}") from error
    except Exception as error:
        # a template is a program of the model's makers and may raise anything, often on purpose (order of
        # roles)
        refuse(f"the chat template refuses it: {one_line(str(error))}", "change the messages, or give text")
