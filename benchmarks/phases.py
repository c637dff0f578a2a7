"""Where `block_causal_ttt` spends its time: phases of one forward and backward, launches, saved bytes.

```
python -m benchmarks.phases                                   # this device's default size
python -m benchmarks.phases --device cuda --fast-weight-dim 384 768 --muon --backend triton
```

The backends mark their phases in PyTorch's profiler. On a GPU a phase's time is that of the kernels,
copies and fills launched in it; on a CPU it is the time it took. What is in no phase is the rest. The time
of the whole is measured apart, without the profiler: on a GPU it has the idle time between kernels, too.

Launches per chunk are the difference between two lengths; bytes saved for the backward are what autograd
holds besides the inputs. Correctness is not checked here: `python -m benchmarks.run` does.

A table is printed and a row appended to `<out>/<device>-phases.jsonl` as soon as it is finished. Exit
status: 0, 1 when a backend fails, 2 for bad arguments, 130 after Ctrl-C.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers, report, timing
from benchmarks.launches import Launches, count_launches
from benchmarks.measure import failure, runner
from benchmarks.registry import BlockCausalTTT, empty_output, output_gradient
from benchmarks.run import DEFAULTS, DTYPES, positive, settle_device

OP = BlockCausalTTT.op
PREFIX = f"{OP} "  # of the phases' names in profiles
CALL = "measured forward and backward"  # the range that holds one call
# In this order, others behind.
PHASES = ("scan", "apply", "apply backward", "reverse scan", "deferred")
FEW_CHUNKS, MANY_CHUNKS = 4, 12  # the lengths whose difference gives the launches of a chunk
CHUNK_SIZES = {"cpu": 512, "cuda": 2048}
MODES = ("forward", "backward")
COUNTS = ("kernels", "ops", "syncs")


@dataclasses.dataclass
class PhaseRow:
    """One backend at one point. Times in milliseconds, medians; None where nothing could be measured."""

    op: str
    variant: str
    shape: dict
    dtype: str
    status: str = "ok"  # or why there are no figures
    repeats: int = 0
    p50_ms: float | None = None  # forward and backward, without the profiler
    phases_ms: dict[str, float] | None = (
        None  # on a GPU of the kernels alone; "rest" is in no phase
    )
    device_launches: int | None = None  # kernels, copies and fills of one call, on a GPU
    # By "forward" and "backward", and then by COUNTS: for each chunk more, and what this leaves for one
    # chunk alone, which is applied but never updated.
    launches_per_chunk: dict[str, dict[str, float]] | None = None
    launches_of_one_chunk: dict[str, dict[str, float]] | None = None
    names_per_chunk: dict[str, dict[str, float]] | None = None  # kernels and ops by name
    saved_bytes: int | None = None  # for the backward, inputs not counted


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    rows_file = report.open_rows(options.out, device, options.dtype, kind="phases")
    if rows_file is None:
        return 2

    status = 0
    try:
        for point in _points(options):
            for backend in options.backend:
                row = measure(point, backend, DTYPES[options.dtype], device, options.repeats)
                rows_file.append(row)
                print("\n" + "\n".join(table(row)), flush=True)
                status |= row.status != "ok"
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    print(f"\nrows appended to {rows_file.path}")
    return int(status)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.phases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seq-len", type=positive, metavar="T")
    parser.add_argument("--chunk-size", type=positive, metavar="C")
    parser.add_argument("--fast-weight-heads", type=positive, default=4)
    parser.add_argument(
        "--fast-weight-dim", nargs="+", type=positive, metavar="D", help="each for Dk = Dv = Dh"
    )
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--prenorm", action="store_true")
    parser.add_argument("--backend", nargs="+", choices=("triton", "eager"))
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    defaults = DEFAULTS[options.device]
    options.dtype = options.dtype or defaults.dtype
    options.seq_len = options.seq_len or defaults.seq_len
    options.chunk_size = options.chunk_size or CHUNK_SIZES[options.device]
    options.fast_weight_dim = options.fast_weight_dim or list(defaults.fast_weight_dims)
    options.backend = options.backend or list(peers.BACKENDS[OP, options.device])
    return options


def _points(options: argparse.Namespace) -> list[BlockCausalTTT]:
    flags = {name: getattr(options, name) for name in ("muon", "momentum", "prenorm")}
    sizes = {"T": options.seq_len, "chunk_size": options.chunk_size, "H": options.fast_weight_heads}
    return [BlockCausalTTT(**sizes, Dk=D, Dv=D, Dh=D, **flags) for D in options.fast_weight_dim]


def measure(
    point: BlockCausalTTT, backend: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> PhaseRow:
    """Everything about one backend at one point; what goes wrong becomes the row's status."""
    row = PhaseRow(
        OP,
        f"lact_kernels {backend}",
        dataclasses.asdict(point),
        str(dtype).removeprefix("torch."),
    )
    try:
        _time(row, point, backend, dtype, device, repeats)
        _count(row, point, backend, dtype, device)
    except Exception as error:  # a row that says so, not the end of the run
        row.status = failure(error)
    return row


def _time(
    row: PhaseRow,
    point: BlockCausalTTT,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> None:
    """Times and saved bytes of the point itself."""
    inputs = point.inputs(dtype, device)
    do = output_gradient(empty_output(point, dtype, device))
    run = runner(lambda **x: point.run(backend, **x), inputs, do, "fwd_bwd")
    run()
    row.saved_bytes = saved_bytes(lambda: point.run(backend, **inputs), inputs)
    times = timing.interleaved({backend: run}, device, repeats, seconds=float("inf"))
    calls = [breakdown(trace) for trace in profile(run, device, repeats)]
    row.repeats = repeats
    row.p50_ms = statistics.median(times[backend])
    row.phases_ms = _medians([phases for phases, _ in calls])
    if device.type == "cuda":
        row.device_launches = round(statistics.median(count for _, count in calls))


def _count(
    row: PhaseRow, point: BlockCausalTTT, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Launches, from two lengths of so many chunks."""
    few, many = (
        _launches(dataclasses.replace(point, T=n * point.chunk_size), backend, dtype, device)
        for n in (FEW_CHUNKS, MANY_CHUNKS)
    )
    row.launches_per_chunk, row.launches_of_one_chunk, row.names_per_chunk = {}, {}, {}
    for mode in MODES:
        counts = {name: getattr(few[mode], name) for name in COUNTS}
        per_chunk = {
            name: (getattr(many[mode], name) - n) / (MANY_CHUNKS - FEW_CHUNKS)
            for name, n in counts.items()
        }
        row.launches_per_chunk[mode] = per_chunk
        row.launches_of_one_chunk[mode] = {
            name: n - (FEW_CHUNKS - 1) * per_chunk[name] for name, n in counts.items()
        }
        row.names_per_chunk[mode] = _names_per_chunk(few[mode], many[mode])


def _medians(calls: list[dict[str, float]]) -> dict[str, float]:
    """Of every phase, in the order of PHASES; a phase that a call lacks took no time in it."""
    names = dict.fromkeys(name for call in calls for name in call)
    known = [name for name in PHASES if name in names]
    others = [name for name in names if name not in PHASES and name != "rest"]
    return {
        name: statistics.median(call.get(name, 0.0) for call in calls)
        for name in (*known, *others, "rest")
    }


def saved_bytes(forward: Callable[[], Tensor], inputs: dict[str, Tensor]) -> int:
    """Memory that autograd holds on to after `forward`, beside that of the inputs."""
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return (
            x.detach()
        )  # with its graph, an output of the op that saves it would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = forward()  # held until all is counted, so that no memory is used twice
    del o
    return sum(size for place, size in saved.items() if place not in given)


def profile(run: Callable[[], object], device: torch.device, repeats: int) -> Iterable[list[dict]]:
    """The events of a Chrome trace for each of `repeats` calls of `run`, after one to warm up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for repeat in range(repeats + 1):
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            with torch.profiler.record_function(CALL):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if repeat == 0:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            yield json.loads(path.read_text())["traceEvents"]


def breakdown(events: Iterable[dict]) -> tuple[dict[str, float], int]:
    """Milliseconds by phase and "rest", and the number of device launches, of one traced call.

    With work on a device, its time counts for the phase in which it was launched, whichever thread
    launched it; without, a phase's time is its own and the rest is what the call took beside its phases.
    """
    ranges, calls, launched_at, work = [], [], {}, []
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category == "user_annotation" and name.startswith(PREFIX):
            ranges.append((event["ts"], event["ts"] + event["dur"], name.removeprefix(PREFIX)))
        elif category == "user_annotation" and name == CALL:
            calls.append(event["dur"])
        elif category in ("cuda_runtime", "cuda_driver"):
            launched_at[event["args"].get("correlation")] = event["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append((event["args"].get("correlation"), event["dur"]))

    microseconds: dict[str, float] = defaultdict(float)
    if work:
        for correlation, duration in work:
            microseconds[_phase_at(launched_at.get(correlation), ranges)] += duration
    else:
        for start, stop, name in ranges:
            microseconds[name] += stop - start
        microseconds["rest"] = sum(calls) - sum(microseconds.values())
    microseconds["rest"] += 0.0  # it is always there
    return {name: x / 1e3 for name, x in microseconds.items()}, len(work)


def _phase_at(time: float | None, ranges: list[tuple[float, float, str]]) -> str:
    if time is None:
        return "rest"
    return next((name for start, stop, name in ranges if start <= time <= stop), "rest")


def _launches(
    point: BlockCausalTTT, backend: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Launches]:
    """Those of the forward and of the backward, through the public function."""
    inputs = point.inputs(dtype, device)
    do = output_gradient(empty_output(point, dtype, device))
    outputs: list[Tensor] = []
    forward = count_launches(lambda: outputs.append(point.run(backend, **inputs)))
    leaves = list(inputs.values())
    backward = count_launches(lambda: torch.autograd.grad(outputs[0], leaves, do))
    return {"forward": forward, "backward": backward}


def _names_per_chunk(few: Launches, many: Launches) -> dict[str, float]:
    """Names whose number grows with the length, most frequent first."""
    difference = Counter(many.kernel_names + many.op_names)
    difference.subtract(few.kernel_names + few.op_names)
    chunks = MANY_CHUNKS - FEW_CHUNKS
    return {name: n / chunks for name, n in difference.most_common() if n}


def table(row: PhaseRow) -> list[str]:
    """Lines for the screen."""
    sizes = " ".join(f"{name}={x}" for name, x in row.shape.items())
    lines = [f"{row.op}, {row.variant}, {row.dtype}, {sizes}"]
    if row.phases_ms is None:
        return [*lines, f"  {row.status}"]
    total = sum(row.phases_ms.values())
    lines += [
        f"  {name:<22} {ms:>9.3f} ms {ms / total:>5.0%}" for name, ms in row.phases_ms.items()
    ]
    where = "launched work" if row.device_launches is not None else "with the profiler"
    lines.append(f"  {'sum, ' + where:<22} {total:>9.3f} ms")
    lines.append(f"  {'without the profiler':<22} {row.p50_ms:>9.3f} ms, median of {row.repeats}")
    if row.device_launches is not None:
        lines.append(f"  device launches in all: {row.device_launches}")
    for mode in MODES if row.launches_per_chunk else ():
        for what, counts in (
            ("one chunk", row.launches_of_one_chunk[mode]),
            ("each more", row.launches_per_chunk[mode]),
        ):
            lines.append(
                f"  {mode:<8}  {what}: {counts['kernels']:g} kernels + {counts['ops']:g} ops,"
                f" {counts['syncs']:g} host waits"
            )
    lines.append(f"  saved for the backward, beside the inputs: {row.saved_bytes / 2**20:.1f} MiB")
    return lines if row.status == "ok" else [*lines, f"  {row.status}"]


if __name__ == "__main__":
    sys.exit(main())
