"""The restart of an expert: the function stays, what was read most is protected, the new factors start outside P."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.learner.draft import Draft, Growth, fold_now
from ogpstream.learner.protection import Protection
from ogpstream.learner.restart import fresh_factors, read_directions
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert
from ogpstream.memory.layout import Layout, SiteShape
from ogpstream.memory.units import exhausted

# two linears of one input and one of another
SITES = (SiteShape("q", 40, 24, "x"), SiteShape("k", 40, 9, "x"), SiteShape("down", 30, 40, "z"))


def trained(config: LearnerConfig, *names: str, rank: int = 4) -> tuple[Protection, list[Expert]]:
    """Experts with random factors outside the few directions that are protected."""
    protection, store = Protection(SITES, config), AdapterStore(SITES)
    generator = torch.Generator().manual_seed(0)
    widths = {"x": 40, "z": 30}
    first = {key: torch.linalg.qr(torch.randn(d, 5, generator=generator))[0] for key, d in widths.items()}
    admit(protection, first)
    experts = []
    for number, name in enumerate(names):
        slab = torch.randn(store.layout(rank).numel, generator=torch.Generator().manual_seed(number))
        expert = store.create(name, rank, 2.0, slab)
        expert.exp_avg, expert.exp_avg_sq, expert.steps = slab.clone(), slab.square(), 7
        fold_now(protection, expert)
        experts.append(expert)
    return protection, experts


def admit(protection: Protection, found: dict[str, Tensor], *experts: Expert) -> None:
    draft = Draft(protection, experts)
    for key, directions in found.items():
        exhausted(draft.admit(key, directions))
    draft.commit()


def restart(protection: Protection, expert: Expert, *others: Expert) -> Growth | None:
    draft = Draft(protection, [expert, *others])
    made = exhausted(draft.restart(expert.name))
    draft.commit()
    return draft.growth if made else None


def read(expert: Expert, at_most: int) -> dict[str, Tensor]:
    return {key: read_directions(expert, key, at_most) for key in ("x", "z")}


def functions(expert: Expert) -> list[Tensor]:
    return [expert.delta(index).double() for index in range(len(SITES))]


def span(protection: Protection, key: str) -> Tensor:
    basis = protection.bases[key]
    rows: Tensor = basis.rows()[basis.live]
    return rows.T


def test_fresh_factors_follow_from_the_keys_alone() -> None:
    layout = Layout((SiteShape("w", 400, 50, "w"),), 8)
    slab = fresh_factors(layout, 0, "a", 3, dtype=torch.float32)
    assert torch.equal(slab, fresh_factors(layout, 0, "a", 3, dtype=torch.float32))
    assert not torch.equal(slab, fresh_factors(layout, 0, "a", 4, dtype=torch.float32))
    assert not layout.b(slab, 0).any()
    # N(0, 1/400): the standard deviation of 3200 draws is known to 2 %
    assert float(layout.a(slab, 0).std()) == pytest.approx(1 / 20, rel=0.06)


@pytest.mark.parametrize("at_most", [1, 3, 30])
def test_read_directions_are_the_singular_vectors_of_the_whole_product(at_most: int) -> None:
    _, (expert,) = trained(LearnerConfig(), "e")
    found = read(expert, at_most)
    for key, members in (("x", (0, 1)), ("z", (2,))):
        product = torch.cat([expert.a(i).double() @ expert.b(i).double() for i in members], 1)
        u, s, _ = torch.linalg.svd(product)
        count = min(at_most, int((s > 1e-3 * s[0]).sum()))
        assert found[key].shape[1] == count
        assert (found[key] @ found[key].T - u[:, :count] @ u[:, :count].T).norm() < 1e-10


def test_an_expert_that_computes_nothing_reads_nothing() -> None:
    _, (expert,) = trained(LearnerConfig(), "e")
    expert.factors = fresh_factors(expert.layout, 0, dtype=torch.float32)
    assert {key: tuple(u.shape) for key, u in read(expert, 2).items()} == {"x": (40, 0), "z": (30, 0)}


@pytest.mark.parametrize("directions", [0, 2])
def test_a_restart_keeps_the_function_and_frees_the_factors(directions: int) -> None:
    config = LearnerConfig(held_rank=None, restart_directions=directions, basis_columns=16)
    protection, (expert, other) = trained(config, "e", "other")
    before, beside = functions(expert), functions(other)
    directions_read = read(expert, 2)
    growth = restart(protection, expert, other)
    assert growth is not None and growth.admitted == 2 * directions
    for was, now in zip([*before, *beside], [*functions(expert), *functions(other)], strict=True):
        assert (now - was).norm() < 1e-6 * was.norm()
    for key in ("x", "z"):
        P = span(protection, key)
        outside = directions_read[key].float() - P @ (P.T @ directions_read[key].float())
        assert bool(outside.norm() < 1e-5) == bool(directions)
        for one in (expert, other):
            block = one.layout.a_block(one.factors, key)
            assert (P.T @ block).norm() < 1e-6 * block.norm()
        # the new columns are as long as those of a new expert, less what lies in P
        assert 0.5 < float(expert.layout.a_block(expert.factors, key).norm(dim=0).mean()) < 1.2
    assert not any(expert.b(index).any() for index in range(len(SITES)))
    assert expert.exp_avg is not None and not expert.exp_avg.any()
    assert expert.exp_avg_sq is not None and expert.exp_avg_sq.any() and expert.steps == expert.started == 7
    assert other.exp_avg is not None and other.exp_avg.any()


def test_a_restart_folds_the_average_of_the_factors() -> None:
    config = LearnerConfig(held_rank=None, restart_directions=2, basis_columns=16)
    protection, (expert, other) = trained(config, "e", "other")
    expert.average = expert.factors + 0.3 * other.factors
    mean = [2.0 * expert.layout.a(expert.average, i) @ expert.layout.b(expert.average, i)
            + expert.held[i].U @ expert.held[i].V for i in range(len(SITES))]
    # what joins P before is taken out of the average too, and along it what the last factors computed is held
    new = {"x": torch.linalg.qr(torch.randn(40, 1, generator=torch.Generator().manual_seed(5)))[0]}
    last = functions(expert)
    admit(protection, new, expert)
    P = span(protection, "x")[:, -1:].double()
    assert float((P.T @ expert.layout.a_block(expert.average, "x").double()).norm()) < 1e-6
    restart(protection, expert, other)
    for index, (was, ended) in enumerate(zip(mean, last, strict=True)):
        wanted = was.double()
        if SITES[index].basis == "x":
            wanted = wanted - P @ (P.T @ wanted) + P @ (P.T @ ended)
        assert (expert.delta(index) - wanted).norm() < 1e-6 * wanted.norm()
    assert expert.average is None


def test_what_the_cut_drops_at_a_restart_is_reported() -> None:
    config = LearnerConfig(held_rank=5, basis_columns=16, restart_loss=1.0)
    protection, (expert,) = trained(config, "e")
    for index in range(len(SITES)):
        # other rows than those that the first fold held, so that both together have rank 8
        expert.b(index).copy_(torch.randn(expert.b(index).shape, generator=torch.Generator().manual_seed(index)))
    cuts: list[int] = []
    protection.on_cut = lambda name, site, dropped: cuts.append(site)
    before, booked = functions(expert), list(expert.discarded)
    restart(protection, expert)
    for index, (was, now) in enumerate(zip(before, functions(expert), strict=True)):
        lost = expert.discarded[index] - booked[index]
        assert expert.held[index].rank == 5
        assert 0 < float(torch.linalg.matrix_norm(now - was, 2)) <= lost * (1 + 1e-5)
    assert set(cuts) == {0, 1, 2}


def test_a_restart_that_would_cost_too_much_waits() -> None:
    protection, (expert,) = trained(LearnerConfig(held_rank=5, basis_columns=16, restart_loss=0.05), "e")
    for index in range(len(SITES)):
        expert.b(index).copy_(torch.randn(expert.b(index).shape, generator=torch.Generator().manual_seed(index)))
    before, masters, columns = functions(expert), expert.factors.clone(), protection.columns
    assert restart(protection, expert) is None
    assert torch.equal(expert.factors, masters) and protection.columns == columns
    assert all(map(torch.equal, functions(expert), before))


def _sample(seed: int) -> Sample:
    ids = torch.randint(4, 101, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:5]), completion_ids=tuple(ids[5:]))


def test_a_consolidation_ends_with_a_restart_of_what_was_trained(tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = LearnerConfig(rank=3, held_rank=None, warm_start=False, restart_after=5, rehearsals=0)
    learner = StreamLearner(tiny_model("llama"), config=config)
    expert = learner.state.store.expert("default")
    for seed in range(4):
        learner.learn_one(_sample(seed))
    version, columns = learner.version, learner.state.protection.columns
    report = learner.consolidate(1)
    assert (expert.steps, expert.started) == (5, 5) and not any(expert.b(i).any() for i in range(len(expert.held)))
    assert report.admitted >= learner.state.protection.columns - columns > 0
    # the update and the restart are versions of their own, and what is served is what the masters say
    assert learner.version == report.version == version + 2
    served = learner.state.store.served.packs[0]
    assert served is not None and torch.equal(served.A[:, :3], expert.a(0))
    learner.consolidate(1)
    assert (expert.steps, expert.started) == (6, 5) and expert.b(0).any()
    learner.close()


def test_the_average_follows_the_updates(tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = LearnerConfig(rank=3, average=0.75, warm_start=False, rehearsals=0, learned_below=1e-9)
    learner = StreamLearner(tiny_model("llama"), config=config)
    expert = learner.state.store.expert("default")
    learner.learn_one(_sample(0))
    wanted = expert.factors.clone()
    for seed in range(1, 4):
        learner.learn_one(_sample(seed))
        wanted = 0.75 * wanted + 0.25 * expert.factors
    assert expert.average is not None and (expert.average - wanted).norm() < 1e-6 * wanted.norm()
    learner.close()


@pytest.mark.parametrize("changes", [{"restart_after": 0}, {"guard": "none"}, {"held_rank": 2}])
def test_some_experts_never_restart(tiny_model: Callable[..., PreTrainedModel], changes: dict[str, Any]) -> None:
    config = LearnerConfig(**{"rank": 3, "warm_start": False, "restart_after": 1, **changes})
    learner = StreamLearner(tiny_model("llama"), config=config)
    learner.learn_one(_sample(0))
    learner.consolidate(2)
    assert learner.state.store.expert("default").started == 0 < learner.state.store.expert("default").steps
    learner.close()
