"""The table, and the rows as JSON lines: see the package's docstring."""

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path

from benchmarks import compile_report
from benchmarks.compile_report.architectures import ARCHITECTURES, KIB
from benchmarks.compile_report.kernels import COMPILED_FOR, compile_cases
from benchmarks.compile_report.rows import CompileRow, compile_reports

_COLUMNS = (
    f"{'kernel':<31} {'implementation':>14} {'arch':>4} {'dtype':>8} {'shape':>18} {'tile':>11} {'warps':>5}"
    f" {'stages':>6} {'regs':>4} {'spills':>6} {'shared KiB':>13} {'CTA/SM':>6} {'warps/SM':>8}"
    f" {'s':>5}  matrix instructions, times computed; in each of their loops: compares/selects (on the"
    " way around a mask), copies in flight, waits/products, overlapped/special functions"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report",
        description=compile_report.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(COMPILED_FOR), choices=list(ARCHITECTURES)
    )
    parser.add_argument(
        "--pass", dest="passes", nargs="+", default=[], help="only kernels of these names"
    )
    parser.add_argument(
        "--demanding", action="store_true", help="without cases that are part of another one"
    )
    parser.add_argument("--json", type=Path, help="also write one JSON object per line here")
    options = parser.parse_args(arguments)
    started, rows = time.perf_counter(), []
    print(_COLUMNS, flush=True)
    try:
        for row in compile_reports(compile_cases(options.arch, options.passes, options.demanding)):
            rows.append(row)
            print(_line(row), flush=True)
            for warning in row.warnings:
                print(f"    ptxas: {warning}", flush=True)
    except RuntimeError as error:
        if rows:
            raise
        print(error, file=sys.stderr)
        return 2
    if options.json:
        lines = (json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        options.json.write_text("".join(lines))
    counts = {
        "spill": sum(row.spilled_bytes > 0 for row in rows),
        "over the limit": sum(row.shared_bytes > row.shared_limit for row in rows),
        "with warnings": sum(bool(row.warnings) for row in rows),
        "compute products more than once": sum((row.product_repeats or 1) > 1 for row in rows),
    }
    seconds = time.perf_counter() - started
    found = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"{len(rows)} kernels in {seconds:.0f} s; {found}")
    return int(any(counts.values()))


def _line(row: CompileRow) -> str:
    matrix = ", ".join(f"{n} {name}" for name, n in row.matrix_instructions.items()) or "none"
    if row.product_repeats is not None:
        matrix += f" x{row.product_repeats:.3g}"
    shared = f"{row.shared_bytes / KIB:.1f}/{row.shared_limit // KIB}"
    config = row.config
    tile = "x".join(
        str(config[name]) for name in ("block_m", "block_n", "block_k") if name in config
    )
    return (
        f"{row.kernel:<31} {config['implementation']:>14} {row.arch:>4} {row.dtype:>8}"
        f" {row.shape:>18} {tile:>11}"
        f" {config['num_warps']:>5} {config['num_stages']:>6} {row.registers:>4}"
        f" {row.spilled_bytes:>6} {shared:>13}"
        f" {row.programs_per_multiprocessor:>6} {row.warps_per_multiprocessor:>8}"
        f" {row.seconds:>5.1f}  {'; '.join([matrix, *map(_loop, row.matrix_loops)])}"
    )


def _loop(loop: dict) -> str:
    copies = "-" if loop["copies_in_flight"] is None else loop["copies_in_flight"]
    around = ""  # where a branch goes around the mask
    if loop["least_selects"] < loop["selects"]:
        around = f" ({loop['least_compares']}/{loop['least_selects']})"
    return (
        f"{loop['compares']}/{loop['selects']}{around} {copies} {loop['waits']}/{loop['products']}"
        f" {loop['overlapped']}/{loop['special_functions']}"
    )


if __name__ == "__main__":
    gc.disable()  # to look for garbage, of which compilers leave little, takes an eighth of the time
    sys.exit(main())
