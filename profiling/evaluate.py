"""Measures of what a causal language model knows: label ranking, accuracy over a stream of tasks, perplexity.

Works with any decoder of transformers and its tokenizer, leaves the model's mode and gradients as they were,
and computes log-probabilities in float32 or wider.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ogpstream.learner.encoding import max_positions
from ogpstream.learner.retention import text_losses


@contextmanager
def _inference(model: Any) -> Iterator[torch.device]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model.get_input_embeddings().weight.device
    finally:
        model.train(training)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Ids [rows, longest], filled up with 0 on the right, where no real token of a causal model sees them."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


def rank_labels(
    model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[Sequence[str]], *, batch: int = 32
) -> list[str]:
    """The likeliest label of each prompt, by the sum of the log-probabilities of the tokens of `" " + label`.

    No end token is scored, and ties go to the label that stands first. Prompts are encoded with the
    tokenizer's special tokens and cut from the left to what the model's positions leave beside the longest
    of their labels. A prompt runs through the model once: all labels share its keys and values.

    Args:
        labels: to choose from, for each prompt its own.
        batch: prompts of one forward. Only prompts of equal length share one, so that none is padded.
    """
    answers: dict[tuple[str, ...], list[list[int]]] = {}
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for i, (prompt, own) in enumerate(zip(prompts, map(tuple, labels), strict=True)):
        if own not in answers:
            answers[own] = _label_ids(model, tokenizer, own)
        row = tokenizer(prompt)["input_ids"][-_room(model, answers[own]) :]
        if not row:
            raise ValueError(f"prompt {i} has no tokens: a label needs at least one to follow")
        by_length[len(row)].append((i, row))

    chosen = [""] * len(prompts)
    with _inference(model) as device:
        for group in by_length.values():
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                ids = torch.tensor([row for _, row in part], device=device)
                scores = _label_scores(model, ids, [answers[tuple(labels[i])] for i, _ in part])
                # argmax does not say which of several equal maxima it returns; this says the first
                best = (scores == scores.max(1, keepdim=True).values).int().argmax(1)
                for (i, _), label in zip(part, best.tolist(), strict=True):
                    chosen[i] = labels[i][label]
    return chosen


def _label_ids(model: Any, tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    if not labels:
        raise ValueError("no labels to rank: give at least one")
    answers: list[list[int]] = [tokenizer(" " + label, add_special_tokens=False)["input_ids"] for label in labels]
    if empty := [label for label, ids in zip(labels, answers, strict=True) if not ids]:
        raise ValueError(f"label {empty[0]!r} has no tokens: give labels that the tokenizer can write")
    if _room(model, answers) < 1:
        raise ValueError(
            f"a label of {max(map(len, answers))} tokens leaves no room in {max_positions(model)} positions: shorten it"
        )
    return answers


def _room(model: Any, answers: Sequence[Sequence[int]]) -> int:
    """Positions for a prompt beside the longest of its answers, whose last token needs none."""
    return max_positions(model) - (max(map(len, answers)) - 1)


def _label_scores(model: Any, prompts: Tensor, answers: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Sums of log-probabilities [n, labels] for prompts [n, tokens] and the ids of each one's labels; -inf where a
    prompt has fewer labels than another."""
    n, labels = len(prompts), max(map(len, answers))
    # what fills up has one token, and is told from the others by `present`
    filled = [label for own in answers for label in [*own, *[[0]] * (labels - len(own))]]
    counts = torch.tensor([len(own) for own in answers], device=prompts.device)
    present = torch.arange(labels, device=prompts.device) < counts[:, None]
    target = _padded(filled, prompts.device).view(n, labels, -1)
    longest = target.shape[2]
    lengths = torch.tensor([len(label) for label in filled], device=prompts.device).view(n, labels, 1)
    real = torch.arange(longest, device=prompts.device) < lengths
    feeds = longest > 1
    out = model(input_ids=prompts, use_cache=feeds, logits_to_keep=1)
    first = _log_probs(out.logits[:, -1])  # [n, vocabulary]
    scores = first.gather(1, target[:, :, 0])
    if feeds:
        cache = out.past_key_values
        cache.batch_repeat_interleave(labels)
        logits = model(input_ids=target[:, :, :-1].flatten(0, 1), past_key_values=cache, use_cache=True).logits
        rest = _log_probs(logits).view(n, labels, longest - 1, -1)
        scores = scores + (rest.gather(-1, target[:, :, 1:, None]).squeeze(-1) * real[:, :, 1:]).sum(-1)
    return scores.masked_fill(~present, -math.inf)


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Share of predictions that equal their label."""
    if len(predictions) != len(labels) or not labels:
        raise ValueError(
            f"{len(predictions)} predictions for {len(labels)} labels: give one for each, at least one"
        )
    return sum(p == q for p, q in zip(predictions, labels, strict=True)) / len(labels)


class AccuracyMatrix:
    """`a[t][i]`, the accuracy on task i after the t-th task of a stream, and what is read off it.

    ACC = mean_i a[T][i]; LA = mean_i a[i][i]; BWT = mean_{i<T} (a[T][i] - a[i][i]), 0 for a single task
    (Lopez-Paz and Ranzato 2017, with LA as in Riemer et al. 2019).
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks {list(tasks)}: give at least one, each once, in the order of the stream")
        self.tasks = tuple(tasks)
        self.rows: list[list[float]] = []

    def add(self, accuracies: Sequence[float]) -> None:
        """The accuracies on all tasks, in the order of the stream, after one more task was learned."""
        if len(accuracies) != len(self.tasks):
            raise ValueError(f"{len(accuracies)} accuracies for {len(self.tasks)} tasks: give one for each")
        if len(self.rows) == len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} tasks have their row already: start a new matrix")
        self.rows.append([float(a) for a in accuracies])

    def _complete(self) -> np.ndarray:
        if len(self.rows) < len(self.tasks):
            raise ValueError(
                f"{len(self.rows)} of {len(self.tasks)} tasks have been evaluated: add the other rows"
            )
        return np.array(self.rows)

    @property
    def acc(self) -> float:
        return float(self._complete()[-1].mean())

    @property
    def la(self) -> float:
        return float(self._complete().diagonal().mean())

    @property
    def bwt(self) -> float:
        a = self._complete()
        return float((a[-1] - a.diagonal())[:-1].mean()) if len(a) > 1 else 0.0


def perplexity(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss per token over all rows of token ids; the first token of a row is given.

    Rows are cut on the right to the model's positions; a row needs two tokens at least.
    """
    limit = max_positions(model)
    rows = [list(row[:limit]) for row in rows]
    if not rows:
        raise ValueError("no rows of token ids: a perplexity needs at least one")
    if short := [i for i, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(f"row {short[0]} has {len(rows[short[0]])} tokens: a loss needs at least 2")
    tokens = torch.tensor([len(row) - 1 for row in rows], dtype=torch.float64)
    with _inference(model):
        losses = text_losses(model, rows)
    return math.exp(float((losses * tokens).sum() / tokens.sum()))


class Trigram:
    """Interpolated modified Kneser-Ney trigram model over token ids: what a perplexity is compared with.

    Tables are sorted int64 keys of n-grams. Counts are raw for trigrams, numbers of distinct left neighbours
    for lower orders; the three discounts of an order follow from its counts of counts (Chen and Goodman
    1999, section 3: modified Kneser-Ney smoothing). The last resort is the uniform distribution.
    """

    def __init__(self, rows: Sequence[Sequence[int]], vocab: int) -> None:
        self.vocab = vocab
        self.orders: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        grams = np.concatenate([self._grams(np.asarray(row, dtype=np.int64)) for row in rows])
        keys, counts = np.unique(grams, return_counts=True)
        for order in (3, 2, 1):
            ones, twos, threes, fours = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
            y = ones / (ones + 2 * twos)
            by_count = [0.0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
            discount = np.clip(by_count, 0.0, [0.0, 1.0, 2.0, 3.0])[np.minimum(counts, 3)]
            contexts, inverse = np.unique(keys // vocab, return_inverse=True)
            total = np.bincount(inverse, counts)
            freed = np.bincount(inverse, discount) / total
            self.orders.append((keys, (counts - discount) / total[inverse], contexts, freed))
            # a lower-order gram counts once for each distinct token that was seen before it
            keys, counts = np.unique(keys % vocab ** (order - 1), return_counts=True)

    def _grams(self, row: np.ndarray) -> np.ndarray:
        """Keys (u vocab + v) vocab + w of the tokens w after the first, which stands before itself too."""
        padded = np.concatenate([row[:1], row])
        return (padded[:-2] * self.vocab + padded[1:-1]) * self.vocab + padded[2:]

    def perplexity(self, rows: Sequence[Sequence[int]]) -> float:
        """exp of the mean negative log-probability of the tokens after the first of each row."""
        grams = np.concatenate([self._grams(np.asarray(row, dtype=np.int64)) for row in rows])
        p = np.full(len(grams), 1 / self.vocab)
        for order, (keys, probs, contexts, freed) in zip((1, 2, 3), reversed(self.orders), strict=True):
            gram = grams % self.vocab**order
            p = _lookup(keys, probs, gram, 0.0) + _lookup(contexts, freed, gram // self.vocab, 1.0) * p
        return math.exp(-np.log(p).mean())


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
