"""All variants of one point, measured together: warmed up, compared, timed in turns."""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.peers import Unavailable, Variant
from benchmarks.registry import Point, empty_output, forward_backward, output_gradient
from benchmarks.report import Row

MATRIX = "matrix product"

# A variant further than this from ours computes something else and is not timed. Half-precision
# results differ by rounding alone; a window off by one differs by about sqrt(2 / window_size).
DIFFERENCE_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


# Says of a result what is wrong with it, or None; it may add to the row.
Judge = Callable[[Row, dict[str, Tensor]], str | None]


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: torch.dtype
    device: torch.device
    rounds: int  # turns that variants take
    seconds: float  # per point; fewer rounds where they would take longer


def measure_point(
    point: Point,
    mode: str,
    swept: str,
    variants: list[Variant],
    settings: Settings,
    judge: Judge | None = None,
) -> Iterator[Row]:
    """A row for every variant, whether it ran or not. Ratios refer to the first peer.

    Only what `judge` finds right is timed: by default, what differs little enough from ours.
    """
    judge = judge or functools.partial(_judge_difference, point, settings.dtype)
    dtype = str(settings.dtype).removeprefix("torch.")
    rows = {
        v.name: Row(point.op, v.name, swept, dataclasses.asdict(point), dtype, mode)
        for v in variants
    }
    torch.compiler.reset()  # every point compiles afresh, or torch gives up recompiling at some point
    _free(settings.device)
    try:
        inputs = point.inputs(settings.dtype, settings.device)
        do = output_gradient(empty_output(point, settings.dtype, settings.device))
    except torch.OutOfMemoryError:
        for row in rows.values():
            row.status = "the inputs do not fit in memory"
        yield from rows.values()
        return

    runs: dict[str, Callable[[], object]] = {}
    ours: dict[str, Tensor] | None = None
    for variant in variants:
        row = rows[variant.name]
        try:
            run = runner(variant.build(point, mode), *_laid_out(variant, point, inputs, do), mode)
            result, row.first_call_s = _first_call(run, settings.device)
            result = _in_our_layout(variant, point, result)
            if ours is None and variant.ours:
                ours = result
            elif ours is not None:
                row.difference = difference_of(result, ours)
            wrong = judge(row, result)
            del result
            row.peak_memory_bytes = timing.peak_memory(run, settings.device)
        except Exception as error:  # a peer that breaks is a row, not the end of the run
            row.status = status_of(error)
        else:
            if wrong is None:
                runs[variant.name] = run
            else:
                row.status = f"not timed: {wrong}"
        _free(settings.device)
    del ours

    baseline = next((v.name for v in variants if not v.ours), None)
    _time(rows, runs, point, mode, baseline, settings)
    yield from rows.values()


def _time(
    rows: dict[str, Row],
    runs: dict[str, Callable[[], object]],
    point: Point,
    mode: str,
    baseline: str | None,
    settings: Settings,
) -> None:
    """Time `runs` in turns with a matrix product, and fill in their rows."""
    product, product_flops = timing.matrix_product(settings.dtype, settings.device)
    product()
    try:
        measured = timing.interleaved(
            runs | {MATRIX: product}, settings.device, settings.rounds, settings.seconds
        )
    except torch.OutOfMemoryError:
        for name in runs:
            rows[name].status = "out of memory while timing"
        return
    matrix_ms = timing.percentiles(measured.pop(MATRIX))[1]
    for name, milliseconds in measured.items():
        row = rows[name]
        row.rounds = len(milliseconds)
        row.p20_ms, row.p50_ms, row.p80_ms = timing.percentiles(milliseconds)
        if hasattr(point, "flops"):
            row.needed_tflops = point.flops(mode) / row.p50_ms / 1e9
        if hasattr(point, "needed_bytes"):
            row.needed_gb_per_s = point.needed_bytes(settings.dtype) / row.p50_ms / 1e6
        row.matrix_tflops = product_flops / matrix_ms / 1e9
        if row.needed_tflops is not None:
            row.share_of_matrix_rate = row.needed_tflops / row.matrix_tflops
    for name in measured:
        if baseline in measured:
            rows[name].baseline = baseline
            rows[name].ratio_to_baseline = rows[baseline].p50_ms / rows[name].p50_ms


def _first_call(
    run: Callable[[], dict[str, Tensor]], device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Its result, and the seconds until the device has it."""
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def runner(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], do: Tensor, mode: str
) -> Callable[[], dict[str, Tensor]]:
    """One call in `mode`; forward alone runs without autograd, on inputs that need no gradients.

    On a GPU the call returns before its kernels have ended.
    """
    plain = {name: x.detach() for name, x in inputs.items()}

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"o": function(**plain)}

    return forward if mode == "fwd" else lambda: forward_backward(function, inputs, do)


def _laid_out(
    variant: Variant, point: Point, inputs: dict[str, Tensor], do: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs, leaves again, and `do` in the layout of the variant."""
    if variant.layout is None:
        return inputs, do
    leaves = {
        name: variant.layout.theirs(point, name, x.detach()).requires_grad_()
        for name, x in inputs.items()
    }
    return leaves, variant.layout.theirs(point, "o", do)


def _in_our_layout(variant: Variant, point: Point, result: dict[str, Tensor]) -> dict[str, Tensor]:
    if variant.layout is None:
        return result
    names = {name: name if name == "o" else name.removeprefix("d") for name in result}
    return {name: variant.layout.ours(point, names[name], x) for name, x in result.items()}


def _judge_difference(
    point: Point, dtype: torch.dtype, row: Row, result: dict[str, Tensor]
) -> str | None:
    """Whether the difference may come from rounding alone. `None` is ours, which others differ from.

    Muon amplifies rounding at every update, so after many of them only the gate, with two, can judge.
    """
    if row.difference is None or getattr(point, "muon", False):
        return None
    if row.difference <= DIFFERENCE_LIMITS[dtype]:  # False for NaN
        return None
    return f"differs from ours by {row.difference:.1%}"


def difference_of(result: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """`||result - ours|| / ||ours||` of the tensor where it is largest; NaN if any is not finite."""
    ratios = []
    for name, x in ours.items():
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dtype=wide)
        error = torch.linalg.vector_norm((result[name] - x).to(wide))
        ratios.append((error / norm).item() if norm else error.item())
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio))


def status_of(error: Exception) -> str:
    """The status of the row of a variant that raised this."""
    if isinstance(error, Unavailable):
        return f"unavailable: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return failure(error)


def failure(error: Exception) -> str:
    """The status of a row that could not be measured."""
    line = next((x for x in str(error).splitlines() if x.strip()), "")
    return f"failed: {type(error).__name__}: {line[:160]}"


def _free(device: torch.device) -> None:
    """Give back what failed or finished variants held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
