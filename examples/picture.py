"""The demo's picture: the recording, the change of the fast weights, and the measurements."""

from pathlib import Path

from torch import Tensor

from benchmarks.report import Row
from examples.speech import FRAMES_PER_SECOND


def draw(
    frames: Tensor,
    drift: list[float],
    chunk_size: int,
    sweeps: list[list[Row]],
    device: str,
    path: Path,
) -> None:
    """Write a PNG: log-mel `frames [T, 80]`, `drift` after each chunk, and one panel per sweep."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nmatplotlib is not installed, so there is no picture")
        return
    sweeps = [rows for rows in sweeps if rows]
    figure = plt.figure(figsize=(14, 9 if sweeps else 5.5), layout="constrained")
    grid = figure.add_gridspec(3 if sweeps else 2, max(len(sweeps), 1))
    seconds = len(frames) / FRAMES_PER_SECOND

    spectrogram = figure.add_subplot(grid[0, :])
    extent = (0, seconds, 0, frames.shape[1])
    spectrogram.imshow(frames.T, origin="lower", aspect="auto", extent=extent, cmap="magma")
    spectrogram.set(title="log-mel frames of the recording", ylabel="mel band")

    weights = figure.add_subplot(grid[1, :], sharex=spectrogram)
    times = [i * chunk_size / FRAMES_PER_SECOND for i in range(len(drift))]
    weights.step(times, drift, where="post")
    weights.set(
        title="how far the fast weights have moved from where they began",
        xlabel="seconds",
        ylabel="||w - w0|| / ||w0||",
        xlim=(0, seconds),
    )
    for column, rows in enumerate(sweeps):
        _draw_sweep(figure.add_subplot(grid[2, column]), rows)
    figure.suptitle(device)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\npicture in {path}")


def _draw_sweep(axis, rows: list[Row]) -> None:
    """Throughput against the window size; time against T beside FLOPs scaled to the last point."""
    from matplotlib.ticker import NullLocator

    places = [row.place for row in rows]
    flops = [row.needed_tflops * row.p50_ms for row in rows]  # in units of 1e9
    times = [row.p50_ms for row in rows]
    if rows[0].swept == "T":
        axis.plot(places, times, "o-", label="measured")
        axis.plot(places, [x / flops[-1] * times[-1] for x in flops], "k--", label="needed FLOPs")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(ylabel="ms")
    else:
        rates = [1e3 * x / ms for x, ms in zip(flops, times)]
        axis.plot(places, rates, "o-", label="measured")
        axis.plot(places, [1e3 * row.matrix_tflops for row in rows], "k--", label="matrix product")
        axis.set_ylim(bottom=0)
        axis.set(ylabel="GFLOP/s on needed FLOPs")
    axis.set_xscale("log", base=2)
    axis.set_xticks(places)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=rows[0].swept.replace("_", " "))
    axis.set_title(f"{rows[0].op}, forward + backward", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
