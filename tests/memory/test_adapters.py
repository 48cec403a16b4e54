"""Adapter store: packs are the sum of their experts, versions are immutable, state survives bit for bit."""

import dataclasses
import json
import threading

import pytest
import safetensors.torch
import torch

from ogpstream.memory import adapters
from ogpstream.memory.adapters import AdapterStore, UnknownExpert
from ogpstream.memory.experts import Expert, Held
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.served import Served

SITES = (
    SiteShape("q", 12, 20, "x"),
    SiteShape("o", 20, 12, "o"),
    SiteShape("k", 12, 5, "x"),
    SiteShape("down", 33, 12, "h"),
    SiteShape("v", 12, 5, "x"),
)


def filled(store: AdapterStore, name: str, rank: int, held_ranks: list[int], seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(store.dtype)

    expert = store.create(name, rank, scaling=0.1 + rank)
    expert.factors = normal(expert.layout.numel)
    ranks = zip(store.sites, held_ranks, strict=True)
    expert.held = [Held(normal(site.d_in, k), normal(k, site.d_out)) for site, k in ranks]
    return expert


def two_experts(**settings: object) -> AdapterStore:
    store = AdapterStore(SITES, **settings)  # type: ignore[arg-type]
    first = filled(store, "default", 3, [2, 0, 1, 0, 4], seed=1)
    filled(store, "legal", 4, [0, 0, 5, 1, 2], seed=2)
    first.exp_avg, first.exp_avg_sq, first.steps = first.factors * 0.1, first.factors**2, 7
    first.folded, first.discarded, first.discarded_sq = {"x": 3}, [0.1] * 5, [0.01] * 5
    store.activate("legal", gate=0.3)
    store.activate("default", gate=1.7)
    return store


def same_packs(one: Served, other: Served) -> bool:
    return all(
        torch.equal(getattr(a, key), getattr(b, key))
        for a, b in zip(one.packs, other.packs, strict=True)
        for key in ("A", "B", "scale")
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_layout_views_alias_the_slab_and_tile_it(rank: int) -> None:
    layout = Layout(SITES, rank)
    slab = torch.full((layout.numel,), -1.0)
    for index, site in enumerate(SITES):
        assert layout.a(slab, index).shape == (site.d_in, rank)
        assert layout.b(slab, index).shape == (rank, site.d_out)
        assert layout.b(slab, index).is_contiguous()
        assert (layout.a(slab, index) == -1).all() and (layout.b(slab, index) == -1).all(), "views overlap"
        layout.a(slab, index).fill_(index)
        layout.b(slab, index).fill_(10 + index)
    assert (slab >= 0).all()
    assert slab.numel() == sum(rank * (site.d_in + site.d_out) for site in SITES)
    assert (slab[: layout.a_numel] < 10).all() and (slab[layout.a_numel :] >= 10).all()


def test_the_a_of_one_basis_lie_side_by_side() -> None:
    layout = Layout(SITES, 3)
    slab = torch.randn(layout.numel)
    assert layout.bases == ("x", "o", "h")
    assert layout.members("x") == (0, 2, 4)
    block = layout.a_block(slab, "x")
    assert block.shape == (12, 9) and block.is_contiguous()
    assert torch.equal(block, torch.cat([layout.a(slab, index) for index in (0, 2, 4)], dim=1))


@pytest.mark.parametrize("sites", [[], [SITES[0], SITES[0]], [SITES[0], SiteShape("z", 13, 4, "x")]])
def test_layout_refuses_sites_that_do_not_fit(sites: list[SiteShape]) -> None:
    with pytest.raises(ValueError):
        Layout(sites, 2)


def test_packs_are_the_sum_of_their_experts() -> None:
    store = two_experts(dtype=torch.float64)
    served = store.publish()
    assert served.experts == ("legal", "default") and served.gates == (0.3, 1.7)
    for index, (site, pack) in enumerate(zip(SITES, served.packs, strict=True)):
        x = torch.randn(7, site.d_in, dtype=torch.float64)
        expected = sum(gate * x @ store.expert(name).delta(index) for name, gate in store.active.items())
        torch.testing.assert_close((x @ pack.A * pack.scale) @ pack.B, expected, rtol=1e-12, atol=1e-12)
        assert pack.trained == {"legal": slice(0, 4), "default": slice(4, 7)}
        for name, columns in pack.trained.items():
            assert torch.equal(pack.A[:, columns], store.expert(name).a(index))
            assert torch.equal(pack.B[columns], store.expert(name).b(index))
        assert pack.A.shape == (
            site.d_in,
            7 + sum(store.expert(name).held[index].rank for name in store.active),
        )
        assert pack.A.is_contiguous() and pack.B.is_contiguous()
        assert pack.A.data_ptr() % 32 == 0 and pack.B.data_ptr() % 32 == 0


def test_served_copies_are_the_rounded_masters() -> None:
    store = two_experts(serve_dtype=torch.bfloat16)
    for index, pack in enumerate(store.publish().packs):
        masters = [store.expert(name) for name in store.active]
        expected = torch.cat([e.a(index) for e in masters] + [e.held[index].U for e in masters], dim=1)
        assert torch.equal(pack.A, expected.bfloat16())
        assert pack.scale.dtype == torch.float32


@pytest.mark.parametrize("names", [("legal",), ("default",), ("legal", "default")])
def test_a_version_of_some_experts_computes_what_these_do(names: tuple[str, ...]) -> None:
    store = two_experts(dtype=torch.float64)
    served = store.publish()
    # of a part of it again, too
    for some in (served.only(names), served.only(names).only([*names, "nobody"])):
        assert some.version == served.version and some.experts == names and some.scope is served.scope
        for index, (site, pack) in enumerate(zip(SITES, some.packs, strict=True)):
            x = torch.randn(7, site.d_in, dtype=torch.float64)
            expected = sum(store.active[name] * x @ store.expert(name).delta(index) for name in names)
            torch.testing.assert_close((x @ pack.A * pack.scale) @ pack.B, expected, rtol=1e-12, atol=1e-12)
            for name in names:
                assert torch.equal(pack.A[:, pack.trained[name]], store.expert(name).a(index))
                assert torch.equal(pack.B[pack.trained[name]], store.expert(name).b(index))
            assert pack.A.shape[1] == sum(store.expert(name).rank + store.expert(name).held[index].rank
                                          for name in names)


def test_an_expert_that_is_not_served_can_be_removed() -> None:
    store = two_experts()
    with pytest.raises(ValueError, match="'legal' is active"):
        store.remove("legal")
    store.deactivate("legal")
    store.remove("legal")
    assert store.names == ("default",)
    with pytest.raises(UnknownExpert):
        store.remove("legal")


def test_without_an_active_expert_nothing_is_added() -> None:
    store = two_experts()
    store.deactivate("default")
    store.deactivate("legal")
    for served in (store.publish(), AdapterStore(SITES).served):
        for site, pack in zip(SITES, served.packs, strict=True):
            assert pack.A.shape == (site.d_in, 0) and pack.B.shape == (0, site.d_out)
            assert pack.scale.shape == (0,) and pack.trained == {}


def test_an_old_version_outlives_everything_that_follows() -> None:
    store = two_experts()
    old = store.publish()
    copies = [(pack.A.clone(), pack.B.clone(), pack.scale.clone()) for pack in old.packs]
    expert = store.expert("default")
    expert.factors = expert.factors + 1
    store.activate("legal", -3.0)
    assert store.served is old, "nothing is served before publish"
    new = store.publish()
    assert store.served is new and not same_packs(old, new)
    store.deactivate("legal")
    store.publish()
    for pack, (a, b, scale) in zip(old.packs, copies, strict=True):
        assert torch.equal(pack.A, a) and torch.equal(pack.B, b) and torch.equal(pack.scale, scale)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(("sites", "elements"), [(2, 2**20), (16, 300), (16, 1)])
def test_a_version_is_built_a_few_sites_at_a_time(
    monkeypatch: pytest.MonkeyPatch, sites: int, elements: int, reuse: bool
) -> None:
    """Of experts as they are to become: those of the store, and what is served, stay."""
    store, plain = two_experts(), two_experts()
    before = store.publish() if reuse else store.served
    later = {name: store.expert(name).copy() for name in store.names}
    for one in (later["default"], plain.expert("default")):
        one.factors = one.factors + 1
        one.held = [Held(held.U - 1, held.V) for held in one.held]
    monkeypatch.setattr(adapters, "_SITES", sites)
    monkeypatch.setattr(adapters, "_ELEMENTS", elements)
    masters, written = store.expert("default").factors.clone(), [0]
    put = adapters.put
    monkeypatch.setattr(adapters, "put", lambda *given: (written.append(written.pop() + given[1].numel()), put(*given)))
    work, units = store.building(store.active, later), []
    while True:
        try:
            next(work)
        except StopIteration as end:
            made = end.value
            break
        units.append(written[0])
        written[0] = 0
        assert store.served is before and torch.equal(store.expert("default").factors, masters)
    # the first one takes the memory, the end only assigns
    assert units[0] == written[0] == 0 and len(units) >= 1 + (5 if elements == 1 else 3)
    expected = plain.publish()
    assert same_packs(made, expected) and made.version == expected.version + reuse
    assert (made.experts, made.gates) == (expected.experts, expected.gates)


def test_versions_count_up_unless_given() -> None:
    store = two_experts()
    assert [store.publish().version, store.publish().version] == [1, 2]
    assert store.publish(40).version == 40
    assert store.publish().version == store.served.version == 41


def test_the_least_recently_activated_expert_leaves() -> None:
    store = AdapterStore(SITES, max_active=2)
    for name in "abcd":
        store.create(name, 2, 1.0)
    assert store.activate("a") == () and store.activate("b") == ()
    assert store.activate("c") == ("a",)
    assert store.activate("b", gate=0.5) == ()
    assert store.activate("d") == ("c",)
    assert store.active == {"b": 0.5, "d": 1.0} and list(store.active) == ["b", "d"]
    assert store.activate("a", pinned=["b"]) == ("d",)
    with pytest.raises(ValueError, match="pinned"):
        store.activate("c", pinned=["a", "b"])
    assert list(store.active) == ["b", "a"]
    assert store.publish().experts == ("b", "a")


def test_a_reader_never_sees_a_mix_of_versions() -> None:
    store = AdapterStore(SITES)
    expert = store.create("default", 2, 1.0)
    store.activate("default")
    store.publish()
    mixed: list[Served] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            served = store.served
            values = {float(value) for pack in served.packs for value in (pack.A.min(), pack.B.max())}
            if values != {float(served.version - 1)}:
                mixed.append(served)

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 200):
        expert.factors = torch.full_like(expert.factors, version)
        store.publish()
    done.set()
    reader.join()
    assert not mixed


def test_state_survives_files_bit_for_bit() -> None:
    store = two_experts()
    store.create("empty", 1, 2.0)
    store.publish(17)
    tensors, meta = store.state_dict()
    loaded = AdapterStore(SITES)
    loaded.load_state_dict(
        safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
    )
    assert loaded.served.version == 17 and same_packs(store.served, loaded.served)
    assert loaded.names == store.names and list(loaded.active.items()) == list(store.active.items())
    for name in store.names:
        one, other = store.expert(name), loaded.expert(name)
        for field in dataclasses.fields(Expert):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if field.name == "held":
                assert all(
                    torch.equal(a.U, b.U) and torch.equal(a.V, b.V) for a, b in zip(left, right, strict=True)
                )
            elif isinstance(left, torch.Tensor):
                assert torch.equal(left, right) and left.data_ptr() != right.data_ptr(), field.name
            elif field.name != "layout":
                assert left == right, field.name
        assert one.layout.rank == other.layout.rank
    again, again_meta = loaded.state_dict()
    assert again_meta == meta and again.keys() == tensors.keys()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    store = two_experts()
    store.publish()
    tensors, meta = store.state_dict()
    target = two_experts()
    served = target.publish()
    wrong_sites = {**meta, "sites": [*meta["sites"][:-1], ["v", 12, 6, "x"]]}
    missing = {key: value for key, value in tensors.items() if key != "legal/held/3/V"}
    narrow = {**tensors, "default/held/0/U": torch.zeros(12, 1)}
    rounded = {**tensors, "default/factors": tensors["default/factors"].bfloat16()}
    for bad_tensors, bad_meta, message in (
        (tensors, wrong_sites, "sites"),
        (missing, meta, "legal/held/3/V"),
        (narrow, meta, "default/held/0/U"),
        (rounded, meta, "bfloat16"),
        (tensors, {**meta, "active": [["nobody", 1.0]]}, "nobody"),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(bad_tensors, bad_meta)
        assert target.served is served and target.names == ("default", "legal")


def test_errors_name_the_value_in_one_line() -> None:
    store = two_experts()
    for call in (store.expert, store.activate, store.deactivate):
        with pytest.raises(UnknownExpert) as caught:
            call("lagel")
        assert str(caught.value) == "no expert 'lagel'; known experts: 'default', 'legal'"
    for arguments, message in (
        (("default", 2, 1.0), "exists already"),
        (("a/b", 2, 1.0), "no expert name"),
        (("new", 0, 1.0), "rank"),
        (("new", 2, float("nan")), "scaling"),
        (("new", 2, 1.0, torch.zeros(3)), "expected"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            store.create(*arguments)
        assert "\n" not in str(refused.value)
    for gate in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gate"):
            store.activate("default", gate)
    store.deactivate("legal")
    assert store.active == {"default": 1.7}


def test_ranks_rounded_up_compute_the_same_with_columns_of_zeros():
    exact, padded = two_experts().publish(), two_experts(multiple=16).publish()
    for narrow, wide in zip(exact.packs, padded.packs, strict=True):
        rank = narrow.A.shape[1]
        assert wide.A.shape[1] == wide.B.shape[0] == len(wide.scale) == 16 * -(-rank // 16)
        assert torch.equal(wide.A[:, :rank], narrow.A) and torch.equal(wide.B[:rank], narrow.B)
        assert torch.equal(wide.scale[:rank], narrow.scale) and wide.trained == narrow.trained
        assert not wide.A[:, rank:].any() and not wide.B[rank:].any() and not wide.scale[rank:].any()
    assert {pack.A.shape[1] for pack in padded.packs} == {16}
    with pytest.raises(ValueError, match="multiple 0"):
        AdapterStore(SITES, multiple=0)
