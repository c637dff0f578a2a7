"""Both operations on a recording of speech: results, state and cost.

```
python -m examples.demo [--audio PATH] [--out DIR]
```

1. computes log-mel frames of the recording, and projects them at random to the operations' inputs;
2. runs both operations forward and backward, and compares outputs and gradients with float64;
3. cuts the recording in two, passes the state of the fast weights on, and compares with one call;
4. measures the time for several window sizes and lengths, beside what the needed FLOPs predict.

Everything runs on the GPU if there is one, else on the CPU. It takes one to three minutes on two cores.
Exit status: 0, 1 if an error exceeds its bound, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import lact_kernels
from benchmarks import gate, measure, peers, report
from benchmarks.accuracy import COMPARISON_HEADER, compare, comparison_line
from benchmarks.registry import (
    BlockCausalTTT,
    Point,
    WindowAttn,
    empty_output,
    forward_backward,
    in_float64,
    output_gradient,
)
from examples import picture, speech

CHECKED_FRAMES = 20 * speech.FRAMES_PER_SECOND
SWEEP_LENGTH = 8192
SWEEP_WINDOWS = (64, 128, 256, 512, 1024, 2048)
SWEEP_LENGTHS = (2048, 4096, 8192, 16384)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return _demo(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--audio",
        type=Path,
        default=speech.RECORDING,
        metavar="PATH",
        help="a recording of your own: any sample rate, mono or stereo, at least two seconds",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-results"), metavar="DIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the measurements")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    try:
        options.samples = speech.read_audio(options.audio)
    except OSError as error:
        parser.error(f"--audio: {error}")
    seconds = len(options.samples) / speech.SAMPLE_RATE
    if seconds < 2:
        parser.error(f"--audio: {options.audio} lasts {seconds:.1f} s, at least 2 s are needed")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def _demo(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frames = speech.log_mel(options.samples)
    points = _points(len(frames))
    backends = {point.op: _backend(point, dtype, device) for point in points}

    _title("What runs where")
    environment = report.environment(device)
    print(f"device     {environment['device']}, {str(dtype).removeprefix('torch.')}")
    print("backends   " + ", ".join(f"{op}: {backend}" for op, backend in backends.items()))
    print("versions   " + ", ".join(f"{k} {v}" for k, v in environment["versions"].items()))
    print(f"recording  {options.audio}, {len(options.samples) / speech.SAMPLE_RATE:.1f} s")
    for point in points:
        swept = getattr(point, point.swept)
        print(
            f"{point.op}: {point.T} frames, {point.swept} {swept}"
            f" ({swept / speech.FRAMES_PER_SECOND:.2f} s)"
        )
    attention, ttt = points
    inputs = {
        attention.op: speech.attention_inputs(frames, attention, dtype, device),
        ttt.op: speech.ttt_inputs(frames, ttt, dtype, device),
    }

    ok = True
    for point in points:
        ok &= _check(point, backends[point.op], inputs[point.op])
    ok &= _check_state(ttt, inputs[ttt.op])
    drift = _drift(ttt, inputs[ttt.op])
    for point in points:
        _run_whole(point, backends[point.op], inputs[point.op])

    sweeps = [] if options.no_sweep else _sweeps(points, backends, dtype, device)
    path = options.out / "demo.png"
    picture.draw(frames, drift, ttt.chunk_size, sweeps, environment["device"], path)
    print(f"\n{'all within their bounds' if ok else 'SOME ERRORS ARE BEYOND THEIR BOUNDS'}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if ok else 1


def _points(T: int) -> tuple[WindowAttn, BlockCausalTTT]:
    """Sizes for T frames: a window of 5.12 s, an update every 2.56 s, both less for short recordings."""
    window_size = min(512, T // 2)
    chunk_size = min(256, T // 4)
    dims = {"Dk": 64, "Dv": 64, "Dh": 64}
    return (
        WindowAttn(T=T, window_size=window_size),
        BlockCausalTTT(T=T, chunk_size=chunk_size, **dims, momentum=True),
    )


def _backend(point: Point, dtype: torch.dtype, device: torch.device) -> str:
    """The first backend that accepts inputs like this point's, found by trying."""
    tiny = dataclasses.replace(point, T=2, **{point.swept: 1})
    for backend in peers.BACKENDS[point.op, device.type]:
        try:
            tiny.run(backend, **tiny.inputs(dtype, device))
        except ValueError:
            continue
        return backend
    raise RuntimeError(f"no backend runs {point.op} on {device}")


def _part(inputs: dict[str, Tensor], T: int) -> dict[str, Tensor]:
    """The first T tokens of the inputs. Fast weights have no time axis, and stay whole."""
    return {
        name: (x if name.startswith("w") else x[:, :T]).detach().requires_grad_()
        for name, x in inputs.items()
    }


def _check(point: Point, backend: str, inputs: dict[str, Tensor]) -> bool:
    """Output and gradients of the first seconds against the reference in float64."""
    T = min(point.T, CHECKED_FRAMES)
    seconds = T / speech.FRAMES_PER_SECOND
    _title(f"{point.op} against the float64 reference, first {seconds:.0f} s")
    print(
        "  bounds: twice (largest error: four times) that of plain PyTorch in this dtype, + rounding"
    )
    part = _part(inputs, T)
    print(COMPARISON_HEADER, flush=True)
    comparisons = gate.check(dataclasses.replace(point, T=T), [backend], part)[backend]
    for name, comparison in comparisons.items():
        print(comparison_line(name, comparison), flush=True)
    return all(comparison.ok for comparison in comparisons.values())


def _check_state(point: BlockCausalTTT, inputs: dict[str, Tensor]) -> bool:
    """Compare one call with two, cut in the middle of a chunk, where the second continues from the state."""
    T = min(point.T, CHECKED_FRAMES)
    cut = (T * 3 // 5) | 1
    _title(f"block_causal_ttt cut in two at frame {cut}, the state passed on")
    part = {name: x.detach() for name, x in _part(inputs, T).items()}
    first, second = _cut(part, 0, cut), _cut(part, cut, T)
    whole = _call(point, part)
    o1, state = _call(point, first, return_state=True)
    o2 = _call(point, second, initial_state=state)
    joined = torch.cat([o1, o2], dim=1)
    exact = point.reference(**in_float64(part)).detach()
    comparison = compare(joined, point.reference(**part), exact)
    print(f"  largest difference to one call: {(joined - whole).abs().max().item():.1e}")
    print(COMPARISON_HEADER)
    print(comparison_line("o in two", comparison), flush=True)
    return comparison.ok


def _cut(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x if name.startswith("w") else x[:, start:stop] for name, x in inputs.items()}


def _call(point: BlockCausalTTT, inputs: dict[str, Tensor], **options):
    sizes = {"chunk_size": point.chunk_size, "muon": point.muon}
    with torch.no_grad():
        return lact_kernels.block_causal_ttt(**inputs, **sizes, **options)


def _drift(point: BlockCausalTTT, inputs: dict[str, Tensor]) -> list[float]:
    """The change of the fast weights after each chunk, `||w - w_0|| / ||w_0||`.

    The recording is streamed, one chunk per call.
    """
    start = [inputs[name].detach() for name in ("w0", "w1", "w2")]
    norm = sum(w.square().sum() for w in start) ** 0.5
    state, drift = None, [0.0]
    for begin in range(0, point.T - point.chunk_size + 1, point.chunk_size):
        chunk = _cut(inputs, begin, begin + point.chunk_size)
        _, state = _call(point, chunk, initial_state=state, return_state=True)
        moved = sum((x[0] - w).square().sum() for x, w in zip(state.weights, start)) ** 0.5
        drift.append((moved / norm).item())
    return drift


def _run_whole(point: Point, backend: str, inputs: dict[str, Tensor]) -> None:
    """The whole recording, forward and backward, timed once after a warm-up."""
    _title(f"{point.op}, whole recording")
    device = inputs["q"].device
    do = output_gradient(empty_output(point, inputs["q"].dtype, device))
    for label in ("first call", "second call"):
        started = time.perf_counter()
        forward_backward(lambda **x: point.run(backend, **x), inputs, do)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        rate = point.flops("fwd_bwd") / seconds / 1e9
        print(
            f"  {label:<12} forward + backward of {point.T} frames: {1e3 * seconds:.1f} ms,"
            f" {rate:.1f} GFLOP/s on needed FLOPs",
            flush=True,
        )


def _sweeps(points, backends, dtype, device) -> list[list[report.Row]]:
    """Rows of three short sweeps: window size, then the length for each operation."""
    attention, ttt = points
    sweeps = [
        ("window_size", [WindowAttn(SWEEP_LENGTH, W) for W in SWEEP_WINDOWS]),
        ("T", [WindowAttn(T, attention.window_size) for T in SWEEP_LENGTHS]),
        ("T", [dataclasses.replace(ttt, T=T) for T in SWEEP_LENGTHS]),
    ]
    settings = measure.Settings(dtype, device, rounds=5, seconds=2)
    return [_sweep(swept, values, backends, settings) for swept, values in sweeps]


def _sweep(swept: str, points: list[Point], backends, settings) -> list[report.Row]:
    """Measure forward + backward at each point, and print time beside the needed FLOPs.

    Times are medians.
    """
    op = points[0].op
    variants = [v for v in peers.variants(op, settings.device) if v.name.endswith(backends[op])]
    _title(f"{op} against {swept}, forward + backward")
    print(f"  {swept:>11} {'needed GFLOP':>13} {'ms':>9} {'GFLOP/s':>9}")
    rows = []
    for point in points:
        (row,) = measure.measure_point(point, "fwd_bwd", swept, variants, settings)
        if row.status != "ok":
            print(f"  {row.place:>11} {row.status}", flush=True)
            break
        rows.append(row)
        gflop = point.flops("fwd_bwd") / 1e9
        print(
            f"  {row.place:>11} {gflop:>13.2f} {row.p50_ms:>9.2f} {1e3 * gflop / row.p50_ms:>9.1f}",
            flush=True,
        )
    if len(rows) > 1:
        work = points[-1].flops("fwd_bwd") / points[0].flops("fwd_bwd")
        print(
            f"  from {rows[0].place} to {rows[-1].place}: needed FLOPs x {work:.1f},"
            f" time x {rows[-1].p50_ms / rows[0].p50_ms:.1f}"
        )
    return rows


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
