"""How far `window_attn` is from float64 at long lengths, forward and backward, beside its peers.

```
python -m benchmarks.accuracy_report                       # float16 and bfloat16, up to 65,536 tokens
python -m benchmarks.accuracy_report --dtype bfloat16 --seq-len 32768 --window-size 512 full
TRITON_INTERPRET=1 python -m benchmarks.accuracy_report --dtype float16 --seq-len 4096   # kernels, no GPU
```

The exact values come from `reference/` in float64, which is dense and is therefore applied to one block of
queries after another and the keys that these see, in O(T * W). "plain PyTorch" is the same in the dtype
of the inputs, the yardstick in the rule of `benchmarks/accuracy.py`: `ok` means that a result is at
most twice as wrong, plus one rounding. Rms errors are relative to the rms of the exact values, largest
errors to their largest magnitude. Inputs are standard normal,

    unit        as they are
    scale10     times 10: most of the weight is on one key
    outliers    times 30 for each channel value with a probability of 1/1000

and the backward starts from a standard normal gradient of the output. At the end come inputs on which
an output or gradient may well be infinite or NaN, and must not be.

Rows appear on the screen and are appended to `<out>/<device>-accuracy.jsonl` as they are finished. Exit
status: 0, 1 when a backend of ours is not ok, 2 for bad arguments, 130 after Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import lact_kernels
import reference
from benchmarks import peers, report
from benchmarks.accuracy import compare, rms_and_max
from benchmarks.measure import status_of
from benchmarks.registry import WindowAttn, empty_output, in_float64, output_gradient
from benchmarks.run import DTYPES, positive, settle_device, window_size
from lact_kernels.ops import checks

OP = WindowAttn.op
MODE = "fwd_bwd"
PLAIN = "plain PyTorch"
TENSORS = ("o", "lse", "dq", "dk", "dv")
HALF_DTYPES = ("float16", "bfloat16")
SEQ_LENS = (4096, 8192, 16384, 32768, 65536)
BLOCK_ROWS = 512  # queries in one application of the reference
DENSE_SEQ_LENS = {"cpu": 16384, "cuda": 32768}  # the longest for masks and scores of T x T

# The factor on standard normal values, and that on one in a thousand. With outliers of 100 times,
# products of two would leave float16 in plain PyTorch, and there would be no yardstick.
INPUTS = {"unit": (1, 1), "scale10": (10, 10), "outliers": (1, 30)}

# The window, and q and k made of standard normal ones.
EXTREMES: dict[str, tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "all scores -inf": (
        100,
        lambda q, k: (torch.full_like(q, 1e30), torch.full_like(k, -1e30)),
    ),
    "scores of 1e8": (100, lambda q, k: (1e4 * q, 1e4 * k)),
    "a single key": (1, lambda q, k: (q, k)),
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of one tensor, with their bounds: relative to the exact values' rms and largest magnitude."""

    rms: float
    plain_rms: float  # of plain PyTorch in the same dtype
    rms_bound: float
    max: float
    max_bound: float
    ok: bool


@dataclasses.dataclass
class AccuracyRow:
    """One variant at one point, on one kind of inputs."""

    op: str
    variant: str
    shape: dict
    dtype: str
    inputs: str
    status: str = "ok"  # or which tensors are not, or why there are none
    errors: dict[str, Errors] | None = None  # by TENSORS; None for extreme inputs

    @property
    def ours(self) -> bool:
        return self.variant.startswith(lact_kernels.__name__)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    rows_file = report.open_rows(options.out, device, kind="accuracy")
    if rows_file is None:
        return 2

    status = 0
    try:
        for row in itertools.chain(_accuracy(options, device), _extremes(options, device)):
            rows_file.append(row)
            print(table_line(row), flush=True)
            status |= row.ours and row.status != "ok"
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    print(f"\nrows appended to {rows_file.path}")
    return int(status)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", nargs="+", choices=HALF_DTYPES, default=list(HALF_DTYPES))
    parser.add_argument("--seq-len", nargs="+", type=positive, default=list(SEQ_LENS), metavar="T")
    parser.add_argument("--window-size", nargs="+", type=window_size, default=[1024], metavar="W")
    parser.add_argument("--heads", type=positive, default=1)
    parser.add_argument("--head-dim", nargs="+", type=positive, default=[64, 128], metavar="D")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    T, windows = min(options.seq_len), [W for W in options.window_size if W is not None]
    if windows and max(windows) > T:
        parser.error(f"--window-size {max(windows)} is beyond --seq-len {T}; say full")
    # The gradients of q and k are zero where every query sees one key, so there is nothing to compare with.
    if min([T, *windows]) < 2:
        parser.error("--seq-len and --window-size must be at least 2")
    return options


def _accuracy(options: argparse.Namespace, device: torch.device) -> Iterator[AccuracyRow]:
    """Every variant at every point, the long lengths last."""
    for T, W, D, dtype, kind in itertools.product(
        options.seq_len, options.window_size, options.head_dim, options.dtype, options.inputs
    ):
        H = options.heads
        point = WindowAttn(T=T, window_size=W, Hq=H, Hkv=H, D=D, Dv=D)
        columns = "".join(f"{name:>8}" for name in TENSORS)
        print(
            f"\n{_title(point, dtype, kind)}\n  {'rms error | largest error':<30}{columns} |{columns}",
            flush=True,
        )
        yield from compare_variants(point, DTYPES[dtype], kind, device)


def compare_variants(
    point: WindowAttn, dtype: torch.dtype, kind: str, device: torch.device
) -> Iterator[AccuracyRow]:
    """A row for plain PyTorch and for every variant, whether it ran or not."""
    inputs = make_inputs(point, dtype, kind, device)
    do = output_gradient(empty_output(point, dtype, device))
    exact = blockwise(point, in_float64(inputs), do.double())
    plain = blockwise(point, inputs, do)
    yield _row(PLAIN, point, dtype, kind, errors=_errors(plain, plain, exact))
    for variant in variants(dtype, device):
        row = _row(variant.name, point, dtype, kind)
        with failures_become_the_status_of(row):
            row.errors = _errors(evaluate(variant.build(point, MODE), inputs, do), plain, exact)
            wrong = [name for name, errors in row.errors.items() if not errors.ok]
            row.status = f"too far off: {', '.join(wrong)}" if wrong else "ok"
        yield row


def _row(variant: str, point: WindowAttn, dtype: torch.dtype, kind: str, **rest) -> AccuracyRow:
    name = str(dtype).removeprefix("torch.")
    return AccuracyRow(OP, variant, dataclasses.asdict(point), name, kind, **rest)


@contextlib.contextmanager
def failures_become_the_status_of(row: AccuracyRow) -> Iterator[None]:
    """Whatever a variant raises is told by its row; it is not the end of the report."""
    try:
        yield
    except Exception as error:
        row.status = status_of(error)


def _errors(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, Errors]:
    """Of all that there is in `actual`, by the rule of `benchmarks/accuracy.py`."""
    errors = {}
    for name, x in actual.items():
        result = compare(x, plain[name], exact[name])
        size, largest = rms_and_max(exact[name])
        errors[name] = Errors(
            rms=result.error / size,
            plain_rms=result.same_dtype_error / size,
            rms_bound=result.bound / size,
            max=result.max_error / largest,
            max_bound=result.max_bound / largest,
            ok=result.ok,
        )
    return errors


def make_inputs(
    point: WindowAttn, dtype: torch.dtype, kind: str, device: torch.device
) -> dict[str, Tensor]:
    """Leaves q, k and v: standard normal times the factors of INPUTS."""
    usual, rare = INPUTS[kind]
    generator = torch.Generator(device).manual_seed(2)
    inputs = {}
    for name, x in point.inputs(torch.float32, device).items():
        chosen = torch.rand(x.shape, generator=generator, device=device) < 1e-3
        inputs[name] = (x.detach() * torch.where(chosen, rare, usual)).to(dtype).requires_grad_()
    return inputs


def variants(dtype: torch.dtype, device: torch.device) -> list[peers.Variant]:
    """Ours on every backend that runs here, and the peers that have a backward in half precision."""
    ours = [_ours(backend) for backend in backends(dtype, device)]
    flash = [peers.VARLEN_ATTN] if device.type == "cuda" else []
    dense = functools.partial(_dense_sdpa, DENSE_SEQ_LENS[device.type])
    return [*ours, *flash, peers.Variant(peers.DENSE_SDPA.name, dense)]


def backends(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Ours; on a CPU also Triton where it is interpreted, which gets products of bfloat16 wrong."""
    names = peers.BACKENDS[OP, device.type]
    if "triton" in names or dtype == torch.bfloat16:
        return names
    return (*names, "triton") if checks.triton_runs_on(torch.empty(0, device=device)) else names


def _ours(backend: str) -> peers.Variant:
    def build(point: WindowAttn, mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return functools.partial(
            lact_kernels.window_attn,
            window_size=point.window_size,
            backend=backend,
            return_lse=True,
        )

    return peers.Variant(f"{lact_kernels.__name__} {backend}", build, ours=True)


def _dense_sdpa(longest: int, point: WindowAttn, mode: str) -> Callable[..., Tensor]:
    if point.T > longest:
        raise peers.Unavailable(f"its mask of T x T is too large beyond T = {longest}")
    return peers.DENSE_SDPA.build(point, mode)


def evaluate(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]], inputs: dict[str, Tensor], do: Tensor
) -> dict[str, Tensor]:
    """Output "o", "lse" where it comes with the output, and the gradients of the inputs, from `do`."""
    result = function(**inputs)
    o, *lse = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(o, list(inputs.values()), do)
    outputs = {name: x.detach() for name, x in zip(("o", "lse"), (o, *lse))}
    return outputs | {f"d{name}": x for name, x in zip(inputs, gradients)}


def blockwise(
    point: WindowAttn, inputs: dict[str, Tensor], do: Tensor, rows: int = BLOCK_ROWS
) -> dict[str, Tensor]:
    """The dense reference in the dtype of the inputs, for `rows` queries at a time and the keys they see.

    The reference stands the last query at the last key, so queries [a, b) take keys up to b.
    """
    q, k, v = (inputs[name].detach() for name in "qkv")
    function = functools.partial(
        reference.window_attn, window_size=point.window_size, return_lse=True
    )
    # A key's gradient has a part from each block that sees it. They are added up in float32 at least, and
    # rounded once at the end: the order of additions in half precision is not what is measured.
    dk, dv = (
        torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v)
    )
    blocks = []
    for start in range(0, point.T, rows):
        queries = slice(start, min(start + rows, point.T))
        keys = slice(max(0, start - point.swept_value + 1), queries.stop)
        views = {"q": q[:, queries], "k": k[:, keys], "v": v[:, keys]}
        leaves = {name: x.detach().requires_grad_() for name, x in views.items()}
        block = evaluate(function, leaves, do[:, queries])
        dk[:, keys] += block.pop("dk")
        dv[:, keys] += block.pop("dv")
        blocks.append(block)
    whole = {
        name: torch.cat([block[name] for block in blocks], dim=2 if name == "lse" else 1)
        for name in blocks[0]
    }
    return whole | {"dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}


def _extremes(options: argparse.Namespace, device: torch.device) -> Iterator[AccuracyRow]:
    """Whether ours stays finite where numbers are at their ends, in float32 and the dtypes asked for."""
    for kind, dtype_name in itertools.product(EXTREMES, ("float32", *options.dtype)):
        dtype, (W, change) = DTYPES[dtype_name], EXTREMES[kind]
        point = WindowAttn(T=300, window_size=W, Hq=2, Hkv=2)
        normal = point.inputs(torch.float32, device)
        normal["q"], normal["k"] = change(normal["q"], normal["k"])
        inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in normal.items()}
        if not all(x.isfinite().all() for x in inputs.values()):
            continue  # float16 ends at 65504
        print(f"\n{_title(point, dtype_name, kind)}: must be finite", flush=True)
        do = output_gradient(empty_output(point, dtype, device))
        for backend in backends(dtype, device):
            variant = _ours(backend)
            row = _row(variant.name, point, dtype, kind)
            with failures_become_the_status_of(row):
                results = evaluate(variant.build(point, MODE), inputs, do)
                # The lse is left out: where all scores are -inf, it may be that too.
                names = [name for name in results if name != "lse"]
                wrong = [name for name in names if not results[name].isfinite().all()]
                row.status = f"not finite: {', '.join(wrong)}" if wrong else "ok"
            yield row


def _title(point: WindowAttn, dtype: str, kind: str) -> str:
    W = "full" if point.window_size is None else point.window_size
    return f"{kind}, {dtype}, T={point.T} W={W} D={point.D} heads={point.Hq}"


def table_line(row: AccuracyRow) -> str:
    """Relative rms errors, then relative largest errors, in the order of TENSORS."""
    if row.errors is None:
        return f"  {row.variant:<30} {row.status}"
    rms, largest = (
        "".join(
            f"{getattr(row.errors[name], kind):>8.1e}" if name in row.errors else f"{'-':>8}"
            for name in TENSORS
        )
        for kind in ("rms", "max")
    )
    return f"  {row.variant:<30}{rms} |{largest}  {row.status}"


if __name__ == "__main__":
    sys.exit(main())
