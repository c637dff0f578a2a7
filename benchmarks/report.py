"""Rows of results: what a row says, the table on the screen, the JSON lines on disk."""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import lact_kernels

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmark-results"


@dataclasses.dataclass
class Row:
    """One variant at one point. Times in milliseconds; None where nothing was or could be measured."""

    op: str
    variant: str
    swept: str  # the variable of this sweep, one of the shape, such as "window_size" or "T"
    shape: dict
    dtype: str
    mode: str  # "fwd", or "fwd_bwd" for forward and backward together
    status: str = "ok"  # or why there are no times
    first_call_s: float | None = None  # seconds, compiling included where its caches lack it
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_memory_bytes: int | None = None  # beyond the inputs
    needed_tflops: float | None = None  # TFLOP/s on needed FLOPs, at p50
    needed_gb_per_s: float | None = None  # on needed bytes, at p50, where memory is what bounds
    baseline: str | None = None  # the peer that the ratio refers to
    ratio_to_baseline: float | None = None  # baseline's p50 / this p50: above 1 is faster
    matrix_tflops: float | None = None  # of a plain matrix product, timed in turn with this row
    share_of_matrix_rate: float | None = None
    difference: float | None = None  # ||this - ours|| / ||ours||, the worst tensor
    error: float | None = None  # ||this - exact|| / ||exact||, likewise, where that was computed

    @property
    def ours(self) -> bool:
        return self.variant.startswith(lact_kernels.__name__)

    @property
    def place(self) -> int:
        """The swept variable's value; full attention stands at T."""
        value = self.shape[self.swept]
        return self.shape["T"] if value is None else value


def environment(device: torch.device) -> dict:
    """What every row of a run has in common: commit, date, versions, device."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(device),
    }


def versions() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "lact_kernels": lact_kernels.__version__,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of the sources, with "-dirty" when they have changed since; "unknown" without git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def announce(environment: dict, *details: str) -> None:
    """Say what runs where, before anything is measured."""
    print(", ".join([environment["device"], *details, f"commit {environment['commit']}"]))
    print(", ".join(f"{name} {x}" for name, x in environment["versions"].items()), flush=True)


class JsonLines:
    """Appends rows to `<directory>/<device>.jsonl`, each safely on disk before the next is measured.

    Rows are dataclasses. Those of another kind than `Row` have a file of their own: `<device>-<kind>.jsonl`.
    """

    def __init__(self, directory: Path, environment: dict, kind: str = ""):
        directory.mkdir(parents=True, exist_ok=True)
        name = slug(f"{environment['device']} {kind}")
        self.path = directory / f"{name}.jsonl"
        self.environment = environment
        self.path.touch()  # fails now rather than after the first measurement

    def append(self, row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(self.environment | dataclasses.asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def open_rows(
    directory: Path, device: torch.device, *details: str, kind: str = ""
) -> JsonLines | None:
    """Where a command appends its rows, after it has announced what runs where.

    None if nothing can be written there: the reason is on the screen, and the exit status is 2.
    """
    settings = environment(device)
    try:
        rows_file = JsonLines(directory, settings, kind)
    except OSError as error:
        print(f"cannot write results to {directory}: {error}", file=sys.stderr)
        return None
    announce(settings, *details)
    return rows_file


HEADER = (
    f"{'size':>7} {'mode':<7} {'variant':<30} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'TFLOP/s':>8}"
    f" {'GB/s':>7} {'x base':>7} {'matrix':>6} {'peak MiB':>9} {'first s':>7}  status"
)


def table_line(row: Row) -> str:
    size = f"{row.place}" if row.shape[row.swept] is not None else "full"
    times = " ".join(significant(x, 9) for x in (row.p20_ms, row.p50_ms, row.p80_ms))
    share = "" if row.share_of_matrix_rate is None else f"{row.share_of_matrix_rate:.0%}"
    mebibytes = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
    return (
        f"{size:>7} {row.mode:<7} {row.variant:<30} {times}"
        f" {significant(row.needed_tflops, 8)}"
        f" {_number(row.needed_gb_per_s, 7, 1)}"
        f" {_number(row.ratio_to_baseline, 7, 2)} {share:>6} {_number(mebibytes, 9, 1)}"
        f" {_number(row.first_call_s, 7, 2)}  {row.status}"
    )


def significant(value: float | None, width: int) -> str:
    """With four significant digits, and at least one after the point."""
    decimals = 3 if not value else min(max(3 - math.floor(math.log10(value)), 1), 4)
    return _number(value, width, decimals)


def _number(value: float | None, width: int, decimals: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{decimals}f}"
