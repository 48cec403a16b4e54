"""OSF as PEFT has it: the leading singular triples of each weight are frozen, and the others are trained.

PEFT's hooks take what lies in the frozen triples' spans out of the gradients of the others (Nayak et al. 2025,
arXiv:2504.07097); Adam's steps do not stay outside them. After each task the weight is merged and decomposed anew. It
is told where tasks end, and it trains nearly all of a weight, not rank r of it: both are advantages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import OSFConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor

from ogpstream.profiling.baselines.baseline import Baseline, Lesson


class OSF(Baseline):
    """Orthogonal subspace fine-tuning; `strength` is the share of singular triples that is preserved, 0.5 in PEFT."""

    boundaries = True
    # it trains weights and not a product of two factors that starts at 0, so it wants smaller steps than LoRA
    rate = 5e-4
    rates = (2e-4, 5e-4, 1e-3)
    # it has no B
    ratios = (1.0,)
    strengths = (0.25, 0.5, 0.75)
    strength = 0.5

    def attach(self) -> None:
        assert self.strength is not None
        targets = self.config.target_modules
        preserve = OSFConfig(effective_rank=float(self.strength),
                             target_modules=list(targets) if isinstance(targets, tuple) else targets)
        self.peft: Any = get_peft_model(self.model, preserve, autocast_adapter_dtype=False)
        self.decomposed = self.rests
        self.layers = [module for module in self.model.modules() if isinstance(module, OSFLayer)]
        self.train()

    def learn_lesson(self, lesson: Lesson) -> float:
        if self.rests > self.decomposed:
            self.peft.merge_and_unload()
            self.attach()
        return super().learn_lesson(lesson)

    def kept(self) -> Iterable[Tensor]:
        # a merged weight has no other copy, so it is state too
        return [t for layer in self.layers for t in (layer.get_base_layer().weight, *layer.buffers())]
