"""Memory that runs out in the middle of an update: the state stays, the memory comes back, a smaller mode goes on."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from ogpstream.learner import LearnerConfig, Sample, SampleError, StreamLearner, pacer, step
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.meter import Meter
from ogpstream.learner.walk import LayerCall, run_layer
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Expert

TinyModel = Callable[..., tf.PreTrainedModel]


class Failing(TorchDispatchMode):
    """Raises at the given operation, once."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self.left = operation

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@contextmanager
def _room_for(tokens: int) -> Iterator[None]:
    """No layer can be run on more tokens."""

    def run(call: LayerCall, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > tokens:
            raise torch.OutOfMemoryError("injected")
        return run_layer(call, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "run_layer", run)
        yield


def _learner(tiny_model: TinyModel, state_dir: Path | None = None, samples: int = 2, **changes: Any) -> StreamLearner:
    values: dict[str, Any] = dict(rank=3, lr=0.02, basis_columns=8, learned_below=6.0, learned_share=0.0,
                                  warm_samples=2, warm_tokens=8, restart_after=0)
    learner = StreamLearner(tiny_model("llama", num_hidden_layers=3), config=LearnerConfig(**{**values, **changes}),
                            state_dir=state_dir)
    for seed in range(samples):
        learner.learn_one(_sample(seed))
    return learner


def _sample(seed: int, prompt: int = 4, completion: int = 6) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 101, (prompt + completion,), generator=generator).tolist()
    return Sample(prompt_ids=tuple(ids[:prompt]), completion_ids=tuple(ids[prompt:]), id=f"{seed}")


@pytest.mark.parametrize("mode", ["keep", "every 1"])
def test_in_any_unit_it_leaves_the_state_and_gives_everything_back(tiny_model: TinyModel, mode: str) -> None:
    whole, learner = (_learner(tiny_model) for _ in range(2))
    before, expert = learner.state_sha256(), learner.state.store.expert("default")
    masters, preflight = expert.factors, learner._updater.preflight
    budget = next(p.peak_bytes for p in preflight.footprint.plans(10, 6, host=False) if str(p) == mode)
    whole._updater.preflight.budget = budget
    units = list(whole.step(_sample(9)))
    assert ("recompute" in units) == (mode != "keep")
    for at, unit in enumerate(units):
        for operation in (1, 4):
            preflight.budget = budget
            work: Generator[str, None, Any] = learner.queue.drain() if learner.pending else learner.step(_sample(9))
            meter, failing = Meter(), Failing(operation)
            with meter:
                assert [next(work) for _ in range(at)] == units[:at]
                with failing:
                    done = next(work)
                first = meter.alive
            # a unit may have fewer operations
            if failing.left <= 0:
                # the update began anew: the inputs of the layers and the sink of the gradients are all there is
                assert done == units[0] == "plan"
                assert first <= preflight.footprint.fixed(10) + 4 * expert.layout.numel + 100
                assert preflight.budget == budget - 1
            work.close()
            assert learner.state_sha256() == before, f"after an error in unit {at}, {unit!r}"
            assert expert.factors is masters
            assert learner.attachment.binding.sinks == ()
            assert meter.alive == 0
    assert learner._updater.out_of_memory > len(units)
    learner.drain()
    assert learner.state_sha256() == whole.state_sha256() != before


def test_a_smaller_mode_goes_on_with_the_same_bits(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    whole, learner = (_learner(tiny_model) for _ in range(2))
    expected = whole.learn_one(_sample(9))
    assert (str(expected.activations), expected.out_of_memory) == ("keep", 0)
    with caplog.at_level(logging.WARNING), Failing(200):
        report = learner.learn_one(_sample(9))
    assert (report.status, report.cut, report.tokens, report.out_of_memory) == ("learned", 0, 10, 1)
    assert str(report.activations) == "every 1"
    assert report.loss == expected.loss
    assert learner.state_sha256() == whole.state_sha256()
    (line,) = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert "10 tokens" in line and "'keep'" in line and "again by 'every 1'" in line
    # it stays there, for samples that need as much
    assert str(learner.learn_one(_sample(10)).activations) == "every 1"
    assert str(learner.learn_one(_sample(11, 1, 1)).activations) == "keep"


def _recovered(tiny_model: TinyModel, learner: StreamLearner, folder: Path) -> str:
    """Hash of the state that the journal gives, where there is memory enough."""
    learner.close()
    again = StreamLearner.load_state(folder, tiny_model("llama", num_hidden_layers=3))
    found = again.state_sha256()
    assert again.pending == 0
    again.close()
    return found


def test_half_of_the_prompt_after_the_smallest_mode(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = _learner(tiny_model, tmp_path / "state")
    with _room_for(12), caplog.at_level(logging.WARNING):
        report = learner.learn_one(_sample(9, 16, 6))
    # 22 tokens, then 14, then 10
    assert (report.status, report.tokens, report.cut) == ("learned", 10, 12)
    assert report.out_of_memory >= 3 + 1
    assert sum("with half of the prompt" in record.getMessage() for record in caplog.records) == 2
    # what is rehearsed later is what was learned
    slots = [learner.state.ring.get(slot) for slot in learner.state.ring.pending()]
    assert [*slots[-1].ids] == [*(_sample(9, 16, 6).prompt_ids or ())[12:], *(_sample(9, 16, 6).completion_ids or ())]
    assert learner.learn_one(_sample(10)).status == "learned"
    state = learner.state_sha256()
    assert _recovered(tiny_model, learner, tmp_path / "state") == state


def test_a_completion_that_fits_in_no_way_is_rejected(tiny_model: TinyModel, tmp_path: Path) -> None:
    learner = _learner(tiny_model, tmp_path / "state")
    version, masters = learner.version, learner.state.store.expert("default").factors
    with _room_for(12):
        report = learner.learn_one(_sample(9, 5, 12))
        assert (report.status, report.loss) == ("rejected", None)
        assert report.reason == "there is no memory for the 12 tokens of the completion alone: free some, or split it"
        assert learner.version == version and learner.state.store.expert("default").factors is masters
        assert learner.learn_one(_sample(10)).status == "learned"
    state = learner.state_sha256()
    assert _recovered(tiny_model, learner, tmp_path / "state") == state


@pytest.mark.parametrize("snapshot_every", [100, 1])
def test_old_samples_are_shortened_too_and_only_in_that_update(
    tiny_model: TinyModel, tmp_path: Path, snapshot_every: int
) -> None:
    """A new sample that fits, and then a replayed one that does not: the journal tells which of them was cut."""
    learner = _learner(tiny_model, tmp_path / "state", samples=0, replay_every=2, snapshot_every=snapshot_every)
    learner.learn_one(_sample(0, 30, 6))
    with _room_for(24):
        report = learner.learn_one(_sample(1, 18, 6))
        assert (report.status, report.cut, report.tokens) == ("learned", 0, 24)
        assert report.out_of_memory > 0
    state = learner.state_sha256()
    assert [len(learner.state.ring.get(slot).ids) for slot in range(2)] == [36, 24]
    assert _recovered(tiny_model, learner, tmp_path / "state") == state


@pytest.mark.parametrize("tokens", [20, 10, 5])
def test_a_stream_with_rehearsals_and_a_consolidation_goes_on(
    tiny_model: TinyModel, tmp_path: Path, tokens: int
) -> None:
    learner = _learner(tiny_model, tmp_path / "state", snapshot_every=3)
    learner.learn_batch([_sample(20, 30, 9)])
    with _room_for(tokens):
        reports = learner.learn_batch([_sample(30 + n, 3 + 7 * n, 3) for n in range(4)])
        assert len(reports) == 4 and {report.status for report in reports} == {"learned"}
        assert [report.tokens for report in reports] == [min(report.tokens, tokens) for report in reports]
        rehearsed = learner.consolidate(5)
        assert rehearsed.updates == 5
    assert learner.pending == 0
    state = learner.state_sha256()
    assert _recovered(tiny_model, learner, tmp_path / "state") == state


def test_killed_after_the_record_of_a_cut_and_before_the_update(tiny_model: TinyModel, tmp_path: Path) -> None:
    learner, whole = (_learner(tiny_model, tmp_path / name) for name in ("a", "b"))
    with _room_for(12):
        whole.learn_one(_sample(9, 16, 6))
        work = learner.step(_sample(9, 16, 6))
        # until the first layer of the shortened sample has run
        assert next(unit for unit in work if unit == "forward")
        work.close()
    assert learner.pending > 1
    state = whole.state_sha256()
    assert _recovered(tiny_model, learner, tmp_path / "a") == state
    whole.close()


def test_a_lesson_is_cut_behind_its_first_id_where_that_is_the_bos() -> None:
    lesson = Lesson((1, 5, 6, 7, 8, 9), 4, again=True)
    assert lesson.within(None, 1) is lesson.within(6, 1) is lesson
    # what was asked stays known whole
    asked = (1, 5, 6, 7)
    assert lesson.within(4, 1) == Lesson([1, 7, 8, 9], 2, again=True, asked=asked)
    assert lesson.within(4, 0) == Lesson([6, 7, 8, 9], 2, again=True, asked=asked)
    assert lesson.within(3, 1) == lesson.within(4, 1).within(3, 1) == Lesson([1, 8, 9], 1, again=True, asked=asked)
    refused = lesson.within(2, 1)
    assert refused.refusal is not None and "2 tokens of the completion" in refused.refusal


# before it starts


def test_a_prompt_over_the_budget_is_cut_before_it_is_acknowledged(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=3, vocab_size=5003, max_position_embeddings=1024)
    config = LearnerConfig(warm_start=False, activation_budget_mib=2, loss_chunk=16)
    learner = StreamLearner(model, config=config, state_dir=tmp_path)
    report = learner.learn_one(_sample(0, 900, 9))
    assert report.status == "learned" and 0 < report.tokens < 909 == report.tokens + report.cut
    assert report.activations is not None and report.activations.peak_bytes <= 2 * 2**20
    (record,) = (r for r in learner._applier.folder.records(0) if r["kind"] == "sample")
    assert (len(record["ids"]), record["cut"]) == (report.tokens, report.cut)
    assert record["prompt_length"] == report.tokens - 9
    # one line that says the bytes and the remedy
    with pytest.raises(SampleError, match=r"800 tokens, which need \d{7} bytes .* budget of 2097152; set a.* to 4 "):
        learner.learn_one(_sample(1, 5, 800))
    (refused,) = learner.learn_batch([_sample(2, 5, 800)], refuse=True)
    assert refused.status == "rejected" and "activation_budget_mib" in (refused.reason or "")
    learner.close()


@pytest.mark.parametrize("learned", [False, True], ids=["no growth", "growth"])
def test_what_a_version_needs_is_taken_before_masters_change(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    whole, learner = (_learner(tiny_model, learned_below=6.0 if learned else 1e-9) for _ in range(2))
    columns = learner.state.protection.columns
    reserve = AdapterStore.reserve
    states: list[str] = []

    def full(self: AdapterStore, experts: Sequence[Expert]) -> Any:
        if len(states) == 1:
            return reserve(self, experts)
        states.append(learner.state_sha256())
        raise torch.OutOfMemoryError("injected")

    def after(self: AdapterStore, version: int | None = None) -> Any:
        raise AssertionError("built when the masters had changed")

    samples, before = [_sample(9), _sample(1)], learner.state_sha256()
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "reserve", full)
        patch.setattr(AdapterStore, "publish", after)
        learner.learn_batch(samples)
    whole.learn_batch(samples)
    assert states == [before]
    assert learner.state_sha256() == whole.state_sha256()
    assert (learner.state.protection.columns > columns) == learned


@pytest.mark.parametrize("room", [8, 40])
def test_with_a_time_budget_what_cannot_be_measured_is_learned_all_the_same(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Not even 16 tokens fit, or 16 and not 64, the lengths that the time budget measures."""
    learner = _learner(tiny_model, samples=0)

    def run(call: LayerCall, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] > room:
            raise torch.OutOfMemoryError("injected")
        return run_layer(call, hidden)

    monkeypatch.setattr(pacer, "run_layer", run)
    learner.update_budget_ms = 1e6
    with _room_for(room):
        report = learner.learn_one(_sample(0, prompt=2))
    assert report.status == "learned" and report.tokens == 8
    # without a measurement there is no choice to tell of
    assert (report.pace is None) == (room < 16)
