"""How many bytes a piece of work has alive: counted at the operations that make tensors, on every device alike."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts the storages that operations make while it is on, from their making to their release.

    It may be entered many times, around each unit of a generator: what is released between is subtracted too. Storages
    of other makers do not count, nor what a kernel allocates and frees inside itself, nor an allocator's rounding.

    Attributes:
        alive: bytes made and not yet released.
        peak: the largest `alive` so far.
        largest: bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # a view or an in-place result lives in a storage that was given
                if storage._cdata not in given:
                    given.add(storage._cdata)
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        weakref.finalize(storage, self._release, size).atexit = False
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

    def _release(self, size: int) -> None:
        self.alive -= size
