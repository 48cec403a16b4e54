"""What samples become: records that are learned once, or reports of why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ogpstream.learner import Sample, SampleError, SampleReport, StreamLearner
from ogpstream.learner.intake import Intake
from ogpstream.learner.samples import Refused

MakeLearner = Callable[..., StreamLearner]
PROMPT = 4


def _sample(seed: int, expert: str = "default", **fields: Any) -> Sample:
    ids = torch.randint(4, 101, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:PROMPT]), completion_ids=tuple(ids[PROMPT:]), expert=expert, **fields)


def test_samples_that_cannot_be_learned_from_leave_the_state_alone(make: MakeLearner) -> None:
    learner = make()
    learner.learn_one(_sample(0, id="a"))
    before = learner.state_sha256()
    bad = [
        (_sample(1, "nobody"), "unknown expert 'nobody'"),
        (Sample(prompt_ids=(5,), completion_ids=(101,)), "101"),
        (Sample("text", "text"), "without a tokenizer"),
    ]
    for sample, message in bad:
        with pytest.raises(SampleError, match=message):
            learner.learn_one(sample)
        with pytest.raises(SampleError, match=message):
            learner.learn_batch([_sample(2), sample])
    assert learner.learn_one(_sample(3, id="a")).status == "skipped"
    (report,) = learner.learn_batch([_sample(3, id="a")])
    assert report.status == "skipped"
    assert (learner.pending, learner.state_sha256()) == (0, before)


def test_a_stream_goes_on_after_what_is_refused(make: MakeLearner) -> None:
    learner = make()
    stream = [_sample(0, id="a"), Refused("b", "line 2 is no JSON"), _sample(1, "nobody", id="c"),
              _sample(2, id="a"), _sample(3, id="d", label=False), _sample(4, id="e")]
    reports = learner.learn_batch(stream, refuse=True)
    assert [(report.id, report.status) for report in reports] == [
        ("a", "learned"), ("b", "rejected"), ("c", "rejected"), ("a", "skipped"), ("d", "quarantined"), ("e", "learned")
    ]
    status = learner.status()
    assert [status[key] for key in ("acknowledged", "learned", "rejected", "quarantined", "pending")] == [5, 2, 2, 1, 0]
    # what is still bad is told again, and not counted again
    before = learner.state_sha256()
    again = learner.learn_batch(stream, refuse=True)
    assert [report.status for report in again] == ["skipped", "rejected", "rejected", "skipped", "skipped", "skipped"]
    assert [report.reason for report in again] == [
        report.reason if report.status == "rejected" else None for report in reports
    ]
    assert learner.state_sha256() == before
    # and what is mended is learned, under the same id
    learner.add_expert("nobody")
    assert [r.status for r in learner.learn_batch([*stream, _sample(2, id="b")], refuse=True)][2] == "learned"
    assert (learner.state.counters.learned, learner.state.counters.rejected) == (4, 2)


def test_what_a_guard_refused_is_learned_once_it_is_another(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make()
    bad, mended = _sample(0, id="a"), _sample(1, id="a")
    with monkeypatch.context() as patch:
        patch.setattr(learner._updater.judge, "_vocabulary", 1.0001)
        (report,) = learner.learn_batch([bad])
        assert report.status == "rejected" and learner.state.counters.rejected == 1
    before = learner.state_sha256()
    # nothing that a later state might see differently is tried again: a killed run would do it once more often
    for report in (*learner.learn_batch([bad]), learner.learn_one(bad)):
        assert report.status == "rejected" and "a guard refused it before" in str(report.reason)
    told = learner.accept(bad)
    assert isinstance(told, SampleReport) and told == report
    assert learner.state_sha256() == before
    assert learner.learn_one(mended).status == "learned"
    assert [learner.learn_one(sample).status for sample in (mended, bad)] == ["skipped", "skipped"]
    assert learner.state.counters.rejected == 1


def test_a_step_looks_a_sample_up_once(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, known, asked = make(), Intake._known, []

    def count(self: Intake, sample: Sample) -> SampleReport | None:
        asked.append(sample.id)
        return known(self, sample)

    monkeypatch.setattr(Intake, "_known", count)
    assert [learner.learn_one(_sample(0, id="a")).status for _ in range(2)] == ["learned", "skipped"]
    assert asked == ["a", "a"]


def test_a_sample_whose_step_was_aborted_is_learned_once(make: MakeLearner) -> None:
    learner = make()
    work = learner.step(_sample(0, id="a"))
    next(work)
    work.close()
    assert learner.learn_one(_sample(0, id="a")).status == "learned"
    assert (learner.state.counters.learned, len(learner.state.ring), learner.pending) == (1, 1, 0)
