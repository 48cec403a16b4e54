"""What the warm-up launches is all that updates launch later, told apart as Triton tells kernels apart.

A key is a kernel with what Triton's own binder makes of the arguments: dtypes, constants, integers that are 1 or a
multiple of 16, and pointers at a multiple of 16 bytes. A launch with a new key compiles.
"""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from ogpstream.kernels import dispatch, triton_backend
from ogpstream.kernels import warm_up as warm_up_module
from ogpstream.kernels.configs import Config, Lora, Tile
from ogpstream.kernels.launch import INTERPRETED, record_launches
from ogpstream.kernels.lora_backward import token_splits
from ogpstream.kernels.lora_update import Block, update_
from ogpstream.kernels.optimizer import Adam, Sgd
from ogpstream.kernels.warm_up import warm_up
from ogpstream.learner import LearnerConfig, RetentionProbe, Sample, StreamLearner

TARGET = CUDABackend(GPUTarget("cuda", 90, 32))
USED = {
    "shrink_kernel", "expand_kernel", "gradient_kernel", "sum_kernel", "cross_entropy_kernel",
    "moments_kernel", "adam_kernel", "coefficients_kernel", "removal_kernel",
}  # fmt: skip


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv(dispatch.ENV, "triton")


@functools.cache
def binder(kernel):
    kernel = JITFunction(kernel.fn, **kernel.kwargs) if INTERPRETED else kernel
    return create_function_from_signature(kernel.signature, kernel.params, TARGET)


def keys(record):
    found = set()
    for launch in record:
        _, specialisation, options = binder(launch.kernel)(*launch.args, **launch.options)
        found.add((launch.name, *map(str, specialisation), str(sorted(options.items()))))
    return found


@contextlib.contextmanager
def nothing_computed():
    """Launches are recorded and, in the interpreter, not run: a warm-up computes nothing that is read."""
    with pytest.MonkeyPatch.context() as patch, record_launches() as record:
        if INTERPRETED:
            patch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
        yield record


def test_the_keys_tell_apart_what_triton_compiles_apart(device):
    ids, logits = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(2, 6, device=device)
    with nothing_computed() as record:
        for first, rows in ((0, logits), (2, logits), (1, logits), (0, logits[1:])):
            triton_backend.cross_entropy(rows, ids[first : first + len(rows)])
    assert [len(keys(record[: n + 1])) for n in range(4)] == [1, 1, 2, 3]


# widths that are multiples of 16 and not, and of 16 bytes and not
SHAPES = [
    (200, 300, 48, slice(0, 8)), (200, 300, 48, slice(3, 11)), (208, 256, 16, slice(8, 16)), (20, 35, 6, slice(2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_linears_and_loss(dtype, device):
    with nothing_computed() as record:
        warm_up(SHAPES, dtype=dtype, device=device, tokens=3000, vocabulary=51)
    warm = keys(record)
    with nothing_computed() as record:
        for D_in, D_out, R, trained in SHAPES:
            A, B, scale = (torch.zeros(s, dtype=dtype, device=device) for s in ((D_in, R), (R, D_out), (R,)))
            for T, start in itertools.product((1, 2, 17, 100, 256, 257, 700, 1025, 2500, 3000), (0, 1, 2, 3)):
                x, g = (torch.zeros(start + T, D, dtype=dtype, device=device)[start:] for D in (D_in, D_out))
                h = torch.zeros(start + T, R, device=device)[start:]
                y = torch.zeros(T, D_out, dtype=dtype, device=device)
                triton_backend.lora_forward(x, A, B, scale, onto=y)
                triton_backend.lora_backward(x, g, A, B, scale, trained=trained, h=h, base_dx=x)
        logits, ids = torch.zeros(9, 51, dtype=dtype, device=device), torch.zeros(9, dtype=torch.int64, device=device)
        for start, first, n in itertools.product(range(4), range(4), (1, 3)):
            triton_backend.cross_entropy(logits[start : start + n], ids[first : first + n])
    assert keys(record) <= warm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_fused_update(dtype, device):
    sizes, numel, tokens = [(40, 8, 150), (30, 4, 70)], 900, 900
    with nothing_computed() as record:
        warm_up([], dtype=dtype, device=device, tokens=tokens, numel=numel, blocks=sizes, samples=2)
    warm = keys(record)
    slab, serving = torch.zeros(numel, device=device), torch.zeros(numel, dtype=dtype, device=device)
    adam = Adam(slab.clone(), slab.clone(), 3, 0.1, (0.9, 0.99), 1e-8)
    most = 2 * token_splits(tokens, serving)
    assert most > 2
    with nothing_computed() as record:
        for grown, resident in itertools.product((1, 20, 33, 70, 100, 150), (False, True)):
            blocks, at = [], 0
            for D, K, M in sizes:
                rows = torch.zeros(min(grown, M), D, device=device if resident else "cpu")
                blocks.append(Block(slab[at : at + D * K].view(D, K), rows, resident))
                at += D * K
            for S, rule, out in itertools.product(range(1, most + 1), (Sgd(0.1), adam), (None, serving)):
                update_(slab, torch.zeros(S, numel, device=device), rule, blocks, serving=out)
    assert keys(record) <= warm


# 20 and 36 numbers in bfloat16 are no multiple of 16 bytes, so the second sample of a batch begins at an odd address
MODEL = dict(num_hidden_layers=1, hidden_size=20, intermediate_size=36, num_attention_heads=2, num_key_value_heads=1)


def test_parts_of_an_update_are_there_one_after_the_other(device, monkeypatch):
    """All at once would be 1 + 2 + 4 + ... slabs."""
    seen = []

    def update(slab, parts, *args, **options):
        seen.append(weakref.ref(parts))
        alive = {id(part()): len(part()) for part in seen if part() is not None}
        assert list(alive.values()) == [len(parts)]

    monkeypatch.setattr(warm_up_module, "update_", update)
    warm_up([], dtype=torch.float32, device=device, tokens=900, numel=40, samples=2)
    assert len(seen) > 8


def test_of_a_learner(device, tiny_model, with_tiles):
    """Updates alone and in batches, long and short, held parts, two gated experts, rehearsals, losses and the probe."""
    # two splits from 33 tokens on, and few programs
    with_tiles(Config(half=Lora(shrink=Tile(32, 64), expand=Tile(32, 64), gradient=Tile(16, 64, steps=2))))
    config = LearnerConfig(
        rank=3, lr=0.01, target_modules=("q_proj", "down_proj"), basis_columns=8, warm_samples=2, replay_every=1,
        held_rank=5, max_tokens=40, learned_below=100.0, learned_share=0.0, settled_below=0.0, rehearsals=0,
    )  # fmt: skip
    learner = StreamLearner(tiny_model("llama", torch.bfloat16, **MODEL).to(device), None, config)

    def ids(tokens):
        return torch.randint(4, 101, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()

    def used(expert):
        with record_launches() as record:
            for tokens, answer in ((9, 3), (2, 1), (40, 20)):
                text = tuple(ids(tokens))
                sample = Sample(prompt_ids=text[:-answer], completion_ids=text[-answer:], expert=expert)
                assert learner.learn_one(sample).status == "learned"
            learner.consolidate(1)
            RetentionProbe(learner.attachment, [ids(5), ids(18)]).measure()
            with torch.no_grad():
                learner.model(torch.tensor([ids(1)], device=device))
        return keys(record)

    def warm():
        with nothing_computed() as record:
            learner.warm_up()
        return keys(record)

    compiled = warm()
    first = used("default")
    assert first <= compiled
    learner.add_expert("law", rank=2)
    learner.activate({"default": 0.5, "law": -1.0})
    compiled = warm()
    second = used("law")
    assert second <= compiled and not second <= first
    kinds = {name for name, *_ in first}
    assert kinds == USED, "a kernel that no update used was not tested"
    assert all(pack.A.shape[1] > 3 + 2 for pack in learner.state.store.served.packs), "no held part took part"


OF = {
    "lora_forward": {"shrink_kernel", "expand_kernel"},
    "lora_backward": {"shrink_kernel", "gradient_kernel", "sum_kernel"},
    "cross_entropy": {"cross_entropy_kernel"},
    "sgd_": {"sgd_kernel"},
    "adam_": {"moments_kernel", "adam_kernel"},
    "project_out_": {"coefficients_kernel", "removal_kernel"},
}


@pytest.mark.parametrize("operation", OF)
def test_a_learner_warms_up_each_operation_in_the_backend_that_does_it(
    operation, device, tiny_model, monkeypatch, short_splits
):
    config = LearnerConfig(rank=3, target_modules=("q_proj",), basis_columns=8, max_tokens=40)
    learner = StreamLearner(tiny_model("llama", torch.float32, **MODEL).to(device), None, config)
    asked = dispatch.backend_for
    others = dispatch._backends["reference"]
    monkeypatch.setattr(dispatch, "backend_for", lambda x, name: asked(x, name) if name == operation else others)
    with nothing_computed() as record:
        learner.warm_up()
    assert {launch.name for launch in record} == OF[operation]
