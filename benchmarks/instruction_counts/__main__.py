"""Warp-instructions, bytes and FLOPs that each kernel executes, and bounds on time from that. Needs no GPU.

```
python -m benchmarks.instruction_counts                                  # everything, minutes
python -m benchmarks.instruction_counts --arch 90 --op window_attn --json counts.jsonl
python -m benchmarks.instruction_counts --attention 128 8192 4096        # of D, T and W; may be repeated
python -m benchmarks.instruction_counts --fast-weights 128 1536 512      # of D, T and chunk size, likewise
```

Whole launches run in the PTX emulator, on one head of real size (`points.py`). Each pass prints a table with
a row for each kernel and their total, and below it what the mathematics needs. The columns: warp-instructions
of PTX by unit, in thousands (memory: loads, stores and asynchronous copies of global memory; rest: barriers
and jumps); wavefronts of shared memory over the least that carry as much; MB of global memory as threads
request them, as sectors of 32 bytes for each access of a warp, and with each sector once a launch; MFLOP of
matrix instructions. What torch launches besides (copies, norms, products of its libraries) is in no row;
the lines below the table have its FLOPs, and its bytes as if nothing were fused: the inputs of each operation
and its results. There, too, is what is kept for the backward besides the inputs.

Then two bounds in microseconds, computed from the counts and the rates in `rates.py`: nobody has taken the
time of anything. "overlap" assumes that all units of a multiprocessor work at once, so that the slowest one,
which is named, decides; "serial" that only one works at a time. Both assume that all multiprocessors are
equally busy, which one head does not make them, that memory moves each sector once a launch, and no latency.
And machine code has not the instructions of PTX, one for one: compare bounds with each other.

Beside `window_attn` run FlexAttention, and flash-linear-attention where it can be imported; beside
`block_causal_ttt` the LaCT authors' kernels with a checkout of theirs. What they compute has to be what ours
do. Of the configurations that a kernel is tuned among, each launch takes the largest tile that fits into
shared memory and spills no registers; lines below the table say which. Exit status: 0, 1 when a kernel of
ours fails, 2 for bad arguments or where Triton interprets kernels, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.instruction_counts.counting import CountRow
    from benchmarks.instruction_counts.points import Work

ARCHS = (80, 90)
# Columns of the table: their names, and the units of ptx_emulator/counts.py in them.
COLUMNS = {
    "matrix": ("matrix",),
    "fp32": ("fp32",),
    "integer": ("integer",),
    "special": ("special",),
    "shared": ("shared_load", "shared_store"),
    "memory": ("global_load", "global_store", "async_copy"),
    "shuffle": ("shuffle",),
    "rest": ("barrier", "control"),
}
HEADER = (
    f"{'kernel':<42} {'launches':>8} {'programs':>8} {'warps':>6}"
    + "".join(f" {name:>8}" for name in COLUMNS)
    + f" {'all':>8} {'banks':>5} {'MB':>7} {'sectors':>7} {'once':>7} {'MFLOP':>7}"
    + f" {'overlap':>8} {'':<10} {'serial':>8}"
)
NOTICE = (
    "Bounds computed from counts in an emulator, not times: as if all multiprocessors were equally busy,"
    " with no latency."
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "TRITON_INTERPRET is set: there is no compiled code to count in this process. Run"
            " `python -m benchmarks.instruction_counts` in a fresh process without it",
            file=sys.stderr,
        )
        return 2
    if options.json:
        options.json.write_text("")
    print(NOTICE, flush=True)
    started, status = time.perf_counter(), 0
    try:
        for arch in options.arch:
            for work in _works(options):
                status |= not _run(work, arch, options.lact_checkout, options.json)
    except KeyboardInterrupt:
        print("\nstopped; the rows above are kept", file=sys.stderr)
        status = 130
    print(f"\nemulated in {time.perf_counter() - started:.0f} s, which says nothing of a GPU")
    return int(status)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instruction_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = (
        "window_attn",
        "window_attn_with_kvcache",
        "block_causal_ttt",
        "silu_l2norm_rope",
        "rms_norm_scale_add",
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--op", nargs="+", default=list(ops), choices=ops)
    parser.add_argument(
        "--attention",
        type=int,
        nargs=3,
        action="append",
        metavar=("D", "T", "W"),
        help="window_attn alone, of this head dim, length and window",
    )
    parser.add_argument(
        "--fast-weights",
        type=int,
        nargs=3,
        action="append",
        metavar=("D", "T", "CHUNK"),
        help="block_causal_ttt alone with momentum, of these widths, this length and chunk size",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command")
    parser.add_argument(
        "--lact-checkout", type=Path, metavar="PATH", help="of github.com/a1600012888/LaCT"
    )
    parser.add_argument("--json", type=Path, help="also write one JSON object per line here")
    return parser.parse_args(arguments)


def _works(options: argparse.Namespace) -> list[Work]:
    from benchmarks.instruction_counts import points

    chosen = [points.attention(*sizes) for sizes in options.attention or ()]
    for sizes in options.fast_weights or ():
        chosen.append(points.fast_weights(*sizes, momentum=True))
    if chosen:
        return chosen
    works = points.QUICK_WORKS if options.quick else points.WORKS
    return [work for work in works if work.op in options.op]


def _run(work: Work, arch: int, lact_checkout: Path | None, file: Path | None) -> bool:
    """Ours, then the peers that run here, which have to compute the same. Whether ours came to its end."""
    from benchmarks.instruction_counts import counting, points, rates
    from benchmarks.instruction_counts.peers import OURS, implementations
    from benchmarks.measure import DIFFERENCE_LIMITS, difference_of, status_of

    sizes = " ".join(f"{name}={x}" for name, x in work.shape.items())
    expected = {}  # by pass
    for peer in implementations(work, lact_checkout):
        print(f"\n{work.op}, {peer.name}, sm_{arch} ({rates.GPUS[arch].name}), bfloat16, {sizes}")
        try:
            function = peer.build(work, arch)
            if peer.note:
                print(f"  {peer.note}")
            setting = functools.partial(peer.setting, arch)
            for rows, results in counting.count(work, peer.name, function, arch, setting):
                difference = difference_of(results, expected.setdefault(rows[-1].part, results))
                if not difference <= DIFFERENCE_LIMITS[points.DTYPE]:
                    raise ArithmeticError(f"not counted: differs from ours by {difference:.1%}")
                print("\n".join(table(rows)), flush=True)
                _append(file, rows)
        except Exception as error:  # a line that says so, not the end of the run
            print(f"  {status_of(error)}", flush=True)
            if peer.name == OURS:
                return False
    return True


def _append(file: Path | None, rows: list[CountRow]) -> None:
    if file:
        with file.open("a") as lines:
            lines.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def table(rows: list[CountRow]) -> list[str]:
    """Lines for the screen: the kernels of a pass, their total, and what is needed."""
    total = rows[-1]
    lines = [total.part, HEADER, *map(_line, rows)]
    for row in rows:
        if row.configurations:
            lines.append(f"  {row.kernel}: {'; '.join(row.configurations)}")
    lines += [_executed(total), _needed(total)]
    if total.kept_bytes:
        lines.append(f"  kept for the backward besides the inputs: {total.kept_bytes / 1e6:.3f} MB")
    return lines


def _executed(total: CountRow) -> str:
    """What stands in the rows, and what torch did besides."""
    mflop = total.matrix_flops / 1e6
    here = (
        f"{total.instructions / mflop:.0f} warp-instructions per MFLOP" if mflop else "no products"
    )
    libraries = f"{total.torch_matrix_flops / 1e6:.1f} MFLOP"
    return (
        f"  executed: {here} of the rows above; besides by torch's own operations {libraries} and"
        f" {total.torch_bytes / 1e6:.3f} MB"
    )


def _needed(total: CountRow) -> str:
    least = total.least_bytes
    both = total.requested_bytes + total.torch_bytes
    needs = (
        f"{least / 1e6:.3f} MB ({total.requested_bytes / least:.2f} times that requested,"
        f" {both / least:.2f} with torch's own operations)"
    )
    if total.needed_flops:
        mflop = total.needed_flops / 1e6
        executed = (total.matrix_flops + total.torch_matrix_flops) / total.needed_flops
        needs += f" and {mflop:.1f} MFLOP ({executed:.2f} times that executed"
        if not total.torch_matrix_flops:  # otherwise kernels here do not do all that is needed
            needs += f", {total.instructions / mflop:.0f} warp-instructions per MFLOP"
        needs += ")"
    return f"  needed: {needs}; bound of that alone {total.needed_bound_us:.3f} us"


def _line(row: CountRow) -> str:
    from benchmarks.instruction_counts import rates

    executed, least = rates.wavefronts(row.counts)
    units = "".join(
        f" {sum(row.counts.get(unit, 0) for unit in units) / 1e3:>8.1f}"
        for units in COLUMNS.values()
    )
    return (
        f"{row.kernel:<42} {row.launches:>8} {row.programs:>8} {row.warps:>6}{units}"
        f" {row.instructions / 1e3:>8.1f} {executed / least if least else 1:>5.2f}"
        f" {row.requested_bytes / 1e6:>7.3f} {row.sector_bytes() / 1e6:>7.3f}"
        f" {row.sector_bytes('distinct_') / 1e6:>7.3f} {row.matrix_flops / 1e6:>7.1f}"
        f" {row.overlapped_bound_us:>8.3f} {row.limit:<10} {row.serial_bound_us:>8.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
