"""Ring of learned samples for replay: fixed slots of token ids in one host allocation."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ogpstream.memory.owners import Owners
from ogpstream.memory.pinned import host_zeros

Keep = Literal["recent", "reservoir", "balanced"]

_DRAWS, _RESERVOIR = 1, 2
_INT64_MAX = 2**63 - 1
_COLUMNS: dict[str, type[np.generic]] = {
    "length": np.int32,
    "prompt_length": np.int32,
    "expert": np.int32,
    "uid": np.int64,
    "flags": np.uint8,
    "completion": np.int64,  # hash of its ids
    "offered": np.int64,  # samples with that completion so far, as long as one of them is in the ring
}


class SlotFlag(IntFlag):
    """What has happened to a sample in the ring."""

    REHEARSED = 1  # it had an update after its first one
    LEARNED = 2  # its loss was below the threshold on a forward after an update


@dataclass(frozen=True)
class Slot:
    """One sample: ids `[T]` int64 (a copy)."""

    slot: int
    ids: Tensor
    prompt_length: int
    expert: str
    uid: int
    flags: SlotFlag


class ReplayRing:
    """At most `capacity` samples of at most `slot_tokens` tokens.

    Args:
        capacity: slots.
        slot_tokens: tokens a slot holds, prompt and completion.
        vocab_size: ids are 0 .. vocab_size - 1, kept in 2 bytes up to 65,536 and in 4 above.
        keep: a full ring overwrites its oldest sample ("recent"); or holds a uniform sample of all that were
            ever offered ("reservoir", Vitter's Algorithm R); or gives different completions equal room
            ("balanced"): class-balancing reservoir sampling (Chrysakis and Moens 2020), with the completion as the
            class, which is a reservoir where no completion comes twice. That is within an expert: of several each has
            room by its share of the newest samples, since what no update reaches needs no rehearsal.
        seed: of the draws and of the reservoir.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        capacity: int = 4096,
        slot_tokens: int = 1024,
        *,
        vocab_size: int,
        keep: Keep = "recent",
        seed: int = 0,
    ) -> None:
        if capacity < 1 or slot_tokens < 1:
            raise ValueError(f"a ring of {capacity} slots of {slot_tokens} tokens is none: both start at 1")
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f"vocab_size is {vocab_size}: slots hold ids of 1 to 2^32 different tokens")
        if keep not in get_args(Keep):
            raise ValueError(f"keep={keep!r}: choose from {get_args(Keep)}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: choose 0 to 2^64 - 1")
        self.capacity, self.slot_tokens, self.vocab_size = capacity, slot_tokens, vocab_size
        self.keep: Keep = keep
        self.seed = seed
        self.seen = 0
        self.storage = host_zeros(capacity, slot_tokens, dtype=torch.uint16 if vocab_size <= 2**16 else torch.uint32)
        # written now, or the system would give its pages one by one as slots are used: 8 MB at 4096 slots of 1024
        self.storage.zero_()
        # torch's unsigned integers have few operations; numpy's view of the same memory has all
        self._ids = self.storage.numpy()
        self._columns = {key: np.zeros(capacity, dtype) for key, dtype in _COLUMNS.items()}
        # of each used slot: samples of its expert in the ring that have its completion
        self._alike = np.zeros(capacity, np.int64)
        self._owners = Owners(capacity)
        # the keys are the used slots, the oldest first: unlike a dict, O(1) at both ends
        self._order: OrderedDict[int, None] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))
        self._by_uid: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        return f"ReplayRing({len(self)} of {self.capacity} slots of {self.slot_tokens} tokens, {self.seen} seen)"

    @property
    def offered(self) -> dict[str, int]:
        """Samples of each expert that have come, in the ring or not."""
        return dict(zip(self._owners.names, self._owners.offered, strict=True))

    @property
    def slots(self) -> list[int]:
        """The used slots, the oldest sample first."""
        return list(self._order)

    def add(self, ids: Sequence[int] | np.ndarray | Tensor, prompt_length: int, *, expert: str, uid: int) -> int | None:
        """Keep a sample, by a look at the completions of all slots: 0.1 ms in all for 4096.

        Args:
            ids: prompt and completion, 1-dimensional integers.
            prompt_length: how many of them are prompt; at least one is completion.
            uid: number of the sample in the stream, int64, not in the ring yet.

        Returns:
            Its slot, or None when the reservoir declines it.

        Raises:
            ValueError: it is empty or too long, an id is outside the vocabulary, or the uid is taken. Nothing
                changed.
        """
        tokens = self._checked_ids(ids)
        if not 0 <= prompt_length < len(tokens):
            raise ValueError(
                f"prompt_length is {prompt_length} of {len(tokens)} tokens: at least one must be completion"
            )
        if not 0 <= uid <= _INT64_MAX or uid in self._by_uid:
            raise ValueError(f"uid {uid} is in the ring already or outside int64: number each sample once")
        self.seen += 1
        completion, owner = _hash(tokens[prompt_length:]), self._owners.sent(expert)
        alike = self._group(completion, owner)
        offered = 1 + int(self._columns["offered"][alike].max(initial=0))
        self._columns["offered"][alike] = offered
        slot = self._free.pop() if self._free else self._giving_way(owner, alike, offered)
        if slot is None:
            return None
        if slot in self._order:
            self._forget(slot)
        values = (len(tokens), prompt_length, owner, uid, 0, completion, offered)
        for key, value in zip(_COLUMNS, values, strict=True):
            self._columns[key][slot] = value
        self._count(completion, owner)
        self._ids[slot, : len(tokens)] = tokens
        self._order[slot] = None
        self._by_uid[uid] = slot
        return slot

    def get(self, slot: int) -> Slot:
        """The sample in a slot.

        Raises:
            ValueError: the slot is empty.
        """
        self._check_used(slot)
        row = {key: column[slot].item() for key, column in self._columns.items()}
        return Slot(
            slot=slot,
            ids=torch.from_numpy(self._ids[slot, : row["length"]].astype(np.int64)),
            prompt_length=row["prompt_length"],
            expert=self._owners.names[row["expert"]],
            uid=row["uid"],
            flags=SlotFlag(row["flags"]),
        )

    def contradicting(self, ids: Sequence[int], prompt_length: int, *, expert: str) -> list[int]:
        """Slots of an expert's samples that give another completion to the same prompt, in one look at all of them."""
        completion, columns = _hash(np.asarray(ids)[prompt_length:]), self._columns
        return [slot for slot in self.asking(ids[:prompt_length])
                if self._owners.names[columns["expert"][slot]] == expert and columns["completion"][slot] != completion]

    def asking(self, prompt: Sequence[int]) -> list[int]:
        """Slots of the samples with this prompt, in one look at all of them."""
        columns, length = self._columns, len(prompt)
        # 0 is the completion of a free slot
        slots = np.flatnonzero((columns["completion"] != 0) & (columns["prompt_length"] == length))
        found: list[int] = slots[(self._ids[slots, :length] == np.asarray(prompt)).all(1)].tolist()
        return found

    def find(self, uid: int) -> int | None:
        """Slot of the sample with this number, None if it is not in the ring."""
        return self._by_uid.get(uid)

    def mark(self, slot: int, flags: SlotFlag) -> None:
        """Set flags of a sample.

        Raises:
            ValueError: the slot is empty.
        """
        self._check_used(slot)
        self._columns["flags"][slot] |= int(flags)

    def hand_over(self, slot: int, expert: str) -> None:
        """Make a sample one of another expert.

        Raises:
            ValueError: the slot is empty.
        """
        self._check_used(slot)
        columns, owner = self._columns, self._owners.number(expert)
        completion, before = int(columns["completion"][slot]), int(columns["expert"][slot])
        columns["expert"][slot] = owner
        self._owners.hand_over(before, owner)
        for number in (before, owner):
            self._count(completion, number)

    def pending(self) -> list[int]:
        """Slots of the samples not rehearsed yet, the oldest first."""
        order = np.fromiter(self._order, np.int64, len(self._order))
        return order[self._columns["flags"][order] & SlotFlag.REHEARSED == 0].tolist()

    def draw(self, n: int = 1, *, counter: int, exclude: Collection[int] = (), expert: str | None = None,
             but: Collection[str] = ()) -> list[int]:
        """`n` different slots by chance, fewer when the ring holds fewer; depends on ring, seed and counter.

        All samples of an expert have the same chance, together its share of the newest samples.

        Args:
            counter: number of this draw, 0 <= counter < 2^63; another counter gives an independent draw.
            exclude: slots that are not to be drawn.
            expert: draw only samples of this one.
            but: draw none of these experts.
        """
        used = np.sort(np.fromiter(self._order, np.int64, len(self._order)))
        used, names = used[~np.isin(used, list(exclude))], self._owners.names
        if expert is not None:
            known = names.index(expert) if expert in names else -1
            used = used[self._columns["expert"][used] == known]
        if but:
            left_out = [number for number, name in enumerate(names) if name in but]
            used = used[~np.isin(self._columns["expert"][used], left_out)]
        weights = self._owners.chances(self._columns["expert"][used])
        source = self._random(_DRAWS, counter)
        drawn = []
        for _ in range(min(n, len(used))):
            ends = weights.cumsum()
            # 53 bits: the uniform double in [0, 1)
            point = (source.random_raw() >> 11) * 2.0**-53 * ends[-1]
            # rounding can put the point on the end, which belongs to no sample
            index = min(int(np.searchsorted(ends, point, side="right")), int(weights.nonzero()[0][-1]))
            drawn.append(int(used[index]))
            weights[index] = 0.0
        return drawn

    def evict(self, slot: int) -> None:
        """Remove a sample and wipe its tokens, in O(1).

        Raises:
            ValueError: the slot is empty.
        """
        self._check_used(slot)
        self._forget(slot)
        self._free.append(slot)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies as (tensors, JSON-able rest): a row per sample, the oldest first, cut to the longest."""
        order = np.fromiter(self._order, np.int64, len(self._order))
        longest = int(self._columns["length"][order].max(initial=0))
        tensors = {key: torch.from_numpy(column[order]) for key, column in self._columns.items()}
        tensors["ids"] = torch.from_numpy(self._ids[order, :longest])
        tensors["slots"] = torch.from_numpy(order)
        tensors["free"] = torch.tensor(self._free, dtype=torch.int64)
        meta = {
            "capacity": self.capacity,
            "slot_tokens": self.slot_tokens,
            "vocab_size": self.vocab_size,
            "seen": self.seen,
            **self._owners.to_dict(),
        }
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become the saved ring: samples, slots, order, free slots and counters; the settings stay as built.

        Raises:
            ValueError: the state is of a ring of another shape or does not fit together. Nothing changed.
        """
        for key in ("capacity", "slot_tokens", "vocab_size"):
            if meta[key] != getattr(self, key):
                raise ValueError(f"the saved ring has {key} {meta[key]}, this one {getattr(self, key)}: use the saved")
        order = tensors["slots"].tolist()
        free = tensors["free"].tolist()
        if sorted(order + free) != list(range(self.capacity)):
            raise ValueError("the saved ring is damaged: used and free slots are not all slots; load an older state")
        columns = {key: tensors[key].numpy() for key in _COLUMNS}
        ids = tensors["ids"].numpy()
        owners = Owners.from_dict(meta, self.capacity)
        longest = int(columns["length"].max(initial=0))
        if (
            ids.shape != (len(order), longest)
            or any(column.shape != (len(order),) for column in columns.values())
            or longest > self.slot_tokens
            or len(set(columns["uid"].tolist())) != len(order)
            or not all(0 <= expert < len(owners.names) for expert in columns["expert"].tolist())
        ):
            raise ValueError("the saved ring is damaged: its rows do not fit together; load an older state")
        self._ids[:] = 0
        self._columns["completion"][:] = 0
        self._ids[order, :longest] = ids
        for key, column in columns.items():
            self._columns[key][order] = column
        kinds = np.stack([columns["completion"], columns["expert"].astype(np.int64)], 1)
        _, groups, sizes = np.unique(kinds, axis=0, return_inverse=True, return_counts=True)
        self._alike[:] = 0
        self._alike[order] = sizes[groups]
        self._owners, self._free, self.seen = owners, free, int(meta["seen"])
        self._order = OrderedDict.fromkeys(order)
        self._by_uid = dict(zip(columns["uid"].tolist(), order, strict=True))

    def _checked_ids(self, ids: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        tokens = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        if not tokens.size:
            raise ValueError("a sample without tokens cannot be kept: leave it out")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"ids are {tokens.dtype} {tokens.shape}: expected integers in one dimension")
        if len(tokens) > self.slot_tokens:
            raise ValueError(f"a sample of {len(tokens)} tokens does not fit in a slot of {self.slot_tokens}: cut it")
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"ids {tokens.min()} to {tokens.max()} are outside the vocabulary of {self.vocab_size} tokens"
            )
        return tokens

    def _check_used(self, slot: int) -> None:
        if slot not in self._order:
            raise ValueError(f"slot {slot} of the replay ring is empty")

    def _giving_way(self, owner: int, alike: np.ndarray, offered: int) -> int | None:
        """The slot of a full ring that the newest sample takes, or None.

        Args:
            owner: number of its expert, whose sample it is the newest one.
            alike: slots of that expert's samples with its completion, of which it is number `offered`.
        """
        if self.keep == "recent":
            return next(iter(self._order))
        source = self._random(_RESERVOIR, self.seen)
        if self.keep == "reservoir":
            slot = _below(source, self.seen)
            return slot if slot < self.capacity else None
        crowded = self._owners.most_crowded(self._columns["expert"], owner)
        own = np.flatnonzero(self._columns["expert"] == crowded)
        most = int(self._alike[own].max())
        if crowded == owner and len(alike) == most:
            # a reservoir among those of its completion
            place = _below(source, offered)
            return int(alike[place]) if place < most else None
        if crowded == owner and most == 1:
            place = _below(source, self._owners.offered[owner])
            return int(own[place]) if place < len(own) else None
        crowd = own[self._alike[own] == most]
        return int(crowd[_below(source, len(crowd))])

    def _group(self, completion: int, owner: int) -> np.ndarray:
        """Slots of an expert's samples with a completion."""
        # wiped with their slots, so that no unused one matches
        return np.flatnonzero((self._columns["completion"] == completion) & (self._columns["expert"] == owner))

    def _forget(self, slot: int) -> None:
        del self._order[slot]
        del self._by_uid[int(self._columns["uid"][slot])]
        self._ids[slot] = 0
        completion, owner = int(self._columns["completion"][slot]), int(self._columns["expert"][slot])
        self._columns["completion"][slot] = self._alike[slot] = 0
        self._count(completion, owner)

    def _count(self, completion: int, owner: int) -> None:
        """Note how many samples of an expert have a completion now."""
        slots = self._group(completion, owner)
        self._alike[slots] = len(slots)

    def _random(self, stream: int, counter: int) -> np.random.Philox:
        """Counter-based source; raw words, because numpy promises their values across its versions."""
        return np.random.Philox(key=[self.seed, stream], counter=[0, counter, 0, 0])


def _hash(ids: np.ndarray) -> int:
    """64 bits of token ids, never 0, which marks a free slot."""
    digest = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _below(source: np.random.Philox, limit: int) -> int:
    """A uniform integer in [0, limit): the high word of 64 random bits times the limit."""
    return source.random_raw() * limit >> 64
