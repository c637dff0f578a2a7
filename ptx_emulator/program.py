"""A kernel ready to run: its blocks as Python functions, and what its registers hold at first."""

import collections
import functools
import types

import numpy as np

from ptx_emulator import (
    accesses,
    arithmetic,
    atomics,
    barriers,
    bulk_copies,
    copies,
    matrix,
    tensormap,
    warps,
    wgmma,
)
from ptx_emulator.counts import unit_of
from ptx_emulator.instructions import only_computes
from ptx_emulator.parser import Instruction, Kernel, parse
from ptx_emulator.translator import BLOCKED, ENDED, Translator
from ptx_emulator.types import NEVER_WRITTEN

# The names that translated code calls.
_FUNCTIONS = {"np": np, "where": np.where, "ENDED": ENDED, "BLOCKED": BLOCKED}
for _module in (
    arithmetic, accesses, atomics, copies, bulk_copies, tensormap, barriers, warps, matrix, wgmma,
):  # fmt: skip
    _FUNCTIONS |= {k: v for k, v in vars(_module).items() if callable(v) and not k.startswith("_")}


class Program:
    """One kernel translated; `unit_counts[b]` has the instructions of block b by unit."""

    def __init__(self, ptx: str):
        self.kernel: Kernel = parse(ptx)
        translator = Translator(self.kernel)
        self.source = "\n".join(translator.sources)
        names = {**_FUNCTIONS, **translator.constants}
        for source in translator.sources:
            exec(_compiled(source, self.kernel.name), names)
        self.blocks = [names[f"b{i}"] for i in range(len(translator.blocks))]
        self.initial = [
            np.array([[NEVER_WRITTEN[translator.type_of(register)]]])
            for register in translator.registers
        ]
        code = self.kernel.instructions
        self.unit_counts = []
        for block in translator.blocks:
            counts = collections.Counter(
                map(unit_of, () if block.gate else code[block.first : block.stop])
            )
            counts.pop(None, None)
            self.unit_counts.append(counts)
        self.only_compute = [
            not (block.gate or block.poll)
            and all(map(only_computes, code[block.first : block.stop]))
            for block in translator.blocks
        ]
        self.last_lines = [code[block.stop - 1].line for block in translator.blocks]
        self.orders_programs = any(i.memory_order for i in code)
        # How finely order is kept: the narrowest stores.
        self.shared_unit = min([4, *(_store_bytes(i, "shared") for i in code)])
        self.global_unit = min([4, *(_store_bytes(i, "global") for i in code)])

    @functools.cached_property
    def _at_line(self) -> dict[int, Instruction]:
        return {i.line: i for i in reversed(self.kernel.instructions)}

    def at_line(self, line: int) -> Instruction:
        """The first instruction on a line of the PTX."""
        return self._at_line[line]


@functools.lru_cache(maxsize=4096)
def _compiled(source: str, kernel: str) -> types.CodeType:
    """A block, which kernels that differ in another one have in common, such as broken ones."""
    return compile(source, f"<{kernel}>", "exec")


def _store_bytes(instruction: Instruction, space: str) -> int:
    """The bytes that one thread stores there; 4 where the instruction is no such store."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode in ("st", "atom", "red") and any(x.startswith(space) for x in parts):
        count = instruction.operands[-1].count(",") + 1
        return count * int(parts[-1].removesuffix("x2").lstrip("busf")) // 8
    return 4
