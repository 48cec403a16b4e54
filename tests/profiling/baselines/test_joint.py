from ogpstream.profiling.baselines import joint
from ogpstream.profiling.baselines.joint import Joint


def test_it_trains_on_mini_batches_until_the_loss_is_small(build):
    watched = build(Joint, lr=1e-2, rank=8)
    seen = []
    epochs, converged = watched.baseline.train_all(watched.samples, lambda epoch, loss: seen.append(loss))
    assert converged and len(seen) == epochs < joint.EPOCHS
    assert seen[-1] < joint.LOSS or min(seen[-2:]) > 0.98 * min(seen[:-2])
    assert seen[-1] < 0.2 * seen[0]
    # nine samples are a batch of eight and one of one
    assert watched.baseline.gradients == 9 * epochs and len(watched.steps) == 2 * epochs


def test_it_stops_where_the_loss_no_longer_falls(build, monkeypatch):
    watched = build(Joint)
    losses = iter([4.0, 3.0, 2.99, 2.8, 2.79, 2.78, 2.0])
    monkeypatch.setattr(watched.baseline, "_batch", lambda lessons: next(losses) * len(lessons))
    # 2 % better or not: yes, yes, no, yes, no, no
    assert watched.baseline.train_all(watched.samples[:4]) == (6, True)


def test_it_says_when_it_did_not_converge(build, monkeypatch):
    monkeypatch.setattr(joint, "EPOCHS", 1)
    assert build(Joint).baseline.train_all(build(Joint).samples) == (1, False)
    diverged = build(Joint).baseline
    monkeypatch.setattr(joint, "EPOCHS", 9)
    monkeypatch.setattr(diverged, "_batch", lambda lessons: float("nan"))
    assert diverged.train_all(build(Joint).samples) == (joint.PATIENCE, False)
