"""Growth, folds and restarts on copies: a unit is short, dropped at any unit nothing has changed, a commit assigns."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ogpstream.learner import (
    IdleLoop,
    LearnerConfig,
    LoopEngine,
    Sample,
    StreamLearner,
    draft,
    fold,
    protection,
    restart,
)
from ogpstream.learner.draft import Draft, candidates
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.protection import Protection
from ogpstream.memory import adapters
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.basis import ProjectionBasis
from ogpstream.memory.experts import Expert
from ogpstream.memory.layout import SiteShape
from ogpstream.memory.units import exhausted

TinyModel = Callable[..., tf.PreTrainedModel]

# two linears of one input, and two inputs more
SITES = (SiteShape("q", 40, 24, "x"), SiteShape("down", 30, 40, "z"), SiteShape("k", 40, 9, "x"),
         SiteShape("o", 24, 40, "y"))
# reads of views, and of single numbers: no arithmetic, and no tensor is made
VIEWS = {"aten.detach.default", "aten.alias.default", "aten.view.default", "aten.slice.Tensor"}


class Ops(TorchDispatchMode):
    """Notes every operation, or raises at a given one."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.names: list[str] = []
        self.fails_at = fails_at

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        if len(self.names) == self.fails_at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def _sample(seed: int, **fields: Any) -> Sample:
    ids = torch.randint(4, 101, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:5]), completion_ids=tuple(ids[5:]), id=f"{seed}", **fields)


def _learner(tiny_model: TinyModel, state_dir: Path | None = None, samples: int = 3, **changes: Any) -> StreamLearner:
    values: dict[str, Any] = dict(rank=3, lr=0.02, basis_columns=12, learned_below=6.0, learned_share=0.0,
                                  warm_samples=2, warm_tokens=8, restart_after=3, use_window=10)
    learner = StreamLearner(tiny_model("llama", num_hidden_layers=2), config=LearnerConfig(**{**values, **changes}),
                            state_dir=state_dir)
    learner.add_expert("other")
    learner.activate({"default": 1.0, "other": 0.5})
    for seed in range(samples):
        learner.learn_one(_sample(seed))
    return learner


def _everything(learner: StreamLearner) -> str:
    """Digest of the state, and of every tensor that it is of and that is served, by value and by identity."""
    state, served = learner.state, learner.attachment.binding.served
    parts: list[Any] = [learner.state_sha256(), id(served), id(state.store.served), list(state.store.active.items())]
    tensors: list[Tensor] = []
    for basis in state.protection.bases.values():
        tensors += [basis.rows(), basis.live, basis.fixed, basis.generation, basis._uses, basis._replacements]
        parts += [basis.version, basis.updates, basis._admissions]
    for name in state.store.names:
        expert = state.store.expert(name)
        tensors += [slab for slab in (expert.factors, expert.exp_avg, expert.exp_avg_sq, expert.average)
                    if slab is not None]
        tensors += [factor for held in expert.held for factor in (held.U, held.V)]
        parts += [expert.steps, expert.started, sorted(expert.folded.items()), expert.discarded, expert.discarded_sq]
    tensors += [tensor for pack in served.packs for tensor in (pack.A, pack.B, pack.scale)]
    digest = hashlib.sha256(repr(parts).encode())
    for tensor in tensors:
        digest.update(repr((id(tensor), tensor.data_ptr(), tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _grown(learner: StreamLearner) -> Generator[str, None, Any]:
    """An update of a sample that counts as learned."""
    return learner._updater.run("default", [Lesson([*range(20, 32)], 5, again=True)])


def _restarted(learner: StreamLearner) -> Generator[str, None, Any]:
    return learner._updater.restart("default")


WORKS: dict[str, Callable[[StreamLearner], Generator[str, None, Any]]] = {"growth": _grown, "restart": _restarted}


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("kind", WORKS)
def test_dropped_at_any_unit_nothing_has_changed(tiny_model: TinyModel, kind: str, scope: Any) -> None:
    learner, whole = (_learner(tiny_model, basis_scope=scope) for _ in range(2))
    before = _everything(learner)
    units = list(WORKS[kind](whole))
    assert units.count(kind) > 3 and units[-1] == "publish"
    for stop in range(1, len(units) + 1):
        work = WORKS[kind](learner)
        assert [next(work) for _ in range(stop)] == units[:stop]
        assert _everything(learner) == before, f"after {stop} units, before it was dropped"
        work.close()
        assert _everything(learner) == before, f"after {stop} units"
    exhausted(WORKS[kind](learner))
    assert learner.state_sha256() == whole.state_sha256()
    for ours, theirs in zip(learner.state.store.served.packs, whole.state.store.served.packs, strict=True):
        assert all(map(torch.equal, (ours.A, ours.B, ours.scale), (theirs.A, theirs.B, theirs.scale)))


@pytest.mark.parametrize("kind", WORKS)
def test_a_unit_touches_one_input_only(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    learner = _learner(tiny_model)
    touched: list[tuple[str, int]] = []
    cuts: list[int] = []
    admit, cut = ProjectionBasis.admit, fold.cut

    def admitted(self: ProjectionBasis, *arguments: Any, **options: Any) -> Any:
        touched.append(("basis", self.d_in))
        return admit(self, *arguments, **options)

    def counted(U: Tensor, V: Tensor, rank: int) -> Any:
        cuts.append(len(U))
        return cut(U, V, rank)

    monkeypatch.setattr(ProjectionBasis, "admit", admitted)
    monkeypatch.setattr(fold, "cut", counted)
    work, worked = WORKS[kind](learner), 0
    for unit in work:
        if unit == kind:
            # of one basis, by two active experts, in at most CUTS linears at a time
            assert len(touched) <= 1 and len(cuts) <= 2 * draft.CUTS and len(set(cuts)) <= 1
            worked += bool(cuts)
        else:
            assert not touched and not cuts
        touched.clear()
        cuts.clear()
    assert not touched and not cuts and worked > 3


@pytest.mark.parametrize("kind", WORKS)
def test_the_commit_computes_nothing(tiny_model: TinyModel, kind: str) -> None:
    learner, other = (_learner(tiny_model) for _ in range(2))
    units = list(WORKS[kind](other))
    work, ops = WORKS[kind](learner), Ops()
    for _ in units:
        next(work)
    before = learner.state.store.served.version
    with ops, pytest.raises(StopIteration):
        next(work)
    assert learner.state.store.served.version == before + 1
    assert learner.state.store.served is learner.attachment.binding.served
    assert set(ops.names) <= VIEWS


def test_a_request_that_comes_while_p_grows_waits_for_one_unit(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, engine = _learner(tiny_model, samples=0, rehearsals=1), LoopEngine()
    columns, grown, cuts = learner.state.protection.columns, Draft.grow, []

    def watched(self: Draft, *arguments: Any) -> Generator[None, None, None]:
        for _ in grown(self, *arguments):
            cuts.append(1)
            yield

    monkeypatch.setattr(Draft, "grow", watched)
    loop = IdleLoop(learner, engine, update_budget_ms=None, hold=1e9)
    for seed in range(2):
        loop.submit(_sample(seed))
    waited = 0
    while loop.tick():
        if len(cuts) > waited:
            # one unit of growth has run, and the request that came meanwhile sees no other
            assert len(cuts) == waited + 1
            waited += 1
            with engine.request():
                assert not loop.tick() and not loop.tick()
                assert len(cuts) == waited
    assert waited > 3 and loop.status().longest_wait == 1
    loop.close()
    assert learner.state.protection.columns > columns


# the order of the inputs


def _trained(config: LearnerConfig) -> tuple[Protection, list[Expert]]:
    protection, store = Protection(SITES, config), AdapterStore(SITES)
    experts = []
    for number, name in enumerate(("e", "other")):
        expert = store.create(name, 3 + number, 2.0)
        expert.factors = torch.randn(expert.layout.numel, generator=torch.Generator().manual_seed(number))
        expert.average, expert.exp_avg = expert.factors * 0.5, expert.factors + 1
        expert.folded = {key: 0 for key in protection.bases}
        experts.append(expert)
    return protection, experts


def _sample_by_sample(protection: Protection, experts: Sequence[Expert], gradients: Sequence[Tensor],
                      used: Mapping[str, Tensor]) -> int:
    """Growth in the plain order: all bases for one sample, then its folds, then the next one. Returns the pruned."""
    config, layout, pruned = protection.config, experts[0].layout, 0
    for key, mask in used.items():
        protection.bases[key].record_use(mask)
    for gradient in gradients:
        outside, new = gradient.clone(), {}
        exhausted(protection.project_(layout, outside))
        for key, basis in protection.bases.items():
            block, rest = layout.a_block(gradient, key), layout.a_block(outside, key)
            if float(rest.norm()) > config.novelty * float(block.norm()):
                found = candidates(rest, config.directions_per_sample)
                new[key] = basis.admit(found, threshold=config.novelty).directions
                pruned += len(basis.prune()) if basis.saturated else 0
        for expert in experts:
            slabs = {name: getattr(expert, name).clone() for name in ("factors", "exp_avg", "average")}
            for key, N in new.items():
                coefficients = fold.remove(expert.layout.a_block(slabs["factors"], key), N)[1]
                for slab in slabs.values():
                    block = expert.layout.a_block(slab, key)
                    block.copy_(fold.remove(block, N)[0])
                for place, site in enumerate(expert.layout.members(key)):
                    own = coefficients[:, place * expert.rank : (place + 1) * expert.rank]
                    expert.held[site], cut = fold.add_to_held(
                        expert.held[site], N, own, expert.layout.b(slabs["factors"], site), expert.scaling,
                        config.held_rank)
                    expert.discarded[site] += cut.first
                    expert.discarded_sq[site] += cut.energy
                expert.folded[key] = protection.bases[key].version
            for name, slab in slabs.items():
                setattr(expert, name, slab)
    return pruned


@pytest.mark.parametrize("held_rank", [None, 5])
def test_input_by_input_has_the_bits_of_sample_by_sample(held_rank: int | None) -> None:
    """Over replacements, for which the counts of use decide, and prunings."""
    config = LearnerConfig(basis_columns=5, held_rank=held_rank, directions_per_sample=2, novelty=0.2, use_window=50)
    (plain, theirs), (protection, experts) = _trained(config), _trained(config)
    layout, generator = experts[0].layout, torch.Generator().manual_seed(9)
    growth, pruned = draft.Growth(), 0
    for turn in range(12):
        gradients = [torch.randn(layout.numel, generator=generator) for _ in range(1 + turn % 3)]
        used = {key: torch.rand(32, generator=generator) < 0.4 for key in plain.bases}
        pruned += _sample_by_sample(plain, theirs, gradients, used)
        made = Draft(protection, experts)
        exhausted(made.grow(layout, gradients, used))
        made.commit()
        growth += made.growth
        for key, basis in plain.bases.items():
            for one, other in zip(basis.state_dict()[0].values(), protection.bases[key].state_dict()[0].values(),
                                  strict=True):
                assert torch.equal(one, other)
            assert basis.state_dict()[1] == protection.bases[key].state_dict()[1]
        for ours, their in zip(experts, theirs, strict=True):
            assert all(torch.equal(getattr(ours, name), getattr(their, name))
                       for name in ("factors", "exp_avg", "average"))
            assert all(torch.equal(one.U, other.U) and torch.equal(one.V, other.V)
                       for one, other in zip(ours.held, their.held, strict=True))
            assert (ours.discarded, ours.discarded_sq, ours.folded) == (
                their.discarded, their.discarded_sq, their.folded)
    assert growth.pruned == pruned > 0 and growth.replaced > 20


@pytest.mark.parametrize("kind", WORKS)
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_larger_model_has_more_units_and_no_other_bits(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str, scope: Any
) -> None:
    learner, whole = (_learner(tiny_model, basis_scope=scope) for _ in range(2))
    few = Counter(WORKS[kind](whole))
    for module, name, size in ((draft, "PART", 100), (draft, "CUTS", 1), (draft, "READS", 1), (restart, "DRAWS", 1),
                               (protection, "READS", 1), (adapters, "_SITES", 1)):
        monkeypatch.setattr(module, name, size)
    many = Counter(WORKS[kind](learner))
    assert learner.state_sha256() == whole.state_sha256()
    names = {"restart", "publish"} if kind == "restart" else {
        "average", "growth", "publish", *(("gradient", "anchor", "projection") if scope == "layer" else ())}
    assert all(many[name] > few[name] > 0 for name in names)


def test_slabs_of_others_are_not_written_into() -> None:
    protection, experts = _trained(LearnerConfig(basis_columns=5))
    slabs = [getattr(one, name) for one in experts for name in ("factors", "exp_avg", "average")]
    before, rows = [slab.clone() for slab in slabs], {key: basis.rows() for key, basis in protection.bases.items()}
    made = Draft(protection, experts)
    exhausted(made.grow(experts[0].layout, [torch.ones(experts[0].layout.numel)], {}))
    assert made.growth.admitted == 3
    assert all(map(torch.equal, slabs, before)) and not any(one.any() for one in rows.values())
    made.commit()
    assert all(map(torch.equal, slabs, before)) and not any(one.any() for one in rows.values())
    assert all(basis.columns == 1 for basis in protection.bases.values())


# an expert that is not served


def test_its_late_fold_is_told_of_with_the_commit_only(tiny_model: TinyModel) -> None:
    learner = _learner(tiny_model, held_rank=2, samples=6, rehearsals=1)
    learner.learn_one(_sample(40, expert="other"))
    learner.activate({"default": 1.0})
    for seed in range(50, 54):
        learner.learn_batch([_sample(seed)])
    cuts: list[str] = []
    learner.state.protection.on_cut = lambda name, site, dropped: cuts.append(name)
    before, units = _everything(learner), 0
    work = learner.step(_sample(41, expert="other"))
    while next(work) != "forward":
        units += 1
        assert _everything(learner) == before
    assert units > 3 and not cuts
    work.close()
    assert not cuts
    learner.drain()
    assert "other" in cuts and "other" in learner.state.store.active


# restarts that are put off


def _puts_off(tiny_model: TinyModel, state_dir: Path | None = None) -> StreamLearner:
    return _learner(tiny_model, state_dir, samples=3, held_rank=3, restart_loss=1e-6, rehearsals=0, replay_every=0)


def test_a_restart_that_was_put_off_is_looked_at_again_after_as_many_updates(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, looks = _puts_off(tiny_model, tmp_path / "state"), []
    restart = Draft.restart

    def counted(self: Draft, name: str) -> Generator[None, None, bool]:
        made = yield from restart(self, name)
        looks.append((self.experts[name].steps, made))
        return made

    monkeypatch.setattr(Draft, "restart", counted)
    columns = learner.state.protection.columns
    learner.consolidate(1)
    assert looks == [(4, False)]
    learner.save_state()
    learner.close()
    learner = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=2))
    expert = learner.state.store.expert("default")
    assert expert.started == 4 and expert.average is not None
    for steps in range(5, 11):
        learner.consolidate(1)
        assert expert.steps == steps
    assert looks == [(4, False), (7, False), (10, False)]
    assert learner.state.protection.columns >= columns
    learner.close()


def test_without_memory_a_restart_is_put_off_and_recovery_repeats_it(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner = _learner(tiny_model, tmp_path / "state", samples=4, rehearsals=0)
    expert, reserve = learner.state.store.expert("default"), AdapterStore.reserve
    states: list[str] = []

    def full(self: AdapterStore, experts: Sequence[Expert]) -> Any:
        if not any(one.exp_avg is not None and one.exp_avg.any() for one in experts):
            # only a restart leaves no moment
            states.append(_everything(learner))
            raise torch.OutOfMemoryError("injected")
        return reserve(self, experts)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(AdapterStore, "reserve", full)
        learner.accept_rehearsal(1)
        for unit in learner.queue.drain():
            if unit == "restart" and not states:
                before = _everything(learner)
        assert states == [before]
    assert expert.started == expert.steps == 5 and expert.average is not None
    (line,) = [record.getMessage() for record in caplog.records if "restart" in record.getMessage()]
    assert "'default'" in line and "3 updates" in line
    assert learner.learn_one(_sample(30)).status == "learned"
    assert learner.queue.applier.updater.out_of_memory == 1
    state = learner.state_sha256()
    learner.close()
    # where there is memory now
    again = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=2))
    assert again.state_sha256() == state
    again.consolidate(3)
    assert again.state.store.expert("default").started == 9
    again.close()


@pytest.mark.parametrize("operation", [1, 7])
def test_memory_that_runs_out_in_any_unit_of_a_restart(tiny_model: TinyModel, operation: int) -> None:
    learner, whole = (_learner(tiny_model, samples=4) for _ in range(2))
    before = _everything(learner)
    units = list(_restarted(whole))
    for at in range(len(units)):
        work, failing = _restarted(learner), Ops(fails_at=operation)
        for _ in range(at):
            next(work)
        with failing:
            try:
                next(work)
            except torch.OutOfMemoryError:
                pass
            else:
                assert len(failing.names) < operation
        work.close()
        assert _everything(learner) == before
    exhausted(_restarted(learner))
    assert learner.state_sha256() == whole.state_sha256()
