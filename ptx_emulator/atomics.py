"""Accesses of global memory by which programs of a launch wait for each other.

They are atomics (`atom`, `red`), and loads and stores that are volatile or relaxed, or acquire or release.
They are executed one after the other: program by program, and thread by thread within one.
"""

import numpy as np

from ptx_emulator import counts, reports
from ptx_emulator.accesses import (
    as_elements,
    as_one,
    global_index,
    report_early_read,
    who,
    write_global,
)
from ptx_emulator.arithmetic import flushed, packed
from ptx_emulator.types import DTYPES, UNSIGNED


def load_strong(S, address, size, count, mask, order, line):
    total = size * count
    index = S.all_threads(global_index(S, address, total, mask, line))
    counts.count_global(S, "read", index, total, mask)
    _check_read(S, index, total, mask, line)
    S.memory.order.synchronise(S, index * total, np.zeros(S.shape, np.bool_), mask, order)
    return as_elements(S.memory.views[total][index], size, count)


def store_strong(S, address, size, values, mask, order, line):
    total = size * len(values)
    index = S.all_threads(global_index(S, address, total, mask, line))
    counts.count_global(S, "written", index, total, mask)
    stored, data, program, warps = S.active(mask, index, as_one(S, values, size), *who(S))
    write_global(S, stored, total, data, program, S.batch.clocks.stamps(warps), line, strong=True)
    written = np.ones(S.shape, np.bool_)
    S.memory.order.synchronise(S, index * total, written, mask, order, replaces=True)


def atomic(S, what, type, address, values, mask, order, line):
    """What was there before. Values are tuples of numbers in a row: what cas expects, and what is given."""
    size, count = UPDATES[what, type][0], len(values[-1])
    first = S.all_threads(global_index(S, address, size * count, mask, line))
    counts.count_global(S, "written", first, size * count, mask)
    found = []
    for place in range(count):
        index = first * count + place
        operands = [S.all_threads(x[place]) for x in values]
        found.append(_update(S, what, type, index, operands, mask, order, line))
    return found


def _update(S, what, type, index, operands, mask, order, line):
    size, update = UPDATES[what, type]
    memory, active = S.memory, S.all_threads(True if mask is None else mask)
    _check_read(S, index, size, mask, line)
    found, changed = np.zeros(S.shape, UNSIGNED[size]), np.zeros(S.shape, np.bool_)
    found[active], changed[active] = _in_turn(
        memory.views[size], index[active], update, [x[active] for x in operands]
    )
    if changed.any():
        places, program, warps = S.active(changed, index, *who(S))
        units, program = memory.units(places, size), program[:, None]
        if memory.order.read_by_others(units, program).any():
            S.report(reports.FOREIGN_WRITE, line)
        stamps = S.batch.clocks.stamps(warps)[:, None]
        memory.order.note_write(units, program, stamps, strong=True)
        memory.version += 1
    memory.order.synchronise(S, index * size, active, mask, order)
    return found


def _in_turn(view, index, update, operands):
    """What each access finds, and whether it leaves something else, where several may have one index."""
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    lengths = np.diff(starts, append=len(index))
    turns = np.arange(len(index)) - np.repeat(starts, lengths)
    found, left = np.zeros((2, len(index)), view.dtype)
    for turn in range(lengths.max(initial=0)):
        now = order[turns == turn]
        found[now] = view[index[now]]
        left[now] = view[index[now]] = update(found[now], *(x[now] for x in operands))
    return found, found != left


def _check_read(S, index, size, mask, line):
    """A strong read comes after the writes that are not strong."""
    index, program, warps = S.active(mask, index, *who(S))
    units, program, warps = S.memory.units(index, size), program[:, None], warps[:, None]
    if S.memory.order.written_by_others(S, units, program, warps, strong=True).any():
        S.report(reports.FOREIGN_READ, line)
    report_early_read(S, units, program, warps, line, strong=True)


def fence(S, mask):
    S.memory.order.fence(S, mask)


def _typed(function, type):
    """Of bits, as a function of numbers of a type."""
    dtype = DTYPES[type]
    bits = UNSIGNED[np.dtype(dtype).itemsize]
    return lambda *operands: function(*(x.view(dtype) for x in operands)).view(bits)


def _packed_sum(type):
    return lambda x, y: packed(np.add, type, x, y)


def _flushed_sum(x, y):
    """Of float32, whose atomics know no subnormal numbers."""
    return flushed(flushed(x) + flushed(y))


# By operation and type: the bytes of a value, and what becomes of one in memory, all as unsigned numbers.
UPDATES = {("add", "f32"): (4, _typed(_flushed_sum, "f32"))}
for _bits in (32, 64):
    for _type in (f"u{_bits}", f"s{_bits}"):
        for _name, _function in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
            UPDATES[_name, _type] = _bits // 8, _typed(_function, _type)
    for _name, _function in (
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor),
        ("exch", lambda old, new: new),
        ("cas", lambda old, expected, new: np.where(old == expected, new, old)),
    ):  # fmt: skip
        UPDATES[_name, f"b{_bits}"] = _bits // 8, _function
UPDATES["cas", "b16"] = 2, UPDATES["cas", "b32"][1]
for _type, _bytes in {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4}.items():
    UPDATES["add", _type] = _bytes, _packed_sum(_type)
