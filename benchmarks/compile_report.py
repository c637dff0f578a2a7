"""What the compiler makes of every shipped kernel configuration, without a GPU.

```
python -m benchmarks.compile_report [--arch 80 90 100] [--pass NAME ...] [--json FILE]
```

Each kernel module offers `compile_cases(arch)`; the modules are listed in KERNEL_MODULES. A case is
compiled by Triton for its architecture, and the binary is read with the `cuobjdump` that comes in
Triton's package: registers per thread, spilled bytes (the widths of all loads from and stores to
local memory), shared memory, matrix instructions, what a mask takes in the loops around these, and
the programs per multiprocessor that registers and memory allow. Needs a process in which
`TRITON_INTERPRET` is not set, because the interpreter replaces the compiler when Triton is imported.
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
from collections import Counter, defaultdict
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
    "lact_kernels.triton.branch_qkv",
    "lact_kernels.triton.branch_sum",
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
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
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

    A mask compares integers and selects floats, once at least per element that a thread owns. Loop
    control, addresses and waits take some compares, and select integers only.
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
    """The innermost loops with matrix instructions, in the order in which they end.

    A loop is all that leads to a backward branch without passing its target. Code out of line, where
    kernels for sm_100 wait, branches back too, but what leads there includes the kernel's entry.
    """
    code = _INSTRUCTION.findall(output)
    index_at = {int(address, 16): index for index, (address, *_) in enumerate(code)}
    sources = defaultdict(list)  # of each instruction, those that lead to it
    backward = []
    for index, (_, predicate, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        if target:
            first = index_at[int(target[1], 16)]
            sources[first].append(index)
            if first <= index:
                backward.append((first, index))
        # A branch with a second operand depends on it.
        if predicate or "," in operands or not name.startswith(("BRA", "EXIT", "RET")):
            sources[index + 1].append(index)
    bodies = defaultdict(set)  # by their first instruction
    for first, last in backward:
        body, leading = {first}, [last]
        while leading:
            index = leading.pop()
            if index not in body:
                body.add(index)
                leading += sources[index]
        if 0 not in body:
            bodies[first] |= body
    loops = [x for x in bodies.values() if any(_MATRIX_INSTRUCTION.match(code[i][2]) for i in x)]
    counts = [
        Counter(code[i][2].split(".")[0] for i in x)
        for x in loops
        if not any(other < x for other in loops)
    ]
    return [MatrixLoop(compares=x["ISETP"], selects=x["FSEL"]) for x in counts]


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
    f" {'s':>5}  matrix instructions; compares/selects in their loops"
)


def _line(row: CompileRow) -> str:
    matrix = ", ".join(f"{n} {name}" for name, n in row.matrix_instructions.items()) or "none"
    loops = ", ".join(f"{loop.compares}/{loop.selects}" for loop in row.matrix_loops)
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
        f" {row.seconds:>5.1f}  {matrix}{loops and '; ' + loops}"
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
