"""Which prompts the scope lets in, once so many are learned: those of the same task, of others, texts, single facts.

No model runs for it: what is learned is told to the scope alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ogpstream.learner.description import Describer
from ogpstream.learner.encoding import encode_prompt
from ogpstream.memory.scope import Scope
from ogpstream.profiling.facts import facts, strangers, unrelated
from ogpstream.profiling.tasks import Task

# prompts of a kind that are asked at most
ASKED = 200
_EXPERT = "default"


class Learned:
    """A scope that has learned some prompts.

    Args:
        describe: of ids, as of a learner on the model.
    """

    def __init__(self, tokenizer: Any, describe: Describer, prompts: Sequence[str]) -> None:
        self._tokenizer, self._describe, self._scope = tokenizer, describe, Scope()
        for prompt in prompts:
            ids = self._ids(prompt)
            self._scope = self._scope.learned(_EXPERT, ids, describe(ids, [len(ids)])[0])

    def share(self, asked: Sequence[str]) -> float:
        """Of some prompts, the first `ASKED`, those that it lets in."""
        found = [bool(self._scope.answering(self._ids(prompt), [_EXPERT], self._describe))
                 for prompt in asked[:ASKED]]
        return sum(found) / len(found)

    def _ids(self, prompt: str) -> list[int]:
        return encode_prompt(prompt, self._tokenizer)


def of_tasks(tokenizer: Any, describe: Describer, tasks: Sequence[Task], texts: Sequence[str], count: int
             ) -> list[dict[str, Any]]:
    """A row for each task of which `count` prompts, or all, are learned, and one in which the same of all are."""
    rows = []
    for own in (*([task] for task in tasks), *([tasks] if len(tasks) > 1 else [])):
        prompts = [str(sample.prompt) for task in own for sample in task.learn[:count]]
        each = ASKED // len(own)
        test = [pair for task in own for pair in list(zip(task.prompts, task.answers, strict=True))[:each]]
        asked = {
            "own": [prompt for prompt, _ in test],
            "own_answered": [f"{prompt} {answer}" for prompt, answer in test],
            "others": [prompt for task in tasks if task not in own for prompt in task.prompts[: ASKED // len(tasks)]],
            "texts": texts,
        }
        name = own[0].name if len(own) == 1 else f"all {len(own)}"
        rows.append(_row(name, len(prompts), Learned(tokenizer, describe, prompts), asked))
    return rows


def of_facts(tokenizer: Any, describe: Describer, counts: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """A row for each number of single facts that are learned, one wording of each."""
    rows = []
    for count in counts:
        told = facts(count, seed)
        learned = Learned(tokenizer, describe, [fact.prompts[0] for fact in told])
        asked = {"own": [wording for fact in told for wording in fact.prompts[1:]],
                 "others": unrelated(ASKED, seed), "strangers": strangers(ASKED, count, seed)}
        rows.append(_row("facts", count, learned, asked))
    return rows


def _row(name: str, count: int, learned: Learned, asked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    shares = {kind: learned.share(prompts) for kind, prompts in asked.items() if prompts}
    return {"learned": name, "prompts": count, **shares}
