import torch

from ogpstream.profiling.baselines.olora import OLoRA, penalty_gradient


def test_the_penalty_gradient_is_that_of_the_squared_products():
    old = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    new = torch.tensor([[3.0, 5.0, 1.0]], dtype=torch.float64)
    # A_old A_new^T = 5, its square 25; 2 * 0.5 * 5 * A_old
    assert penalty_gradient(0.5, new, [old]).tolist() == [[5.0, 0.0, 10.0]]
    torch.manual_seed(0)
    olds = [torch.randn(3, 7, dtype=torch.float64) for _ in range(2)]
    free = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    loss = sum((one @ free.T).square().sum() for one in olds)
    (1.7 * loss).backward()
    torch.testing.assert_close(free.grad, penalty_gradient(1.7, free.detach(), olds))


def test_a_task_gets_a_lora_of_its_own_and_the_earlier_ones_are_frozen_and_served(build):
    watched = build(OLoRA, strength=3.0)
    baseline = watched.baseline
    watched.learn(0, 1)
    first = {name: p.detach().clone() for name, p in baseline.model.named_parameters() if "task0" in name}
    baseline.rest(1)
    trained = {name: p.detach().clone() for name, p in baseline.model.named_parameters() if "task0" in name}
    assert any(not torch.equal(first[name], trained[name]) for name in first)
    ids = torch.tensor([watched.lesson(3).ids])
    before = baseline.model(input_ids=ids).logits.detach()
    del watched.steps[:]
    watched.learn(3, 4)
    after = dict(baseline.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in trained.items())
    # the new one begins with nothing, beside all that was learned
    theta, gradient, _ = watched.steps[0]
    now = baseline.theta()
    baseline.set_theta(theta)
    torch.testing.assert_close(baseline.model(input_ids=ids).logits, before)
    pull = []
    for name, parameter in baseline.model.named_parameters():
        if "lora_A.task1" in name:
            old = after[name.replace("task1", "task0")]
            pull.append((2 * 3.0 * parameter.detach() @ old.T @ old).detach().reshape(-1))
        elif "lora_B.task1" in name:
            pull.append(torch.zeros(parameter.numel(), dtype=torch.float64))
    baseline.set_theta(now)
    want = torch.cat(pull)
    assert want.norm() > 1e-3
    torch.testing.assert_close(gradient, watched.own_gradient(3, theta) + want)


def test_state_grows_with_every_task(build):
    watched = build(OLoRA)
    watched.learn(0)
    one = watched.baseline.state_bytes()
    watched.baseline.rest(1)
    watched.learn(1)
    assert watched.baseline.state_bytes() == one + 8 * watched.baseline.theta().numel()
