"""The picture at the end of a run: throughput, or memory, against the swept variable."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report import Row

TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def plot(rows: Iterable[Row], device: str, path: Path) -> bool:
    """One panel per sweep and mode. False, with a message, when matplotlib is missing or no row has data.

    A sweep over T shows peak memory, one over the slots of a cache throughput on needed bytes; the others
    show throughput on needed FLOPs, and the rate of a plain matrix product beside it.
    """
    panels = list(_panels(rows))
    if not panels:
        print("nothing was measured, so there is no plot")
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed, so there is no plot")
        return False

    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7 * columns, 4.5 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, panel) in zip(axes.flat, panels):
        draw(axis, panel)
        axis.set_title(title, fontsize=9)
    figure.suptitle(device)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot in {path}")
    return True


def draw(axis, rows: list[Row]) -> None:
    """The rows of one panel on a matplotlib axis, one line per variant."""
    from matplotlib.ticker import NullLocator

    for variant in dict.fromkeys(row.variant for row in rows):
        line = [row for row in rows if row.variant == variant]
        points = sorted((row.place, _height(row)) for row in line)
        axis.plot(*zip(*points), marker="o", label=variant, linewidth=2 if line[0].ours else 1)
    axis.set_xscale("log", base=2)
    if rows[0].swept == "T":
        axis.set_yscale("log", base=2)
        axis.set(xlabel="tokens T", ylabel="peak memory beyond the inputs, MiB")
    elif rows[0].swept == "S":
        axis.set(xlabel="slots S of the cache", ylabel="GB/s on needed bytes")
        axis.set_ylim(bottom=0)
    else:
        matrix = {row.place: row.matrix_tflops for row in rows}
        axis.plot(*zip(*sorted(matrix.items())), "k--", linewidth=1, label="plain matrix product")
        axis.set(xlabel=rows[0].swept.replace("_", " "), ylabel="TFLOP/s on needed FLOPs")
        axis.set_ylim(bottom=0)
    axis.set_xticks(sorted({row.place for row in rows}))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _panels(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows with data, grouped by all that does not vary within a panel."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if _height(row) is None:
            continue
        fixed = " ".join(f"{name}={x}" for name, x in row.shape.items() if name != row.swept)
        title = f"{row.op}, {TITLES[row.mode]}, {row.dtype}\n{fixed}"
        panels.setdefault(title, []).append(row)
    yield from panels.items()


def _height(row: Row) -> float | None:
    if row.swept == "T":
        return None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
    return row.needed_gb_per_s if row.swept == "S" else row.needed_tflops
