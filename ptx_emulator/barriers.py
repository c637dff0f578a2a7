"""Barriers: `bar.sync` of whole warps, `mbarrier` objects in shared memory, and proxy fences.

A wait ends a basic block: its function returns the block that comes next, or BLOCKED after noting on the
strand what it waits for. All programs of a batch run in lockstep, so one state stands for all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ptx_emulator import reports
from ptx_emulator.accesses import note_access, shared_offsets
from ptx_emulator.errors import EmulatorError, UnsupportedInstruction
from ptx_emulator.shared_memory import DELIVERED, MBARRIER
from ptx_emulator.translator import BLOCKED
from ptx_emulator.warps import WARP


@dataclasses.dataclass
class Barrier:
    """One of the sixteen that a program has: who is there, and what has happened before they came."""

    arrived: int = 0  # warps
    known: np.ndarray | int = 0  # see Clocks.release
    waiting: list[int] = dataclasses.field(default_factory=list)  # ids of strands


@dataclasses.dataclass
class MBarrier:
    """A phase ends when `count` threads have arrived and all bytes that they announced are there."""

    count: int
    missing: int  # arrivals
    engine: int  # the agent that copies for it, see order.py
    bytes_missing: int = 0
    phase: int = 0
    known: np.ndarray | int = 0  # in the current phase
    released: np.ndarray | int = 0  # by the phases that have ended
    transfers: list = dataclasses.field(default_factory=list)  # see bulk_copies.py
    line: int = 0  # of the last load that announced itself

    @property
    def bytes_coming(self) -> int:
        return sum(transfer.num_bytes for transfer in self.transfers)

    @property
    def lacks(self) -> str:
        return f"{self.missing} arrivals and {self.bytes_missing - self.bytes_coming} bytes"


def trap(S, mask, line):
    if mask is None or mask.any():
        S.fail(EmulatorError, line, "the kernel has called trap, as where an assertion fails")


def proxy_fence(S, mask=None):
    """Of the threads that execute it: for all that a warp has stored it takes all of its threads."""
    S.batch.time += 1
    threads = S.all_threads(True if mask is None else mask).all(0).reshape(-1, WARP)
    S.batch.partly_fenced[S.warps[threads.any(1)]] = S.batch.time
    S.batch.fenced[S.warps[threads.all(1)]] = S.batch.time


# --- bar.sync and bar.arrive ----------------------------------------------------------------------------


def barrier_sync(S, number, num_threads, then, line):
    barrier, known = _arrive(S, number, num_threads, line)
    if known is not None:  # this strand was the last one
        S.batch.clocks.acquire(S.warps, known)
        S.update_settled()
        return then
    barrier.waiting.append(S.id)
    S.block_on(f"barrier {number}", then, line)
    return BLOCKED


def barrier_arrive(S, number, num_threads, line):
    """Waits for nobody, and so comes after nobody, also if it is the last one."""
    _arrive(S, number, num_threads, line)
    S.update_settled()


def _arrive(S, number, num_threads, line) -> tuple[Barrier, np.ndarray | None]:
    """Count the strand's warps. If they complete the barrier wake who waits: then also what is known."""
    batch = S.batch
    if not isinstance(number, int):
        number = int(S.uniform(number, line))
    if num_threads is not None and not isinstance(num_threads, int):
        num_threads = int(S.uniform(num_threads, line))
    expected = batch.num_warps if num_threads is None else num_threads // WARP
    barrier = batch.barriers.setdefault(number, Barrier())
    barrier.arrived += len(S.warps)
    barrier.known = np.maximum(barrier.known, batch.clocks.release(S.warps))
    if barrier.arrived > expected:
        S.fail(EmulatorError, line, f"{barrier.arrived} warps at a barrier of {expected}")
    if barrier.arrived < expected:
        return barrier, None
    del batch.barriers[number]
    for strand in batch.strands:
        if strand.id in barrier.waiting:
            batch.clocks.acquire(strand.warps, barrier.known)
            strand.wake()
    return barrier, barrier.known


# --- mbarrier -------------------------------------------------------------------------------------------


def mbarrier_init(S, address, count, mask, line):
    count = int(S.uniform(count, line))
    _note(S, "write", address, mask, line)
    place = mbarrier_place(S, address, mask, line)
    engine = S.batch.clocks.engine(place)
    if engine is None:
        S.fail(UnsupportedInstruction, line, "so many mbarriers and warps")
    S.batch.mbarriers[place] = MBarrier(count, count, engine)
    S.shared.state[_units(S, place)] = MBARRIER


def mbarrier_inval(S, address, mask, line):
    place = mbarrier_place(S, address, mask, line)
    mbarrier = S.batch.mbarriers.pop(place, None)
    if mbarrier:
        S.shared.state[_units(S, place)] = DELIVERED
    _note(S, "write", address, mask, line)
    if mbarrier:
        report_unawaited(S, mbarrier, S.warps)


def mbarrier_expect(S, address, num_bytes, mask, line):
    """By each active thread."""
    _note(S, "read", address, mask, line)
    threads = S.active_threads(mask, line)
    mbarrier_at(S, address, mask, line).bytes_missing += int(S.uniform(num_bytes, line)) * len(
        threads
    )


def mbarrier_arrive(S, address, count, num_bytes, mask, line):
    """By each active thread, with `count` arrivals, after announcing `num_bytes` of copies."""
    if num_bytes is not None:
        mbarrier_expect(S, address, num_bytes, mask, line)
    _note(S, "read", address, mask, line)
    mbarrier = mbarrier_at(S, address, mask, line)
    threads = S.active_threads(mask, line)
    arrivals = len(threads) * (1 if count is None else int(S.uniform(count, line)))
    warps = np.unique(S.warp_of_thread[0, threads])
    mbarrier.known = np.maximum(mbarrier.known, S.batch.clocks.release(warps))
    mbarrier.missing -= arrivals
    if mbarrier.missing < 0:
        S.fail(EmulatorError, line, f"more arrivals than the {mbarrier.count} of the mbarrier")
    advance(S.batch, mbarrier)
    S.update_settled()


def mbarrier_wait(S, address, parity, place, then, line):
    """Wait for the phase of this parity to end, then set the predicate R[place]."""
    _note(S, "read", address, None, line)
    mbarrier = mbarrier_at(S, address, None, line)
    parity = int(S.uniform(parity, line)) & 1
    if mbarrier.phase % 2 == parity:
        S.block_on(f"an mbarrier that lacks {mbarrier.lacks}", S.block, line)
        S.condition = (mbarrier_place(S, address, None, line), parity)
        return BLOCKED
    S.registers[place] = np.array([[True]])
    S.batch.clocks.acquire(S.warps, mbarrier.released)
    S.update_settled()
    return then


def report_unawaited(S, mbarrier: MBarrier, warps: np.ndarray) -> None:
    """Loads that are in flight, or have come and none of these warps knows it."""
    known = S.batch.clocks.seen[warps, mbarrier.engine].max()
    if mbarrier.transfers or S.batch.clocks.now[mbarrier.engine] > known + 1:
        S.report(reports.LOAD_IN_FLIGHT, mbarrier.line)


def _note(S, what, address, mask, line) -> None:
    """An mbarrier is written where it begins and ends; all else needs no order among warps, as a read."""
    note_access(S, what, shared_offsets(S, address, 8, mask, line), 8, mask, line)


def mbarrier_place(S, address, mask, line) -> int:
    """The offset of the mbarrier in shared memory, which must be the same in all programs."""
    offsets = shared_offsets(S, address, 8, mask, line)
    if mask is not None:
        (offsets,) = S.active(mask, S.all_threads(offsets))
    return int(S.uniform(offsets, line))


def _units(S, place: int) -> np.ndarray:
    return S.shared.units(S.shared.flat(np.array([[place]])), 8)


def mbarrier_at(S, address, mask, line) -> MBarrier:
    place = mbarrier_place(S, address, mask, line)
    if place not in S.batch.mbarriers:
        S.fail(UnsupportedInstruction, line, f"no mbarrier has been made at byte {place}")
    return S.batch.mbarriers[place]


def advance(batch, mbarrier: MBarrier) -> None:
    """End the phase if nothing is missing: complete its copies, wake who waits for it.

    Copies are completed here, as late as can be, and not when they are issued.
    """
    if mbarrier.missing or mbarrier.bytes_missing != mbarrier.bytes_coming:
        return
    for transfer in mbarrier.transfers:
        transfer.deliver(batch, mbarrier.engine)
    if mbarrier.transfers:
        batch.time += 1
        engine = np.array([mbarrier.engine])
        mbarrier.known = np.maximum(mbarrier.known, batch.clocks.release(engine))
    mbarrier.released = np.maximum(mbarrier.released, mbarrier.known)
    mbarrier.transfers, mbarrier.bytes_missing, mbarrier.known = [], 0, 0
    mbarrier.missing, mbarrier.phase = mbarrier.count, mbarrier.phase + 1
    for strand in batch.strands:
        if strand.condition and batch.mbarriers.get(strand.condition[0]) is mbarrier:
            strand.wake()
