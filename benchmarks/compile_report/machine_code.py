"""Machine code as a list of instructions, of several kernels at once: a disassembler takes long to start."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from triton import knobs

# Those whose instructions have a suffix of their own.
_SUFFIX = {90: "a", 100: "a", 120: "a"}
# Address, predicate, name, operands; for some architectures the schedule follows: &req={1} ?trans3
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*?)(?:\s+[&?][^;]*)?;", re.MULTILINE
)
_LOCAL_ACCESS = re.compile(r"(LDL|STL)((?:\.\w+)*)$")


class Instruction(NamedTuple):
    """A line of machine code: address, predicate if any, name with its modifiers, operands."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """Of a branch: the address it may go to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.kind == "BRA" else None
        return found and int(found[1], 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A branch with a second operand depends on it."""
        always = self.kind in ("BRA", "EXIT", "RET") and not self.predicate
        return not always or "," in self.operands


def disassemble(cubins: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each binary. Addresses go on from one to the next."""
    texts = [text_section(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-b", f"SM{arch}{_SUFFIX.get(arch, '')}", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = (
        Instruction(int(address, 16), predicate, name, operands)
        for address, predicate, name, operands in _INSTRUCTION.findall(output)
    )
    kernels, end, instruction = [], 0, next(instructions, None)
    for text in texts:
        end += len(text)
        kernels.append([])
        while instruction is not None and instruction.address < end:
            kernels[-1].append(instruction)
            instruction = next(instructions, None)
    return kernels


def text_section(cubin: bytes) -> bytes:
    """The code of a binary (ELF, 64 bits, little endian) with one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    # Of each section: name, type, flags, address, offset, size, ...
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    first_name = sections[names][4]
    code = [x for x in sections if cubin.startswith(b".text.", first_name + x[0])]
    if len(code) != 1:
        raise ValueError(f"expected a binary with one kernel, got {len(code)}")
    return cubin[code[0][4] : code[0][4] + code[0][5]]


def spilled_bytes(code: Sequence[Instruction]) -> int:
    """The widths of all loads from and stores to local memory."""
    spilled = 0
    for instruction in code:
        found = _LOCAL_ACCESS.match(instruction.name)
        if found:
            parts = found[2].split(".")
            spilled += 16 if "128" in parts else 8 if "64" in parts else 4
    return spilled
