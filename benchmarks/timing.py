"""How time and memory are measured.

Time: after a warm-up, the variants take turns (A B C A B C ...), so that a change of clock or load
hits all of them. Before each call the L2 caches are overwritten, for a variant must not profit from what
the one before it has read. On a GPU a call lies between two events; on a CPU it is wall time.

Memory: the largest amount in use during one call beyond what was in use before it, so inputs are not
counted and outputs are. On a GPU this comes from PyTorch's allocator. On a CPU it is the growth of the
resident set to its high-water mark, which Linux lets a process reset; malloc is told to take every
larger block from the system and to give it back when freed, so that freed memory is not counted.
Elsewhere it is unknown (None).
"""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MIN_ROUNDS = 3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
FLUSH_BYTES = {"cuda": 2**28, "cpu": 2**26}  # several times the L2 caches
MATRIX_SIZES = {"cuda": 4096, "cpu": 1024}  # large enough to show the device's matrix rate


def interleaved(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every call: `rounds` turns, fewer (but MIN_ROUNDS) once `seconds` have passed."""
    measure = _events if device.type == "cuda" else _wall_time
    flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, run in runs.items():
            milliseconds[name].append(measure(run, flush))
    return milliseconds


def _wall_time(run: Callable[[], object], flush: Tensor) -> float:
    flush.zero_()
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _events(run: Callable[[], object], flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(flush.device)
    flush.zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(flush.device)
    return start.elapsed_time(end)


def percentiles(milliseconds: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated."""
    if len(milliseconds) == 1:
        return (milliseconds[0],) * 3
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A batched matrix product of MATRIX_SIZES, and its FLOPs."""
    batch, size = 4, MATRIX_SIZES[device.type]
    x, y = (torch.randn(batch, size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.bmm(x, y), 2 * batch * size**3


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes in use at the peak of one call beyond those before it; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    libc = ctypes.CDLL(None)
    try:
        try:
            libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
            libc.malloc_trim(0)
            # The high-water mark becomes the present size.
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            run()
            return None
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)
    finally:
        # Where malloc's own adjustment ends. Left alone, each block would be faulted in anew from now on.
        with contextlib.suppress(AttributeError):
            libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**26)


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
