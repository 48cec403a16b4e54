"""Lean and resident learning state: the arithmetic of the host on copies elsewhere, dropped where an update is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import LearnerConfig, Sample, StreamLearner, anchor, staging, update
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.staging import Lean, Piece, PieceSink, Resident, Staging, in_pieces
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.units import exhausted

TinyModel = Callable[..., tf.PreTrainedModel]
CPU = torch.device("cpu")


class _InThrees:
    """P and the anchors come in pieces of three directions, as they would from another memory."""

    def rows(self, basis: ProjectionBasis, count: int, like: Tensor) -> Iterable[Tensor]:
        return basis.rows()[:count].to(like.dtype).split(3)


class _LeanInThrees(_InThrees, Lean):
    pass


class _ResidentElsewhere(Resident):
    """Takes the host for another memory: what it keeps is kept as copies."""

    def keep(self, piece: Piece, flat: Tensor, slab: Tensor | None) -> Tensor:
        return flat.clone() if slab is None else super().keep(piece, flat, slab)

    def gathered(self, layout: Layout, gradient: Tensor) -> Tensor:
        return gradient.clone()


MODES: dict[str, Callable[[bool], Staging]] = {
    "lean": lambda shared: _LeanInThrees(CPU, alone=shared),
    "resident": lambda shared: _ResidentElsewhere(CPU, bases=shared),
}


def _sample(seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 101, (12,), generator=generator).tolist()
    return Sample(prompt_ids=tuple(ids[:5]), completion_ids=tuple(ids[5:]), id=f"{seed}",
                  expert="other" if seed % 3 == 2 else "default")


def _learner(tiny_model: TinyModel, mode: str | None, **changes: Any) -> StreamLearner:
    values: dict[str, Any] = dict(rank=3, lr=0.02, basis_columns=8, learned_below=6.0, learned_share=0.0,
                                  warm_samples=2, warm_tokens=8, rehearsals=1)
    config = LearnerConfig(**{**values, **changes})
    with pytest.MonkeyPatch.context() as patch:
        if mode is not None:
            made = MODES[mode](config.basis_scope == "shared")
            patch.setattr(update, "staging_for", lambda *_, **__: made)
        learner = StreamLearner(tiny_model("llama"), config=config)
    learner.add_expert("other")
    return learner


def _run(learner: StreamLearner) -> StreamLearner:
    learner.learn_batch([_sample(seed) for seed in range(6)])
    learner.rollback(learner.versions()[0])
    learner.add_expert("other") if "other" not in learner.experts else None
    for seed in range(10, 16):
        learner.learn_one(_sample(seed))
    learner.consolidate()
    return learner


@pytest.fixture
def in_threes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor, "in_pieces", lambda rows, device, dtype: rows.to(dtype).split(3))


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resident_has_the_bits_of_the_host(tiny_model: TinyModel, optimizer: str, scope: str) -> None:
    own = dict(optimizer=optimizer, basis_scope=scope, lr=0.02 if optimizer == "adam" else 0.5)
    host, other = (_run(_learner(tiny_model, mode, **own)) for mode in (None, "resident"))
    assert other.state_sha256() == host.state_sha256()
    assert other.state.protection.columns > _learner(tiny_model, None, **own).state.protection.columns


@pytest.mark.parametrize("mode", ["lean", "a host in pieces"])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_piece_by_piece_the_host_s_update_is_made_up_to_rounding(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, in_threes: None, optimizer: str, scope: str, eps: float,
    mode: str,
) -> None:
    """An eps of 0.3 shows whether it is relative to all of an expert, as on the host, or to one piece."""
    own = dict(optimizer=optimizer, basis_scope=scope, eps=eps, lr=0.02 if optimizer == "adam" else 0.5)
    host, other = (_learner(tiny_model, None, **own) for _ in range(2))
    for learner in (host, other):
        learner.learn_batch([_sample(seed) for seed in range(6)])
    assert other.state_sha256() == host.state_sha256()
    before, updater = other.state.store.expert("default").factors, other._updater
    host.learn_batch([_sample(9)])
    if mode == "lean":
        made = MODES["lean"](scope == "shared")
        updater.staging = updater.proposer.staging = other.state.protection.staging = made
    else:
        monkeypatch.setattr(staging, "FACTORS", 1000)
    assert len(updater.staging.pieces(other.state.store.layout(3))) > 2
    other.learn_batch([_sample(9)])
    assert other.state.protection.columns == host.state.protection.columns
    ours, theirs = (learner.state.store.expert("default") for learner in (other, host))
    moved = float((theirs.factors - before).norm())
    assert float((ours.factors - theirs.factors).norm()) <= 1e-5 * moved
    for slab in ("exp_avg", "exp_avg_sq") if optimizer == "adam" else ():
        expected = getattr(theirs, slab)
        assert float((getattr(ours, slab) - expected).norm()) <= 1e-5 * float(expected.norm()), slab
    uses = [[basis.use_counts().tolist() for basis in one.state.protection.bases.values()] for one in (host, other)]
    assert uses[0] == uses[1]


def test_the_norm_of_a_gradient_is_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FACTORS", 1000)
    gradient = torch.randn(2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    work, units = update._norms([gradient, gradient * 2]), 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            norms = end.value
            break
        units += 1
    assert units == 6
    assert norms == pytest.approx([float(gradient.norm()), 2 * float(gradient.norm())], rel=1e-12)


def test_no_unit_has_more_than_a_piece_of_an_expert(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where norms are taken, nor where what a step leaves alone is copied."""
    monkeypatch.setattr(staging, "FACTORS", 1000)
    learner = _learner(tiny_model, None)
    learner.learn_batch([_sample(0)])
    pieces = -(-learner.state.store.expert("default").factors.numel() // 1000)
    assert pieces > 2
    units = list(learner._updater.run("default", [Lesson([*range(20, 32)], 5, again=True)], 1))
    # of masters and both moments
    assert (units.count("norm"), units.count("untouched")) == (pieces, 3 * pieces)


@pytest.mark.parametrize("mode", [None, "a host in pieces", *MODES])
@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_update_of_the_top_layer_leaves_the_others_bit_for_bit(
    tiny_model: TinyModel, in_threes: None, monkeypatch: pytest.MonkeyPatch, optimizer: str, scope: str,
    mode: str | None
) -> None:
    """Also what a resident mode keeps elsewhere: whole updates before and after it have the bits of the host's."""
    own: dict[str, Any] = dict(optimizer=optimizer, basis_scope=scope, lr=0.02 if optimizer == "adam" else 0.5)
    if mode == "a host in pieces":
        # both of them
        mode = None
        monkeypatch.setattr(staging, "FACTORS", 1000)
    learner, host = (_learner(tiny_model, None, **own) for _ in range(2))
    lesson = Lesson([*range(20, 32)], 5, again=True)
    before = []
    for one in (learner, host):
        one.learn_batch([_sample(seed) for seed in range(6)])
        if one is learner and mode is not None:
            made, updater = MODES[mode](scope == "shared"), one._updater
            updater.staging = updater.proposer.staging = one.state.protection.staging = made
        if mode != "lean":
            # a resident mode keeps this one's slabs
            one.learn_batch([_sample(7)])
        expert = one.state.store.expert("default")
        before.append({name: getattr(expert, name) for name in ("factors", "exp_avg", "exp_avg_sq")})
        counts = {key: basis.use_counts().tolist() for key, basis in one.state.protection.bases.items()}
        versions = {key: basis.version for key, basis in one.state.protection.bases.items()}
        top = one._updater.sites_of(1)
        # what is folded in a P that all layers share moves what the others hold, and what they hold alone
        one.state.protection.config = replace(one.config, directions_per_sample=int(scope == "layer"))
        report = exhausted(one._updater.run("default", [lesson], 1))
        assert report.learned == (True,) and (report.admitted > 0) == (scope == "layer")
    sites, layout = learner.attachment.sites, expert.layout
    for name, was in before[0].items():
        now, theirs = (getattr(one.state.store.expert("default"), name) for one in (learner, host))
        assert (was is None) == (now is None) == (optimizer == "sgd" and name != "factors")
        for site in range(len(sites)) if now is not None else ():
            for part in (layout.a, layout.b):
                assert torch.equal(part(was, site), part(now, site)) == (site not in top), (name, sites[site].name)
                # a lean mode differs by rounding
                torch.testing.assert_close(part(now, site), part(theirs, site), rtol=1e-3, atol=1e-5)
    for key, basis in host.state.protection.bases.items():
        below = {sites[site].shape.basis for site in range(len(sites)) if site not in top}
        if key in below and scope == "layer":
            assert (basis.version, basis.use_counts().tolist()) == (versions[key], counts[key])
    if mode != "lean":
        for one in (learner, host):
            one.state.protection.config = one.config
            one.learn_batch([_sample(9)])
        assert learner.state_sha256() == host.state_sha256()


@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_update_leaves_nothing(tiny_model: TinyModel, mode: str) -> None:
    whole, learner = (_learner(tiny_model, mode) for _ in range(2))
    for one in (whole, learner):
        one.learn_one(_sample(0))
    before, units = learner.state_sha256(), list(whole.step(_sample(1)))
    for stop in range(1, len(units)):
        work = learner.queue.drain() if learner.pending else learner.step(_sample(1))
        assert [next(work) for _ in range(stop)] == units[:stop]
        work.close()
        assert learner.state_sha256() == before
    learner.drain()
    assert learner.state_sha256() == whole.state_sha256()


def test_only_active_experts_are_resident(tiny_model: TinyModel) -> None:
    learner = _learner(tiny_model, "resident", routing="named")
    learner.add_expert("third")
    resident = learner._updater.staging
    assert isinstance(resident, Resident)
    for name in ("default", "other", "third"):
        sample = _sample(0)
        learner.learn_one(Sample(prompt_ids=sample.prompt_ids, completion_ids=sample.completion_ids, expert=name))
    assert {name for name, _ in resident._slabs} == {"other", "third"}
    assert len(resident._slabs) == 6


@pytest.mark.parametrize(("made", "factors", "count"), [
    (Lean(CPU, alone=False), 1, 2), (Lean(CPU, alone=True), 1, 3), (Staging(CPU), 1, 3), (Staging(CPU), 21, 2),
    (Staging(CPU), 2**20, 1), (Resident(CPU, bases=False), 1, 1),
])
def test_pieces_cover_a_slab_once(monkeypatch: pytest.MonkeyPatch, made: Staging, factors: int, count: int) -> None:
    monkeypatch.setattr(staging, "FACTORS", factors)
    sites = [SiteShape("q", 6, 4, "in"), SiteShape("o", 4, 6, "mid"), SiteShape("k", 6, 2, "in")]
    layout = Layout(sites, 2)
    pieces = made.pieces(layout)
    assert len(pieces) == count
    assert all((piece.layout is layout) == (count == 1) for piece in pieces)
    top = made.pieces(layout, {1})
    assert len(top) == 1 and top[0].sites == (1,)
    slab = torch.arange(layout.numel, dtype=torch.float32)
    again = torch.full_like(slab, -1.0)
    ends = [piece.span for piece in pieces]
    assert [span.start for span in ends] == [0, *(span.stop for span in ends[:-1])]
    assert ends[-1].stop == layout.numel
    for piece in pieces:
        flat = piece.load(slab, CPU)
        assert flat.shape == (piece.span.stop - piece.span.start,)
        piece.save(flat, again)
        for number, site in enumerate(piece.sites):
            assert torch.equal(piece.layout.a(flat, number), layout.a(slab, site))
            assert torch.equal(piece.layout.b(flat, number), layout.b(slab, site))
    assert torch.equal(again, slab)


@pytest.fixture
def sink() -> Iterator[tuple[PieceSink, Layout, Lean]]:
    store = AdapterStore([SiteShape("q", 6, 4, "in"), SiteShape("k", 6, 2, "in"), SiteShape("e", 3, 2, "e")])
    expert, lean = store.create("default", 2, 1.0), Lean(CPU, alone=False)
    made = lean.sink(expert)
    assert isinstance(made, PieceSink)
    yield made, expert.layout, lean


def test_a_piece_leaves_when_it_is_complete_and_comes_back(sink: tuple[PieceSink, Layout, Lean]) -> None:
    """A layer that is used twice brings each of its sites twice."""
    made, layout, lean = sink
    ones = [(torch.ones(6, 2), torch.ones(2, 4)), (torch.ones(6, 2), torch.ones(2, 2))]
    made.add(0, *ones[0])
    assert len(made._sums) == 1
    made.add(1, *ones[1])
    assert not made._sums and bool((made.slab[:36] == 1).all())
    for index in (1, 0):
        made.add(index, *ones[index])
    # one that never comes, and one that comes a third time for a half of its piece
    made.add(0, *ones[0])
    made.finish()
    slab = lean.gathered(layout, made.slab)
    assert bool((layout.a(slab, 0) == 3).all()) and bool((layout.b(slab, 0) == 3).all())
    assert bool((layout.a(slab, 1) == 2).all()) and bool((layout.b(slab, 1) == 2).all())
    assert not layout.a(slab, 2).any() and not layout.b(slab, 2).any()


def test_rows_of_another_memory_come_in_pieces_of_a_mebibyte() -> None:
    meta = torch.device("meta")
    for width, expected in ((2048, [128, 128]), (100, [256]), (16384, [32] * 8)):
        rows = torch.empty(256, width)
        assert [len(piece) for piece in in_pieces(rows, meta, torch.float32)] == expected
        assert [len(piece) for piece in in_pieces(rows, CPU, torch.float32)] == [256]
    assert next(iter(in_pieces(torch.ones(2, 3), CPU, torch.float64))).dtype == torch.float64


def test_which_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert type(staging.staging_for(CPU, "lean", shared=True)) is Staging
    assert type(staging.staging_for(CPU, "resident", shared=True)) is Staging
    assert type(staging.staging_for(cuda, "lean", shared=False)) is Lean
    assert type(staging.staging_for(cuda, "resident", shared=False)) is Resident
