import torch

from ogpstream.profiling.baselines.osf import OSF


def _high(weight, share):
    # in float32, as PEFT does: of near singular values another precision finds other vectors
    U, _, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    count = int(min(weight.shape) * share)
    return U[:, :count].to(weight.dtype), Vh[:count].to(weight.dtype)


def _leaks(watched, gradient):
    """Largest share of a gradient of U_low or V_low in the span of the leading singular vectors, and how many there
    are."""
    baseline, worst, count = watched.baseline, 0.0, 0
    parts = gradient.split([p.numel() for p in baseline.parameters])
    by_id = {id(p): part.view_as(p) for p, part in zip(baseline.parameters, parts, strict=True)}
    for layer in baseline.layers:
        U, Vh = _high(layer.get_base_layer().weight, 0.25)
        low = layer.osf_svd_params["default"]
        for inside, whole in ((U.T @ by_id[id(low["U_low"])], by_id[id(low["U_low"])]),
                              (by_id[id(low["V_low"])] @ Vh.T, by_id[id(low["V_low"])])):
            if whole.norm() > 0:
                worst, count = max(worst, float(inside.norm() / whole.norm())), count + 1
    return worst, count


def test_gradients_are_orthogonal_to_the_preserved_triples(build):
    watched = build(OSF, strength=0.25, lr=1e-4)
    watched.learn(0)
    worst, count = _leaks(watched, watched.steps[0][1])
    assert worst < 2e-6 and count >= 14


def test_after_a_task_the_merged_weight_is_decomposed_anew(build):
    watched = build(OSF, strength=0.25, lr=1e-3)
    baseline = watched.baseline
    base = baseline.layers[0].get_base_layer().weight.detach().clone()
    watched.learn(0)
    baseline.rest(1)
    ids = torch.tensor([watched.lesson(1).ids])
    before = baseline.model(input_ids=ids).logits.detach()
    del watched.steps[:]
    watched.learn(1)
    assert not torch.equal(baseline.layers[0].get_base_layer().weight, base)
    now = baseline.theta()
    baseline.set_theta(watched.steps[0][0])
    torch.testing.assert_close(baseline.model(input_ids=ids).logits, before, rtol=0, atol=1e-5)
    baseline.set_theta(now)
    worst, count = _leaks(watched, watched.steps[0][1])
    assert worst < 2e-6 and count >= 14


def test_the_state_holds_the_weights(build):
    baseline = build(OSF).baseline
    weights = sum(layer.get_base_layer().weight.nbytes for layer in baseline.layers)
    assert baseline.state_bytes() > weights + sum(p.nbytes for p in baseline.parameters)
