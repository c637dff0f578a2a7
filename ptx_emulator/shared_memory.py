"""Shared memory of the programs of a batch, and for each unit of it who touched it last.

A unit is 4 bytes, or less where a kernel stores less at once. Indices are flat: program c owns
the units `c * num_units` and up. An asynchronous copy leaves its target IN_FLIGHT, all bits one, until
something that waits for it delivers it.
"""

import numpy as np

from ptx_emulator import reports
from ptx_emulator.order import AGENT_BITS, Clocks, agent_of
from ptx_emulator.types import UNSIGNED

SHARED_BASE = 1024  # the first KiB is the system's
GROUP = 4  # warps that execute a wgmma
DELIVERED, NEVER_WRITTEN, IN_FLIGHT, MBARRIER = range(4)


class SharedMemory:
    def __init__(self, num_programs: int, num_bytes: int, unit: int, num_warps: int):
        self.num_bytes, self.unit = num_bytes, unit
        self.num_units = num_bytes // unit
        total = num_programs * self.num_units
        self._set_words(np.full((num_programs, num_bytes // 16), np.nan, np.complex128))
        self.views[4][:] = 0xFFFFFFFF
        self.written = np.zeros(total, np.int32)  # stamp of the last write (see order.py)
        self.read = np.zeros((total, num_warps), np.int32)  # tick of each warp's last read
        self.last_read = np.zeros(total, np.int32)  # at least the largest of these
        self.state = np.full(total, NEVER_WRITTEN, np.uint8)
        self.write_time = np.zeros(total, np.int32)
        self.by_store = np.zeros(
            total, np.bool_
        )  # not by a copy: asynchronous readers need a fence

    def _set_words(self, words: np.ndarray) -> None:
        self.words = words
        self.views = {size: words.view(dtype) for size, dtype in UNSIGNED.items()}

    def of_programs(self, index: np.ndarray) -> "SharedMemory":
        """A copy for some of the programs."""
        new = object.__new__(SharedMemory)
        new.num_bytes, new.unit, new.num_units = self.num_bytes, self.unit, self.num_units
        new._set_words(self.words[index])
        for name in ("written", "read", "last_read", "state", "write_time", "by_store"):
            array = getattr(self, name)
            rows = array.reshape(-1, self.num_units, *array.shape[1:])[index]
            setattr(new, name, rows.reshape(-1, *array.shape[1:]))
        return new

    # --- values -----------------------------------------------------------------------------------------

    def gather(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Elements of `size` bytes at the byte offsets `[programs or 1, ...]`."""
        view, index = self.views[size], offsets // size
        if index.shape[0] == 1:
            return np.take(view, index[0], axis=1)
        return np.take(view, index + self._first(index.ndim, view.shape[1]))

    def scatter(self, offsets: np.ndarray, size: int, values: np.ndarray) -> bool:
        """Store elements at flat byte offsets; False if two of different value met at one place."""
        view, index = self.views[size].reshape(-1), offsets // size
        view[index] = values
        return same_bits(view[index], np.broadcast_to(values, index.shape))

    def _first(self, ndim: int, row: int) -> np.ndarray:
        return (np.arange(len(self.words)) * row).reshape(-1, *[1] * (ndim - 1))

    def flat(self, offsets: np.ndarray) -> np.ndarray:
        """Byte offsets `[programs or 1, ...]` within a program's memory as such within all of it."""
        return offsets + self._first(offsets.ndim, self.num_bytes)

    def units(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """The units of accesses of `size` bytes at flat byte offsets: `[..., units of one]`."""
        count = max(size // self.unit, 1)
        return (offsets // self.unit)[..., None] + np.arange(count)

    # --- the order of accesses --------------------------------------------------------------------------

    def note_read(self, strand, units: np.ndarray, warps: np.ndarray, line: int) -> None:
        """A read by `warps`, which broadcast against `units`, must come after the last write."""
        clocks = strand.batch.clocks
        self._report_state(
            strand, units, line,
            (IN_FLIGHT, reports.READ_TOO_EARLY), (NEVER_WRITTEN, reports.READ_NEVER_WRITTEN),
        )  # fmt: skip
        stamps = self.written[units]
        if stamps.max() >= strand.settled:
            race = clocks.unordered(warps, stamps)
            if race.any():
                strand.report(reports.READ_AFTER_WRITE, line, self._where(units, race))
        self.mark_read(units, warps, clocks)

    def _report_state(self, strand, units: np.ndarray, line: int, *kinds: tuple[int, str]) -> None:
        """What may not be touched in these states."""
        state = self.state[units]
        if not state.any():  # all are DELIVERED
            return
        for value, kind in kinds:
            if (state == value).any():
                strand.report(kind, line, self._where(units, state == value))

    def mark_read(self, units: np.ndarray, warps: np.ndarray, clocks: Clocks) -> None:
        ticks = clocks.now[warps]
        if (
            warps.shape[-1] == GROUP
        ):  # each unit is read by all warps of a group: by one number of 16 bytes
            of_groups = self.read.view(np.complex128)
            of_groups[units[..., 0], warps[..., 0] // GROUP] = ticks.view(np.complex128)[..., 0]
        else:
            self.read[units, warps] = ticks
        self.last_read[units] = clocks.now.max()

    def note_write(
        self, strand, units: np.ndarray, agents: np.ndarray, line: int, copy: bool = False
    ) -> None:
        """A write must come after the last write and after every warp's last read."""
        clocks = strand.batch.clocks
        stamps = self.written[units]
        if stamps.max() >= strand.settled:
            race = clocks.unordered(agents, stamps)
            if race.any():
                strand.report(reports.WRITE_AFTER_WRITE, line, self._where(units, race))
        if int(self.last_read[units].max()) << AGENT_BITS >= strand.settled:
            ticks = self.read[units]  # [..., warps]
            agents_at = np.broadcast_to(agents, units.shape)[..., None]
            warps = np.arange(ticks.shape[-1])
            race = (ticks > clocks.seen[agents_at, warps]) & (warps != agents_at)
            if race.any():
                strand.report(reports.WRITE_AFTER_READ, line, self._where(units, race.any(-1)))
        self._report_state(
            strand, units, line,
            (IN_FLIGHT, reports.WRITE_IN_FLIGHT), (MBARRIER, reports.MBARRIER_OVERWRITTEN),
        )  # fmt: skip
        self.mark_written(strand.batch, units, agents, by_store=not copy)

    def mark_written(self, batch, units: np.ndarray, agents: np.ndarray, by_store: bool) -> None:
        self.written[units] = batch.clocks.stamps(agents)
        self.write_time[units] = batch.time
        self.by_store[units] = by_store
        self.state[units] = DELIVERED

    def note_async_access(self, strand, units: np.ndarray, warps: np.ndarray, line: int) -> None:
        """An access by an engine for `warps`, which does not see stores before a proxy fence.

        Either the warp that stored has executed one since, with all its threads, or the issuing warps have.
        """
        stores = self.by_store[units]
        if stores.any():
            batch = strand.batch
            writer = agent_of(self.written[units])
            fenced = np.maximum(batch.fenced[writer], batch.partly_fenced[warps].min())
            late = stores & (self.write_time[units] >= fenced)
            if late.any():
                strand.report(reports.NO_PROXY_FENCE, line, self._where(units, late))

    def _where(self, units: np.ndarray, bad: np.ndarray) -> str:
        unit = int(np.broadcast_to(units, bad.shape)[bad][0])
        return f"first at byte {unit % self.num_units * self.unit} of shared memory"


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether arrays of one shape and dtype have the same bytes: NaN equals itself, 0 not -0."""
    return np.array_equal(
        np.ascontiguousarray(x).view(np.uint8), np.ascontiguousarray(y).view(np.uint8)
    )
