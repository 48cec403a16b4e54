"""`ogpstream bench vram`: bytes of updates on the device by T, L, experts, directions and length of the stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ogpstream.learner import LearnerConfig
from ogpstream.learner.config import LearningState
from ogpstream.profiling.bench_report import Picture, Row, chosen, each, fail, measured, prepare, table, write

if TYPE_CHECKING:
    from ogpstream.profiling.vram import Usage

_BYTES = ("learner_state_bytes", "resident_state_bytes", "activation_peak_bytes")
# of `bench update`, whose line has the same fields; no time is taken here
TIMES = ("ours_ms_p50", "peft_ms_p50", "floor_ms_p50", "ratio_vs_peft", "ratio_vs_floor", "yield_ms_p99")
PICTURES = [Picture(sweep, sweep, _BYTES, 2**20, "MiB")
            for sweep in ("T", "L", "experts", "m", "updates")]


@dataclass(frozen=True)
class Geometry:
    """A model with one adapted linear a layer, and updates of it."""

    width: int = 2048
    L: int = 32
    T: int = 1024
    rows: int = 512
    experts: int = 8
    m: int = 256
    updates: int = 2

    def usage(self, mode: LearningState) -> Usage:
        from ogpstream.profiling.vram import llama_config, measure_update

        heads = max(1, self.width // 64)
        architecture = llama_config(layers=self.L, width=self.width, inner=11 * self.width // 4, heads=heads,
                                    key_heads=max(1, heads // 8))
        config = LearnerConfig(target_modules=("o_proj",), basis_columns=self.m, learning_state=mode)
        return measure_update(architecture, config, tokens=self.T, rows=min(self.rows, self.T - 1),
                              experts=self.experts, updates=self.updates)

    def row(self, sweep: str) -> Row:
        lean, resident = self.usage("lean"), self.usage("resident")
        return {"sweep": sweep, "width": self.width, "L": self.L, "T": self.T, "experts": self.experts, "m": self.m,
                "updates": self.updates, **fields(lean, resident)}


def fields(lean: Usage, resident: Usage) -> Row:
    """The bytes that the JSON lines of `bench vram` and `bench update` have in common."""
    return {"learner_state_bytes": lean.learning_state, "resident_state_bytes": resident.learning_state,
            "serving_copy_bytes": lean.serving_copy, "shadow_bytes": lean.shadow, "scope_bytes": lean.scope,
            "total_learning_vram_bytes": lean.total, "activation_peak_bytes": lean.activations,
            "choice": lean.choice, "device": lean.device}


def sweeps(base: Geometry) -> dict[str, list[Geometry]]:
    return {
        "T": [replace(base, T=T) for T in (128, 256, 512, 1024)],
        "L": [replace(base, L=L) for L in (4, 22, 32)],
        "experts": [replace(base, L=min(base.L, 4), experts=n) for n in (2, 8, 32)],
        "m": [replace(base, L=min(base.L, 4), m=m) for m in (32, 128, 256)],
        "updates": [replace(base, L=min(base.L, 4), updates=n) for n in (2, 10, 50)],
    }


def bench_vram(
    layers: Annotated[int, typer.Option(min=1, help="L")] = 32,
    width: Annotated[int, typer.Option(min=64, help="d, a multiple of 64")] = 2048,
    tokens: Annotated[int, typer.Option(min=2, max=2048, help="T")] = 1024,
    sweep: Annotated[list[str] | None, typer.Option(
        help="one of T, L, experts, m, updates, or none; repeat for more, by default all")] = None,
    page: Annotated[Path | None, typer.Option("--table", help="only fill in the tables of this page again, such as "
                                                                "docs/memory.md: two minutes")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for vram.csv and vram.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Bytes of learning on the device; without a GPU, by the learner's own code on a device that is not there."""
    # here, because they take seconds, and --help needs none of them
    import torch

    from ogpstream.profiling import memory_table

    if page is not None:
        try:
            page.write_text(memory_table.fill(page.read_text()))
        except OSError as error:
            fail(f"{page} cannot be read or written ({error.strerror}): give a page such as docs/memory.md", 1)
        except ValueError as error:
            fail(str(error), 1)
        return
    if width % 64:
        fail(f"--width is {width}: use a multiple of 64, the width of an attention head", 2)
    known = sweeps(base := Geometry(width=width, L=layers, T=tokens, rows=tokens // 2))
    names = chosen("--sweep", sweep, list(known))
    prepare(out)
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        console.print("there is no GPU: bytes are counted on a device that is not there, without an allocator's "
                      "rounding and cuBLAS's workspace", highlight=False, soft_wrap=True)

    def measure() -> dict[str, Any]:
        cases = [("base", base), *((name, geometry) for name in names for geometry in known[name])]
        rows = [geometry.row(name) for name, geometry in each(cases, lambda case: f"{case[0]}, {case[1]}")]
        return {**rows[0], **dict.fromkeys(TIMES), "rows": rows}

    values = measured(measure)
    typer.echo("\n".join(table(values["rows"], [
        "sweep", "L", "T", "experts", "m", "updates", "learner_state_bytes", "resident_state_bytes",
        "activation_peak_bytes", "choice",
    ])), err=as_json)  # fmt: skip
    write(values, "vram", PICTURES, out, as_json=as_json)
