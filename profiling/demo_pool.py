"""The processes of the demo's learners, forked from one that has the libraries loaded, which takes 5 s of a core.

Nothing heavy is imported here, so that this can begin before anything else does.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing import forkserver
from threading import Event
from typing import Any, TypeVar

T = TypeVar("T")

# where processes are not forked safely, each loads the libraries itself
_FORKS = sys.platform == "linux"
WORKERS: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")


def load_libraries() -> None:
    """Begin to load them in a process of their own; returns at once."""
    if _FORKS:
        WORKERS.set_forkserver_preload(["ogpstream.profiling.demo_worker"])
        forkserver.ensure_running()


def two_at_a_time(runs: Mapping[str, Callable[[Event], T]]) -> dict[str, T]:
    """What each of some functions returns, in threads.

    Where one raises, or the user interrupts, the others' event is set, on which they are to end, no more are begun, and
    it is raised here.
    """
    stop = Event()
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, stop) for name, run in runs.items()}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            # before those that wait for the event end, or their threads would take what is left
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            raise
