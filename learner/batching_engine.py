"""The engine of transformers' continuous batching, whose public `pause` is the lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from ogpstream.learner.engine import EngineBusy
from ogpstream.learner.errors import ConfigError


class BatchingEngine:
    """Pauses the batches for each unit, and only where no row is half-way: all rows of a batch share one version.

    Blocks of its prefix cache hold keys and values of the version that filled them, and are matched by token ids
    alone; so all blocks are evicted inside the pause in which another version is published.

    Args:
        manager: a `ContinuousBatchingManager`, from `model.init_continuous_batching(...)`; started before the loop.

    Raises:
        ConfigError: transformers before 5.18, whose manager has no `pause`; or the manager captures CUDA graphs, which
            go on reading the memory of the version that they were captured with.
    """

    # requests lie one after the other in one row, decoded ones with a single token
    looks_at_prompts = False

    def __init__(self, manager: Any) -> None:
        if not hasattr(manager, "pause"):
            raise ConfigError(f"continuous batching of transformers {transformers.__version__} cannot be paused: "
                              "install transformers >= 5.18")
        self._manager = manager
        self._check_graphs()

    def is_idle(self) -> bool:
        return self._manager.input_queue.empty() and not self._half_way()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the batch that is being computed.

        Raises:
            EngineBusy: a request has begun and not ended, or the manager does not run.
            ConfigError: it has come to capture CUDA graphs, as it may where it chooses by itself.
        """
        if not self._manager.is_running():
            raise EngineBusy("the continuous batching manager does not run: start it")
        with self._manager.pause():
            self._check_graphs()
            if self._half_way():
                raise EngineBusy
            yield

    def adapter_changed(self, version: int) -> None:
        if self._manager.batch_processor is not None:
            # no row holds a block now, so this is all of them. `free_all_requests(clear_ledgers=True)` would forget
            # them without giving them back to the pool, which then runs dry after some versions
            self._manager.batch_processor.cache.evict_cached_blocks()

    def _check_graphs(self) -> None:
        graphs = self._manager.continuous_batching_config.use_cuda_graph
        if any(graphs) if isinstance(graphs, tuple) else graphs:
            raise ConfigError("CUDA graphs of continuous batching would not follow the adapters: make the manager with "
                              "use_cuda_graph=False")

    def _half_way(self) -> bool:
        processor = self._manager.batch_processor
        return processor is not None and processor.has_pending_requests()
