"""The tables of docs/scaling.md: what is counted, and what is predicted from it.

```
python -m benchmarks.scaling                                      # as the page has them
python -m benchmarks.scaling --model 3B --gpus 8 32 128 --tokens 256K 1M
```
"""

import argparse
import dataclasses
import math
import sys

from benchmarks.scaling import counts, times
from benchmarks.scaling.counts import FLOAT32, HALF
from benchmarks.scaling.hardware import Hardware
from benchmarks.scaling.models import (
    MODELS,
    ModelConfig,
    layer_input_bytes,
    linear_flops,
    model_parameters,
)
from benchmarks.scaling.times import predict_across, predict_slices

MAX_GPUS, MAX_TOKENS = 4096, 2**30
SUFFIXES = {"M": 2**20, "K": 2**10}
HARDWARE = Hardware()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    models, gpus = [MODELS[name] for name in options.model], options.gpus
    grid = [(model, T) for model in models for T in options.tokens]
    tables = (
        bytes_table(grid, gpus),
        work_table(models),
        steps_table(grid, gpus),
        limits_table(grid),
        changes_table(models, options.tokens[0], gpus),
    )
    print("\n\n".join(tables))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {"nargs": "+", "type": positive}
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", **sizes, default=[8, 64, 512], metavar="N")
    parser.add_argument(
        "--tokens",
        **sizes,
        default=[2**20, 10 * 2**20],
        metavar="T",
        help="of one sequence; K and M are 1,024 and 1,024 times that: 1M",
    )
    options = parser.parse_args(arguments)
    most, least, longest = max(options.gpus), min(options.tokens), max(options.tokens)
    chunk = max(MODELS[name].chunk_size for name in options.model)
    if most > MAX_GPUS or longest > MAX_TOKENS:
        parser.error(f"at most {MAX_GPUS} GPUs and {MAX_TOKENS} tokens, got {most} and {longest}")
    if least // most < chunk:
        parser.error(f"--gpus {most} leaves pieces of --tokens {least} shorter than {chunk}")
    return options


def positive(text: str) -> int:
    """A positive number, which may end in K or M."""
    number, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
    if not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 512 or 1M")
    return int(number) * factor


# How a table is written: a title and rows in Markdown.


def table(title: str, columns: str, rows: list[list[str]]) -> str:
    header = columns.split("; ")
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = (f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
    return "\n".join([f"**{title}**", "", *lines])


def name_of(model: ModelConfig, T: int) -> str:
    size = next((f"{T // x}{suffix}" for suffix, x in SUFFIXES.items() if T % x == 0), f"{T:,}")
    return f"{model.name}, {size}"


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 or x == 0 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def percent(x: float) -> str:
    return f"{100 * x:.0f}%" if x >= 0.1 else f"{100 * x:.1f}%"


# The tables, in the order of the page.


def bytes_table(grid: list[tuple[ModelConfig, int]], gpus: list[int]) -> str:
    rows = []
    for (model, T), n in ((point, n) for point in grid for n in gpus):
        C, D, fast = model.chunk_size, model.head_dim, model.fast_shape
        starts, heads, parameters = (
            counts.piece_starts(T, n),
            model.attn_heads,
            model_parameters(model),
        )
        window = counts.window_halo_elements(starts[-1], model.window_size, 1, heads, D, D)
        chain = counts.chain_elements(1, *fast, model.prenorm, model.momentum) if n > 1 else 0
        halo = max(counts.chunk_halo_elements(x, C, 1, *fast[:3], model.momentum) for x in starts)
        elements, updates = counts.chunk_allreduce_elements(T, C, 1, *fast)
        megabytes = HALF * window, FLOAT32 * chain, HALF * halo[0] + FLOAT32 * halo[1]
        gigabytes = (
            counts.ring_bytes(HALF * parameters, n),
            counts.ring_bytes(FLOAT32 * parameters, n),
            layer_input_bytes(model, math.ceil(T / n)),
        )
        reduced = 2 * counts.ring_bytes(FLOAT32 * elements, n)
        rows.append(
            [
                f"{name_of(model, T)}, {n}",
                *(number(x / 1e6) for x in megabytes),
                f"{updates:,} × {number(reduced / 1e6)}",
                *(number(x / 1e9) for x in gigabytes),
            ]
        )
    return table(
        "Bytes of the rank with the most, counted: MB per layer and direction, and GB per step",
        "model, T, GPUs; window halo, MB; chain, MB; chunk halo, MB; or all-reduces, MB;"
        " parameters gathered, GB; gradients scattered, GB; layer inputs kept, GB",
        rows,
    )


def work_table(models: list[ModelConfig]) -> str:
    rows = []
    for model in models:
        (H, *dims), D = model.fast_shape, model.head_dim
        f, muon = counts.ttt_flops(*dims), counts.chunk_muon_flops(*dims)
        attention = counts.window_attn_flops(model.window_size, model.attn_heads, D, D)
        rest, scan = (f.apply, f.apply_backward + f.deferred), (f.update, f.reverse_scan)
        for i, direction in enumerate(("forward", "backward")):
            linear, share = linear_flops(model)[i] / model.layers, H * muon[i] / model.chunk_size
            flops = [linear, attention[i], H * rest[i], H * scan[i], share]
            cells = [number(x / 1e6) for x in (*flops, sum(flops))]
            serial = percent(sum(flops[3:]) / sum(flops))
            rows.append([f"{model.name}, {direction}", *cells, serial])
    return table(
        "Work, counted: MFLOP per token and layer, with a share of the head",
        "model; linear; attention; TTT beside the scan; scan; Muon; sum; in the scan",
        rows,
    )


def steps_table(grid: list[tuple[ModelConfig, int]], gpus: list[int]) -> str:
    rows = []
    for (model, T), n in ((point, n) for point in grid for n in gpus):
        fits = layer_input_bytes(model, math.ceil(T / n)) <= HARDWARE.room
        name = f"{name_of(model, T)}, {n}" + ("" if fits else ", too large")
        for note, predict in (("", predict_across), ("*", predict_slices)):
            step = predict(model, T, n, HARDWARE)
            cells = [number(1e3 * seconds) for seconds in (step.ideal, step.seconds)]
            rows.append([name, step.scheme + note, *cells, percent(step.efficiency), lost(step)])
    return table(
        "Predicted steps, forward and backward, one sequence over all GPUs (* without attention)",
        "model, T, GPUs; scheme; ideal, ms; predicted, ms; efficiency; lost to",
        rows,
    )


def lost(step: times.Prediction) -> str:
    """The reasons that take at least 5% of a step."""
    shares = sorted(((x / step.seconds, name) for name, x in step.losses.items()), reverse=True)
    return ", ".join(f"{name} {percent(x)}" for x, name in shares if x >= 0.05) or "–"


def limits_table(grid: list[tuple[ModelConfig, int]]) -> str:
    rows = []
    for model, T in grid:
        most = min(MAX_GPUS, T // model.chunk_size)
        steps = {2**i: predict_across(model, T, 2**i, HARDWARE) for i in range(most.bit_length())}
        half = max(n for n, step in steps.items() if step.efficiency >= 0.5)
        gains = [n for n in steps if n > 1 and steps[n // 2].seconds >= 1.25 * steps[n].seconds]
        useful, last, share = (
            max(gains, default=1),
            max(steps),
            times.scan_share(model, T, HARDWARE),
        )
        scan = share * times.ideal_seconds(model, T, 1, HARDWARE) / model.layers
        at_useful, *others = (
            number(1e3 * x) for x in (steps[useful].seconds, steps[last].seconds, scan)
        )
        cells = [str(half), str(useful), at_useful, str(last), *others]
        rows.append([name_of(model, T), percent(share), *cells])
    return table(
        f"Predicted end of scaling across chunks, in powers of two up to {MAX_GPUS} GPUs",
        "model, T; scan of the time; most GPUs with 50%; most that gain 1.25x over half; its step, ms;"
        " most with a chunk each; its step, ms; scan of one layer, both directions, ms",
        rows,
    )


# Each with fields of the model, of the hardware, and arguments of `predict_across` that are others.
CHANGES = {
    "none": ({}, {}, {}),
    "no Muon": ({"muon": False}, {}, {}),
    "the scan twice as fast": (
        {},
        {"scan_rate": 2 * HARDWARE.scan_rate, "launch_seconds": HARDWARE.launch_seconds / 2},
        {},
    ),
    "8 sequences, one behind the other": ({}, {}, {"rows": 8}),
    "a sequence for each node": ({}, {}, {"n": HARDWARE.gpus_per_node}),
    "halos that wait for their receivers": ({}, {}, {"held": True}),
    "parameters gathered by layer": ({}, {}, {"by_layer": True}),
}


def changes_table(models: list[ModelConfig], T: int, gpus: list[int]) -> str:
    rows = []
    for base in models:
        for change, (of_model, of_hardware, others) in CHANGES.items():
            model = dataclasses.replace(base, **of_model)
            hardware = dataclasses.replace(HARDWARE, **of_hardware)
            cells = []
            for group in gpus:
                options = {"n": group, "group": group} | others
                options["n"] = min(options["n"], group)
                step = predict_across(model, T, hardware=hardware, **options)
                cells.append(percent(step.efficiency))
            rows.append([f"{base.name}, {change}", *cells])
    size = name_of(models[0], T).split(", ")[1]
    return table(
        f"Predicted efficiency with one change, {size} tokens, by number of GPUs",
        "; ".join(["model, change", *map(str, gpus)]),
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
