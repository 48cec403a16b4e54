"""Bytes that updates take on the model's device: of a real one, or of one that is not there (`fake_device`).

    learning state   masters, moments, gradients, P and anchors, K1's and K2's parts: the most of them at any moment
                     of an update, and what stays between updates
    activations      the most of everything else during forward and backward
    serving copy     the version that is served; a second one is alive beside it while an update publishes
    scope            what telling whether a prompt is in the scope of an expert gathers there

Counted at the operations that make tensors, and on a CUDA device at the allocator too, whose figure is taken there: it
knows what kernels allocate inside themselves and what its own rounding costs.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from ogpstream.learner import LearnerConfig
from ogpstream.learner.anchor import COLUMNS, BaseAnchor
from ogpstream.learner.description import Describer
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.meter import Meter
from ogpstream.learner.restart import fresh_factors
from ogpstream.learner.sites import attach
from ogpstream.learner.state import LearnerState
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Held
from ogpstream.profiling.fake_device import DEVICE, fake_device

# units of forward and backward; in the others of an update nothing of them is alive
_ACTIVE = frozenset({"plan", "forward", "loss", "recompute", "backward"})


@dataclass(frozen=True)
class Usage:
    """Peak bytes of an update on the device, see above.

    Attributes:
        shadow: the second serving copy.
        scope: of one prompt of as many tokens; also what `Describer.warm_up` takes.
        choice: how activations were kept.
        tokens: of the sample, rows: supervised ones.
        device: measured on, or "fake".
    """

    learning_state: int
    activations: int
    serving_copy: int
    shadow: int
    scope: int
    choice: str
    tokens: int
    rows: int
    device: str

    @property
    def total(self) -> int:
        """Upper bound of what learning takes at one moment beside the model and the version that is served."""
        # a request may come, and is told in or out of scope, at any unit of an update
        return self.learning_state + max(self.activations, self.shadow) + self.scope

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_update(architecture: PretrainedConfig, config: LearnerConfig, *, tokens: int, rows: int, experts: int = 2,
                   dtype: str = "bfloat16", updates: int = 2) -> Usage:
    """`update_usage` of a model with random weights: on the CUDA device, or without one on one that is not there."""
    with ExitStack() as stack:
        device = torch.device("cuda") if torch.cuda.is_available() else DEVICE
        if device == DEVICE:
            stack.enter_context(fake_device())
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, dtype)).eval()
        return update_usage(model, config, tokens=tokens, rows=rows, experts=experts, updates=updates)


def llama_config(*, layers: int, width: int = 2048, inner: int = 5632, heads: int = 32, key_heads: int = 4,
                 vocabulary: int = 32000, positions: int = 2048) -> LlamaConfig:
    """Llama's architecture; the defaults are TinyLlama-1.1B's, but for `layers` (22)."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=positions,
    )


def update_usage(model: PreTrainedModel, config: LearnerConfig, *, tokens: int, rows: int, experts: int = 2,
                 held_rank: int | None = None, updates: int = 2) -> Usage:
    """Bytes of updates of the active ones of some experts in turn, with full bases and held parts.

    The model is as before afterwards.

    Args:
        tokens: ids of the one sample, rows: supervised ones of them.
        experts: that exist; `config.max_active` of them are served.
        held_rank: of every held part; by default what the configuration cuts to.
        updates: that are made, one after the other.
    """
    # every sample moves the adapter, as a fresh one does
    config = replace(config, settled_below=0.0, max_active=min(experts, config.max_active))
    device, meter = model.device, Meter(model.device)
    attachment = attach(model, rank=config.rank, basis_scope=config.basis_scope, target_modules=list(
        config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules)
    try:
        state = LearnerState.fresh(attachment, config)
        fill_state(state, config, experts, (config.held_rank or 32) if held_rank is None else held_rank)
        ids = [1 + number % (model.config.get_text_config().vocab_size - 1) for number in range(tokens)]
        lesson = Lesson(ids, tokens - rows, again=False)
        allocated = _Allocator(device)
        with meter:
            updater = Updater(attachment, state.store, state.protection, config)
            updater.publish()
            served = _serving_bytes(state.store)
            _ = updater.preflight.footprint
        found = []
        # of two, what is resident of the first one's expert is there beside the second one's
        for name in islice(cycle(reversed(state.store.active)), updates):
            found.append(_Phases(meter, allocated, served).of(updater.run(name, [lesson])))
        # the last version made the one before it free
        kept = allocated.alive(meter) - served
        scope = _scope_bytes(model, ids, meter, allocated) if config.served_to == "scope" else 0
        return Usage(max(kept, *(one[0] for one in found)), max(one[1] for one in found), served,
                     _serving_bytes(state.store), scope, str(updater.preflight.plan(tokens, rows)), tokens, rows,
                     "fake" if device == DEVICE else device.type)
    finally:
        attachment.detach()


class _Allocator:
    """Bytes of CUDA's allocator over those at the start, or the meter's where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._before = 0 if self._device is None else torch.cuda.memory_allocated(self._device)

    def begin(self, meter: Meter) -> None:
        meter.begin()
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def alive(self, meter: Meter) -> int:
        return meter.alive if self._device is None else torch.cuda.memory_allocated(self._device) - self._before

    def peak(self, meter: Meter) -> int:
        return meter.peak if self._device is None else torch.cuda.max_memory_allocated(self._device) - self._before


class _Phases:
    """Runs one update: (learning state, activations)."""

    def __init__(self, meter: Meter, allocated: _Allocator, served: int) -> None:
        self.meter, self.allocated, self.served = meter, allocated, served

    def of(self, work: Generator[str, None, Any]) -> tuple[int, int]:
        meter, allocated = self.meter, self.allocated
        state, activations = 0, 0
        with meter:
            kept = allocated.alive(meter) - self.served
            while True:
                allocated.begin(meter)
                try:
                    unit = next(work)
                except StopIteration as end:
                    if end.value.refusal is not None:
                        raise RuntimeError(f"the update was refused: {end.value.refusal}") from None
                    return state, activations
                peak = allocated.peak(meter) - self.served - kept
                if unit == "publish":
                    # its memory is that of the second serving copy
                    continue
                if unit in _ACTIVE:
                    # parts of gradients are counted by the meter alone, and taken out of what the allocator has
                    state = max(state, kept + meter.state_peak)
                    activations = max(activations, meter.other_peak - self.served - kept, peak - meter.state_peak)
                else:
                    state = max(state, kept + peak)


def fill_state(state: LearnerState, config: LearnerConfig, experts: int, held_rank: int) -> None:
    """Experts with held parts, full bases, anchors: the most that a stream comes to."""
    store, protection = state.store, state.protection
    rows: dict[int, torch.Tensor] = {}
    for key, basis in protection.bases.items():
        tensors, meta = basis.state_dict()
        live = torch.arange(len(basis.rows())) < basis.capacity
        tensors |= {"rows": torch.eye(basis.capacity, basis.d_in), "live": live, "generation": live * 1}
        basis.load_state_dict(tensors, meta)
        if config.base_anchor and config.warm_start and config.guard == "fold":
            if basis.d_in not in rows:
                rows[basis.d_in] = torch.eye(min(COLUMNS, basis.d_in), basis.d_in)
            anchor = rows[basis.d_in]
            protection.anchors[key] = BaseAnchor(anchor, torch.ones(len(anchor)), 0.5)
    parts = {(site.d_in, site.d_out): Held(torch.zeros(site.d_in, held_rank), torch.zeros(held_rank, site.d_out))
             for site in store.sites}
    for number in range(experts):
        name = f"expert{number}"
        layout = store.layout(config.rank)
        expert = store.create(name, config.rank, config.scaling, fresh_factors(layout, 0, name, dtype=store.dtype))
        expert.held = [parts[site.d_in, site.d_out] for site in store.sites]
        if number < config.max_active:
            store.activate(name)


def _scope_bytes(model: PreTrainedModel, ids: list[int], meter: Meter, allocated: _Allocator) -> int:
    """Of describing one prompt, the first time."""
    describer = Describer(model.get_input_embeddings())
    with meter:
        before = allocated.alive(meter)
        allocated.begin(meter)
        describer(ids, [len(ids)])
        return allocated.peak(meter) - before


def _serving_bytes(store: AdapterStore) -> int:
    """Of the slab and the scales of the version that is served."""
    tensors = [tensor for part in store.served.each for pack in part.packs for tensor in (pack.A, pack.B, pack.scale)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
