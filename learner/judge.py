"""What the loss and the gradient of a sample say of it: that it is learned, or that it must not be."""

from __future__ import annotations

import math

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.step import Reading


class Judge:
    """Judges samples of a model with so many tokens."""

    def __init__(self, config: LearnerConfig, vocabulary: int) -> None:
        self._config, self._vocabulary = config, vocabulary

    def learned(self, again: bool, reading: Reading) -> bool:
        """Whether a sample counts as learned; not `again`, it has had no update before and is guessed at best."""
        config = self._config
        if config.guard == "gradient":
            # the specification's form asks for the loss alone, and not for a second look
            return reading.loss < config.learned_below
        # the mean alone passes a completion of several tokens whose first one, which decides, is still a guess: six
        # answers of four tokens guessed with equal chances have a loss of ln(6) / 4 = 0.45
        return again and reading.loss < config.learned_below and reading.certain >= config.learned_share

    def refusal(self, loss: float, norm: float) -> str | None:
        """Why a sample of this loss and gradient norm may not be learned, or None."""
        # a first loss of 13 to 26 x the running mean is normal where a new domain begins, so only the absurd is
        # refused: twice the loss of guessing among all tokens
        limit = 2.0 * math.log(self._vocabulary)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "the loss or its gradient is not finite"
        return f"the loss is {loss:.2f} nats per token, over the limit of {limit:.2f}" if loss > limit else None
