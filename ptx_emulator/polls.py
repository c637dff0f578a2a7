"""Loops in which programs wait for each other: they read a place in memory until it has the value they need.

Such a loop is known by what it does: nothing. A strand that comes back to a *poll* (an atomic, or a load that
is volatile, relaxed or acquires), while no memory has been written and all registers that still matter are as
they were, will come back again for ever. So it waits until some program has written, and what it has executed
since it was there before is taken back from the counts: a wait counts as if the first try had succeeded,
whichever way programs are run.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.types import UNSIGNED

if TYPE_CHECKING:
    from ptx_emulator.machine import Chooser, Strand

Counts = dict[str, int]


@dataclasses.dataclass
class Poll:
    """What a strand had when it came to a poll, and what it has counted since."""

    registers: list[np.ndarray]
    version: int  # of global memory
    counts: Counts | None  # of the launch before the poll, if it was in this turn
    spent: Counts = dataclasses.field(default_factory=dict)  # in the turns that have ended


class Polls:
    """Of one strand. A turn is the time in which it runs alone: all that is counted then is its own."""

    def __init__(self):
        self.awaited: int | None = None  # the version of global memory that it waits to see changed
        self._last: dict[int, Poll] = {}  # by block
        self._start: Counts = {}  # what was counted when the turn began

    def begin_turn(self, counts: collections.Counter[str]) -> None:
        if self._last:
            self._start = dict(counts)

    def end_turn(self, counts: collections.Counter[str]) -> None:
        for poll in self._last.values():
            start = self._start if poll.counts is None else poll.counts
            poll.spent = _sum(poll.spent, _difference(counts, start))
            poll.counts = None
        self.begin_turn(counts)

    def part(self, choose: Chooser, share: float) -> Polls:
        """For a part of the programs, which have a share in what was counted."""
        polls = Polls()
        polls.awaited = self.awaited
        for block, poll in self._last.items():
            spent = {name: round(number * share) for name, number in poll.spent.items()}
            polls._last[block] = Poll(choose(poll.registers), poll.version, None, spent)
        return polls

    def repeats(self, block: int, registers: list[np.ndarray], strand: Strand) -> bool:
        """Whether a poll, about to be executed, will be as the last time. If so its counts are taken back."""
        counts, version = strand.batch.launch.counts, strand.memory.version
        strand.executed[block] -= 1  # it counts when it is executed
        strand.count()
        last = self._last.get(block)
        if last and last.version == version and all(map(_same, last.registers, registers)):
            if last.counts is None:
                last.counts = _difference(self._start, last.spent)
            counts.subtract(_difference(counts, last.counts))
            self._last[block] = Poll(registers, version, dict(counts))
            self.awaited = version
            return True
        self._last[block] = Poll(registers, version, dict(counts))
        strand.executed[block] += 1
        return False


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether registers of one strand have the same bits."""
    bits = UNSIGNED[x.itemsize]
    return x is y or bool((x.view(bits) == y.view(bits)).all())


def _difference(counts: Counts, before: Counts) -> Counts:
    """Without sectors that a launch touches for the first time, which it does but once."""
    return {
        name: number - before.get(name, 0)
        for name, number in counts.items()
        if not name.startswith("distinct_")
    }


def _sum(x: Counts, y: Counts) -> Counts:
    return {name: x.get(name, 0) + y.get(name, 0) for name in x | y}
