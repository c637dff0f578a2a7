"""Loads and stores of global and shared memory by the threads of a strand.

Addresses are arrays `[programs or 1, threads or 1]`, and so are masks, which are None for all threads. A
value of several elements is a tuple of arrays.
"""

import numpy as np

from ptx_emulator import counts, reports
from ptx_emulator.errors import InvalidAccess
from ptx_emulator.global_memory import BASE, IN_ELEMENT, NOWHERE
from ptx_emulator.order import agent_of
from ptx_emulator.shared_memory import SHARED_BASE, same_bits
from ptx_emulator.types import UNSIGNED


def load_global(S, address, size, count, mask, line):
    total = size * count
    index = global_index(S, address, total, mask, line)
    counts.count_global(S, "read", index, total, mask)
    note_global_read(S, index, total, mask, line)
    return as_elements(S.memory.views[total][index], size, count)


def store_global(S, address, size, values, mask, line):
    total = size * len(values)
    index = S.all_threads(global_index(S, address, total, mask, line))
    counts.count_global(S, "written", index, total, mask)
    program, warps = who(S)
    index, data, program, warps = S.active(mask, index, as_one(S, values, size), program, warps)
    write_global(S, index, total, data, program, S.batch.clocks.stamps(warps), line)


def who(S):
    """The program and the warp of each thread: `[programs, threads]`."""
    return S.all_threads(S.batch.names), S.all_threads(S.warp_of_thread)


def note_global_read(S, index, size, mask, line):
    """Threads read elements of `size` bytes: no other program may have written them, nor a warp just now."""
    index, program, warps = S.active(mask, S.all_threads(index), *who(S))
    units, program, warps = S.memory.units(index, size), program[:, None], warps[:, None]
    note_program_read(S, units, program, warps, line)
    report_early_read(S, units, program, warps, line)


def note_program_read(S, units, program, warps, line):
    """Programs read units of global memory, `program` and `warps` broadcasting against `units`."""
    order = S.memory.order
    if order.written_by_others(S, units, program, warps).any():
        S.report(reports.FOREIGN_READ, line)
    order.note_read(units, program)


def report_early_read(S, units, program, warps, line, strong=False):
    """Where warps read what another one of their program has written, with no barrier between."""
    order = S.memory.order
    own = order.writer[units] == program
    if strong:
        own &= ~order.strong[units]
    if own.any() and (own & S.batch.clocks.unordered(warps, order.stamp[units])).any():
        S.report(reports.GLOBAL_READ_AFTER_WRITE, line)


def write_global(S, index, size, data, program, stamps, line, strong=False):
    """Give elements of `size` bytes, all arrays of one axis, new values, and note which program did."""
    memory, order, view = S.memory, S.memory.order, S.memory.views[size]
    units, program, stamps = memory.units(index, size), program[:, None], stamps[:, None]
    other = order.written_by_others(S, units, program, agent_of(stamps), strong)
    other = (other | order.read_by_others(units, program)).any(1)
    if other.any() and not same_bits(view[index[other]], data[other]):
        S.report(reports.FOREIGN_WRITE, line)
    order.note_write(units, program, stamps, strong)
    view[index] = data
    memory.version += 1
    if not same_bits(view[index], data):
        S.report(reports.LANES_DIFFER, line)


def global_index(S, address, size, mask, line):
    """Addresses as indices of elements of `size` bytes, 0 for idle threads; others are reported."""
    memory = S.memory
    offset = (address - np.uint64(BASE)).view(np.int64)
    if mask is not None:
        offset = np.where(mask, offset, 0)
    wild = (offset < 0) | (offset + size > len(memory.bytes))
    if wild.any():
        address = np.broadcast_to(address, wild.shape)[wild][0]
        S.fail(InvalidAccess, line, f"no tensor is anywhere near the address 0x{int(address):x}")
    if (offset & (size - 1)).any():
        S.fail(InvalidAccess, line, f"an address that {size} bytes do not divide")
    index = offset // size
    owner = memory.owners(size)[index]
    if mask is not None:
        owner = np.where(mask, owner, IN_ELEMENT)
    if (owner < IN_ELEMENT).any():
        kind = reports.OUT_OF_BOUNDS if (owner == NOWHERE).any() else reports.OUTSIDE_ARGUMENT
        S.report(kind, line, S.first_thread(owner < IN_ELEMENT))
    return index


def load_shared(S, address, size, count, mask, line):
    total = size * count
    offsets = shared_offsets(S, address, total, mask, line)
    counts.count_banks(S, "ld_shared", offsets, total, mask)
    note_access(S, "read", offsets, total, mask, line)
    return as_elements(S.shared.gather(offsets, total), size, count)


def store_shared(S, address, size, values, mask, line):
    total = size * len(values)
    offsets = shared_offsets(S, address, total, mask, line)
    counts.count_banks(S, "st_shared", offsets, total, mask)
    note_access(S, "write", offsets, total, mask, line)
    scatter(S, offsets, total, as_one(S, values, size), mask, line)


def shared_offsets(S, address, size, mask, line):
    """Addresses as byte offsets within a program's shared memory, 0 for idle threads."""
    offsets = address.view(np.int32).astype(np.int64) - SHARED_BASE
    if mask is not None:
        offsets = np.where(mask, offsets, 0)
    if offsets.size and (offsets.min() < 0 or offsets.max() + size > S.shared.num_bytes):
        S.fail(
            InvalidAccess,
            line,
            f"bytes {offsets.min()} to {offsets.max() + size} of shared memory, which has"
            f" {S.shared.num_bytes}",
        )
    if (offsets & (size - 1)).any():
        S.fail(InvalidAccess, line, f"an address that {size} bytes do not divide")
    return offsets


def note_access(S, what, offsets, size, mask, line):
    """Tell shared memory who reads or writes, for offsets `[programs or 1, threads or 1]`."""
    flat, units, warps = touched(S, offsets, size, mask)
    if not flat.size:
        return
    if what == "read":
        S.shared.note_read(S, units, warps, line)
    else:
        S.shared.note_write(S, units, warps, line)
        S.batch.time += 1


def touched(S, offsets, size, mask):
    """Of the active threads: flat byte offsets `[n]`, the units there `[n, units]`, their warps `[n, 1]`."""
    flat = S.all_threads(S.shared.flat(offsets))
    flat, warps = S.active(mask, flat, S.all_threads(S.warp_of_thread))
    return flat, S.shared.units(flat, size), warps[:, None]


def scatter(S, offsets, size, data, mask, line):
    flat, data = S.active(mask, S.all_threads(S.shared.flat(offsets)), S.all_threads(data))
    if not S.shared.scatter(flat, size, data):
        S.report(reports.LANES_DIFFER, line)


def as_elements(data, size, count):
    if count == 1:
        return (data,)
    parts = np.ascontiguousarray(data).view(UNSIGNED[size]).reshape(*data.shape, count)
    return tuple(np.ascontiguousarray(parts[..., i]) for i in range(count))


def as_one(S, values, size):
    data = np.empty((*S.shape, len(values)), UNSIGNED[size])
    for place, value in enumerate(values):
        data[..., place] = value
    return data.view(UNSIGNED[size * len(values)])[..., 0]
