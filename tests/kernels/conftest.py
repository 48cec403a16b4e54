"""Fixtures of the kernel tests, which run on the GPU where there is one and in Triton's interpreter elsewhere.

The interpreter runs programs one after the other, reads beyond a buffer without a word and starts from zeroed memory by
luck: so results are compared under permuted programs, between guard bands, and from memory full of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ogpstream.kernels.configs import CONFIGS, Config, Lora, Tile, assume_capability

DOUBLE = torch.float64
GUARD = 512  # elements of the guard band on either side of a buffer


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """The interpreter replaces all of triton.language at every call of device code: two fifths of its time."""
    patch_language, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[bool, bool]] = set()

    def once(fn: Any) -> Any:
        # what is replaced depends only on which of the two modules a function sees
        seen = list(map(id, fn.__globals__.values()))
        modules = id(tl) in seen, id(tl.core) in seen
        if modules in done:
            return SimpleNamespace(restore=lambda: None)
        done.add(modules)
        return patch_language(fn)

    def run_fresh(self: Any, *args: Any, **options: Any) -> None:
        done.clear()
        run(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter.GridExecutor, "__call__", run_fresh)
        yield


@dataclass(frozen=True)
class Problem:
    """Operands of `lora_backward`, in the dtype of a test and, rounded to it, in float64."""

    x: Tensor
    g: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    base_dx: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.x, self.g, self.A, self.B, self.scale

    def double(self) -> Problem:
        return Problem(*(t.double() for t in (*self.operands, self.base_dx)))


@pytest.fixture(scope="session")
def problem(device: torch.device) -> Callable[..., Problem]:
    """Factory `problem(T, D_in, D_out, R, dtype=float32, seed=0)`; A and B are in the dtype too."""

    def make(T: int, D_in: int, D_out: int, R: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
        rng = torch.Generator().manual_seed(seed)

        def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=DOUBLE).to(device, dtype)

        return Problem(
            randn(T, D_in), randn(T, D_out), randn(D_in, R), randn(R, D_out), randn(R, dtype=torch.float32),
            randn(T, D_in),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def orthonormal_rows(device: torch.device) -> Callable[..., Tensor]:
    """Factory `orthonormal_rows(M, D)`: P.T in float32."""

    def make(M: int, D: int, seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(D, M, generator=rng, dtype=DOUBLE))
        return q.T.float().contiguous().to(device)

    return make


def relative(out: Tensor, ref: Tensor) -> float:
    """|out - ref| / |ref|; NaN when out holds one."""
    error, size = float((out.double() - ref.double()).norm()), float(ref.double().norm())
    return error / size if size else error


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """`close(bound, name=(out, ref), ...)` asserts a relative error of at most the bound for each."""

    def check(bound: float, **pairs: tuple[Tensor, Tensor]) -> None:
        for name, (out, ref) in pairs.items():
            assert out.shape == ref.shape, f"{name}: shape {list(out.shape)}, not {list(ref.shape)}"
            error = relative(out, ref)
            assert error <= bound, f"{name}: relative error {error:.2e}, over {bound:.0e}"

    return check


@pytest.fixture
def with_tiles() -> Iterator[Callable[[Config], None]]:
    """`with_tiles(config)`: from now on every device has these tiles."""
    made_up = (0, 1)
    with pytest.MonkeyPatch.context() as patch, assume_capability(made_up):
        yield lambda config: patch.setitem(CONFIGS, made_up, config)


@pytest.fixture
def short_splits(with_tiles: Callable[[Config], None]) -> None:
    """Tiles of one or two steps, so that a small problem is cut into many splits in every direction."""
    single = Lora(shrink=Tile(16, 16, steps=2), expand=Tile(16, 16), gradient=Tile(16, 16, steps=2))
    half = Lora(shrink=Tile(16, 32), expand=Tile(16, 16), gradient=Tile(16, 16, steps=2))
    projection = Tile(16, 16, steps=2), Tile(16, 16)
    with_tiles(Config(half, single, *projection, elements=64, rank_block=16))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Every buffer that a launcher allocates lies between bands of a known value; call the result to check them."""
    bands: list[Tensor] = []
    empty = torch.empty

    def between_bands(*size: Any, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        whole = cast(Tensor, empty(shape.numel() + 2 * GUARD, **options))
        inner = whole[GUARD : GUARD + shape.numel()]
        whole.fill_(7.0)
        inner.fill_(float("nan"))
        bands.extend((whole[:GUARD], whole[GUARD + shape.numel() :]))
        return inner.view(shape)

    def check() -> None:
        assert bands, "nothing was allocated"
        for band in bands:
            assert bool((band == 7.0).all()), "a kernel wrote beside its buffer"

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", between_bands)
        yield check


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[int], None]:
    """`permuted(seed)`: from now on the interpreter runs the programs of each launch in a random order.

    On a GPU they run in no order anyway: there it changes nothing, and two runs must agree all the same.
    """
    if device.type != "cpu":
        return lambda seed: None
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []
    dims = [1, 1, 1]

    def start(seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)

        def permute_dim(*grid: int) -> None:
            dims[:] = grid
            order[:] = torch.randperm(grid[0] * grid[1] * grid[2], generator=rng).tolist()
            set_dim(*grid)

        def permute_idx(x: int, y: int, z: int) -> None:
            at = order[(x * dims[1] + y) * dims[2] + z]
            set_idx(at // (dims[1] * dims[2]), at // dims[2] % dims[1], at % dims[2])

        monkeypatch.setattr(builder, "set_grid_dim", permute_dim)
        monkeypatch.setattr(builder, "set_grid_idx", permute_idx)

    return start
