import json
from dataclasses import asdict

import pytest

from ogpstream.learner import ConfigError, LearnerConfig, Sample, StreamLearner
from ogpstream.profiling.methods import learner_student, method_config
from ogpstream.profiling.stream_run import StreamRun, evaluate, run_stream
from ogpstream.profiling.tasks import Task, demo_tasks, folder_tasks, split_tail

EQUAL = LearnerConfig(ring_samples=4, rehearsals=2, repeats=1, warm_samples=2, warm_tokens=8, snapshot_every=3)


def _tasks() -> list[Task]:
    learn = [tuple(Sample(prompt=f"{t}{n}:", completion=f" {t}", id=f"{t}-{n}") for n in range(5)) for t in "ab"]
    return [Task(t, ("a", "b"), samples, (f"{t}8:",), (t,)) for t, samples in zip("ab", learn, strict=True)]


def _learner(tiny_model, tiny_tokenizer, method, **kwargs):
    return StreamLearner(tiny_model("llama"), tiny_tokenizer, method_config(method, EQUAL), **kwargs)


def _run(learner, method="ogp", **kwargs):
    return run_stream(learner_student(learner, method, EQUAL), _tasks(), idle=3, **kwargs)


@pytest.mark.parametrize("method", ["ogp", "replay1", "sequential"])
def test_all_methods_make_about_the_same_number_of_gradient_evaluations(tiny_model, tiny_tokenizer, method):
    learner = _learner(tiny_model, tiny_tokenizer, method)
    run = _run(learner, method, every=4)
    # the ring of the first samples holds fewer than are to be rehearsed with them: 0 and 1
    missing = 0 if method == "sequential" else 3
    assert learner.state.counters.gradients == 10 * (1 + 2 + 1) + 2 * 3 * 2 - missing
    assert run.learned == 10 and len(run.rows) == 2 and [n for n, _ in run.points] == [4, 5, 8, 10]
    assert run.rows[-1] == evaluate(learner, _tasks())
    assert run.points[-1] == (10, sum(run.rows[-1]) / 2)
    assert len(run.losses) == len(run.update_ms) == 10 and run.stuck == []


class Parrot:
    """Answers as its last sample, or "wrong" after number 3 of a task; loses 1, 2, ... and has learned number 2 before.

    Its model is its answer.
    """

    boundaries, gradients, tokenizer = False, 0, None

    def __init__(self, rests=0):
        self.model = "a"
        self.count = 0
        self.rests = rests

    def learn(self, sample):
        self.model = sample.completion.strip() if "3" not in sample.prompt else "wrong"
        self.count += 1
        return None if self.count == 2 else float(self.count)

    def rest(self, updates):
        self.rests += updates


@pytest.fixture
def parrots(monkeypatch):
    monkeypatch.setattr("ogpstream.profiling.stream_run.rank_labels",
                        lambda model, tokenizer, prompts, labels: [model] * len(prompts))
    return Parrot


def test_losses_are_those_before_and_answers_those_after_the_update(parrots):
    run = run_stream(parrots(), _tasks(), idle=1, ask=True)
    assert run.losses == [1.0, *map(float, range(3, 11))]
    assert run.stuck == [True, True, False, True] + [True, True, True, False, True]
    assert run.rows == [[1.0, 0.0], [0.0, 1.0]] and run.points == [(5, 0.5), (10, 0.5)]


def test_an_idle_phase_that_was_finished_while_loading_is_not_repeated(parrots):
    rested = parrots(rests=1)
    run = run_stream(rested, _tasks(), idle=1, run=StreamRun(learned=5))
    assert rested.rests == 2 and rested.count == 5 and len(run.rows) == 2


@pytest.mark.parametrize("start", [0, 2, 3, 5, 9])
def test_idle_phases_can_be_out_of_step_with_tasks(parrots, start):
    # each phase that is over is one that the learner has done; of 10 samples one ends after 3, 6, 9 and the last
    learner = parrots(rests=start // 3)
    seen: list[tuple[int, int]] = []
    run_stream(learner, _tasks(), idle=1, idle_every=3, run=StreamRun(learned=start),
               on_progress=lambda run: seen.append((run.learned, learner.rests)))
    by_learned = {learned: rests for learned, rests in seen}
    assert learner.rests == 4 and by_learned[10] == 4
    # after the third sample, so with the fourth
    assert all(by_learned[n] == (n - 1) // 3 for n in range(start + 1, 10) if n != 5 or start == 5)


def test_a_learner_that_counts_no_idle_phase_rests_once_after_each_task(parrots):
    class Restless(parrots):
        calls = 0

        def rest(self, updates):
            self.calls += 1

    learner = Restless()
    run_stream(learner, _tasks(), idle=1)
    assert learner.calls == 2 and learner.rests == 0


def test_a_run_goes_on_where_another_process_stopped(tiny_model, tiny_tokenizer, tmp_path):
    class Stop(Exception):
        pass

    whole = _learner(tiny_model, tiny_tokenizer, "ogp")
    want = _run(whole)

    kept: list[str] = []

    def stop(run: StreamRun) -> None:
        if run.learned == 7:
            raise Stop
        # written after every second sample only, as a process that is killed leaves it
        if run.learned % 2 == 0:
            kept.append(json.dumps(asdict(run)))

    first = _learner(tiny_model, tiny_tokenizer, "ogp", state_dir=tmp_path / "state")
    with pytest.raises(Stop):
        _run(first, on_progress=stop)
    first.close()
    second = StreamLearner.load_state(tmp_path / "state", tiny_model("llama"), tiny_tokenizer)
    got = _run(second, run=StreamRun(**json.loads(kept[-1])))
    assert got.rows == want.rows and second.state_sha256() == whole.state_sha256()
    second.close()


def test_the_demo_stream_is_single_samples_of_all_domains():
    tasks = demo_tasks(0)
    ids = [sample.id for task in tasks for sample in task.learn]
    assert len(tasks) >= 4 and len(ids) == len(set(ids)) >= 400
    assert demo_tasks(0) == tasks and demo_tasks(1) != tasks
    for task in tasks:
        assert not {s.prompt for s in task.learn} & set(task.prompts)


def test_tuning_splits_test_items_off_the_learning_samples():
    for whole, cut in zip(demo_tasks(0), split_tail(demo_tasks(0), 30), strict=True):
        assert cut.prompts == tuple(s.prompt for s in whole.learn[-30:]) and cut.learn == whole.learn[:-30]
        assert not set(cut.prompts) & set(whole.prompts)


def test_a_folder_of_tasks_is_read_in_the_order_of_a_stream(tmp_path):
    for task in "xy":
        for split, count in (("train", 6), ("test", 3)):
            rows = [{"prompt": f"{task}{n}", "completion": f" {task}", "label": task} for n in range(count)]
            (tmp_path / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"tasks": {t: {"labels": ["x", "y"]} for t in "xy"}, "streams": {"s": ["x", "y"]}}
    (tmp_path / "tasks.json").write_text(json.dumps(known))
    assert [t.name for t in folder_tasks(tmp_path, "s", seed=0)] == ["x", "y"]
    assert [t.name for t in folder_tasks(tmp_path, "s:reversed", seed=0)] == ["y", "x"]
    (only,) = folder_tasks(tmp_path, "y", seed=3, limit=4)
    assert sorted(s.prompt for s in only.learn) == ["y0", "y1", "y2", "y3"] and only.answers == ("y",) * 3
    with pytest.raises(ConfigError, match="no stream 'z'"):
        folder_tasks(tmp_path, "z", seed=0)
    with pytest.raises(ConfigError, match="a task twice"):
        folder_tasks(tmp_path, "x,y,x", seed=0)
    with pytest.raises(ConfigError, match="y has 4 samples: hold back fewer"):
        split_tail(folder_tasks(tmp_path, "y", seed=0, limit=4), 4)
    with pytest.raises(ConfigError, match="no folder of tasks"):
        folder_tasks(tmp_path / "missing", "s", seed=0)
