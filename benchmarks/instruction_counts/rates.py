"""What a GPU does at best, and how long counted work takes at that.

The counts are of PTX. The assembler behind it merges some instructions, splits others and moves them, so that
what follows are bounds by counts, not laws of the machine; no time is measured here.
"""

import dataclasses
from collections.abc import Mapping

from ptx_emulator.counts import SECTOR, UNITS

WARP = 32
WAVEFRONT = 128  # bytes of shared memory, one word of each bank


@dataclasses.dataclass(frozen=True)
class GPU:
    """Of one multiprocessor and clock, unless something else is said."""

    name: str
    multiprocessors: int
    clock: float  # hertz, the highest
    matrix_clock: float  # the one for which the peak of matrix products is published
    matrix_flops: Mapping[str, int]  # by kind of the operands, dense
    fp32: int  # lanes, as the others
    integer: int
    special: int
    shuffle: int
    load_store: int
    issued: int  # instructions of warps
    shared_bytes: int
    memory: float  # bytes per second of the device's memory


# Lanes: CUDA C++ Programming Guide, "Arithmetic Instructions", table of throughput, columns 8.0 and 9.0
# (floating-point add and multiply of 32 bits; integer add, compare and logic; rcp, rsqrt, ex2, lg2; warp
# shuffle). The same guide on compute capabilities 8.x and 9.0: shared memory has 32 banks of 32 bits a clock,
# and four schedulers issue one instruction a clock each.
GPUS = {
    # NVIDIA A100 Tensor Core GPU Architecture, V1.0: 108 SMs, boost clock 1410 MHz, 1024 FMA of 16 bits per
    # SM and clock (312 TFLOP/s), 512 of TF32, 32 load/store units per SM. A100 datasheet: 2,039 GB/s.
    80: GPU(
        name="A100 SXM 80 GB",
        multiprocessors=108,
        clock=1.410e9,
        matrix_clock=1.410e9,
        matrix_flops={"bf16": 2048, "f16": 2048, "tf32": 1024},
        fp32=64,
        integer=64,
        special=16,
        shuffle=32,
        load_store=32,
        issued=4,
        shared_bytes=128,
        memory=2.039e12,
    ),
    # NVIDIA H100 Tensor Core GPU Architecture, V1.04, H100 SXM5: 132 SMs, boost clock 1830 MHz for products
    # of 16 bits and 1980 MHz for the rest, 2048 FMA of 16 bits per SM and clock (989 TFLOP/s), half of that
    # in TF32, 128 FP32 lanes, 32 load/store units. H200 datasheet: the same rates, 4.8 TB/s.
    90: GPU(
        name="H200 SXM",
        multiprocessors=132,
        clock=1.980e9,
        matrix_clock=1.830e9,
        matrix_flops={"bf16": 4096, "f16": 4096, "tf32": 2048},
        fp32=128,
        integer=64,
        special=16,
        shuffle=32,
        load_store=32,
        issued=4,
        shared_bytes=128,
        memory=4.8e12,
    ),
}
# What a bound has a time of. "issue" is handing out instructions, which executes nothing itself.
BOUND_UNITS = (
    "matrix", "fp32", "integer", "special", "shared", "load/store", "shuffle", "issue", "memory",
)  # fmt: skip


def matrix_flops(counts: Mapping[str, int]) -> int:
    """Executed by matrix instructions, whatever becomes of the result."""
    return sum(number for name, number in counts.items() if name.startswith("matrix_flops_"))


def wavefronts(counts: Mapping[str, int]) -> tuple[int, int]:
    """Of shared memory, by threads and copies: as executed, and the least for the same words."""
    names = ("ld_shared", "st_shared", "cp_async")
    executed, least = (
        sum(counts.get(f"{prefix}wavefronts_{name}", 0) for name in names)
        for prefix in ("", "least_")
    )
    return executed, least


def instructions(counts: Mapping[str, int]) -> int:
    """Of warps, of all units."""
    return sum(counts.get(unit, 0) for unit in UNITS)


def unit_seconds(counts: Mapping[str, int], gpu: GPU) -> dict[str, float]:
    """How long each of BOUND_UNITS is busy if all multiprocessors share the work evenly.

    Memory moves each sector that the launch touches once: what is read again comes from a cache. That one's
    rate and all latencies are left out.
    """

    def lanes(width: int, *units: str) -> float:
        return WARP * sum(counts.get(unit, 0) for unit in units) / width

    shared_bytes = WAVEFRONT * wavefronts(counts)[0]
    shared_bytes += counts.get("wgmma_shared_bytes", 0) + counts.get("bulk_shared_bytes", 0)
    clocks = {
        "fp32": lanes(gpu.fp32, "fp32"),
        "integer": lanes(gpu.integer, "integer"),
        "special": lanes(gpu.special, "special"),
        "shared": shared_bytes / gpu.shared_bytes,
        "load/store": lanes(gpu.load_store, "global_load", "global_store", "async_copy"),
        "shuffle": lanes(gpu.shuffle, "shuffle"),
        "issue": instructions(counts) / gpu.issued,
    }
    seconds = {unit: n / gpu.clock / gpu.multiprocessors for unit, n in clocks.items()}
    products = sum(
        counts.get(f"matrix_flops_{kind}", 0) / rate for kind, rate in gpu.matrix_flops.items()
    )
    seconds["matrix"] = products / gpu.matrix_clock / gpu.multiprocessors
    sectors = sum(counts.get(f"distinct_sectors_{verb}", 0) for verb in ("read", "written"))
    seconds["memory"] = SECTOR * sectors / gpu.memory
    return {unit: seconds[unit] for unit in BOUND_UNITS}


def overlapped_seconds(seconds: Mapping[str, float]) -> float:
    """The bound if all units work at the same time."""
    return max(seconds.values())


def serial_seconds(seconds: Mapping[str, float]) -> float:
    """The bound if only one of them works at a time."""
    return sum(x for unit, x in seconds.items() if unit != "issue")


def needed_seconds(flops: int, size: int, kind: str, gpu: GPU) -> float:
    """The bound of what the mathematics needs: its products or its bytes, whichever takes longer."""
    rate = gpu.matrix_flops[kind] * gpu.matrix_clock * gpu.multiprocessors
    return max(flops / rate, size / gpu.memory)
