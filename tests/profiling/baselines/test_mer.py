import torch

from ogpstream.profiling.baselines.mer import MER


def test_a_batch_of_single_steps_is_interpolated(build):
    watched = build(MER, strength=0.25)
    baseline = watched.baseline
    watched.learn(0, 1)
    del watched.steps[:]
    start = baseline.theta()
    watched.learn(2)
    # both old samples, then the new one, each a step of its own from where the last one ended
    assert len(watched.steps) == 3 and torch.equal(watched.steps[0][0], start)
    for (_, _, after), (before, _, _) in zip(watched.steps, watched.steps[1:], strict=False):
        assert torch.equal(after, before)
    theta, gradient, end = watched.steps[2]
    torch.testing.assert_close(gradient, watched.own_gradient(2, theta))
    olds = [watched.own_gradient(number, theta) for theta, number in ((watched.steps[0][0], 0), (start, 1))]
    assert any(torch.allclose(watched.steps[0][1], old) for old in olds)
    torch.testing.assert_close(baseline.theta(), start + 0.25 * (end - start))


def test_idle_phases_are_batches_of_old_samples(build):
    watched = build(MER, strength=0.5)
    watched.learn(0, 1, 2)
    del watched.steps[:]
    start = watched.baseline.theta()
    watched.baseline.rest(2)
    # four evaluations: a batch of three and one of one
    assert len(watched.steps) == 4
    middle = start + 0.5 * (watched.steps[2][2] - start)
    torch.testing.assert_close(watched.steps[3][0], middle)
    torch.testing.assert_close(watched.baseline.theta(), middle + 0.5 * (watched.steps[3][2] - middle))
