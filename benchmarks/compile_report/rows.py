"""One row for every shipped kernel configuration."""

import dataclasses
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from benchmarks.compile_report.architectures import ARCHITECTURES, programs_per_multiprocessor
from benchmarks.compile_report.case import CompileCase
from benchmarks.compile_report.compiling import Binary, Source, compile_source
from benchmarks.compile_report.kept import Kept
from benchmarks.compile_report.loops import MATRIX_INSTRUCTION, matrix_loops
from benchmarks.compile_report.machine_code import Instruction, disassemble, spilled_bytes
from benchmarks.compile_report.products import product_repeats

BATCH = 16  # kernels that are disassembled together


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
    shared_limit: int  # the least of those architectures that the row serves
    warnings: list[str]  # of ptxas
    product_repeats: float | None  # see `products`
    matrix_instructions: dict[str, int]
    matrix_loops: list[dict]  # see `loops.MatrixLoop`, in the order of their addresses
    programs_per_multiprocessor: int
    seconds: float  # to compile it

    @property
    def warps_per_multiprocessor(self) -> int:
        return self.programs_per_multiprocessor * self.config["num_warps"]


def compile_reports(cases: Iterable[CompileCase]) -> Iterator[CompileRow]:
    """Compile the cases, or read what is kept of them."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels cannot be compiled in this process. Run"
            " `python -m benchmarks.compile_report` in a fresh process without it"
        )
    kept = Kept()
    for _, same_arch in itertools.groupby(cases, lambda case: case.arch):
        while batch := list(itertools.islice(same_arch, BATCH)):
            yield from _compile_batch(batch, kept)


def _compile_batch(batch: list[CompileCase], kept: Kept) -> Iterator[CompileRow]:
    sources = [Source.of(case) for case in batch]
    keys = [
        f"{case.name} {case.shape} {case.config} {case.also} {source.key()}"
        for case, source in zip(batch, sources)
    ]
    rows = [kept.get(key) for key in keys]
    missing = [place for place, row in enumerate(rows) if row is None]
    made, seconds = [], []
    for place in missing:
        started = time.perf_counter()
        made.append(compile_source(sources[place]))
        seconds.append(time.perf_counter() - started)
    codes = disassemble([binary.cubin for binary in made], batch[0].arch) if made else []
    for place, binary, code, taken in zip(missing, made, codes, seconds):
        row = _row(batch[place], binary, code, taken)
        rows[place] = dataclasses.asdict(row)
        kept.put(keys[place], rows[place])
    return (CompileRow(**row) for row in rows)


def _row(case: CompileCase, binary: Binary, code: list[Instruction], seconds: float) -> CompileRow:
    products = Counter(x.kind for x in code if MATRIX_INSTRUCTION.match(x.name))
    return CompileRow(
        kernel=case.name,
        arch=case.arch,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=case.shape,
        config=dataclasses.asdict(case.config),
        registers=binary.registers,
        spilled_bytes=spilled_bytes(code),
        shared_bytes=binary.shared,
        shared_limit=min(ARCHITECTURES[x].shared_per_block for x in (case.arch, *case.also)),
        warnings=binary.warnings,
        product_repeats=product_repeats(binary.ttgir, binary.ptx, case.config.num_warps),
        matrix_instructions=dict(products),
        matrix_loops=[
            dataclasses.asdict(loop) for loop in matrix_loops(code, case.config.num_stages)
        ],
        programs_per_multiprocessor=programs_per_multiprocessor(
            ARCHITECTURES[case.arch],
            binary.registers,
            binary.shared,
            case.config.num_warps,
            binary.tensor_columns,
        ),
        seconds=round(seconds, 2),
    )
