"""The tables of `docs/memory.md`: bytes of an update by the widths of a linear, and of whole models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import LlamaConfig

from ogpstream.learner import LearnerConfig
from ogpstream.profiling.vram import Usage, llama_config, measure_update

HELD = LearnerConfig().held_rank or 32
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


class Linear(NamedTuple):
    """One adapted linear: D_in, D_out, r of one expert, and T of the sample."""

    d_in: int
    d_out: int
    rank: int
    tokens: int


# square ones at three widths and ranks, Llama's k_proj, up_proj and down_proj
LINEARS = (
    Linear(2048, 2048, 8, 1024), Linear(2048, 2048, 8, 256), Linear(2048, 2048, 16, 1024), Linear(2048, 256, 8, 1024),
    Linear(2048, 5632, 8, 1024), Linear(5632, 2048, 8, 1024), Linear(1024, 1024, 8, 1024), Linear(4096, 4096, 8, 1024),
    Linear(4096, 14336, 8, 1024), Linear(14336, 4096, 8, 1024),
)  # fmt: skip

MODELS: dict[str, tuple[LlamaConfig, dict[str, Any]]] = {
    "specification, 22 layers": (llama_config(layers=22), dict(target_modules=("o_proj",))),
    "specification, 32 layers": (llama_config(layers=32), dict(target_modules=("o_proj",))),
    "TinyLlama-1.1B, q and o": (llama_config(layers=22), dict(target_modules=("q_proj", "o_proj"))),
    "TinyLlama-1.1B, default targets": (llama_config(layers=22), {}),
}


def linear_row(linear: Linear) -> str:
    """The row of one linear: R packed columns of an expert, and bytes."""
    d_in, d_out, rank, tokens = linear
    lean = {optimizer: _one_layer(linear, optimizer).learning_state for optimizer in ("adam", "sgd")}
    # with a held part of the default rank, in multiples of 16
    columns = -(-(rank + HELD) // 16) * 16
    values = (d_in, d_out, rank, columns, tokens, lean["adam"], lean["sgd"], 12 * rank * (d_in + d_out),
              2 * columns * (d_in + d_out))
    return "| " + " | ".join(f"{value:,}" if value > 99_999 else str(value) for value in values) + " |"


def model_row(name: str) -> str:
    """The row of one model: MB of learning state, MiB of activations and of the serving copies."""
    architecture, changes = MODELS[name]
    lean, resident = (measure_update(architecture, LearnerConfig(**changes, learning_state=mode), tokens=1024, rows=512)
                      for mode in ("lean", "resident"))
    return (f"| {name} | {lean.learning_state / 1e6:.2f} MB | {resident.learning_state / 2**20:.1f} MiB | "
            f"{lean.activations / 2**20:.0f} MiB, {lean.choice} | {lean.serving_copy / 2**20:.1f} MiB |")


def tables() -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each table."""
    yield "linears", [
        "| D_in | D_out | r | R | T | lean, Adam | lean, SGD | resident, one expert | serving copy, one expert |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(linear_row, LINEARS),
    ]
    yield "models", [
        "| model, T 1024, 512 supervised | lean, Adam | resident, Adam | activations | serving copies, two experts |",
        "|---|---|---|---|---|",
        *map(model_row, MODELS),
    ]


def fill(page: str) -> str:
    """The page with its tables made anew, each between its two comments."""
    for name, lines in tables():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not (begin and end):
            raise ValueError(f"the page has no place for the table {name!r}: put {BEGIN.format(name)} and "
                             f"{END.format(name)} there")
        page = "\n".join([before + begin, "", *lines, "", end + after])
    return page


def _one_layer(linear: Linear, optimizer: str) -> Usage:
    d_in, d_out, rank, tokens = linear
    # of a decoder layer with these widths, the projection that has them
    inner, target = (d_out, "up_proj") if d_out > d_in else (d_in, "down_proj") if d_out < d_in else (d_in, "o_proj")
    width = min(d_in, d_out) if target == "down_proj" else d_in
    architecture = llama_config(layers=1, width=width, inner=inner, heads=width // 64, key_heads=1, vocabulary=1000)
    config = LearnerConfig(rank=rank, optimizer="adam" if optimizer == "adam" else "sgd", target_modules=(target,),
                           activation_budget_mib=2**14)
    return measure_update(architecture, config, tokens=tokens, rows=16)
