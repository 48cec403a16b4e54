"""Adapters that plain PEFT reads back to the same function, and adapters of plain PEFT read here."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from ogpstream.learner.errors import ModelError, OgpStreamError, StateError
from ogpstream.learner.peft_io import ImportedAdapter, export_adapter, read_adapter
from ogpstream.learner.sites import Attachment, attach
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Held

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


TinyModel = Callable[..., tf.PreTrainedModel]


@pytest.fixture(params=["llama", "qwen3", "mistral", "gemma", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model("llama")


def _ids() -> Tensor:
    return torch.randint(4, 101, (2, 7), generator=torch.Generator().manual_seed(1))


def _serve(attachment: Attachment) -> list[tuple[Tensor, Tensor]]:
    """Serve one expert with held parts of unequal ranks; returns its factors as an export wants them."""
    generator = torch.Generator().manual_seed(2)
    store = AdapterStore(attachment.shapes)
    store.create("default", 3, 2.0, 0.1 * torch.randn(store.layout(3).numel, generator=generator))
    expert = store.expert("default")
    expert.held = [
        Held(
            torch.randn(s.d_in, i % 4, generator=generator) * 0.1,
            torch.randn(i % 4, s.d_out, generator=generator),
        )
        for i, s in enumerate(attachment.shapes)
    ]
    store.activate("default")
    attachment.binding.served = store.publish()
    return [
        (torch.cat((expert.a(i), held.U), 1), torch.cat((expert.scaling * expert.b(i), held.V)))
        for i, held in enumerate(expert.held)
    ]


def _export(folder: Path, model: tf.PreTrainedModel, attachment: Attachment, **more: Any) -> None:
    export_adapter(
        folder, model=model, attachment=attachment, factors=_serve(attachment), base_model_name="some/base", **more
    )


def _train(folder: Path, model: tf.PreTrainedModel, config: LoraConfig | IA3Config) -> Tensor:
    """What plain PEFT trained, here random weights; saves it and returns its logits."""
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        logits: Tensor = adapted(_ids()).logits
    adapted.save_pretrained(str(folder))
    return logits


def _adopt(attachment: Attachment, adapter: ImportedAdapter) -> AdapterStore:
    store = AdapterStore(attachment.shapes)
    layout = store.layout(adapter.rank)
    slab = torch.zeros(layout.numel)
    for index, factors in enumerate(adapter.factors):
        if factors is not None:
            layout.a(slab, index).copy_(factors[0])
            layout.b(slab, index).copy_(factors[1])
    store.create("imported", adapter.rank, adapter.scaling, slab)
    store.activate("imported")
    attachment.binding.served = store.publish()
    return store


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_plain_peft_loads_the_export(
    model: tf.PreTrainedModel, targets: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fresh, random_state = copy.deepcopy(model), torch.get_rng_state()
    base = model(_ids()).logits
    attachment = attach(model, rank=3, target_modules=targets)
    _export(tmp_path / "out", model, attachment)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    ours = model(_ids()).logits
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "out"))
    theirs = loaded(_ids()).logits
    assert (ours - base).abs().max() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5
    config = loaded.peft_config["default"]
    assert config.base_model_name_or_path == "some/base"
    assert config.r == config.lora_alpha == 3 + min(3, len(attachment.sites) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_imported_again(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    _export(tmp_path / "out", llama, attachment)
    expected = llama(_ids()).logits
    adapter = read_adapter(tmp_path / "out", attachment)
    assert (adapter.rank, adapter.scaling) == (6, 1.0)
    _adopt(attachment, adapter)
    assert (llama(_ids()).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_plain_peft_is_imported(
    model: tf.PreTrainedModel, rslora: bool, tmp_path: Path
) -> None:
    attachment = attach(model, rank=3)
    targets = attachment.target_modules
    attachment.detach()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    expected = _train(tmp_path, model, config)
    attachment = attach(model, rank=3, target_modules="all-linear")
    adapter = read_adapter(tmp_path, attachment)
    assert (adapter.rank, adapter.scaling) == (4, 3.0 if rslora else 1.5)
    trained = {s.name for s in attachment.shapes if s.name.rpartition(".")[2] in targets}
    have = {s.name for s, f in zip(attachment.shapes, adapter.factors, strict=True) if f is not None}
    assert have == trained
    _adopt(attachment, adapter)
    assert (model(_ids()).logits - expected).abs().max() <= 1e-5


def test_patterns_become_one_rank_and_one_scaling(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
        alpha_pattern={"v_proj": 1, "layers.0.self_attn.q_proj": 7},
    )
    expected = _train(tmp_path, llama, config)
    attachment = attach(llama, rank=3, target_modules=ALL)
    adapter = read_adapter(tmp_path, attachment)
    assert (adapter.rank, adapter.scaling) == (6, 4.0)
    assert all(f is not None and f[0].shape[1] == f[1].shape[0] == 6 for f in adapter.factors)
    _adopt(attachment, adapter)
    assert (llama(_ids()).logits - expected).abs().max() <= 1e-5


def test_an_adapter_is_replaced_and_a_failed_export_keeps_it(
    llama: tf.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    folder = tmp_path / "out"
    folder.mkdir()
    _export(folder, llama, attachment, about="expert `law` of version 3")
    card = (folder / "README.md").read_text()
    facts = ("some/base", "expert `law` of version 3", "PeftModel.from_pretrained", *attachment.target_modules)
    for fact in (*facts, f"rank {json.loads((folder / 'adapter_config.json').read_text())['r']}:"):
        assert fact in card
    with pytest.raises(StateError, match="holds an adapter already.*--force"):
        _export(folder, llama, attachment)
    (folder / "kept").mkdir()
    (folder / "kept" / "notes.txt").write_text("mine")
    _export(folder, llama, attachment, about="expert `law` of version 4", replace=True)
    assert "version 4" in (folder / "README.md").read_text()
    assert (folder / "kept" / "notes.txt").read_text() == "mine"
    before = _files(folder)

    def moving_all_but(*failing: str) -> Callable[[Path, Path], Path]:
        def move(self: Path, target: Path) -> Path:
            if (self.parent.name, self.name) == failing:
                raise OSError(28, "No space left on device")
            os.replace(self, target)
            return target

        return move

    for failing in (("out", "adapter_config.json"), ("out", "adapter_model.safetensors"),
                    ("new", "adapter_model.safetensors"), ("new", "adapter_config.json"), ("new", "README.md")):
        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(Path, name, moving_all_but(*failing))
            with pytest.raises(StateError, match="cannot write the adapter to .*out: No space left"):
                _export(folder, llama, attachment, about="expert `law` of version 5", replace=True)
        assert _files(folder) == before
    # a folder of this name is nothing of ours
    (folder / "adapter_model.safetensors").rename(folder / "elsewhere")
    (folder / "adapter_model.safetensors").mkdir()
    (folder / "adapter_model.safetensors" / "notes.txt").write_text("mine")
    before = _files(folder)
    with pytest.raises(StateError, match="cannot write the adapter to .*out: Is a directory"):
        _export(folder, llama, attachment, replace=True)
    assert _files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_while_an_adapter_is_replaced_leaves_a_whole_one_or_none(
    llama: tf.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    folder, fresh = tmp_path / "out", tmp_path / "fresh"
    _export(folder, llama, attachment, about="an older one")
    # of another rank, so that old and new files do not go together
    _edit_config(folder, r=7)
    (folder / "notes.txt").write_text("mine")
    _export(fresh, llama, attachment)
    old, new = _files(folder), {**_files(fresh), "notes.txt": b"mine"}
    copies: list[Path] = []

    def copied(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def wrapped(self: Path, target: Path) -> Path:
            moved = move(self, target)
            copies.append(Path(shutil.copytree(folder, tmp_path / str(len(copies)))))
            return moved

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, copied(getattr(Path, name)))
        _export(folder, llama, attachment, replace=True)
    assert _files(folder) == new and len(copies) == 5
    for copy_ in copies:
        left = _files(copy_)
        assert left["notes.txt"] == b"mine"
        if "adapter_config.json" in left:
            assert {**left, "README.md": b""} in ({**old, "README.md": b""}, {**new, "README.md": b""})
        # it is known for what an export has left
        with pytest.raises(StateError, match="holds an adapter already.*--force"):
            _export(copy_, llama, attachment)
        _export(copy_, llama, attachment, replace=True)
        assert _files(copy_) == new


def test_the_card_of_somebody_else_stays(
    llama: tf.PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    _export(tmp_path / "out", llama, attachment)
    _export(tmp_path / "theirs", llama, attachment)
    with open(tmp_path / "theirs" / "README.md", "a") as card:
        card.write("Measured by me: 0.7.\n")
    _edit_config(tmp_path / "theirs", r=7)
    wanted = {**_files(tmp_path / "out"), "README.md": (tmp_path / "theirs" / "README.md").read_bytes()}
    _export(tmp_path / "theirs", llama, attachment, replace=True)
    assert _files(tmp_path / "theirs") == wanted
    assert "theirs/README.md is not as it was exported: it stays" in caplog.text


def test_an_export_goes_through_a_link(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for replace in (False, True):
        _export(tmp_path / "link", llama, attachment, replace=replace)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "adapter_config.json").is_file()


def test_an_export_never_overwrites_something_else(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    attachment = attach(llama, rank=3, target_modules=ALL)
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(StateError, match="exists and is no PEFT adapter: choose another folder"):
            _export(folder, llama, attachment)
    with pytest.raises(StateError, match="cannot write the adapter to .*; choose another folder"):
        _export(tmp_path / "notes.txt" / "out", llama, attachment)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), StateError, "holds no PEFT adapter: give a folder with adapter_config"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), StateError, "holds no PEFT adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{"), StateError, "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ModelError, "of type None: import"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk"), StateError, "cannot be read"),
        (lambda f: _edit_config(f, use_dora=True), ModelError, "uses use_dora: import a plain LoRA"),
        (lambda f: _edit_config(f, bias="all"), ModelError, "uses bias='all'"),
        (lambda f: _edit_config(f, modules_to_save=["lm_head"]), ModelError, "uses modules_to_save"),
        (lambda f: _edit_config(f, init_lora_weights="pissa"), ModelError, "init_lora_weights='pissa'"),
        (
            lambda f: _edit_weights(f, lambda w: w.pop(f"{Q}.lora_B.weight")),
            StateError,
            "lacks A or B of model",
        ),
        (lambda f: _edit_weights(f, lambda w: w.clear()), StateError, "lacks A or B of all linears"),
        (
            lambda f: _edit_weights(f, lambda w: w[f"{Q}.lora_A.weight"].fill_(torch.nan)),
            StateError,
            "non-finite values in .*q_proj.lora_A.weight",
        ),
        (
            lambda f: _edit_weights(f, lambda w: w.update({f"{Q}.lora_A.weight": torch.zeros(4, 47)})),
            ModelError,
            "which is 48 to 48: use the base model that it was trained on",
        ),
        (
            lambda f: _edit_weights(f, lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.zeros(4)})),
            ModelError,
            "import a LoRA on linears only",
        ),
        (
            lambda f: _edit_weights(
                f,
                lambda w: w.update(
                    {k.replace("q_proj", "up_proj"): v + 0 for k, v in w.items() if "q_" in k}
                ),
            ),
            ModelError,
            "adapts 2 linears that this learner does not, such as model.layers.0.self_attn.up_proj: "
            "set target_modules to q_proj, up_proj, v_proj",
        ),
    ],
)
def test_import_refusals(
    llama: tf.PreTrainedModel,
    spoil: Callable[[Path], object],
    error: type[OgpStreamError],
    message: str,
    tmp_path: Path,
) -> None:
    _train(tmp_path / "in", llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    attachment = attach(llama, rank=3)
    spoil(tmp_path / "in")
    with pytest.raises(error, match=message) as caught:
        read_adapter(tmp_path / "in", attachment)
    assert "\n" not in str(caught.value)


def test_another_kind_of_adapter_is_refused(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    _train(tmp_path, llama, config)
    with pytest.raises(ModelError, match="of type .*IA3: import a LoRA"):
        read_adapter(tmp_path, attach(llama, rank=3))


def test_a_model_that_its_configuration_does_not_describe(llama: tf.PreTrainedModel, tmp_path: Path) -> None:
    llama.model.layers.append(copy.deepcopy(llama.model.layers[0]))
    attachment = attach(llama, rank=3, target_modules=ALL)
    with pytest.raises(ModelError, match="has other linears than the model itself .*layers.2"):
        _export(tmp_path / "out", llama, attachment)
    assert not list(tmp_path.iterdir())
