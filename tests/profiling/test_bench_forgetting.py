import csv
import json

import pytest
from typer.testing import CliRunner

from ogpstream.profiling.__main__ import app

SMALL = ["rehearsals=1", "warm_samples=2", "warm_tokens=8"]


@pytest.fixture
def arguments(tiny_model, tiny_tokenizer, tmp_path):
    """The command on a tiny model and two tasks of four samples."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for task in "xy":
        for split, count in (("train", 4), ("test", 2)):
            rows = [{"prompt": f"{task}{n}", "completion": f" {task}", "label": task} for n in range(count)]
            (tasks / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tasks.json").write_text(json.dumps({"tasks": {t: {"labels": ["x", "y"]} for t in "xy"}}))
    (tmp_path / "texts.txt").write_text("".join(f"some text to keep, number {n}, {'long ' * 20}\n" for n in range(3)))
    (tmp_path / "warm.txt").write_text("a text for the warm start\n")
    return ["bench", "forgetting", "--model", str(tmp_path / "base"), "--tasks", str(tasks), "--stream", "x,y",
            "--texts", str(tmp_path / "texts.txt"), "--calibration", str(tmp_path / "warm.txt"), "--ring", "3",
            "--idle", "1", "--threads", "1", *(word for one in SMALL for word in ("--set", one))]


def test_all_methods_get_a_row_each_seed(arguments, tmp_path):
    done = CliRunner().invoke(app, [*arguments, "--seeds", "2", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for seed in (0, 1) for method in ("ogp", "replay", "sequential")
    ]
    for row in rows:
        assert row["stream"] == "x,y" and row["ring"] == 3 and 0 < row["crs"] <= 1 and len(row["final"]) == 2
        assert bool(row["basis_columns"]) == (row["method"] == "ogp")
    # the first sample finds an empty ring, and sequential learns it again instead
    assert [row["grad_evals"] for row in rows[:3]] == [8 + 7 + 4, 8 + 7 + 4, 8 + 8 + 4]
    written = list(csv.DictReader((tmp_path / "out" / "forgetting.csv").open()))
    assert [float(row["acc"]) for row in written] == [row["acc"] for row in rows]


def test_the_warm_start_takes_the_given_texts(arguments, tmp_path):
    def columns(*more):
        done = CliRunner().invoke(app, [*arguments, "--methods", "ogp", "--json", *more])
        return json.loads(done.stdout.splitlines()[-1])["rows"][0]["basis_columns"]

    few = columns("--set", "directions_per_sample=0", "--set", "restart_after=0")
    (tmp_path / "warm.txt").write_text("".join(f"{n} of many texts, {n * n} of them\n" for n in range(40)))
    assert columns("--set", "directions_per_sample=0", "--set", "restart_after=0") > few > 0


@pytest.mark.parametrize("wrong,told", [(["--methods", "ogp,ewc"], "ewc"), (["--set", "rank"], "name=value"),
                                        (["--lr", "ogp:1"], "name=value")])
def test_wrong_options_are_told(arguments, wrong, told):
    done = CliRunner().invoke(app, [*arguments, *wrong])
    assert done.exit_code == 2 and told in done.stderr
