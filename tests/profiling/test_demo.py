import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ogpstream.learner import LearnerConfig
from ogpstream.profiling import demo_run, demo_worker, out_folder
from ogpstream.profiling.__main__ import app
from ogpstream.profiling.demo_pool import two_at_a_time
from ogpstream.profiling.demo_progress import DemoProgress
from ogpstream.profiling.demo_report import draw, summary, table
from ogpstream.profiling.demo_worker import Job
from ogpstream.profiling.tasks import demo_tasks

TASKS = ["a", "b"]
FIELDS = {  # what scripts rely on
    "updates", "update_ms_p50", "acc_before", "acc_after", "acc_after_sequential", "acc_after_replay", "bwt",
    "bwt_sequential", "bwt_replay", "base_retention", "base_retention_sequential", "resumed_exactly",
    "guarantee_drift", "held_drift",
}


def _result(after: float, sha: str = "x") -> dict:
    return {
        "tasks": TASKS, "before": [0.1, 0.3], "rows": [[0.9, 0.3], [after, 0.7]], "points": [(1, 0.2), (2, after)],
        "updates": 2, "update_ms_p50": 5.0, "grad_evals": 6, "state_bytes": 10**6, "base_retention": 0.98,
        "base_retention_everywhere": 0.9, "ppl_ratio": 1.02, "guarantee_drift": 1e-8, "held_drift": 0.5,
        "state_sha256": sha, "digest": sha, "basis_columns": 3, "version": 4,
    }


def test_the_summary_has_the_promised_fields_and_formulas():
    values = summary(_result(0.8), _result(0.8), _result(0.5), _result(0.1))
    assert set(values) >= FIELDS
    assert values["acc_before"] == pytest.approx(0.2) and values["acc_after"] == pytest.approx(0.75)
    assert values["bwt"] == pytest.approx(-0.1) and values["bwt_sequential"] == pytest.approx(-0.8)
    assert values["la"] == pytest.approx(0.8) and values["resumed_exactly"] is True
    # two windows of one stream; cuts are summed since creation
    assert values["guarantee_drift"] == pytest.approx(2e-8) and values["held_drift"] == pytest.approx(0.5)
    assert summary(_result(0.8, "y"), _result(0.8), _result(0.5), _result(0.1))["resumed_exactly"] is False


def test_the_table_and_the_picture_show_all_three(tmp_path):
    values = summary(_result(0.8), _result(0.8), _result(0.5), _result(0.1))
    console = Console(record=True, width=120, file=open(tmp_path / "null", "w"))
    console.print(table(values))
    text = console.export_text()
    for word in ("ours", "replay alone", "sequential LoRA", "0.750", "-0.100", "yes"):
        assert word in text
    draw(values, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def wait_for(happened, seconds=600):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _job(tiny_model, tiny_tokenizer, folder, name, **changes):
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    config = LearnerConfig(ring_samples=8, rehearsals=1, warm_samples=2, warm_tokens=8, snapshot_every=7)
    values = dict(
        model=str(folder / "base"), method="ogp", config=config.to_dict(), lr=1e-3, idle=2, scored=False, threads=1,
        samples=12, domains=None, digest_after=3,
        progress=str(folder / f"{name}.progress.json"), result=str(folder / f"{name}.json"),
        state_dir=str(folder / f"{name}.state"), calibration=None, held_out=["some text to keep"],
        adapter=None,
    )
    return Job(**{**values, **changes})


def test_a_worker_that_is_killed_goes_on_and_ends_in_the_same_state(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    processes = []
    real = demo_run.WORKERS.Process
    monkeypatch.setattr(demo_run.WORKERS, "Process", lambda **how: processes.append(real(**how)) or processes[-1])
    shown: list[int] = []
    killed = demo_run._run("ours", _job(tiny_model, tiny_tokenizer, tmp_path, "killed"), shown.append, 10, Event())
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    assert killed["updates"] == 60 and shown[-1] == 60
    job = _job(tiny_model, tiny_tokenizer, tmp_path, "steady", adapter=str(tmp_path / "adapter"), domains=3)
    demo_worker.work(job)
    steady = json.loads((tmp_path / "steady.json").read_text())
    assert steady["updates"] == 36 and len(steady["tasks"]) == 3
    assert steady["state_sha256"] == steady["digest"] == killed["digest"] != killed["state_sha256"]
    assert steady["guarantee_drift"] <= 1e-6
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_worker_that_fails_says_why(tiny_model, tiny_tokenizer, tmp_path):
    job = _job(tiny_model, tiny_tokenizer, tmp_path, "lost", model=str(tmp_path / "missing"))
    # by the name that the table has for it
    with pytest.raises(demo_run.WorkerFailed, match="the learner 'replay alone' failed: .*missing"):
        demo_run._run("replay alone", job, lambda n: None, None, Event())


_STARTS = """
import sys, time
from pathlib import Path
from ogpstream.profiling.demo_pool import WORKERS
from ogpstream.profiling.demo_worker import Job, run_job
if __name__ == "__main__":
    job = Job(**eval(Path(sys.argv[1]).read_text()))
    WORKERS.Process(target=run_job, args=(job, sys.argv[2]), daemon=True).start()
    time.sleep(1000)
"""


def test_a_worker_ends_when_the_demo_is_killed(tiny_model, tiny_tokenizer, tmp_path):
    job = _job(tiny_model, tiny_tokenizer, tmp_path, "alone", samples=None)
    (tmp_path / "job").write_text(repr(asdict(job)))
    (tmp_path / "starts.py").write_text(_STARTS)
    log = tmp_path / "log"
    demo = subprocess.Popen([sys.executable, tmp_path / "starts.py", tmp_path / "job", log])
    try:
        wait_for(lambda: demo.poll() is not None or Path(job.progress).exists())
        assert demo.poll() is None
    finally:
        demo.kill()
        demo.wait()
    wait_for(lambda: log.read_text().strip().endswith("the demo is gone"))
    assert not Path(job.result).exists()


def test_a_worker_ends_when_it_is_told_to(tiny_model, tiny_tokenizer, tmp_path):
    stop = Event()
    with pytest.raises(demo_run.WorkerFailed, match="'ours'"):
        demo_run._run("ours", _job(tiny_model, tiny_tokenizer, tmp_path, "told", samples=None),
                      lambda learned: stop.set() if learned else None, None, stop)
    assert not (tmp_path / "told.json").exists()


def test_where_one_run_fails_the_others_end_and_no_more_begin():
    begun = []

    def run(name, stop):
        begun.append(name)
        if name == "second":
            raise demo_run.WorkerFailed("no")
        assert stop.wait(30)

    with pytest.raises(demo_run.WorkerFailed, match="no"):
        two_at_a_time({name: partial(run, name) for name in ("first", "second", "third", "fourth")})
    assert begun[:2] == ["first", "second"] and "fourth" not in begun
    assert two_at_a_time({"a": lambda stop: 1, "b": lambda stop: 2, "c": lambda stop: 3}) == {"a": 1, "b": 2, "c": 3}


_LOADS = """
import sys, time
from multiprocessing import forkserver
from pathlib import Path
from ogpstream.profiling import demo_pool
begun, wanted = map(Path, sys.argv[1:])
preload = demo_pool.WORKERS.set_forkserver_preload
demo_pool.WORKERS.set_forkserver_preload = lambda names: preload(["waits"])
demo_pool.load_libraries()
while not begun.exists():
    time.sleep(0.01)
assert not wanted.exists()
wanted.touch()
"""


def test_loading_the_libraries_does_not_wait_for_them(tmp_path):
    begun, wanted = tmp_path / "begun", tmp_path / "wanted"
    (tmp_path / "waits.py").write_text(
        f"import time\nfrom pathlib import Path\nPath({str(begun)!r}).touch()\n"
        f"while not Path({str(wanted)!r}).exists():\n    time.sleep(0.01)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", _LOADS, begun, wanted], check=True, timeout=600, env=environment)


def test_a_whole_demo_of_a_given_model(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Its runs in this process, on a few samples and test items."""
    base, out = tmp_path / "model", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    jobs = {}

    def tasks(seed):
        return [replace(task, learn=task.learn[:4], prompts=task.prompts[:1], answers=task.answers[:1])
                for task in demo_tasks(seed)]

    def run(name, job, show, kill_at, stop):
        jobs[name] = job, kill_at
        demo_worker.work(job)
        show(20)
        return json.loads(Path(job.result).read_text())

    for module in (demo_run, demo_worker):
        monkeypatch.setattr(module, "demo_tasks", tasks)
    monkeypatch.setattr(demo_run, "_run", run)
    monkeypatch.setattr(demo_run, "IDLE", 2)
    monkeypatch.setattr(demo_run, "HELD_OUT", 4)
    monkeypatch.setattr(demo_run, "two_at_a_time", lambda runs: {name: one(stop=Event()) for name, one in runs.items()})
    done = CliRunner().invoke(app, ["demo", "--model", str(base), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told) >= FIELDS and told == json.loads((out / "demo.json").read_text())
    assert told["updates"] == 20 and told["resumed_exactly"] is True and told["guarantee_drift"] <= 1e-6
    assert told["grad_evals"] == told["grad_evals_replay"] and len(told["points"]) == 5
    assert {path.name for path in out.iterdir()} == {"accuracy.png", "adapter", "demo.json"}
    assert (out / "adapter" / "adapter_config.json").is_file()
    # the last sample of the third domain is the first one at which the states can be compared
    assert {name: at for name, (_, at) in jobs.items()} == {
        "ours": 10, "sequential LoRA": None, "replay alone": None, "ours, not killed": None}
    assert jobs["ours, not killed"][0].domains == 3 and jobs["ours"][0].adapter is not None
    assert {job.method for job, _ in jobs.values()} == {"ogp", "sequential", "replay1"}


@pytest.mark.parametrize("mine", ["base/notes", "adapter/notes", "base/config.json", "adapter/adapter_config.json"])
def test_a_demo_leaves_the_users_folders_alone(tmp_path, mine):
    (tmp_path / mine).parent.mkdir()
    (tmp_path / mine).write_text("mine")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "choose another folder with --out" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (tmp_path / mine).read_text() == "mine"


def test_a_missing_matplotlib_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(out_folder, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "matplotlib" in done.stderr and not list(tmp_path.iterdir())


def test_a_wrong_model_is_told_before_any_folder_is_made(tmp_path):
    for model, told, status in ((tmp_path, "no config.json", 2), (tmp_path / "none", "there is no folder", 2)):
        done = CliRunner().invoke(app, ["demo", "--model", str(model), "--out", str(tmp_path / "out")])
        assert done.exit_code == status and told in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["demo", "--out", "/dev/null/here"])
    assert done.exit_code == 1 and "choose another folder with --out" in done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_progress_is_a_line_a_tenth(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with DemoProgress(console, {"ours": 200, "alone": 5}) as progress:
        for done in range(201):
            progress.show("ours", done)
        for done in range(6):
            progress.show("alone", done, f"loss {done}.5")
    lines = console.file.getvalue().splitlines()
    if terminal:
        assert not any(line.startswith("ours: 20/200") for line in lines)
        return
    assert lines.pop(0) == "begun: ours, alone"
    told = [line.rpartition(", ")[0] for line in lines]
    assert told[:10] == [f"ours: {done}/200" for done in range(20, 201, 20)]
    assert told[10:] == [f"alone: {done}/5, loss {done}.5" for done in range(1, 6)]
    assert all(line.endswith(" s") for line in lines)
    silent = DemoProgress(None, {"x": 1})
    silent.show("x", 1)
