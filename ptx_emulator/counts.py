"""What a launch has executed: instructions by unit, FLOPs of matrices, bytes, sectors and bank conflicts.

Counted per warp: an instruction that a warp executes is one, whatever its predicate says. Bytes are those of
active threads. Sectors and banks take time to count and are counted on demand (`Options.memory_counts`):
sectors for each access of a warp, and `distinct_` ones once for a launch.
"""

import numpy as np

from ptx_emulator.parser import Instruction

UNITS = (
    "matrix", "fp32", "integer", "special", "shared_load", "shared_store", "global_load",
    "global_store", "async_copy", "shuffle", "barrier", "control",
)  # fmt: skip
SECTOR = 32
BANKS = 32


def unit_of(instruction: Instruction) -> str | None:
    """The unit of the multiprocessor that executes an instruction; None if it only gives names."""
    parts, opcode, type = instruction.parts, instruction.opcode, instruction.parts[-1]
    if opcode == "mma" or parts[:2] == ("wgmma", "mma_async"):
        return "matrix"
    if opcode in ("ex2", "lg2", "rsqrt", "sqrt", "rcp", "sin", "cos", "tanh"):
        return "special"
    if opcode in ("ldmatrix", "stmatrix"):
        return "shared_load" if opcode == "ldmatrix" else "shared_store"
    if opcode in ("atom", "red"):
        return "global_store"
    if opcode in ("ld", "st"):
        if "param" in parts:
            return None
        space = "shared" if any(x.startswith("shared") for x in parts) else "global"
        return f"{space}_{'load' if opcode == 'ld' else 'store'}"
    if opcode == "cp":
        if "bulk_group" in parts:  # a store, which says what its group is of
            return "async_copy"
        return "barrier" if any("group" in x for x in parts) else "async_copy"
    if opcode in ("bar", "barrier", "mbarrier", "fence", "membar", "wgmma"):
        return "barrier"
    if opcode in ("shfl", "redux", "vote", "elect"):
        return "shuffle"
    if opcode in ("bra", "brx", "ret", "exit"):
        return "control"
    if opcode in ("mov", "cvta") or (opcode in ("neg", "abs") and type == "f32"):
        return None  # to machine code a sign or an absolute value is part of an operand
    if opcode != "cvt" and "f16" in type:
        return "fp32"
    return "fp32" if type in ("f32", "f32x2") else "integer"


def count(S, name: str, number: int) -> None:
    S.batch.launch.counts[name] += number


def count_matrix(S, kind: str, m: int, n: int, k: int, number: int) -> None:
    """FLOPs of so many products `[m, k] [k, n]` of each program."""
    count(S, f"matrix_flops_{kind}", 2 * m * n * k * number * S.num_programs)


def count_global(S, verb: str, index: np.ndarray, size: int, mask) -> None:
    """Bytes of active threads; and the sectors of 32 bytes that each warp's access touches."""
    active = S.num_active(mask)
    count(S, f"bytes_{verb}", size * active)
    if not S.options.memory_counts:
        return
    sectors = S.all_threads(index).reshape(-1, 32) * size // SECTOR
    if mask is not None:
        sectors = np.where(S.all_threads(mask).reshape(-1, 32), sectors, -1)
    _count_sectors(S, verb, sectors)


def count_bulk(S, verb: str, index: np.ndarray, size: int, inside: np.ndarray) -> None:
    """The same of the elements of a tile that is copied as a whole, `[programs, elements]`."""
    count(S, f"bytes_{verb}", size * int(np.count_nonzero(inside)))
    count(S, "bulk_shared_bytes", size * inside.size)
    if S.options.memory_counts:
        _count_sectors(S, verb, np.where(inside, index * size // SECTOR, -1))


def _count_sectors(S, verb: str, sectors: np.ndarray) -> None:
    """Of each row, an access, those it touches (negative: none); and those that the launch has not yet."""
    count(S, f"sectors_{verb}", _num_distinct(sectors))
    touched = S.memory.touched[verb]
    new = np.unique(sectors[sectors >= 0])
    new = new[~touched[new]]
    touched[new] = True
    count(S, f"distinct_sectors_{verb}", len(new))


def count_banks(S, name: str, offsets: np.ndarray, size: int, mask) -> None:
    """Wavefronts of an access per warp: of every 128 bytes, the most words that one bank must give."""
    if not S.options.memory_counts:
        return
    words = max(size // 4, 1)
    # 32 threads of 4 n bytes take n phases of 32 / n threads.
    phases = S.all_threads(offsets).reshape(-1, 32 // words)[..., None] // 4 + np.arange(words)
    phases = phases.reshape(len(phases), -1)
    if mask is not None:
        active = S.all_threads(mask).reshape(-1, 32 // words)[..., None].repeat(words, -1)
        phases = np.where(active.reshape(phases.shape), phases, -1)
    _count_wavefronts(S, name, phases)


def count_bank_groups(S, name: str, offsets: np.ndarray) -> None:
    """The same of matrices: byte offsets `[..., rows, words of a row]`, a matrix a phase."""
    if S.options.memory_counts:
        offsets = np.broadcast_to(offsets, (S.num_programs, *offsets.shape[1:]))
        _count_wavefronts(S, name, offsets.reshape(-1, 32) // 4)


def _count_wavefronts(S, name: str, words: np.ndarray) -> None:
    words = np.sort(words, axis=1)
    first = words >= 0
    first[:, 1:] &= words[:, 1:] != words[:, :-1]
    bank = np.arange(len(words))[:, None] * BANKS + words % BANKS
    per_bank = np.bincount(bank[first], minlength=len(words) * BANKS).reshape(-1, BANKS)
    fullest = per_bank.max(1)
    count(S, f"wavefronts_{name}", int(fullest.sum()))
    count(S, f"least_wavefronts_{name}", int((fullest > 0).sum()))


def _num_distinct(rows: np.ndarray) -> int:
    """How many different numbers, but for negative ones, each row has, in all."""
    rows = np.sort(rows, axis=1)
    first = rows >= 0
    first[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    return int(np.count_nonzero(first))
