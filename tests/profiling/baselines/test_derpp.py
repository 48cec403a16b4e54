import torch

from ogpstream.profiling.baselines import derpp
from ogpstream.profiling.baselines.derpp import DERpp


def _logits(watched, number, at):
    baseline, now = watched.baseline, watched.baseline.theta()
    baseline.set_theta(at)
    lesson = watched.lesson(number)
    rows = baseline.model(input_ids=torch.tensor([lesson.ids])).logits[0, lesson.prompt_length - 1 : -1]
    return rows, now


def test_a_step_adds_matched_logits_and_the_label_of_old_samples(build, monkeypatch):
    monkeypatch.setattr(derpp, "BETA", 0.7)
    watched = build(DERpp, strength=40.0)
    start = watched.baseline.theta()
    watched.learn(0, 1)
    first, second = watched.steps
    torch.testing.assert_close(first[1], watched.own_gradient(0, start))
    theta, gradient, _ = second
    # the ring holds sample 0 alone; its logits are those of before its update
    stored, now = _logits(watched, 0, start)
    stored = stored.detach()
    logits, _ = _logits(watched, 0, theta)
    parts = torch.autograd.grad((logits - stored).square().mean(), watched.baseline.parameters)
    watched.baseline.set_theta(now)
    matched = torch.cat([part.reshape(-1) for part in parts])
    assert matched.norm() > 1e-4
    want = watched.own_gradient(1, theta) + 40.0 * matched + 0.7 * watched.own_gradient(0, theta)
    # the model's norms are float32, whose rounding alpha makes larger
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_logits_leave_with_their_sample(build):
    watched = build(DERpp, ring_samples=3)
    watched.learn(*range(9))
    baseline = watched.baseline
    held = {baseline.ring.get(slot).uid for slot in baseline.ring.slots}
    assert set(baseline.stored) == held and len(held) == 3
    assert watched.baseline.state_bytes() > sum(t.nbytes for t in baseline.stored.values()) > 0


def test_idle_phases_replay_both_terms_alone(build):
    watched = build(DERpp, strength=0.0)
    watched.learn(0)
    watched.baseline.rest(2)
    # with alpha 0 the label's term is left
    for theta, gradient, _ in watched.steps[1:]:
        torch.testing.assert_close(gradient, derpp.BETA * watched.own_gradient(0, theta))
    assert len(watched.steps) == 3
