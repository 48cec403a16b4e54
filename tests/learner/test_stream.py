import json
import logging
import math
import random

import pytest

from ogpstream.learner import LearnerConfig, StreamLearner
from ogpstream.learner.stream import Histogram, learn_file

CONFIG = LearnerConfig(warm_samples=2, warm_tokens=4, snapshot_every=4)


@pytest.fixture
def learner(tiny_model, tiny_tokenizer, tmp_path):
    return StreamLearner(tiny_model(), tiny_tokenizer, CONFIG, state_dir=tmp_path / "state")


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def pair(number, **more):
    return {"prompt": f"what is {number}?", "completion": f" it is {number * 7}", **more}


def test_every_bad_line_is_told_and_the_rest_is_learned(learner, tmp_path, caplog):
    long = "x" * 200
    path = write(
        tmp_path / "s.jsonl",
        pair(1),
        b'{"prompt": "half a li',
        pair(2, completion=""),
        {"prompt_ids": [1, 2], "completion_ids": [9999]},
        pair(3, expert="nobody"),
        pair(4, prompt=long, id="cut"),
        pair(5, completion=long),
        b"\xff\xfe",
        pair(6, label=False),
        pair(7, id="cut"),
        pair(8),
    )
    caplog.set_level(logging.INFO, "ogpstream")
    result = learn_file(learner, path, group=3)
    assert (result.samples, result.learned, result.rejected, result.skipped) == (11, 3, 6, 1)
    assert (result.quarantined, result.cut) == (1, 1)
    assert [problem.split(": ")[0] for problem in result.problems] == [f"{path}:{n}" for n in (2, 3, 4, 5, 7, 8)]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told.pop(4) == f"{path}:6: too long: 82 ids were cut from the left of the prompt"
    assert told == result.problems
    assert all("; " in line and "\n" not in line for line in told)
    for number, words in enumerate(("not JSON", "empty", "id 9999", "nobody", "over the limit", "not UTF-8")):
        assert words in told[number]
    informed = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert [line.split(": ")[0] for line in informed] == [f"{path}:9"]
    status = learner.status()
    assert [status[key] for key in ("acknowledged", "learned", "rejected", "quarantined")] == [10, 3, 6, 1]
    assert result.state_sha256 == learner.state_sha256() and result.version == learner.version
    assert len(learner.state.ring.pending()) == 0

    again = learn_file(learner, path)
    assert (again.samples, again.skipped) == (11, 5)
    assert (again.learned, again.rejected, again.update_ms_p50, again.loss_first) == (0, 6, None, None)
    # told again, and counted once
    assert again.problems == result.problems
    assert again.state_sha256 == result.state_sha256


def test_a_mended_line_is_taken_up(learner, tmp_path):
    first = write(tmp_path / "s.jsonl", pair(1), b'{"prompt": "a", "id": "7"}', pair(2))
    assert learn_file(learner, first).rejected == 1
    mended = write(first, pair(1), b'{"prompt": "a", "id": "7", "completion": "b"}', pair(2))
    result = learn_file(learner, mended)
    assert (result.learned, result.skipped, result.rejected) == (1, 2, 0)


def test_a_sample_that_could_not_be_used_is_learned_once_it_can(learner, tmp_path):
    lines = [pair(1, id="1", completion="x" * 200), pair(2, expert="law"), pair(3, id="3", prompt_ids=[1])]
    path = write(tmp_path / "s.jsonl", *lines)
    result = learn_file(learner, path)
    assert (result.learned, result.rejected, learner.status()["rejected"]) == (0, 3, 3)
    learner.add_expert("law")
    result = learn_file(learner, write(path, pair(1, id="1"), lines[1], pair(3, id="3")))
    assert (result.learned, result.rejected, result.skipped) == (3, 0, 0)
    assert (learner.status()["learned"], learner.status()["rejected"]) == (3, 3)
    result = learn_file(learner, path)
    assert (result.learned, result.rejected, result.skipped) == (0, 0, 3)


def test_a_mended_line_after_the_bad_one_of_its_id_is_learned_in_any_group(tiny_model, tiny_tokenizer, tmp_path):
    path = write(tmp_path / "s.jsonl", pair(1, id="1", completion="x" * 200), pair(1, id="1"), pair(2))
    found = set()
    for group in (1, 2, 64):
        learner = StreamLearner(tiny_model(), tiny_tokenizer, CONFIG)
        result = learn_file(learner, path, group=group)
        found.add((result.learned, result.rejected, result.skipped, result.state_sha256))
    assert [one[:3] for one in found] == [(2, 1, 0)]


def test_a_guard_that_refuses_is_told_with_file_and_line(learner, tmp_path, monkeypatch):
    path = write(tmp_path / "s.jsonl", pair(1), pair(2))
    monkeypatch.setattr(learner._updater.judge, "_vocabulary", 1.0001)
    result = learn_file(learner, path)
    assert (result.learned, result.rejected) == (0, 2)
    assert result.problems[1].startswith(f"{path}:2: the loss is ")
    kept = [json.loads(line) for line in (tmp_path / "state/quarantine.jsonl").read_text().splitlines()]
    assert [entry["seq"] for entry in kept] == [1, 2]
    again = learn_file(learner, path)
    assert (again.rejected, again.state_sha256) == (2, result.state_sha256)
    assert all("a guard refused it before" in problem for problem in again.problems)


def test_groups_are_acknowledged_together_and_change_nothing(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "s.jsonl", *(pair(n % 5) for n in range(11)))
    hashes, syncs = set(), []
    for group in (1, 4, 64):
        learner = StreamLearner(tiny_model(), tiny_tokenizer, CONFIG, state_dir=tmp_path / f"state{group}")
        folder, count = learner._applier.folder, [0]
        real = folder.sync

        def sync(count=count, real=real):
            count[0] += 1
            real()

        monkeypatch.setattr(folder, "sync", sync)
        seen = []
        result = learn_file(learner, path, group=group, on_progress=lambda r, line, seen=seen: seen.append(line))
        assert seen.count(None) == 1 and seen[-1] is None and [n for n in seen if n][-1] == 11
        hashes.add((result.state_sha256, result.learned))
        syncs.append(count[0])
        assert result.loss_first is not None and result.update_ms_p50 <= result.update_ms_p95
    assert hashes == {(result.state_sha256, 11)}
    rehearsal = syncs[2] - 1
    assert syncs == [11 + rehearsal, 3 + rehearsal, 1 + rehearsal]


def test_a_file_that_cannot_be_read_leaves_the_state(learner, tmp_path):
    before = learner.state_sha256()
    with pytest.raises(OSError):
        learn_file(learner, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="group is 0"):
        learn_file(learner, tmp_path / "none.jsonl", group=0)
    assert learner.state_sha256() == before


def test_quantiles_of_a_histogram():
    rng = random.Random(0)
    values = [rng.lognormvariate(3, 1) for _ in range(5000)]
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.95, 1.0):
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.0051)
    histogram.add(0.0)
    assert histogram.quantile(0.0) < 1e-8
