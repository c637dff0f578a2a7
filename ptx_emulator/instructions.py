"""What the translator asks about an instruction, and its emitter, found by the opcode in EMITTERS."""

import functools
import re

from ptx_emulator import emit_arithmetic, emit_memory
from ptx_emulator.parser import Instruction

EMITTERS = emit_arithmetic.EMITTERS | emit_memory.EMITTERS
WITHOUT_RESULT = {
    "st", "bra", "brx", "bar", "barrier", "ret", "exit", "trap", "stmatrix", "fence", "membar", "cp",
    "tensormap", "red", "setmaxnreg", "griddepcontrol", "prefetch",
}  # fmt: skip


def has_result(instruction: Instruction) -> bool:
    kind = instruction.parts[1:2]
    if instruction.opcode == "wgmma":
        return kind == ("mma_async",)
    if instruction.opcode == "mbarrier":
        return kind != ("init",) and kind != ("inval",) and kind != ("expect_tx",)
    return instruction.opcode not in WITHOUT_RESULT and bool(instruction.operands)


def written_registers(instruction: Instruction) -> list[str]:
    """The operands that an instruction gives a value."""
    return _written(instruction.operands[0]) if has_result(instruction) else []


@functools.lru_cache(maxsize=1 << 14)
def _written(operand: str) -> list[str]:
    return [x for x in re.split(r"[{},|\s]+", operand) if x and x != "_"]


def only_computes(instruction: Instruction) -> bool:
    """Whether a thread may execute it without the others of its warp, as far as they can notice."""
    return instruction.opcode == "bra" or instruction.opcode in emit_arithmetic.EMITTERS


def may_poll(instruction: Instruction) -> bool:
    """Whether a loop may wait in this way for what another program does."""
    return instruction.opcode in ("ld", "atom") and instruction.memory_order is not None


def result_kind(instruction: Instruction) -> str:
    """What a 32-bit result is: f32, u32, a "copy" of its operands, or "any", if both are the same."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode == "mov" and "{" not in instruction.text:
        source = instruction.operands[1]
        if source.startswith("0f"):
            return "f32"
        return "any" if source == "0" else "copy" if source.startswith("%r") else "u32"
    if opcode == "shfl" or opcode == "selp" and parts[1] == "b32":
        return "copy"
    if opcode in ("mma", "wgmma"):
        return "f32"
    return "f32" if parts[-2 if opcode == "cvt" else -1] == "f32" else "u32"


def ends_block(instruction: Instruction) -> bool:
    """Whether what comes next depends on more than the instruction's place: jumps and waits."""
    opcode, parts = instruction.opcode, instruction.parts
    if opcode in ("bar", "barrier"):
        return "sync" in parts and "warp" not in parts
    return opcode in ("bra", "brx", "ret", "exit") or opcode == "mbarrier" and "wait" in parts[1]


def is_retried(instruction: Instruction) -> bool:
    """Whether a strand that had to wait executes the instruction anew, and so its block has only that."""
    return instruction.opcode == "mbarrier" and "wait" in instruction.parts[1]


def needs_gate(instruction: Instruction) -> bool:
    """Whether all programs that run in lockstep must agree on executing a predicated instruction.

    Those for which one thread speaks keep their state for all programs of a batch together.
    """
    opcode, parts = instruction.opcode, instruction.parts
    if not instruction.predicate:
        return False
    if opcode == "cp":
        return parts[1] == "reduce" or "bulk" in parts
    return (
        opcode in ("tensormap", "bar", "barrier") or opcode == "mbarrier" and "wait" not in parts[1]
    )
