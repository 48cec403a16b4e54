import torch

from ogpstream.profiling.baselines import agem
from ogpstream.profiling.baselines.agem import AGEM, project


def test_a_gradient_against_the_reference_loses_that_part():
    reference = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    assert project(torch.tensor([-3.0, 1.0, 5.0], dtype=torch.float64), reference).tolist() == [0.0, 1.0, 5.0]
    g = torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)
    r = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
    # g.r = -1.5, r.r = 11
    torch.testing.assert_close(project(g, r), g + 1.5 / 11 * r)
    assert abs(float(project(g, r) @ r)) < 1e-15


def test_any_other_gradient_stays_as_it_is():
    g, r = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert project(g, r) is g and project(torch.tensor([1.0, 3.0]), r).tolist() == [1.0, 3.0]


def test_each_step_is_projected_by_the_mean_gradient_of_old_samples(build, monkeypatch):
    # in place of the projection something that always shows
    monkeypatch.setattr(agem, "project", lambda gradient, reference: gradient - 3 * reference)
    watched = build(AGEM)
    watched.learn(0, 3, 6)
    (first, *_), (second, *_), (third, *_) = watched.steps
    own = [watched.own_gradient(0, first), watched.own_gradient(3, second) - 3 * watched.own_gradient(0, second),
           watched.own_gradient(6, third)
           - 3 * (watched.own_gradient(0, third) + watched.own_gradient(3, third)) / 2]
    for (_, gradient, _), want in zip(watched.steps, own, strict=True):
        torch.testing.assert_close(gradient, want)


def test_idle_phases_go_on_with_the_latest_samples(build):
    watched = build(AGEM)
    watched.learn(0)
    del watched.steps[:]
    # three evaluations and one: the latest sample with the ring's only one beside it, then alone
    watched.baseline.rest(2)
    assert len(watched.steps) == 2
    for theta, gradient, _ in watched.steps:
        torch.testing.assert_close(gradient, watched.own_gradient(0, theta))
