import pytest
import torch

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.profiling.student import LearnerStudent

SMALL = LearnerConfig(rehearsals=1, ring_samples=4, warm_samples=2, warm_tokens=8, directions_per_sample=0)


def _student(tiny_model, tiny_tokenizer, config=SMALL, **kwargs):
    return LearnerStudent(StreamLearner(tiny_model("llama"), tiny_tokenizer, config), **kwargs)


def test_coverage_is_the_share_of_what_the_linears_read_that_lies_in_p(tiny_model, tiny_tokenizer):
    student = _student(tiny_model, tiny_tokenizer)
    student.learn(Sample(prompt="ab:", completion=" c"))
    learner = student.learner
    (slot,) = learner.state.ring.slots
    ids = learner.state.ring.get(slot).ids[None]
    seen = {}
    for site in learner.attachment.sites:
        site.module.register_forward_pre_hook(lambda m, args, index=site.index: seen.update({index: args[0][0]}))
    with torch.no_grad():
        learner.model(input_ids=ids)
    shares = []
    for site in learner.attachment.sites:
        P = learner.state.protection.bases[site.shape.basis].rows().T
        x = seen[site.index]
        shares.append(float(((x @ P @ P.T).norm() / x.norm()) ** 2))
    assert student.coverage() == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert 0.1 < student.coverage() < 1.0


def test_nothing_is_covered_without_the_fold(tiny_model, tiny_tokenizer):
    for config in (LearnerConfig(guard="none", warm_start=False), LearnerConfig.literal()):
        student = _student(tiny_model, tiny_tokenizer, config)
        student.learn(Sample(prompt="ab:", completion=" c"))
        assert student.coverage() == 0.0


def test_alone_every_evaluation_goes_to_the_latest_samples(tiny_model, tiny_tokenizer):
    config = LearnerConfig(guard="none", warm_start=False, rehearsals=0, replay_every=0, settled_below=0.0)
    student = _student(tiny_model, tiny_tokenizer, config, alone=2)
    taken = []
    learn_one = student.learner.learn_one
    student.learner.learn_one = lambda sample: taken.append(sample.prompt) or learn_one(sample)
    losses = [student.learn(Sample(prompt=p, completion=" c", id=p)) for p in ("x", "y")]
    assert all(loss > 0 for loss in losses) and student.gradients == 6 and taken == ["x", "x", "y", "y"]
    student.rest(2)
    # the latest first
    assert taken[4:] == ["y", "x", "y", "x"] and student.gradients == 10
    assert student.learn(Sample(prompt="x", completion=" c", id="x")) is None and student.gradients == 10
