"""`silu_l2norm_rope` and `rms_norm_scale_add`, beside plain PyTorch and torch.compile of it.

```
python -m benchmarks.branches                                    # this device's default size
python -m benchmarks.branches --op rms_norm_scale_add --seq-len 8192 --no-compile
```

Both run with all their options on: forward alone, without autograd, and with the gradients of everything
that has one. q, k and v are one tensor `[B, T, 3C]` as in the layer, and so is their gradient.

Memory bounds them, so their rate is that of needed bytes: what a perfect kernel reads and writes, each
tensor once. With n bytes in `[B, T, C]`, and in brackets what is small beside it:

    silu_l2norm_rope    forward    8 n  q, k, v; five outputs                  (p)
                        backward  12 n  six gradients, q, k, v; dq, dk, dv     (p; dqk_scale, dqk_offset)
    rms_norm_scale_add  forward    3 n  attn, ttt; the output                  (p)
                        backward   3 n  dout, which also is dattn, ttt; dttt   (p; dnorm_weight, dscale)

where p is cos, sin, qk_scale and qk_offset, or norm_weight and scale. The attention's v is a sixth output,
a part of qkv, which needs no bytes. The yardstick is the rate at which a large tensor is copied, in turn with
the variants: bytes read and written. "x base" is the time of ours over that of the row: less than 1 is
slower than ours.

Correctness first: outputs and gradients of a few tokens are held against float64 by the rule of
`benchmarks/accuracy.py`. At full length, what differs from ours is not timed.

Rows appear on the screen and are appended to `<out>/<device>-branches.jsonl` as they are finished. Exit
status: 0, 1 when the gate fails or ours does, 2 for bad arguments, 130 after Ctrl-C.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report, timing
from benchmarks.accuracy import COMPARISON_HEADER, compare_all, comparison_line
from benchmarks.measure import DIFFERENCE_LIMITS, Settings, difference_of, status_of
from benchmarks.registry import MODES, in_float64, output_gradient
from benchmarks.run import DEFAULTS, DTYPES, positive, settle_device
from lact_kernels.layers.rotary import rotary_tables

OPS = ("silu_l2norm_rope", "rms_norm_scale_add")
BACKENDS = {"cpu": "eager", "cuda": "triton"}
# C channels in Hq heads of the attention, and in Hf of the fast weights.
SIZES = {
    "cpu": {"B": 1, "T": 4096, "C": 768, "Hq": 12, "Hf": 4},
    "cuda": {"B": 1, "T": 32768, "C": 1536, "Hq": 24, "Hf": 4},
}
COPY, COPY_BYTES = "copy", {"cpu": 2**27, "cuda": 2**30}
GATE_TOKENS = 257


@dataclasses.dataclass
class BranchRow(report.Row):
    """One variant in one mode. The baseline is ours."""

    needed_bytes: int | None = None
    copy_gb_per_s: float | None = None  # of a large copy, timed in turn with this row


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rows_file = report.open_rows(options.out, device, options.dtype, kind="branches")
    if rows_file is None:
        return 2

    settings = Settings(dtype, device, options.repeats, options.seconds)
    rows: list[BranchRow] = []
    try:
        if not all([gate_passes(op, options.shape, dtype, device) for op in options.op]):
            print("the correctness gate failed, so nothing was timed", file=sys.stderr)
            return 1
        for op in options.op:
            print(f"\n{_title(op, options.shape)}\n{report.HEADER}", flush=True)
            for mode in MODES:
                measured = measure(op, options.shape, mode, settings, not options.no_compile)
                for row in measured:
                    rows_file.append(row)
                    rows.append(row)
                    print(report.table_line(row), flush=True)
                if measured[-1].copy_gb_per_s:
                    print(f"{'':>7} {mode:<7} a copy: {measured[-1].copy_gb_per_s:.1f} GB/s")
        status = int(any(row.ours and row.status != "ok" for row in rows))
    except torch.OutOfMemoryError as error:  # in none of the variants, whose rows would say so
        print(f"stopped: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    print(f"\n{len(rows)} rows appended to {rows_file.path}")
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in for the device, and the `shape` that they make."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.branches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seq-len", type=positive, metavar="T")
    parser.add_argument("--hidden-size", type=positive, metavar="C")
    parser.add_argument("--heads", type=positive, help="of the attention")
    parser.add_argument("--fast-weight-heads", type=positive)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--repeats", type=positive, metavar="N", help="turns that variants take")
    parser.add_argument("--seconds", type=float, default=20.0, help="per operation and mode")
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    options.dtype = options.dtype or DEFAULTS[options.device].dtype
    options.repeats = options.repeats or DEFAULTS[options.device].rounds
    given = (1, options.seq_len, options.hidden_size, options.heads, options.fast_weight_heads)
    options.shape = {
        name: x or default for x, (name, default) in zip(given, SIZES[options.device].items())
    }
    _, _, C, Hq, Hf = options.shape.values()
    for name, heads in (("--heads", Hq), ("--fast-weight-heads", Hf)):
        if C % heads:
            parser.error(f"{name} {heads} does not divide --hidden-size {C}")
    if C // Hq % 2:
        parser.error(f"heads must have an even number of channels, got {C // Hq}")
    return options


def function(package: str, op: str) -> Callable:
    """The operation, or its reference: the function of the file that has its name."""
    return getattr(importlib.import_module(f"{package}.{op}"), op)


def make_inputs(
    op: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], list[Tensor], dict]:
    """Leaves and angles that the op takes, gradients of its outputs, and its options."""
    B, T, C, Hq, Hf = shape.values()
    attn, fast = (B, T, Hq, C // Hq), (B, T, Hf, C // Hf)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if op == "silu_l2norm_rope":
        leaves = {"qkv": normal(B, T, 3 * C)}
        leaves |= {"qk_scale": normal(C, 2), "qk_offset": normal(C, 2)}
        positions = torch.arange(T, device=device)[None]
        angles = zip(("cos", "sin"), rotary_tables(positions, C // Hq, 5e5, torch.float32))
        outputs = [attn] * 3 + [fast] * 3
        options = dict.fromkeys(("silu", "silu_v", "rotate_fast"), True)
        options |= {"num_attn_heads": Hq, "num_lact_heads": Hf}
    else:
        leaves = {"attn": normal(*attn), "ttt": normal(*fast)}
        leaves |= {"norm_weight": normal(C // Hf), "scale": normal(B, T, Hf)}
        angles, outputs, options = (), [(B, T, C)], {"eps": 1e-5}
    inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    empty = (torch.empty(shape, dtype=dtype, device=device) for shape in outputs)
    gradients = [output_gradient(x, seed) for seed, x in enumerate(empty, start=1)]
    return inputs | dict(angles), gradients, options


def evaluate(
    function: Callable, inputs: dict[str, Tensor], douts: list[Tensor], mode: str
) -> dict[str, Tensor]:
    """Outputs by number, and in mode "fwd_bwd" the gradient "dx" of every leaf x."""
    with torch.set_grad_enabled(mode == "fwd_bwd"):
        outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    leaves = {f"d{name}": x for name, x in inputs.items() if x.requires_grad}
    if mode == "fwd_bwd":
        douts = [dout.to(x.dtype) for dout, x in zip(douts, outputs, strict=True)]
        results |= zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), douts))
    return results


def needed_bytes(inputs: dict[str, Tensor], douts: list[Tensor], mode: str) -> int:
    """The formula at the top. An output is as large as its gradient, and an input as its own."""

    def total(tensors: Iterable[Tensor]) -> int:
        return sum(x.numel() * x.itemsize for x in tensors)

    written = douts[:2] + douts[3:] if "qkv" in inputs else douts  # but for the attention's v
    forward = total([*inputs.values(), *written])
    read = [x for name, x in inputs.items() if name != "attn"]  # dattn is the output's gradient
    backward = total([*douts, *read, *(x for x in read if x.requires_grad)])
    return forward + (backward if mode == "fwd_bwd" else 0)


def gate_passes(op: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ours is right on a few tokens of the same width; print a line, and a table where not."""
    shape = shape | {"T": GATE_TOKENS}
    label = f"gate  {_title(op, shape)}"
    inputs, douts, options = make_inputs(op, shape, dtype, device)
    plain = partial(function("reference", op), **options)
    ours = partial(function("lact_kernels.ops", op), **options, backend=BACKENDS[device.type])
    cases = ((ours, inputs), (plain, inputs), (plain, in_float64(inputs)))
    try:
        comparisons = compare_all(*(evaluate(f, x, douts, "fwd_bwd") for f, x in cases))
    except Exception as error:  # whatever it raises, it is a failure to report, not to hide
        print(f"{label}  CRASHED: {type(error).__name__}: {error}", flush=True)
        return False
    failed = [name for name, comparison in comparisons.items() if not comparison.ok]
    print(f"{label}  {'FAILED: ' + ', '.join(failed) if failed else 'ok'}", flush=True)
    if failed:
        lines = [comparison_line(name, x) for name, x in comparisons.items()]
        print("\n".join([COMPARISON_HEADER, *lines]), flush=True)
    return not failed


def measure(
    op: str, shape: dict[str, int], mode: str, settings: Settings, with_compile: bool
) -> list[BranchRow]:
    """A row for every variant, whether it ran or not; ours is the first."""
    torch.compiler.reset()
    dtype, device = settings.dtype, settings.device
    inputs, douts, options = make_inputs(op, shape, dtype, device)
    plain, backend = partial(function("reference", op), **options), BACKENDS[device.type]
    ours = f"lact_kernels {backend}"
    variants = {
        ours: partial(function("lact_kernels.ops", op), **options, backend=backend),
        "plain PyTorch": plain,
    }
    if with_compile:
        variants["torch.compile"] = torch.compile(plain, dynamic=False)

    rows: dict[str, BranchRow] = {}
    runs: dict[str, Callable[[], object]] = {}
    expected: dict[str, Tensor] = {}
    needed, dtype_name = needed_bytes(inputs, douts, mode), str(dtype).removeprefix("torch.")
    for name, variant in variants.items():
        row = rows[name] = BranchRow(op, name, "T", shape, dtype_name, mode, needed_bytes=needed)
        run = partial(evaluate, variant, inputs, douts, mode)
        try:
            result = run()
            if row.ours:
                expected = result
            elif expected:
                row.difference = difference_of(result, expected)
            del result
            row.peak_memory_bytes = timing.peak_memory(run, device)
        except Exception as error:  # a variant that breaks is a row, not the end of the run
            row.status = status_of(error)
        else:
            # False for NaN; None is ours, or without ours.
            if row.difference is None or row.difference <= DIFFERENCE_LIMITS[dtype]:
                runs[name] = run
            else:
                row.status = f"not timed: differs from ours by {row.difference:.1%}"
    del expected

    source, target = torch.ones(2, COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    runs[COPY] = partial(target.copy_, source)
    milliseconds = timing.interleaved(runs, device, settings.rounds, settings.seconds)
    copy_ms = timing.percentiles(milliseconds.pop(COPY))[1]
    for name, times in milliseconds.items():
        row, row.rounds = rows[name], len(times)
        row.p20_ms, row.p50_ms, row.p80_ms = timing.percentiles(times)
        row.needed_gb_per_s = needed / row.p50_ms / 1e6
        row.copy_gb_per_s = 2 * source.numel() / copy_ms / 1e6
        if ours in milliseconds:
            row.baseline, row.ratio_to_baseline = ours, rows[ours].p50_ms / row.p50_ms
    return list(rows.values())


def _title(op: str, shape: dict[str, int]) -> str:
    return " ".join([f"{op},", *(f"{name}={x}" for name, x in shape.items())])


if __name__ == "__main__":
    sys.exit(main())
