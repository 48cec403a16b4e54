import torch

from ogpstream.profiling.baselines import si
from ogpstream.profiling.baselines.si import SI, importance, penalty_gradient


def test_the_importance_of_a_task_is_its_path_integral_over_the_squared_move(monkeypatch):
    monkeypatch.setattr(si, "XI", 0.5)
    got = importance(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(got, torch.tensor([1.0 / 0.75, 2.0, 0.0]))


def test_the_penalty_gradient_is_that_of_c_omega_times_the_squared_distance():
    total, anchor = torch.tensor([4.0, 0.5, -7.0]), torch.tensor([0.5, 1.0, 0.0])
    theta = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)
    # what raised the loss counts as 0
    (3.0 * total.clamp_min(0) * (theta - anchor).square()).sum().backward()
    torch.testing.assert_close(theta.grad, penalty_gradient(3.0, total, theta.detach(), anchor))
    assert theta.grad.tolist() == [12.0, -6.0, 0.0]


def test_the_path_integral_sums_the_task_gradient_times_the_step(build):
    watched = build(SI, strength=5.0)
    baseline = watched.baseline
    start = baseline.theta()
    baseline.total = torch.rand_like(start)
    baseline.anchor = start + 0.05
    watched.learn(0, 1)
    omega = torch.zeros_like(start)
    for number, (theta, gradient, after) in zip((0, 0, 0, 1, 1, 1), watched.steps, strict=True):
        own = watched.own_gradient(number, theta)
        torch.testing.assert_close(gradient, own + 10.0 * baseline.total * (theta - baseline.anchor))
        # without the penalty's part
        omega -= own * (after - theta)
    torch.testing.assert_close(baseline.omega, omega)


def test_a_task_ends_with_the_idle_phase(build):
    watched = build(SI)
    baseline = watched.baseline
    start = baseline.theta()
    watched.learn(0)
    baseline.rest(1)
    end = baseline.theta()
    omega = sum(-watched.own_gradient(0, theta) * (after - theta) for theta, _, after in watched.steps)
    first = omega / ((end - start).square() + si.XI)
    torch.testing.assert_close(baseline.total, first)
    torch.testing.assert_close(baseline.anchor, end)
    assert not baseline.omega.any() and float(first.max()) > 0
    watched.learn(1)
    middle = len(watched.steps)
    baseline.rest(0)
    # added to that of the tasks before
    assert middle == 5 + 3 and not torch.equal(baseline.total, first)
    now = baseline.theta()
    late = watched.steps[5:]
    omega = sum(-watched.own_gradient(1, theta) * (after - theta) for theta, _, after in late)
    torch.testing.assert_close(baseline.total, first + omega / ((now - end).square() + si.XI))
