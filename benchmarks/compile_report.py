"""What the compiler makes of every shipped kernel configuration, without a GPU.

```
python -m benchmarks.compile_report [--arch 80 90 100] [--pass NAME ...] [--json FILE]
```

Each kernel module offers `compile_cases(arch)`; the modules are listed in KERNEL_MODULES. A case is
compiled by Triton for its architecture, and the binary is read with the `cuobjdump` that comes in
Triton's package: registers per thread, spilled bytes (the widths of all loads from and stores to
local memory), shared memory, matrix instructions, and the programs per multiprocessor that these
allow. Needs a process in which `TRITON_INTERPRET` is not set, because the interpreter replaces the
compiler when Triton is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

# Modules with a function `compile_cases(arch)`. A new kernel is added here and nowhere else.
KERNEL_MODULES = (
    "lact_kernels.triton.window_attn_fwd",
    "lact_kernels.triton.window_attn_bwd",
    "lact_kernels.triton.window_attn_with_kvcache",
    "lact_kernels.triton.ttt_activations",
    "lact_kernels.triton.ttt_products",
    "lact_kernels.triton.ttt_update",
    "lact_kernels.triton.ttt_update_bwd",
    "lact_kernels.triton.newton_schulz",
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one architecture, from NVIDIA's compute capability tables."""

    shared_per_block: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int = 65536
    warps_per_multiprocessor: int = 64
    programs_per_multiprocessor: int = 32


KIB = 1024
ARCHITECTURES = {
    80: Architecture(163 * KIB, 164 * KIB),
    90: Architecture(227 * KIB, 228 * KIB),
    100: Architecture(227 * KIB, 228 * KIB),
}
# Every program takes this much shared memory for the system.
RESERVED_SHARED = KIB
TENSOR_MEMORY_COLUMNS = 512

# Instruction names: Hopper's asynchronous products, those of Ampere, those of Blackwell.
_MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
_LOCAL_ACCESS = re.compile(r"\b(LDL|STL)((?:\.\w+)*)")
# A line of machine code: address, predicate if any, instruction, operands.
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
)
_POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class MatrixLoop:
    """An innermost loop with matrix instructions: what a mask takes in it, for each thread.

    A mask compares integers and selects floats, once per element that a thread owns. Loop control takes
    a compare or two and no select.
    """

    compares: int
    selects: int


@dataclasses.dataclass(frozen=True)
class CompileRow:
    """One compiled configuration."""

    kernel: str
    arch: int
    dtype: str
    shape: str  # the compile-time sizes
    config: dict
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: dict[str, int]
    matrix_loops: list[MatrixLoop]  # in the order of their addresses
    programs_per_multiprocessor: int
    seconds: float

    @property
    def warps_per_multiprocessor(self) -> int:
        return self.programs_per_multiprocessor * self.config["num_warps"]


def compile_reports(
    archs: Iterable[int] = tuple(ARCHITECTURES), passes: Iterable[str] = ()
) -> Iterator[CompileRow]:
    """Compile the shipped configurations one by one; `passes` restricts them to those names."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels cannot be compiled in this process. Run"
            " `python -m benchmarks.compile_report` in a fresh process without it"
        )
    wanted = set(passes)
    for arch in archs:
        for module in KERNEL_MODULES:
            for case in importlib.import_module(module).compile_cases(arch):
                if not wanted or case.name in wanted:
                    yield compile_case(case)


def compile_case(case) -> CompileRow:
    """Compile one `lact_kernels.triton.configs.CompileCase` and read the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = time.perf_counter()
    signature, attributes = _signature(case)
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constexprs, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.config.num_warps, "num_stages": case.config.num_stages},
    )
    output = _disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", output)[1])
    shared = compiled.metadata.shared
    return CompileRow(
        kernel=case.name,
        arch=case.arch,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=case.shape,
        config=dataclasses.asdict(case.config),
        registers=registers,
        spilled_bytes=_spilled_bytes(output),
        shared_bytes=shared,
        shared_limit=ARCHITECTURES[case.arch].shared_per_block,
        matrix_instructions=dict(Counter(_MATRIX_INSTRUCTION.findall(output))),
        matrix_loops=_matrix_loops(output),
        programs_per_multiprocessor=_programs_per_multiprocessor(
            ARCHITECTURES[case.arch],
            registers,
            shared,
            case.config.num_warps,
            getattr(compiled.metadata, "tmem_size", 0) or 0,
        ),
        seconds=time.perf_counter() - started,
    )


def _signature(case) -> tuple[dict[str, str], dict]:
    """Argument types, and which arguments are multiples of 16, as a launch would find them."""
    signature, attributes = {}, {}
    for index, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in case.constexprs:
            signature[name] = "constexpr"
            continue
        if name in case.pointers:
            signature[name] = _POINTER_TYPES[case.pointers[name]]
        else:
            signature[name] = "fp32" if name.endswith(("scale", "factor")) else "i32"
        if signature[name] != "fp32" and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, attributes


def _disassemble(cubin: bytes) -> str:
    """The machine code, and what resources it takes."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _spilled_bytes(output: str) -> int:
    """The widths of all loads from and stores to local memory."""
    spilled = 0
    for _, modifiers in _LOCAL_ACCESS.findall(output):
        parts = modifiers.split(".")
        spilled += 16 if "128" in parts else 8 if "64" in parts else 4
    return spilled


def _matrix_loops(output: str) -> list[MatrixLoop]:
    """A branch to an earlier address closes a loop."""
    code = [(int(address, 16), *rest) for address, *rest in _INSTRUCTION.findall(output)]
    bodies = []
    for end, instruction, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if instruction.startswith("BRA") and target and int(target[1], 16) < end:
            body = range(int(target[1], 16), end)
            if any(at in body and _MATRIX_INSTRUCTION.match(name) for at, name, _ in code):
                bodies.append(body)
    innermost = [x for x in bodies if not any(y != x and y.start in x for y in bodies)]
    loops = []
    for body in innermost:
        counts = Counter(name.split(".")[0] for at, name, _ in code if at in body)
        loops.append(MatrixLoop(compares=counts["ISETP"], selects=counts["FSEL"]))
    return loops


def _programs_per_multiprocessor(
    limits: Architecture, registers: int, shared: int, num_warps: int, tensor_columns: int
) -> int:
    """How many programs fit at once: an estimate from registers, shared memory and warps."""
    registers_per_warp = -(-registers * 32 // 256) * 256  # handed out in units of 256
    bounds = [
        limits.programs_per_multiprocessor,
        limits.warps_per_multiprocessor // num_warps,
        limits.registers_per_multiprocessor // (registers_per_warp * num_warps),
        limits.shared_per_multiprocessor // (shared + RESERVED_SHARED),
    ]
    if tensor_columns:
        bounds.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(bounds)


_COLUMNS = (
    f"{'kernel':<31} {'arch':>4} {'dtype':>8} {'shape':>15} {'tile':>11} {'warps':>5}"
    f" {'stages':>6} {'regs':>4} {'spills':>6} {'shared KiB':>13} {'CTA/SM':>6} {'warps/SM':>8}"
    f" {'s':>5}  matrix instructions"
)


def _line(row: CompileRow) -> str:
    matrix = ", ".join(f"{n} {name}" for name, n in row.matrix_instructions.items()) or "none"
    shared = f"{row.shared_bytes / KIB:.1f}/{row.shared_limit // KIB}"
    config = row.config
    tile = "x".join(
        str(config[name]) for name in ("block_m", "block_n", "block_k") if name in config
    )
    return (
        f"{row.kernel:<31} {row.arch:>4} {row.dtype:>8} {row.shape:>15} {tile:>11}"
        f" {config['num_warps']:>5} {config['num_stages']:>6} {row.registers:>4}"
        f" {row.spilled_bytes:>6} {shared:>13}"
        f" {row.programs_per_multiprocessor:>6} {row.warps_per_multiprocessor:>8}"
        f" {row.seconds:>5.1f}  {matrix}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES)
    )
    parser.add_argument(
        "--pass", dest="passes", nargs="+", default=[], help="only kernels of these names"
    )
    parser.add_argument("--json", type=Path, help="also write one JSON object per line here")
    options = parser.parse_args(arguments)
    started, rows = time.perf_counter(), []
    print(_COLUMNS, flush=True)
    try:
        for row in compile_reports(options.arch, options.passes):
            rows.append(row)
            print(_line(row), flush=True)
    except RuntimeError as error:
        if rows:
            raise
        print(error, file=sys.stderr)
        return 2
    if options.json:
        lines = (json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        options.json.write_text("".join(lines))
    spilling = sum(row.spilled_bytes > 0 for row in rows)
    oversized = sum(row.shared_bytes > row.shared_limit for row in rows)
    seconds = time.perf_counter() - started
    print(f"{len(rows)} kernels in {seconds:.0f} s; {spilling} spill, {oversized} over the limit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
