"""From instructions to Python: one function for each basic block.

A block `b3(R, S)` computes on the registers `R`, a list of arrays, of the strand `S` (see `machine.py`)
and returns what comes next: the number of a block, `ENDED`, `BLOCKED`, or a choice `(number, blocks, line)`
where each thread has the number of its block among some. Arrays are never written in place, so that `mov`
only gives an array a second name. The one exception is the result of a wgmma, filled at the wait that covers
it: what was named after it is filled with it.

A 32-bit register is float32 or uint32 in NumPy, whichever all instructions that write it agree on, and
uint32 if they do not; it is reinterpreted where it is read as the other.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ptx_emulator import instructions, reports
from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.forms import check_form
from ptx_emulator.instructions import written_registers
from ptx_emulator.liveness import live_before
from ptx_emulator.parser import Instruction, Kernel, number, vector
from ptx_emulator.shared_memory import SHARED_BASE
from ptx_emulator.types import DTYPES, numpy_name, plain, size_of

ENDED, BLOCKED = -1, -2
T = TypeVar("T")
_REGISTER = re.compile(r"%?[a-zA-Z]\w*")


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions `first` up to `stop`. A gate has none: it skips the block after it where no thread
    of a program executes that one's single, predicated instruction. A poll has one, which may be what a loop
    waits by for other programs."""

    first: int
    stop: int
    gate: bool = False
    poll: bool = False


@functools.lru_cache(maxsize=1 << 16)
def _names(text: str) -> tuple[str, ...]:
    """All in an instruction that may be registers."""
    return tuple(_REGISTER.findall(text.split(" ", 1)[-1]))


class Translator:
    """Of one kernel: `blocks`, their `sources`, and the `constants` that these name."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        for instruction in kernel.instructions:
            self._known(instruction, self._check)
        self.registers: dict[str, int] = {}  # places in R
        for instruction in kernel.instructions:
            for name in _names(instruction.text):
                self._add_register(name)
            if instruction.predicate:
                self._add_register(instruction.predicate)
        self._kinds = _kinds_of_registers(kernel, self.registers)
        self.constants: dict[str, np.ndarray] = {}
        self.blocks = _cut_into_blocks(kernel)
        polls = [block.first for block in self.blocks if block.poll]
        self._live = live_before(kernel, self.registers, polls)
        self._block_at = {b.first: i for i, b in reversed(list(enumerate(self.blocks)))}
        self.current = 0  # the block that is being written
        self.sources = [self._translate(i) for i in range(len(self.blocks))]

    def _add_register(self, name: str) -> None:
        if name not in self.registers and self.kernel.declared_type(name):
            self.registers[name] = len(self.registers)

    def _translate(self, index: int) -> str:
        block, self.current = self.blocks[index], index
        lines = []
        if block.gate:
            instruction = self.kernel.instructions[block.first]
            condition = f"S.some_thread({self.mask(instruction)})"
            lines = [f"return {condition}, ({index + 2}, {index + 1}), {instruction.line}"]
        if block.poll:
            line = self.kernel.instructions[block.first].line
            lines = [f"if S.idles({index}, {self._live[block.first]}, {line}): return BLOCKED"]
        # Registers written since the last wgmma.fence; None before the first one of the block.
        unfenced: set[str] | None = None
        for instruction in self.kernel.instructions[block.first : 0 if block.gate else block.stop]:
            lines += self._emit(instruction)
            if instruction.parts[:2] == ("wgmma", "fence"):
                unfenced = set()
            elif instruction.parts[:2] == ("wgmma", "mma_async"):
                operands = [x for x in instruction.operands[:2] if x.startswith("{")]
                taken = {x for operand in operands for x in vector(operand)}
                if unfenced is None or taken & unfenced:
                    lines.append(f"S.report({reports.NO_WGMMA_FENCE!r}, {instruction.line})")
            elif unfenced is not None:
                unfenced.update(written_registers(instruction))
        if not lines or not lines[-1].startswith("return"):
            lines.append(f"return {index + 1}")
        return f"def b{index}(R, S):\n" + "".join(f"    {line}\n" for line in lines)

    def _check(self, instruction: Instruction) -> None:
        """Before anything is made of the instructions: all have a known form and labels that exist."""
        check_form(instruction)
        labels = []
        if instruction.opcode == "bra":
            labels = [instruction.operands[0]]
        if instruction.opcode == "brx":
            labels = self.kernel.branch_targets[instruction.operands[1]]
        for label in labels:
            if label not in self.kernel.labels:
                raise ValueError(f"there is no label {label}")

    def _emit(self, instruction: Instruction) -> list[str]:
        emitter = instructions.EMITTERS[instruction.opcode]
        return self._known(instruction, functools.partial(emitter, self))

    def _known(self, instruction: Instruction, function: Callable[[Instruction], T]) -> T:
        """`function(instruction)`, which says of its own accord only why it cannot."""
        try:
            return function(instruction)
        except (KeyError, ValueError, IndexError, TypeError, StopIteration) as error:
            raise UnsupportedInstruction(
                f"{self.kernel.name}, {instruction}: the emulator does not know this instruction"
                f" ({type(error).__name__}: {error})"
            ) from error

    # --- what emitters write with -------------------------------------------------------------------

    def type_of(self, register: str) -> str:
        """How a register is held: u16, u32, u64, f32 or pred."""
        return self._kinds[register]

    def is_register(self, operand: str) -> bool:
        return operand in self.registers

    def target(self, label: str) -> int:
        """The block that begins at a label."""
        return self._block_at[self.kernel.labels[label]]

    def targets(self, table: str) -> list[int]:
        """The blocks of a jump table."""
        return [self.target(label) for label in self.kernel.branch_targets[table]]

    @property
    def next_block(self) -> int:
        return self.current + 1

    def constant(self, value: int, type: str) -> str:
        """The name of an array with one element: for f32 `value` has the bits of the number.

        It follows from the value, so that the same block of another kernel names the same constants.
        """
        bits = bool(value) if type == "pred" else value & ((1 << 8 * size_of(type)) - 1)
        name = f"{type}_{bits:x}"
        if name not in self.constants:
            array = np.array([[bits]], "?" if type == "pred" else f"u{size_of(type)}")
            self.constants[name] = array.view(DTYPES[type])
        return name

    def read(self, operand: str, type: str) -> str:
        """An expression for an operand as a value of `type`."""
        type = plain(type)
        if operand.startswith("!"):
            return f"~{self.read(operand[1:], type)}"
        if operand in self.registers:
            return self._read_register(operand, type)
        if operand == "%tid.x":
            return "S.thread"
        if operand in ("%tid.y", "%tid.z"):
            return self.constant(0, "u32")
        if operand.startswith(("%ctaid.", "%nctaid.")):
            axis = "xyz".index(operand[-1])
            return f"S.batch.{'num_programs' if operand[1] == 'n' else 'program'}[{axis}]"
        if operand == "%ntid.x":
            return self.constant(self.kernel.num_threads, "u32")
        if operand == "global_smem":
            return self.constant(SHARED_BASE, type)
        if re.fullmatch(r"\w+_param_\d+", operand):  # the address of a parameter
            return f"S.parameter_address({operand!r})"
        if operand.startswith("0f"):
            return self.constant(int(operand[2:], 16), type)
        return self.constant(number(operand), type)

    def _read_register(self, register: str, type: str) -> str:
        own, value = self.type_of(register), f"R[{self.registers[register]}]"
        if own == type:
            return value
        if size_of(own) != size_of(type):  # an instruction on the low bits of a wider register
            if size_of(own) < size_of(type):
                raise TypeError(f"{register} is too narrow for {type}")
            value = f"{value}.astype({numpy_name(f'u{8 * size_of(type)}')})"
        return f"{value}.view({numpy_name(type)})"

    def write(self, register: str, expression: str, type: str, instruction: Instruction) -> str:
        """The statement that gives a register a value of `type`, where the predicate holds."""
        if register == "_":
            return expression
        type, own = plain(type), self.type_of(register)
        if own != type:
            expression = f"({expression})"
            if size_of(own) != size_of(type):  # extended by the sign of its type
                wide = f"{'s' if type[0] == 's' else 'u'}{8 * size_of(own)}"
                expression = f"{expression}.astype({numpy_name(wide)})"
            expression = f"{expression}.view({numpy_name(own)})"
        place = f"R[{self.registers[register]}]"
        if instruction.predicate:
            expression = f"where({self.mask(instruction)}, {expression}, {place})"
        return f"{place} = {expression}"

    def mask(self, instruction: Instruction) -> str:
        """Which threads execute an instruction; None for all."""
        if not instruction.predicate:
            return "None"
        return ("~" if instruction.negated else "") + self.read(instruction.predicate, "pred")

    def address(self, operand: str, type: str) -> str:
        """`[%rd1+16]` or `[ %r5 + 0 ]` as an expression of u32 or u64."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        expression = self.read(base, type)
        if int(offset or 0):
            expression = f"({expression} + {self.constant(int(offset), type)})"
        return expression


def _cut_into_blocks(kernel: Kernel) -> list[Block]:
    code = kernel.instructions
    starts = {0} | {kernel.labels[x.operands[0]] for x in code if x.opcode == "bra"}
    starts |= {kernel.labels[x] for labels in kernel.branch_targets.values() for x in labels}
    gates, polls = set(), set()
    loops = _loops(kernel)
    for i, instruction in enumerate(code):
        if instructions.ends_block(instruction):
            starts.add(i + 1)
        if instructions.is_retried(instruction):
            starts.add(i)
        if instructions.needs_gate(instruction):
            starts |= {i, i + 1}
            gates.add(i)
        if instructions.may_poll(instruction) and any(i in loop for loop in loops):
            starts |= {i, i + 1}
            polls.add(i)
    blocks, ordered = [], sorted(x for x in starts if x < len(code))
    for first, stop in zip(ordered, [*ordered[1:], len(code)]):
        if first in gates:
            blocks.append(Block(first, stop, gate=True))
        blocks.append(Block(first, stop, poll=first in polls))
    return blocks


def _loops(kernel: Kernel) -> list[range]:
    """From the target of each jump back up to the jump."""
    jumps = [(i, x.operands[0]) for i, x in enumerate(kernel.instructions) if x.opcode == "bra"]
    return [range(kernel.labels[label], i + 1) for i, label in jumps if kernel.labels[label] <= i]


def _kinds_of_registers(kernel: Kernel, registers: dict[str, int]) -> dict[str, str]:
    """How each register is held: by its declared width, and 32 bits as what they are written as."""
    kinds = {}
    for register in registers:
        declared = kernel.declared_type(register)
        kinds[register] = "pred" if declared == "pred" else f"u{declared[1:]}"
    wide = {r for r, kind in kinds.items() if kind == "u32"}
    known: dict[str, str] = {}
    copies = []  # (register, one that it may be a copy of)
    for instruction in kernel.instructions:
        for register in written_registers(instruction):
            if register not in wide:
                continue
            kind = instructions.result_kind(instruction)
            if kind == "copy":
                copies += [(register, x) for x in instruction.operands[1:3] if x in wide]
            elif kind != "any":
                known[register] = kind if known.get(register, kind) == kind else "u32"
    changed = True
    while changed:
        changed = False
        for register, source in copies:
            if source in known:
                kind = (
                    known[source] if known.get(register, known[source]) == known[source] else "u32"
                )
                changed |= known.get(register) != kind
                known[register] = kind
    return kinds | known
