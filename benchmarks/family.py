"""The LaCT family's functions (views, video, 3D) beside the plain ones that they replace, eager and compiled.

```
python -m benchmarks.family                              # every case; about six minutes on two CPU cores
python -m benchmarks.family --case views video --mode fwd_bwd
python -m benchmarks.family --no-compile --lact-checkout PATH
```

Cases are calls as models make them (`benchmarks/family_cases.py`): LaCT's novel views (an update on n tokens,
an apply to 2 n) and their rendering (apply alone); its video with one pass and with two; its bidirectional
function; ZipMap's frames (an update and an apply each); LoGeR's windows (momentum behind Newton-Schulz); the
whole causal layer of LaCT's minimal implementation. A GPU takes the sizes of the models. A CPU takes an
eighth of their widths and of the tokens of a piece, and fewer pieces.

Variants: ours (`lact_kernels.compat.lact`; `lact_kernels.ttt` for LoGeR), the plain function, the same under
`torch.compile`, and the authors' own where there is a checkout and what it imports is installed. 16-bit
dtypes are those of an autocast.

Correctness first: every result (outputs, in mode "fwd_bwd" gradients, too) is held against the plain function
in float64, at full size, before it is timed. Ours has to meet the rule of `benchmarks/accuracy.py`, in which
plain PyTorch is the plain function with Newton-Schulz in float32. The others iterate it in bfloat16 as
published, so they are only held to compute the same function. The column `error` is that of the worst tensor.

Times are medians of calls in turns, memory is the peak of one call (see `benchmarks/timing.py`), and ratios
refer to the plain function in the same run. The first call is a column of its own: for the compiled function
it has the compiling, from an empty cache.

Rows appear on the screen and are appended to `<out>/<device>-family.jsonl` as they are finished. Exit status:
0, 1 when ours fails or is wrong, 2 for bad arguments, 130 after Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.accuracy import compare_all
from benchmarks.family_cases import CASES, Call
from benchmarks.measure import DIFFERENCE_LIMITS, Settings, difference_of, measure_point, runner
from benchmarks.peers import Variant
from benchmarks.registry import MODES, empty_output, in_float64, output_gradient
from benchmarks.run import DEFAULTS, DTYPES, positive, settle_device

BACKENDS = {"cpu": "eager", "cuda": "triton"}
PARTS = {"cpu": 8, "cuda": 1}  # of the models' sizes
PLAIN, COMPILED = "plain function", "compiled plain function"
# Newton-Schulz in bfloat16 makes errors of 2 to 20%; the same steps in another order are 90% away.
MUON_ERROR_LIMIT = 0.5


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rows_file = report.open_rows(options.out, device, options.dtype, kind="family")
    if rows_file is None:
        return 2

    settings = Settings(dtype, device, options.repeats, options.seconds)
    rows: list[report.Row] = []
    # Our bidirectional function says that theirs, with Muon, is another one: nobody compares the two here.
    warnings.filterwarnings("ignore", "use_muon")
    try:
        with empty_compile_cache(device) if options.compile else contextlib.nullcontext():
            for row in measure(options, settings):
                rows_file.append(row)
                rows.append(row)
                print(report.table_line(row), flush=True)
        status = int(any(row.ours and row.status != "ok" for row in rows))
    except torch.OutOfMemoryError as error:  # in none of the variants, whose rows would say so
        print(f"stopped: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    print("\n".join(summary(rows)))
    print(f"{len(rows)} rows appended to {rows_file.path}")
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in for the device, and the `calls` that they make."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--part",
        type=positive,
        metavar="N",
        help="the Nth part of the models' widths and tokens; default: 8 on a CPU, 1 on a GPU",
    )
    parser.add_argument(
        "--pieces", type=positive, metavar="N", help="views, frames, chunks or windows of each case"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without torch.compile"
    )
    parser.add_argument("--repeats", type=positive, metavar="N", help="turns that variants take")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case and mode")
    parser.add_argument(
        "--lact-checkout",
        default=os.environ.get("LACT_CHECKOUT"),
        metavar="PATH",
        help="the LaCT authors' repository, to measure their functions; default: $LACT_CHECKOUT",
    )
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    options.dtype = options.dtype or DEFAULTS[options.device].dtype
    options.repeats = options.repeats or DEFAULTS[options.device].rounds
    part = options.part or PARTS[options.device]
    options.calls = [CASES[case].of(case, part, options.pieces) for case in options.case]
    for call in options.calls:
        if 0 in dataclasses.astuple(call):
            parser.error(f"--part {part} leaves nothing of {call.op}")
    if not any(mode in call.modes for mode in options.mode for call in options.calls):
        parser.error(f"there is no backward of {' and '.join(options.case)}")
    return options


def measure(options: argparse.Namespace, settings: Settings) -> Iterator[report.Row]:
    compared = variants(settings, options.compile, options.lact_checkout)
    for call in options.calls:
        print(f"\n{_title(call)}\n{report.HEADER}", flush=True)
        for mode in (mode for mode in options.mode if mode in call.modes):
            judge = partial(judged, *truth(call, mode, settings))
            yield from measure_point(call, mode, call.swept, compared, settings, judge)


def variants(settings: Settings, with_compile: bool, lact_checkout: str | None) -> list[Variant]:
    """Ours, then the plain function, which ratios refer to, and what else computes the same."""
    backend = BACKENDS[settings.device.type]

    def variant(name: str, function_of: Callable[[Call], Callable], ours: bool = False) -> Variant:
        def build(call: Call, mode: str) -> Callable[..., Tensor]:
            return _with_autocast(call, function_of(call), settings)

        return Variant(name, build, ours)

    found = [
        variant(f"lact_kernels {backend}", lambda call: call.ours(backend), ours=True),
        variant(PLAIN, lambda call: call.plain()),
        variant(COMPILED, lambda call: torch.compile(call.plain(), dynamic=False)),
        variant("LaCT authors' function", lambda call: call.theirs(lact_checkout)),
    ]
    return [x for x in found if with_compile or x.name != COMPILED]


def _with_autocast(call: Call, function: Callable, settings: Settings) -> Callable[..., Tensor]:
    """The call in the autocast of a 16-bit dtype, as models make it: fast weights are float32."""
    autocast = {"dtype": settings.dtype, "enabled": settings.dtype.itemsize == 2}

    def run(**inputs: Tensor) -> Tensor:
        with torch.autocast(settings.device.type, **autocast):
            return call.call(function, **inputs)

    return run


Results = dict[str, Tensor]


def truth(call: Call, mode: str, settings: Settings) -> tuple[Results, Results, float]:
    """The exact results, those of plain PyTorch in the dtype of the run, and the limit of others' errors."""
    inputs = call.inputs(settings.dtype, settings.device)
    do = output_gradient(empty_output(call, settings.dtype, settings.device))
    exact = partial(call.call, call.plain(torch.float64))
    plain = _with_autocast(call, call.plain(torch.float32), settings)
    limit = MUON_ERROR_LIMIT if call.muon else DIFFERENCE_LIMITS[settings.dtype]
    return runner(exact, in_float64(inputs), do, mode)(), runner(plain, inputs, do, mode)(), limit


def judged(
    exact: Results, plain: Results, limit: float, row: report.Row, result: Results
) -> str | None:
    """What is wrong with a result, whose error goes into its row; a line says how its first call went."""
    row.error = difference_of(result, exact)
    print(
        f"{'':>7} {row.mode:<7} {row.variant:<30} first call {row.first_call_s:.2f} s,"
        f" error {row.error:.1e}",
        flush=True,
    )
    if not row.ours:
        return None if row.error <= limit else f"its error is {row.error:.1%}"  # False for NaN
    failed = [name for name, x in compare_all(result, plain, exact).items() if not x.ok]
    return f"less accurate than plain PyTorch in {', '.join(failed)}" if failed else None


@contextlib.contextmanager
def empty_compile_cache(device: torch.device) -> Iterator[None]:
    """What torch.compile has kept on the disk is not there, so that a first call compiles.

    What is compiled once for all functions, such as headers of C++, is compiled beforehand.
    """
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
            with contextlib.suppress(Exception):  # if no compiler is here, rows will say so
                torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
            yield


def summary(rows: list[report.Row]) -> Iterator[str]:
    """A line for each case, mode and variant that was timed."""
    yield (
        f"\n{'case':<14} {'mode':<8} {'variant':<24} {'p50 ms':>9} {'x plain':>8} {'peak MiB':>9}"
        f" {'first s':>8} {'error':>8}"
    )
    for row in rows:
        if row.status == "ok":
            ratio = f"{row.ratio_to_baseline:.2f}" if row.ratio_to_baseline else "-"
            known = row.peak_memory_bytes is not None
            mebibytes = f"{row.peak_memory_bytes / 2**20:.1f}" if known else "-"
            yield (
                f"{row.op:<14} {row.mode:<8} {row.variant:<24} {report.significant(row.p50_ms, 9)}"
                f" {ratio:>8} {mebibytes:>9} {row.first_call_s:>8.2f} {row.error:>8.0e}"
            )


def _title(call: Call) -> str:
    sizes = dataclasses.asdict(call)
    return " ".join([f"{sizes.pop('op')},", *(f"{name}={x}" for name, x in sizes.items())])


if __name__ == "__main__":
    sys.exit(main())
