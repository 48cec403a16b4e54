import pytest
import torch

from ogpstream.learner import LearnerConfig, ModelError
from ogpstream.profiling.baselines.baseline import Baseline
from ogpstream.profiling.methods import METHODS, OURS, PLAIN, baseline_class, grid, untuned

NAMES = [name for name in METHODS if name not in (*OURS, *PLAIN, "joint")]


def test_plain_lora_steps_on_the_new_sample_alone_and_rests_on_the_latest(build):
    watched = build(Baseline)
    watched.learn(0, 1)
    watched.baseline.rest(2)
    assert watched.baseline.gradients == len(watched.steps) == 10
    for number, (theta, gradient, _) in zip((0, 0, 0, 1, 1, 1, 1, 0, 1, 0), watched.steps, strict=True):
        torch.testing.assert_close(gradient, watched.own_gradient(number, theta))


def test_steps_are_adams_at_the_learners_rates_of_both_factors_and_betas(build):
    watched = build(Baseline, lr=1e-3, betas=(0.8, 0.95), loraplus_lr_ratio=3.0)
    watched.learn(0, 1)
    named = dict(watched.baseline.model.named_parameters())
    rate = torch.cat([torch.full_like(p, 3e-3 if "lora_B" in name else 1e-3).reshape(-1) for name, p in named.items()
                      if p.requires_grad])
    assert 0 < (rate == 3e-3).sum() < len(rate)
    mean = square = torch.zeros_like(watched.baseline.theta())
    for number, (before, gradient, after) in enumerate(watched.steps, 1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        step = mean / (1 - 0.8**number) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before - rate * step)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_and_spends_what_the_learner_spends(build, name):
    watched = build(baseline_class(name), lr=2e-3)
    baseline = watched.baseline
    # 1 + 2 for each of 5 samples, 2 for each of 3 idle updates, in both tasks; the ring begins with 0 and 1 sample
    missing = {"agem": 3, "derpp": 2, "mer": 3}.get(name, 0)
    watched.learn(0, 1, 2, 3, 4)
    baseline.rest(3)
    watched.learn(5, 6, 7, 8, 0)
    baseline.rest(3)
    assert baseline.gradients == 2 * (5 * 3 + 3 * 2) - missing and baseline.rests == 2
    # the same samples again are known better
    known = build(baseline_class(name), lr=2e-3)
    first = [known.baseline.learn(sample) for sample in known.samples]
    assert sum(known.baseline.learn(sample) for sample in known.samples) < sum(first)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_sample_is_repeated_until_it_is_learned(build, name):
    never, at_once = (build(baseline_class(name), repeats=4, learned_below=below) for below in (1e-9, 1e9))
    for watched in (never, at_once):
        watched.learn(0)
    first = build(baseline_class(name))
    first.learn(0)
    once = first.baseline.gradients
    # A-GEM has one more step, with references for what is left; the ring holds one sample
    assert never.baseline.gradients == once + (2 if name == "agem" else 4)
    assert at_once.baseline.gradients == once + (2 if name == "agem" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_told_of_a_new_sample_is_that_before_its_update(build, name):
    watched = build(baseline_class(name))
    watched.learn(0, 1)
    want = float(watched.own_loss(2).detach())
    assert watched.baseline.learn(watched.samples[2]) == pytest.approx(want, rel=1e-9)


def test_state_is_parameters_moments_ring_and_what_a_method_keeps(build):
    plain, ewc = build(Baseline).baseline, build(baseline_class("ewc")).baseline
    numbers = plain.theta().numel()
    assert plain.state_bytes() == 8 * numbers
    # theta* and F besides
    assert ewc.state_bytes() == 3 * 8 * numbers
    plain.learn(build(Baseline).samples[0])
    steps = 4 * len(plain.parameters)
    assert plain.state_bytes() == 3 * 8 * numbers + steps


def test_grids_hold_the_defaults_and_ours_have_none():
    for name in METHODS:
        tried = grid(name)
        assert (not tried) == (name in OURS) and len(set(tried)) == len(tried) <= 30
        if name not in (*OURS, *PLAIN):
            kind = baseline_class(name)
            assert (kind.strength in kind.strengths) if kind.strengths else kind.strength is None
            assert kind.rate in kind.rates and untuned(name) == (kind.rate, kind.strength)
            assert (kind.rate, kind.ratios[-1], kind.strength) in tried


def test_a_model_without_linears_is_told(tiny_model, tiny_tokenizer):
    # GPT-2 has Conv1D, which PEFT's OSF passes over
    with pytest.raises(ModelError, match="OSF finds no linear"):
        baseline_class("osf")(tiny_model("gpt2"), tiny_tokenizer, LearnerConfig())
