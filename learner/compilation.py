"""The compilation of a learner's kernels at start: of which operands forwards and updates will launch them."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch

from ogpstream.kernels import dispatch
from ogpstream.learner.update import Updater


def compile_kernels(updater: Updater, *, tokens: int, vocabulary: int) -> None:
    """Compile the kernels of the operations that Triton computes here; see `StreamLearner.warm_up`.

    Args:
        tokens: T of the longest sample.
        vocabulary: V.
    """
    model, config, store = updater.attachment.model, updater.config, updater.store

    def compiled(dtype: torch.dtype, *operations: str) -> bool:
        here = torch.empty(0, dtype=dtype, device=model.device)
        return any(dispatch.backend_for(here, operation).name == "triton" for operation in operations)

    of_linears = compiled(model.dtype, "lora_forward", "lora_backward")
    of_loss = compiled(model.dtype, "cross_entropy")
    experts = [store.expert(name) for name in store.names]
    widths = sorted(max([config.held_rank or 0, *(held.rank for held in expert.held)]) + expert.rank
                    for expert in experts)
    ranks, most, step = {expert.rank for expert in experts}, sum(widths[-config.side_by_side:]), store.multiple
    columns = range(-(-min(ranks) // step) * step, most + step, step)
    # an expert's columns come after those of the others that are active with it
    starts = {sum(before) for n in range(config.side_by_side)
              for before in combinations_with_replacement(sorted(ranks), n)}
    shapes = [(site.d_in, site.d_out, R, slice(start, start + rank))
              for site in store.sites for R in columns for rank in ranks for start in starts if start + rank <= R]
    if of_linears or of_loss:
        # triton exists for Linux only
        from ogpstream.kernels.warm_up import warm_up

        warm_up(shapes if of_linears else [], dtype=model.dtype, device=model.device, tokens=tokens,
                vocabulary=vocabulary if of_loss else None)
    if compiled(store.dtype, "sgd_", "adam_", "project_out_"):
        for rank in ranks:
            updater.proposer.warm_up(store.layout(rank))
