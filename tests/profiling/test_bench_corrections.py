"""`bench corrections`: what is asked is what was told, rows that survive, and the fields that scripts rely on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.profiling import corrections_row
from ogpstream.profiling.__main__ import app
from ogpstream.profiling.corrections_row import answers, right
from ogpstream.profiling.facts import facts, strangers, unrelated

FIELDS = {"method", "seed", "stickiness", "stickiness_end", "stickiness_aged", "paraphrase", "neighbours", "strangers",
          "amended", "grad_evals", "update_ms_p50", "state_bytes", "settings"}
SMALL = ["warm_start=false", "rank=2", 'target_modules=["q_proj","down_proj"]']


@pytest.fixture
def model(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> str:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "corrections", *arguments])


def test_an_answer_is_right_where_every_greedy_token_is(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, prompts = tiny_model("llama"), ["Q: a?\nA:", "Q: bc?\nA:", "Q: de?\nA:"]
    made = answers(model, tiny_tokenizer, prompts)
    for prompt, ids in zip(prompts, made, strict=True):
        row = tiny_tokenizer(prompt)["input_ids"]
        for token in ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()) == token
            row = [*row, token]
    # a tokenizer of characters: what it writes by itself is right, anything else is not
    def told(wanted: list[str]) -> list[bool]:
        return right(model, _Fixed(tiny_tokenizer, dict(zip(wanted, made, strict=True))), prompts, wanted)

    assert told(["x", "y", "z"]) == [True, True, True]
    assert right(model, tiny_tokenizer, prompts, ["never so", "or so", "nor so"]) == [False] * 3


class _Fixed:
    """A tokenizer that encodes some answers as given ids."""

    def __init__(self, real: Any, ids: dict[str, tuple[int, ...]]) -> None:
        self.real, self.ids = real, ids

    def __call__(self, text: str, **options: Any) -> Any:
        own = self.ids.get(text.strip())
        return self.real(text, **options) if own is None else {"input_ids": list(own)}


def test_all_methods_have_a_row_and_rows_are_kept(model: str, tmp_path: Path) -> None:
    arguments = ["--model", model, "--facts", "4", "--amends", "2", "--neighbours", "3", "--idle", "1", "--out",
                 str(tmp_path / "out"), "--json", "--threads", "1", "--lr", "ogp=0.02",
                 *(part for item in (*SMALL, "repeats=2", "settled_below=0.0") for part in ("--set", item))]
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["method"] for row in rows} == {"ogp", "replay1", "sequential", "joint"}
    for row in rows:
        assert row.keys() >= FIELDS - {"state_bytes"} and row["facts"] == 4
        assert all(row[name] is None or 0 <= row[name] <= 1 for name in FIELDS & set(row)
                   if name not in ("method", "seed", "grad_evals", "update_ms_p50", "state_bytes", "settings"))
    ogp = next(row for row in rows if row["method"] == "ogp")
    assert ogp["lr"] == 0.02 and ogp["repeats"] == 2 and ogp["answered_neighbours"] <= 1
    assert (tmp_path / "out" / "corrections.csv").read_text().count("\n") == 5
    again = _run(*arguments)
    assert [row["seconds"] for row in json.loads(again.stdout.splitlines()[-1])["rows"]] == [r["seconds"] for r in rows]


class _Forgetful:
    """Knows the last `KEEPS` prompts that it was told, and no second answer to the first of all."""

    KEEPS = 5
    gradients = 7

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.first = ""
        self.rests: list[int] = []

    def learn(self, sample: Sample) -> None:
        prompt = str(sample.prompt)
        self.first = self.first or prompt
        if prompt != self.first or not self.told:
            self.told.pop(prompt, None)
            self.told[prompt] = str(sample.completion).strip()
        while len(self.told) > self.KEEPS:
            del self.told[next(iter(self.told))]

    def rest(self, updates: int) -> None:
        self.rests.append(len(self.told))

    def state_bytes(self) -> int:
        return 11


def test_each_share_is_of_what_its_name_says(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, asked = _Forgetful(), []
    told = facts(8, 0)
    second = {fact.prompts[1] for fact in told[:6]}
    monkeypatch.setattr(corrections_row, "student", lambda *_, **__: learner)
    monkeypatch.setattr(corrections_row, "REST", 3)
    monkeypatch.setattr(corrections_row, "right", lambda model, tokenizer, prompts, wanted: [
        learner.told.get(prompt) == answer or prompt in second for prompt, answer in zip(prompts, wanted, strict=True)])

    def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[tuple[int, ...]]:
        asked.append(prompts)
        # the first one of four changes of the one kind, all of the other
        return [(len(learner.told) if number == 0 or prompts == strangers(4, 8, 0) else 0,)
                for number in range(len(prompts))]

    monkeypatch.setattr(corrections_row, "answers", answers)
    job = corrections_row.Job("agem", model, LearnerConfig().to_dict(), None, facts=8, amends=4, neighbours=4, idle=1,
                              threads=1)
    row = corrections_row.run_row(job)
    assert learner.rests == [3, 5, 5] and row["grad_evals"] == 7 and row["state_bytes"] == 11
    # each at once; five of eight at the end, none of the first quarter; six of sixteen other wordings
    assert (row["stickiness"], row["stickiness_end"], row["stickiness_aged"]) == (1.0, 5 / 8, 0.0)
    assert row["paraphrase"] == 6 / 16
    assert (row["neighbours"], row["strangers"], row["amended"]) == (3 / 4, 0.0, 3 / 4)
    assert asked == [unrelated(4, 0), strangers(4, 8, 0)] * 2


@pytest.mark.parametrize("refresh", [False, True])
def test_with_a_ring_a_method_of_the_learner_refreshes_if_asked(model: str, monkeypatch: pytest.MonkeyPatch,
                                                                refresh: bool) -> None:
    monkeypatch.setattr(corrections_row, "REST", 2)
    calls = []
    for name in ("refresh", "consolidate"):
        monkeypatch.setattr(StreamLearner, name, lambda learner, *_, name=name: calls.append(name))
    done = _run("--model", model, "--facts", "4", "--amends", "0", "--neighbours", "1", "--idle", "1", "--methods",
                "ogp,replay1,sequential", "--threads", "1", *(["--refresh"] if refresh else []),
                *(part for item in (*SMALL, "repeats=0") for part in ("--set", item)))
    assert done.exit_code == 0, done.output
    assert calls == ["refresh" if refresh else "consolidate"] * 4


@pytest.mark.parametrize(("wrong", "told"), [
    (["--methods", "none"], "unknown method none"),
    (["--set", "lr=0.1"], "--lr method=rate"),
    (["--lr", "replay1=x"], "replay1=x is no number"),
    (["--lr", "none=1"], "of no method"),
    (["--methods", "ewc", "--idle", "0"], "Fisher"),
    (["--set", "nothing=1"], "unknown setting nothing"),
])
def test_what_does_not_fit_is_one_line(model: str, wrong: list[str], told: str) -> None:
    done = _run("--model", model, *wrong)
    assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1
