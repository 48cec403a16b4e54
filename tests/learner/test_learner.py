"""StreamLearner: what one call does to the model, the bases, the ring, the experts and the saved state."""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from ogpstream.learner import LearnerConfig, Sample, SampleError, SampleReport, StateError, StreamLearner, update
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.learner import PERIOD
from ogpstream.learner.samples import Refused
from ogpstream.learner.step import Reading
from ogpstream.memory import journal
from ogpstream.memory.replay import SlotFlag

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]

# small and quick: two linears of two inputs each layer, one layer
QUICK: dict[str, Any] = dict(
    rank=3, lr=0.02, target_modules=("q_proj", "down_proj"), basis_columns=16, warm_samples=2, warm_tokens=8,
    warm_share=0.25, learned_below=100.0, learned_share=0.0, settled_below=0.0,
)
PROMPT = 4


def _sample(seed: int, expert: str = "default", **fields: Any) -> Sample:
    ids = torch.randint(4, 101, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:PROMPT]), completion_ids=tuple(ids[PROMPT:]), expert=expert, **fields)


def _tokens(seed: int = 1000) -> Tensor:
    return torch.randint(4, 101, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: torch.nn.Module, seed: int = 1000) -> Tensor:
    logits: Tensor = model(input_ids=_tokens(seed)).logits
    return logits


@torch.no_grad()
def _loss(model: torch.nn.Module, sample: Sample) -> float:
    assert sample.prompt_ids is not None and sample.completion_ids is not None
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = -100
    return float(model(input_ids=ids, labels=labels).loss)


def _parameters(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _masters(learner: StreamLearner, name: str = "default") -> list[Tensor]:
    expert = learner.state.store.expert(name)
    return [expert.factors, *(part for held in expert.held for part in (held.U, held.V))]


@pytest.fixture
def make(tiny_model: TinyModel) -> Iterator[MakeLearner]:
    """`make(state_dir=, tokenizer=, verifier=, **config)`; whatever a test does, the base stays bit for bit."""
    made: list[tuple[StreamLearner, str]] = []

    def make_learner(state_dir: Path | None = None, tokenizer: Any = None, verifier: Any = None, **changes: Any
                     ) -> StreamLearner:
        model = tiny_model("llama", num_hidden_layers=1)
        before = _parameters(model)
        config = LearnerConfig(**{**QUICK, **changes})
        learner = StreamLearner(model, tokenizer, config, state_dir=state_dir, verifier=verifier)
        made.append((learner, before))
        return learner

    yield make_learner
    for learner, before in made:
        learner.close()
        assert _parameters(learner.model) == before
        assert all(parameter.grad is None for parameter in learner.model.parameters())


# one sample


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "lr": 0.5}, {"guard": "gradient"}, {"guard": "none"}])
def test_one_update_lowers_the_loss_of_its_sample(make: MakeLearner, changes: dict[str, Any]) -> None:
    learner = make(**changes)
    for seed in range(3):
        sample = _sample(seed)
        before = _loss(learner.model, sample)
        report = learner.learn_one(sample)
        assert (report.status, report.tokens, report.version) == ("learned", 10, learner.version)
        assert report.loss == pytest.approx(before, rel=1e-5)
        assert _loss(learner.model, sample) < before - 1e-3


def test_repeating_a_sample_learns_it(make: MakeLearner) -> None:
    learner = make(warm_start=False, basis_columns=1, lr=0.05)
    before = _loss(learner.model, _sample(0))
    for _ in range(30):
        learner.learn_one(_sample(0))
    # its head is too small for more
    assert _loss(learner.model, _sample(0)) < 0.4 * before


def test_a_settled_sample_moves_nothing_but_can_be_protected(make: MakeLearner) -> None:
    learner = make(settled_below=100.0)
    before, version, columns = _masters(learner), learner.version, learner.state.protection.columns
    assert learner.learn_one(_sample(0)).status == "learned"
    assert learner.version == version
    assert all(map(torch.equal, _masters(learner), before))
    # B is 0, so its dA is 0 and shows no direction
    learner.consolidate()
    assert learner.state.protection.columns == columns
    assert learner.status()["updates"] == 2


def test_directions_join_only_when_a_later_look_finds_the_sample_learned(make: MakeLearner) -> None:
    sure, never = make(), make(learned_below=1e-6)
    for learner in (sure, never):
        columns = learner.state.protection.columns
        assert 0 < columns
        for seed in range(3):
            # the loss before the first update says nothing of what that update did
            assert learner.learn_one(_sample(seed)).admitted == 0
        assert learner.state.protection.columns == columns
        report = learner.consolidate()
        assert report.updates == 3
        assert report.admitted == learner.state.protection.columns - columns
        flags = [learner.state.ring.get(slot).flags for slot in learner.state.ring.slots]
        assert all(flag & SlotFlag.REHEARSED for flag in flags)
        assert all(bool(flag & SlotFlag.LEARNED) == (learner is sure) for flag in flags)
    assert sure.state.protection.columns > never.state.protection.columns
    expert = sure.state.store.expert("default")
    for key, basis in sure.state.protection.bases.items():
        assert float((basis.rows() @ expert.layout.a_block(expert.factors, key)).abs().max()) < 1e-6
    assert all(held.rank > 0 for held in expert.held)


def test_every_sixteenth_sample_brings_back_one_old_one(make: MakeLearner) -> None:
    learner = make()
    updates = []
    for seed in range(33):
        before = learner.status()["updates"]
        learner.learn_one(_sample(seed))
        updates.append(learner.status()["updates"] - before)
    assert updates == [2 if number % 16 == 0 else 1 for number in range(1, 34)]
    counters, ring = learner.state.counters, learner.state.ring
    assert (counters.learned, counters.gradients) == (33, 35)
    # replayed samples are not added again, and only they were looked at again
    assert (len(ring), ring.seen) == (33, 33)
    again = [slot for slot in map(ring.get, ring.slots) if slot.flags & SlotFlag.REHEARSED]
    assert 1 <= len(again) <= 2
    assert sum(slot.updates for slot in map(ring.get, ring.slots)) == 35


def test_rehearsal_goes_by_count_in_a_batch(make: MakeLearner) -> None:
    learner = make(rehearsals=2)
    reports = learner.learn_batch([_sample(seed) for seed in range(17)])
    assert [report.status for report in reports] == ["learned"] * 17
    # none, one, then two old samples beside each new one, and no replay besides
    assert learner.state.counters.gradients == 17 + 0 + 1 + 2 * 15
    assert learner.state.counters.updates == 17
    assert learner.state.ring.seen == 17
    assert sum(slot.updates for slot in map(learner.state.ring.get, learner.state.ring.slots)) == 17 + 31


@pytest.mark.parametrize("below", [3.0, 1e-9])
def test_a_new_sample_of_a_batch_is_updated_until_it_counts_as_learned(make: MakeLearner, below: float) -> None:
    learner = make(repeats=6, rehearsals=0, learned_below=below)
    columns = learner.state.protection.columns
    (report,) = learner.learn_batch([_sample(0)])
    (slot,) = map(learner.state.ring.get, learner.state.ring.slots)
    assert report.updates == slot.updates == learner.state.counters.updates == learner.state.counters.gradients
    assert learner.state.counters.learned == learner.state.ring.seen == 1
    if below < 1:
        assert (report.updates, report.sticks) == (7, False)
        assert not slot.flags & SlotFlag.LEARNED and learner.state.protection.columns == columns
        return
    # the loss that the last of them found, and the one before did not
    assert 2 < report.updates < 7 and report.sticks and slot.loss < 3.0 < report.loss
    assert slot.flags & SlotFlag.LEARNED and learner.state.protection.columns > columns
    shorter = make(repeats=report.updates - 2, rehearsals=0, learned_below=below)
    (other,) = shorter.learn_batch([_sample(0)])
    assert other.updates == report.updates - 1 and not other.sticks
    # of one sample alone there is no second update
    (again,) = [shorter.learn_one(_sample(1))]
    assert again.updates == 1 and again.sticks is None


def test_an_abort_between_repeats_is_not_seen_in_the_report(make: MakeLearner) -> None:
    whole, aborted = (make(repeats=6, rehearsals=0, replay_every=1, learned_below=3.0) for _ in range(2))
    for learner in (whole, aborted):
        learner.learn_one(_sample(1))
    (want,) = whole.learn_batch([_sample(0)])
    aborted.accept(_sample(0))
    reports: list[SampleReport] = []
    while not reports:
        # each attempt is closed after the first unit beyond a committed update
        units, done = aborted.queue.apply_next(), aborted.state.position.done
        try:
            while aborted.state.position.done <= done:
                next(units)
            next(units)
            units.close()
        except StopIteration as end:
            reports.append(end.value)
    (got,) = reports
    assert (got.updates, got.sticks, got.loss) == (want.updates, True, want.loss) and want.updates > 2


@pytest.mark.parametrize("repeats", [0, 2])
def test_a_repeated_sample_brings_back_an_old_one_too(make: MakeLearner, repeats: int) -> None:
    learner = make(repeats=repeats, rehearsals=0, replay_every=2, learned_below=1e-9)
    for seed in range(6):
        learner.accept(_sample(seed))
    learner.drain()
    assert learner.state.counters.updates == 6 * (1 + repeats) + 3


def test_repeats_go_on_where_a_kill_left_them(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    learner = make(tmp_path / "state", snapshot_every=1, repeats=6, rehearsals=1, learned_below=3.0)
    checkpoint = learner._applier.checkpoint

    def copied() -> None:
        checkpoint()
        copies.append(Path(shutil.copytree(tmp_path / "state", tmp_path / f"{len(copies)}")))

    monkeypatch.setattr(learner._applier, "checkpoint", copied)
    reports = learner.learn_batch([_sample(0), _sample(1)])
    # one that ends early and one that does not
    assert [report.sticks for report in reports] == [True, False] and 2 < reports[0].updates < 7
    assert len(copies) == sum(report.updates for report in reports)
    digest, counters = learner.state_sha256(), learner.state.counters
    learner.close()
    for copy in copies:
        loaded = StreamLearner.load_state(copy, tiny_model("llama", num_hidden_layers=1))
        assert loaded.state.counters == counters and loaded.state_sha256() == digest
        loaded.close()


def test_rehearsed_samples_are_of_the_same_expert(make: MakeLearner) -> None:
    learner = make(rehearsals=2)
    learner.add_expert("other")
    learner.learn_batch([_sample(seed) for seed in range(3)])
    default = _masters(learner)
    gradients = learner.state.counters.gradients
    learner.learn_batch([_sample(5, "other")])
    assert learner.state.counters.gradients == gradients + 1
    assert all(map(torch.equal, _masters(learner), default))


def test_consolidate_rehearses_what_waits_once(make: MakeLearner) -> None:
    learner = make()
    assert learner.consolidate().updates == 0
    assert learner.consolidate(3).updates == 0
    for seed in range(4):
        learner.learn_one(_sample(seed))
    report = learner.consolidate()
    assert report.updates == 4 and report.mean_loss is not None and report.version == learner.version
    assert [slot.updates for slot in map(learner.state.ring.get, learner.state.ring.slots)] == [2] * 4
    before = learner.state_sha256()
    assert learner.consolidate().updates == 0
    assert learner.state_sha256() == before
    assert learner.consolidate(5).updates == 5
    assert learner.state.counters.updates == 4 + 4 + 5


# triggers


def test_a_users_correction_is_learned(make: MakeLearner, tiny_tokenizer: Any) -> None:
    learner = make(tokenizer=tiny_tokenizer)
    first = learner.correct("2 + 2 =", " 4")
    assert first.status == "learned" and first.loss is not None
    second = learner.correct("2 + 2 =", " 4")
    assert second.loss is not None and second.loss < first.loss


def test_what_a_verifier_flags_is_learned(make: MakeLearner, tiny_tokenizer: Any) -> None:
    asked: list[tuple[str, str]] = []

    def verifier(prompt: str, answer: str) -> Sample | None:
        asked.append((prompt, answer))
        return None if answer == "4" else Sample(prompt, "4")

    learner = make(tokenizer=tiny_tokenizer, verifier=verifier)
    assert learner.observe(prompt="2 + 2 = ", answer="4") is None
    assert learner.observe() is None
    assert learner.state.counters.learned == 0
    report = learner.observe(prompt="2 + 2 = ", answer="5")
    assert report is not None and report.status == "learned"
    assert asked == [("2 + 2 = ", "4"), ("2 + 2 = ", "5")]
    assert learner.state.counters.learned == 1


def test_every_thousand_inference_steps_new_samples_are_consolidated(make: MakeLearner) -> None:
    learner = make()

    def consolidated_after(steps: int) -> bool:
        before = learner.state.counters.updates
        learner.observe(steps)
        return learner.state.counters.updates > before

    assert not consolidated_after(PERIOD)
    learner.learn_one(_sample(0))
    assert not consolidated_after(PERIOD - 1)
    assert consolidated_after(1)
    assert not consolidated_after(PERIOD)
    learner.learn_one(_sample(1))
    learner.learn_one(_sample(2))
    assert consolidated_after(3 * PERIOD + 7)
    assert learner.state.counters.updates == 3 + 3
    # what was rehearsed by hand is not new, what was left over is
    for seed in (4, 5):
        learner.learn_one(_sample(seed))
    learner.consolidate()
    assert not consolidated_after(PERIOD)
    # a rollback undoes the samples that were consolidated last; one that comes after it is new again
    learner.rollback(learner.versions()[-1])
    learner.learn_one(_sample(3))
    assert consolidated_after(PERIOD)


# experts


def test_a_sample_trains_its_own_expert_only(make: MakeLearner) -> None:
    learner = make(learned_below=1e-6)
    learner.add_expert("other", rank=5)
    learner.activate({"default": 1.0, "other": 1.0})
    default, other = _masters(learner, "default"), _masters(learner, "other")
    learner.learn_one(_sample(0, "other"))
    assert all(map(torch.equal, _masters(learner, "default"), default))
    assert not torch.equal(_masters(learner, "other")[0], other[0])
    steps = {name: learner.state.store.expert(name).steps for name in learner.experts}
    assert steps == {"default": 0, "other": 1}
    assert learner.state.store.expert("other").rank == 5


@pytest.mark.parametrize("returns", ["activate", "learn"])
def test_the_least_recently_used_expert_leaves_and_catches_up_when_it_returns(make: MakeLearner, returns: str) -> None:
    learner = make()
    for name in ("second", "third"):
        learner.add_expert(name)
    store, bases = learner.state.store, learner.state.protection.bases
    learner.learn_one(_sample(0))
    learner.learn_one(_sample(1, "second"))
    assert tuple(store.active) == ("default", "second")
    learner.learn_one(_sample(2, "third"))
    assert tuple(store.active) == ("second", "third")
    # their directions join while "default" is away
    learner.learn_one(_sample(3, "second"))
    learner.consolidate()
    learner.activate({"second": 1.0, "third": 1.0})
    learner.learn_one(_sample(4, "third"))
    before = [store.expert("default").delta(index) for index in range(2)]
    expert = store.expert("default")
    assert expert.folded != {key: basis.version for key, basis in bases.items()}
    if returns == "activate":
        learner.activate({"default": 1.0})
    else:
        learner.learn_one(_sample(5))
    assert expert.folded == {key: basis.version for key, basis in bases.items()}
    for index, (was, site) in enumerate(zip(before, learner.attachment.sites, strict=True)):
        rows = bases[site.shape.basis].rows()
        assert float((rows @ expert.a(index)).abs().max()) < 1e-6
        # along P nothing moved, by an update neither; it computed something there
        assert torch.allclose(rows @ expert.delta(index), rows @ was, rtol=0, atol=1e-6)
        assert float((rows @ was).abs().max()) > 1e-3
        assert torch.allclose(expert.delta(index), was, rtol=0, atol=1e-6) == (returns == "activate")


@pytest.mark.parametrize("ends", ["aborted", "refused"])
def test_only_a_committed_update_activates_an_expert(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    # a held part that every fold cuts
    learner = make(max_active=2, held_rank=1, learned_below=100.0)
    for name in ("second", "third"):
        learner.add_expert(name)
    store = learner.state.store
    for number, name in enumerate(("default", "second", "third", "default", "third")):
        learner.learn_one(_sample(number, name))
        learner.consolidate()
    assert "second" not in store.active and store.expert("second").folded != store.expert("third").folded
    before, active, served, logits = learner.state_sha256(), store.active, store.served, _logits(learner.model)
    masters = _masters(learner, "second")
    if ends == "aborted":
        work = learner.step(_sample(9, "second"))
        for _ in range(4):
            next(work)
            # other threads are served what was committed
            assert torch.equal(_logits(learner.model), logits) and learner.version == served.version
            assert learner.state_sha256() == before
        work.close()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(learner._updater, "_vocabulary", 1.0001)
            assert learner.learn_one(_sample(9, "second")).status == "rejected"
    assert (store.active, tuple(store.active), store.served) == (active, tuple(active), served)
    assert torch.equal(_logits(learner.model), logits)
    assert all(map(torch.equal, _masters(learner, "second"), masters))
    report = learner.drain() if ends == "aborted" else learner.learn_one(_sample(9, "second"))
    assert isinstance(report, SampleReport)
    assert (report.status, report.version, tuple(store.active)[-1]) == ("learned", served.version + 1, "second")


def test_a_step_that_was_left_open_takes_nothing_back(make: MakeLearner) -> None:
    learner = make()
    learner.add_expert("other")
    work = learner.step(_sample(0, "other"))
    next(work)
    # applied by another call meanwhile
    learner.learn_one(_sample(1))
    learned = learner.state_sha256()
    assert learner.state.store.expert("other").steps == 1
    work.close()
    assert learner.state_sha256() == learned


def test_gates_scale_what_is_served(make: MakeLearner) -> None:
    learner = make()
    learner.add_expert("other")
    for seed in range(3):
        learner.learn_one(_sample(seed))
        learner.learn_one(_sample(seed + 3, "other"))

    def merged(gates: dict[str, float]) -> Tensor:
        with learner.attachment.binding.using(None):
            weights = {}
            for index, site in enumerate(learner.attachment.sites):
                weight = site.module.base_layer.weight
                weights[weight] = weight.detach().clone()
                for name, gate in gates.items():
                    weight += gate * learner.state.store.expert(name).delta(index).T
            logits = _logits(learner.model)
            for weight, saved in weights.items():
                weight.copy_(saved)
        return logits

    served = []
    for gates in ({"default": 1.0}, {"default": 0.5}, {"default": 0.25, "other": 2.0}, {"other": 0.0}):
        learner.activate(gates)
        served.append(_logits(learner.model))
        with torch.no_grad():
            assert torch.allclose(served[-1], merged(gates), rtol=0, atol=1e-4)
    assert float((served[0] - served[1]).abs().max()) > 1e-2
    for gates in ({"nobody": 1.0}, {}, {"default": 1.0, "other": 1.0, "third": 1.0}):
        with pytest.raises(ConfigError, match="cannot serve"):
            learner.activate(gates)
    with pytest.raises(ConfigError, match="already"):
        learner.add_expert("other")


# what is refused


def test_samples_that_cannot_be_learned_from_leave_the_state_alone(make: MakeLearner) -> None:
    learner = make()
    learner.learn_one(_sample(0, id="a"))
    before = learner.state_sha256()
    bad = [
        (_sample(1, "nobody"), "unknown expert 'nobody'"),
        (Sample(prompt_ids=(5,), completion_ids=(101,)), "101"),
        (Sample("text", "text"), "without a tokenizer"),
    ]
    for sample, message in bad:
        with pytest.raises(SampleError, match=message):
            learner.learn_one(sample)
        with pytest.raises(SampleError, match=message):
            learner.learn_batch([_sample(2), sample])
    assert learner.learn_one(_sample(3, id="a")).status == "skipped"
    (report,) = learner.learn_batch([_sample(3, id="a")])
    assert report.status == "skipped"
    assert (learner.pending, learner.state_sha256()) == (0, before)


def test_a_stream_goes_on_after_what_is_refused(make: MakeLearner) -> None:
    learner = make()
    stream = [_sample(0, id="a"), Refused("b", "line 2 is no JSON"), _sample(1, "nobody", id="c"),
              _sample(2, id="a"), _sample(3, id="d", label=False), _sample(4, id="e")]
    reports = learner.learn_batch(stream, refuse=True)
    assert [(report.id, report.status) for report in reports] == [
        ("a", "learned"), ("b", "rejected"), ("c", "rejected"), ("a", "skipped"), ("d", "quarantined"), ("e", "learned")
    ]
    status = learner.status()
    assert [status[key] for key in ("acknowledged", "learned", "rejected", "quarantined", "pending")] == [5, 2, 2, 1, 0]
    # what is still bad is told again, and not counted again
    before = learner.state_sha256()
    again = learner.learn_batch(stream, refuse=True)
    assert [report.status for report in again] == ["skipped", "rejected", "rejected", "skipped", "skipped", "skipped"]
    assert [report.reason for report in again] == [
        report.reason if report.status == "rejected" else None for report in reports
    ]
    assert learner.state_sha256() == before
    # and what is mended is learned, under the same id
    learner.add_expert("nobody")
    assert [r.status for r in learner.learn_batch([*stream, _sample(2, id="b")], refuse=True)][2] == "learned"
    assert (learner.state.counters.learned, learner.state.counters.rejected) == (4, 2)


def test_what_a_guard_refused_is_learned_once_it_is_another(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make()
    bad, mended = _sample(0, id="a"), _sample(1, id="a")
    with monkeypatch.context() as patch:
        patch.setattr(learner._updater, "_vocabulary", 1.0001)
        (report,) = learner.learn_batch([bad])
        assert report.status == "rejected" and learner.state.counters.rejected == 1
    before = learner.state_sha256()
    # nothing that a later state might see differently is tried again: a killed run would do it once more often
    for report in (*learner.learn_batch([bad]), learner.learn_one(bad)):
        assert report.status == "rejected" and "a guard refused it before" in str(report.reason)
    told = learner.accept(bad)
    assert isinstance(told, SampleReport) and told == report
    assert learner.state_sha256() == before
    assert learner.learn_one(mended).status == "learned"
    assert [learner.learn_one(sample).status for sample in (mended, bad)] == ["skipped", "skipped"]
    assert learner.state.counters.rejected == 1


def test_a_step_looks_a_sample_up_once(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, known, asked = make(), StreamLearner._known, []

    def count(self: StreamLearner, sample: Sample) -> SampleReport | None:
        asked.append(sample.id)
        return known(self, sample)

    monkeypatch.setattr(StreamLearner, "_known", count)
    assert [learner.learn_one(_sample(0, id="a")).status for _ in range(2)] == ["learned", "skipped"]
    assert asked == ["a", "a"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 50.0])
def test_an_absurd_loss_commits_nothing(make: MakeLearner, monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    learner = make()
    learner.learn_one(_sample(0))
    masters, version, columns = _masters(learner), learner.version, learner.state.protection.columns

    def broken(
        walk: object, binding: object, sinks: Any, samples: Any, **kwargs: Any
    ) -> Generator[str, None, list[Reading]]:
        for sink in sinks:
            sink.slab += 1.0
        yield "all"
        return [Reading(loss, certain=1.0) for _ in samples]

    with monkeypatch.context() as patch:
        patch.setattr(update, "sample_gradients", broken)
        report = learner.learn_one(_sample(1))
    assert report.status == "rejected" and report.reason is not None
    assert (learner.version, learner.state.protection.columns, len(learner.state.ring)) == (version, columns, 1)
    assert all(map(torch.equal, _masters(learner), masters))
    assert learner.learn_one(_sample(2)).status == "learned"
    assert learner.state.counters.rejected == 1


def test_an_update_that_is_not_finite_commits_nothing(make: MakeLearner) -> None:
    # a decay of 1e60 is more than float32 can hold
    learner = make(optimizer="sgd", lr=1e30, weight_decay=1e30)
    before, version = _masters(learner), learner.version
    report = learner.learn_one(_sample(0))
    assert (report.status, report.reason) == ("rejected", "the update is not finite")
    assert all(map(torch.equal, _masters(learner), before))
    assert (learner.version, len(learner.state.ring)) == (version, 0)


# state


def _history(learner: StreamLearner, numbers: range) -> None:
    for number in numbers:
        learner.learn_batch([_sample(number, id=str(number), expert="other" if number % 3 == 0 else "default")])
        learner.learn_one(_sample(100 + number))
        if number % 4 == 3:
            learner.consolidate()


def test_a_loaded_learner_goes_on_bit_for_bit(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    """In memory without a stop, from a folder, and from a copy of the state."""
    whole, stopped = make(snapshot_every=7), make(tmp_path / "state", snapshot_every=7)
    for learner in (whole, stopped):
        learner.add_expert("other")
        _history(learner, range(5))
    stopped.save_state(tmp_path / "copy")
    stopped.close()
    logits = _logits(whole.model)
    loaded = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=1))
    assert loaded.state_sha256() == whole.state_sha256()
    assert loaded.config == whole.config
    assert loaded.version == whole.version
    assert torch.equal(_logits(loaded.model), logits)
    for learner in (whole, loaded):
        _history(learner, range(3, 9))
    assert loaded.state_sha256() == whole.state_sha256()
    assert torch.equal(_logits(loaded.model), _logits(whole.model))
    loaded.close()

    copied = StreamLearner.load_state(tmp_path / "copy", tiny_model("llama", num_hidden_layers=1))
    assert torch.equal(_logits(copied.model), logits)
    _history(copied, range(3, 9))
    assert torch.equal(_logits(copied.model), _logits(whole.model))
    assert all(map(torch.equal, _masters(copied), _masters(whole)))
    copied.close()


def test_a_state_folder_is_not_overwritten(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    make(tmp_path / "state").close()
    with pytest.raises(StateError, match="load_state"):
        make(tmp_path / "state")
    with pytest.raises(StateError, match="another base model"):
        StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=1, seed=1))
    make().save_state(tmp_path / "copy")
    with pytest.raises(StateError, match="holds a state already"):
        make().save_state(tmp_path / "copy")


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_rollback_returns_to_the_saved_masters(make: MakeLearner, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "state" if where == "folder" else None
    learner = make(folder)
    _history_of_default(learner, range(3))
    learner.save_state()
    saved, masters, logits = learner.version, [t.clone() for t in _masters(learner)], _logits(learner.model)
    bases = {key: basis.rows().clone() for key, basis in learner.state.protection.bases.items()}
    _history_of_default(learner, range(3, 8))
    version = learner.version
    assert not torch.equal(_logits(learner.model), logits)
    learner.rollback(saved)
    assert all(map(torch.equal, _masters(learner), masters))
    assert all(torch.equal(learner.state.protection.bases[key].rows(), rows) for key, rows in bases.items())
    assert torch.equal(_logits(learner.model), logits)
    # published as something new, since caches of the undone version must not be taken for it
    assert learner.version == version + 1
    status = learner.status()
    assert (status["learned"], status["quarantined"], status["acknowledged"]) == (3, 5, 8)
    assert status["ring_samples"] == 3
    # brought before, so not learned again
    assert learner.learn_one(_sample(5, id="5")).status == "skipped"
    assert learner.learn_one(_sample(20, id="20")).status == "learned"
    with pytest.raises(StateError, match="no version 999"):
        learner.rollback(999)
    if folder is not None:
        entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in entries] == [str(number) for number in range(3, 8)]


def _history_of_default(learner: StreamLearner, numbers: range) -> None:
    for number in numbers:
        learner.learn_one(_sample(number, id=str(number)))


def test_rollback_to_a_snapshot_made_within_a_sample(make: MakeLearner, tmp_path: Path) -> None:
    """The automatic snapshots are: the sample whose update caused one is in it, and is not undone."""
    learner = make(tmp_path / "state", snapshot_every=3)
    _history_of_default(learner, range(5))
    learner.rollback(learner.versions()[-1])
    status = learner.status()
    assert (status["learned"], status["quarantined"]) == (3, 2)
    entries = [json.loads(line) for line in (tmp_path / "state" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == ["3", "4"]


# forms


def test_the_specifications_own_form_runs_as_written(tiny_model: TinyModel) -> None:
    config = LearnerConfig.literal(rank=3, learned_below=100.0)
    assert (config.optimizer, config.lr, config.guard, config.basis_scope, config.replay_every) == (
        "sgd", 1e-4, "gradient", "shared", 16
    )
    learner = StreamLearner(tiny_model("llama", num_hidden_layers=1), config=config)
    bases = learner.state.protection.bases
    assert {basis.d_in for basis in bases.values()} == {48, 80} and len(bases) == 2
    assert learner.state.protection.columns == 0
    expert = learner.state.store.expert("default")
    # B is 0 at first; so that dA is not, it is given a value
    slab = expert.factors.clone()
    slab[expert.layout.a_numel :] = 0.1 * torch.randn(slab.numel() - expert.layout.a_numel)
    expert.factors = slab
    learner._updater.publish()
    assert learner.learn_one(_sample(0)).admitted == 2, "no second look is asked for"
    before = expert.factors
    learner.learn_one(_sample(1))
    for key, basis in bases.items():
        first = basis.rows()[:1]
        moved = expert.layout.a_block(expert.factors - before, key)
        kept = expert.layout.a_block(before, key)
        # dA has no share along what was protected before it, but nothing was folded: A itself has
        assert float((first @ moved).norm()) <= 1e-3 * float(moved.norm())
        assert float((first @ kept).norm()) > 1e-2 * float(kept.norm())
    assert expert.exp_avg is None and expert.exp_avg_sq is None
    assert all(held.rank == 0 for held in expert.held)
    learner.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_state_holds_no_importance_of_parameters(make: MakeLearner, optimizer: str) -> None:
    """Fisher information would be one more number for each factor or each base weight.

    Adam's moments and the running mean of the factors are all that is there.
    """
    learner = make(optimizer=optimizer)
    for seed in range(3):
        learner.learn_one(_sample(seed))
    learner.consolidate()
    tensors, _ = learner.state.capture()
    factors = learner.state.store.expert("default").factors.numel()
    moments = {"exp_avg", "exp_avg_sq"} if optimizer == "adam" else set()
    mine = {name.rpartition("/")[2] for name in tensors if name.startswith("experts.default/")}
    assert mine == {"factors", "average", "U", "V"} | moments
    for name, tensor in tensors.items():
        if tensor.numel() == factors:
            assert name.rpartition("/")[2] in {"factors", "average"} | moments
    sizes = {parameter.numel() for parameter in learner.model.parameters() if parameter.numel() > 1000}
    assert not [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() in sizes]


# adapters of PEFT


def _folded(learner: StreamLearner) -> StreamLearner:
    for seed in range(4):
        learner.learn_one(_sample(seed))
    learner.consolidate()
    assert all(held.rank > 0 for held in learner.state.store.expert("default").held)
    return learner


def test_an_exported_adapter_computes_the_same_in_peft(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
                                                      ) -> None:
    learner = _folded(make())
    folder = learner.export_peft(tmp_path / "adapter")
    base = tiny_model("llama", num_hidden_layers=1)
    assert float((_logits(learner.model) - _logits(base)).abs().max()) > 0.1
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert float((_logits(learner.model) - _logits(loaded)).abs().max()) <= 1e-5


def test_an_exported_adapter_can_be_imported_and_learned_on(make: MakeLearner, tmp_path: Path) -> None:
    source = _folded(make())
    learner = make(tmp_path / "state")
    learner.import_peft(source.export_peft(tmp_path / "adapter"), "theirs")
    learner.activate({"theirs": 1.0})
    assert float((_logits(source.model) - _logits(learner.model)).abs().max()) <= 1e-4
    expert = learner.state.store.expert("theirs")
    assert expert.rank == max(3 + held.rank for held in source.state.store.expert("default").held)
    for key, basis in learner.state.protection.bases.items():
        assert float((basis.rows() @ expert.layout.a_block(expert.factors, key)).abs().max()) < 1e-5
    before = _loss(learner.model, _sample(50))
    learner.learn_one(_sample(50, "theirs"))
    assert _loss(learner.model, _sample(50)) < before
    with pytest.raises(ConfigError, match="already"):
        learner.import_peft(tmp_path / "adapter", "theirs")


@pytest.mark.parametrize("name", ["", "a/b", "../../evil", "a b", "a.b"])
def test_what_is_no_name_of_an_expert_never_reaches_the_journal(make: MakeLearner, tmp_path: Path, name: str) -> None:
    adapter = _folded(make()).export_peft(tmp_path / "adapter")
    learner = make(tmp_path / "state")
    for wrong in (lambda: learner.add_expert(name), lambda: learner.import_peft(adapter, name)):
        with pytest.raises(ConfigError, match="no name of an expert"):
            wrong()
    for rank in (0, 1000):
        with pytest.raises(ConfigError, match=f"rank is {rank}: "):
            learner.add_expert("new", rank=rank)
    with pytest.raises(ConfigError, match="gate of default is nan"):
        learner.activate({"default": float("nan")})
    with pytest.raises(ConfigError, match="updates is -3"):
        learner.consolidate(-3)
    assert learner.learn_one(_sample(0)).status == "learned"


def test_an_import_survives_a_kill_and_a_move_of_the_folder(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _folded(make()).export_peft(tmp_path / "adapter")
    (adapter / "checkpoint-1").mkdir()
    monkeypatch.chdir(tmp_path)
    learner = make(Path("state"))
    learner.learn_one(_sample(0))
    learner.import_peft(adapter, "theirs")
    wanted = learner.state_sha256()
    folder = tmp_path / "state" / "imports"
    assert learner.status()["imports_bytes"] > 0 and len(list(folder.iterdir())) == 1
    # as a kill leaves it: the journal has the import, no snapshot does
    shutil.copytree(tmp_path / "state", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = StreamLearner.load_state(tmp_path / "elsewhere" / "moved", tiny_model("llama", num_hidden_layers=1))
    assert loaded.state_sha256() == wanted
    loaded.close()
    # the copy goes with the last snapshot that is older than the import
    monkeypatch.chdir(tmp_path)
    learner.save_state()
    assert learner.state_sha256() == wanted and len(list(folder.iterdir())) == 1
    learner.learn_one(_sample(1))
    learner.save_state()
    assert learner.status()["imports_bytes"] == 0 and not list(folder.iterdir())
    assert learner.experts == ("default", "theirs")


def test_a_sample_whose_step_was_aborted_is_learned_once(make: MakeLearner) -> None:
    learner = make()
    work = learner.step(_sample(0, id="a"))
    next(work)
    work.close()
    assert learner.learn_one(_sample(0, id="a")).status == "learned"
    assert (learner.state.counters.learned, len(learner.state.ring), learner.pending) == (1, 1, 0)


def test_after_a_failed_sync_the_live_state_is_that_of_a_recovery(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state")

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_all", full)
        with pytest.raises(StateError, match="No space left"):
            learner.learn_one(_sample(0, id="a"))
    assert learner.learn_one(_sample(0, id="a")).status == "learned"
    assert learner.state.counters.learned == 1
    wanted = learner.state_sha256()
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    loaded = StreamLearner.load_state(tmp_path / "copy", tiny_model("llama", num_hidden_layers=1))
    assert loaded.state_sha256() == wanted
    loaded.close()


def test_an_adapter_trained_by_plain_peft_is_continued(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
                                                      ) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        theirs(input_ids=_tokens(7), labels=_tokens(7)).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "adapter")
    learner = make(tmp_path / "state")
    learner.import_peft(tmp_path / "adapter", "theirs")
    learner.activate({"theirs": 1.0})
    assert float((_logits(learner.model) - _logits(theirs.eval())).abs().max()) <= 1e-4
    assert (learner.state.store.expert("theirs").rank, learner.state.store.expert("theirs").scaling) == (4, 1.5)
    before = _loss(learner.model, _sample(50))
    learner.learn_one(_sample(50, "theirs"))
    assert _loss(learner.model, _sample(50)) < before
    learner.close()
    again = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=1))
    assert again.state_sha256() == learner.state_sha256()
    again.close()
