"""The processes of the demo's learners, forked from one that has the libraries loaded, which takes 5 s of a core.

Nothing heavy is imported here, so that this can begin before anything else does.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

# where there is no fork, each process loads them itself
WORKERS: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
WORKERS.set_forkserver_preload(["ogpstream.profiling.demo_worker"])


def load_libraries() -> None:
    """Begin to load them beside what this process does meanwhile."""
    WORKERS.Process(target=_nothing, daemon=True).start()


def _nothing() -> None:
    """What the first process does."""
