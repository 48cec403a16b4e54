"""The ahead-of-time gate: every kernel, as its launcher launches it, compiled for cards that are not here.

    python -m ogpstream.kernels.aot [sm_80 sm_86 sm_90]

compiles without a GPU, prints registers, stack, shared memory and the share of wide loads of each kernel, and fails
when a kernel spills, needs more shared memory than the card has, multiplies half precision without tensor cores, or
float32 with them (that would be TF32, which the interpreter hides). ptxas and cuobjdump come with triton.

The launchers run on fake tensors and their launches are recorded, so what is compiled here is what they launch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ogpstream.kernels.configs import assume_capability
from ogpstream.kernels.cross_entropy import cross_entropy
from ogpstream.kernels.launch import INTERPRETED, Launch, record_launches
from ogpstream.kernels.lora_backward import lora_backward, lora_forward
from ogpstream.kernels.optimizer import Adam, Sgd, adam_, sgd_, step_, sum_splits
from ogpstream.kernels.projection import project_out_

# shared memory that one program may have, in bytes (CUDA programming guide, compute capabilities)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
# (D_in, D_out, R, trained, T): the sizes of the memory budget; a fresh learner's first update, of one rank block of 16;
# the widest and the least rank with odd widths; the MLP of an 8B model, both ways at once, which leaves the most parts
# of h and Y
_USUAL = (2048, 2048, 48, slice(8, 16), 1024)
_MLP = (14336, 14336, 48, slice(0, 8), 1024)
_LORA = [
    _USUAL, (2048, 2048, 16, slice(0, 8), 1024),
    (1000, 3000, 200, slice(0, 64), 300), (1000, 3000, 1, slice(0, 1), 300), _MLP,
]  # fmt: skip
# (D, M, weighted, served): a streamed chunk, with shares to remove and a serving copy and without; M = 256 and the
# largest, resident; the same at a width that leaves more than the four parts of coefficients that are summed unrolled
_PROJECTIONS = [
    (2048, 32, True, True), (2048, 32, False, False), (2048, 256, False, False), (2048, 512, False, True),
    (4096, 32, False, True), (4096, 512, False, False),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch to compile; `products` says what it multiplies, or that it does not."""

    label: str
    launch: Launch
    products: Literal["half", "float32", "none"]


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a case; `wide` is the share of loads from device memory that fetch 16 bytes at a time."""

    case: Case
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_cores: bool
    wide: float

    @property
    def faults(self) -> list[str]:
        """Why this may not ship; empty if it may."""
        found = []
        if self.stack:
            found.append(f"spills: {self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over the {SHARED_LIMIT[self.arch]} of sm_{self.arch}")
        if self.tensor_cores != (self.case.products == "half"):
            what = "TF32" if self.tensor_cores else "no tensor cores for half precision"
            found.append(f"{what}: products are {self.case.products}")
        return found

    def __str__(self) -> str:
        name = f"{self.case.launch.name} {self.case.label}"
        numbers = f"{self.registers:4} registers {self.stack:4} stack {self.shared:7} shared {self.wide:5.0%} wide"
        return f"sm_{self.arch} {name:56} {numbers}  {'; '.join(self.faults) or 'ok'}"


def cases(arch: int) -> list[Case]:
    """Every kernel with every set of tiles that a card of this architecture gets.

    Raises:
        RuntimeError: the process has the kernels for the interpreter.
    """
    if INTERPRETED:
        raise RuntimeError("the kernels were imported for the interpreter: start without TRITON_INTERPRET")
    found: list[Case] = []

    def add(label: str, products: dict[str, Literal["half", "float32"]], record: Iterable[Launch]) -> None:
        found.extend(Case(label, launch, products.get(launch.name, "none")) for launch in record)

    with FakeTensorMode(), assume_capability(divmod(arch, 10)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            kind: Literal["half", "float32"] = "float32" if dtype == torch.float32 else "half"
            products = dict.fromkeys(("shrink_kernel", "expand_kernel", "gradient_kernel"), kind)
            # fp16 takes the tiles of bf16: one size shows that it compiles
            for size in _LORA[:1] if dtype == torch.float16 else _LORA:
                D_in, D_out, R, trained, T = size
                x, g = torch.empty(T, D_in, dtype=dtype), torch.empty(T, D_out, dtype=dtype)
                A, B = torch.empty(D_in, R, dtype=dtype), torch.empty(R, D_out, dtype=dtype)
                label, scale = f"{str(dtype)[6:]} {D_in}x{D_out} R{R}", torch.empty(R)
                with record_launches() as record:
                    # as the learner calls it
                    _, h = lora_forward(x, A, B, scale, onto=g)
                # the width of a model changes nothing of K1 but the number of its splits
                add(f"forward {label}", products, record[1:] if size == _MLP else record)
                with record_launches() as record:
                    lora_backward(x, g, A, B, scale, trained=trained, h=h, base_dx=x)
                # and what makes Y alone is half of the K1 that makes h
                record = record if size == _USUAL else record[1:]
                add(f"backward {label} r{trained.stop - trained.start}", products, record)
                if size == _USUAL and dtype != torch.float16:
                    with record_launches() as record:
                        lora_forward(x, A, B, scale)
                    add(f"forward {label}, nothing given", products, record[1:])
                    with record_launches() as record:
                        lora_backward(x, g, A, B, scale, trained=trained)
                    add(f"backward {label} r{trained.stop - trained.start}, nothing given", products, record)
                    with record_launches() as record:
                        lora_backward(x, g, A, B, scale, trained=slice(0, 0), base_dx=x)
                    add(f"backward {label} r0", products, record)
            with record_launches() as record:
                cross_entropy(torch.empty(128, 32000, dtype=dtype), torch.empty(128, dtype=torch.int64))
            add(str(dtype)[6:], {}, record)
        n, serving = 1 << 20, torch.empty(1 << 20, dtype=torch.bfloat16)
        w, m, v = torch.empty(n), torch.empty(n), torch.empty(n)
        # the parts of one sample of up to 512 tokens, of two of 1024, and the most that a batch of eight of these has
        for S in (1, 4, 16):
            parts = torch.empty(S, n)
            with record_launches() as record:
                for rule in (Sgd(1e-4), Adam(m, v, 1, 1e-4, (0.9, 0.99), 1e-8)):
                    step_(w, parts, rule, first=n // 2, serving=serving, serve_from=n // 2)
                sum_splits(parts)
            add(f"{S} part{'s'[: S > 1]}", {}, record)
        # as the learner steps: one gradient and no serving copy
        with record_launches() as record:
            sgd_(w, v, lr=1e-4)
            adam_(w, w, m, v, step=1, lr=1e-4, betas=(0.9, 0.99), eps=1e-8)
        add("1 part, not served", {}, record)
        products = dict.fromkeys(("coefficients_kernel", "removal_kernel"), "float32")
        for D, M, weighted, served in _PROJECTIONS:
            Z, copy = torch.empty(D, 512), torch.empty(D, 512, dtype=torch.bfloat16) if served else None
            with record_launches() as record:
                project_out_(Z, torch.empty(M, D), chunk=M, weights=torch.empty(M) if weighted else None, serving=copy)
            add(f"{D}, {M} directions{', weighted' * weighted}", products, record)
    unique: dict[tuple[str, str], Case] = {}
    for case in found:
        unique.setdefault((case.launch.name, repr(_source(case.launch)[1:])), case)
    return list(unique.values())


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile one launch for an architecture, 80 for sm_80."""
    kernel, signature, constants, attributes = _source(case.launch)
    options = {k: v for k, v in case.launch.options.items() if k not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    tensor_cores = bool(re.search(r"\b(wg)?mma\.", ptx))
    loads = re.findall(r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[\w.:]*", ptx)
    wide = sum(".cg." in load or ".v4.b32" in load for load in loads) / max(1, len(loads))
    return Compiled(case, arch, registers, stack, built.metadata.shared, tensor_cores, wide)


def _source(launch: Launch) -> tuple[Any, dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[object]]]]:
    """Kernel, signature, constants and attributes, specialised as Triton does for a launch with these arguments."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.options
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        value, general = values[parameter.name], parameter.do_not_specialize
        aligned = False
        if isinstance(value, Tensor):
            kind = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and isinstance(value, int) and not general):
            kind = "constexpr"
            constants[index,] = value
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not general
        signature[parameter.name] = kind
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    return kernel, signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if match is None:
        raise RuntimeError(f"cuobjdump names no resources: {done.stdout}")
    return int(match[1]), int(match[2])


def main(names: Sequence[str]) -> int:
    """Compile for the named architectures (all if none), print one line a kernel.

    Returns:
        0; 1 if a kernel has a fault, 2 if a name is not of an architecture that the gate knows.
    """
    known = {f"sm_{arch}": arch for arch in SHARED_LIMIT}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"aot: {', '.join(unknown)} is unknown: use {', '.join(known)}", file=sys.stderr)
        return 2
    faulty = 0
    for arch in [known[name] for name in names] or SHARED_LIMIT:
        for case in cases(arch):
            compiled = compile_case(case, arch)
            print(compiled, flush=True)
            faulty += bool(compiled.faults)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
