"""The first directions of P: what the base model itself uses, so that its abilities are protected from update one.

An empty P protects nothing of the base: perplexity on held-out text doubles and worse. Calibration text, or samples
drawn from the model, give the covariance C = sum_t x_t x_t.T of every adapted linear's input; its leading
eigenvectors join P until they hold the wanted share of the input energy tr(C), and the
others become the base anchor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.encoding import max_positions
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.sites import Attachment


def calibration_ids(
    attachment: Attachment,
    tokenizer: PreTrainedTokenizerBase | None,
    config: LearnerConfig,
    texts: Sequence[str] | None,
    max_tokens: int,
) -> list[list[int]]:
    """Token ids of the given texts, or of samples of the base model's own where there are none.

    Raises:
        ConfigError: texts without a tokenizer, or without a token.
    """
    if texts is None:
        first = None if tokenizer is None else tokenizer.bos_token_id
        return own_samples(attachment, count=config.warm_samples, tokens=config.warm_tokens, seed=config.seed,
                           first=first)
    if tokenizer is None:
        raise ConfigError("calibration texts need a tokenizer: give one, or no texts")
    rows = [ids for text in texts if (ids := tokenizer(text).input_ids[:max_tokens])]
    if not rows:
        raise ConfigError("the calibration texts hold no token: give longer ones, or none")
    return rows


@torch.no_grad()
def own_samples(attachment: Attachment, *, count: int, tokens: int, seed: int, first: int | None) -> list[list[int]]:
    """Texts that the base model writes by itself at temperature 1.

    Args:
        first: id they start with, such as the tokenizer's bos; None draws one for each.

    Returns:
        `count` lists of `tokens` ids, the same ones for the same seed.
    """
    model = attachment.model
    config = model.config.get_text_config()
    tokens = min(tokens, max_positions(model))
    generator = torch.Generator().manual_seed(seed)
    if first is None:
        ids = torch.randint(config.vocab_size, (count, 1), generator=generator)
    else:
        ids = torch.full((count, 1), first)
    cache = None
    latest = ids
    with attachment.binding.using(None):
        for _ in range(tokens - 1):
            output = model(input_ids=latest.to(model.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            latest = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, latest], 1)
    texts: list[list[int]] = ids.tolist()
    return texts


@torch.no_grad()
def input_covariances(attachment: Attachment, texts: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Covariance `[D_in, D_in]` in float64 of what the base model feeds into the linears of each basis.

    Linears that share a basis without sharing an input (basis scope "shared") are averaged, each scaled to trace 1,
    so that layers with large activations do not drown the others.
    """
    sums: dict[int, Tensor] = {}
    seen: set[str] = set()
    handles = []
    shared = len({site.shape.basis for site in attachment.sites}) == len({s.shape.d_in for s in attachment.sites})
    for site in attachment.sites:
        if shared or site.shape.basis not in seen:
            seen.add(site.shape.basis)
            sums[site.index] = torch.zeros(site.shape.d_in, site.shape.d_in, dtype=torch.float64)

            def add(_module: object, args: tuple[Tensor, ...], total: Tensor = sums[site.index]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).double().cpu()
                total.addmm_(x.T, x)

            handles.append(site.module.register_forward_pre_hook(add))
    try:
        with attachment.binding.using(None):
            for text in texts:
                attachment.model(input_ids=torch.tensor([list(text)], device=attachment.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    covariances: dict[str, Tensor] = {}
    for index, total in sums.items():
        key = attachment.sites[index].shape.basis
        scaled = total / total.trace().clamp_min(torch.finfo(torch.float64).tiny)
        covariances[key] = covariances[key] + scaled if key in covariances else scaled
    return covariances

