"""Ids that a stream has brought before: a bounded window, so that rerunning a file learns nothing twice."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


class SeenIds:
    """The latest ids of a stream, by 8-byte digests; at least `window / 2` and at most `window` of them.

    Two halves take turns: when the younger is full it becomes the older, and the oldest ids are forgotten. Two
    different ids among 2**20 share a digest with probability 3e-8.

    Args:
        window: ids, at most.
    """

    def __init__(self, window: int = 2**20) -> None:
        if window < 2:
            raise ValueError(f"window is {window}, needs at least 2 ids")
        self.window = window
        # dicts keep the order of arrival, which makes the saved state reproducible
        self._older: dict[int, None] = {}
        self._younger: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._older) + len(self._younger)

    def __contains__(self, id_: str) -> bool:
        digest = _digest(id_)
        return digest in self._younger or digest in self._older

    def add(self, id_: str) -> None:
        if id_ in self:
            return
        self._younger[_digest(id_)] = None
        if len(self._younger) >= self.window // 2:
            self._older, self._younger = self._younger, {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"older": _pack(self._older), "younger": _pack(self._younger)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self._older = dict.fromkeys(tensors["older"].tolist())
        self._younger = dict.fromkeys(tensors["younger"].tolist())


def _digest(id_: str) -> int:
    raw = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(raw, "little", signed=True)


def _pack(digests: dict[int, None]) -> Tensor:
    return torch.from_numpy(np.fromiter(digests, dtype=np.int64, count=len(digests)))
