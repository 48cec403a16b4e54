"""Tile sizes by compute capability, and which backend `auto` takes: tables, because nothing is tuned at run time.

An entry exists where something is known about a card: that the ahead-of-time gate refuses the default there, or a
measurement. Any other card gets the default, which passes the gate on sm_80, sm_86 and sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

CHUNK = 32  # directions of P in one product, and in one buffer of a streamed basis


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work.

    Attributes:
        tokens, width: extent of a tile along T and along D.
        steps: tiles that one program goes through, one after the other; the rest of the sum is other programs' work.
        warps, stages: as for Triton.
    """

    tokens: int
    width: int
    steps: int = 1
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Lora:
    """Tiles of the LoRA kernels; shrink takes its steps along D, gradient along T."""

    shrink: Tile
    expand: Tile
    gradient: Tile


# 1024 of D and 512 of T for one program: at T = 1024, D = 2048 that is 128 and 192 programs for 132 SMs. Four warps
# spill in `gradient` on sm_86 at 64 trained columns, and so does a third stage.
_HALF = Lora(shrink=Tile(32, 128, steps=8, stages=3), expand=Tile(32, 64), gradient=Tile(64, 64, steps=8, warps=8))
# float32 sums one term after the other: 512 of D or 256 of T at most, so that the rounding stays at 4e-7 at any size
_SINGLE = Lora(shrink=Tile(16, 32, steps=16), expand=Tile(32, 32), gradient=Tile(16, 32, steps=16))


@dataclass(frozen=True)
class Config:
    """All tile sizes for one kind of card."""

    half: Lora = _HALF
    single: Lora = _SINGLE
    # the projection is float32 throughout; `tokens` are columns of Z there. 512 of D are summed in one program
    coefficients: Tile = Tile(16, 32, steps=16)
    removal: Tile = Tile(16, 64, stages=1)  # 55 registers; 246 with two stages
    elements: int = 1024  # of a flat tensor, by one program of an optimizer
    vocabulary: int = 4096  # logits of one row held at a time
    rank_block: int = 32  # columns of R held at a time; 64 spill in `gradient`

    def lora(self, dtype: torch.dtype) -> Lora:
        """Tiles for inputs of this dtype."""
        return self.single if dtype == torch.float32 else self.half


DEFAULT = Config()
CONFIGS: dict[tuple[int, int], Config] = {}

# Operations that `auto` gives to cuBLAS, by compute capability. Turing and Volta: Triton has no tensor cores there, and
# half precision spills 2 KiB in `shrink`. No card has been measured: an entry for speed wants a row of
# `python -m ogpstream.profiling bench kernels` behind it, and without one the answer is triton.
_NO_TENSOR_CORES = frozenset({"lora_forward", "lora_backward"})
CUBLAS: dict[tuple[int, int], frozenset[str]] = {(7, 0): _NO_TENSOR_CORES, (7, 5): _NO_TENSOR_CORES}

# of the process, since autograd runs the backward of CUDA tensors in a thread of its own
_assumed: tuple[int, int] | None = None


@contextmanager
def assume_capability(found: tuple[int, int]) -> Iterator[None]:
    """Take every device for one of this capability, in all threads: to compile for a card that is not there.

    One thread opens such contexts, one within the other.
    """
    global _assumed
    before, _assumed = _assumed, found
    try:
        yield
    finally:
        _assumed = before


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a device; None for a CPU, and for the CUDA device of a fake tensor where there is none."""
    if device.type != "cuda" or _assumed is not None:
        return _assumed
    return _capability(device)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    # asked for six times a linear, and a card does not change
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def config_for(device: torch.device) -> Config:
    """The tile sizes for a device."""
    found = capability(device)
    return DEFAULT if found is None else CONFIGS.get(found, DEFAULT)
