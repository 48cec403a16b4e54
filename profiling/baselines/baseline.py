"""What the baselines share: PEFT's LoRA on the learner's linears, gradients of single samples, Adam, a ring.

A baseline makes as many gradient evaluations as the learner: 1 + `rehearsals` for each new sample, up to `repeats`
more until it is learned, and `rehearsal_batch` for each update of an idle phase. This class spends all of them on the
new sample, and in idle phases on the latest ones; each method overrides what its paper does otherwise. Flat vectors
hold all trained parameters in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ogpstream.learner import LearnerConfig, ModelError, Sample
from ogpstream.learner.encoding import encode, max_positions
from ogpstream.learner.state import SLOT_TOKENS
from ogpstream.memory.replay import ReplayRing


class Lesson(NamedTuple):
    """Token ids of prompt and completion, `prompt_length` of them prompt; `uid` counts the new samples from 1."""

    ids: tuple[int, ...]
    prompt_length: int
    uid: int


class Baseline:
    """Plain LoRA that learns each sample by itself; the base of the methods that do something about forgetting.

    Args:
        model: a decoder of transformers; adapted in place.
        config: of the learner: rank, alpha, linears, rates of A and B, betas, ring and the number of evaluations are
            taken from it.
        strength: the method's own setting; None is its default.

    Attributes:
        boundaries: whether the method's formula is told where a task ends.
        rate, strength: the learning rate and the method's own setting where none was tuned.
        rates, ratios, strengths: what is tried when the method is tuned; a ratio is that of B's rate to A's.
        gradients: evaluations so far.
        rests: idle phases so far.
        recent: samples since the last idle phase.
    """

    boundaries: ClassVar[bool] = False
    rate: ClassVar[float] = 1e-3
    rates: ClassVar[Sequence[float]] = (2.5e-4, 5e-4, 1e-3, 2e-3)
    ratios: ClassVar[Sequence[float]] = (1.0, 2.0)
    strengths: ClassVar[Sequence[float]] = ()
    strength: float | None = None

    def __init__(self, model: Any, tokenizer: Any, config: LearnerConfig, *, strength: float | None = None) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        if strength is not None:
            self.strength = strength
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.max_tokens = min(config.max_tokens, max_positions(model), SLOT_TOKENS)
        self.ring = ReplayRing(config.ring_samples, SLOT_TOKENS, vocab_size=self.vocab_size, keep=config.ring_keep,
                               seed=config.seed)
        self.gradients = 0
        self.rests = 0
        self.learned = 0
        self.recent: list[Lesson] = []
        self._draws = 0
        torch.manual_seed(config.seed)
        self.attach()
        model.eval()

    # parameters

    def attach(self) -> None:
        """Put the trained parameters into the model and `train` them."""
        get_peft_model(self.model, self.lora(), autocast_adapter_dtype=False)
        self.train()

    def lora(self) -> LoraConfig:
        targets = self.config.target_modules
        return LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=0.0,
                          target_modules=list(targets) if isinstance(targets, tuple) else targets)

    def train(self) -> None:
        """From now on the parameters that require gradients are trained, by an Adam of their own.

        Raises:
            ModelError: there are none.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ModelError(f"{type(self).__name__} finds no linear to train in {type(self.model).__name__}: "
                             "use a model of nn.Linear layers")
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        self._sizes = [p.numel() for p in self.parameters]
        rate = self.config.lr
        # LoRA+, as the learner has it
        self.optimizer = torch.optim.Adam([
            {"params": [p for name, p in named if "lora_B" not in name], "lr": rate},
            {"params": [p for name, p in named if "lora_B" in name], "lr": rate * self.config.loraplus_lr_ratio},
        ], betas=self.config.betas)

    def theta(self) -> Tensor:
        """A copy of all trained parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def set_theta(self, values: Tensor) -> None:
        with torch.no_grad():
            for parameter, part in zip(self.parameters, values.split(self._sizes), strict=True):
                parameter.copy_(part.view_as(parameter))

    # gradients and steps

    def logits(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Logits `[rows, vocabulary]` of the supervised ids, and these ids."""
        ids = torch.tensor([lesson.ids], device=self.model.device)
        rows = len(lesson.ids) - lesson.prompt_length
        # the row before each supervised id predicts it
        logits = self.model(input_ids=ids, logits_to_keep=rows + 1, use_cache=False).logits[0, :-1]
        return logits, ids[0, lesson.prompt_length :]

    def gradient(self, lesson: Lesson) -> tuple[Tensor, float]:
        """The gradient of a sample's mean cross-entropy, and that: one evaluation."""
        return self.differentiate(cross_entropy(*self.logits(lesson)))

    def differentiate(self, loss: Tensor) -> tuple[Tensor, float]:
        parts = torch.autograd.grad(loss, self.parameters)
        self.gradients += 1
        return torch.cat([part.reshape(-1) for part in parts]), float(loss.detach())

    def step(self, gradient: Tensor) -> None:
        """One step of Adam."""
        for parameter, part in zip(self.parameters, gradient.split(self._sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # the stream

    def learn(self, sample: Sample) -> float:
        """Learn one new sample; its loss before."""
        encoded = encode(sample, self.tokenizer, vocab_size=self.vocab_size, max_tokens=self.max_tokens,
                         append_eos=self.config.append_eos)
        self.learned += 1
        lesson = Lesson(encoded.ids, encoded.prompt_length, self.learned)
        loss = self.learn_lesson(lesson)
        self.repeat(lesson, self.config.repeats)
        self.recent.append(lesson)
        return loss

    def learn_lesson(self, lesson: Lesson) -> float:
        """The 1 + `rehearsals` evaluations of a new sample; its loss before them."""
        first, *_ = [self.update(lesson) for _ in range(1 + self.config.rehearsals)]
        return first

    def repeat(self, lesson: Lesson, evaluations: int) -> None:
        """Learn a new sample again, by so many evaluations at most; as the learner does, until it is learned."""
        for _ in range(evaluations):
            if self.update(lesson) < self.config.learned_below:
                break

    def update(self, lesson: Lesson) -> float:
        """One step on one sample, of one evaluation; its loss before."""
        gradient, loss = self.gradient(lesson)
        self.step(gradient)
        return loss

    def rest(self, updates: int) -> None:
        """The idle phase after a task."""
        self.rest_for(updates * self.config.rehearsal_batch)
        self.rests += 1
        self.recent.clear()

    def rest_for(self, evaluations: int) -> None:
        """What is done with the evaluations of an idle phase."""
        for lesson in self.latest(evaluations):
            self.update(lesson)

    def latest(self, count: int) -> list[Lesson]:
        """The samples since the last idle phase, the newest first, again from there where they are too few."""
        return [self.recent[-1 - n % len(self.recent)] for n in range(count)] if self.recent else []

    # memory

    def keep(self, lesson: Lesson) -> bool:
        """Offer a sample to the ring; whether it was taken."""
        return self.ring.add(lesson.ids, lesson.prompt_length, expert="", uid=lesson.uid) is not None

    def draw(self, count: int) -> list[Lesson]:
        """Different old samples by chance, fewer where the ring holds fewer."""
        self._draws += 1
        slots = map(self.ring.get, self.ring.draw(count, counter=self._draws))
        return [Lesson(tuple(slot.ids.tolist()), slot.prompt_length, slot.uid) for slot in slots]

    def state_bytes(self) -> int:
        """Bytes of all trained parameters, Adam's moments, the ring's samples and what the method keeps besides."""
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        samples = self.ring.state_dict()[0].values() if len(self.ring) else ()
        return sum(tensor.nbytes for tensor in (*self.parameters, *moments, *samples, *self.kept()))

    def kept(self) -> Iterable[Tensor]:
        """Tensors that the method keeps between samples, besides parameters, moments and the ring."""
        return ()
