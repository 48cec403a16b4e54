"""Saved versions: continued bit for bit, copied, returned to."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import ConfigError, Sample, StateError, StreamLearner
from ogpstream.memory import journal
from ogpstream.memory.adapters import AdapterStore

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]
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


def _masters(learner: StreamLearner, name: str = "default") -> list[Tensor]:
    expert = learner.state.store.expert(name)
    return [expert.factors, *(part for held in expert.held for part in (held.U, held.V))]


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


def _history_of_default(learner: StreamLearner, numbers: range) -> None:
    for number in numbers:
        learner.learn_one(_sample(number, id=str(number)))


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
    with pytest.raises(ConfigError, match="no version 999"):
        learner.rollback(999)
    if folder is not None:
        entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in entries] == [str(number) for number in range(3, 8)]


def test_rollback_to_a_snapshot_made_within_a_sample(make: MakeLearner, tmp_path: Path) -> None:
    """The automatic snapshots are: the sample whose update caused one is in it, and is not undone."""
    learner = make(tmp_path / "state", snapshot_every=3)
    _history_of_default(learner, range(5))
    learner.rollback(learner.versions()[-1])
    status = learner.status()
    assert (status["learned"], status["quarantined"]) == (3, 2)
    entries = [json.loads(line) for line in (tmp_path / "state" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == ["3", "4"]


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_rollback_with_samples_that_wait(make: MakeLearner, tmp_path: Path, where: str) -> None:
    """They save versions of their own; in memory nothing keeps the one to return to, and the learner goes on."""
    learner = make(tmp_path / "state" if where == "folder" else None, snapshot_every=1)
    learner.learn_one(_sample(0))
    good = learner.version
    for seed in range(1, 4):
        learner.accept(_sample(seed))
    if where == "memory":
        with pytest.raises(ConfigError, match=f"^no version {good} to return to: there are "):
            learner.rollback(good)
    else:
        learner.rollback(good)
    learned = 4 if where == "memory" else 1
    assert (learner.pending, learner.state.counters.learned) == (0, learned)
    assert learner.learn_one(_sample(4)).status == "learned"


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


def test_a_rollback_that_cannot_be_written_down_changes_nothing(make: MakeLearner, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three entries fails once; done again it ends as one that did not fail."""
    ends = []
    for broken in (False, True):
        learner = make(state_dir=tmp_path / str(broken))
        for seed in range(5):
            learner.learn_one(_sample(seed, id=f"s{seed}"))
            if seed == 1:
                learner.save_state()
                good = learner.version
        folder, calls = learner._applier.folder, []
        write = folder.quarantine

        def once(entry: Any, calls: list[int] = calls, write: Any = write, broken: bool = broken) -> None:
            calls.append(entry["seq"])
            if broken and len(calls) == 2:
                raise OSError(28, "No space left on device")
            write(entry)

        monkeypatch.setattr(folder, "quarantine", once)
        if broken:
            before = learner.state_sha256(), learner.version
            with pytest.raises((OSError, StateError)):
                learner.rollback(good)
            assert (learner.state_sha256(), learner.version) == before
            learner.drain()
        else:
            learner.rollback(good)
        lines = (tmp_path / str(broken) / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["s2", "s3", "s4"]
        ends.append((learner.state_sha256(), learner.version, learner.state.counters.quarantined))
        learner.close()
    assert ends[0] == ends[1]


def _no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


def _counting(made: list[Any]) -> Any:
    reserve = AdapterStore.reserve

    def counted(store: AdapterStore, experts: Any) -> Any:
        made.append(store)
        return reserve(store, experts)

    return counted


def test_a_rollback_without_memory_changes_nothing_and_is_made_later(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for broken in (False, True):
        learner = make(state_dir=tmp_path / str(broken))
        learner.learn_one(_sample(0, id="s0"))
        learner.save_state()
        good = learner.version
        for seed in range(1, 4):
            learner.learn_one(_sample(seed, id=f"s{seed}"))
        if broken:
            before, served = learner.state_sha256(), learner.attachment.binding.served
            with monkeypatch.context() as patch:
                patch.setattr(AdapterStore, "reserve", _no_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    learner.rollback(good)
            assert learner.state_sha256() == before and learner.attachment.binding.served is served
            assert learner.state.store.served is served
            learner.drain()
        else:
            with monkeypatch.context() as patch:
                patch.setattr(AdapterStore, "reserve", _counting(made := []))
                learner.rollback(good)
            # one version beside the served one, as in an update
            assert len(made) == 1
        ends.append((learner.state_sha256(), learner.version, learner.state.counters))
        learner.close()
        again = StreamLearner.load_state(tmp_path / str(broken), tiny_model("llama", num_hidden_layers=1))
        assert (again.state_sha256(), again.version, again.state.counters) == ends[-1]
        again.close()
    assert ends[0] == ends[1]


def test_experts_change_without_memory_or_not_at_all(make: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make()
    learner.add_expert("law")
    learner.learn_one(_sample(0))
    before, served = learner.state_sha256(), learner.attachment.binding.served
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "reserve", _no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            learner.activate({"law": 1.0})
    assert learner.state_sha256() == before and learner.attachment.binding.served is served
    assert list(learner.state.store.active) == ["default"]
    learner.drain()
    assert list(learner.state.store.active) == ["law"] == list(learner.attachment.binding.served.experts)


def test_a_quarantine_that_failed_once_is_written_the_next_time(make: MakeLearner, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(state_dir=tmp_path)
    folder, sync = learner._applier.folder, os.fsync
    write = folder.quarantine

    def failing(entry: Any) -> None:
        monkeypatch.setattr(folder, "quarantine", write)
        monkeypatch.setattr(os, "fsync", _full)
        try:
            write(entry)
        finally:
            monkeypatch.setattr(os, "fsync", sync)

    monkeypatch.setattr(folder, "quarantine", failing)
    with pytest.raises((OSError, StateError)):
        learner.learn_one(Sample(prompt_ids=(5, 6), completion_ids=(7,), label=False))
    assert learner.state.counters.acknowledged == 0
    learner.drain()
    assert learner.state.counters.quarantined == learner.state.counters.acknowledged == 1
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    learner.close()


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
