"""What a state holds: told by its learner, or read from the folder beside a running one.

Reading takes no model and no lock, and changes nothing.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any

from ogpstream.learner.errors import StateError
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.state import FORMAT
from ogpstream.memory.canonical import canonical_hash

if TYPE_CHECKING:
    # `status` reads a state without a model, and what learns takes seconds to import
    from ogpstream.learner.queue import RecordQueue

# what a snapshot says beside the state: not part of its hash
ASIDE = ("config", "base", "environment", "model")
# records that are a sample of some fate
SAMPLES = ("sample", "kept", "refused")

_LIVE = re.compile(r"bases\.\d+\.live")
_TRIES = 5


def live_status(queue: RecordQueue) -> dict[str, Any]:
    """The fields of `ogpstream status` as they are now, everything that is applied counted."""
    state, folder = queue.applier.state, queue.applier.folder
    counters, store = state.counters, state.store
    return {
        "healthy": True,
        "acknowledged": counters.acknowledged,
        "learned": counters.learned,
        "rejected": counters.rejected,
        "quarantined": counters.quarantined,
        "pending": len(queue),
        "version": store.served.version,
        "updates": counters.updates,
        "basis_columns": state.protection.columns,
        "ring_samples": len(state.ring),
        "experts": list(store.names),
        "expert_samples": [state.ring.offered.get(name, 0) for name in store.names],
        "frozen": sorted(state.frozen),
        "held_discarded": max(max(store.expert(name).discarded) for name in store.names),
        "versions": folder.versions(),
        **folder.sizes(),
        "state_sha256": state.sha256(),
    }


def read_status(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields of `ogpstream status` from the newest valid snapshot and the journal after it, and what is damaged.

    `acknowledged` counts the records of samples that are pending too; all other counts are those of the snapshot.

    Raises:
        StateError: there is no state, or nothing that can be read.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return _look(path)
        except StateError:
            # a learner at work may have dropped what was just being read
            if attempt == _TRIES:
                raise
            time.sleep(0.05 * attempt)
    raise AssertionError


def _look(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    folder = StateFolder(path, readonly=True)
    try:
        snapshot = folder.load()
        problems = list(folder.snapshots.problems)
        meta = snapshot.meta
        if meta.get("format") != FORMAT:
            raise StateError(f"{path} has a state of format {meta.get('format')}, this version reads {FORMAT}: "
                             "use the version that wrote it")
        position, counters = meta["position"], meta["counters"]
        offered = dict(zip(meta["ring"]["experts"], meta["ring"]["offered"], strict=True))
        aside = {"versions": folder.versions(), **folder.sizes()}
        pending = waiting = 0
        for record in folder.records(position["seq"]):
            # the first one may be half done: its sample is counted already
            waiting += record["kind"] in SAMPLES and (pending > 0 or position["done"] == 0)
            pending += 1
    finally:
        folder.close()
    status = {
        "healthy": not problems,
        "acknowledged": counters["acknowledged"] + waiting,
        "learned": counters["learned"],
        "rejected": counters["rejected"],
        "quarantined": counters["quarantined"],
        "pending": pending,
        "version": snapshot.version,
        "updates": counters["updates"],
        "basis_columns": sum(int(tensor.sum()) for name, tensor in snapshot.tensors.items() if _LIVE.fullmatch(name)),
        "ring_samples": len(snapshot.tensors["ring.slots"]),
        "experts": [expert["name"] for expert in meta["experts"]["experts"]],
        "expert_samples": [offered.get(expert["name"], 0) for expert in meta["experts"]["experts"]],
        "frozen": sorted(expert["name"] for expert in meta["experts"]["experts"] if expert["frozen"]),
        # the most that cuts may have moved x W of one linear, per |x|
        "held_discarded": max(max(expert["discarded"]) for expert in meta["experts"]["experts"]),
        **aside,
        "state_sha256": canonical_hash(snapshot.tensors, {k: v for k, v in meta.items() if k not in ASIDE}),
    }
    return status, problems
