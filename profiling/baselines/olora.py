"""O-LoRA: a new LoRA for each task, kept at right angles to the frozen ones of earlier tasks by a penalty.

    loss   CE + lambda sum_i |A_i A_t^T|_F^2       Wang et al. 2023, arXiv:2310.14152; A is PEFT's [r, D_in]

As printed; the authors' code sums absolute values. All of them are active. It is told where tasks end, and it has rank
r for each of them: both are advantages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ogpstream.profiling.baselines.baseline import Baseline, Lesson


def penalty_gradient(strength: float, new: Tensor, old: Sequence[Tensor]) -> Tensor:
    """The gradient of lambda sum_i |A_i A_t^T|_F^2 to A_t: 2 lambda sum_i A_t A_i^T A_i."""
    total = torch.zeros_like(new)
    for one in old:
        total += 2 * strength * (new @ one.T) @ one
    return total


class OLoRA(Baseline):
    """Orthogonal low-rank adaptation; `strength` is lambda, 0.5 in the paper."""

    boundaries = True
    strengths = (0.1, 0.5, 5.0)
    strength = 0.5

    def attach(self) -> None:
        self.tasks = ["task0"]
        self.peft: Any = get_peft_model(self.model, self.lora(), adapter_name="task0", autocast_adapter_dtype=False)
        self._train_newest()

    def learn_lesson(self, lesson: Lesson) -> float:
        if self.rests == len(self.tasks):
            self.tasks.append(f"task{self.rests}")
            self.peft.add_adapter(self.tasks[-1], self.lora(), autocast_adapter_dtype=False)
            self._train_newest()
        return super().learn_lesson(lesson)

    def _train_newest(self) -> None:
        self.peft.base_model.set_adapter(self.tasks)
        newest = f".{self.tasks[-1]}."
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(newest in name)
        self.train()
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def factors(self, task: str) -> list[nn.Parameter]:
        """A of one task at every linear."""
        return [layer.lora_A[task].weight for layer in self.layers]

    def update(self, lesson: Lesson) -> float:
        gradient, loss = self.gradient(lesson)
        self.step(gradient + self.penalty())
        return loss

    def penalty(self) -> Tensor:
        """The penalty's gradient, in the order of the trained parameters; 0 for B."""
        assert self.strength is not None
        *earlier, newest = (self.factors(task) for task in self.tasks)
        to_a = {id(new): penalty_gradient(self.strength, new.detach(), [a.detach() for a in old])
                for new, *old in zip(newest, *earlier, strict=True)}
        return torch.cat([to_a.get(id(p), torch.zeros_like(p)).reshape(-1) for p in self.parameters])

    def kept(self) -> Iterable[Tensor]:
        trained = {id(p) for p in self.parameters}
        return [p for layer in self.layers for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters())
                if id(p) not in trained]
