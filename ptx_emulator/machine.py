"""The machine: batches of programs in lockstep, and their strands of warps.

A *batch* is a number of programs (CTAs) that have taken the same way so far; where a branch parts them the
batch is split, and the parts go on one after the other. A *strand* is a number of warps of every program of
a batch with one program counter. A kernel starts as one strand of all warps; where a branch parts
warps, as in kernels whose warps have different jobs, the strand is split. A batch runs one strand until it
ends or waits for others, then the next.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator import reports
from ptx_emulator.barriers import report_unawaited
from ptx_emulator.errors import (
    Deadlock,
    Divergence,
    EmulatorError,
    StepLimit,
    UnsupportedInstruction,
)
from ptx_emulator.order import MAX_AGENTS, Clocks
from ptx_emulator.polls import Polls
from ptx_emulator.program_order import Acquired
from ptx_emulator.shared_memory import SharedMemory
from ptx_emulator.translator import BLOCKED, ENDED

if TYPE_CHECKING:
    from ptx_emulator.launch import Launch


class Batch:
    """Programs in lockstep: what they share besides the registers of their strands."""

    launch: Launch
    ids: np.ndarray  # of the programs, in the launch
    shared: SharedMemory
    clocks: Clocks
    fenced: np.ndarray  # time of the last proxy fence by all threads of each warp
    partly_fenced: np.ndarray  # by any thread
    unacquired_descriptors: set[int]  # addresses of tensor maps, see tensormap.py
    acquired: Acquired | None = None  # from other programs
    barriers: dict  # those that somebody waits at
    mbarriers: dict  # by their place in shared memory
    strands: list[Strand]
    time: int = 1  # counts writes to shared memory

    @classmethod
    def of_programs(cls, launch: Launch, ids: np.ndarray) -> Batch:
        batch = cls()
        batch.launch, batch.ids = launch, ids
        program = launch.program
        num_warps = batch.num_warps
        batch.shared = SharedMemory(len(ids), launch.shared_bytes, program.shared_unit, num_warps)
        batch.clocks = Clocks(num_warps)
        batch.fenced, batch.partly_fenced = np.zeros((2, MAX_AGENTS), np.int64)
        batch.barriers, batch.mbarriers, batch.unacquired_descriptors = {}, {}, set()
        batch.strands = [Strand(batch, 0, np.arange(num_warps), list(program.initial))]
        batch._set_places()
        return batch

    @property
    def num_warps(self) -> int:
        return self.launch.program.kernel.num_threads // 32

    @property
    def names(self) -> np.ndarray:
        """Of the programs in global memory: see global_memory.py."""
        return self.ids[:, None] + 1

    def _set_places(self) -> None:
        x, y, _ = self.launch.grid
        places = self.ids % x, self.ids // x % y, self.ids // x // y
        self.program = [p.astype(np.uint32)[:, None] for p in places]
        self.num_programs = [np.array([[n]], np.uint32) for n in self.launch.grid]

    @property
    def places(self) -> str:
        """Where who waits for what."""
        strands = "; ".join(f"{s.name} at line {s.line} for {s.waits_for}" for s in self.strands)
        return f"program {self.ids[0]} ({strands})"

    @property
    def waits(self) -> bool:
        """Whether it can only go on when other programs have."""
        return any(strand.polls.awaited is not None for strand in self.strands)

    def wake(self) -> bool:
        """Those that wait for other programs, if these have written anything since."""
        woken = [s for s in self.strands if s.polls.awaited not in (None, s.memory.version)]
        for strand in woken:
            strand.wake()
        return bool(woken)

    def run(self) -> list[Batch]:
        """Run to the end, or until it `waits`: []; or up to where programs part, and return the parts."""
        while self.strands:
            strand = next((s for s in self.strands if s.waits_for is None), None)
            if strand is None and self.waits:
                return []
            if strand is None:
                first = self.strands[0]
                first.fail(Deadlock, first.line, f"nobody is left to wake who waits: {self.places}")
            parts = strand.run()
            if parts is not None:
                self.strands = []
                return parts
            if strand.block == ENDED:
                self.strands.remove(strand)
        for mbarrier in self.mbarriers.values():
            report_unawaited(strand, mbarrier, np.arange(self.num_warps))
        return []

    def split(self, groups: list[np.ndarray]) -> list[Batch]:
        """A batch for each group of places of programs in this one."""
        return [self._part(index) for index in groups]

    def _part(self, index: np.ndarray) -> Batch:
        batch = Batch()
        batch.launch, batch.ids, batch.time = self.launch, self.ids[index], self.time
        batch.shared = self.shared.of_programs(index)
        batch.clocks = self.clocks.copy()
        batch.fenced, batch.partly_fenced = self.fenced.copy(), self.partly_fenced.copy()
        batch.barriers = copy.deepcopy(self.barriers)
        batch.unacquired_descriptors = set(self.unacquired_descriptors)
        batch._set_places()
        choose = Chooser(len(self.ids), index)
        batch.mbarriers = choose(self.mbarriers)
        batch.acquired = choose(self.acquired)
        batch.strands = [strand.part(batch, choose) for strand in self.strands]
        return batch


class Chooser:
    """Picks some programs, or some threads, of all arrays `[programs or 1, threads or 1]` in a structure.

    Arrays that are one, or views of one, stay so: the result of a wgmma has several names.
    """

    def __init__(
        self, num_programs: int, programs: np.ndarray | None, threads: np.ndarray | None = None
    ):
        self.num_programs, self.programs, self.threads = num_programs, programs, threads
        # By id; with the array itself, so that its id is not used again.
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, x):
        if isinstance(x, np.ndarray):
            if id(x) not in self._known:
                self._known[id(x)] = x, self._array(x)
            return self._known[id(x)][1]
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(self, x))
        if isinstance(x, (tuple, list, collections.deque)):
            return type(x)(self(y) for y in x)
        if isinstance(x, dict):
            return {k: self(v) for k, v in x.items()}
        if dataclasses.is_dataclass(x):
            new = copy.copy(x)
            for field in dataclasses.fields(x):
                setattr(new, field.name, self(getattr(x, field.name)))
            return new
        return x

    def _array(self, x: np.ndarray) -> np.ndarray:
        base = x.base
        if isinstance(base, np.ndarray) and base.shape == x.shape and base.itemsize == x.itemsize:
            return self(base).view(x.dtype)
        if self.programs is not None and x.ndim >= 2 and len(x) == self.num_programs > 1:
            x = x[self.programs]
        if self.threads is not None and x.ndim == 2 and x.shape[1] > 1:
            x = x[:, self.threads]
        return x


class Strand:
    """Warps with one program counter, in all programs of a batch, and their registers."""

    def __init__(self, batch: Batch, id: int, warps: np.ndarray, registers: list[np.ndarray]):
        self.id, self.registers = id, registers
        self.block = 0  # that it runs or runs next; ENDED
        self.iterations = 0
        self.executed: collections.Counter[int] = (
            collections.Counter()
        )  # blocks, not yet in the counts
        self.polls = Polls()
        self.waits_for: str | None = None
        self.condition: tuple[int, int] | None = None  # place and parity of an mbarrier
        self.line = 0  # where it waits
        self.open_copies, self.copy_groups = [], collections.deque()
        self.open_products, self.product_groups = [], collections.deque()
        self.open_stores, self.store_groups = [], collections.deque()
        self._attach(batch, warps)

    def _attach(self, batch: Batch, warps: np.ndarray) -> None:
        self.batch, self.warps = batch, warps
        launch = batch.launch
        self.options, self.memory, self.shared = launch.options, launch.memory, batch.shared
        self.num_programs, self.num_threads = len(batch.ids), 32 * len(warps)
        self.shape = self.num_programs, self.num_threads
        threads = warps[:, None] * 32 + np.arange(32)
        self.thread = threads.reshape(1, -1).astype(np.uint32)
        self.warp_of_thread = (self.thread // 32).astype(np.int64)
        self.update_settled()

    @property
    def name(self) -> str:
        return (
            f"warps {self.warps[0]} to {self.warps[-1]}"
            if len(self.warps) > 1
            else f"warp {self.warps[0]}"
        )

    # --- running ----------------------------------------------------------------------------------------

    def run(self) -> list[Batch] | None:
        """Run until the strand ends or waits: None; or until programs part: the parts of the batch."""
        program = self.batch.launch.program
        self.polls.begin_turn(self.batch.launch.counts)
        try:
            while self.block >= 0:
                self.executed[self.block] += 1
                result = program.blocks[self.block](self.registers, self)
                if result == BLOCKED and isinstance(result, int):
                    return None
                if isinstance(result, tuple):
                    choice, blocks, line = result
                    first = choice.flat[0]
                    if choice.size > 1 and (choice != first).any():
                        return self._part_ways(choice, blocks, line)
                    if first >= len(blocks):
                        self.fail(
                            EmulatorError, line, f"entry {first} of {len(blocks)} in a jump table"
                        )
                    result = blocks[int(first)]
                if 0 <= result <= self.block:
                    self._count_iteration(program.last_lines[self.block])
                self.block = result
            self._report_unfinished()
            return None
        finally:
            self._end_turn()

    def _count_iteration(self, line: int) -> None:
        self.iterations += 1
        limit = self.options.max_iterations
        if self.iterations > limit:
            self.fail(
                StepLimit, line, f"more than {limit} jumps back (Options.max_iterations): endless?"
            )

    def _report_unfinished(self) -> None:
        for store in (*self.open_stores, *sum(self.store_groups, [])):
            self.report(reports.STORE_AT_END, store.line)

    def _end_turn(self) -> None:
        self.count()
        self.polls.end_turn(self.batch.launch.counts)

    def count(self) -> None:
        """What has been executed since it was counted last."""
        for block, times in self.executed.items():
            self._count_block(block, times * self.num_programs * len(self.warps))
        self.executed.clear()

    def _count_block(self, block: int, times: int) -> None:
        launch = self.batch.launch
        for unit, number in launch.program.unit_counts[block].items():
            launch.counts[unit] += number * times

    def _part_ways(
        self, choice: np.ndarray, blocks: tuple[int, ...], line: int
    ) -> list[Batch] | None:
        """Split by programs first, then by warps, after threads of one warp have come together again."""
        self._end_turn()
        warps = self._of_warps(self.all_threads(choice))
        if warps is None:
            places = self._rejoin(np.asarray(blocks)[self.all_threads(choice).astype(int)], line)
            blocks, choice = np.unique(places, return_inverse=True)
            blocks, warps = blocks.tolist(), self._of_warps(choice.reshape(self.shape))
        ways, way_of = np.unique(warps, axis=0, return_inverse=True)
        if len(ways) == 1:
            self._take(ways[0], blocks, line)
            return None
        groups = [np.flatnonzero(way_of.ravel() == i) for i in range(len(ways))]
        parts = self.batch.split(groups)
        for part, way in zip(parts, ways):
            next(s for s in part.strands if s.id == self.id)._take(way, blocks, line)
        return parts

    def _of_warps(self, x: np.ndarray) -> np.ndarray | None:
        """What the threads of each warp have in common, `[programs, warps]`; None if they differ."""
        lanes = x.reshape(self.num_programs, -1, 32)
        return lanes[..., 0] if (lanes == lanes[..., :1]).all() else None

    def _rejoin(self, places: np.ndarray, line: int) -> np.ndarray:
        """Where threads of one warp are at different blocks: run those until the threads of each are at one.

        The first of the blocks always goes on, so that nobody passes the place where ways meet. They may
        only compute: to what threads do in memory, or with each other, others may have to come.
        """
        program = self.batch.launch.program
        while self._of_warps(places) is None:
            lanes = places.reshape(self.num_programs, -1, 32)
            block = int(lanes[(lanes != lanes[..., :1]).any(-1)].min())
            if not program.only_compute[block]:
                self.fail(Divergence, line, "the threads of a warp go different ways")
            here, before = places == block, self.registers
            self.registers = list(before)
            result = program.blocks[block](self.registers, self)
            for place, old in enumerate(before):
                if self.registers[place] is not old:
                    self.registers[place] = np.where(here, self.registers[place], old)
            self._count_block(block, int(here.reshape(-1, 32).any(1).sum()))
            if isinstance(result, tuple):
                choice, blocks, _ = result
                result = np.asarray(blocks)[self.all_threads(choice).astype(int)]
            if (here & (result <= block)).any():
                self._count_iteration(program.last_lines[block])
            places = np.where(here, result, places)
        return places

    def _take(self, way: np.ndarray, blocks: tuple[int, ...], line: int) -> None:
        """Go on at the block that `way` chooses for each warp: as one strand, or as one for each block."""
        choices = np.unique(way)
        if choices.max() >= len(blocks):
            self.fail(
                EmulatorError, line, f"entry {choices.max()} of {len(blocks)} in a jump table"
            )
        strands = self.batch.strands
        parts = [self]
        while len(parts) < len(choices):
            part = copy.copy(self)
            part.id = 1 + max(s.id for s in strands)
            strands.append(part)
            parts.append(part)
        for strand, choice in zip(parts, choices):
            if len(parts) > 1:
                strand._keep(np.flatnonzero(way == choice), line)
            strand.block = blocks[int(choice)]

    def _keep(self, places: np.ndarray, line: int) -> None:
        """Go on with some of the warps."""
        threads = (places[:, None] * 32 + np.arange(32)).ravel()
        in_flight = (*self.open_products, *self.open_stores, *sum(self.product_groups, []))
        if in_flight or any(self.store_groups):
            self.fail(
                UnsupportedInstruction, line, "warps part while they wait for products or stores"
            )
        choose = Chooser(self.num_programs, None, threads)
        self._choose(choose)
        self.executed, self.polls = collections.Counter(), Polls()
        self._attach(self.batch, self.warps[places])

    def part(self, batch: Batch, choose: Chooser) -> Strand:
        """The same strand with some of the programs."""
        strand = copy.copy(self)
        strand._choose(choose)
        strand.executed = collections.Counter()
        strand.polls = self.polls.part(choose, len(batch.ids) / self.num_programs)
        strand._attach(batch, self.warps)
        return strand

    def _choose(self, choose: Chooser) -> None:
        for name in (
            "registers", "open_copies", "copy_groups", "open_products", "product_groups",
            "open_stores", "store_groups",
        ):  # fmt: skip
            setattr(self, name, choose(getattr(self, name)))

    # --- waiting ----------------------------------------------------------------------------------------

    def block_on(self, what: str, block: int, line: int) -> None:
        """Wait for `what`, to go on at `block`."""
        self.waits_for, self.block, self.line = what, block, line

    def idles(self, block: int, live: tuple[int, ...], line: int) -> bool:
        """Whether to wait for other programs at a poll: see polls.py."""
        if not self.polls.repeats(block, [self.registers[place] for place in live], self):
            return False
        self.block_on("another program to write", block, line)
        return True

    def wake(self) -> None:
        self.waits_for = self.condition = self.polls.awaited = None
        self.update_settled()

    def update_settled(self) -> None:
        """Stamps below `settled` come before anything that these warps do: see order.py."""
        self.settled = self.batch.clocks.settled(self.warps)

    # --- what instructions ask ----------------------------------------------------------------------------

    def parameter(self, name: str, offset: int, dtype) -> np.ndarray:
        value = self.batch.launch.parameters[name]
        if offset:
            raise UnsupportedInstruction(f"a part of the parameter {name}")
        if isinstance(value, float):
            return np.array([[value]], np.float32).view(dtype)
        return np.array([[value & 0xFFFF_FFFF_FFFF_FFFF]], np.uint64).astype(dtype)

    def parameter_address(self, name: str) -> np.ndarray:
        """Of a structure: its address in global memory."""
        return np.array([[self.batch.launch.parameters[name]]], np.uint64)

    def all_threads(self, x) -> np.ndarray:
        return x if np.shape(x) == self.shape else np.broadcast_to(x, self.shape)

    def all_programs(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (self.num_programs, *x.shape[1:]))

    def active(self, mask, *arrays: np.ndarray) -> list[np.ndarray]:
        """The elements of arrays of the strand's shape that belong to active threads, in one axis."""
        if mask is None:
            return [x.reshape(-1) for x in arrays]
        mask = self.all_threads(mask)
        return [x[mask] for x in arrays]

    def num_active(self, mask) -> int:
        size = self.num_programs * self.num_threads
        return size if mask is None else int(np.count_nonzero(self.all_threads(mask)))

    def some_thread(self, mask: np.ndarray) -> np.ndarray:
        """For each program, whether any of its threads is active: a condition that no warp parts on."""
        return mask.any(1, keepdims=True)

    def active_threads(self, mask, line: int) -> list[int]:
        """The places of the active threads, which must be the same ones in every program."""
        mask = self.all_threads(True if mask is None else mask)
        if (mask != mask[:1]).any():
            self.fail(UnsupportedInstruction, line, "other threads are active in other programs")
        return np.flatnonzero(mask[0]).tolist()

    def of_first_active(self, x: np.ndarray, mask) -> np.ndarray:
        """What the first active thread of each program has: [programs or 1, 1]."""
        if x.shape[1] == 1:
            return x
        if mask is None:
            return x[:, :1]
        first = self.all_threads(mask).argmax(1)[:, None]
        return np.take_along_axis(self.all_threads(x), first, axis=1)

    def uniform(self, x: np.ndarray, line: int) -> int:
        """The one value of an operand that must be the same everywhere."""
        value = x.flat[0]
        if (x != value).any():
            self.fail(
                UnsupportedInstruction,
                line,
                "an operand that must be the same in all threads is not",
            )
        return value

    def first_thread(self, bad: np.ndarray) -> str:
        program, thread = (int(x[0]) for x in np.nonzero(bad))
        program = self.batch.ids[program] if len(bad) > 1 else self.batch.ids[0]
        return (
            f"first by program {program}, thread {int(self.thread.flat[thread % self.num_threads])}"
        )

    def report(self, kind: str, line: int, example: str = "") -> None:
        self.batch.launch.report(kind, line, example)

    def fail(self, error: type[EmulatorError], line: int, why: str) -> None:
        kernel = self.batch.launch.program
        where = kernel.at_line(line) if line else f"line {line}"
        raise error(f"{kernel.kernel.name}, {where}: {why}")
