"""The guarantee: no update moves x W for x in span(P), whatever the optimizer, the order of events and the experts."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogpstream.learner import LearnerConfig, Sample, StreamLearner, update
from ogpstream.learner.apply import Applier
from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.certificate import DriftMeter, spectral_norm
from ogpstream.learner.draft import Draft
from ogpstream.learner.folder import MemoryFolder
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.proposal import Proposer
from ogpstream.learner.protection import Protection, Use
from ogpstream.learner.state import Counters, LearnerState, Position
from ogpstream.learner.step import Reading
from ogpstream.learner.trial import activating
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.experts import Held
from ogpstream.memory.layout import SiteShape
from ogpstream.memory.replay import ReplayRing
from ogpstream.memory.seen import SeenIds
from ogpstream.memory.snapshot import SnapshotStore
from ogpstream.memory.units import exhausted

TinyModel = Callable[..., tf.PreTrainedModel]

LIMIT = 1e-6  # of |x| max_t |W_t|_2
FAULTY = 1e-3  # what each fault below must exceed
WIDTHS = {"q": (24, 17), "k": (24, 5), "o": (24, 11), "down": (37, 24)}
LAYER = {"q": "q", "k": "q", "o": "o", "down": "down"}
SHARED = {"q": "d24", "k": "d24", "o": "d24", "down": "d37"}
EXPERTS = {"default": 3, "narrow": 1, "other": 4}
# the linears of the top layers, by the number of these
TOP = {1: {"down"}, 2: {"o", "down"}}
# what a gradient stands for: its seed chooses the input directions, so that a seed that comes back brings them back
LOSSES = {"new": 1.5, "learned": 0.3, "settled": 0.01}


@pytest.fixture(scope="module")
def bare(tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model("llama")


def _random_gradients(
    walk: object, binding: Binding, sinks: Sequence[GradientSink], samples: Sequence[tuple[Sequence[int], int]],
    layers: int | None = None, **_: object,
) -> Generator[str, None, list[Reading]]:
    """Stands for `sample_gradients`: dA and dB of a made-up sample `ids` = (seed, index of its loss)."""
    (sink,), (((seed, loss), _),) = sinks, samples
    inputs = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(1000 + 7 * seed + loss)
    for key in sink.layout.bases:
        block = sink.layout.a_block(sink.slab, key)
        x = torch.randn(block.shape[0], 2, generator=inputs)
        block.copy_(x @ torch.randn(2, block.shape[1], generator=noise))
    a = sink.layout.a_numel
    sink.slab[a:] = torch.randn(len(sink.slab) - a, generator=noise)
    sink.slab *= 0.1
    for index, site in enumerate(sink.layout.sites if layers else ()):
        if site.name not in TOP[layers or 0]:
            sink.layout.a(sink.slab, index).zero_()
            sink.layout.b(sink.slab, index).zero_()
    yield "gradient"
    return [Reading(list(LOSSES.values())[loss], certain=1.0)]


@pytest.fixture(autouse=True)
def made_up_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything after the gradient is the learner's own code."""
    if "real_gradients" in request.fixturenames:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "sample_gradients", _random_gradients)
        yield


@pytest.fixture
def real_gradients() -> None:
    """Asked for by tests that run a model."""


class Bench:
    """Store, protection and updater on four linears without a model, and an own record of what must not move."""

    def __init__(self, model: tf.PreTrainedModel, config: LearnerConfig, bases: dict[str, str]) -> None:
        self.model, self.config = model, config
        self.sites = [SiteShape(name, *WIDTHS[name], basis) for name, basis in bases.items()]
        # by expert and linear: generation, p.T W and the sum of the cuts when each direction joined, by slot
        self.promised: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.largest: dict[tuple[str, int], float] = {}
        self.worst = 0.0
        self._build()
        if config.warm_start:
            generator = torch.Generator().manual_seed(5)
            spread = {site.basis: torch.randn(site.d_in, site.d_in, generator=generator) for site in self.sites}
            # energies that fall off, as those of a model's inputs do
            self.protection.warm_start({key: (a := x * 0.8 ** torch.arange(len(x))) @ a.T for key, x in spread.items()})
        for name, rank in EXPERTS.items():
            self.applier.operations.adopt(name, rank, 2.0 / rank)
        self.applier.operations.serve({"default": 1.0, "narrow": 0.5})

    def _build(self) -> None:
        self.store = AdapterStore(self.sites, max_active=2)
        self.protection = Protection(self.sites, self.config)
        self.state = LearnerState(self.store, self.protection, ReplayRing(4, 8, vocab_size=101),
                                  ReplayRing(4, 8, vocab_size=101), SeenIds(), SeenIds(), Counters(), Position())
        attachment: Any = SimpleNamespace(model=self.model, binding=Binding())
        self.updater = Updater(attachment, self.store, self.protection, self.config)
        self.updater._layers = [torch.nn.Identity()] * 3
        self.updater.sites_of = lambda layers: frozenset(  # type: ignore[method-assign]
            index for index, site in enumerate(self.sites) if site.name in TOP[layers])
        self.applier = Applier(self.state, self.updater, self.config, MemoryFolder(), {}, lambda records: None)

    def learn(self, name: str, seed: int, kind: str = "learned", layers: int | None = None) -> update.Update:
        lesson = Lesson((seed, list(LOSSES).index(kind)), 1, again=True)
        work = activating(self.updater, name, self.updater.run(name, [lesson], layers))
        while True:
            try:
                next(work)
            except StopIteration as end:
                self.look()
                report: update.Update = end.value
                exhausted(self.updater.restart(name))
                self.look()
                assert report.refusal is None
                return report

    def serve(self, *names: str) -> None:
        self.applier.operations.serve(dict.fromkeys(names, 0.5))
        self.look()

    def prune(self, keep: int) -> None:
        for basis in self.protection.bases.values():
            basis.prune(keep)
        self.look()

    def reload(self) -> None:
        """Through a snapshot on disk into new objects, as a restart does."""
        with TemporaryDirectory() as folder:
            SnapshotStore(folder).save(1, *self.state.capture())
            saved = SnapshotStore(folder).load()
        assert saved is not None
        self._build()
        self.state.restore(saved.tensors, saved.meta)
        self.look()

    def look(self) -> None:
        """Compare x W with what it was when each direction joined P; beyond what cuts are accountable for."""
        for name in self.store.names:
            expert = self.store.expert(name)
            for index, site in enumerate(self.sites):
                here, basis, held = (name, index), self.protection.bases[site.basis], expert.held[index]
                W = expert.scaling * (expert.a(index).double() @ expert.b(index).double())
                W += held.U.double() @ held.V.double()
                self.largest[here] = max(self.largest.get(here, 0.0), float(torch.linalg.matrix_norm(W, 2)))
                along, generation = basis.rows().double() @ W, basis.generation.clone()
                cuts = torch.full((len(along),), expert.discarded[index], dtype=torch.float64)
                if here in self.promised:
                    then, was, before = self.promised[here]
                    same = basis.live & (generation == then)
                    moved = (along - was)[same]
                    size = moved.norm(dim=1).clamp_min(1e-300)
                    excess = (size - (cuts - before)[same]).clamp_min(0) / size
                    if len(moved) and self.largest[here] > 0:
                        norm = float(torch.linalg.matrix_norm(excess[:, None] * moved, 2))
                        self.worst = max(self.worst, norm / self.largest[here])
                    along, cuts = torch.where(same[:, None], was, along), torch.where(same, before, cuts)
                self.promised[here] = generation, along, cuts


@dataclass(frozen=True)
class Setting:
    optimizer: str = "adam"
    lr: float = 0.05
    weight_decay: float = 0.0
    held_rank: int | None = None
    guard: str = "fold"
    columns: int = 6
    restart_after: int = 0
    warm_start: bool = False

    def config(self) -> LearnerConfig:
        return LearnerConfig(
            optimizer=self.optimizer, lr=self.lr, weight_decay=self.weight_decay,  # type: ignore[arg-type]
            held_rank=self.held_rank, guard=self.guard, basis_columns=self.columns,  # type: ignore[arg-type]
            directions_per_sample=2, use_window=10, warm_start=self.warm_start, restart_after=self.restart_after,
        )


OPTIMIZERS = [Setting("sgd", 0.5), Setting("adam"), Setting("adam", weight_decay=0.5)]
names = st.sampled_from(list(EXPERTS))
events = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), names, st.integers(0, 7), st.sampled_from(list(LOSSES))),
        st.tuples(st.just("learn"), names, st.integers(0, 7), st.just("learned"), st.sampled_from([None, *TOP])),
        st.tuples(st.just("serve"), names, names),
        st.tuples(st.just("prune"), st.integers(0, 4)),
        st.tuples(st.just("reload")),
    ),
    min_size=8,
    max_size=30,
)


def _run(bench: Bench, story: Sequence[tuple[Any, ...]]) -> None:
    for event, *arguments in story:
        getattr(bench, event)(*arguments)


@settings(max_examples=12)
@given(
    story=events, bases=st.sampled_from([LAYER, SHARED]), held_rank=st.sampled_from([None, 2, 4]),
    restart_after=st.sampled_from([0, 3]), warm_start=st.booleans(),
)
@pytest.mark.parametrize("setting", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
def test_protected_outputs_do_not_move(
    bare: tf.PreTrainedModel, setting: Setting, story: list[Any], bases: dict[str, str], held_rank: int | None,
    restart_after: int, warm_start: bool,
) -> None:
    own = replace(setting, held_rank=held_rank, restart_after=restart_after, warm_start=warm_start)
    bench = Bench(bare, own.config(), bases)
    _run(bench, story)
    assert bench.worst <= LIMIT


def _long_story() -> list[tuple[Any, ...]]:
    """Three rounds in which directions join, are replaced and pruned, and come back while an expert is away."""
    story: list[tuple[Any, ...]] = []
    for turn in range(3):
        for seed in range(8):
            story += [("learn", "default", seed, "new"), ("learn", "default", seed)]
            story += [("learn", "narrow", seed + 1, "new")]
        story += [("serve", "default", "other"), ("prune", 3), ("learn", "other", 2, "new")]
        # "narrow" is away while these come back
        story += [("learn", "default", seed) for seed in (5, 6, 7)]
        story += [("reload",), ("learn", "narrow", 3, "new"), ("learn", "default", turn, "settled")]
        story += [("learn", "default", seed, "learned", layers) for seed in (2, 6) for layers in TOP]
        story += [("learn", "narrow", seed, kind) for seed in (0, 4) for kind in ("new", "learned")]
    return story


@pytest.mark.parametrize(
    ("held_rank", "bases", "restart_after", "warm_start"),
    [(None, LAYER, 0, False), (None, SHARED, 0, True), (2, LAYER, 0, False), (None, LAYER, 7, True),
     (4, SHARED, 7, False)],
    ids=["layer", "shared, anchor", "layer, cut", "layer, restarts, anchor", "shared, restarts, cut"],
)
@pytest.mark.parametrize("setting", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
def test_a_long_story_with_everything_in_it(
    bare: tf.PreTrainedModel, setting: Setting, held_rank: int | None, bases: dict[str, str], restart_after: int,
    warm_start: bool,
) -> None:
    own = replace(setting, held_rank=held_rank, restart_after=restart_after, warm_start=warm_start)
    bench = Bench(bare, own.config(), bases)
    assert bool(bench.protection.anchors) == warm_start
    seen: dict[str, int] = {"admitted": 0, "replaced": 0, "late": 0}
    for event, *arguments in _long_story():
        versions = {key: basis.version for key, basis in bench.protection.bases.items()}
        behind = {n for n in bench.store.names if bench.store.expert(n).folded != versions}
        result = getattr(bench, event)(*arguments)
        if event == "learn":
            seen["admitted"] += result.admitted
            seen["replaced"] += result.replaced
            seen["late"] += arguments[0] in behind
    assert min(seen.values()) >= 5
    assert bench.worst <= LIMIT
    # it was no small matter: every expert computes something, and something was folded
    for index in range(len(bench.sites)):
        assert spectral_norm(bench.store.expert("default"), index) > 0.1
        assert bench.store.expert("narrow").held[index].rank > 0
    lost = sum(sum(bench.store.expert(name).discarded) for name in EXPERTS)
    assert (lost > 0) == (held_rank is not None)


def _take_out_the_fold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Draft, "_fold", lambda self, expert, key, directions: iter(()))


def _take_out_the_late_fold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Draft, "fold", lambda self, name: iter(()))
    real = Draft._fold

    def only_of_this_moment(self: Draft, expert: Any, key: str, directions: Tensor) -> Generator[None, None, None]:
        return real(self, expert, key, directions[:, -2:])

    patch.setattr(Draft, "_fold", only_of_this_moment)


def _project_before_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    project, step = Protection.project_, Proposer._step

    def early(self: Proposer, expert: Any, piece: Any, flats: Any, gradient: Tensor, eps: Any) -> None:
        exhausted(project(self.protection, piece.layout, gradient))
        step(self, expert, piece, flats, gradient, eps)

    def nothing(self: Protection, layout: Any, slab: Tensor) -> Generator[None, None, Use]:
        yield
        return Use()

    patch.setattr(Protection, "project_", nothing)
    patch.setattr(Proposer, "_step", early)


def _restart_anywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ProjectionBasis, "directions", lambda self, real=ProjectionBasis.directions: 0.0 * real(self))


@pytest.mark.parametrize(
    "fault",
    [_take_out_the_fold, _take_out_the_late_fold, _project_before_the_optimizer, _restart_anywhere, None],
    ids=["no fold", "no late fold", "projection before Adam", "restart inside P", "only dA is projected"],
)
def test_a_planted_fault_is_seen(
    bare: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None] | None
) -> None:
    """This file's own checker and the published meter both see it."""
    if fault is not None:
        fault(monkeypatch)
    setting = Setting(guard="gradient" if fault is None else "fold", columns=16,
                      restart_after=5 if fault is _restart_anywhere else 0)
    bench = Bench(bare, setting.config(), LAYER)
    meter = DriftMeter(bench.protection, bench.store)
    for event in _long_story():
        if event[0] != "reload":
            _run(bench, [event])
            meter.mark()
    assert bench.worst > FAULTY
    assert meter.drift().guarantee > FAULTY


@pytest.mark.parametrize(("held_rank", "every"), [(None, 1), (3, 1), (3, 7)])
def test_the_meter_measures_what_was_promised(bare: tf.PreTrainedModel, held_rank: int | None, every: int) -> None:
    bench = Bench(bare, Setting(held_rank=held_rank).config(), LAYER)
    meter = DriftMeter(bench.protection, bench.store)
    for number, event in enumerate(event for event in _long_story() if event[0] != "reload"):
        _run(bench, [event])
        if number % every == 0:
            meter.mark()
    drift = meter.drift()
    assert 0 < drift.guarantee <= LIMIT
    bound = max(
        bench.store.expert(name).discarded[index] / spectral_norm(bench.store.expert(name), index)
        for name in EXPERTS for index in range(len(bench.sites))
    )
    assert drift.held == pytest.approx(bound)
    assert (drift.held > 0.01) == (held_rank is not None)
    meter.close()
    assert bench.protection.on_cut is None


def test_the_meter_tells_a_cut_from_a_leak(bare: tf.PreTrainedModel) -> None:
    """A change of x W of known size at a protected x is reported as it is, beside cuts 10,000 times its size."""
    bench = Bench(bare, Setting(held_rank=2).config(), LAYER)
    for seed in range(6):
        bench.learn("default", seed)
    meter = DriftMeter(bench.protection, bench.store)
    expert, basis = bench.store.expert("default"), bench.protection.bases["down"]
    before = expert.discarded[3]
    for seed in range(6, 10):
        bench.learn("default", seed)
    assert expert.discarded[3] > before
    assert meter.drift().guarantee <= LIMIT
    p = basis.rows()[meter._noted["default", 3].generation.nonzero()[0, 0]]
    leak = 1e-5 * spectral_norm(expert, 3)
    for _ in range(10):
        # a little at a time, and looked at each time
        U, V = expert.held[3].U, expert.held[3].V
        leaking = Held(torch.cat([U, leak / 10 * p[:, None]], 1), torch.cat([V, torch.eye(1, 24)], 0))
        expert.held = [*expert.held[:3], leaking]
        meter.mark()
    assert meter.drift().guarantee == pytest.approx(1e-5, rel=0.1)


def test_without_a_basis_there_is_nothing_to_measure(bare: tf.PreTrainedModel) -> None:
    bench = Bench.__new__(Bench)
    bench.model, bench.config = bare, Setting(guard="none").config()
    bench.sites = [SiteShape(name, *WIDTHS[name], basis) for name, basis in LAYER.items()]
    bench._build()
    drift = DriftMeter(bench.protection, bench.store).drift()
    assert (drift.guarantee, drift.held) == (0.0, 0.0)


@pytest.mark.parametrize(("scope", "held_rank"), [("layer", None), ("shared", 2)])
def test_a_learner_keeps_its_promise(
    tiny_model: TinyModel, real_gradients: None, scope: Any, held_rank: int | None
) -> None:
    config = LearnerConfig(
        rank=3, lr=0.02, basis_scope=scope, held_rank=held_rank, basis_columns=12, learned_below=4.0,
        learned_share=0.0, rehearsals=1,
        warm_samples=4, warm_tokens=16, warm_energy=0.5, warm_share=0.3,
    )
    learner = StreamLearner(tiny_model("llama"), config=config)
    learner.add_expert("other")
    meter = DriftMeter(learner.state.protection, learner.state.store)
    for number in range(8):
        ids = torch.randint(4, 101, (9,), generator=torch.Generator().manual_seed(number)).tolist()
        expert = "other" if number % 3 == 2 else "default"
        learner.learn_batch([Sample(prompt_ids=tuple(ids[:5]), completion_ids=tuple(ids[5:]), expert=expert)])
        learner.consolidate(1)
        meter.mark()
    assert learner.state.protection.columns > 8
    drift = meter.drift()
    assert 0 < drift.guarantee <= LIMIT
    assert (drift.held > 0) == (held_rank is not None)
    learner.close()
