"""SIGKILL at any moment: rerunning the same command ends in the state of the run that was not killed."""

import functools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ogpstream.learner import amendments, cli, stream
from ogpstream.learner.apply import Applier
from ogpstream.learner.samples import Sample
from ogpstream.learner.status import read_status
from ogpstream.learner.stream import learn_file
from ogpstream.learner.update import Updater

LINES = 22
# a snapshot in the middle of records and of the final rehearsal; two acknowledged groups before the second one
SETTINGS = ["warm_samples=2", "warm_tokens=4", "snapshot_every=5", "ring_samples=16", "rehearsals=1",
            "learned_below=4.0", "learned_share=0.0", "restart_after=3"]
MARK = "#"
# what a kill can fall into; each call is an event
EVENTS = ((os, "fsync"), (os, "replace"), (os, "write"), (os, "unlink"), (Updater, "_commit"), (Applier, "commit"))


@pytest.fixture(scope="module")
def job(tiny_model, tiny_tokenizer, tmp_path_factory):
    """Arguments of `learn` but for --state: a saved model and a stream of samples, bad lines and marked ones."""
    folder = tmp_path_factory.mktemp("kill")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"say {n % 9}", "completion": f" {n % 9} then"}) for n in range(LINES)]
    lines[4] = "no sample"
    lines[9] = json.dumps({"prompt": "a", "completion": "b", "label": False})
    # refused by a guard, and mended in the next line
    lines[7] = json.dumps({"prompt": "a", "completion": MARK, "id": "g"})
    lines[8] = json.dumps({"prompt": "a", "completion": "b", "id": "g"})
    lines[13] = json.dumps({"prompt": "a", "completion": "b", "expert": "nobody"})
    (folder / "s.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["learn", "--model", str(folder / "model"), "--samples", str(folder / "s.jsonl"), "--json"]
    return arguments + [word for setting in SETTINGS for word in ("--set", setting)]


def guard(real):
    """`amendments.limited` with a guard that refuses completions of MARK."""

    def limited(lesson, record, *given):
        found = real(lesson, record, *given)
        bad = record.get("id") == "g" and record["digest"] == Sample("a", MARK, id="g").digest
        return replace(found, refusal="of the mark") if bad and not lesson.again else found

    return limited


def in_child(work):
    """Run `work` in a forked child; its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def learn(job, state, *, kill_at=None, count_in=None, events=EVENTS, group=6):
    """`ogpstream learn` in a child that is killed at the event of that number, half-way through it if it writes."""

    def work():
        seen = 0

        def watched(real, name):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == kill_at:
                    if name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for holder, name in events:
            setattr(holder, name, watched(getattr(holder, name), name))
        amendments.limited = guard(amendments.limited)
        # small groups: some are acknowledged, one is half applied, some are still in the file
        stream.learn_file = functools.partial(learn_file, group=group)
        code = cli.main([*job, "--state", str(state)])
        if count_in is not None:
            count_in.write_text(str(seen))
        return code

    return in_child(work)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """(status of the run that was not killed, number of events in it)."""
    folder = tmp_path_factory.mktemp("whole")
    assert learn(job, folder / "state", count_in=folder / "events") == 0
    status, problems = read_status(folder / "state")
    assert not problems and status["pending"] == 0
    assert (status["learned"], status["rejected"], status["quarantined"]) == (LINES - 4, 3, 1)
    # every kind of step is in it: rehearsal with a new sample and at the end, directions that joined P
    assert status["updates"] > status["learned"] and status["ring_samples"] == 16
    return status, int((folder / "events").read_text())


@pytest.mark.parametrize("share", [k / 11 for k in range(11)])
def test_a_killed_run_ends_as_the_one_that_was_not(job, whole, tmp_path, share):
    expected, events = whole
    at = 1 + round(share * (events - 2))
    assert learn(job, tmp_path, kill_at=at) == -signal.SIGKILL
    # and once more a little later, in recovery or soon after it
    again = learn(job, tmp_path, kill_at=1 + at % 13)
    assert again in (0, -signal.SIGKILL)
    assert learn(job, tmp_path) == 0
    status, problems = read_status(tmp_path)
    assert not problems
    assert status == expected
    kept = [json.loads(line)["seq"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    # the one that a guard refused is kept there too
    assert len(kept) == len(set(kept)) == expected["quarantined"] + 1


def test_a_refresh_goes_on_where_it_was_killed(job, tmp_path):
    job = [*job, "--refresh"]
    assert learn(job, tmp_path / "whole", count_in=tmp_path / "events") == 0
    expected, _ = read_status(tmp_path / "whole")
    events = int((tmp_path / "events").read_text())
    plain = tmp_path / "plain"
    assert learn(job[:-1], plain, count_in=plain.with_suffix(".events")) == 0
    before = int(plain.with_suffix(".events").read_text())
    assert expected["updates"] > read_status(plain)[0]["updates"] and events > before + 8
    for share in (0.2, 0.5, 0.8):
        state = tmp_path / str(share)
        assert learn(job, state, kill_at=round(before + share * (events - before))) == -signal.SIGKILL
        assert learn(job, state) == 0
        status, problems = read_status(state)
        assert not problems and status == expected


def test_what_is_acknowledged_is_learned_by_the_next_start_whatever_it_is_asked_to_learn(job, tmp_path):
    (samples,) = (word for word in job if word.endswith("s.jsonl"))
    # without the second line of an id, before which a group ends
    once = tmp_path / "once.jsonl"
    once.write_text(Path(samples).read_text().replace(', "id": "g"', "", 1))
    job = [str(once) if word == samples else word for word in job]
    assert learn(job, tmp_path / "whole", group=64) == 0
    expected, _ = read_status(tmp_path / "whole")
    state = tmp_path / "state"
    # of the first update: all lines are on the disk by then
    assert learn(job, state, kill_at=1, events=[(Updater, "_commit")], group=64) == -signal.SIGKILL
    status, _ = read_status(state)
    assert (status["pending"], status["acknowledged"], status["learned"]) == (LINES, LINES, 0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert learn([str(empty) if word == str(once) else word for word in job], state) == 0
    status, _ = read_status(state)
    assert status == expected
