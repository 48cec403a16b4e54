"""The experts of a learner by name: made, served, taken in and written as adapters of PEFT."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ogpstream.learner import peft_io
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.folder import Record
from ogpstream.learner.queue import RecordQueue
from ogpstream.learner.samples import DEFAULT_EXPERT, check_new_expert
from ogpstream.memory.adapters import UnknownExpert
from ogpstream.memory.experts import Expert
from ogpstream.memory.units import exhausted


class Roster:
    """Changes the experts through records, applied at once after all that is pending; errors are those of the face."""

    def __init__(self, queue: RecordQueue) -> None:
        self._queue = queue
        applier = queue.applier
        self._applier, self._store, self._config = applier, applier.state.store, applier.config
        self._attachment = applier.updater.attachment

    @property
    def names(self) -> tuple[str, ...]:
        return self._store.names

    def add(self, name: str, rank: int | None) -> None:
        """See `StreamLearner.add_expert`."""
        rank = self._config.rank if rank is None else rank
        self._check_new(name, rank)
        self._apply({"kind": "expert", "name": name, "rank": rank})

    def activate(self, gates: Mapping[str, float]) -> None:
        """See `StreamLearner.activate`."""
        unknown = sorted(set(gates) - set(self.names))
        most = self._config.most_active or len(self.names)
        if unknown or not 0 < len(gates) <= most:
            raise ConfigError(f"cannot serve {', '.join(gates) or 'nothing'}: give 1 to {most} of "
                              f"{', '.join(self.names)}")
        for name, gate in gates.items():
            if not math.isfinite(gate):
                raise ConfigError(f"the gate of {name} is {gate}: it must be a finite number")
        self._apply({"kind": "activate", "gates": gates})

    def freeze(self, name: str, *, frozen: bool) -> None:
        """See `StreamLearner.freeze` and `StreamLearner.unfreeze`."""
        self._expert(name)
        self._apply({"kind": "freeze", "name": name, "frozen": frozen})

    def export_peft(self, folder: str | os.PathLike[str], name: str, *, replace: bool) -> Path:
        """See `StreamLearner.export_peft`."""
        expert, state, model = self._expert(name), self._applier.state, self._attachment.model
        factors = []
        for index in range(len(self._attachment.sites)):
            held = expert.held[index]
            factors.append((torch.cat([expert.a(index), held.U], 1),
                            torch.cat([expert.scaling * expert.b(index), held.V], 0)))
        peft_io.export_adapter(folder, model=model, attachment=self._attachment, factors=factors,
                               base_model_name=model.config.name_or_path, replace=replace,
                               about=f"{_about(name)}as of version {self._store.served.version}, after "
                                     f"{state.ring.offered.get(name, 0)} samples of its own; all experts together "
                                     f"({', '.join(self.names)}) learned {state.counters.learned}")
        return Path(folder)

    def export_experts(self, folder: str | os.PathLike[str], *, replace: bool) -> tuple[Path, ...]:
        """See `StreamLearner.export_experts`."""
        places = {DEFAULT_EXPERT: Path(folder)}
        places |= {name: Path(folder, name) for name in self.names if name != DEFAULT_EXPERT}
        written = tuple(self.export_peft(place, name, replace=replace) for name, place in places.items())
        for other in peft_io.adapters_in(Path(folder)):
            if other not in written:
                # of an expert that there was in an earlier export
                peft_io.remove_export(other, _about(other.name))
        return written

    def import_peft(self, folder: str | os.PathLike[str], name: str) -> None:
        """See `StreamLearner.import_peft`."""
        self._check_new(name)
        peft_io.read_adapter(folder, self._attachment)
        # the journal names the adapter, so the state folder keeps a copy of it
        source = self._applier.folder.keep_import(Path(folder), name)
        self._apply({"kind": "import", "name": name, "folder": source})

    def _apply(self, record: Record) -> None:
        self._queue.acknowledge([record])
        exhausted(self._queue.drain())

    def _check_new(self, name: str, rank: int | None = None) -> None:
        if name in self.names:
            raise ConfigError(f"there is an expert {name!r} already")
        check_new_expert(name, rank, routes=self._config.routes, widest=self._attachment.widest)

    def _expert(self, name: str) -> Expert:
        try:
            return self._store.expert(name)
        except UnknownExpert as error:
            raise ConfigError(str(error)) from None


def _about(name: str) -> str:
    """How the card of an expert's adapter begins to tell of it; a copy in a folder of another name is not this."""
    return f"expert `{name}` "
