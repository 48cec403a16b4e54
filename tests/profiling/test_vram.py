"""The budgets of an update at full size on a device that is not there, and that it allocates as a real one does."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ogpstream.kernels import cross_entropy, lora_backward, optimizer, projection
from ogpstream.kernels.launch import launch
from ogpstream.learner import LearnerConfig, description, update
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.meter import Meter
from ogpstream.learner.proposal import Proposer
from ogpstream.learner.sites import attach
from ogpstream.learner.staging import Lean, brought
from ogpstream.learner.state import LearnerState
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.profiling import vram
from ogpstream.profiling.fake_device import DEVICE, fake_device
from ogpstream.profiling.vram import Usage, llama_config, update_usage

TinyModel = Callable[..., tf.PreTrainedModel]

MIB = 2**20
SPEC: dict[str, Any] = dict(target_modules=("o_proj",), rank=8, max_active=2, basis_columns=256)
SMALL: dict[str, Any] = dict(width=64, inner=96, heads=4, key_heads=2, vocabulary=500)


def _usage(layers: int, *, tokens: int = 1024, rows: int = 512, experts: int = 8, held_rank: int | None = None,
           small: bool = False, **changes: Any) -> Usage:
    with fake_device():
        with torch.device(DEVICE):
            model = tf.AutoModelForCausalLM.from_config(llama_config(layers=layers, **SMALL if small else {}),
                                                        dtype=torch.bfloat16).eval()
        return update_usage(model, LearnerConfig(**{**SPEC, **changes}), tokens=tokens, rows=rows, experts=experts,
                            held_rank=held_rank)


@pytest.mark.parametrize(("layers", "optimizer"), [(22, "adam"), (32, "adam"), (32, "sgd")])
def test_lean_state_of_the_specification(layers: int, optimizer: str) -> None:
    usage = _usage(layers, optimizer=optimizer)
    assert usage.learning_state <= 2_320_000
    assert usage.activations <= 256 * MIB
    # not a figure of something else: four of one layer's slabs and a piece of P are there at once
    assert usage.learning_state >= (4 if optimizer == "adam" else 2) * 4 * 8 * 4096 + MIB


@pytest.mark.parametrize(("layers", "optimizer", "scope", "limit"), [
    (22, "adam", "shared", 40), (32, "adam", "shared", 40), (32, "adam", "layer", 40), (32, "sgd", "shared", 24),
])
def test_resident_state_of_the_specification(layers: int, optimizer: str, scope: str, limit: int) -> None:
    usage = _usage(layers, optimizer=optimizer, basis_scope=scope, learning_state="resident")
    slabs = {"adam": 7, "sgd": 3}[optimizer]  # masters and moments of two experts, and one gradient
    assert slabs * layers * 4 * 8 * 4096 <= usage.learning_state <= limit * MIB
    assert usage.activations <= 256 * MIB


def test_the_scope_takes_half_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = _usage(22)
    piece = description._SLICE * (2048 * 2 + 8)  # rows in bf16 and their ids
    assert usage.scope == piece <= 0.6e6
    # with it too what learning takes is what the specification allows
    assert usage.learning_state + usage.scope <= 2_320_000
    assert usage.total == usage.learning_state + usage.activations + usage.scope
    assert _usage(2, small=True, served_to="all").scope == 0
    # all of a prompt at once is seen
    monkeypatch.setattr(description, "_SLICE", 1024)
    assert _usage(2).scope == 8 * piece


def test_all_tokens_supervised() -> None:
    assert _usage(32, rows=1000).activations <= 256 * MIB


@pytest.mark.parametrize("mode", ["lean", "resident"])
def test_the_state_does_not_grow_with_experts_directions_or_layers(mode: str) -> None:
    """Nor with the stream, whose mark on the device is what held parts and bases come to."""
    def state(layers: int = 2, **changes: Any) -> int:
        # a P for each layer: a resident shared one is as large as it has directions
        return _usage(layers, tokens=64, rows=16, learning_state=mode, basis_scope="layer", small=True,
                      **changes).learning_state

    base = state(experts=2, basis_columns=16)
    assert state(experts=9, basis_columns=16) == base
    # 16 directions of width 64 are one piece of P; what is left of all 48 at once are their coefficients
    assert state(experts=2, basis_columns=48) <= base + 32 * 4 * (64 + 4 * 8)
    # more columns of Y while the gradient is computed, and none of what is stepped
    assert state(experts=2, basis_columns=16, held_rank=16) == state(experts=2, basis_columns=16, held_rank=8) == base
    if mode == "lean":
        # one number for each piece: what its second moment comes to, and whether it is finite
        assert state(layers=6, experts=2, basis_columns=16) <= base + 4 * 400


class _Brought(Lean):
    """Copies P even where it is in the same memory, as from another one."""

    def rows(self, basis: ProjectionBasis, count: int, like: Tensor) -> Iterable[Tensor]:
        return (brought(piece, like.device) for piece in basis.rows()[:count].split(32))


class _Log(Meter):
    """Operations with the bytes that each makes, but for copies from one memory to another."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = len(self.made)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        crosses = func is torch.ops.aten._to_copy.default and args[0].device != result.device
        self.log += [(str(func), size) for size in self.made[before:] if size and not crosses]
        return result


def _made(model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Everything that two updates allocate on host and device, in order."""
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LearnerConfig(rank=3, target_modules=tuple(targets), warm_start=False, settled_below=0.0, max_tokens=64)
    monkeypatch.setattr(update, "staging_for", lambda device, *_, **__: _Brought(device, alone=False))
    attachment = attach(model, rank=3, target_modules=targets)
    state = LearnerState.fresh(attachment, config)
    state.store = AdapterStore(attachment.shapes, serve_dtype=model.dtype, device=model.device, multiple=16,
                               apart=2)
    vram.fill_state(state, config, 2, 5)
    updater = Updater(attachment, state.store, state.protection, config)
    updater.publish()
    _ = updater.preflight.footprint
    # the same choice for both, though a device has host RAM beside it
    plans = updater.preflight.footprint.plans(20, 12, host=False)
    monkeypatch.setattr(updater.preflight, "_plans", lambda tokens, rows, layers: plans)
    meter = _Log()
    with meter:
        for _ in range(2):
            for _ in updater.run("expert0", [Lesson(list(range(1, 21)), 8, again=False)]):
                pass
    attachment.detach()
    return meter.log


def test_allocations_are_those_of_a_real_run(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels' launchers run on both, there in Triton's interpreter."""
    monkeypatch.setenv("OGPSTREAM_BACKEND", "triton")

    def alone(*given: Any, **options: Any) -> None:
        # the interpreter computes with tensors of its own
        with _disable_current_modes():
            launch(*given, **options)

    for module in (cross_entropy, lora_backward, optimizer, projection):
        monkeypatch.setattr(module, "launch", alone)
    real = _made(tiny_model("llama"), monkeypatch)
    with fake_device():
        fake = _made(tiny_model("llama").to(DEVICE), monkeypatch)
    # a factor on its way into a pack, which on the host needs no copy: the widest of R = 16 columns
    staged = ("aten.empty.memory_format", 4 * 16 * 80)
    assert fake.count(staged) - real.count(staged) == 2
    found = [one for one in fake if one != staged]
    assert len(found) > 800
    assert found == [one for one in real if one != staged]


def test_a_buffer_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _usage(2, tokens=32, rows=8, small=True)
    build = Proposer.__init__

    def fat(self: Proposer, *given: Any) -> None:
        build(self, *given)
        self.buffer = torch.zeros(MIB // 4, device=self.staging.device)  # type: ignore[attr-defined]

    monkeypatch.setattr(Proposer, "__init__", fat)
    after = _usage(2, tokens=32, rows=8, small=True)
    assert after.learning_state == before.learning_state + MIB
    assert after.activations == before.activations
