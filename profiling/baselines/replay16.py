"""Replay 1:16: with every 16th new sample one evaluation goes to an old one, as in the written specification.

The other evaluations repeat the new sample, so that there are as many as for the other methods; idle phases rehearse
the ring. Replay of one or more old samples with each new one is the learner itself without protection, `replay1`.
"""

from __future__ import annotations

from ogpstream.profiling.baselines.baseline import Baseline, Lesson

EVERY = 16


class Replay16(Baseline):
    """Plain LoRA with one old sample for 16 new ones."""

    def learn_lesson(self, lesson: Lesson) -> float:
        count = 1 + self.config.rehearsals
        old = self.draw(1) if lesson.uid % EVERY == 0 and count > 1 else []
        first, *_ = [self.update(one) for one in ([lesson] * (count - len(old)) + old)]
        self.keep(lesson)
        return first

    def rest_for(self, evaluations: int) -> None:
        size = self.config.rehearsal_batch
        for start in range(0, evaluations, size):
            gradients = [self.gradient(old)[0] for old in self.draw(min(size, evaluations - start))]
            if gradients:
                self.step(sum(gradients[1:], gradients[0]))
