"""How many bytes a piece of work has alive: counted at the operations that make tensors, on every device alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# inside a backward, the sizes of the storages that are no learning state
_state_but: ContextVar[tuple[int, ...] | None] = ContextVar("ogpstream_state_but", default=None)


@contextmanager
def learning_state(*, but: tuple[int, ...]) -> Iterator[None]:
    """What is made inside is learning state (parts of gradients and their sums), in the midst of activations.

    Args:
        but: sizes in bytes of the input gradient, which is made there too and is none.
    """
    token = _state_but.set(but)
    try:
        yield
    finally:
        _state_but.reset(token)


class Meter(TorchDispatchMode):
    """Counts the storages that operations make while it is on, from their making to their release.

    It may be entered many times, around each unit of a generator: what is released between is subtracted too. Storages
    of other makers do not count, nor what a kernel allocates and frees inside itself, nor an allocator's rounding.

    Args:
        device: count the storages of this kind of device only.

    Attributes:
        alive: bytes made and not yet released.
        peak: the largest `alive` so far.
        largest: bytes of the largest single storage.
        made: bytes of every storage, in the order of their making.
        state, state_peak: `alive` and `peak` of what was made inside `learning_state`.
        other_peak: `peak` of the rest.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = self.state = self.state_peak = self.other_peak = 0
        self.made: list[int] = []
        self._kind = None if device is None else device.type

    def begin(self) -> None:
        """Peaks of what comes from now on."""
        self.peak, self.state_peak, self.other_peak = self.alive, self.state, self.alive - self.state

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and self._kind in (None, leaf.device.type):
                storage = leaf.untyped_storage()
                # a view or an in-place result lives in a storage that was given
                if storage._cdata not in given:
                    given.add(storage._cdata)
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, but = storage.nbytes(), _state_but.get()
        is_state = but is not None and size not in but
        weakref.finalize(storage, self._release, size, is_state).atexit = False
        self.made.append(size)
        self.largest = max(self.largest, size)
        self.alive += size
        self.state += size * is_state
        self.peak = max(self.peak, self.alive)
        self.state_peak = max(self.state_peak, self.state)
        self.other_peak = max(self.other_peak, self.alive - self.state)

    def _release(self, size: int, is_state: bool) -> None:
        self.alive -= size
        self.state -= size * is_state
