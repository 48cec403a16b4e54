"""`bench scope`: shares are of what is asked, beside what was learned, and the same as a learner's own answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.learner.description import Describer
from ogpstream.profiling.__main__ import app
from ogpstream.profiling.scope_shares import Learned


@pytest.fixture
def model(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> str:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_row_for_each_task_for_all_and_for_each_number_of_facts(model: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A text that nobody asked for runs on and on.\n\n" * 3)
    done = CliRunner().invoke(app, ["bench", "scope", "--model", model, "--learned", "40", "--facts", "3", "--facts",
                                    "40", "--texts", str(tmp_path / "texts.txt"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["learned"], row["prompts"]) for row in rows[-3:]] == [("all 5", 200), ("facts", 3), ("facts", 40)]
    assert len(rows) == 8 and all(0.0 <= row[kind] <= 1.0 for row in rows for kind in ("own",))
    assert all("others" in row and "texts" in row for row in rows[:5]) and "others" not in rows[5]
    assert all(rows[-1][kind] <= rows[-1]["own"] for kind in ("others", "strangers"))


def test_what_is_learned_is_let_in_as_a_learner_does_it(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    prompts = [f"Q: what of {word}?\nA:" for word in ("stone", "river", "cloud")]
    asked = [*prompts, "Q: what of rivers?\nA:", "nothing of the kind", "Q: who?\nA:"]
    shares = Learned(tiny_tokenizer, Describer(model.get_input_embeddings()), prompts)
    config = LearnerConfig(rank=2, warm_start=False, rehearsals=0)
    learner = StreamLearner(model, tiny_tokenizer, config)
    for prompt in prompts:
        learner.learn_one(Sample(prompt=prompt, completion=" no"))
    for prompt in asked:
        assert shares.share([prompt]) == float(bool(learner.answering(prompt)))
    assert shares.share(prompts) == 1.0 and shares.share(["nothing of the kind"]) == 0.0
    assert shares.share([*prompts, "nothing of the kind"]) == 0.75


def test_a_folder_that_is_none_is_told(model: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "scope", "--model", model, "--tasks", str(tmp_path), "--stream", "x"])
    assert done.exit_code == 2 and "no folder of tasks" in done.stderr and len(done.stderr.splitlines()) == 1
