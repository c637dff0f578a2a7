"""The correctness gate: nothing is timed before it is right.

Every backend of ours that a device can run is held against `reference/` in float64, forward and every
gradient there is, under the rule of `benchmarks/accuracy.py`.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.accuracy import COMPARISON_HEADER, Comparison, compare_all, comparison_line
from benchmarks.registry import (
    Point,
    WindowAttn,
    WindowAttnWithKVCache,
    empty_output,
    forward_backward,
    in_float64,
    output_gradient,
)

# One more window than the sweep has: an odd length that no tile size divides, a window inside a tile.
EDGE_POINT = WindowAttn(T=777, window_size=100)
CACHE_EDGE_POINT = WindowAttnWithKVCache(S=777, window_size=100, Tq=3)


def check(
    point: Point, backends: Iterable[str], inputs: dict[str, Tensor]
) -> dict[str, dict[str, Comparison]]:
    """Comparisons of output "o" and gradients "dx" of `point` on `inputs`, for each backend."""
    do = output_gradient(empty_output(point, inputs["q"].dtype, inputs["q"].device))
    exact = forward_backward(point.reference, in_float64(inputs), do)
    same_dtype = forward_backward(point.reference, inputs, do)
    results = {}
    for backend in backends:
        actual = forward_backward(lambda b=backend, **x: point.run(b, **x), inputs, do)
        results[backend] = compare_all(actual, same_dtype, exact)
    return results


def passes(
    points: Iterable[Point], backends: Iterable[str], dtype: torch.dtype, device: torch.device
) -> bool:
    """Check the gate points of all `points`, print one line each, and tables where one fails."""
    ok = True
    for point in _gate_points(points):
        label = _label(point)
        try:
            results = check(point, backends, point.inputs(dtype, device))
        except Exception as error:  # whatever it raises, it is a failure to report, not to hide
            print(f"gate  {label:<60} CRASHED: {type(error).__name__}: {error}", flush=True)
            ok = False
            continue
        for backend, comparisons in results.items():
            worst = max(comparisons, key=lambda name: _used(comparisons[name]))
            failed = [name for name, c in comparisons.items() if not c.ok]
            verdict = f"FAILED: {', '.join(failed)}" if failed else "ok"
            used = f"worst {worst} at {_used(comparisons[worst]):.0%} of its bound"
            print(f"gate  {label:<60} {backend:<7} {used:<34} {verdict}", flush=True)
            if failed:
                ok = False
                print(COMPARISON_HEADER)
                for name, comparison in comparisons.items():
                    print(comparison_line(name, comparison), flush=True)
    return ok


def _gate_points(points: Iterable[Point]) -> list[Point]:
    """Each gate point once, in the order of the sweep, and the odd edge with windows."""
    gates = list(dict.fromkeys(point.gate() for point in points))
    if isinstance(gates[0], WindowAttn):
        gates.append(dataclasses.replace(EDGE_POINT, sequences=gates[0].sequences))
    if isinstance(gates[0], WindowAttnWithKVCache):
        gates.append(CACHE_EDGE_POINT)
    return gates


def _label(point: Point) -> str:
    """The operation and all that is not as by default, its size above all."""
    values = (
        (field.name, getattr(point, field.name), field.default)
        for field in dataclasses.fields(point)
    )
    return " ".join([point.op, *(f"{name}={x}" for name, x, default in values if x != default)])


def _used(comparison: Comparison) -> float:
    """The part of its bounds that an error uses, the worse of both; infinite for NaN."""
    pairs = (
        (comparison.error, comparison.bound),
        (comparison.max_error, comparison.max_bound),
    )
    parts = [error / bound if bound else float(error > 0) for error, bound in pairs]
    return max(part if part == part else float("inf") for part in parts)
