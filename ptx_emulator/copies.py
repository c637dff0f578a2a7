"""Asynchronous copies of threads from global to shared memory: `cp.async` and its groups.

A copy is done at the wait that covers it and no earlier: until then its target reads as all bits one.
"""

import collections

import numpy as np

from ptx_emulator import counts, reports
from ptx_emulator.accesses import global_index, note_global_read, shared_offsets, touched
from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.shared_memory import IN_FLIGHT
from ptx_emulator.types import UNSIGNED

Copy = collections.namedtuple("Copy", "offsets size data mask line")


def copy_async(S, target, source, size, num_read, mask, line):
    """Copy `size` bytes per thread; zeros where `num_read` is 0."""
    offsets = shared_offsets(S, target, size, mask, line)
    reads = mask
    if num_read is not None:
        if ((num_read != size) & (num_read != 0)).any():
            S.fail(UnsupportedInstruction, line, "a copy of a part of its bytes")
        reads = num_read == size if mask is None else (num_read == size) & mask
    index = global_index(S, source, size, reads, line)
    counts.count_global(S, "read", index, size, reads)
    note_global_read(S, index, size, reads, line)
    counts.count_banks(S, "cp_async", offsets, size, mask)
    data = S.memory.views[size][index]
    if reads is not None:
        data = np.where(reads, data, data.dtype.type(0))
    flat, units, warps = touched(S, offsets, size, mask)
    if flat.size:
        S.shared.note_write(S, units, warps, line, copy=True)
        S.shared.state[units] = IN_FLIGHT
        S.shared.scatter(flat, size, np.full(size, 0xFF, np.uint8).view(UNSIGNED[size]))
        S.batch.time += 1
    S.open_copies.append(Copy(offsets, size, S.all_threads(data), mask, line))


def commit_copies(S):
    S.copy_groups.append(S.open_copies)
    S.open_copies = []


def wait_for_copies(S, pending):
    """Complete all groups but the last `pending`."""
    while len(S.copy_groups) > pending:
        for copy in S.copy_groups.popleft():
            flat, units, warps = touched(S, copy.offsets, copy.size, copy.mask)
            S.shared.mark_written(S.batch, units, warps, by_store=False)
            if not S.shared.scatter(flat, copy.size, *S.active(copy.mask, copy.data)):
                S.report(reports.LANES_DIFFER, copy.line)
            S.batch.time += 1
