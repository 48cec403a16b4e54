"""Experts by name: trained and served apart, and as adapters of PEFT."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from ogpstream.learner import Sample, SampleReport, StateError, StreamLearner
from ogpstream.learner.errors import ConfigError

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
            patch.setattr(learner._updater.judge, "_vocabulary", 1.0001)
            assert learner.learn_one(_sample(9, "second")).status == "rejected"
    assert (store.active, tuple(store.active), store.served) == (active, tuple(active), served)
    assert torch.equal(_logits(learner.model), logits)
    assert all(map(torch.equal, _masters(learner, "second"), masters))
    report = learner.drain() if ends == "aborted" else learner.learn_one(_sample(9, "second"))
    assert isinstance(report, SampleReport)
    assert (report.status, report.version, tuple(store.active)[-1]) == ("learned", served.version + 1, "second")


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


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _named(*names: str) -> set[str]:
    """The files of adapters in folders of these names."""
    return {str(Path(name, file)) for name in names
            for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")}


def test_a_replaced_export_leaves_all_that_is_not_ours(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
                                                       ) -> None:
    out = tmp_path / "adapters"
    earlier = make()
    for name in ("law", "cut", "changed", "noted", "linked"):
        earlier.add_expert(name)
    earlier.export_experts(out)
    ours = _named("", "law", "cut", "changed", "noted", "linked")
    assert set(_files(out)) == ours
    (out / "notes.txt").write_text("mine")
    (out / "eval").mkdir()
    (out / "eval" / "scores.json").write_text("{}")
    own = get_peft_model(tiny_model("llama", num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    own.save_pretrained(out / "my-own")
    shutil.copytree(out / "law", out / "a-copy")
    (out / "law" / "notes.txt").write_text("of law")
    # what somebody has done to an export since is theirs
    shutil.copy(out / "my-own" / "adapter_model.safetensors", out / "changed")
    with open(out / "noted" / "README.md", "a") as card:
        card.write("It did well.\n")
    (out / "linked").rename(tmp_path / "linked")
    (out / "linked").symlink_to(tmp_path / "linked")
    before, linked = _files(out), _files(tmp_path / "linked")

    learner = make()
    learner.add_expert("law")
    learner.learn_one(_sample(0))
    learner.export_experts(out, replace=True)
    after = _files(out)
    assert set(after) == set(before) - _named("cut") and not (out / "cut").exists()
    replaced = {name for name in after if after[name] != before[name]}
    assert replaced <= _named("", "law") and "adapter_model.safetensors" in replaced
    assert _files(tmp_path / "linked") == linked

    make().export_experts(out, replace=True)
    assert set(_files(out)) == set(after) - _named("law")
    assert (out / "law" / "notes.txt").read_text() == "of law"


def test_an_old_export_that_cannot_be_removed_is_told(make: MakeLearner, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = make()
    earlier.add_expert("law")
    earlier.export_experts(tmp_path / "out")
    unlink = Path.unlink

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "law":
            raise OSError(13, "Permission denied")
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(StateError, match="cannot remove .*law, an earlier export: Permission denied"):
            make().export_experts(tmp_path / "out", replace=True)
