"""A launch: which batches of programs run when, and what they report and count together.

Batches run one after the other. One that waits for other programs (see polls.py) gives way to the others;
those of programs that have begun come before new ones.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ptx_emulator.errors import Deadlock, StoppedAtReport
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.machine import Batch
from ptx_emulator.program import Program
from ptx_emulator.program_order import Ordered, Unordered
from ptx_emulator.reports import Report


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run, not what."""

    threads_per_batch: int = 8192  # how much NumPy gets at once
    max_iterations: int = 100_000  # jumps back that one strand may make
    memory_counts: bool = False  # sectors and bank conflicts, too
    stop_at_report: bool = False  # for whoever asks only whether there is one
    resident_programs: int | None = None  # that a device holds at once; None for all


class Launch:
    """One kernel on one grid: runs all its programs; gathers counts and reports."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: dict[str, int | float],
        grid: tuple[int, int, int],
        shared_bytes: int,
        options: Options,
    ):
        self.program, self.memory, self.options = program, memory, options
        self.parameters, self.grid = parameters, grid
        self.shared_bytes = -(-max(shared_bytes, 16) // 16) * 16
        self.counts: collections.Counter[str] = collections.Counter()
        self.reports: dict[tuple[str, int], Report] = {}
        self.num_programs = math.prod(grid)
        num_units, num_warps = len(memory.bytes) // memory.unit, program.kernel.num_threads // 32
        memory.order = (
            Ordered(num_units, self.num_programs, num_warps)
            if program.orders_programs
            else Unordered(num_units)
        )

    def run(self) -> None:
        starts = self._starts()
        todo: list[Batch] = []
        waiting: list[Batch] = []
        with np.errstate(all="ignore"):
            while True:
                if not todo:
                    todo = [batch for batch in waiting if batch.wake()]
                    waiting = [batch for batch in waiting if batch.waits]
                if not todo:
                    todo = self._start(starts, waiting)
                if not todo:
                    return
                batch = todo.pop()
                todo += batch.run()
                if batch.waits:
                    waiting.append(batch)

    def _starts(self) -> Iterator[np.ndarray]:
        """The programs of each batch."""
        at_once = max(1, self.options.threads_per_batch // self.program.kernel.num_threads)
        at_once = min(at_once, self.options.resident_programs or at_once)
        for start in range(0, self.num_programs, at_once):
            yield np.arange(start, min(start + at_once, self.num_programs), dtype=np.int32)

    def _start(self, starts: Iterator[np.ndarray], waiting: list[Batch]) -> list[Batch]:
        """A batch that begins while these wait; none if all have begun and ended."""
        resident = sum(len(batch.ids) for batch in waiting)
        ids = next(starts, None)
        if waiting and (
            ids is None or resident + len(ids) > (self.options.resident_programs or math.inf)
        ):
            strand = waiting[0].strands[0]
            places = "; ".join(batch.places for batch in waiting[:5])
            no_more = (
                "no program goes on" if ids is None else f"no program begins beside {resident}"
            )
            strand.fail(Deadlock, strand.line, f"{no_more}, and these wait: {places}")
        return [] if ids is None else [Batch.of_programs(self, ids)]

    def report(self, kind: str, line: int, example: str) -> None:
        if (kind, line) in self.reports:
            self.reports[kind, line].count += 1
            return
        instruction = self.program.at_line(line)
        text = " ".join(instruction.text.split())[:100]
        self.reports[kind, line] = Report(
            self.program.kernel.name, kind, line, instruction.source, text, example
        )
        if self.options.stop_at_report:
            raise StoppedAtReport(str(self.reports[kind, line]))
