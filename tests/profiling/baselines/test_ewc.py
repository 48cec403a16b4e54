import pytest
import torch

from ogpstream.learner import ConfigError
from ogpstream.profiling.baselines import ewc
from ogpstream.profiling.baselines.ewc import EWC, penalty_gradient


def test_the_penalty_gradient_is_lambda_fisher_times_the_distance():
    theta, anchor = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 2.0, 1.0])
    importance = torch.tensor([4.0, 9.0, 0.5])
    assert penalty_gradient(3.0, importance, theta, anchor).tolist() == [6.0, 0.0, -3.0]
    # of lambda / 2 sum F (theta - theta*)^2
    free = theta.clone().requires_grad_()
    (1.5 * importance * (free - anchor).square()).sum().backward()
    torch.testing.assert_close(free.grad, penalty_gradient(3.0, importance, theta, anchor))


def test_it_is_added_to_every_step(build):
    watched = build(EWC, strength=2.0)
    baseline = watched.baseline
    baseline.importance = torch.rand_like(baseline.anchor)
    baseline.anchor = baseline.anchor + 0.1
    watched.learn(0, 1)
    for number, (theta, gradient, _) in zip((0, 0, 0, 1, 1, 1), watched.steps, strict=True):
        pull = 2.0 * baseline.importance * (theta - baseline.anchor)
        assert pull.norm() > 0.1
        torch.testing.assert_close(gradient, watched.own_gradient(number, theta) + pull)


def test_fisher_information_is_taken_at_the_end_of_a_task_and_decays(build):
    watched = build(EWC, strength=0.0)
    baseline = watched.baseline
    watched.learn(0, 1)
    baseline.rest(2)
    theta = baseline.theta()
    squares = [watched.own_gradient(number, theta).square() for number in (1, 0)]
    torch.testing.assert_close(baseline.importance, sum(squares) / 2)
    torch.testing.assert_close(baseline.anchor, theta)
    # half of the evaluations were steps
    assert len(watched.steps) == 6 + 2 and baseline.gradients == 6 + 4
    first = baseline.importance.clone()
    watched.learn(2)
    baseline.rest(1)
    theta = baseline.theta()
    torch.testing.assert_close(baseline.importance, ewc.GAMMA * first + watched.own_gradient(2, theta).square())
    assert 0 < ewc.GAMMA < 1


def test_without_idle_phases_it_says_what_it_needs(build):
    watched = build(EWC)
    watched.learn(0)
    with pytest.raises(ConfigError, match="--idle 1"):
        watched.baseline.rest(0)
