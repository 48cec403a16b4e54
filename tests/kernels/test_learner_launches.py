"""What one update of a learner launches, as a formula of its layers, linears and supervised rows."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ogpstream.kernels import dispatch
from ogpstream.kernels.configs import Config, Lora, Tile
from ogpstream.kernels.launch import record_launches
from ogpstream.learner import LearnerConfig, Sample, StreamLearner

LAYERS, LINEARS, INPUTS = 2, 3, 2  # q and k share an input, and with it a basis


@pytest.mark.parametrize("policy,forwards", [("keep", 1), ("every", 2)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("tokens,answer", [(9, 3), (40, 20)])
def test_launches_of_one_update(
    policy, forwards, optimizer, tokens, answer, device, tiny_model, monkeypatch, with_tiles
):
    # 32 tokens in one part of dA and dB, and few programs
    with_tiles(Config(single=Lora(shrink=Tile(64, 64), expand=Tile(64, 64), gradient=Tile(32, 64))))
    model = tiny_model("llama", num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=40).to(device)
    config = LearnerConfig(
        rank=3, optimizer=optimizer, target_modules=("q_proj", "k_proj", "down_proj"), basis_columns=8, warm_samples=2,
        warm_tokens=8, learned_below=0.001, settled_below=0.0, rehearsals=0, replay_every=0, loss_chunk=8,
    )  # fmt: skip
    monkeypatch.setenv(dispatch.ENV, "reference")
    learner = StreamLearner(model, None, config)
    preflight = learner._updater.preflight
    plan = preflight.plan
    monkeypatch.setattr(preflight, "plan", lambda *args: replace(plan(*args), policy=policy, every=1))
    ids = torch.randint(4, 101, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()

    monkeypatch.setenv(dispatch.ENV, "auto" if device.type == "cuda" else "triton")
    with record_launches() as record:
        report = learner.learn_one(Sample(prompt_ids=tuple(ids[:-answer]), completion_ids=tuple(ids[-answer:])))
    assert (report.status, report.activations.policy) == ("learned", policy)

    linears, splits = LAYERS * LINEARS, -(-tokens // 32)
    expected = Counter(
        shrink_kernel=linears * (forwards + 1), expand_kernel=linears * forwards, gradient_kernel=linears,
        cross_entropy_kernel=-(-answer // config.loss_chunk),
    )  # fmt: skip
    if splits > 1:
        expected["sum_kernel"] = linears
    # A and B of a piece are stepped, and the gradient and the new A of each input projected: on a CPU all is one piece
    pieces = learner._updater.proposer.staging.pieces(learner.state.store.layout(3))
    assert len(pieces) == (1 if device.type == "cpu" else LAYERS * INPUTS)
    steps = ("sgd_kernel",) if optimizer == "sgd" else ("moments_kernel", "adam_kernel")
    expected += Counter(dict.fromkeys(steps, 2 * len(pieces)))
    expected += Counter(dict.fromkeys(("coefficients_kernel", "removal_kernel"), 2 * LAYERS * INPUTS))
    assert Counter(launch.name for launch in record) == expected
