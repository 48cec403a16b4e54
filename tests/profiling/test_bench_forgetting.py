import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from ogpstream.profiling import forgetting_run
from ogpstream.profiling.__main__ import app
from ogpstream.profiling.methods import METHODS

SMALL = ["rehearsals=1", "warm_samples=2", "warm_tokens=8", "rank=2"]
FIELDS = {"method", "stream", "seed", "ring", "acc", "la", "bwt", "crs", "ppl_ratio", "stickiness", "grad_evals",
          "update_ms_p50", "state_bytes"}  # what scripts rely on


@pytest.fixture
def base(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return ["bench", "forgetting", "--model", str(tmp_path / "base"), "--ring", "3", "--idle", "1", "--seeds", "1",
            "--threads", "1", *(word for one in SMALL for word in ("--set", one))]


@pytest.fixture
def arguments(base, tmp_path):
    """The command on a tiny model and two tasks of four samples."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for task in "xy":
        for split, count in (("train", 4), ("test", 2)):
            rows = [{"prompt": f"{task}{n}", "completion": f" {task}", "label": task} for n in range(count)]
            (tasks / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tasks.json").write_text(json.dumps({"tasks": {t: {"labels": ["x", "y"]} for t in "xy"},
                                                  "streams": {"s": ["x", "y"]}}))
    (tmp_path / "texts.txt").write_text("".join(f"some text to keep, number {n}, {'long ' * 20}\n" for n in range(3)))
    (tmp_path / "warm.txt").write_text("a text for the warm start\n")
    return [*base, "--tasks", str(tasks), "--stream", "s",
            "--texts", str(tmp_path / "texts.txt"), "--calibration", str(tmp_path / "warm.txt")]


def _rows(arguments, *more):
    done = CliRunner().invoke(app, [*arguments, "--json", *more])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def test_all_methods_get_a_row_with_all_fields(arguments, tmp_path):
    rows = _rows(arguments, "--out", str(tmp_path / "out"))
    assert tuple(row["method"] for row in rows) == METHODS
    by_method = {row["method"]: row for row in rows}
    for method, row in by_method.items():
        assert set(row) >= FIELDS and row["stream"] == "s" and row["ring"] == 3 and 0 < row["crs"] <= 1
        assert row["boundaries"] == (method in ("ewc", "si", "olora", "osf")) and row["tasks"] == ["x", "y"]
        if method == "joint":
            assert row["la"] is row["bwt"] is row["stickiness"] is None and row["epochs"] > 0
            continue
        last = row["accuracies"][-1]
        assert row["acc"] == sum(last) / 2 and row["bwt"] == last[0] - row["accuracies"][0][0]
        assert 0 <= row["stickiness"] <= 1 and row["prequential_loss"] > 0 and row["update_ms_p50"] > 0
        assert row["lr"] == {"ogp-literal": 1e-4, "osf": 5e-4}.get(method, 1.5e-3 if method.startswith("ogp") else 1e-3)
        assert (row["coverage"] > 0) == (method in ("ogp", "ogp-named", "ogp-uncut", "ogp-shared"))
    # 8 samples with one more evaluation each and 2 idle updates of two; the ring begins empty for some
    for method in ("sequential", "replay16", "ewc", "si", "olora", "osf"):
        assert by_method[method]["grad_evals"] == 8 * 2 + 4
    for method in ("ogp", "ogp-named", "ogp-uncut", "ogp-shared", "replay1", "agem", "derpp", "mer"):
        assert by_method[method]["grad_evals"] == 8 * 2 + 4 - 1
    written = list(csv.DictReader((tmp_path / "out" / "forgetting.csv").open()))
    assert [float(row["acc"]) for row in written] == [row["acc"] for row in rows]
    for picture in ("accuracy", "matrix"):
        assert (tmp_path / "out" / f"{picture}-s-ring3.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverged_has_a_row_too(arguments, monkeypatch):
    def overflow(probe):
        raise OverflowError

    monkeypatch.setattr("ogpstream.learner.retention.RetentionProbe.measure", overflow)
    (row,) = _rows(arguments, "--methods", "agem", "--lr", "agem=1e37")
    assert row["crs"] is row["ppl_ratio"] is row["prequential_loss"] is None and 0 <= row["acc"] <= 1


def test_the_embedded_corrections_need_no_data(base):
    (there, back) = _rows(base, "--methods", "agem", "--limit", "1", "--stream", "demo", "--stream", "demo:reversed")
    (ours,) = _rows(base, "--methods", "ogp", "--limit", "1")
    assert ours["stream"] == "demo" and ours["samples"] == there["samples"] and ours["coverage"] > 0
    assert len(there["tasks"]) >= 4 and there["tasks"] == back["tasks"][::-1]
    assert there["samples"] == len(there["tasks"]) and there["crs"] is None


def test_idle_phases_after_so_many_samples(arguments):
    (row,) = _rows(arguments, "--methods", "replay1", "--idle-every", "3")
    # 8 samples with an old one each but the first, and idle updates of two after 3, 6 and 8
    assert row["grad_evals"] == 8 * 2 - 1 + 3 * 2 and row["idle_every"] == 3


def test_texts_without_running_text_are_told(arguments, tmp_path):
    (tmp_path / "short.txt").write_text("too short\n")
    done = CliRunner().invoke(app, [*arguments, "--texts", str(tmp_path / "short.txt")])
    assert done.exit_code == 2 and "running text" in done.stderr


def test_finished_rows_are_not_computed_again(arguments, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    first = _rows(arguments, *out, "--methods", "agem,si")
    real, computed = forgetting_run.run_row, []
    monkeypatch.setattr(forgetting_run, "run_row", lambda job, *rest: computed.append(job) or real(job, *rest))
    again = _rows(arguments, *out, "--methods", "agem,mer,si", "--seeds", "2")
    assert [(job.method, job.seed) for job in computed] == [("mer", 0), ("si", 1), ("agem", 1), ("mer", 1)]
    assert [row for row in again if row["seed"] == 0 and row["method"] != "mer"] == first
    # another setting is another row
    computed.clear()
    assert [row["ring"] for row in _rows(arguments, *out, "--methods", "agem", "--ring", "2")] == [2]
    _rows(arguments, *out, "--methods", "agem", "--lr", "agem=1e-4")
    assert len(computed) == 2 and len(list(csv.DictReader((tmp_path / "out" / "forgetting.csv").open()))) == 8


def test_a_killed_run_goes_on(arguments, tmp_path):
    rows = tmp_path / "out" / "rows.jsonl"
    command = [sys.executable, "-m", "ogpstream.profiling", *arguments, "--methods", "agem,mer,si,ewc", "--seeds", "3",
               "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 2) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = rows.read_text().splitlines()
    told = CliRunner().invoke(app, [*arguments, "--methods", "agem,mer,si,ewc", "--out", str(tmp_path / "out")])
    assert told.exit_code == 0 and "of 4 rows are there already" in told.stderr
    assert rows.read_text().splitlines()[: len(before)] == before


def test_rows_of_several_processes_are_those_of_one(arguments):
    def same(row):
        return {name: value for name, value in row.items() if name not in ("update_ms_p50", "seconds")}

    methods = ("--methods", "derpp,osf")
    assert list(map(same, _rows(arguments, *methods, "--jobs", "2"))) == list(map(same, _rows(arguments, *methods)))


def test_rates_that_were_found_on_one_stream_are_used_on_another(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("ogpstream.profiling.baselines.ewc.EWC.rates", (1e-4, 3e-3))
    monkeypatch.setattr("ogpstream.profiling.baselines.ewc.EWC.strengths", (7.0,))
    file = tmp_path / "rates.json"
    tried = _rows(arguments, "--methods", "ogp,ewc", "--tune", "2", "--find-rates", str(file))
    assert [(row["method"], row["lr"], row["lr_ratio"], row["strength"], row["tune"]) for row in tried] == [
        ("ewc", 1e-4, 1.0, 7.0, 2), ("ewc", 1e-4, 2.0, 7.0, 2), ("ewc", 3e-3, 1.0, 7.0, 2), ("ewc", 3e-3, 2.0, 7.0, 2)]
    found = json.loads(file.read_text())
    assert set(found) == {"ewc"} and found["ewc"]["tuned_on"] == "s"
    ogp, ewc = _rows(arguments, "--methods", "ogp,ewc", "--rates", str(file), "--stream", "s:reversed")[2:]
    assert [ewc[name] for name in ("lr", "lr_ratio", "strength", "tuned_on")] == [
        *(found["ewc"][name] for name in ("lr", "lr_ratio")), 7.0, "s"]
    assert ewc["tasks"] == ["y", "x"] and ogp["lr"] == 1.5e-3 and ogp["tuned_on"] is None


def test_the_warm_start_takes_the_given_texts(arguments, tmp_path):
    def columns(*more):
        return _rows(arguments, "--methods", "ogp", *more)[0]["basis_columns"]

    few = columns("--set", "directions_per_sample=0", "--set", "restart_after=0")
    (tmp_path / "warm.txt").write_text("".join(f"{n} of many texts, {n * n} of them\n" for n in range(40)))
    assert columns("--set", "directions_per_sample=0", "--set", "restart_after=0") > few > 0


@pytest.mark.parametrize("wrong,told", [
    (["--methods", "ogp,ewx"], "ewx"), (["--set", "rank"], "name=value"), (["--lr", "ogp:1"], "name=value"),
    (["--lr", "ewx=1"], "ewx"), (["--stream", "z"], "no stream 'z'"), (["--find-rates", "r.json"], "--tune"),
    (["--methods", "ogp", "--tune", "2", "--find-rates", "r.json"], "nothing to try for ogp"),
    (["--set", "rank=0"], "rank is 0"), (["--set", "lr=1"], "--lr method=rate"),
    (["--rates", "none.json"], "--find-rates"), (["--lr", "agem=abc"], "agem=abc is no number"),
    (["--stream", "x,y,x"], "a task twice"), (["--methods", "agem", "--tune", "4"], "hold back fewer"),
    (["--methods", "ewc", "--idle", "0"], "Fisher"), (["--methods", "si", "--idle-every", "3"], "end of a task"),
])
def test_wrong_options_are_told(arguments, wrong, told):
    done = CliRunner().invoke(app, [*arguments, *wrong])
    assert done.exit_code == 2 and told in " ".join(done.stderr.split())
