"""The saved versions of a learner: written, copied into another folder, returned to."""

from __future__ import annotations

import os

from ogpstream.learner.errors import ConfigError, StateError
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.queue import RecordQueue
from ogpstream.memory.units import exhausted


class Versions:
    """Saves what a queue's records have made of the state; errors are those of the face."""

    def __init__(self, queue: RecordQueue) -> None:
        self._queue, self._applier = queue, queue.applier

    def saved(self) -> list[int]:
        """Oldest first."""
        return self._applier.folder.versions()

    def save(self, folder: str | os.PathLike[str] | None = None) -> None:
        """See `StreamLearner.save_state`."""
        self._queue.check_reserved()
        if folder is None:
            self._applier.checkpoint()
            return
        other = StateFolder(folder)
        try:
            if not other.empty:
                raise StateError(f"{folder} holds a state already: choose another folder")
            exhausted(self._queue.drain())
            tensors, meta = self._applier.capture()
            # its journal starts anew
            other.save(self._applier.state.store.served.version, tensors, {**meta, "position": {"seq": 0, "done": 0}})
        finally:
            other.close()

    def return_to(self, version: int) -> None:
        """See `StreamLearner.rollback`."""
        self._check_saved(version)
        # kept while what waits is applied, and for as long as the journal may repeat this rollback
        self._applier.folder.pin(version, "rollback")
        exhausted(self._queue.drain())
        # in memory nothing is pinned, and a record that cannot be applied would stop all that come after it
        self._check_saved(version)
        self._queue.acknowledge([{"kind": "rollback", "to": version}])
        exhausted(self._queue.drain())
        self.save()

    def _check_saved(self, version: int) -> None:
        saved = self.saved()
        if version not in saved:
            raise ConfigError(f"no version {version} to return to: there are {', '.join(map(str, saved))}")
