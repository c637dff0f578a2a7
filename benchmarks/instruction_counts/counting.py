"""Runs work in the emulator and makes a row of each kernel's counts, and one of each pass."""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from benchmarks.emulation import emulated_device
from benchmarks.instruction_counts import rates
from benchmarks.instruction_counts.points import DTYPE, FORWARD, Work
from benchmarks.instruction_counts.torch_work import Kept, TorchWork
from ptx_emulator import LaunchRecord, Options
from ptx_emulator.counts import SECTOR

TOTAL = "total"
MATRIX_KIND = "bf16"  # of DTYPE


@dataclasses.dataclass
class CountRow:
    """The launches of one kernel in one pass, or all of the pass. Only a pass needs something."""

    op: str
    variant: str
    shape: dict
    dtype: str
    arch: int
    gpu: str
    part: str  # forward or backward
    kernel: str  # or TOTAL
    launches: int
    programs: int  # of all launches
    warps: int  # of all programs
    counts: dict[str, int]  # as in ptx_emulator/counts.py
    matrix_flops: int
    instructions: int
    bound_us: dict[str, float]  # of each unit
    overlapped_bound_us: float  # launch by launch, the unit that takes longest
    serial_bound_us: float
    torch_matrix_flops: int | None = None  # of torch's own products, in no other figure
    torch_bytes: int | None = None  # of torch's own operations, in no other figure
    kept_bytes: int | None = None  # for the backward, besides the inputs
    configurations: list[str] | None = None  # of an autotuned kernel, that were chosen here
    needed_flops: int | None = None
    least_bytes: int | None = None
    needed_bound_us: float | None = None

    @property
    def limit(self) -> str:
        """The unit that takes longest."""
        return max(self.bound_us, key=self.bound_us.get)

    @property
    def requested_bytes(self) -> int:
        return self.counts.get("bytes_read", 0) + self.counts.get("bytes_written", 0)

    def sector_bytes(self, prefix: str = "") -> int:
        """As accesses ask for sectors; with "distinct_" each once a launch."""
        verbs = ("read", "written")
        return SECTOR * sum(self.counts.get(f"{prefix}sectors_{verb}", 0) for verb in verbs)


def count(
    work: Work,
    variant: str,
    function: Callable[..., Tensor],
    arch: int,
    setting: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[tuple[list[CountRow], dict[str, Tensor]]]:
    """For each pass: rows of its kernels in the order of their first launch, the total; and its results.

    `setting` may give the configurations that it has chosen for kernels, by their names.
    """
    gpu = rates.GPUS[arch]
    for part in work.passes(function):
        with (
            setting() as chosen,
            emulated_device(
                arch, gpu.multiprocessors, options=Options(memory_counts=True)
            ) as emulation,
        ):
            torch_work, kept = TorchWork(), Kept(part.inputs)
            with torch_work.outside_of_launches(), kept.counting():
                results = part.run()
        names = dict.fromkeys(launch.kernel for launch in emulation.launches)
        common = {
            "op": work.op,
            "variant": variant,
            "shape": work.shape,
            "dtype": str(DTYPE).removeprefix("torch."),
            "arch": arch,
            "gpu": gpu.name,
            "part": part.name,
        }
        rows = [
            CountRow(
                **common,
                kernel=name,
                **_summary(launches, gpu),
                configurations=(chosen or {}).get(name),
            )
            for name in names
            for launches in [[x for x in emulation.launches if x.kernel == name]]
        ]
        total = CountRow(**common, kernel=TOTAL, **_summary(emulation.launches, gpu))
        total.torch_matrix_flops, total.torch_bytes = torch_work.flops, torch_work.bytes
        total.kept_bytes = kept.bytes if part.name == FORWARD else None
        total.needed_flops, total.least_bytes = part.needed_flops, part.least_bytes
        needed = rates.needed_seconds(part.needed_flops, part.least_bytes, MATRIX_KIND, gpu)
        total.needed_bound_us = 1e6 * needed
        yield [*rows, total], results


def _summary(launches: Iterable[LaunchRecord], gpu: rates.GPU) -> dict:
    launches = list(launches)
    counts = sum((launch.counts for launch in launches), Counter())
    seconds = [rates.unit_seconds(launch.counts, gpu) for launch in launches]
    programs = [math.prod(launch.grid) for launch in launches]
    return {
        "launches": len(launches),
        "programs": sum(programs),
        "warps": sum(n * launch.num_warps for n, launch in zip(programs, launches)),
        "counts": dict(sorted(counts.items())),
        "matrix_flops": rates.matrix_flops(counts),
        "instructions": rates.instructions(counts),
        "bound_us": {unit: 1e6 * sum(x[unit] for x in seconds) for unit in rates.BOUND_UNITS},
        "overlapped_bound_us": 1e6 * sum(map(rates.overlapped_seconds, seconds)),
        "serial_bound_us": 1e6 * sum(map(rates.serial_seconds, seconds)),
    }
