"""One update of one sample, four ways, on models with the same weights and the same targets, rank and bases.

    ours    `Updater.run`: gradient, Adam, projection of the gradient and of A, publishing
    peft    PEFT as it is used: the model's own loss of `labels`, autograd, AdamW over all factors in one call, and the
            projection of each A in two products
    kept    the same with logits of the supervised rows only, by `logits_to_keep` and a loss by hand
    floor   forward, what ours computes again, and the backward to the inputs alone, without any adapter

Ours has one expert, no held part and no base anchor here, because the others have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import PreTrainedModel

from ogpstream.learner import LearnerConfig
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.sites import Attachment, attach
from ogpstream.learner.state import LearnerState
from ogpstream.learner.step import sample_gradients
from ogpstream.learner.update import Updater
from ogpstream.profiling.vram import fill_state

Run = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """One sample: `tokens` ids, the last `rows` of them supervised."""

    ids: Sequence[int]
    rows: int

    @classmethod
    def random(cls, vocabulary: int, tokens: int, rows: int) -> Work:
        generator = torch.Generator().manual_seed(0)
        return cls(torch.randint(1, vocabulary, (tokens,), generator=generator).tolist(), rows)


class Ours:
    """The learner's own update.

    Attributes:
        updater: with its preflight.
    """

    def __init__(self, model: PreTrainedModel, config: LearnerConfig) -> None:
        self.config = replace(config, settled_below=0.0, warm_start=False)
        targets = config.target_modules
        self.attachment: Attachment = attach(
            model, rank=config.rank, basis_scope=config.basis_scope,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
        )  # fmt: skip
        self.state = LearnerState.fresh(self.attachment, self.config)
        fill_state(self.state, self.config, experts=1, held_rank=0)
        self.updater = Updater(self.attachment, self.state.store, self.state.protection, self.config)
        self.updater.publish()
        _ = self.updater.preflight.footprint

    def update(self, work: Work, on_unit: Callable[[str], None] | None = None) -> None:
        """One update; tells `on_unit` of each unit that is done."""
        for unit in self.updater.run("expert0", [Lesson(work.ids, len(work.ids) - work.rows, again=False)]):
            if on_unit is not None:
                on_unit(unit)

    def floor(self, work: Work) -> None:
        """Forward and backward of the base model, with activations kept as for the update."""
        plan = self.updater.preflight.plan(len(work.ids), work.rows)
        binding = self.attachment.binding
        served, binding.served = binding.served, None
        try:
            for _ in sample_gradients(self.updater.walk, binding, [], [(work.ids, len(work.ids) - work.rows)],
                                      chunk=self.config.loss_chunk, activations=plan):
                pass
        finally:
            binding.served = served

    def bases(self) -> dict[str, Tensor]:
        """P.T `[m, D_in]` of each adapted linear, by its name."""
        bases = self.state.protection.bases
        return {site.shape.name: bases[site.shape.basis].rows() for site in self.attachment.sites}


class Peft:
    """The same work by PEFT and autograd.

    Args:
        model: a copy of the model without adapters; it is wrapped.
        bases: of `Ours.bases`.
    """

    def __init__(self, model: PreTrainedModel, config: LearnerConfig, targets: Sequence[str],
                 bases: dict[str, Tensor]) -> None:
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(targets))
        # adapters of a bf16 model become float32, so that AdamW has masters
        self.model = get_peft_model(model, lora).eval()
        device = model.device
        self.optimizer = create_loraplus_optimizer(
            self.model, torch.optim.AdamW, lr=config.lr, loraplus_lr_ratio=config.loraplus_lr_ratio, betas=config.betas,
            weight_decay=0.0, fused=True)
        self.projected: list[tuple[Tensor, Tensor]] = []
        moved: dict[int, Tensor] = {}
        for name, module in self.model.base_model.model.named_modules():
            if name in bases:
                rows = moved.setdefault(id(bases[name]), bases[name].to(device))
                self.projected.append((module.lora_A["default"].weight, rows))
        if len(self.projected) != len(bases):
            raise ValueError(f"PEFT adapted {len(self.projected)} linears, ours {len(bases)}")

    def update(self, work: Work, *, kept: bool = False) -> None:
        """One update; with logits of all rows, or of those `kept` that count."""
        ids = torch.tensor([work.ids], device=self.model.device)
        if kept:
            # the row before each supervised id predicts it
            logits = self.model(input_ids=ids, logits_to_keep=work.rows + 1, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, -work.rows :])
        else:
            labels = ids.clone()
            labels[0, : -work.rows] = -100
            loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, rows in self.projected:
                # PEFT keeps A.T
                weight.addmm_(weight @ rows.T, rows, alpha=-1)


def providers(model: PreTrainedModel, config: LearnerConfig) -> tuple[Ours, Peft]:
    """Both on models of their own with the same weights; `model` is the one of ours."""
    twin: Any = copy.deepcopy(model)
    ours = Ours(model, config)
    return ours, Peft(twin, config, ours.attachment.target_modules, ours.bases())
