"""StreamLearner: what one call does to the model, the bases and the ring."""

import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import LearnerConfig, ModelError, Sample, SampleReport, StateError, StreamLearner, judge, update
from ogpstream.learner.learner import PERIOD
from ogpstream.learner.step import Reading
from ogpstream.memory import journal
from ogpstream.memory.replay import SlotFlag

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]
PROMPT = 4


def _sample(seed: int, expert: str = "default", **fields: Any) -> Sample:
    ids = torch.randint(4, 101, (10,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(prompt_ids=tuple(ids[:PROMPT]), completion_ids=tuple(ids[PROMPT:]), expert=expert, **fields)


@torch.no_grad()
def _loss(model: torch.nn.Module, sample: Sample) -> float:
    assert sample.prompt_ids is not None and sample.completion_ids is not None
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = -100
    return float(model(input_ids=ids, labels=labels).loss)


def _masters(learner: StreamLearner, name: str = "default") -> list[Tensor]:
    expert = learner.state.store.expert(name)
    return [expert.factors, *(part for held in expert.held for part in (held.U, held.V))]


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


def test_rehearsal_goes_by_count_in_a_batch(make: MakeLearner) -> None:
    learner = make(rehearsals=2)
    reports = learner.learn_batch([_sample(seed) for seed in range(17)])
    assert [report.status for report in reports] == ["learned"] * 17
    # none, one, then two old samples beside each new one, and no replay besides
    assert learner.state.counters.gradients == 17 + 0 + 1 + 2 * 15
    assert learner.state.counters.updates == 17
    assert learner.state.ring.seen == 17


@pytest.mark.parametrize("below", [3.0, 1e-9])
def test_a_new_sample_of_a_batch_is_updated_until_it_counts_as_learned(make: MakeLearner, below: float) -> None:
    learner = make(repeats=6, rehearsals=0, learned_below=below)
    columns = learner.state.protection.columns
    (report,) = learner.learn_batch([_sample(0)])
    (slot,) = map(learner.state.ring.get, learner.state.ring.slots)
    assert report.updates == learner.state.counters.updates == learner.state.counters.gradients
    assert learner.state.counters.learned == learner.state.ring.seen == 1
    if below < 1:
        assert (report.updates, report.sticks) == (7, False)
        assert not slot.flags & SlotFlag.LEARNED and learner.state.protection.columns == columns
        return
    # the last of them found what the first did not
    assert 2 < report.updates < 7 and report.sticks and report.loss > 3.0
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
    learner = make(tmp_path / "state", snapshot_every=1, repeats=6, rehearsals=1, learned_below=3.0,
                   loraplus_lr_ratio=1.0)
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
    # each once more
    assert learner.state.counters.gradients == 2 * 4 and learner.state.ring.pending() == []
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


# what is dropped


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


def test_what_is_refused_is_written_in_a_unit_of_its_own(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a server that is outside of its lock; dropped behind it, nothing has changed."""
    learner = make()
    monkeypatch.setattr(judge.Judge, "refusal", lambda *_: "not today")
    units: list[str] = []
    written: list[tuple[str, int]] = []
    monkeypatch.setattr(learner._applier.folder, "quarantine",
                        lambda entry: written.append((units[-1], entry["seq"])))
    before = learner.state_sha256()
    work = learner.step(_sample(1))
    for unit in work:
        units.append(unit)
        if unit == "written":
            break
    work.close()
    assert [unit for unit, _ in written] == ["writes"] and learner.state_sha256() == before
    report = learner.drain()
    assert isinstance(report, SampleReport) and report.status == "rejected" and report.reason == "not today"
    # the folder keeps a record once
    assert learner.state.counters.rejected == 1 and len({seq for _, seq in written}) == 1


def test_a_correction_of_a_correction_takes_its_place(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older answer is neither learned beside the newer one nor rehearsed later."""
    learner = make(rehearsals=2, learned_below=0.1)
    prompt, beside = (5, 6, 7), []
    run = update.Updater.run

    def watch(self: Any, name: str, lessons: Any, layers: Any = None) -> Any:
        beside.append([tuple(lesson.ids) for lesson in lessons])
        return run(self, name, lessons, layers)

    monkeypatch.setattr(update.Updater, "run", watch)
    old, new = (*prompt, 20, 21), (*prompt, 30)
    for ids in (old, (8, 9, 10, 40), new):
        learner.learn_batch([Sample(prompt_ids=ids[:3], completion_ids=ids[3:])])
    assert beside[1] and old in beside[1] and old not in beside[2]
    learner.learn_batch([Sample(prompt_ids=(11, 12), completion_ids=(50,))])
    learner.consolidate(6)
    assert not any(old in lessons for lessons in beside[2:])
    rings = learner.state.ring, learner.state.waiting
    kept = [tuple(ring.get(slot).ids.tolist()) for ring in rings for slot in ring.slots]
    assert old not in kept and new in kept


def test_the_same_answer_to_another_expert_or_again_contradicts_nothing(make: MakeLearner) -> None:
    learner = make()
    learner.add_expert("law")
    for expert, completion in (("default", (20,)), ("law", (30,)), ("default", (20,))):
        learner.learn_one(Sample(prompt_ids=(5, 6), completion_ids=completion, expert=expert))
    assert len(learner.state.ring) == 3


def test_correct_repeats_and_learn_one_does_not(make: MakeLearner, tiny_tokenizer: Any) -> None:
    learner = make(repeats=3, learned_below=1e-6)
    learner._intake.tokenizer = tiny_tokenizer
    assert learner.correct("ab", "cd").updates == 4
    assert learner.learn_one(_sample(1)).updates == 1


def test_a_closed_learner_says_so(make: MakeLearner) -> None:
    learner = make()
    learner.close()
    for work in (lambda: learner.learn_one(_sample(1)), lambda: learner.learn_batch([_sample(1)])):
        with pytest.raises(StateError, match="the learner is closed"):
            work()


def test_a_learner_is_closed_at_the_end_of_a_with_and_its_model_is_free_for_the_next(make: MakeLearner) -> None:
    with make() as learner:
        model = learner.model
        with pytest.raises(ModelError, match="adapters of another learner"):
            StreamLearner(model, None, LearnerConfig(warm_start=False))
    with pytest.raises(StateError, match="the learner is closed"):
        learner.learn_one(_sample(1))
    StreamLearner(model, None, LearnerConfig(warm_start=False)).close()


def test_a_report_is_of_the_sample_that_was_given(make: MakeLearner) -> None:
    learner = make()
    for name in ("A", "B"):
        learner.accept(_sample(ord(name), id=name))
    report = learner.learn_one(_sample(ord("A"), id="A"))
    assert (report.id, report.status, report.version) == ("A", "learned", 2)
    # what waited behind it is learned too, and is the newest
    assert learner.pending == 0 and learner.last_report is not None and learner.last_report.id == "B"
    again = learner.learn_one(_sample(ord("B"), id="B"))
    assert (again.id, again.status) == ("B", "skipped")


@pytest.mark.parametrize("own", [None, "own"])
def test_a_step_reports_its_own_sample_though_another_came_meanwhile(make: MakeLearner, own: str | None) -> None:
    learner = make()
    learner.accept(_sample(1))
    work = learner.step(_sample(2, id=own))
    next(work)
    learner.accept(_sample(3))
    reports: list[SampleReport] = []
    while not reports:
        try:
            next(work)
        except StopIteration as end:
            reports.append(end.value)
    # the second one of three updates
    assert (learner.pending, learner.version) == (0, 4)
    assert (reports[0].id, reports[0].version) == (own, 3)


# the state folder


REFUSED = Sample(prompt_ids=(5, 6), completion_ids=(7,), label=False)


def _loaded(tiny_model: TinyModel, folder: Path) -> StreamLearner:
    return StreamLearner.load_state(folder, tiny_model("llama", num_hidden_layers=1))


def test_a_quarantine_that_a_person_edited_is_loaded_and_gone_on_with(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
) -> None:
    learner = make(tmp_path / "state")
    learner.learn_one(REFUSED)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    quarantine = tmp_path / "copy" / "quarantine.jsonl"
    (entry,) = quarantine.read_text().splitlines()
    edited = [entry, "", "seen by Ann", '{"id": "no number"}', '{"seq": [1]}', "7", "null", "[" * 9**6]
    for last in (f"{entry}\n", "an end without a newline", entry):
        quarantine.write_bytes("\n".join([*edited, last]).encode() + b"\n\xff\n" + last.encode())
        text = quarantine.read_bytes()
        again = _loaded(tiny_model, tmp_path / "copy")
        # the record that is applied again is there already
        assert again.state_sha256() == learner.state_sha256() and quarantine.read_bytes() == text
        again.learn_one(REFUSED)
        text += b"" if text.endswith(b"\n") else b"\n"
        assert quarantine.read_bytes().startswith(text)
        (added,) = quarantine.read_bytes()[len(text) :].splitlines()
        assert json.loads(added)["seq"] == 2
        # by an editor, while it is open
        quarantine.write_text("by hand")
        again.learn_one(REFUSED)
        hand, added = quarantine.read_text().splitlines()
        assert hand == "by hand" and json.loads(added)["seq"] == 3
        again.close()
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(tmp_path / "state", tmp_path / "copy")


def test_a_line_of_a_quarantine_that_a_kill_left_half_written_is_cut_off(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
) -> None:
    learner = make(tmp_path / "state")
    learner.learn_one(REFUSED)
    whole = (tmp_path / "state" / "quarantine.jsonl").read_bytes()
    for length in (1, 2, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        shutil.copytree(tmp_path / "state", tmp_path / str(length))
        quarantine = tmp_path / str(length) / "quarantine.jsonl"
        quarantine.write_bytes(b"seen by Ann\n" + whole[:length])
        again = _loaded(tiny_model, tmp_path / str(length))
        again.learn_one(REFUSED)
        again.close()
        note, *entries = quarantine.read_text().splitlines()
        assert note == "seen by Ann" and [json.loads(entry)["seq"] for entry in entries] == [1, 2]


def _full(descriptor: int, data: bytes) -> None:
    raise OSError(28, "No space left on device")


CHANGES: dict[str, Callable[[StreamLearner], Any]] = {
    "learn_one": lambda learner: learner.learn_one(_sample(7)),
    "learn_batch": lambda learner: learner.learn_batch([_sample(7), _sample(8)]),
    "accept": lambda learner: learner.accept(_sample(7)),
    "add_expert": lambda learner: learner.add_expert("law"),
    "freeze": lambda learner: learner.freeze("default"),
    "rollback": lambda learner: learner.rollback(learner.versions()[0]),
    "consolidate": lambda learner: learner.consolidate(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_a_full_disk_did_not_take_is_not_done_and_can_be_brought_again(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    plain, learner, skipped = make(tmp_path / "plain"), make(tmp_path / "state"), make(tmp_path / "skipped")
    for one in (plain, learner, skipped):
        one.learn_one(_sample(1))
    for one in (learner, skipped):
        with monkeypatch.context() as patch:
            patch.setattr(journal, "write_all", _full)
            before = one.state_sha256()
            for _ in range(3):
                told = "No space left on device.* bring it again: nothing of it was taken"
                with pytest.raises(StateError, match=told) as caught:
                    CHANGES[change](one)
                assert "\n" not in str(caught.value)
                assert one.pending == 0 and one.drain() is None and one.state_sha256() == before
    # given up on
    skipped.learn_one(_sample(9))
    assert skipped.pending == 0 and skipped.state.counters.learned == 2 and skipped.experts == ("default",)
    # the one that failed and its withdrawal; those behind it found the disk full before they were numbered
    assert learner._applier.folder.append({"kind": "sample"}) == (5 if change == "learn_batch" else 4)
    learner._applier.folder.withdraw([5 if change == "learn_batch" else 4])
    for one in (plain, learner):
        CHANGES[change](one)
        one.drain()
    assert learner.state.counters == plain.state.counters and learner.experts == plain.experts
    assert all(map(torch.equal, _masters(learner), _masters(plain)))
    for one in (learner, skipped):
        wanted, place = one.state_sha256(), one._applier.folder.path
        shutil.copytree(place, tmp_path / "copy")
        again = _loaded(tiny_model, tmp_path / "copy")
        assert again.state_sha256() == wanted
        again.close()
        shutil.rmtree(tmp_path / "copy")


def test_what_could_not_be_noted_of_a_pending_sample_is_not_done(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state")
    lengths = []
    for seed, noted in enumerate((False, True)):
        number = learner.accept(_sample(seed))
        note = {"kind": "shorten", "of": number, "done": 0, "tokens": 8}
        with monkeypatch.context() as patch:
            if not noted:
                patch.setattr(journal, "write_all", _full)
                with pytest.raises(StateError, match="check the disk$"):
                    learner._applier.acknowledge([note])
            else:
                learner._applier.acknowledge([note])
        report = learner.drain()
        assert isinstance(report, SampleReport)
        lengths.append(report.tokens)
    assert lengths == [10, 8]
    wanted = learner.state_sha256()
    learner.close()
    again = _loaded(tiny_model, tmp_path / "state")
    assert again.state_sha256() == wanted
    again.close()


def test_a_journal_that_ended_took_nothing(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state")
    learner.learn_one(_sample(1))
    wanted = learner.state_sha256()

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StateError, match="restart, then bring it again: nothing of it was taken"):
            learner.learn_one(_sample(2))
    assert (learner.pending, learner.state_sha256()) == (0, wanted)
    learner.close()
    again = _loaded(tiny_model, tmp_path / "state")
    assert again.state_sha256() == wanted
    again.close()


def test_what_an_interrupt_left_to_be_written_is_taken(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learner._applier.folder, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learner.learn_one(_sample(1))
    assert learner.pending == 1
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    unwritten = _loaded(tiny_model, tmp_path / "copy")
    assert unwritten.state.counters.acknowledged == 0
    unwritten.close()
    next(learner.queue.apply_next())
    # before anything of it acts
    shutil.copytree(tmp_path / "state", tmp_path / "written")
    learner.drain()
    again = _loaded(tiny_model, tmp_path / "written")
    assert again.state_sha256() == learner.state_sha256() and again.state.counters.learned == 1
    again.close()


def test_a_disk_that_fills_up_within_an_update_keeps_its_sample(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state", snapshot_every=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(learner._applier.folder.snapshots, "save", full)
        with pytest.raises(StateError, match="No space left on device.* acknowledged is kept") as caught:
            learner.learn_one(_sample(1))
    assert "\n" not in str(caught.value) and learner.pending == 1
    learner.drain()
    assert learner.state.counters.learned == 1
    learner.close()
    again = _loaded(tiny_model, tmp_path / "state")
    assert again.state_sha256() == learner.state_sha256()
    again.close()


def test_a_learner_is_closed_on_a_full_disk_too(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(tmp_path / "state")
    learner.learn_one(_sample(1))
    wanted = learner.state_sha256()
    names = [name for name, _ in tiny_model("llama", num_hidden_layers=1).named_modules()]
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_all", _full)
        with pytest.raises(StateError):
            learner.learn_one(_sample(2))
        with pytest.raises(StateError, match="state cannot be used: No space left on device; check the disk") as caught:
            learner.close()
    assert "\n" not in str(caught.value)
    assert [name for name, _ in learner.model.named_modules()] == names
    again = _loaded(tiny_model, tmp_path / "state")
    assert again.state_sha256() == wanted
    again.close()
