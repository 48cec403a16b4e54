"""Records without an update: experts and their gates, rollbacks, lines that are only counted or kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ogpstream.learner import amendments, peft_io
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.draft import Draft, fold_now
from ogpstream.learner.errors import StateError
from ogpstream.learner.folder import MemoryFolder, Record, StateFolder
from ogpstream.learner.report import SampleReport
from ogpstream.learner.restart import fresh_factors
from ogpstream.learner.rounds import Rounds
from ogpstream.learner.state import LearnerState, Position
from ogpstream.learner.update import Updater
from ogpstream.memory.units import exhausted


class Operations:
    """Changes the state at once, without a pause: what builds a version on the device does so before anything else."""

    def __init__(self, state: LearnerState, updater: Updater, config: LearnerConfig) -> None:
        self.state, self.updater, self.config = state, updater, config

    def run(self, record: Record, folder: StateFolder | MemoryFolder) -> SampleReport | None:
        """Do what the record says.

        Raises:
            StateError: its kind is unknown, or the folder cannot be written: nothing has changed.
            torch.OutOfMemoryError: there is no room for another version: nothing has changed.
        """
        counters, version = self.state.counters, self.state.store.served.version
        match record["kind"]:
            case "refused" | "kept" as kind:
                if kind == "kept":
                    folder.quarantine(record)
                counters.acknowledged += 1
                if record["id"] is not None:
                    (self.state.refused if kind == "refused" else self.state.seen).add(record["id"])
                if kind == "refused":
                    counters.rejected += 1
                    return SampleReport(record["id"], "rejected", version, reason=record["reason"])
                counters.quarantined += 1
                return SampleReport(record["id"], "quarantined", version, reason=record["reason"])
            case "expert":
                self.adopt(record["name"], record["rank"], self.config.alpha / record["rank"])
            case "import":
                adapter = peft_io.read_adapter(folder.imported(record["folder"]), self.updater.attachment)
                self.adopt(record["name"], adapter.rank, adapter.scaling, adapter.factors)
                # what it was trained on is not known
                self.state.store.scope = self.state.store.scope.opened(record["name"])
            case "activate":
                self.serve(record["gates"])
            case "freeze":
                # what it missed while it was frozen it folds before its next update
                self.state.store.expert(record["name"]).frozen = record["frozen"]
                self.state.rounds = Rounds()
            case "rollback":
                self._roll_back(record, folder)
            case kind if kind not in amendments.KINDS:
                # those act on the record that they name
                raise StateError(f"record {record['seq']} of the journal has the unknown kind {kind!r}: "
                                 "use the version that wrote it")
        return None

    def adopt(self, name: str, rank: int, scaling: float,
              factors: list[tuple[Tensor, Tensor] | None] | None = None) -> None:
        """A new expert, folded against the P of now.

        Args:
            factors: (A, B) by site; where there are none, A is N(0, 1/D_in), drawn from the seed and the name, and B 0.
        """
        store = self.state.store
        layout = store.layout(rank)
        slab = fresh_factors(layout, self.config.seed, name, dtype=store.dtype)
        for index, given in enumerate(factors or []):
            if given is not None:
                layout.a(slab, index).copy_(given[0])
                layout.b(slab, index).copy_(given[1])
        fold_now(self.state.protection, store.create(name, rank, scaling, slab))

    def serve(self, gates: Mapping[str, float]) -> None:
        """Make exactly these experts active, each folded against the P of now, and publish."""
        store = self.state.store
        # sorted, as the journal gives them back: the order decides which one is the least recently used
        active = dict(sorted(gates.items()))
        experts = {name: store.expert(name) for name in active}
        draft = Draft(self.state.protection, [expert for expert in experts.values() if not expert.frozen])
        for name in draft.experts:
            exhausted(draft.fold(name))
        served = exhausted(store.building(active, {**experts, **draft.experts}))
        draft.commit()
        for name in tuple(store.active):
            store.deactivate(name)
        for name, gate in active.items():
            store.activate(name, gate)
        store.served = self.updater.attachment.binding.served = served

    def _roll_back(self, record: Record, folder: StateFolder | MemoryFolder) -> None:
        snapshot = folder.load(record["to"])
        state = self.state
        counters, version = state.counters, state.store.served.version
        seen, refused, frozen = state.seen.state_dict(), state.refused.state_dict(), state.frozen
        position = Position(**snapshot.meta["position"])
        # a snapshot made between the updates of a sample has that sample in it
        inside = position.seq + (position.done > 0)
        # what may fail comes first, and then the version: applied again, it finds the state as it was
        for undone in folder.kept(inside):
            if undone["kind"] == "sample" and undone["seq"] < record["seq"]:
                folder.quarantine({**undone, "reason": f"undone by the rollback to version {record['to']}"})
        state.restore(snapshot.tensors, snapshot.meta, version + 1)
        # what was brought before stays known, so that a rerun of its file does not learn it again
        state.seen.load_state_dict(seen)
        state.refused.load_state_dict(refused)
        # and who is frozen is no matter of what was learned
        for name in state.store.names:
            state.store.expert(name).frozen = name in frozen
        learned = state.counters.learned
        state.counters = replace(counters, learned=learned,
                                 quarantined=counters.quarantined + counters.learned - learned)
        self.updater.attachment.binding.served = state.store.served
