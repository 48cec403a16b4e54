"""What an update learns from: the token ids of one sample, as much of them as there is room and time for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ogpstream.learner.encoding import cut_prompt
from ogpstream.memory.replay import Slot


@dataclass(frozen=True)
class Lesson:
    """Token ids to learn from.

    Attributes:
        again: they had an update before, so that they can count as learned.
        refusal: why nothing may be computed with them, or None.
        asked: the prompt before any cut, which the scope is to know; None is the one that is in `ids`.
    """

    ids: Sequence[int]
    prompt_length: int
    again: bool
    refusal: str | None = None
    asked: Sequence[int] | None = None

    @classmethod
    def of(cls, slot: Slot) -> Lesson:
        """What an old sample is learned from again."""
        return cls(slot.ids.tolist(), slot.prompt_length, again=True)

    @property
    def rows(self) -> int:
        """Supervised ids."""
        return len(self.ids) - self.prompt_length

    def asking(self, prompt: int, first: int | None) -> Lesson:
        """The lesson with at most `prompt` ids of its prompt, at least 1, cut as `within` does."""
        return self.within(self.rows + prompt, first)

    def within(self, tokens: int | None, first: int | None) -> Lesson:
        """The lesson cut to `tokens` ids from the left of its prompt; refused where not one of these would be left.

        Args:
            first: an id that stays where the prompt begins with it, such as the tokenizer's bos.
        """
        if tokens is None or len(self.ids) <= tokens:
            return self
        asked = self.ids[: self.prompt_length] if self.asked is None else self.asked
        if tokens <= self.rows:
            return replace(self, refusal=f"there is no memory for the {self.rows} tokens of the completion alone: "
                                         "free some, or split it")
        prompt, cut = list(self.ids[: self.prompt_length]), len(self.ids) - tokens
        kept = cut_prompt(prompt, cut, int(prompt[0] == first))
        return replace(self, ids=[*kept, *self.ids[self.prompt_length :]], prompt_length=len(kept), asked=asked)
