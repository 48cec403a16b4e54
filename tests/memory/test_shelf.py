"""Packs of single experts: what is on the device, what comes back when asked for, and versions that share them."""

import gc
import random
import sys
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert, Held
from ogpstream.memory.layout import SiteShape
from ogpstream.memory.served import Served
from ogpstream.memory.shelf import Part
from ogpstream.memory.units import exhausted

SITES = (SiteShape("q", 12, 10, "x"), SiteShape("down", 16, 12, "h"))
NAMES = ("a", "b", "c", "d")


def _slab(store: AdapterStore, seed: int) -> torch.Tensor:
    return torch.randn(store.layout(2).numel, generator=torch.Generator().manual_seed(seed))


def _store(most: int | None, names: Sequence[str] = NAMES) -> AdapterStore:
    store = AdapterStore(SITES, max_active=8, apart=most)
    for number, name in enumerate(names):
        expert = store.create(name, 2, 2.0, _slab(store, number))
        expert.held = [Held(torch.ones(site.d_in, number), torch.full((number, site.d_out), 0.5)) for site in SITES]
        store.activate(name, 1.0 + number)
    store.publish()
    return store


def _delta(versions: Sequence[Served], site: int) -> torch.Tensor:
    """What they add to the output of a linear for each unit input."""
    return sum(((one.packs[site].A * one.packs[site].scale) @ one.packs[site].B for one in versions),
               torch.zeros(SITES[site].d_in, SITES[site].d_out))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_apart_and_side_by_side_add_the_same(most: int) -> None:
    apart, together = _store(most), _store(None)
    for site in range(len(SITES)):
        torch.testing.assert_close(_delta(apart.served.each, site), _delta(together.served.each, site))
        for names in (["c"], ["a", "d"]):
            torch.testing.assert_close(_delta(apart.served.only(names).each, site),
                                       _delta(together.served.only(names).each, site))
    one = apart.served.only(["c"])
    assert (one.experts, one.gates, one.version, one.parts) == (("c",), (3.0,), apart.served.version, None)
    assert apart.served.only(["a", "d"]).experts == ("a", "d") and apart.served.only([]).each == ()


def test_only_the_last_used_ones_are_on_the_device() -> None:
    store = _store(2)
    for name in ("a", "b", "c", "a"):
        assert store.served.only([name]).experts == (name,)
    assert store.on_device == ("a", "c")
    assert store.served.parts is not None
    on = [part.expert.name for part in store.served.parts if part in part.shelf]
    assert sorted(on) == ["a", "c"]


def test_an_expert_that_was_used_last_stays_beside_its_older_version() -> None:
    store = _store(2, ["a", "b", "c"])
    old = store.served
    old.only(["a"])
    old.only(["b"])
    store.expert("a").factors = _slab(store, 40)
    store.publish()
    store.served.only(["c"])
    assert store.on_device == ("c", "a") and old.experts == ("a", "b", "c")


def test_what_was_taken_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store, built = _store(1), []
    taken = store.served.only(["a", "b", "c"]).taken()
    assert store.shelf is not None
    monkeypatch.setattr(store.shelf, "_build", built.append)
    wanted = taken.each
    assert taken.each == wanted and taken.taken().each == wanted and not built


def test_requests_and_updates_may_use_it_at_once() -> None:
    store, failed, over = _store(2), [], threading.Event()

    def ask(seed: int) -> None:
        names = random.Random(seed)
        try:
            while not over.is_set():
                name = names.choice(NAMES)
                assert store.served.only([name]).experts == (name,)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for seed in range(60):
            store.expert(NAMES[seed % 4]).factors = _slab(store, 100 + seed)
            store.publish()
            for _ in range(50):
                assert len(store.on_device) <= 2
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switch)
    assert not failed


def test_a_version_takes_the_parts_that_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    store, packed = _store(4), []
    real = AdapterStore._packed

    def watched(self: AdapterStore, active: dict[str, float], *rest: object) -> object:
        packed.append(tuple(active))
        return real(self, active, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, "_packed", watched)
    before = store.served
    store.expert("b").factors = _slab(store, 50)
    after = store.publish()
    assert packed == [("b",)]
    assert before.parts is not None and after.parts is not None
    assert [one is other for one, other in zip(before.parts, after.parts, strict=True)] == [True, False, True, True]
    # the older version is what it was
    assert torch.equal(before.only(["b"]).packs[0].A[:, :2], store.layout(2).a(_slab(store, 1), 0))
    assert torch.equal(after.only(["b"]).packs[0].A[:, :2], store.layout(2).a(_slab(store, 50), 0))


def test_an_older_version_is_built_again_as_it_was() -> None:
    store = _store(1)
    store.expert("b").exp_avg = _slab(store, 59)
    store.publish()
    assert store.served.parts is not None and all(part.expert.exp_avg is None for part in store.served.parts)
    old = store.served
    wanted = _delta([old.only(["b"])], 0)
    store.expert("b").factors = _slab(store, 60)
    store.publish()
    for name in NAMES:
        store.served.only([name])
    assert torch.equal(_delta([old.only(["b"])], 0), wanted)
    assert not torch.equal(_delta([store.served.only(["b"])], 0), wanted)


def test_what_nobody_has_a_version_of_leaves_by_itself() -> None:
    store = _store(4)
    store.expert("b").factors = _slab(store, 70)
    store.publish()
    gc.collect()
    assert store.shelf is not None and len(store.shelf._held) == len(NAMES)


def test_a_version_that_is_dropped_leaves_nothing() -> None:
    store = _store(4)
    changed: dict[str, Expert] = {name: store.expert(name).copy() for name in NAMES}
    changed["c"].factors = _slab(store, 80)
    building, served = store.building(store.active, changed), store.served
    exhausted(building)
    del building
    gc.collect()
    assert store.shelf is not None and len(store.shelf._held) == len(NAMES) and store.served is served
    assert torch.equal(store.served.only(["c"]).packs[0].A[:, :2], store.layout(2).a(_slab(store, 2), 0))


@pytest.mark.parametrize("failures", [1, 2])
def test_without_memory_the_others_make_room(failures: int) -> None:
    store, left = _store(4), [failures]
    assert store.shelf is not None
    real: Callable[[Part], Served] = store.shelf._build

    def build(part: Part) -> Served:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room")
        return real(part)

    store.shelf._build = build
    store.shelf._held.clear()
    if failures == 2:
        with pytest.raises(torch.OutOfMemoryError):
            store.served.only(["b"])
    assert store.served.only(["b"]).experts == ("b",) and store.on_device == ("b",)


def test_from_one_expert_to_several_and_back() -> None:
    store = _store(2, ["a"])
    assert store.served.parts is None and store.on_device == ("a",)
    alone = _delta(store.served.each, 1)
    store.create("b", 2, 2.0, _slab(store, 9))
    store.activate("b")
    store.publish()
    assert store.served.parts is not None
    torch.testing.assert_close(_delta(store.served.only(["a"]).each, 1), alone)
    store.deactivate("b")
    store.publish()
    assert store.served.parts is None
    torch.testing.assert_close(_delta(store.served.each, 1), alone)
