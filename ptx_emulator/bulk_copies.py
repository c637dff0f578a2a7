"""Copies of tiles by the tensor memory accelerator: `cp.async.bulk.tensor`, both ways.

A load announces itself at an mbarrier and is there when the phase ends, no earlier: until then its target
reads as all bits one. A store reads shared memory until the wait for its group; what it writes is seen at
once.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ptx_emulator import counts, reports
from ptx_emulator.accesses import (
    global_index,
    note_program_read,
    shared_offsets,
    write_global,
)
from ptx_emulator.barriers import advance, mbarrier_at
from ptx_emulator.shared_memory import IN_FLIGHT, SHARED_BASE
from ptx_emulator.tensormap import TensorMap, decode
from ptx_emulator.types import UNSIGNED
from ptx_emulator.wgmma import swizzled

SWIZZLED_BITS_OF_MODE = {0: 0, 1: 1, 2: 3, 3: 7}  # of a tensor map, unlike those of wgmma


@dataclasses.dataclass(eq=False)
class Transfer:
    """A load in flight: byte offsets in shared memory `[programs, elements]`, and their data."""

    offsets: np.ndarray
    data: np.ndarray
    element_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of each program."""
        return self.data.shape[1] * self.element_bytes

    def deliver(self, batch, engine: int) -> None:
        offsets = batch.shared.flat(self.offsets)
        units = batch.shared.units(offsets, self.element_bytes)
        batch.shared.mark_written(batch, units, np.array(engine), by_store=False)
        batch.shared.scatter(offsets, self.element_bytes, self.data)


@dataclasses.dataclass(eq=False)
class Store:
    """A store that still reads: byte offsets in shared memory, and what it has read."""

    offsets: np.ndarray
    data: np.ndarray
    element_bytes: int
    warps: np.ndarray
    time: int
    line: int


def bulk_load(S, target, mbarrier, descriptor, coordinates, mask, line):
    """By each active thread, of which each warp has elected one."""
    for thread in S.active_threads(mask, line):
        of = _Operands(S, thread, line)
        tensor = decode(S, of(descriptor), line)
        size = tensor.element_bytes
        addresses, inside = _elements(tensor, [of(x) for x in coordinates])
        index = global_index(S, addresses, size, inside, line)
        inside = S.all_programs(inside)
        counts.count_bulk(S, "read", S.all_programs(index), size, inside)
        program = np.broadcast_to(S.batch.names, inside.shape)
        units = S.memory.units(S.all_programs(index)[inside], size)
        note_program_read(S, units, program[inside][:, None], of.warp[:, None], line)
        data = S.memory.views[size][index]
        data = np.where(inside, data, data.dtype.type(0))
        offsets = of.tile(tensor, target)
        flat = S.shared.flat(offsets)
        units = S.shared.units(flat, size)
        S.shared.note_async_access(S, units, of.warp, line)
        S.shared.note_write(S, units, of.warp[:, None, None], line, copy=True)
        S.shared.state[units] = IN_FLIGHT
        ones = np.full(size, 0xFF, np.uint8).view(UNSIGNED[size])
        S.shared.scatter(flat, size, np.broadcast_to(ones, flat.shape))
        S.batch.time += 1
        barrier = mbarrier_at(S, of(mbarrier), None, line)
        barrier.transfers.append(Transfer(offsets, data, size))
        barrier.line = line
        advance(S.batch, barrier)
    S.update_settled()


def bulk_store(S, source, descriptor, coordinates, mask, line):
    for thread in S.active_threads(mask, line):
        of = _Operands(S, thread, line)
        tensor = decode(S, of(descriptor), line)
        size = tensor.element_bytes
        addresses, inside = _elements(tensor, [of(x) for x in coordinates])
        index = S.all_programs(global_index(S, addresses, size, inside, line))
        inside = S.all_programs(inside)
        offsets = of.tile(tensor, source)
        units = S.shared.units(S.shared.flat(offsets), size)
        S.shared.note_async_access(S, units, of.warp, line)
        S.shared.note_read(S, units, of.warp[:, None, None], line)
        data = S.shared.gather(offsets, size)
        program = np.broadcast_to(S.batch.names, data.shape)
        counts.count_bulk(S, "written", index, size, inside)
        stamps = np.broadcast_to(S.batch.clocks.stamps(of.warp)[0], data.shape)
        values = index[inside], size, data[inside], program[inside], stamps[inside]
        write_global(S, *values, line)
        S.open_stores.append(Store(offsets, data, size, of.warp, S.batch.time, line))


def commit_bulk(S):
    S.store_groups.append(S.open_stores)
    S.open_stores = []


def wait_for_bulk(S, pending):
    """Complete the reads of all groups but the last `pending`."""
    while len(S.store_groups) > pending:
        for store in S.store_groups.popleft():
            units = S.shared.units(S.shared.flat(store.offsets), store.element_bytes)
            changed = S.shared.gather(store.offsets, store.element_bytes) != store.data
            if changed.any() or (S.shared.write_time[units] >= store.time).any():
                S.report(reports.OPERAND_CHANGED, store.line)
            warps = store.warps[:, None, None]
            S.shared.mark_read(units, warps, S.batch.clocks)


class _Operands:
    """What one thread of each program has: called with an operand, `[programs or 1, 1]`."""

    def __init__(self, S, thread: int, line: int):
        self._strand, self._thread, self._line = S, thread, line
        self.warp = S.warp_of_thread[0, thread : thread + 1]  # [1]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x if x.shape[1] == 1 else x[:, self._thread : self._thread + 1]

    def tile(self, tensor: TensorMap, address: np.ndarray) -> np.ndarray:
        """Byte offsets in shared memory of the elements of a box: [programs, elements]."""
        S, line = self._strand, self._line
        count = math.prod(tensor.box)
        start = self(address)
        offsets = shared_offsets(S, start, 128, None, line)
        shared_offsets(S, start + np.uint32(count * tensor.element_bytes - 1), 1, None, line)
        linear = offsets + SHARED_BASE + np.arange(count) * tensor.element_bytes
        offsets = swizzled(linear, SWIZZLED_BITS_OF_MODE[tensor.swizzle]) - SHARED_BASE
        return S.all_programs(offsets)


def _elements(tensor: TensorMap, coordinates: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Global addresses of the elements of a box, `[programs or 1, elements]`, and which the tensor has.

    Those outside have the address of its first element.
    """
    rank = len(tensor.box)
    offsets, inside = np.zeros([1] * (rank + 1), np.int64), np.ones([1] * (rank + 1), np.bool_)
    for axis, coordinate in enumerate(coordinates):  # the innermost first
        first = coordinate.view(np.int32).astype(np.int64).reshape(-1, *[1] * rank)
        place = first + np.arange(tensor.box[axis]).reshape(-1, *[1] * axis)
        dim, stride = (x[:, axis].reshape(-1, *[1] * rank) for x in (tensor.dims, tensor.strides))
        inside = inside & (place >= 0) & (place < dim)
        offsets = offsets + place * stride
    offsets = np.where(inside, offsets, 0).reshape(len(offsets), -1)
    address = tensor.address.astype(np.int64)[:, None] + offsets
    return address.astype(np.uint64), inside.reshape(len(inside), -1)
