import torch

from ogpstream.profiling.baselines import replay16
from ogpstream.profiling.baselines.replay16 import Replay16


def test_every_sixteenth_sample_gives_one_evaluation_to_an_old_one(build, monkeypatch):
    assert replay16.EVERY == 16
    monkeypatch.setattr(replay16, "EVERY", 3)
    watched = build(Replay16)
    watched.learn(0, 1, 2, 3)
    for number, (theta, gradient, _) in zip((0, 0, 0, 1, 1, 1, 2, 2, None, 3, 3, 3), watched.steps, strict=True):
        if number is None:
            olds = [watched.own_gradient(old, theta) for old in (0, 1)]
            assert any(torch.allclose(gradient, old) for old in olds)
        else:
            torch.testing.assert_close(gradient, watched.own_gradient(number, theta))


def test_idle_phases_rehearse_the_ring_two_at_a_time(build):
    watched = build(Replay16)
    watched.learn(0, 1)
    watched.baseline.rest(3)
    for theta, gradient, _ in watched.steps[6:]:
        # both samples of the ring, as the learner's own rehearsal
        torch.testing.assert_close(gradient, watched.own_gradient(0, theta) + watched.own_gradient(1, theta))
    assert len(watched.steps) == 9
