"""Correctness first, then time and memory of the operations and of what else computes them.

```
python -m benchmarks.run                                 # this device's default sweeps
python -m benchmarks.run --op window_attn --window-sizes 512 4096 full --mode fwd_bwd
python -m benchmarks.run --op window_attn --sequences 16 # packed sequences of very different lengths
python -m benchmarks.run --op window_attn_with_kvcache   # new tokens over ever larger caches
python -m benchmarks.run --op ttt --plan views video     # orders of updates and applies that models use
python -m benchmarks.run --op ttt_apply                  # stored weights: a control step, renderings
python -m benchmarks.run --memory                        # peak memory against T, up to 65,536 tokens
python -m benchmarks.phases                              # where block_causal_ttt spends its time
```

Rows appear on the screen and are appended to `<out>/<device>.jsonl` as they are finished, so
stopping with Ctrl-C loses none of them. Exit status: 0, 1 when the gate fails or an implementation
of ours does, 2 for bad arguments, 130 after Ctrl-C.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import gate, peers, report, timing
from benchmarks.measure import Settings, measure_point
from benchmarks.plot import plot
from benchmarks.registry import (
    MODES,
    OPERATIONS,
    ORDERS,
    TTT,
    BlockCausalTTT,
    Point,
    TTTApply,
    WindowAttn,
    WindowAttnWithKVCache,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MEMORY_SIZE = 512  # window or chunk of the sweep over T
MEMORY_LENGTH = 65536  # its longest T; the others are halves of it


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Sizes that show a device in minutes."""

    dtype: str
    seq_len: int
    window_sizes: tuple[int | None, ...]
    heads: int
    head_dim: int
    cache_sizes: tuple[int, ...]
    cache_rows: int
    chunk_sizes: tuple[int, ...]
    fast_weight_dims: tuple[int, ...]
    small_plans: bool
    applied_tokens: tuple[int, ...]
    rounds: int


DEFAULTS = {
    "cpu": Defaults(
        dtype="float32",
        seq_len=8192,
        window_sizes=(64, 128, 256, 512, 1024, 2048, 4096),
        heads=4,
        head_dim=64,
        cache_sizes=(4096, 8192, 16384, 32768, 65536),
        cache_rows=4,
        chunk_sizes=(256, 512, 1024, 2048, 4096),
        fast_weight_dims=(192,),
        small_plans=True,
        applied_tokens=(1, 1024, 8192),
        rounds=7,
    ),
    "cuda": Defaults(
        dtype="bfloat16",
        seq_len=32768,
        window_sizes=(512, 1024, 2048, 4096, 8192, 16384, None),
        heads=16,
        head_dim=128,
        cache_sizes=(4096, 8192, 16384, 32768, 65536),
        cache_rows=16,
        chunk_sizes=(1024, 2048, 4096),
        fast_weight_dims=(384, 768),
        small_plans=False,
        applied_tokens=(1, 1024, 65536),
        rounds=20,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype]
    sweeps = _sweeps(options)
    rows_file = report.open_rows(options.out, device, options.dtype)
    if rows_file is None:
        return 2

    rows: list[report.Row] = []
    try:
        if not _gates_pass(sweeps, dtype, device):
            print("the correctness gate failed, so nothing was timed", file=sys.stderr)
            return 1
        for row in _measure(
            sweeps, options, Settings(dtype, device, options.repeats, options.seconds)
        ):
            rows_file.append(row)
            rows.append(row)
            print(report.table_line(row), flush=True)
        status = int(any(row.ours and row.status != "ok" for row in rows))
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    _print_memory_growth(rows)
    print(f"{len(rows)} rows appended to {rows_file.path}")
    for op in dict.fromkeys(row.op for row in rows):
        path = rows_file.path.with_name(f"{rows_file.path.stem}-{op}.png")
        plot([row for row in rows if row.op == op], rows_file.environment["device"], path)
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options with every default filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seq-len", type=positive, metavar="T")
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="B",
        help="rows of tokens, of everything but caches",
    )
    parser.add_argument("--window-sizes", nargs="+", type=window_size, metavar="W")
    parser.add_argument(
        "--sequences",
        type=positive,
        default=1,
        metavar="N",
        help="the T tokens of window_attn are N packed sequences, log-uniform in length and seeded",
    )
    parser.add_argument("--heads", type=positive, help="query heads of attention")
    parser.add_argument("--kv-heads", type=positive, help="key/value heads; must divide --heads")
    parser.add_argument("--head-dim", type=positive)
    parser.add_argument(
        "--cache-sizes",
        nargs="+",
        type=positive,
        metavar="S",
        help="slots of the caches of window_attn_with_kvcache, all of them full",
    )
    parser.add_argument("--cache-window", type=window_size, default=1024, metavar="W")
    parser.add_argument("--cache-rows", type=positive, metavar="B")
    parser.add_argument(
        "--queries", type=positive, default=1, metavar="TQ", help="new tokens of each row"
    )
    parser.add_argument("--chunk-sizes", nargs="+", type=positive, metavar="C")
    parser.add_argument(
        "--fast-weight-heads",
        type=positive,
        metavar="H",
        help="default: 4 of block_causal_ttt; of a plan and of ttt_apply as many as the model has",
    )
    parser.add_argument(
        "--fast-weight-dims",
        nargs="+",
        type=positive,
        metavar="D",
        help="of block_causal_ttt, each for Dk = Dv = Dh",
    )
    parser.add_argument("--muon", action="store_true", help="block_causal_ttt with Muon")
    parser.add_argument("--momentum", action="store_true", help="block_causal_ttt with momentum")
    parser.add_argument("--prenorm", action="store_true", help="block_causal_ttt with pre-norm")
    parser.add_argument(
        "--plan",
        nargs="+",
        choices=ORDERS,
        default=list(ORDERS),
        help="of ttt, with the options and sizes of a model; an eighth of the sizes on a CPU",
    )
    parser.add_argument(
        "--pieces", nargs="+", type=positive, metavar="N", help="views, frames or chunks of a plan"
    )
    parser.add_argument("--piece-len", type=positive, metavar="T", help="tokens of each of these")
    parser.add_argument("--only-w1", action="store_true", help="ttt that trains w1 alone")
    parser.add_argument(
        "--applied-tokens",
        nargs="+",
        type=positive,
        metavar="TQ",
        help="of ttt_apply: 1 is a control step, many are a rendering",
    )
    parser.add_argument("--repeats", type=positive, metavar="N", help="turns that variants take")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help=f"per point; fewer turns, but {timing.MIN_ROUNDS}, where they would take longer",
    )
    parser.add_argument("--no-peers", action="store_true", help="only our own backends")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="only these peers, by the names in the table"
    )
    parser.add_argument(
        "--lact-checkout",
        default=os.environ.get("LACT_CHECKOUT"),
        metavar="PATH",
        help="the LaCT authors' repository, to measure their functions; default: $LACT_CHECKOUT",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="sweep T instead, ours only, at one window and chunk size; of window_attn and"
        " block_causal_ttt",
    )
    parser.add_argument("--out", type=Path, default=Path(report.RESULTS), metavar="DIR")
    options = parser.parse_args(arguments)

    settle_device(parser, options)
    if BlockCausalTTT.op not in options.op:
        for flag in ("muon", "momentum", "prenorm"):
            if getattr(options, flag):
                parser.error(f"--{flag} is of {BlockCausalTTT.op} alone")
    defaults = DEFAULTS[options.device]
    options.dtype = options.dtype or defaults.dtype
    options.seq_len = options.seq_len or (MEMORY_LENGTH if options.memory else defaults.seq_len)
    T = options.seq_len
    if any(W is not None and W > T for W in options.window_sizes or ()):
        parser.error(
            f"--window-sizes {max(options.window_sizes)} is beyond --seq-len {T}; say full"
        )
    if options.memory:
        asked = " and ".join(options.op)
        options.op = [op for op in options.op if op in (WindowAttn.op, BlockCausalTTT.op)]
        if not options.op:
            parser.error(f"there is no sweep over T of {asked}")
        options.window_sizes = options.window_sizes or [min(MEMORY_SIZE, T)]
        options.chunk_sizes = options.chunk_sizes or [MEMORY_SIZE]
    options.window_sizes = options.window_sizes or [
        W for W in defaults.window_sizes if W is None or W <= T
    ]
    options.heads = options.heads or defaults.heads
    options.kv_heads = options.kv_heads or options.heads
    options.head_dim = options.head_dim or defaults.head_dim
    options.cache_sizes = options.cache_sizes or list(defaults.cache_sizes)
    options.cache_rows = options.cache_rows or defaults.cache_rows
    options.chunk_sizes = options.chunk_sizes or list(defaults.chunk_sizes)
    options.fast_weight_dims = options.fast_weight_dims or list(defaults.fast_weight_dims)
    options.small_plans = defaults.small_plans
    options.applied_tokens = options.applied_tokens or list(defaults.applied_tokens)
    options.repeats = options.repeats or defaults.rounds
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}")
    if options.batch > 1 and options.sequences > 1:
        parser.error(f"--sequences {options.sequences} are one row: --batch {options.batch}")
    if options.queries > min(options.cache_sizes):
        parser.error(
            f"--queries {options.queries} are more than --cache-sizes {min(options.cache_sizes)}"
        )
    asked = " and ".join(options.op)
    options.op = [op for op in options.op if set(OPERATIONS[op].modes) & set(options.mode)]
    if not options.op:
        parser.error(f"there is no backward of {asked}")
    _check_peers(parser, options)
    return options


def _check_peers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Peers that are asked for by name are peers of an operation that is measured."""
    if options.peers is None:
        return
    if options.no_peers or options.memory:
        parser.error("--peers cannot be combined with --no-peers or --memory")
    device = torch.device(options.device)
    known = [x.name for op in options.op for x in peers.variants(op, device) if not x.ours]
    for name in options.peers:
        if name not in known:
            parser.error(f"--peers {name!r} is none of {', '.join(map(repr, known))}")


def settle_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What "auto" stands for here; a device that is not here is an error."""
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def window_size(text: str) -> int | None:
    return None if text == "full" else positive(text)


def _sweeps(options: argparse.Namespace) -> list[tuple[str, list[Point]]]:
    """The swept variable and its points, one sweep per operation and fast-weight dimension."""
    sweeps: list[tuple[str, list[Point]]] = []
    T = options.seq_len
    heads = {"Hq": options.heads, "Hkv": options.kv_heads, "D": options.head_dim}
    if WindowAttn.op in options.op:
        sizes = {"T": T, "B": options.batch, "Dv": options.head_dim, "sequences": options.sequences}
        points = [WindowAttn(window_size=W, **heads, **sizes) for W in options.window_sizes]
        sweeps += _sweep(points, options.memory)
    if WindowAttnWithKVCache.op in options.op:
        sizes = {"window_size": options.cache_window, "B": options.cache_rows}
        sizes["Tq"] = options.queries
        points = [WindowAttnWithKVCache(S=S, **heads, **sizes) for S in options.cache_sizes]
        sweeps += _sweep(points, memory=False)
    if BlockCausalTTT.op in options.op:
        flags = {name: getattr(options, name) for name in ("muon", "momentum", "prenorm")}
        for D in options.fast_weight_dims:
            dims = {"B": options.batch, "H": options.fast_weight_heads or 4}
            dims |= {"Dk": D, "Dv": D, "Dh": D}
            points = [
                BlockCausalTTT(T=T, chunk_size=C, **dims, **flags) for C in options.chunk_sizes
            ]
            sweeps += _sweep(points, options.memory)
    if TTT.op in options.op:
        sweeps += [_sweep_of_plan(plan, options) for plan in options.plan]
    if TTTApply.op in options.op:
        like = TTT.of("views", options.small_plans)  # whose trained weights render new views
        dims = {"B": options.batch, "H": options.fast_weight_heads or like.H}
        dims |= {"Dk": like.Dk, "Dv": like.Dv, "Dh": like.Dh}
        points = [TTTApply(Tq=Tq, **dims) for Tq in options.applied_tokens]
        sweeps += _sweep(points, memory=False)
    return sweeps


def _sweep_of_plan(plan: str, options: argparse.Namespace) -> tuple[str, list[Point]]:
    changes = {"piece": options.piece_len, "H": options.fast_weight_heads}
    changes = {name: x for name, x in changes.items() if x}
    changes |= {"B": options.batch, "only_w1": options.only_w1}
    point = TTT.of(plan, options.small_plans, **changes)
    numbers = options.pieces or [point.pieces]
    return TTT.swept, [dataclasses.replace(point, pieces=n) for n in numbers]


def _sweep(points: list[Point], memory: bool) -> list[tuple[str, list[Point]]]:
    """One sweep over the points as they are, or for each of them one over T: a sixteenth to all."""
    if not memory:
        return [(points[0].swept, points)]
    lengths = [max(points[0].T >> shift, 1) for shift in (4, 3, 2, 1, 0)]
    return [("T", [dataclasses.replace(point, T=T) for T in lengths]) for point in points]


def _variants(point: Point, options: argparse.Namespace) -> list[peers.Variant]:
    variants = peers.variants(point.op, torch.device(options.device), options.lact_checkout)
    if options.peers is not None:
        return [x for x in variants if x.ours or x.name in options.peers]
    return [x for x in variants if x.ours or not (options.no_peers or options.memory)]


def _gates_pass(sweeps, dtype: torch.dtype, device: torch.device) -> bool:
    results = [
        gate.passes(points, peers.BACKENDS[points[0].op, device.type], dtype, device)
        for _, points in sweeps
    ]
    return all(results)


def _measure(sweeps, options: argparse.Namespace, settings: Settings) -> Iterator[report.Row]:
    for swept, points in sweeps:
        _print_title(points[0], swept)
        for mode in options.mode:
            for point in points if mode in points[0].modes else ():
                yield from measure_point(point, mode, swept, _variants(point, options), settings)


def _print_memory_growth(rows: list[report.Row]) -> None:
    """What doubling T did to the peak memory, at the longest two lengths of each sweep over T."""
    rows = [row for row in rows if row.swept == "T" and row.peak_memory_bytes]
    for shorter, longer in zip(rows, rows[1:]):
        same = (shorter.op, shorter.mode) == (longer.op, longer.mode)
        if same and longer.place == 2 * shorter.place:
            growth = longer.peak_memory_bytes / shorter.peak_memory_bytes
            print(
                f"{longer.op} {longer.mode}: T {shorter.place} -> {longer.place}"
                f" multiplies peak memory by {growth:.2f}"
            )


def _print_title(point: Point, swept: str) -> None:
    fixed = (f"{name}={x}" for name, x in dataclasses.asdict(point).items() if name != swept)
    print(f"\n{point.op} against {swept}, {' '.join(fixed)}\n{report.HEADER}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
