"""Which of two accesses of global memory by different programs of a launch comes first.

Programs run in any order, so what one writes no other may read or overwrite (`Unordered`), unless the launch
has atomics, or loads and stores that acquire and release (`Ordered`). Then a program that reads a value by
acquire comes after all that was known where it was written by release, and after what was known to the
programs whose atomics have changed the value since. Such *strong* accesses never race with each other.

What a program writes is stamped with the clock of its warp (see `order.py`): a release by one warp is of
what other warps have written before a barrier, and not of what they write after it. Reads are kept for
whole programs: a release is of all that its program has read so far.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator

import numpy as np

from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.order import AGENT_BITS, agent_of

NOBODY, SEVERAL = 0, -1  # instead of the name of a program; the names count from 1
MAX_CLOCKS = 1 << 30  # 4 GiB


class Unordered:
    """For each unit of memory: the last program that has written it, when, and which one has read it."""

    def __init__(self, num_units: int):
        self.writer, self.reader, self.stamp = (zeros(num_units, np.int32) for _ in range(3))

    def written_by_others(self, S, units, program, warps, strong=False) -> np.ndarray:
        """Where units were written by a program that `program` does not come after.

        `program` and `warps`, who accesses the units now, broadcast against them, here and below.
        """
        writer = self.writer[units]
        return (writer != NOBODY) & (writer != program)

    def read_by_others(self, units, program) -> np.ndarray:
        reader = self.reader[units]
        return (reader != NOBODY) & (reader != program)

    def note_read(self, units, program) -> None:
        program = np.broadcast_to(program, units.shape)
        before = self.reader[units]
        self.reader[units] = program
        # Read by others before, or by another one in this very access.
        several = (before != NOBODY) & (before != program) | (self.reader[units] != program)
        if several.any():
            self.reader[units[several]] = SEVERAL

    def note_write(self, units, program, stamps, strong=False) -> None:
        self.writer[units] = program
        self.stamp[units] = stamps


@dataclasses.dataclass
class Acquired:
    """What the programs of a batch have acquired last: their other warps come after it by a barrier."""

    warps: np.ndarray  # that have acquired
    ticks: np.ndarray
    before: np.ndarray  # what the programs knew before

    def unknown_to(self, clocks, warps: np.ndarray) -> np.ndarray:
        knows = (clocks.seen[warps[..., None], self.warps] >= self.ticks).any(-1)
        return ~(knows | (warps[..., None] == self.warps).any(-1))


class Ordered(Unordered):
    """`seen[a, b]` is what program a knows of program b: of each warp the last tick, and its last release."""

    def __init__(self, num_units: int, num_programs: int, num_warps: int):
        super().__init__(num_units)
        names = num_programs + 1
        self.num_warps = num_warps
        shape = names, names, num_warps + 1
        if math.prod(shape) > MAX_CLOCKS:
            raise UnsupportedInstruction(f"atomics in a launch of {num_programs} programs")
        self.seen = zeros(math.prod(shape), np.int32).reshape(shape)
        self.release_of = np.ones(names, np.int32)  # the number of each program's next release
        self.strong = zeros(num_units, np.bool_)  # the last write
        self.released: dict[int, np.ndarray] = {}  # by place: what whoever acquires there will know
        self.fenced: dict[int, np.ndarray] = {}  # by program: what it releases by relaxed writes
        self.unfenced: dict[int, np.ndarray] = {}  # and what the next fence lets it acquire
        # Reader k of a unit stands for several programs: for each, the release that covers its reads.
        self._readers = [np.zeros(names, np.int32)]
        self._place_of: dict[bytes, int] = {self._readers[0].tobytes(): 0}
        self._joined: dict[tuple[int, int, int], int] = {}

    # --- who touched a unit -------------------------------------------------------------------------

    def written_by_others(self, S, units, program, warps, strong=False) -> np.ndarray:
        others = super().written_by_others(S, units, program, warps)
        if strong:
            others &= ~self.strong[units]
        if not others.any():
            return others
        where = np.nonzero(others)
        writer, stamps = self.writer[units[where]], self.stamp[units[where]]
        program, warps = (np.broadcast_to(x, units.shape)[where] for x in (program, warps))
        tick, agent = stamps >> AGENT_BITS, agent_of(stamps)
        late = tick > self.seen[program, writer, agent]
        acquired = S.batch.acquired
        if acquired is not None:
            row = np.searchsorted(S.batch.names[:, 0], program)
            unknown = acquired.unknown_to(S.batch.clocks, warps)
            late |= unknown & (tick > acquired.before[row, writer, agent])
        others[where] = late
        return others

    def read_by_others(self, units, program) -> np.ndarray:
        found = np.zeros(units.shape, np.bool_)
        for name, rows in _of_each_program(program, len(units)):
            readers = self.reader[units[rows]]
            late = [k for k in np.unique(readers) if k and self._has_late_reader(k, name)]
            found[rows] = np.isin(readers, late)
        return found

    def _has_late_reader(self, k: int, program: int) -> bool:
        late = self._readers[k] > self.seen[program, :, -1]
        late[program] = False
        return bool(late.any())

    def note_read(self, units, program) -> None:
        for name, rows in _of_each_program(program, len(units)):
            readers = self.reader[units[rows]]
            before, which = np.unique(readers, return_inverse=True)
            after = np.array([self._with_reader(int(k), name) for k in before], np.int32)
            self.reader[units[rows]] = after[which].reshape(readers.shape)

    def _with_reader(self, k: int, program: int) -> int:
        key = k, program, int(self.release_of[program])
        if key not in self._joined:
            readers = self._readers[k].copy()
            readers[program] = self.release_of[program]
            place = self._place_of.setdefault(readers.tobytes(), len(self._readers))
            if place == len(self._readers):
                self._readers.append(readers)
            self._joined[key] = place
        return self._joined[key]

    def note_write(self, units, program, stamps, strong=False) -> None:
        super().note_write(units, program, stamps)
        self.strong[units] = strong

    # --- what programs tell each other --------------------------------------------------------------

    def synchronise(self, S, places, written, mask, order: str, replaces: bool = False) -> None:
        """Strong accesses of places `[programs, threads]` in memory, in the order of the programs.

        `written` says which of them write. A store `replaces` what was released there before.
        """
        acquires, releases = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
        active = S.all_threads(True if mask is None else mask)
        warps = np.unique(S.warp_of_thread[0, active.any(0)])
        if acquires:
            self._note_acquire(S, warps)
        known = self._known(S, warps) if releases else {}
        for row, name in enumerate(S.batch.names[:, 0].tolist()):
            here = np.unique(places[row, active[row]]).tolist()
            self._acquire(name, [x for x in here if x in self.released], acquires)
            writes = np.stack((places[row], S.warp_of_thread[0]), 1)[active[row] & written[row]]
            for place, warp in np.unique(writes, axis=0).tolist():
                told = self._told(name, known[warp]) if releases else self.fenced.get(name)
                self._release(place, told, replaces)
            if releases and len(writes):
                self.release_of[name] += 1

    def fence(self, S, mask) -> None:
        """Lets go with the next relaxed writes; comes after what relaxed reads have found released."""
        active = S.all_threads(True if mask is None else mask)
        warps = np.unique(S.warp_of_thread[0, active.any(0)])
        self._note_acquire(S, warps)
        known = np.max([*self._known(S, warps).values()], axis=0)
        for name in S.batch.names[active.any(1), 0].tolist():
            if name in self.unfenced:
                np.maximum(self.seen[name], self.unfenced.pop(name), out=self.seen[name])
            self.fenced[name] = self._told(name, known)
            self.release_of[name] += 1

    def _note_acquire(self, S, warps: np.ndarray) -> None:
        batch = S.batch
        last, ticks = batch.acquired, batch.clocks.now[warps]
        if last is None or not last.unknown_to(batch.clocks, np.arange(self.num_warps)).any():
            batch.acquired = Acquired(warps, ticks, self.seen[batch.names[:, 0]])

    def _known(self, S, warps: np.ndarray) -> dict[int, np.ndarray]:
        """What each warp knows of the warps of its program; what it does from here on is new."""
        clocks = S.batch.clocks
        return {int(w): clocks.release(np.array([w]))[: self.num_warps] for w in warps}

    def _told(self, name: int, known: np.ndarray) -> np.ndarray:
        told = self.seen[name].copy()
        told[name, :-1], told[name, -1] = known, self.release_of[name]
        return told

    def _acquire(self, name: int, places: list[int], acquires: bool) -> None:
        for place in places:
            if acquires:
                np.maximum(self.seen[name], self.released[place], out=self.seen[name])
            else:
                self.unfenced[name] = np.maximum(self.unfenced.get(name, 0), self.released[place])

    def _release(self, place: int, told: np.ndarray | None, replaces: bool) -> None:
        if replaces:
            self.released.pop(place, None)
        if told is not None:
            self.released[place] = np.maximum(self.released.get(place, 0), told)


def _of_each_program(program, length: int) -> Iterator[tuple[int, slice]]:
    """The rows `[length, ...]` of each program, which come one program after the other."""
    if not length:
        return
    names = np.broadcast_to(np.reshape(program, (len(program), -1))[:, 0], length)
    starts = np.flatnonzero(np.diff(names, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), length]):
        yield int(names[start]), slice(start, stop)


def zeros(number: int, dtype: type) -> np.ndarray:
    """As of NumPy, which would ask for pages of 2 MiB: one byte among zeros would cost as many."""
    size = number * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)
