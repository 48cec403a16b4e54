"""Every backend gives the results of the reference, operation by operation and in the learner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ogpstream.kernels import cublas_backend, dispatch, reference
from ogpstream.kernels.launch import record_launches
from ogpstream.learner import LearnerConfig, Sample, StreamLearner

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["triton", "cublas"])
def backend(request, monkeypatch):
    monkeypatch.setenv(dispatch.ENV, request.param)
    return request.param


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lora(dtype, bound, backend, problem, close):
    p = problem(37, 40, 28, 12, dtype)
    exact, trained = p.double(), slice(4, 8)
    y, h = dispatch.lora_forward(*p.operands[:1], *p.operands[2:])
    # as autograd hands it over: transposed in memory
    g = p.g.T.contiguous().T
    dA, dB, dx = dispatch.lora_backward(p.x, g, *p.operands[2:], trained=trained, h=h, base_dx=p.base_dx)
    again = dispatch.lora_backward(p.x, g, *p.operands[2:], trained=trained)
    y_ref, h_ref = reference.lora_forward(exact.x, exact.A, exact.B, exact.scale)
    dA_ref, dB_ref, dx_ref = reference.lora_backward(*exact.operands, trained=trained, base_dx=exact.base_dx)
    assert (y.dtype, dx.dtype, h.dtype, dA.dtype, dB.dtype) == (dtype, dtype, *3 * [torch.float32])
    onto = p.g.clone()
    added, _ = dispatch.lora_forward(*p.operands[:1], *p.operands[2:], onto=onto)
    assert added.data_ptr() == onto.data_ptr()
    # in place in rows of a wider tensor, and where they are no rows
    wide, across = torch.zeros(37, 31, dtype=dtype, device=p.g.device), p.g.T.contiguous().T
    wide[:, 3:] = p.g
    for place in (wide[:, 3:], across):
        again_h = dispatch.lora_forward(*p.operands[:1], *p.operands[2:], onto=place)[1]
        close(bound, added=(place, exact.g + y_ref), h=(again_h, h_ref))
    assert not wide[:, :3].any()
    close(bound, added=(added, exact.g + y_ref))
    close(bound, y=(y, y_ref), h=(h, h_ref), dA=(dA, dA_ref), dB=(dB, dB_ref), dx=(dx, dx_ref))
    close(bound, dA_again=(again[0], dA_ref), dB_again=(again[1], dB_ref))
    close(bound, dx_alone=(again[2], reference.lora_backward(*exact.operands, trained=trained)[2]))


@pytest.mark.parametrize("weighted", [False, True])
def test_projection(weighted, backend, orthonormal_rows, device, close):
    rows, Z = orthonormal_rows(50, 70), torch.randn(70, 6, generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.linspace(0, 1, 50, device=device) if weighted else None
    exact = Z.double()
    coef_ref = reference.project_out_(exact, rows, weights=weights)
    # from the host, as the learner's bases lie
    coef = dispatch.project_out_(Z, rows.cpu(), weights=weights)
    close(1e-6, Z=(Z, exact), coef=(coef, coef_ref))


def test_optimizers_and_loss(backend, device, close):
    def normal(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(device)

    w, g = normal(30, 5), normal(150).view(30, 5)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    exact = [t.double() for t in (w, m, v)]
    options = dict(step=1, lr=0.1, betas=(0.9, 0.99), eps=0.1)
    dispatch.adam_(w, g, m, v, **options)
    reference.adam_(exact[0], g, *exact[1:], **options)
    dispatch.sgd_(w, g, lr=0.1)
    reference.sgd_(exact[0], g, lr=0.1)
    close(1e-6, w=(w, exact[0]), m=(m, exact[1]), v=(v, exact[2]))
    target = torch.tensor([1, 3, 0], device=device)
    loss, dlogits = dispatch.cross_entropy(normal(3, 77), target)
    loss_ref, dlogits_ref = reference.cross_entropy(normal(3, 77).double(), target)
    close(1e-6, loss=(loss, loss_ref), dlogits=(dlogits, dlogits_ref))


def test_cublas_is_ieee_until_the_last_thread_has_left_and_then_as_it_was():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        # as two threads may interleave: the first to come is the first to leave
        first, second = cublas_backend._ieee(), cublas_backend._ieee()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert settings.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


def stream(model, updates, **changes):
    """Masters and served logits of a learner after some updates of single samples, and its report of each loss."""
    config = LearnerConfig(
        rank=3, lr=0.01, target_modules=("q_proj", "down_proj"), basis_columns=16, warm_samples=2, warm_tokens=8,
        warm_share=0.25, learned_below=100.0, learned_share=0.0, settled_below=0.0, rehearsals=0, replay_every=0,
        **changes,
    )  # fmt: skip
    learner = StreamLearner(model, None, config)
    losses = []
    for seed in range(updates):
        ids = torch.randint(4, 101, (7,), generator=torch.Generator().manual_seed(seed % 10)).tolist()
        losses.append(learner.learn_one(Sample(prompt_ids=tuple(ids[:4]), completion_ids=tuple(ids[4:]))).loss)
    with torch.no_grad():
        logits = learner.model(input_ids=torch.arange(4, 24)[None].to(learner.model.device)).logits
    return learner.state.store.expert("default").factors, logits, losses


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_learner_learns_the_same_with_triton(optimizer, tiny_model, device, monkeypatch, close):
    updates = 50

    def model():
        return tiny_model("llama", num_hidden_layers=1, hidden_size=24, intermediate_size=40).to(device)

    monkeypatch.setenv(dispatch.ENV, "reference")
    factors_ref, logits_ref, losses_ref = stream(model(), updates, optimizer=optimizer)
    monkeypatch.setenv(dispatch.ENV, "triton")
    with record_launches() as record:
        factors, logits, losses = stream(model(), updates, optimizer=optimizer)
    assert len(record) > updates
    close(1e-5, factors=(factors, factors_ref), logits=(logits, logits_ref))
    close(1e-5, losses=(torch.tensor(losses), torch.tensor(losses_ref)))


def test_without_the_interpreter_the_reference_takes_host_tensors_and_a_launcher_says_what_to_do():
    code = (
        "import torch; from ogpstream.kernels import dispatch, lora_backward, reference\n"
        "x = torch.ones(2, 3); operands = x, x.T[:, :1], x[:1], torch.ones(1)\n"
        "assert torch.equal(dispatch.lora_forward(*operands)[0], reference.lora_forward(*operands)[0])\n"
        "try: lora_backward.lora_forward(*operands)\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), dispatch.ENV: "triton"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("the triton kernels run on CUDA, this tensor is on cpu: call"), done.stderr
    assert "ogpstream.kernels.dispatch" in done.stdout and "TRITON_INTERPRET=1" in done.stdout
