"""`bench update` and `bench vram`: the fields that scripts rely on, equal work of all ways, and wrong use."""

import csv
import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ogpstream.learner import LearnerConfig
from ogpstream.memory.units import exhausted
from ogpstream.profiling.bench import register
from ogpstream.profiling.update_providers import Work, providers
from ogpstream.profiling.vram import llama_config

FIELDS = {
    "learner_state_bytes", "resident_state_bytes", "serving_copy_bytes", "shadow_bytes", "scope_bytes",
    "total_learning_vram_bytes", "activation_peak_bytes", "ours_ms_p50", "choice", "device",
}  # fmt: skip
TIMES = {"peft_ms_p50", "floor_ms_p50", "ratio_vs_peft", "ratio_vs_floor", "yield_ms_p99"}


def _app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_bench_update(tmp_path: Path) -> None:
    run = CliRunner().invoke(_app(), [
        "bench", "update", "--device", "cpu", "--layers", "2", "--width", "64", "--vocabulary", "200", "--tokens", "16",
        "--rows", "4", "--turns", "1", "--sweep", "L", "--out", str(tmp_path), "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout.splitlines()[-1])
    assert values.keys() >= FIELDS | TIMES
    assert values["device"] == "cpu" and values["choice"] == "keep"
    assert [(row["sweep"], row["rows"], row["L"]) for row in values["rows"]] == [
        ("base", 4, 2), ("all supervised", 15, 2), ("L", 4, 1), ("L", 4, 2)]
    for row in values["rows"]:
        assert row["ratio_vs_peft"] == pytest.approx(row["ours_ms_p50"] / row["peft_ms_p50"])
        assert 0 < row["yield_ms_p99"] < 1e4
    with open(tmp_path / "update.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 and all(line["torch"] == torch.__version__ and line["transformers"] for line in lines)
    assert values["torch"] == torch.__version__ and values["command"].startswith("ogpstream")
    assert "4 of 4: T 16, L 2, 4 supervised" in run.stderr
    assert (tmp_path / "update.png").stat().st_size > 5000


def test_bench_vram(tmp_path: Path) -> None:
    run = CliRunner().invoke(_app(), [
        "bench", "vram", "--layers", "1", "--width", "64", "--tokens", "16", "--sweep", "experts", "--out",
        str(tmp_path), "--json",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout.splitlines()[-1])
    assert values.keys() >= FIELDS | TIMES and not any(values[name] for name in TIMES)
    assert [row["experts"] for row in values["rows"]] == [8, 2, 8, 32]
    assert len({row["learner_state_bytes"] for row in values["rows"]}) == 1
    parts = ("learner_state_bytes", "activation_peak_bytes", "scope_bytes")
    assert values["total_learning_vram_bytes"] == sum(values[part] for part in parts)
    with open(tmp_path / "vram.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    # bytes of a device that is not there, by these versions
    assert {line["device"] for line in lines} == {values["device"]} and lines[0]["torch"] == torch.__version__
    assert "2 of 4: experts" in run.stderr
    assert (tmp_path / "vram.png").stat().st_size > 5000


@pytest.mark.parametrize(("words", "status", "message"), [
    (["update", "--device", "tpu"], 2, "--device is 'tpu': use cpu or cuda"),
    (["update", "--device", "cpu", "--tokens", "8", "--rows", "8"], 2, "--rows is 8: at most 7 of 8 tokens"),
    (["update", "--device", "cpu", "--width", "100"], 2, "--width is 100: use a multiple of 64"),
    (["vram", "--sweep", "rank"], 2, "--sweep rank is unknown: use T, L, experts, m, updates or none"),
    (["vram", "--table", "/nowhere/page.md"], 1, "No such file"),
])
def test_wrong_use_is_one_line(words: list[str], status: int, message: str) -> None:
    run = CliRunner().invoke(_app(), ["bench", *words])
    assert run.exit_code == status
    assert message in run.stderr and "Traceback" not in run.stderr


def test_both_ways_make_the_same_update() -> None:
    """PEFT's A is ours when it starts from ours, at one step of Adam and one projection."""
    torch.manual_seed(0)
    config = LearnerConfig(rank=3, lr=1e-2, eps=1e-8, basis_columns=8)
    model = AutoModelForCausalLM.from_config(llama_config(layers=2, width=64, inner=96, heads=2, key_heads=2,
                                                          vocabulary=101)).eval()
    ours, peft = providers(model, config)
    expert = ours.state.store.expert("expert0")
    slab = expert.factors.clone()
    slab[expert.layout.a_numel :].normal_(0, 0.1)
    exhausted(ours.state.protection.project_(expert.layout, slab))
    expert.factors = slab
    ours.updater.publish()
    linears = {name: module for name, module in peft.model.base_model.model.named_modules()
               if name in ours.bases()}
    with torch.no_grad():
        for index, site in enumerate(ours.attachment.sites):
            linears[site.shape.name].lora_A["default"].weight.copy_(expert.a(index).T)
            linears[site.shape.name].lora_B["default"].weight.copy_(expert.b(index).T)
    work = Work.random(101, 24, 10)
    ours.update(work)
    peft.update(work)
    after = ours.state.store.expert("expert0")
    for index, site in enumerate(ours.attachment.sites):
        B, theirs = after.b(index), linears[site.shape.name].lora_B["default"].weight.detach().T
        assert float((B - theirs).norm()) <= 1e-3 * float((B - expert.layout.b(slab, index)).norm())
        rows = ours.bases()[site.shape.name]
        for A in (after.a(index), linears[site.shape.name].lora_A["default"].weight.detach().T):
            assert float((rows @ A).abs().max()) <= 1e-5


def test_kept_logits_give_the_same_gradient() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(layers=1, width=64, inner=96, heads=2, key_heads=2,
                                                          vocabulary=101)).eval()
    _, peft = providers(model, LearnerConfig(rank=2, basis_columns=4))
    before = {name: p.detach().clone() for name, p in peft.model.named_parameters() if p.requires_grad}
    moved = []
    for kept in (False, True):
        peft.optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in peft.model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
        peft.update(Work.random(101, 24, 10), kept=kept)
        moved.append({name: p.detach().clone() for name, p in peft.model.named_parameters() if p.requires_grad})
    for name in before:
        assert torch.allclose(moved[0][name], moved[1][name], atol=1e-5), name
