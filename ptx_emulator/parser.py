"""From the text of one compiled kernel to its instructions.

Read is the PTX that Triton writes (PTX ISA 8): one `.entry` with parameters, registers declared by
prefix, labels, one or several instructions a line, and scopes in braces around inline assembly,
whose registers and labels are local to them.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import PurePath

from ptx_emulator.errors import UnsupportedInstruction

_INSTRUCTION = re.compile(r"^(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_LABEL = re.compile(r"^(\$?[\w$.]+):$")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+).*?(\w+_param_\d+)(?:\[(\d+)\])?")
_BRANCH_TARGETS = re.compile(r"^(\$?[\w$.]+): \.branchtargets (.+)$")
_LABELLED = re.compile(r"^(\$?[\w$.]+:)(?!:)\s+(.+)$")
_DECLARATION = re.compile(r"^\.reg\s+\.(\w+)\s+(.+)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `@%p1 ld.global.b32 %r1, [%rd2]` has the parts `("ld", "global", "b32")`."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool  # @!%p
    line: int  # of the PTX, from 1
    text: str
    source: str  # file and line of the Python kernel, "" where unknown

    @property
    def opcode(self) -> str:
        return self.parts[0]

    @property
    def memory_order(self) -> str | None:
        """How an access of global memory orders the programs of a launch; None for one that does not.

        An order among the threads of one program, or of a cluster, is none of programs.
        """
        atomic = self.opcode in ("atom", "red")
        if not (atomic or self.opcode in ("ld", "st") and "global" in self.parts):
            return None
        if "cta" in self.parts or "cluster" in self.parts:
            return None
        orders = [x for x in ("acquire", "release", "acq_rel") if x in self.parts]
        strong = atomic or "volatile" in self.parts or "relaxed" in self.parts
        return orders[0] if orders else "relaxed" if strong else None

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"line {self.line}{source}: {shortened(self.text)}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel parameter: `type` such as u64 or f32, or b8 with `size` bytes for a structure."""

    name: str
    type: str
    size: int | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parsed `.entry`. `labels` gives the index of the instruction that follows each label."""

    name: str
    parameters: tuple[Parameter, ...]
    num_threads: int
    registers: dict[str, str]  # by prefix (%r) or whole name: the declared type
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    branch_targets: dict[str, tuple[str, ...]]  # the labels of each jump table

    def declared_type(self, register: str) -> str | None:
        """Such as b32 or pred; None if `register` names no register."""
        whole = self.registers.get(register)
        return whole or self.registers.get(register.rstrip("0123456789") + "<>")


def vector(operand: str) -> list[str]:
    """The elements of `{%r1, %r2}`, or the operand itself."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


def number(operand: str) -> int:
    """Such as -1, 0x7632U or 31."""
    return int(operand.rstrip("U"), 0)


def shortened(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse(ptx: str) -> Kernel:
    """The only kernel in `ptx`; raises UnsupportedInstruction where a line is none of the known forms."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    entry = next((i for i, line in enumerate(lines) if ".entry" in line), None)
    if entry is None:
        raise UnsupportedInstruction("a text without .entry: this is no PTX of a kernel")
    name = re.search(r"\.entry\s+([\w$]+)", lines[entry])[1]
    opening = lines.index("{", entry)
    header = lines[entry:opening]
    matches = [m for line in header if (m := _PARAMETER.search(line))]
    parameters = [Parameter(m[2], m[1], int(m[3]) if m[3] else None) for m in matches]
    num_threads = _num_threads(name, " ".join(header))

    paths = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE)
    files = {number: PurePath(path).name for number, path in paths}
    registers, instructions, labels, branch_targets, source = {}, [], {}, {}, ""
    for number, text in _statements(lines, opening + 1):
        if text.startswith(".loc"):
            file, row = text.split()[1:3]
            source = f"{files.get(file, '?')}:{row}"
        elif match := _DECLARATION.match(text):
            registers |= {r: match[1] for r in _declared(match[2])}
        elif match := _LABEL.match(text):
            labels[match[1]] = len(instructions)
        elif match := _BRANCH_TARGETS.match(text):
            branch_targets[match[1]] = tuple(x.strip() for x in match[2].split(","))
        elif not text.startswith("."):
            instructions.append(_instruction(name, text, number, source))
    return Kernel(
        name,
        tuple(parameters),
        num_threads,
        registers,
        tuple(instructions),
        labels,
        branch_targets,
    )


def _num_threads(kernel: str, header: str) -> int:
    """Of a program, by `.reqntid`: up to 32 whole warps along the first axis."""
    match = re.search(r"\.reqntid\s+([\d, ]+)", header)
    if not match:
        raise UnsupportedInstruction(f"{kernel}: without .reqntid its number of threads is unknown")
    number, *others = map(int, match[1].split(","))
    if number % 32 or not 0 < number <= 1024 or any(x != 1 for x in others):
        raise UnsupportedInstruction(f"{kernel}: {match[0].strip()} is not 1 to 32 whole warps")
    return number


def _declared(text: str) -> Iterator[str]:
    """`%r<188>` declares a prefix, written `%r<>` here; other names stand for themselves."""
    for register in text.split(","):
        yield re.sub(r"<\d+>", "<>", register.strip())


def _statements(lines: list[str], start: int) -> Iterator[tuple[int, str]]:
    """Line numbers and statements up to the closing brace; names local to a scope are made unique."""
    number = start
    while lines[number] != "}":
        if lines[number].endswith(".branchtargets"):  # a list over several lines
            end = next(i for i in range(number, len(lines)) if lines[i].endswith(";"))
            yield number + 1, " ".join(lines[number : end + 1]).rstrip(";")
            number = end
        elif lines[number] == "{":
            end = lines.index("}", number)
            yield from _scope(lines, number + 1, end)
            number = end
        else:
            yield from ((number + 1, text) for text in _split_line(lines[number]))
        number += 1


def _scope(lines: list[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    statements = [(i + 1, text) for i in range(start, end) for text in _split_line(lines[i])]
    local = set()
    for _, text in statements:
        if match := _DECLARATION.match(text):
            local |= set(_declared(match[2]))
        elif match := _LABEL.match(text):
            local.add(match[1])
    names = (
        re.compile(rf"(?<![\w.%$])({'|'.join(map(re.escape, local))})(?![\w<])") if local else None
    )
    for number, text in statements:
        yield number, names.sub(rf"\1_scope{start}", text) if names else text


def _split_line(line: str) -> Iterator[str]:
    """The statements of one line, without semicolons; a label may stand before an instruction."""
    for text in line.split(";"):
        text = text.strip()
        if ":" in text and (match := _LABELLED.match(text)):
            yield match[1]
            text = match[2]
        if text:
            yield text


def _instruction(kernel: str, text: str, line: int, source: str) -> Instruction:
    read = _read(text)
    if read is None:
        raise UnsupportedInstruction(f"{kernel}, line {line}: cannot read {shortened(text)!r}")
    return Instruction(*read, line, text, source)


@functools.lru_cache(maxsize=1 << 16)
def _read(text: str) -> tuple[tuple[str, ...], tuple[str, ...], str | None, bool] | None:
    """The parts, operands and predicate of one instruction. Kernels have many in common."""
    match = _INSTRUCTION.match(text)
    if not match:
        return None
    negated, predicate, opcode, operands = match.groups()
    return tuple(opcode.split(".")), tuple(_split_operands(operands)), predicate, bool(negated)


def _split_operands(text: str) -> Iterator[str]:
    """Split at commas outside of braces and brackets."""
    depth, current = 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            yield current.strip()
            current = ""
        else:
            current += character
    if current.strip():
        yield current.strip()
