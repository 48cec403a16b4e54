"""DER++: old samples are replayed with their labels, and with the logits that the model had when they were new.

    loss   CE(new) + alpha MSE(z, z_old) + beta CE(old')      Buzzega et al. 2020, arXiv:2004.07211

The two old samples are drawn independently of each other. Logits are those of the supervised rows, before the update.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from ogpstream.profiling.baselines.baseline import Baseline, Lesson

BETA = 1.0


class DERpp(Baseline):
    """Dark experience replay with labels; `strength` is alpha."""

    rates = (5e-4, 1e-3, 2e-3, 4e-3)
    strengths = (0.1, 0.3, 1.0)
    strength = 0.3

    def attach(self) -> None:
        super().attach()
        self.stored: dict[int, Tensor] = {}

    def learn_lesson(self, lesson: Lesson) -> float:
        logits, target = self.logits(lesson)
        gradient, loss = self.differentiate(cross_entropy(logits, target))
        self.step(self._add(gradient, self.replayed(self.config.rehearsals)))
        if self.keep(lesson):
            self.stored[lesson.uid] = logits.detach()
            for uid in [uid for uid in self.stored if self.ring.find(uid) is None]:
                del self.stored[uid]
        return loss

    def replayed(self, count: int) -> list[Tensor]:
        """Gradients of the replay terms: the first of `count` draws is matched by its logits, the second by its label,
        and so on in turn."""
        found = []
        for number in range(count):
            for old in self.draw(1):
                logits, target = self.logits(old)
                if number % 2:
                    loss = BETA * cross_entropy(logits, target)
                else:
                    assert self.strength is not None
                    loss = self.strength * mse_loss(logits, self.stored[old.uid])
                found.append(self.differentiate(loss)[0])
        return found

    def rest_for(self, evaluations: int) -> None:
        size = self.config.rehearsal_batch
        for start in range(0, evaluations, size):
            found = self.replayed(min(size, evaluations - start))
            if found:
                self.step(self._add(found[0], found[1:]))

    @staticmethod
    def _add(first: Tensor, others: list[Tensor]) -> Tensor:
        return sum(others, first)

    def kept(self) -> Iterable[Tensor]:
        return self.stored.values()
