"""An update of an expert that is not served: its commit activates it, and until then nobody sees anything of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing

from ogpstream.learner.report import Update
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert


def activating(updater: Updater, name: str, work: Generator[str, None, Update]) -> Generator[str, None, Update]:
    """Drive an update of an expert that need not be active, unit by unit.

    Its units compute with a version that has the expert, folded against the P of now; the least recently used expert
    makes room. Between units all is as it was, and an update that is dropped or refused leaves it so.
    """
    store, binding = updater.store, updater.attachment.binding
    if name in store.active:
        return (yield from work)
    expert, served = store.expert(name), store.served
    before = expert.copy(), store.active
    try:
        updater.protection.fold(expert)
        store.activate(name)
        trial = store.publish()
        during = expert.copy(), store.active
    finally:
        store.served = served
        _exchange(store, expert, *before)
    with closing(work):
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
    if committed and store.served is served:
        # settled: no step was needed, and nothing published
        updater.publish()
    return update


def _exchange(store: AdapterStore, expert: Expert, values: Expert, active: Mapping[str, float]) -> None:
    """Give an expert these values, and the store these active experts."""
    expert.restore(values)
    for name in store.active:
        store.deactivate(name)
    for name, gate in active.items():
        store.activate(name, gate)
