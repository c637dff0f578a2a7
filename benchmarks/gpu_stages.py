"""What a check on a GPU consists of: the short one for machines that one has for minutes, and all of it.

A tier is its tests, which come first, and the benchmarks that follow where these pass. Each is a command
in a process of its own with a budget of seconds, so that what one breaks ends nothing else.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path

START_SECONDS = 15  # until the first stage starts: Python, torch, the driver


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    module: tuple[str, ...]  # what follows `python -m`
    seconds: float
    needs_rows: bool = True  # a benchmark that finishes nothing within its time has failed


@dataclasses.dataclass(frozen=True)
class Tier:
    name: str
    tests: Stage
    benchmarks: tuple[Stage, ...]
    grace: float  # seconds from asking a stage to stop to killing it

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self.tests, *self.benchmarks)

    @property
    def longest(self) -> float:
        """Seconds after which it has ended, even if every stage has to be killed."""
        return START_SECONDS + sum(stage.seconds + self.grace for stage in self.stages)


def short(out: Path) -> Tier:
    """Every kernel in both 16-bit dtypes, and five yardsticks; within four minutes.

    A peer that takes minutes to compile, or to tune itself, is left to the complete check.
    """
    common = ("--device", "cuda", "--repeats", "15", "--seconds", "2", "--out", str(out))
    run = ("benchmarks.run", *common, "--op")
    attention = (*run, "window_attn", "--heads", "16")
    attention += ("--peers", "FlexAttention", "FlashAttention-2 varlen_attn")
    batch = ("--batch", "4", "--seq-len", "16384", "--head-dim", "64", "--window-sizes", "1024")
    long = ("--seq-len", "32768", "--head-dim", "128", "--window-sizes", "4096")
    cache = (*run, "window_attn_with_kvcache", "--heads", "32", "--kv-heads", "8")
    cache += ("--head-dim", "128", "--cache-rows", "64", "--cache-sizes", "8192")
    cache += ("--cache-window", "4096", "--peers", "SDPA over the window")
    ttt = (*run, "block_causal_ttt", "--seq-len", "32768", "--chunk-sizes", "2048")
    ttt += ("--fast-weight-heads", "4", "--fast-weight-dims", "384", "768")
    ttt += ("--peers", "reference loop")
    return Tier(
        "short",
        _tests(out, "tests/test_gpu_short.py", processes=12, seconds=70),
        (
            # FlexAttention compiles its mask, its forward and its backward first.
            Stage("window_attn-D64", (*attention, *batch), 50),
            Stage("window_attn-D128", (*attention, *long), 42),
            Stage("window_attn_with_kvcache", cache, 15),
            Stage("block_causal_ttt", ttt, 28),
        ),
        grace=4,
    )


def complete(out: Path) -> Tier:
    """Every GPU test, then all benchmarks with all their peers; within ten minutes."""
    common = ("--device", "cuda", "--repeats", "15", "--seconds", "3", "--out", str(out))
    run = ("benchmarks.run", *common, "--op")
    attention = (*run, "window_attn", "--window-sizes")
    packed = (*attention, "4096", "--sequences", "16")
    cache = (*run, "window_attn_with_kvcache", "--cache-sizes", "4096", "16384", "65536")
    cache += ("--heads", "32", "--kv-heads", "8")
    chunks = ("--chunk-sizes", "2048", "--fast-weight-dims", "384", "768")
    ttt = (*run, "block_causal_ttt", *chunks)
    # An order with Newton-Schulz, and a control step.
    fast_weights = (*run, "block_causal_ttt", "ttt", "ttt_apply", *chunks)
    fast_weights += ("--plan", "views", "--applied-tokens", "1")
    fast_weights += ("--peers", "plain function")
    sizes = "--dtype bfloat16 --seq-len 32768 --chunk-size 2048 --fast-weight-heads 4"
    phases = ("benchmarks.phases", "--device", "cuda", *sizes.split())
    phases += ("--fast-weight-dim", "384", "768", "--repeats", "3", "--out", str(out))
    # An order without Newton-Schulz, many small updates, and a whole layer.
    family = ("benchmarks.family", *common, "--case", "video", "frames", "layer", "--no-compile")
    model = ("benchmarks.model", "--device", "cuda", "--rounds", "3", "--out", str(out))
    branches = ("benchmarks.branches", *common)
    accuracy = ("benchmarks.accuracy_report", "--device", "cuda", "--out", str(out))
    accuracy += ("--seq-len", "4096", "65536", "--heads", "2")
    return Tier(
        "all",
        _tests(out, "tests", processes=8, seconds=300),
        (
            Stage("window_attn", (*attention, "1024", "4096", "16384"), 40),
            Stage("window_attn-packed", packed, 20),
            Stage("window_attn_with_kvcache", cache, 20),
            Stage("accuracy", accuracy, 22),
            Stage("fast_weights", fast_weights, 35),
            Stage("family", family, 25),
            Stage("phases", phases, 25),
            Stage("phases-muon", (*phases, "--muon"), 20),
            Stage("branches", branches, 25),
            # Its two processes start and compile first, and may take most of it.
            Stage("model", model, 25, needs_rows=False),
            # Compiling the reference takes long, and may take all of it.
            Stage("block_causal_ttt-peers", (*ttt, "--mode", "fwd_bwd"), 13, needs_rows=False),
        ),
        grace=15,
    )


def junit_report(out: Path) -> Path:
    """Where the tests of a tier leave what passed and what did not."""
    return out / "tests.xml"


def _tests(out: Path, where: str, processes: int, seconds: float) -> Stage:
    command = ("pytest", where, "-m", "gpu", "-ra", "--durations=10")
    command += ("--junitxml", str(junit_report(out)))
    # A test file that lacks a module must not keep the others from running.
    command += ("--continue-on-collection-errors",)
    if importlib.util.find_spec("xdist"):  # most of their time is compilation, on the host
        processes = min(processes, os.cpu_count() or 1)
        command += ("-n", str(processes), "--dist", "loadgroup")
    return Stage("tests", command, seconds)
