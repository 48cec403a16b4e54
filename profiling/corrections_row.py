"""One row of `bench corrections`: facts are told to a method, each once, and it is asked for them at once and later."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogpstream.learner import LearnerConfig, Sample
from ogpstream.learner.pretrained import load_pretrained
from ogpstream.profiling.baselines.joint import Joint
from ogpstream.profiling.facts import Fact, facts, strangers, unrelated
from ogpstream.profiling.methods import method_config, student
from ogpstream.profiling.row_store import Keyed
from ogpstream.profiling.student import LearnerStudent

# ids of a greedy answer that is compared with an earlier one
ANSWER = 4
# prompts of one forward
BATCH = 64
# facts between two idle phases; another one comes behind the last
REST = 100

# facts or epochs done
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Job(Keyed):
    """What one row is of.

    Attributes:
        facts: told, one after the other.
        amends: of them that are told again with another answer at the end.
        neighbours: questions of each kind that were never told.
        idle: updates of the idle phase after every 100 facts, and the last.
        refresh: the learner itself, with a ring, rests until it knows all that is there instead, `idle` or not.
    """

    method: str
    model: str
    config: dict[str, Any]
    lr: float | None
    facts: int
    amends: int
    neighbours: int
    idle: int
    threads: int | None
    refresh: bool = False


def run_row(job: Job, on_progress: Progress = lambda done: None) -> dict[str, Any]:
    """The scores of one job.

    Raises:
        OgpStreamError: model or settings do not fit.
    """
    started = time.perf_counter()
    if job.threads:
        torch.set_num_threads(job.threads)
    config = LearnerConfig.from_dict(job.config)
    model, tokenizer = load_pretrained(job.model)
    told = facts(job.facts, job.seed)
    amended = [fact.amended(job.seed) for fact in told[: job.amends]]
    others = {"neighbours": unrelated(job.neighbours, job.seed),
              "strangers": strangers(job.neighbours, job.facts, job.seed)}
    before = {kind: answers(model, tokenizer, prompts) for kind, prompts in others.items()}
    if job.method == "joint":
        joint = Joint(model, tokenizer, method_config("joint", config, lr=job.lr))
        epochs, converged = joint.train_all([_sample(fact) for fact in told],
                                            on_epoch=lambda epoch, loss: on_progress(epoch))
        row: dict[str, Any] = {"stickiness": None, "amended": None, "grad_evals": joint.gradients,
                               "update_ms_p50": None, "epochs": epochs, "converged": converged}
    else:
        learner = student(job.method, model, tokenizer, config, lr=job.lr)
        stuck, milliseconds = [], []
        for number, fact in enumerate(told, 1):
            began = time.perf_counter()
            learner.learn(_sample(fact))
            milliseconds.append(1e3 * (time.perf_counter() - began))
            stuck += right(model, tokenizer, [fact.prompts[0]], [fact.answer])
            if number % REST == 0 or number == len(told):
                if job.refresh and isinstance(learner, LearnerStudent) and learner.alone is None:
                    learner.learner.refresh()
                elif job.idle:
                    learner.rest(job.idle)
            on_progress(number)
        row = {"stickiness": _share(stuck), "grad_evals": learner.gradients,
               "update_ms_p50": sorted(milliseconds)[len(milliseconds) // 2]}
    known = [[fact.prompts[wording] for fact in told] for wording in range(3)]
    wanted = [fact.answer for fact in told]
    ends = [right(model, tokenizer, prompts, wanted) for prompts in known]
    after = {kind: answers(model, tokenizer, prompts) for kind, prompts in others.items()}
    row |= {"stickiness_end": _share(ends[0]), "stickiness_aged": _share(ends[0][: max(1, len(told) // 4)]),
            "paraphrase": _share(ends[1] + ends[2]),
            **{kind: _share([old == new for old, new in zip(before[kind], after[kind], strict=True)])
               for kind in others}}
    if job.method != "joint":
        changed = []
        for fact in amended:
            learner.learn(_sample(fact))
            changed += right(model, tokenizer, [fact.prompts[0]], [fact.answer])
        row |= {"amended": _share(changed) if changed else None, "state_bytes": learner.state_bytes()}
        if isinstance(learner, LearnerStudent):
            answering = learner.learner.answering
            row |= {f"answered_{kind}": _share([bool(answering(prompt)) for prompt in prompts])
                    for kind, prompts in {**others, "paraphrase": known[1] + known[2]}.items()}
    return {"method": job.method, "seed": job.seed, "facts": job.facts, "ring": config.ring_samples,
            "repeats": config.repeats, "lr": method_config(job.method, config, lr=job.lr).lr, **row,
            "idle": job.idle, "refresh": job.refresh, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started, "settings": job.settings}


def _sample(fact: Fact) -> Sample:
    return Sample(prompt=fact.prompts[0], completion=f" {fact.answer}")


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def right(model: Any, tokenizer: Any, prompts: Sequence[str], wanted: Sequence[str]) -> list[bool]:
    """Whether the greedy continuation of each prompt begins with " " and the wanted answer."""
    completions = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in wanted]
    found = [False] * len(prompts)
    for numbers, ids, start in _batches(model, tokenizer, prompts, completions):
        guessed = model(input_ids=ids, use_cache=False).logits[:, start - 1 : -1].argmax(-1)
        for number, same in zip(numbers, (guessed == ids[:, start:]).all(1).tolist(), strict=True):
            found[number] = same
    return found


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt, `ANSWER` ids."""
    found: list[tuple[int, ...]] = [()] * len(prompts)
    for numbers, ids, start in _batches(model, tokenizer, prompts, [[]] * len(prompts)):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
                              min_new_tokens=ANSWER, pad_token_id=0)
        for number, row in zip(numbers, made[:, start:].tolist(), strict=True):
            found[number] = tuple(row)
    return found


def _batches(model: Any, tokenizer: Any, prompts: Sequence[str], behind: Sequence[list[int]]
             ) -> Iterator[tuple[list[int], Tensor, int]]:
    """Prompts of one length with what is behind them, of one length too, so that none is padded.

    Yields:
        Their numbers, ids `[n, T]`, and the length of the prompts.
    """
    groups: dict[tuple[int, int], list[tuple[int, list[int]]]] = defaultdict(list)
    for number, (prompt, rest) in enumerate(zip(prompts, behind, strict=True)):
        ids = tokenizer(prompt)["input_ids"]
        groups[len(ids), len(rest)].append((number, [*ids, *rest]))
    for (start, _), rows in groups.items():
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            yield [number for number, _ in part], torch.tensor([row for _, row in part], device=model.device), start
