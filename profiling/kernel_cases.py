"""What `bench kernels` measures: an operation at one size, and the sweeps that sizes come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Operation = Literal["lora_forward", "lora_backward", "projection", "step_projection", "update", "cross_entropy"]
OPERATIONS: dict[Operation, str] = {
    "lora_forward": "y and h of L linears",
    "lora_backward": "dA, dB, dx of L linears",
    "projection": "the A of L linears projected out of span(P)",
    "step_projection": "Adam on all masters, projection, serving copies",
    "update": "lora_backward and step_projection: a whole update of one sample",
    "cross_entropy": "loss and gradient of a chunk of T rows",
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# ways to do them, in the order of `kernel_providers.PROVIDERS`, which makes them
PROVIDER_NAMES = ("ours", "separate", "reference", "cublas", "addmm", "compiled", "peft", "peft_autocast")
_LORA: tuple[Operation, ...] = ("lora_forward", "lora_backward", "update")
_PROJECT: tuple[Operation, ...] = ("projection", "step_projection", "update")


@dataclass(frozen=True)
class Case:
    """One operation at one size; symbols as in `kernels/README.md`.

    Attributes:
        R, r: columns of all packed factors (two experts of rank 8, held parts of rank 16), and the trained ones.
        basis: where P lies, on the device or in pinned host RAM.
        scope: one P for all linears, or one each.
        V: vocabulary of cross_entropy.
    """

    op: Operation
    dtype: str = "bf16"
    T: int = 1024
    L: int = 32
    D_in: int = 2048
    D_out: int = 2048
    R: int = 48
    r: int = 8
    m: int = 256
    basis: Literal["resident", "streamed"] = "resident"
    scope: Literal["shared", "layer"] = "shared"
    V: int = 32000

    @property
    def projects(self) -> bool:
        return self.op in _PROJECT

    @property
    def has_factors(self) -> bool:
        return self.op in _LORA

    @property
    def shape(self) -> str:
        """The sizes that this operation depends on, as one word a size."""
        if self.op == "cross_entropy":
            return f"T{self.T} V{self.V}"
        words = [f"T{self.T}"] if self.has_factors else []
        words += [f"L{self.L}", f"{self.D_in}x{self.D_out}", f"R{self.R}" if self.has_factors else "", f"r{self.r}"]
        words += [f"m{self.m}", self.scope, self.basis] if self.projects else []
        return " ".join(filter(None, words))

    @property
    def torch_dtype(self) -> torch.dtype:
        # here, because it takes a second, and --help needs the names of sweeps alone
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype


# what each sweep varies, one change from the base at a time, and the operations it says something about
SWEEPS: dict[str, tuple[tuple[Operation, ...], list[dict[str, Any]]]] = {
    "T": (_LORA, [{"T": T} for T in (64, 256, 512, 2048, 4096)]),
    "L": ((*_PROJECT, "lora_backward"), [{"L": L} for L in (1, 8, 22)]),
    "m": (_PROJECT, [{"m": m} for m in (0, 64, 128, 512)]),
    "basis": (_PROJECT, [{"basis": "streamed"}, {"scope": "layer"}, {"basis": "streamed", "scope": "layer"}]),
    "dtype": ((*_LORA, "cross_entropy"), [{"dtype": "fp16"}, {"dtype": "fp32"}]),
    # k or v, up and down of TinyLlama-1.1B, and a vocabulary of Llama-3
    "width": (_LORA, [{"D_out": 256}, {"D_out": 5632}, {"D_in": 5632}]),
    "vocabulary": (("cross_entropy",), [{"V": 128256}]),
}
# rows of a chunk of the loss; other operations take the whole sample
CHUNK_ROWS = 256
# narrow, ragged and few: every operation and every kind of P once, in seconds on one core of a CPU
QUICK: dict[str, Any] = dict(T=96, L=2, D_in=192, D_out=160, R=24, m=64, V=1000)
QUICK_SWEEPS: dict[str, tuple[tuple[Operation, ...], list[dict[str, Any]]]] = {
    "T": (("lora_backward",), [{"T": 33}]),
    "L": (("lora_backward",), [{"L": 1}]),
    "m": (("update",), [{"m": 0}]),
    "basis": (("projection",), [{"basis": "streamed"}, {"basis": "streamed", "scope": "layer"}]),
    "dtype": (("lora_backward", "update"), [{"dtype": "bf16"}]),
}


def cases(ops: Iterable[Operation], sweeps: Iterable[str], *, quick: bool = False) -> Iterator[Case]:
    """The base case of each operation, then what the sweeps vary, none twice; with `quick` small, and in fp32."""
    ops, seen = list(ops), set[Case]()
    sizes: dict[str, Any] = {**QUICK, "dtype": "fp32"} if quick else {}
    table = QUICK_SWEEPS if quick else SWEEPS

    def base(op: Operation) -> Case:
        case = Case(op, **sizes)
        return replace(case, T=min(case.T, CHUNK_ROWS)) if op == "cross_entropy" else case

    changes: list[tuple[Operation, dict[str, Any]]] = [(op, {}) for op in ops]
    for sweep in sweeps:
        concerned, varied = table.get(sweep, ((), []))
        changes += [(op, change) for change in varied for op in ops if op in concerned]
    for op, change in changes:
        case = replace(base(op), **change)
        # without directions there is nothing to project
        if case not in seen and not (op == "projection" and case.m == 0):
            seen.add(case)
            yield case
