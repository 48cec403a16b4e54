"""What a model answers with what was learned, and what the base model alone would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ogpstream.learner.encoding import encode_prompt, max_positions
from ogpstream.learner.errors import ConfigError, ModelError
from ogpstream.learner.samples import Message

if TYPE_CHECKING:
    from ogpstream.learner.learner import StreamLearner


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        experts: who answered; empty where the prompt is left to the base model.
        answer: text behind the prompt, without special tokens.
        base_answer: that of the base model alone, which is the same without experts.
    """

    prompt: str | Sequence[Message]
    experts: tuple[str, ...]
    answer: str
    base_answer: str


def answer(learner: StreamLearner, prompt: str | Sequence[Message], max_new_tokens: int) -> Answer:
    """Ask a learner's model, greedily.

    Args:
        max_new_tokens: of the answer, at most; it ends before them where the model writes its end token.

    Raises:
        ConfigError: nothing is asked, too much for the model's positions, or with another model's tokenizer.
        ModelError: there is no memory for it.
        SampleError: a chat that the template cannot render.
    """
    ids = encode_prompt(prompt, learner.tokenizer)
    if not ids:
        raise ConfigError("the prompt has no tokens: ask something")
    if max(ids) >= learner.vocab_size:
        raise ConfigError(f"id {max(ids)} of the prompt is outside the vocabulary of {learner.vocab_size}: use the "
                          "tokenizer of this model")
    positions = max_positions(learner.model)
    if len(ids) + max_new_tokens > positions:
        raise ConfigError(f"{len(ids)} tokens of the prompt and {max_new_tokens} new ones are more than the model's "
                          f"{positions} positions: ask less, or for fewer new ones")
    experts = learner.answering(ids)
    try:
        with learner.pinned(ids):
            said = base_said = _generate(learner, ids, max_new_tokens)
        if experts:
            with learner.attachment.binding.using(None):
                base_said = _generate(learner, ids, max_new_tokens)
    except torch.OutOfMemoryError:
        raise ModelError(f"memory ran out on {len(ids)} tokens of the prompt and {max_new_tokens} new ones: ask less, "
                         "or for fewer new ones") from None
    return Answer(prompt, experts, said, base_said)


def _generate(learner: StreamLearner, ids: Sequence[int], max_new_tokens: int) -> str:
    tokenizer: Any = learner.tokenizer
    asked = torch.tensor([ids], device=learner.model.get_input_embeddings().weight.device)
    generate: Any = learner.model.generate
    # the tokenizer, since a model's own generation settings may name texts to stop at
    made = generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=max_new_tokens, do_sample=False,
                    num_beams=1, temperature=None, top_p=None, top_k=None, tokenizer=tokenizer,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    text: str = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    return text
