import torch

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


def test_each_step_obeys_the_mean_gradient_of_old_samples(build):
    watched = build(AGEM)
    watched.learn(0, 1, 2)
    assert len(watched.steps) == 3
    theta, gradient, _ = watched.steps[0]
    torch.testing.assert_close(gradient, watched.own_gradient(0, theta))
    theta, gradient, _ = watched.steps[1]
    torch.testing.assert_close(gradient, project(watched.own_gradient(1, theta), watched.own_gradient(0, theta)))
    theta, gradient, _ = watched.steps[2]
    own, old = watched.own_gradient(2, theta), (watched.own_gradient(0, theta) + watched.own_gradient(1, theta)) / 2
    torch.testing.assert_close(gradient, project(own, old))
    watched.learn(3, 4, 5)
    # completions of another letter: some of these steps were really turned
    assert any(not torch.allclose(gradient, watched.own_gradient(number, theta))
               for number, (theta, gradient, _) in enumerate(watched.steps))


def test_idle_phases_go_on_with_the_latest_samples(build):
    watched = build(AGEM)
    watched.learn(0)
    del watched.steps[:]
    # three evaluations and one: the latest sample with the ring's only one beside it, then alone
    watched.baseline.rest(2)
    assert len(watched.steps) == 2
    for theta, gradient, _ in watched.steps:
        torch.testing.assert_close(gradient, watched.own_gradient(0, theta))
