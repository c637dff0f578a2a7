"""The one screen at the end of a check on a GPU: a line for each stage, and its timings as a table."""

import dataclasses
from collections.abc import Iterable, Iterator

from benchmarks.registry import OPERATIONS, WindowAttnWithKVCache
from benchmarks.report import Row, significant

OURS = "lact_kernels triton"
NOTE = "bwd: forward and backward together, less forward. x: as many times our time."
_COUNTS = {"passed": "passed", "failures": "failed", "errors": "errors", "skipped": "skipped"}
_SYMBOLS = {"window_size": "W", "chunk_size": "C", "Hq": "H", "Dk": "D", "sequences": "N"}
_SYMBOLS |= {"plan": "", "pieces": "N", "piece": "C"}
_LIKE = {"Hkv": ("Hq",), "Dv": ("D", "Dk"), "Dh": ("Dk",)}  # not shown where they are the same
_WIDTH = 14  # of a peer's time and ratio
_FIELDS = {field.name for field in dataclasses.fields(Row)}


def stage_line(name: str, stage: dict, budget: float) -> str:
    """`stage` is its entry in summary.json."""
    verdict = "ok" if stage["ok"] else f"FAILED ({stage['status']})"
    if stage["stopped"]:
        verdict += ", stopped"
    if "rows" in stage:
        details = f"{stage['rows']} rows"
    else:
        counts = [f"{stage[key]} {text}" for key, text in _COUNTS.items() if key in stage]
        details = ", ".join(counts) or "no report"
    return f"{name:<24} {stage['seconds']:>6.1f} of {budget:>3.0f} s  {verdict}; {details}"


def yardsticks(rows: Iterable[dict]) -> list[str]:
    """Our kernels' times and rates beside the peers' times, from rows of `benchmarks.run`.

    Where something was measured in two runs, the later counts: a ratio is of one run.
    """
    tables: dict[str, dict[str, dict[str, dict[str, dict]]]] = {}  # by op, point, mode, variant
    for row in rows:
        if row.keys() >= _FIELDS and row["op"] in OPERATIONS:
            modes = tables.setdefault(row["op"], {}).setdefault(_label(row["shape"]), {})
            variants = modes.setdefault(row["mode"], {})
            if row["variant"] in variants:
                variants.clear()
            variants[row["variant"]] = row
    lines = [line for op, points in tables.items() for line in _table(op, points)]
    return [*lines, NOTE] if lines else []


def _table(op: str, points: dict[str, dict[str, dict[str, dict]]]) -> Iterator[str]:
    measured = [
        (label, mode, variants)
        for label, modes in points.items()
        for mode, variants in _forward_and_backward(modes)
    ]
    names = {name: None for *_, variants in measured for name in variants}  # in their order
    peers = [x for x in names if not x.startswith("lact_kernels")]
    peers = [x for x in peers if any(_time(variants.get(x)) for *_, variants in measured)]
    unit = "GB/s" if op == WindowAttnWithKVCache.op else "TFLOP/s"
    width = max(len(op), *(len(label) for label in points))
    columns = {x: max(_WIDTH, len(_title(x))) for x in peers}
    titles = "".join(f"  {_title(x):>{columns[x]}}" for x in peers)
    yield f"{op:<{width}}  {'':<7} {'ms':>8} {unit:>8} {'matrix':>6}{titles}"
    for label, mode, variants in measured:
        ours = variants.get(OURS)
        cells = "".join(f"  {_cell(variants.get(x), ours):>{columns[x]}}" for x in peers)
        yield f"{label:<{width}}  {mode:<7} {_ours(ours, unit)}{cells}"


def _forward_and_backward(modes: dict) -> Iterator[tuple[str, dict]]:
    """The forward, and the backward as what both take more; both together where that is not known."""
    forward, both = modes.get("fwd", {}), modes.get("fwd_bwd", {})
    if forward:
        yield "fwd", forward
    if both:
        backward = {name: _backward(row, forward.get(name)) for name, row in both.items()}
        yield ("fwd_bwd", both) if None in backward.values() else ("bwd", backward)


def _backward(both: dict, forward: dict | None) -> dict | None:
    if _time(both) is None:
        return both  # which says why there is no time
    if _time(forward) is None or both["p50_ms"] <= forward["p50_ms"]:
        return None
    milliseconds = both["p50_ms"] - forward["p50_ms"]
    work = [row["needed_tflops"] * row["p50_ms"] for row in (both, forward)]
    tflops = (work[0] - work[1]) / milliseconds
    share = tflops / both["matrix_tflops"]
    return both | {
        "p50_ms": milliseconds,
        "needed_tflops": tflops,
        "share_of_matrix_rate": share,
    }


def _time(row: dict | None) -> float | None:
    return row["p50_ms"] if row and row["status"] == "ok" else None


def _title(name: str) -> str:
    """A peer's name, without its first word where it is long."""
    return name if len(name) <= 25 else name.split(" ", 1)[1]


def _ours(row: dict | None, unit: str) -> str:
    if _time(row) is None:
        return "not measured" if row is None else row["status"][:60]
    rate = row["needed_gb_per_s" if unit == "GB/s" else "needed_tflops"]
    share = f"{row['share_of_matrix_rate']:.0%}"
    return f"{significant(row['p50_ms'], 8)} {rate:>8.1f} {share:>6}"


def _cell(row: dict | None, ours: dict | None) -> str:
    """A peer's milliseconds, and how many times ours that is; or in a word why there are none."""
    if _time(row) is None:
        return "-" if row is None else row["status"].split(":")[0]
    ratio = f"{row['p50_ms'] / ours['p50_ms']:.2f}x" if _time(ours) else ""
    return f"{significant(row['p50_ms'], 7)} {ratio:>6}"


def _label(shape: dict) -> str:
    """The sizes of a point, without those that follow from others and flags that are off."""
    parts = []
    for name, value in shape.items():
        follows = value in [shape.get(x) for x in _LIKE.get(name, ())]
        if value is False or follows or (name, value) == ("sequences", 1):
            continue
        symbol = _SYMBOLS.get(name, name)
        parts.append(symbol if value is True else f"{symbol}{'full' if value is None else value}")
    return " ".join(parts)
