"""An update of an expert that is not served, or not folded against the P of now: its commit does both, and until then
nobody sees anything of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing

from ogpstream.learner.draft import Draft
from ogpstream.learner.report import Update
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert
from ogpstream.memory.units import named


def activating(updater: Updater, name: str, work: Generator[str, None, Update]) -> Generator[str, None, Update]:
    """Drive an update of an expert that need be neither active nor folded, unit by unit.

    Its units compute with a version that has the expert, folded against the P of now; the least recently used expert
    makes room. Between units all is as it was, and an update that is dropped or refused leaves it so.
    """
    store, binding = updater.store, updater.attachment.binding
    expert = store.expert(name)
    if name in store.active and updater.protection.has_folded(expert):
        return (yield from work)
    before = expert.copy(), store.active
    if name not in store.active:
        store.activate(name)
    active = store.active
    _exchange(store, expert, *before)
    with closing(work):
        late = Draft(updater.protection, [expert])
        yield from named("growth", late.fold(name))
        during = late.experts[name], active
        others = {other: store.expert(other) for other in active}
        trial = yield from named("publish", store.building(active, others | late.experts))
        while True:
            _exchange(store, expert, *during)
            committed = False
            try:
                with binding.using(trial):
                    unit = next(work)
            except StopIteration as end:
                update: Update = end.value
                committed = update.refusal is None
                break
            finally:
                if not committed:
                    _exchange(store, expert, *before)
            yield unit
    if committed:
        late.tell()
    return update


def _exchange(store: AdapterStore, expert: Expert, values: Expert, active: Mapping[str, float]) -> None:
    """Give an expert these values, and the store these active experts."""
    expert.restore(values)
    for name in store.active:
        store.deactivate(name)
    for name, gate in active.items():
        store.activate(name, gate)
