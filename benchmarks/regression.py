"""What the pytest-benchmark files share: one point, timed on this machine's best backend."""

from collections.abc import Callable

import torch

from benchmarks.measure import runner
from benchmarks.registry import Point, empty_output, output_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

# Rounds are at least five, and as many as fit into a second.
OPTIONS = {"warmup": True, "warmup_iterations": 1, "min_rounds": 5, "max_time": 1.0}


def time_point(benchmark, point: Point, mode: str) -> None:
    """Time `mode` at `point` with the fixture `benchmark`, until the last kernel has ended."""
    inputs = point.inputs(DTYPE, DEVICE)
    do = output_gradient(empty_output(point, DTYPE, DEVICE))
    run = runner(lambda **x: point.run("auto", **x), inputs, do, mode)

    benchmark.group = f"{point.op} {mode}"
    benchmark.extra_info["needed_gflop"] = point.flops(mode) / 1e9
    time_call(benchmark, run)


def time_call(benchmark, run: Callable[[], object]) -> None:
    """Time one call until its last kernel has ended."""

    def call() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
