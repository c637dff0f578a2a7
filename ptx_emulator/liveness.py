"""Which registers still matter at a place of a kernel."""

import re

from ptx_emulator.instructions import has_result, written_registers
from ptx_emulator.parser import Instruction, Kernel

_REGISTER = re.compile(r"%?[a-zA-Z]\w*")


def live_before(
    kernel: Kernel, registers: dict[str, int], places: list[int]
) -> dict[int, tuple[int, ...]]:
    """For the instructions at these places: the registers whose values they or later ones may read.

    Sets of registers are numbers here, a bit for each one's place in `registers`.
    """
    if not places:
        return {}
    code = kernel.instructions
    reads = [_bits(_read_registers(x), registers) for x in code]
    writes = [0 if x.predicate else _bits(written_registers(x), registers) for x in code]
    following = [_following(kernel, i) for i in range(len(code))]
    live, changed = [0] * (len(code) + 1), True
    while changed:
        changed = False
        for i in reversed(range(len(code))):
            after = 0
            for j in following[i]:
                after |= live[j]
            now = after & ~writes[i] | reads[i]
            changed |= now != live[i]
            live[i] = now
    count = len(registers)
    return {i: tuple(place for place in range(count) if live[i] >> place & 1) for i in places}


def _read_registers(instruction: Instruction) -> list[str]:
    """Also accumulators, and whatever keeps its value where a predicate does not hold."""
    in_place = instruction.predicate or instruction.opcode == "wgmma"
    operands = instruction.operands[1 if has_result(instruction) and not in_place else 0 :]
    names = _REGISTER.findall(" ".join(operands))
    return [*names, instruction.predicate] if instruction.predicate else names


def _bits(names: list[str], registers: dict[str, int]) -> int:
    return sum(1 << registers[name] for name in {*names} if name in registers)


def _following(kernel: Kernel, i: int) -> list[int]:
    """The places that an instruction may lead to."""
    instruction = kernel.instructions[i]
    after = [i + 1]
    if instruction.opcode == "bra":
        return [kernel.labels[instruction.operands[0]], *(after if instruction.predicate else [])]
    if instruction.opcode == "brx":
        return [kernel.labels[x] for x in kernel.branch_targets[instruction.operands[1]]]
    return [] if instruction.opcode in ("ret", "exit") else after
